"""Errors that we send, checked against the real SDKs, and the small pages beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai
import orjson
import pytest

from proxyd.dialects.ask import Route
from proxyd.dialects.errors import (
    error_body,
    error_event,
    is_retryable,
    is_usage_rejection,
    models_page,
    translate_json_error,
    upstream_error_body,
)
from proxyd.errors import Refusal
from tests.unit.dialects.corpus_runs import case_named


def answering(status: int, content_type: str, body: bytes) -> httpx2.Client:
    """An HTTP client whose every answer is this one; no socket."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers={"content-type": content_type}, content=body)

    return httpx2.Client(transport=httpx2.MockTransport(handler))


def openai_with(status: int, content_type: str, body: bytes) -> openai.OpenAI:
    client = answering(status, content_type, body)
    return openai.OpenAI(api_key="k", base_url="http://proxyd.test/v1", max_retries=0, http_client=client)


def anthropic_with(status: int, content_type: str, body: bytes) -> anthropic.Anthropic:
    client = answering(status, content_type, body)
    return anthropic.Anthropic(api_key="k", base_url="http://proxyd.test", max_retries=0, http_client=client)


def chat(client: openai.OpenAI) -> Any:
    return list(client.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}], stream=True))


def completions(client: openai.OpenAI) -> Any:
    return list(client.completions.create(model="m", prompt="a", stream=True))


def responses(client: openai.OpenAI) -> Any:
    return list(client.responses.create(model="m", input="a", stream=True))


def messages(client: anthropic.Anthropic) -> Any:
    asked: Any = [{"role": "user", "content": "a"}]
    return list(client.messages.create(model="m", max_tokens=9, messages=asked, stream=True))


@pytest.mark.parametrize(
    ("route", "call"), [(Route.CHAT, chat), (Route.COMPLETIONS, completions), (Route.RESPONSES, responses)]
)
def test_our_error_event_makes_the_openai_sdk_raise(route: Route, call: Callable[[openai.OpenAI], Any]) -> None:
    name = "openai/responses-truncated.sse" if route is Route.RESPONSES else "openai/chat-truncated-between-events.sse"
    body = case_named(name).body + error_event(route, "api_error", "it broke", "upstream_reset", "r1")
    with pytest.raises(openai.APIError, match="it broke") as caught:
        call(openai_with(200, "text/event-stream", body))
    assert isinstance(caught.value.body, dict)
    assert (caught.value.code, caught.value.body["request_id"]) == ("upstream_reset", "r1")


def test_our_error_event_makes_the_anthropic_sdk_raise() -> None:
    body = case_named("anthropic/truncated-no-message-delta.sse").body
    body += error_event(Route.MESSAGES, "overloaded_error", "it broke", None, "r1")
    with pytest.raises(anthropic.APIStatusError, match="it broke") as caught:
        messages(anthropic_with(200, "text/event-stream", body))
    assert caught.value.body == {
        "type": "error", "error": {"type": "overloaded_error", "message": "it broke"}, "request_id": "r1",
    }  # fmt: skip


def test_a_refusal_is_what_the_openai_sdk_expects() -> None:
    refusal = Refusal(400, "invalid_type", "stream must be true or false", param="stream")
    body = error_body(Route.CHAT, refusal, "r1")
    with pytest.raises(openai.BadRequestError, match="stream must be") as caught:
        chat(openai_with(400, "application/json", body))
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "invalid_type", "stream", "invalid_request_error",
    )  # fmt: skip
    assert orjson.loads(body)["error"]["request_id"] == "r1"


def test_a_refusal_is_what_the_anthropic_sdk_expects() -> None:
    body = error_body("/v1/messages", Refusal(429, "quota_exceeded", "used up", retry_after_s=3), "r1")
    assert orjson.loads(body) == {
        "type": "error", "error": {"type": "rate_limit_error", "message": "used up"}, "request_id": "r1",
    }  # fmt: skip
    with pytest.raises(anthropic.RateLimitError, match="used up"):
        messages(anthropic_with(429, "application/json", body))


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (404, "not_found_error"), (405, "invalid_request_error"), (408, "invalid_request_error"),
        (413, "request_too_large"), (429, "rate_limit_error"), (500, "api_error"), (502, "api_error"),
        (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"),
    ],
)  # fmt: skip
def test_anthropic_errors_are_typed_by_status(status: int, type: str) -> None:
    body = orjson.loads(error_body("/v1/messages/count_tokens", Refusal(status, "c", "m"), "r"))
    assert body["error"] == {"type": type, "message": "m"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/messagesx", "/api/v1/stream", "/", "/v1/chat/completions"])
def test_every_other_path_is_refused_the_openai_way(path: str) -> None:
    body = orjson.loads(error_body(path, Refusal(404, "not_found", "no such thing"), "r"))
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "code", "param", "request_id"}


@pytest.mark.parametrize("dialect", ["openai", "responses", "anthropic", *Route])
def test_an_error_event_is_one_block_of_single_lines(dialect: str) -> None:
    block = error_event(dialect, "api_error", "a\nb\r\u2028c", None, "r")
    assert block.endswith(b"\n\n")
    assert b"\n\n" not in block[:-1]
    assert b"\r" not in block
    assert all(line.startswith((b"event: error", b"data: {")) for line in block.rstrip(b"\n").split(b"\n"))


@pytest.mark.parametrize(
    ("status", "body", "rejected"),
    [
        (400, b'{"error":{"message":"Unknown parameter: stream_options"}}', True),
        (422, b'{"detail":[{"type":"extra_forbidden","loc":["body","stream_options"]}]}', True),
        (400, b"Unrecognized request argument supplied", True),
        (400, b'{"error":"model not found"}', False),
        (401, b"stream_options", False),
        (500, b"stream_options", False),
    ],
)
def test_only_a_refusal_that_names_the_injected_option_is_worth_a_resend(
    status: int, body: bytes, rejected: bool
) -> None:
    assert is_usage_rejection(status, body) is rejected


def test_an_upstream_refusal_is_told_on_the_sites_route_with_type_and_code() -> None:
    assert translate_json_error(502, b"<html><h1>Bad Gateway</h1></html>") == {
        "message": "Bad Gateway", "type": "api_error", "code": 502, "param": None,
    }  # fmt: skip
    body = orjson.loads(upstream_error_body(429, b'{"error":{"message":"a","code":"x"}}', "r"))
    assert body["error"] == {
        "message": "a", "type": "rate_limit_error", "code": "x", "param": None, "request_id": "r",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "retryable"),
    [
        ({"type": "overloaded_error", "code": None}, True), ({"type": "invalid_request_error", "code": None}, False),
        ({"type": "BadRequestError", "code": 400}, False), ({"type": None, "code": 502}, True),
        ({"type": "rate_limit_error", "code": "insufficient_quota"}, False), ({"type": "x", "code": 429}, True),
    ],
)  # fmt: skip
def test_errors_that_may_pass_are_retryable(error: Any, retryable: bool) -> None:
    assert is_retryable(error) is retryable


def test_the_models_page_lists_the_configured_names_and_not_the_wildcard() -> None:
    @dataclass
    class Model:
        name: str

    page = models_page([Model("a"), Model("*"), Model("b")])
    listed = openai_with(200, "application/json", page).models.list()
    assert [(model.id, model.object) for model in listed] == [("a", "model"), ("b", "model")]
