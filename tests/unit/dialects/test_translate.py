"""The site's route: what upstream streams and answers become, whatever the dialect."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxyd._sse import Splitter
from proxyd.dialects.base import Dialect, Route, Translator, build, make_observer, parse_ask
from tests.corpus_cases import few_cuts
from tests.unit.dialects.corpus_runs import Case, api_cases, case_named
from tests.unit.dialects.test_provider_shapes import DONE, STOP, chunk, delta, sse, start, usage

CASES = [case for case in api_cases() if case.is_sse and case.route in (Route.CHAT, Route.MESSAGES)]
Frames = list[tuple[str, Any]]


def translator(dialect: Dialect = "openai", prompt: str = "12345678") -> Translator:
    ask = parse_ask(Route.STREAM, orjson.dumps({"prompt": prompt, "model": "site"}))
    made = make_observer(ask, dialect, build(ask, dialect, "up", True), request_id="r1", epoch=0x1A2B3C4D)
    assert isinstance(made, Translator)
    return made


def read(out: bytes) -> Frames:
    """(event, data) of each frame; checks that ids run 1, 2, 3 ... and that control frames have none."""
    frames: Frames = []
    number = 0
    for block in out.replace(b"\n\n\n", b"\n\n").split(b"\n\n")[:-1]:
        if b"data: " not in block:
            continue  # comments and blocks without data are the splitter's to pass or drop
        fields = dict(line.split(b": ", 1) for line in block.split(b"\n") if not line.startswith(b":"))
        name = fields.get(b"event", b"").decode()
        if name in ("start", "error"):
            assert b"id" not in fields
        else:
            number += 1
            assert fields[b"id"] == b"1a2b3c4d-%d" % number
        frames.append((name, orjson.loads(fields[b"data"])))
    return frames


def told(made: Translator, chunks: list[bytes], *, clean: bool = True) -> Frames:
    splitter = Splitter(made.on_event, made.watch)
    out = b"".join(bytes(splitter.feed(piece)) for piece in chunks)
    out += made.ending(clean)
    assert made.ending(clean) == made.error_event({"message": "late"}) == b""
    return read(out)


def dialect_of(case: Case) -> Dialect:
    return "anthropic" if case.route is Route.MESSAGES else "openai"


def text_of(frames: Frames, kind: str | None = None) -> str:
    return "".join(data["delta"] for name, data in frames if not name and data.get("kind") == kind)


def test_the_first_frames_are_a_random_retry_and_the_start() -> None:
    preamble = translator().preamble()
    retry, _, rest = preamble.partition(b"\n")
    assert 1000 <= int(retry.removeprefix(b"retry: ")) <= 4000
    assert read(rest) == [
        (
            "start",
            {"request_id": "r1", "model": "site", "epoch": "1a2b3c4d", "from": 1, "head": 0, "state": "running"},
        )
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_ends_in_exactly_one_of_done_and_error_however_it_is_cut(case: Case) -> None:
    whole: Frames | None = None
    for _, pieces in few_cuts(case.body):
        made = translator(dialect_of(case))
        frames = told(made, pieces)
        whole = frames if whole is None else whole
        assert frames == whole
        if len(case.body) > 100_000:
            break
    assert whole is not None
    names = [name for name, _ in whole]
    # rule 10 is for accounts: what was never dispatched is not told
    completed = case.expected["outcome"] == "completed"
    assert names.count("done") == completed
    assert names.count("error") == (not completed)
    assert names[-2:] == ["usage", "done"] if completed else names[-1] == "error"
    assert (made.outcome, made.model) == (case.expected["outcome"], case.expected["model"])
    counted = dict(whole).get("usage")
    known = case.expected["usage"]
    if counted is not None and case.expected["usage_source"] in ("provider", "provider_timings"):
        assert counted == {
            "prompt_tokens": known["prompt_tokens"],
            "completion_tokens": known["completion_tokens"],
            "cached_tokens": known["cached_tokens"] or 0,
            "reasoning_tokens": known["reasoning_tokens"] or 0,
            "estimated": False,
        }


def test_text_and_finish_of_a_chat_stream_are_told() -> None:
    frames = told(translator(), [case_named("openai/chat-include-usage.sse").body])
    assert text_of(frames) == "Hello there"
    assert frames[-1] == ("done", {"finish_reason": "stop"})


def test_text_in_every_script_arrives_whole() -> None:
    case = case_named("openai/chat-utf8-cuts.sse")
    assert text_of(told(translator(), [case.body])) == case.expected["text"]


def test_halves_of_a_surrogate_pair_in_two_events_are_joined() -> None:
    frames = told(translator(), [case_named("openai/chat-split-surrogate-escapes.sse").body])
    text_of(frames).encode()
    first, second = b'data: {"choices":[{"delta":{"content":"a\\ud83d"}}]}\n\n', b"\\ude42b"
    frames = told(translator(), [first, first.replace(b"a\\ud83d", second), sse(chunk("c\ufffd", "stop"), DONE)])
    assert text_of(frames) == "a\U0001f642bc\ufffd"
    assert text_of(told(translator(), [first, DONE])) == "a\ufffd"


def test_reasoning_is_told_as_its_own_kind_whatever_it_is_called() -> None:
    deltas = [{"reasoning_content": "a"}, {"reasoning": "b", "reasoning_details": [{"text": "b"}]}, {"content": "c"}]
    mistral = [{"type": "thinking", "thinking": [{"type": "text", "text": "d"}]}, {"type": "text", "text": "e"}]
    deltas.append({"content": mistral})
    frames = told(translator(), [sse(*({"choices": [{"index": 0, "delta": one}]} for one in deltas), DONE)])
    assert text_of(frames, "reasoning") == "abd"
    assert text_of(frames) == "ce"


def test_a_refusal_is_text_for_the_reader() -> None:
    frames = told(translator(), [case_named("openai/chat-refusal.sse").body])
    assert text_of(frames) == "I'm sorry, I can't help with that."


def test_tool_calls_are_told_in_the_same_words_for_both_dialects() -> None:
    frames = told(translator(), [case_named("openai/chat-tool-calls.sse").body])
    assert [data for name, data in frames if not name] == [
        {"kind": "tool", "index": 0, "id": "call_a1", "name": "get_weather", "arguments": ""},
        {"kind": "tool", "index": 0, "arguments": '{"city":'},
        {"kind": "tool", "index": 0, "arguments": '"Zürich"}'},
        {"kind": "tool", "index": 1, "id": "call_b2", "name": "get_time", "arguments": ""},
        {"kind": "tool", "index": 1, "arguments": "{}"},
    ]
    assert frames[-1] == ("done", {"finish_reason": "tool_calls"})

    def block(at: int, **more: Any) -> dict[str, Any]:
        return {"type": "content_block_start", "index": at, "content_block": more}

    def part(at: int, **more: Any) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": at, "delta": more}

    body = sse(
        start(input_tokens=3),
        block(0, type="thinking", thinking=""),
        part(0, type="thinking_delta", thinking="hm"),
        block(1, type="server_tool_use", id="s", name="web_search", input={}),
        part(1, type="input_json_delta", partial_json="{}"),
        block(2, type="text", text=""),
        part(2, type="text_delta", text="so"),
        block(3, type="tool_use", id="t1", name="f", input={}),
        part(3, type="input_json_delta", partial_json=""),
        part(3, type="input_json_delta", partial_json='{"a":1}'),
        block(4, type="tool_use", id="t2", name="g", input={"b": 2}),
        delta("tool_use", output_tokens=9),
        STOP,
    )
    frames = told(translator("anthropic"), [body])
    assert [data for name, data in frames if not name] == [
        {"kind": "reasoning", "delta": "hm"},
        {"delta": "so"},
        {"kind": "tool", "index": 0, "id": "t1", "name": "f", "arguments": ""},
        {"kind": "tool", "index": 0, "arguments": '{"a":1}'},
        {"kind": "tool", "index": 1, "id": "t2", "name": "g", "arguments": '{"b":2}'},
    ]
    assert frames[-1] == ("done", {"finish_reason": "tool_calls"})


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("end_turn", "stop"), ("stop_sequence", "stop"), ("max_tokens", "length"), ("refusal", "content_filter"),
        ("tool_use", "tool_calls"), ("pause_turn", "pause_turn"),
    ],
)  # fmt: skip
def test_anthropic_stop_reasons_become_finish_reasons(reason: str, word: str) -> None:
    body = sse(start(input_tokens=1), delta(reason, output_tokens=2), STOP)
    assert told(translator("anthropic"), [body])[-1] == ("done", {"finish_reason": word})


def test_a_stream_without_usage_is_estimated_from_the_text_that_was_told() -> None:
    frames = told(translator(prompt="123456789"), [sse(chunk("12345"), chunk(finish="length"), DONE)])
    assert dict(frames)["usage"] == {
        "prompt_tokens": 3 + 7, "completion_tokens": 2, "cached_tokens": 0, "reasoning_tokens": 0, "estimated": True,
    }  # fmt: skip


def test_done_is_told_at_the_terminal_event_and_not_at_the_end_of_the_body() -> None:
    made = translator()
    splitter = Splitter(made.on_event, made.watch)
    splitter.feed(sse(chunk("a", "stop", usage=usage(1, 1))))
    assert not made.terminal
    out = read(b"id: 1a2b3c4d-1\ndata: {}\n\n" + bytes(splitter.feed(DONE)))
    assert [name for name, _ in out[1:]] == ["usage", "done"]
    assert made.terminal
    assert bytes(splitter.feed(sse(chunk("late")))) == b""
    made.finish(False, 0)
    assert made.outcome == "completed"


def test_an_upstream_error_ends_the_stream_with_its_own_words() -> None:
    frames = told(translator("anthropic"), [case_named("anthropic/error-overloaded-mid.sse").body])
    assert frames[-1] == (
        "error",
        {
            "error": {"message": "Overloaded", "type": "overloaded_error", "code": None, "request_id": "r1"},
            "retryable": True,
        },
    )
    assert text_of(frames) == "Once upon"


def test_an_answer_that_breaks_off_ends_in_a_retryable_error() -> None:
    frames = told(translator(), [sse(chunk("a"))], clean=False)
    assert frames[-1][0] == "error"
    assert frames[-1][1]["error"]["code"] == "upstream_truncated"
    assert frames[-1][1]["retryable"] is True


def test_an_error_of_the_relay_ends_the_stream_once() -> None:
    made = translator()
    (frame,) = read(made.error_event({"message": "too slow", "type": "timeout_error", "code": "idle_timeout"}))
    assert frame[1]["retryable"] is True
    assert made.ending(True) == b""


def test_a_json_answer_is_told_in_the_same_events() -> None:
    made = translator()
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "Hi", "refusal": None, "reasoning": "hm", "tool_calls": [call]}
    body = {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage(3, 1)}
    made.on_body("application/json", 200, orjson.dumps(body))
    frames = read(made.ending(True))
    assert [data for name, data in frames if not name] == [
        {"kind": "reasoning", "delta": "hm"},
        {"delta": "Hi"},
        {"kind": "tool", "index": 0, "id": "c", "name": "f", "arguments": "{}"},
    ]
    assert [name for name, _ in frames[3:]] == ["usage", "done"]
    assert frames[3][1]["prompt_tokens"] == 3

    made = translator("anthropic")
    made.on_body("application/json", 200, case_named("json/anthropic-message-200.body").body)
    frames = read(made.ending(True))
    assert [data for _, data in frames] == [
        {"delta": "Hi"},
        {
            "prompt_tokens": 312,
            "completion_tokens": 30,
            "cached_tokens": 200,
            "reasoning_tokens": 0,
            "estimated": False,
        },
        {"finish_reason": "stop"},
    ]


def test_a_json_answer_that_cannot_be_read_is_an_error() -> None:
    made = translator()
    made.on_body("text/html", 200, b"<html>")
    assert [name for name, _ in read(made.ending(True))] == ["error"]
