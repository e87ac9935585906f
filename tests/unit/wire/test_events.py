"""Our own frames, read back by our own splitter."""
from __future__ import annotations

import orjson
import pytest

from proxyd.wire import events
from proxyd.wire.sse import Splitter

NASTY = {"delta": "a\r\nb\rc\n\ndata: x\u2028\u2029\x00\x85é🎈"}


def read(frames: bytes) -> tuple[Splitter, list[tuple[bytes, bytes, bytes]]]:
    """(splitter, [(name, data, id)]) of a stream."""
    found: list[tuple[bytes, bytes, bytes]] = []
    splitter = Splitter(lambda name, data, flags: found.append((name, data, splitter.last_event_id)))
    assert splitter.feed(frames) == frames
    assert splitter.finish() == b""
    return splitter, found


def test_a_content_frame_has_epoch_and_number_as_its_id() -> None:
    assert events.content(0x1A2B, 7, {"delta": "Hi"}) == b'id: 00001a2b-7\ndata: {"delta":"Hi"}\n\n'
    assert events.content(2**32 - 1, 12, {}).startswith(b"id: ffffffff-12\n")


def test_text_with_line_ends_stays_one_data_line() -> None:
    frame = events.content(1, 1, NASTY)
    assert frame.count(b"\n") == 3
    assert b"\r" not in frame
    _, found = read(frame)
    assert [(name, orjson.loads(data)) for name, data, _ in found] == [(b"", NASTY)]


def test_half_a_surrogate_pair_passes_escaped() -> None:
    frame = events.content(1, 1, {"delta": "\ud83c"})
    assert frame == b'id: 00000001-1\ndata: {"delta":"\\ud83c"}\n\n'


def test_usage_and_done_move_the_cursor() -> None:
    counts = {"prompt_tokens": 1, "completion_tokens": 2, "cached_tokens": None, "reasoning_tokens": 0}
    _, found = read(events.usage(1, 2, **counts, estimated=False) + events.done(1, 3, "stop"))
    assert [(name, at) for name, _, at in found] == [(b"usage", b"00000001-2"), (b"done", b"00000001-3")]
    assert orjson.loads(found[0][1]) == {**counts, "estimated": False}
    assert orjson.loads(found[1][1]) == {"finish_reason": "stop"}


def test_the_start_frame_carries_retry_and_no_id() -> None:
    frame = events.start(request_id="r", model="m", epoch=255, first=1, head=0, state="running", retry_ms=2345)
    splitter, found = read(frame)
    assert frame.startswith(b"retry: 2345\nevent: start\n")
    assert splitter.retry == 2345
    assert found == [(b"start", found[0][1], b"")]
    assert orjson.loads(found[0][1]) == {
        "request_id": "r", "model": "m", "epoch": "000000ff", "from": 1, "head": 0, "state": "running",
    }


def test_a_task_s_start_frame_names_the_task() -> None:
    frame = events.start(request_id="r", model="m", epoch=1, first=1, head=0, state="queued", task_id="t")
    _, found = read(frame)
    assert orjson.loads(found[0][1])["task_id"] == "t"
    assert b"retry" not in frame


@pytest.mark.parametrize(
    ("frame", "name", "data"),
    [
        (events.reset("epoch"), b"reset", {"reason": "epoch"}),
        (events.throttle("queue", 250), b"throttle", {"reason": "queue", "retry_ms": 250}),
        (events.drain(1500), b"drain", {"retry_ms": 1500}),
        (events.error({"message": "m\n", "type": "api_error"}, retryable=True), b"error",
         {"error": {"message": "m\n", "type": "api_error"}, "retryable": True}),
    ],
)
def test_control_frames_do_not_move_the_cursor(frame: bytes, name: bytes, data: dict[str, object]) -> None:
    _, found = read(events.content(1, 1, {}) + frame)
    assert found[1][0] == name
    assert orjson.loads(found[1][1]) == data
    assert found[1][2] == b"00000001-1"
    assert b"id:" not in frame
