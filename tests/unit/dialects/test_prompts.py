"""How much text a request has, and what is kept of it for counting."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxyd.dialects.base import Route, build, parse_ask, prompt_tokens
from proxyd.dialects.tokens import SAMPLE_BYTES, count_text


@pytest.mark.parametrize(
    ("route", "document", "size"),
    [
        (Route.CHAT, {"messages": [{"role": "user", "content": "Grüße"}]}, 7 + 12),
        (Route.CHAT, {"messages": [{"role": "u", "content": [{"type": "text", "text": "ab"}, {"url": "x"}]}]}, 14),
        (Route.COMPLETIONS, {"prompt": "abc"}, 3),
        (Route.COMPLETIONS, {"prompt": ["abc", "d"]}, 4),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3]}, 12),
        (Route.RESPONSES, {"input": "abc", "instructions": "de"}, 5),
        (Route.RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_text", "text": "abc"}]}]}, 15),
        (Route.EMBEDDINGS, {"input": ["ab", "cd"]}, 4),
        (Route.EMBEDDINGS, {"input": [[1, 2], [3]]}, 12),
        (Route.MESSAGES, {"system": [{"type": "text", "text": "ab"}], "messages": [{"content": "c"}]}, 2 + 1 + 12),
        (Route.MESSAGES, {"messages": "not a list"}, 10),
        (Route.MESSAGES, {"messages": [7, None, {"content": 7}]}, 12),
    ],
)  # fmt: skip
def test_the_prompt_is_measured_for_estimates(route: Route, document: dict[str, Any], size: int) -> None:
    assert parse_ask(route, orjson.dumps({"model": "m", **document})).prompt_text_bytes == size


def asked(route: Route, **document: Any) -> Any:
    return parse_ask(route, orjson.dumps({"model": "m", **document})).prompt


# From OpenAI's cookbook, "How to count tokens with tiktoken": the API of gpt-4o counted 124 tokens.
COOKBOOK = [
    {
        "role": "system",
        "content": "You are a helpful, pattern-following assistant that translates corporate jargon "
        "into plain English.",
    },
    {"role": "system", "name": "example_user", "content": "New synergies will help drive top-line growth."},
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Things working well together will increase revenue.",
    },
    {
        "role": "system",
        "name": "example_user",
        "content": "Let's circle back when we have more bandwidth to touch base on opportunities "
        "for increased leverage.",
    },
    {
        "role": "system",
        "name": "example_assistant",
        "content": "Let's talk later when we're less busy about how to do better.",
    },
    {
        "role": "user",
        "content": "This late pivot means we don't have time to boil the ocean for the client deliverable.",
    },
]


def test_the_prompt_of_the_cookbook_has_the_tokens_that_the_api_counted() -> None:
    assert asked(Route.CHAT, messages=COOKBOOK).tokens() == 124


@pytest.mark.parametrize(
    ("route", "document", "around", "text"),
    [
        (Route.CHAT, {"messages": [{"role": "user", "content": "Say hello"}]}, 4 + 3, "Say hello"),
        (Route.RESPONSES, {"input": "Say hello", "instructions": "Briefly"}, 2 * 4 + 3, "Say hello Briefly"),
        (Route.STREAM, {"prompt": "Say hello"}, 4 + 3, "Say hello"),
        (Route.STREAM, {"messages": [{"role": "user", "content": "hi"}], "system": "So"}, 2 * 4 + 3, "So hi"),
        (Route.COMPLETIONS, {"prompt": "Say hello"}, 0, "Say hello"),
        (Route.COMPLETIONS, {"prompt": [1, 2, 3]}, 3, ""),
        (Route.EMBEDDINGS, {"input": ["Say", " hello"]}, 0, "Say hello"),
        (Route.EMBEDDINGS, {"input": [[1, 2], [3]]}, 3, ""),
        (Route.MESSAGES, {"system": "So", "messages": [{"role": "user", "content": "hi"}]}, 2 * 4 + 3, "So hi"),
    ],
)  # fmt: skip
def test_each_message_has_three_tokens_and_its_role_around_its_text(
    route: Route, document: dict[str, Any], around: int, text: str
) -> None:
    prompt = asked(route, **document)
    assert prompt.extra == around
    assert prompt.tokens() == around + count_text(text)


def test_the_calls_of_a_history_count_as_text() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
    prompt = asked(Route.CHAT, messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert prompt.sample == b'weather\0{"city":"Bonn"}'


@pytest.mark.parametrize("piece", ["word ", "Wörter, ", "日本語。", "🙂", "x"])
def test_of_a_long_prompt_a_kilobyte_is_kept_from_all_over_it(piece: str) -> None:
    texts = [piece * 300, "", piece * 7, "START" + piece * 2000 + "END"]
    prompt = asked(Route.CHAT, messages=[{"role": "user", "content": text} for text in texts])
    assert prompt.size == sum(len(text.encode()) for text in texts)
    assert len(prompt.sample) <= SAMPLE_BYTES + 8
    assert prompt.sample.startswith(piece.encode())
    exact = sum(count_text(text) for text in texts)
    assert abs(prompt.tokens() - prompt.extra - exact) <= 0.05 * exact


def test_a_long_prompt_of_two_languages_is_counted_by_both() -> None:
    text = "The weather is fine today. " * 100 + "今日はとても良い天気です。" * 100
    exact = count_text(text)
    assert abs(asked(Route.COMPLETIONS, prompt=text).tokens() - exact) <= 0.1 * exact


def test_a_prompt_of_more_values_than_are_looked_at_is_a_quarter_of_its_bytes() -> None:
    prompt = asked(Route.EMBEDDINGS, input=["a"] * 150_000)
    assert prompt.tokens() == (prompt.size + 3) // 4


def test_a_request_without_an_answer_costs_its_prompt_and_counting_costs_nothing() -> None:
    body = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Say hello to everyone"}]})
    assert prompt_tokens(parse_ask(Route.CHAT, body), "openai") == 4 + 4 + 3
    assert prompt_tokens(parse_ask(Route.MESSAGES, body), "anthropic") == 5 + 4 + 3
    assert prompt_tokens(parse_ask(Route.COUNT_TOKENS, body), "anthropic") == 0


def test_nothing_of_a_prompt_is_in_a_repr() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"secret words"}],"prompt":"secret"}'
    ask = parse_ask(Route.CHAT, body)
    assert b"secret" in ask.prompt.sample
    assert "secret" not in repr(ask) + repr(ask.prompt) + repr(build(ask, "openai", "", True))
