"""Provider shapes that the corpus does not hold, and bytes that no provider should send."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd._sse import Splitter
from proxyd.dialects.base import Observer, Route, build, make_observer, parse_ask
from tests.unit.dialects.corpus_runs import REQUEST_ID, request_body, run

CHAT, TEXT, RESPONSES, MESSAGES = Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES


def observer(route: Route, *, n: int | None = None, hide: bool = False, **more: Any) -> Observer:
    ask = parse_ask(route, request_body(route, n=n, **more))
    dialect = route.dialect or "openai"
    made = make_observer(ask, dialect, build(ask, dialect, "", hide), request_id=REQUEST_ID, epoch=1)
    assert isinstance(made, Observer)
    return made


def sse(*events: Any) -> bytes:
    """Objects as data, bytes as they are."""
    return b"".join(
        event if isinstance(event, bytes) else b"data: " + orjson.dumps(event) + b"\n\n" for event in events
    )


def chunk(content: str | None = None, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more}


def usage(prompt: int, completion: int, total: int | None = None, **more: Any) -> dict[str, Any]:
    total = prompt + completion if total is None else total
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total, **more}


DONE = b"data: [DONE]\n\n"


def watched(route: Route, body: bytes, *, clean: bool = True, **ask: Any) -> Observer:
    made = observer(route, **ask)
    run(Splitter, made, [body], clean=clean)
    everything = observer(route, **ask)
    run(Splitter, everything, [body], clean=clean, watched=False)
    for name in ("usage", "usage_source", "outcome", "finish_reason", "error", "model", "terminal", "done_seen"):
        assert getattr(made, name) == getattr(everything, name), name
    return made


def counts(seen: Observer) -> tuple[Any, ...]:
    return seen.usage.prompt, seen.usage.completion, seen.usage.cached, seen.usage.reasoning, seen.usage_source


def test_exclusive_reasoning_is_added_to_the_completion() -> None:
    told = usage(165, 2, 412, completion_tokens_details={"reasoning_tokens": 245})
    seen = watched(CHAT, sse(chunk("a"), chunk(finish="stop"), {"choices": [], "usage": told}, DONE))
    assert counts(seen) == (165, 247, None, 245, "provider")


def test_reasoning_that_is_not_the_gap_is_inside_the_completion_already() -> None:
    told = usage(10, 20, 45, completion_tokens_details={"reasoning_tokens": 3})
    seen = watched(CHAT, sse(chunk("a", "stop"), {"choices": [], "usage": told}, DONE))
    assert counts(seen) == (10, 20, None, 3, "provider")


def test_mistral_and_openrouter_give_usage_on_the_last_chunk_unasked() -> None:
    told = usage(21, 173, prompt_tokens_details={"cached_tokens": 4, "cache_write_tokens": 5})
    body = sse(b": OPENROUTER PROCESSING\n\n", chunk("a"), chunk(finish="stop"), chunk("", usage=told), DONE)
    seen = watched(CHAT, body, hide=True)
    assert counts(seen) == (21, 173, 4, None, "provider")
    assert seen.usage.cache_write == 5
    assert run(Splitter, observer(CHAT, hide=True), [body], clean=True)[0] == body


def test_an_openrouter_error_in_a_chunk_is_an_error() -> None:
    body = sse(chunk("a"), chunk("", "error", error={"code": 502, "message": "Provider disconnected"}), DONE)
    seen = watched(CHAT, body)
    assert (seen.outcome, seen.finish_reason, seen.error) == (
        "error", "error", {"message": "Provider disconnected", "type": None, "code": 502, "param": None},
    )  # fmt: skip


@pytest.mark.parametrize(
    "event",
    [
        {"object": "error", "message": "bad", "type": "BadRequestError", "param": None, "code": 400},
        b'event: error\ndata: {"error":{"message":"bad","type":"BadRequestError","code":400}}\n\n',
        b'event: error\ndata: {"message":"bad","type":"BadRequestError","code":400}\n\n',
        b'error: {"code":400,"message":"bad","type":"BadRequestError"}\n\n',
    ],
)
def test_every_shape_of_an_in_stream_error_is_read(event: Any) -> None:
    seen = watched(CHAT, sse(chunk("a"), event, DONE))
    assert (seen.outcome, seen.done_seen) == ("error", True)
    assert seen.error == {"message": "bad", "type": "BadRequestError", "code": 400, "param": None}


@pytest.mark.parametrize("event", [b"event: error\ndata: gone\n\n", b"error: gone\n\n", {"error": "gone"}])
def test_an_error_that_is_only_a_text_is_read(event: Any) -> None:
    seen = watched(CHAT, sse(chunk("a"), event))
    assert seen.error is not None
    assert (seen.outcome, seen.error["message"]) == ("error", "gone")


def test_a_null_error_is_none() -> None:
    seen = watched(CHAT, sse(chunk("a", error=None), chunk("b", "stop", error=None, usage=usage(1, 2)), DONE))
    assert (seen.outcome, seen.error) == ("completed", None)


def test_an_azure_filter_chunk_has_no_delta_and_changes_nothing() -> None:
    nested = {"hate": {"filtered": False}, "error": {"code": "content_filter_error"}}
    filtered = {"model": "m", "choices": [{"index": 0, "finish_reason": None, "content_filter_results": nested}]}
    seen = watched(CHAT, sse(chunk("a"), filtered, chunk(finish="stop"), DONE))
    assert (seen.outcome, seen.error, seen.usage_source) == ("completed", None, "none")


def test_zero_usage_on_interim_chunks_is_a_placeholder() -> None:
    def text(words: str, reason: str | None, told: Any) -> dict[str, Any]:
        return {"model": "m", "choices": [{"text": words, "index": 0, "finish_reason": reason}], "usage": told}

    body = sse(text("a", None, usage(0, 0)), text("b", "stop", usage(0, 0)))
    assert counts(watched(TEXT, body, clean=False)) == (None, None, None, None, "none")
    body += sse({"model": "m", "choices": [], "usage": usage(5, 3)}, DONE)
    assert counts(watched(TEXT, body)) == (5, 3, None, None, "provider")


def test_a_clean_end_without_done_is_complete_after_the_finish_reason() -> None:
    body = sse(chunk("a"), chunk(finish="stop"), {"choices": [], "usage": usage(20, 2)})
    assert counts(watched(CHAT, body)) == (20, 2, None, None, "provider")
    broken = watched(CHAT, body, clean=False)
    assert (broken.outcome, broken.usage_source) == ("truncated", "provider_partial")


def test_an_event_of_one_mebibyte_is_read() -> None:
    body = sse(chunk("x" * (1 << 20)), chunk("y" * (1 << 20), "stop", usage=usage(5, 6)), DONE)
    assert counts(watched(CHAT, body)) == (5, 6, None, None, "provider")


def test_an_unfinished_data_line_at_the_end_is_not_used() -> None:
    body = sse(chunk("a"), chunk(finish="stop")) + b'data: {"choices":[],"usage":{"prompt_tokens":1,"complet'
    assert watched(CHAT, body, clean=False).usage_source == "none"


def test_an_empty_data_event_is_no_parse_error_and_malformed_json_is() -> None:
    assert watched(CHAT, sse(chunk("a"), b"data:\n\n", chunk(finish="stop"), DONE)).parse_errors == 0
    assert watched(CHAT, sse(chunk("a"), b"data: nope\n\n", chunk(finish="stop"), DONE)).parse_errors == 1


def test_choices_that_were_asked_for_are_all_waited_for() -> None:
    body = sse(chunk("a"), chunk("b", index=1), chunk(finish="stop"))
    assert watched(CHAT, body, n=2).outcome == "truncated"
    assert watched(TEXT, body, prompt=["a", "b"]).outcome == "truncated"
    assert watched(CHAT, body + sse(chunk(finish="stop", index=1)), n=2).outcome == "completed"


def test_running_timings_count_until_the_stream_breaks() -> None:
    body = sse(chunk("a", timings={"cache_n": 1, "prompt_n": 2, "predicted_n": 3}))
    assert counts(watched(CHAT, body, clean=False)) == (3, 3, 1, None, "provider_partial")


# --- anthropic ---------------------------------------------------------------------------------------------------


def start(**told: Any) -> dict[str, Any]:
    return {"type": "message_start", "message": {"model": "claude", "usage": {"output_tokens": 1, **told}}}


def delta(reason: str | None, **told: Any) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason}, "usage": told}


STOP = {"type": "message_stop"}


def test_anthropic_events_without_their_event_lines_are_read_by_type() -> None:
    seen = watched(MESSAGES, sse(start(input_tokens=16), delta("end_turn", output_tokens=38), STOP))
    assert counts(seen) == (16, 38, None, None, "provider")
    assert (seen.outcome, seen.model, seen.finish_reason) == ("completed", "claude", "end_turn")


def test_a_later_message_delta_overrides_the_input_side_field_by_field() -> None:
    first = start(input_tokens=10, cache_read_input_tokens=5, cache_creation_input_tokens=0)
    last = delta("end_turn", input_tokens=61, output_tokens=2, cache_read_input_tokens=None)
    assert counts(watched(MESSAGES, sse(first, last, STOP))) == (66, 2, 5, None, "provider")


def test_thinking_tokens_are_reasoning() -> None:
    last = delta("end_turn", output_tokens=119, output_tokens_details={"thinking_tokens": 80})
    assert counts(watched(MESSAGES, sse(start(input_tokens=424), last, STOP))) == (424, 119, None, 80, "provider")


def test_a_tool_whose_input_speaks_of_errors_is_no_error() -> None:
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use", "input": {"error": "x"}}}
    body = sse(start(input_tokens=1), block, delta("tool_use", output_tokens=48), STOP)
    assert watched(MESSAGES, body).outcome == "completed"


def test_an_anthropic_stream_without_message_stop_is_truncated_even_when_it_ends_cleanly() -> None:
    seen = watched(MESSAGES, sse(start(input_tokens=1), delta("end_turn", output_tokens=2)))
    assert (seen.outcome, counts(seen)[:2]) == ("truncated", (1, 2))


# --- responses ---------------------------------------------------------------------------------------------------


def test_the_flat_error_event_of_responses_is_read() -> None:
    event = {"type": "error", "code": "server_error", "message": "bad", "param": None, "sequence_number": 3}
    created = {"type": "response.created", "response": {"model": "gpt", "usage": None, "error": None}}
    seen = watched(RESPONSES, sse(created, b"event: error\n" + sse(event)))
    assert seen.error is not None
    assert (seen.outcome, seen.model, seen.error["code"]) == ("error", "gpt", "server_error")


def test_a_failed_response_names_its_error_itself() -> None:
    failed = {"type": "response.failed", "response": {"model": "gpt", "error": {"code": "x", "message": "bad"}}}
    seen = watched(RESPONSES, sse(failed))
    assert seen.error == {"message": "bad", "type": None, "code": "x", "param": None}
    assert seen.finish_reason is None


def test_a_function_call_of_responses_is_metered_once() -> None:
    body = sse(
        {"type": "response.created", "response": {"model": "gpt", "usage": None}},
        {"type": "response.function_call_arguments.delta", "delta": '{"a":'},
        {"type": "response.function_call_arguments.delta", "delta": "1}"},
        {"type": "response.function_call_arguments.done", "arguments": '{"a":1}'},
    )
    assert watched(RESPONSES, body, clean=False).text_bytes == 7


# --- JSON answers ------------------------------------------------------------------------------------------------


def answered(route: Route, document: Any, status: int = 200, kind: str = "application/json") -> Observer:
    made = observer(route)
    made.on_body(kind, status, document if isinstance(document, bytes) else orjson.dumps(document))
    made.finish(True, 0)
    return made


@pytest.mark.parametrize(
    ("body", "message", "type", "code"),
    [
        ({"error": {"message": "a", "type": "t", "param": None, "code": "c"}}, "a", "t", "c"),
        ({"type": "error", "error": {"type": "t", "message": "a"}, "request_id": "r"}, "a", "t", None),
        ({"error": {"code": 402, "message": "a", "metadata": {}}}, "a", None, 402),
        ({"object": "error", "message": "a", "type": "t", "code": 400}, "a", "t", 400),
        ({"message": "a", "type": "t", "code": "1500"}, "a", "t", "1500"),
        ({"object": "error", "message": {"detail": [{"msg": "x"}]}}, '{"detail":[{"msg":"x"}]}', None, None),
        ({"error": "a"}, "a", None, None),
        ({"detail": "a"}, "a", None, None),
        ({"detail": [{"loc": ["body"], "msg": "x"}, {"msg": "y"}]}, "x; y", None, None),
        ([{"error": {"code": 400, "message": "a", "status": "INVALID_ARGUMENT"}}], "a", "INVALID_ARGUMENT", 400),
        (b"<html><head><title>502 Bad Gateway</title></head><body>x</body></html>", "502 Bad Gateway x", None, None),
        (b"", "the upstream answered 418", None, None),
        (b"{}", "the upstream answered 418", None, None),
        (b"[]", "the upstream answered 418", None, None),
        ({"error": {"message": None}}, "", None, None),
        (b'{"error":"\\ud83d"}', '{"error":"\\ud83d"}', None, None),
        (b"\xff\xfe", "\ufffd\ufffd", None, None),
    ],
)
def test_every_shape_of_an_error_body_is_read(body: Any, message: str, type: Any, code: Any) -> None:
    seen = answered(CHAT, body, 418)
    assert (seen.outcome, seen.usage_source, seen.refused) == ("error", "none", True)
    assert seen.error == {"message": message, "type": type, "code": code, "param": None}


def test_a_json_answer_is_metered_for_estimates_when_it_has_no_usage() -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    message = {"content": "Grüße", "tool_calls": [call], "reasoning_content": "ab", "reasoning": "ab"}
    seen = answered(CHAT, {"model": "m", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    assert (seen.outcome, seen.usage_source, seen.text_bytes) == ("completed", "none", 7 + 1 + 2 + 2)


def test_an_embeddings_answer_has_prompt_tokens_only() -> None:
    seen = answered(Route.EMBEDDINGS, {"model": "e", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}})
    assert counts(seen) == (8, None, None, None, "provider")


def test_a_body_cut_at_the_cap_is_unknown_but_not_an_error() -> None:
    seen = observer(CHAT)
    seen.on_body("application/json", 200, b'{"choices":[{"mess')
    seen.finish(False, 0)
    assert (seen.outcome, seen.parse_errors, seen.usage_source) == ("truncated", 1, "none")
    seen.finish(True, 0)
    assert (seen.outcome, seen.usage_source) == ("completed", "none")


def test_an_ndjson_answer_without_a_prompt_count_is_partly_known() -> None:
    line = {"model": "q", "done": True, "done_reason": "stop", "eval_count": 9}
    seen = answered(CHAT, line, kind="application/x-ndjson; charset=utf-8")
    assert counts(seen) == (None, 9, None, None, "provider_partial")


# --- anything ----------------------------------------------------------------------------------------------------

_key = st.sampled_from(
    ["usage", "choices", "error", "delta", "index", "finish_reason", "type", "message", "response", "timings",
     "x_groq", "model", "object", "content", "output", "text", "tool_calls", "function", "done", "detail", "code",
     "input_tokens",
     "prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details", "status", "content_block",
     "reasoning",
     "incomplete_details", "stop_reason", "output_tokens", "arguments", "param", "thinking", "partial_json"]
)  # fmt: skip
_word = st.sampled_from(
    ["message_start", "message_delta", "response.failed", "response.completed", "error", "content_block_start",
     "content_block_delta", "tool_use", "chat.completion.done", "", "x", "\ud83d"]
)  # fmt: skip
_value = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False, allow_infinity=False) | _word,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_key, inner, max_size=4),
    max_leaves=20,
)
_site = parse_ask(Route.STREAM, b'{"prompt":"x"}')


@settings(max_examples=400, deadline=None)
@given(
    route=st.sampled_from([CHAT, RESPONSES, MESSAGES, Route.EMBEDDINGS, Route.STREAM]),
    documents=st.lists(_value | st.dictionaries(_key, _value, max_size=6), max_size=4),
    name=st.sampled_from([b"", b"error", b"message_start", b"response.failed"]),
    anthropic=st.booleans(),
    status=st.sampled_from([200, 400]),
)
def test_no_document_makes_an_observer_raise(
    route: Route, documents: list[Any], name: bytes, anthropic: bool, status: int
) -> None:
    made: Any
    if route is Route.STREAM:
        dialect: Any = "anthropic" if anthropic else "openai"
        made = make_observer(_site, dialect, build(_site, dialect, "m", True), request_id=REQUEST_ID, epoch=1)
        made.preamble()
    else:
        made = observer(route, **({"hide": True} if route is CHAT else {}))
    for document in documents:
        data = json.dumps(document).encode()
        made.on_event(name, data, 0)
        made.on_event(name, data, 4)
        made.on_tail(data)
        made.on_body("application/json", status, data)
        made.on_body("application/x-ndjson", 200, data)
    made.on_event(b"", b"\xff{", 0)
    made.on_event(b"", b"", 8)
    made.finish(True, 3)
    assert made.outcome in ("completed", "truncated", "error")
    if route is Route.STREAM:
        assert made.ending(False).count(b"event: ") <= 2
        assert made.ending(True) == b""
