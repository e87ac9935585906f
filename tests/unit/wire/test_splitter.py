"""What both splitters promise beyond the corpus: verdicts, holding, bounds, ends, and the counters."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import proxyd._scan as compiled_scan
import proxyd._sse as compiled_sse
from proxyd.wire import scan as pure_scan
from proxyd.wire import sse as pure_sse
from proxyd.wire.sse import FLAG_DONE, FLAG_ERROR_FIELD, FLAG_FIRST, FLAG_OVERSIZE
from tests.corpus_cases import cuts

BUILDS = {"pure": (pure_sse, pure_scan), "compiled": (compiled_sse, compiled_scan)}
Call = tuple[bytes, bytes, int]


class Build:
    """One of the two implementations under test."""

    def __init__(self, name: str) -> None:
        self.sse, self.scan = BUILDS[name]

    def splitter(self, verdict: Callable[[bytes, bytes, int], bytes | None], **options: Any) -> Any:
        if "watch" in options:
            options["watch"] = self.scan.Watch(*options["watch"])
        return self.sse.Splitter(verdict, **options)

    def run(
        self, pieces: list[bytes], verdict: Callable[[bytes], bytes | None] = lambda data: None, **options: Any
    ) -> tuple[Any, bytes, list[Call]]:
        """(splitter, bytes out with those of finish(), calls); `verdict` is asked with the data."""
        calls: list[Call] = []

        def on_event(name: bytes, data: bytes, flags: int) -> bytes | None:
            calls.append((name, data, flags))
            return verdict(data)

        splitter = self.splitter(on_event, **options)
        out = b"".join([splitter.feed(piece) for piece in pieces])
        return splitter, out + splitter.finish(), calls


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Build:
    return Build(request.param)


def test_flags_have_the_same_values_in_both_builds() -> None:
    names = ("FLAG_FIRST", "FLAG_DONE", "FLAG_ERROR_FIELD", "FLAG_OVERSIZE")
    for module in (pure_sse, compiled_sse):
        assert [getattr(module, name) for name in names] == [1, 2, 4, 8]


def test_without_a_watch_every_event_is_reported_with_its_flags(build: Build) -> None:
    body = b"data: a\n\nevent: b\ndata: {}\n\ndata:[DONE] x\n\nid: 1\n\ndata\n\n"
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces)
        assert out == body, label
        assert calls == [(b"", b"a", FLAG_FIRST), (b"b", b"{}", 0), (b"", b"[DONE] x", FLAG_DONE), (b"", b"", 0)], label
        assert splitter.events == 4
        assert splitter.text_bytes == 0


def test_with_a_watch_only_what_matters_is_reported(build: Build) -> None:
    boring = b'data: {"content":"abc"}\n\n'
    body = (
        boring * 3 + b'data: {"usage":null}\n\n' + b'data: {"usage": {}}\n\n' + b'data:  {"type":"end"}\n\n'
        b"event: error\ndata: {}\n\n" b"event: ping\ndata: {}\n\n" b"data: plain\n\n" b"data:\n\n" b"data: [DONE]\n\n"
    )
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces, watch=([b"usage"], [b"end"], [b"content"]))
        assert out == body, label
        assert calls == [
            (b"", b'{"content":"abc"}', FLAG_FIRST),
            (b"", b'{"usage": {}}', 0),
            (b"", b' {"type":"end"}', 0),
            (b"error", b"{}", 0),
            (b"", b"plain", 0),
            (b"", b"", 0),
            (b"", b"[DONE]", FLAG_DONE),
        ], label
        assert splitter.events == 11
        assert splitter.text_bytes == 9


def test_an_error_field_is_reported_once_and_is_an_event_only_with_data(build: Build) -> None:
    body = b'error: {"a":1}\n\ndata: {"content":"xy"}\nerror: b\n\ndata: {}\n\nerror\n\n'
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces, watch=([], [], [b"content"]))
        assert out == body, label
        assert calls == [
            (b"", b'{"a":1}', FLAG_ERROR_FIELD),
            (b"", b"b", FLAG_ERROR_FIELD | FLAG_FIRST),
            (b"", b"", FLAG_ERROR_FIELD),
        ], label
        assert (splitter.events, splitter.text_bytes) == (2, 2)


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_dropped_block_leaves_no_byte_and_no_blank_line(build: Build, end: bytes) -> None:
    body = b"data: a\n\ndata: x\nid: 1\n\n: c\ndata: b\n\n".replace(b"\n", end)
    wanted = b"data: a\n\n: c\ndata: b\n\n".replace(b"\n", end)
    for label, pieces in cuts(body):
        splitter, out, _ = build.run(pieces, lambda data: b"" if data == b"x" else None)
        assert out == wanted, label
        assert splitter.last_event_id == b"1", "what is hidden from the client is still part of the stream"


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_replaced_block_keeps_its_comments_in_front(build: Build, end: bytes) -> None:
    body = b": 0\nid: 1\n: 1\ndata: x\n: 2\nevent: e\n\ndata: b\n\n".replace(b"\n", end)
    wanted = b": 0\n: 1\n: 2\nNEW\n\ndata: b\n\n".replace(b"\n", end).replace(b"NEW" + end + end, b"data: y\n\n")
    for label, pieces in cuts(body):
        splitter, out, _ = build.run(pieces, lambda data: b"data: y\n\n" if data == b"x" else None)
        assert out == wanted, label
        assert splitter.comments == 3


def test_a_feed_gives_whole_blocks_and_holds_the_rest(build: Build) -> None:
    splitter = build.splitter(lambda name, data, flags: None)
    assert splitter.feed(b"data: a\n") == b""
    assert splitter.at_boundary
    assert splitter.feed(b"\nda") == b"data: a\n\n"
    assert splitter.feed(b"ta: b\n\n: com") == b"data: b\n\n"
    assert splitter.feed(b"ment\n") == b": comment\n"
    assert splitter.feed(b"\n\n") == b"\n\n"
    assert splitter.feed(b"") == b""
    assert splitter.feed(b"data: c\r\n\r") == b"data: c\r\n\r"
    assert splitter.feed(b"\n") == b"\n"
    assert splitter.at_boundary


def test_a_block_over_the_hold_is_released_and_cannot_be_replaced_under_any_cut(build: Build) -> None:
    for size in range(12, 21):
        block = b"data: " + b"x" * (size - 8) + b"\n\n"
        body = b"data: a\n\n" + block + b"data: b\n\n"
        wanted = body if size > 16 else body.replace(block, b"")
        for label, pieces in cuts(body):
            _, out, calls = build.run(pieces, lambda data: b"" if data[:1] == b"x" else None, hold_bytes=16)
            assert out == wanted, (size, label)
            assert len(calls) == 3, (size, label)


@pytest.mark.parametrize("end", [b"\r", b"\r\n"])
def test_the_hold_is_measured_alike_for_every_line_end(build: Build, end: bytes) -> None:
    for size in range(12, 24):
        block = b"data: " + b"x" * (size - 8) + end + end
        body = b"data: a" + end + end + block
        _, wanted, _ = build.run([body], lambda data: b"" if data[:1] == b"x" else None, hold_bytes=16)
        for label, pieces in cuts(body):
            _, out, _ = build.run(pieces, lambda data: b"" if data[:1] == b"x" else None, hold_bytes=16)
            assert out == wanted, (size, label)


def test_a_released_block_is_no_boundary_until_it_ends(build: Build) -> None:
    splitter = build.splitter(lambda name, data, flags: None, hold_bytes=8)
    assert splitter.feed(b"data: ab") == b""
    assert splitter.at_boundary
    assert splitter.feed(b"c") == b"data: abc"
    assert not splitter.at_boundary
    assert splitter.feed(b"d\n") == b"d\n"
    assert not splitter.at_boundary
    assert splitter.feed(b"\n") == b"\n"
    assert splitter.at_boundary
    assert splitter.feed(b": a long comment") == b": a long comment"
    assert not splitter.at_boundary
    assert splitter.feed(b"\n") == b"\n"
    assert splitter.at_boundary


def test_an_oversize_event_is_reported_unread_and_forwarded_under_every_cut(build: Build) -> None:
    for size in range(28, 37):
        big = b'data: {"content":"' + b"x" * (size - 22) + b'"}\n\n'
        body = b"id: 1\ndata: {}\n\nid: 2\n\n" + big + b'data: {"content":"ab"}\n\n'
        for label, pieces in cuts(body):
            splitter, out, calls = build.run(
                pieces, lambda data: b"", watch=([], [], [b"content"]), max_event_bytes=32, hold_bytes=16
            )
            assert splitter.events == 3, (size, label)
            assert out[-len(big + b'data: {"content":"ab"}\n\n'):] == big + b'data: {"content":"ab"}\n\n', (size, label)
            assert calls[1:] == ([(b"", b"", FLAG_OVERSIZE)] if size > 32 else []), (size, label)
            assert splitter.text_bytes == (2 if size > 32 else 2 + size - 22), (size, label)


def test_the_first_kilobyte_of_the_metered_text_is_kept_under_every_cut(build: Build) -> None:
    texts = [b"role", b"Gr\\u00fc", "\N{PARTY POPPER}".encode(), b"", b"x" * 990, b"y" * 200]
    body = b"".join(b'data: {"usage":null,"content":"%b","x":"-"}\n\n' % text for text in texts)
    for label, pieces in cuts(body):
        splitter, _, _ = build.run(pieces, watch=([], [], [b"content"]))
        assert splitter.sample == b"".join(texts)[:1024], label
    splitter, _, _ = build.run([b'data: {"content":"a"}\n\n'])
    assert splitter.sample == b"", "nothing is metered without a watch"


def test_a_sample_outlives_what_ends_the_stream(build: Build) -> None:
    for end in ("finish", "discard"):
        splitter = build.splitter(lambda name, data, flags: None, watch=([], [], [b"content"]))
        assert splitter.sample == b""
        for _ in range(200):
            splitter.feed(b'data: {"content":"abcdefg"}\n\n')
        splitter.feed(b'data: {"content":"cut')
        getattr(splitter, end)()
        assert splitter.sample == (b"abcdefg" * 200)[:1024]


def test_the_id_and_error_field_of_an_oversize_event_are_ignored(build: Build) -> None:
    body = b"id: 1\n\nid: 2\nerror: x\ndata: " + b"x" * 40 + b"\ndata: y\n\n"
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces, max_event_bytes=32, hold_bytes=16)
        assert out == body, label
        assert calls == [(b"", b"", FLAG_OVERSIZE | FLAG_FIRST)], label
        assert splitter.last_event_id == b"1", label


def test_an_oversize_comment_ends_with_its_line(build: Build) -> None:
    body = b": " + b"x" * 40 + b"\ndata: a\n\n"
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces, max_event_bytes=32, hold_bytes=16)
        assert out == body, label
        assert calls == [(b"", b"a", FLAG_FIRST)], label
        assert splitter.comments == 1, label


def test_a_bom_after_an_oversize_first_line_is_part_of_a_name(build: Build) -> None:
    body = b"data: " + b"x" * 40 + b"\n\n\xef\xbb\xbfdata: a\n\n"
    for label, pieces in cuts(body):
        splitter, out, _ = build.run(pieces, max_event_bytes=32, hold_bytes=16)
        assert out == body, label
        assert splitter.events == 1, label


def test_where_nothing_may_pass_unseen_an_oversize_event_raises_under_every_cut(build: Build) -> None:
    fits = b"data: " + b"x" * 24 + b"\n\n"
    for label, pieces in cuts(fits + fits):
        assert build.run(pieces, lambda data: b"", max_event_bytes=32, hold_bytes=32)[1] == b"", label
    for label, pieces in cuts(b"data: " + b"x" * 25 + b"\n\n"):
        with pytest.raises(ValueError, match="32 bytes"):
            build.run(pieces, max_event_bytes=32, hold_bytes=32)
        assert label


def test_the_end_of_the_body_gives_the_held_bytes_and_the_tail(build: Build) -> None:
    body = b"data: a\n\nid: 9\ndata: b\ndata: c\nevent: e\ndata: unfinished"
    for label, pieces in cuts(body):
        splitter, out, calls = build.run(pieces)
        assert out == body, label
        assert splitter.tail_data == b"b\nc", label
        assert splitter.last_event_id == b"", label
        assert len(calls) == 1, label


@pytest.mark.parametrize("body", [b"", b"data: a\n\n", b"data: a", b": x\n", b"id: 1\n", b"event: e\nda"])
def test_a_body_without_a_complete_data_line_at_its_end_has_no_tail(build: Build, body: bytes) -> None:
    splitter, out, _ = build.run([body])
    assert out == body
    assert splitter.tail_data is None


def test_what_is_held_when_the_upstream_breaks_can_be_dropped(build: Build) -> None:
    splitter = build.splitter(lambda name, data, flags: None)
    assert splitter.feed(b"data: a\n\ndata: b\nda") == b"data: a\n\n"
    assert splitter.discard() == 10
    assert splitter.at_boundary
    assert splitter.discard() == 0
    assert splitter.events == 1


def test_after_a_break_inside_a_released_block_nothing_may_be_inserted(build: Build) -> None:
    splitter = build.splitter(lambda name, data, flags: None, hold_bytes=8)
    assert splitter.feed(b"data: abcdef") == b"data: abcdef"
    assert splitter.discard() == 0
    assert not splitter.at_boundary


def test_after_an_unfinished_block_was_given_out_nothing_may_be_inserted(build: Build) -> None:
    splitter = build.splitter(lambda name, data, flags: None)
    splitter.feed(b"data: a\n\ndata: b")
    assert splitter.finish() == b"data: b"
    assert not splitter.at_boundary
    clean = build.splitter(lambda name, data, flags: None)
    clean.feed(b"data: a\n\n")
    assert clean.finish() == b""
    assert clean.at_boundary


@pytest.mark.parametrize(
    ("line", "retry"),
    [
        (b"retry: 1500", 1500), (b"retry:007", 7), (b"retry: ", None), (b"retry", None), (b"retry: 1x", None),
        (b"retry: -1", None), (b"retry:  1", None), (b"retry: " + b"9" * 4000, int("9" * 4000)),
        (b"retry: " + b"9" * 4001, None), ("retry: ٣".encode(), None),
    ],
)
def test_retry_is_digits_and_counts_at_once(build: Build, line: bytes, retry: int | None) -> None:
    splitter = build.splitter(lambda name, data, flags: None)
    splitter.feed(line + b"\n")
    assert splitter.retry == retry


def test_an_event_of_5000_lines_fed_byte_by_byte_is_one_event(build: Build) -> None:
    body = b"data: q\n" * 5000 + b"\n"
    _, out, calls = build.run([body[i:i + 1] for i in range(len(body))])
    assert out == body
    assert calls == [(b"", b"\n".join([b"q"] * 5000), FLAG_FIRST)]


def test_an_event_of_a_mebibyte_fed_in_small_pieces_is_one_event(build: Build) -> None:
    body = b"data: " + b"x" * (1 << 20) + b"\n\n"
    _, out, calls = build.run([body[i:i + 97] for i in range(0, len(body), 97)])
    assert out == body
    assert [len(data) for _, data, _ in calls] == [1 << 20]


def test_what_the_callback_raises_leaves_feed(build: Build) -> None:
    def on_event(name: bytes, data: bytes, flags: int) -> bytes | None:
        raise RuntimeError("a bug of ours")

    with pytest.raises(RuntimeError, match="a bug of ours"):
        build.splitter(on_event).feed(b"data: a\n\n")
