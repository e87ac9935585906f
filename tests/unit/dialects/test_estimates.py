"""What is booked for an answer that ended before its provider told any count: the o200k count of what was delivered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from proxyd._sse import Splitter as CompiledSplitter
from proxyd.dialects.base import Dialect, Route, Tally, build, make_observer, parse_ask, settle
from proxyd.dialects.tokens import count_text
from proxyd.wire.sse import Splitter as PureSplitter
from tests.unit.dialects.corpus_runs import REQUEST_ID, request_body
from tests.unit.dialects.test_provider_shapes import sse

TEXT = (
    "The quick brown fox doesn't jump; it \"waits\".\n\n```python\nprint('x' * 3)\n```\nFünf Äpfel kosten 3,50 €. "
    "Съешь ещё этих мягких булок. 今日はとても良い天気です。 오늘은 날씨가 좋다 🙂👍🏽 and so on, so forth: 1234567."
)
BUILDS = {"compiled": CompiledSplitter, "pure": PureSplitter}


def pieces(count: int) -> list[str]:
    """So many deltas, of one to seven characters each."""
    found = []
    at = 0
    for n in range(count):
        size = 1 + n * 5 % 7
        found.append((TEXT * 20)[at : at + size])
        at += size
    return found


def chat(part: str) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "model": "m", "choices": [{"index": 0, "delta": {"content": part}}]}


def legacy(part: str) -> dict[str, Any]:
    return {"object": "text_completion", "model": "m", "choices": [{"index": 0, "text": part, "finish_reason": None}]}


def typed(part: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "item_id": "i", "delta": part}


def block(part: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}}


SHAPES: list[tuple[Route, Dialect, Any, float]] = [
    (Route.CHAT, "openai", chat, 1.0),
    (Route.COMPLETIONS, "openai", legacy, 1.0),
    (Route.RESPONSES, "openai", typed, 1.0),
    (Route.MESSAGES, "anthropic", block, 1.3),
    (Route.STREAM, "openai", chat, 1.0),
    (Route.STREAM, "anthropic", block, 1.3),
]


def cut_off(route: Route, dialect: Dialect, body: bytes, *, build_of: str = "compiled") -> Tally:
    """What is booked when a stream of `body` breaks there."""
    extra = {"prompt": "p"} if route is Route.STREAM else {}
    ask = parse_ask(route, request_body(route, **extra))
    observer = make_observer(ask, dialect, build(ask, dialect, "", False), request_id=REQUEST_ID, epoch=7)
    splitter = BUILDS[build_of](observer.on_event, observer.watch)  # type: ignore[operator]
    for at in range(0, len(body), 1000):
        splitter.feed(body[at : at + 1000])
    splitter.discard()
    observer.finish(False, splitter.text_bytes, splitter.sample)
    tally = settle(observer, ask, splitter.text_bytes, True)
    observer.finish(False, splitter.text_bytes, splitter.sample)
    assert settle(observer, ask, splitter.text_bytes, True) == tally, "an end is told twice, and is the same"
    assert tally.estimated
    return tally


@pytest.mark.parametrize("build_of", BUILDS)
@pytest.mark.parametrize("events", [0, 1, 40])
@pytest.mark.parametrize(("route", "dialect", "shape", "factor"), SHAPES)
def test_a_stream_that_was_cut_costs_what_was_delivered_of_it(
    route: Route, dialect: Dialect, shape: Any, factor: float, events: int, build_of: str
) -> None:
    parts = pieces(events)
    exact = count_text("".join(parts)) * factor
    for body in (sse(*map(shape, parts)), sse(*map(shape, parts)) + b'data: {"choices":[{"delta":{"conte'):
        tally = cut_off(route, dialect, body, build_of=build_of)
        assert abs(tally.completion_tokens - exact) <= max(0.5, 0.05 * exact)


@pytest.mark.parametrize("build_of", BUILDS)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_escaped_text_costs_what_it_says(ascii_only: bool, build_of: str) -> None:
    parts = pieces(40)
    body = b"".join(b"data: %b\n\n" % json.dumps(chat(part), ensure_ascii=ascii_only).encode() for part in parts)
    assert cut_off(Route.CHAT, "openai", body, build_of=build_of).completion_tokens == count_text("".join(parts))


def test_a_long_answer_is_counted_by_its_first_kilobyte() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "accounting.md").read_text()
    parts = [text[at : at + 5] for at in range(0, len(text), 5)]
    exact = count_text(text)
    assert abs(cut_off(Route.CHAT, "openai", sse(*map(chat, parts))).completion_tokens - exact) <= 0.15 * exact


def called(name: str, *arguments: str) -> dict[Route, bytes]:
    """One tool call as each API streams it."""
    function = [{"index": 0, "id": "call_abcdef", "function": {"name": name, "arguments": ""}}]
    item = {"type": "function_call", "id": "fc_1", "call_id": "call_abcdef", "name": name, "arguments": ""}
    tool = {"type": "tool_use", "id": "toolu_abcdef", "name": name, "input": {}}
    return {
        Route.CHAT: sse(
            {"choices": [{"index": 0, "delta": {"tool_calls": function}}]},
            *(
                {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": part}}]}}]}
                for part in arguments
            ),
        ),
        Route.RESPONSES: sse(
            {"type": "response.created", "response": {"model": "m", "tools": [{"type": "function", "name": name}]}},
            {"type": "response.output_item.added", "item": item},
            *({"type": "response.function_call_arguments.delta", "delta": part} for part in arguments),
            {"type": "response.function_call_arguments.done", "arguments": "".join(arguments)},
            {"type": "response.output_item.done", "item": {**item, "arguments": "".join(arguments)}},
        ),
        Route.MESSAGES: sse(
            {"type": "content_block_start", "index": 0, "content_block": tool},
            *(
                {"type": "content_block_delta", "index": 0, "delta": {"type": "input_json_delta", "partial_json": part}}
                for part in arguments
            ),
        ),
    }


ARGUMENTS = ('{"ci', 'ty": "Bo', 'nn", "days', '": [1, 2, 3]', "}")


@pytest.mark.parametrize(
    ("asked", "route", "dialect", "factor"),
    [
        (Route.CHAT, Route.CHAT, "openai", 1.0),
        (Route.RESPONSES, Route.RESPONSES, "openai", 1.0),
        (Route.MESSAGES, Route.MESSAGES, "anthropic", 1.3),
        (Route.STREAM, Route.CHAT, "openai", 1.0),
        (Route.STREAM, Route.MESSAGES, "anthropic", 1.3),
    ],
)
def test_the_name_and_arguments_of_a_called_tool_count_and_its_id_does_not(
    asked: Route, route: Route, dialect: Dialect, factor: float
) -> None:
    exact = count_text("get_weather") + count_text("".join(ARGUMENTS))
    tally = cut_off(asked, dialect, called("get_weather", *ARGUMENTS)[route])
    # name and arguments are counted as one text: a token more or less where they touch
    assert abs(tally.completion_tokens - exact * factor) <= 1.5


# --- bodies ------------------------------------------------------------------------------------------------------


def booked_body(route: Route, body: bytes, content_type: str = "application/json") -> Tally:
    ask = parse_ask(route, request_body(route, stream=False))
    dialect: Dialect = "anthropic" if route is Route.MESSAGES else "openai"
    observer = make_observer(ask, dialect, build(ask, dialect, "", False), request_id=REQUEST_ID, epoch=7)
    observer.on_body(content_type, 200, body)
    observer.finish(False, 0)
    return settle(observer, ask, 0, True)


BODIES: list[tuple[Route, Any, float]] = [
    (Route.CHAT, lambda text: {"choices": [{"index": 0, "message": {"content": text}}]}, 1.0),
    (Route.COMPLETIONS, lambda text: {"choices": [{"index": 0, "text": text}]}, 1.0),
    (Route.RESPONSES, lambda text: {"output": [{"type": "message", "content": [{"text": text}]}]}, 1.0),
    (Route.MESSAGES, lambda text: {"content": [{"type": "text", "text": text}]}, 1.3),
]


@pytest.mark.parametrize(("route", "shape", "factor"), BODIES)
def test_a_json_answer_without_usage_costs_its_text(route: Route, shape: Any, factor: float) -> None:
    text = "".join(pieces(40))
    tally = booked_body(route, orjson.dumps(shape(text)))
    assert tally == Tally(tally.prompt_tokens, round(count_text(text) * factor), 0, 0, True)


@pytest.mark.parametrize(("route", "shape", "factor"), BODIES)
def test_a_json_answer_that_broke_off_costs_what_came(route: Route, shape: Any, factor: float) -> None:
    text = "".join(pieces(40))
    body = orjson.dumps(shape(text + "\\")).partition(b"\\\\")[0]
    for cut in (body, body + b"\\"):
        assert booked_body(route, cut).completion_tokens == round(count_text(text) * factor)


def test_lines_of_ollama_without_counts_cost_their_text() -> None:
    parts = pieces(40)
    lines = b"\n".join(orjson.dumps({"model": "m", "message": {"content": part}, "done": False}) for part in parts)
    exact = count_text("".join(parts))
    assert booked_body(Route.CHAT, lines, "application/x-ndjson").completion_tokens == exact
    many = booked_body(Route.CHAT, b"\n".join([lines] * 60), "application/x-ndjson").completion_tokens
    assert abs(many - 60 * exact) <= 0.05 * 60 * exact


def test_embeddings_cost_their_input_and_counting_nothing() -> None:
    ask = parse_ask(Route.EMBEDDINGS, request_body(Route.EMBEDDINGS, input=["Say hello", "to everyone"]))
    observer = make_observer(ask, "openai", build(ask, "openai", "", False), request_id=REQUEST_ID, epoch=7)
    observer.on_body("application/json", 200, b'{"data":[{"embedding":[0.1]}]}')
    observer.finish(True, 0)
    assert settle(observer, ask, 0, True) == Tally(4, 0, 0, 0, True)
