"""What the scripted provider says: bodies from the corpus, bodies of our own, and the ways of sending them.

Owns: the answers of every step of the session. Must not know: SDKs, proxyd, what is compared.
An answer is a function (wire, asked) -> bool | None for harness.Upstream; False closes the connection.
"""

from __future__ import annotations

import base64
import gzip
import json
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.corpus_cases import CORPUS
from tests.daemon.harness import Wire

Answer = Callable[[Wire, Any], "bool | None"]

# What providers really send around an answer; the first group must reach the SDK, the second speaks of their own site.
PASSED = {
    "openai": {
        "x-request-id": "req_0123456789abcdef",
        "openai-processing-ms": "12",
        "openai-organization": "org-1",
        "openai-version": "2020-10-01",
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-remaining-tokens": "149999984",
        "x-ratelimit-reset-requests": "6ms",
        "cf-ray": "9a1b2c3d4e5f-AMS",
        "server": "cloudflare",
        "date": "Fri, 20 Nov 2026 00:00:00 GMT",
    },
    "anthropic": {
        "request-id": "req_011CSHoEeqs5C35K2UUqR7Fy",
        "anthropic-organization-id": "0a1b",
        "anthropic-ratelimit-requests-limit": "4000",
        "anthropic-ratelimit-tokens-reset": "2026-11-20T00:00:00Z",
        "server": "cloudflare",
        "date": "Fri, 20 Nov 2026 00:00:00 GMT",
    },
}
SITE = {
    "set-cookie": "__cf_bm=edge; path=/; HttpOnly",
    "alt-svc": 'h3=":443"; ma=86400',
    "strict-transport-security": "max-age=31536000",
    "access-control-expose-headers": "X-Request-ID",
}
PIECE = 61  # a prime: cuts fall inside lines, characters and line ends


def corpus(path: str) -> bytes:
    return (CORPUS / path).read_bytes()


def head(dialect: str, status: int, content_type: str, **more: str) -> bytes:
    """A head with what providers send; `more` adds fields (a_b for a-b), or takes one away with ""."""
    fields = {"content-type": content_type, **PASSED[dialect], **SITE}
    fields |= {name.replace("_", "-"): value for name, value in more.items()}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode()


def chunks(body: bytes, piece: int = PIECE) -> bytes:
    """`body` chunked, without the last chunk."""
    cuts = [body[at : at + piece] for at in range(0, len(body), piece)]
    return b"".join(b"%x\r\n%b\r\n" % (len(cut), cut) for cut in cuts)


LAST = b"0\r\n\r\n"
EVENTS = "text/event-stream; charset=utf-8"


def sse(dialect: str, body: bytes, framing: str = "chunked", media: str = EVENTS, **headers: str) -> Answer:
    """A 200 event stream (or another `media`) of these bytes."""

    def answer(wire: Wire, asked: Any) -> None:
        if framing == "length":
            wire.send(head(dialect, 200, media, content_length=str(len(body)), **headers) + body)
        else:
            piece = PIECE if len(body) < 100_000 else 65_521
            wire.send(head(dialect, 200, media, transfer_encoding="chunked", **headers) + chunks(body, piece) + LAST)

    return answer


def without_usage(counted: bytes) -> bytes:
    """The same stream as it is for who did not ask for usage."""
    kept = [part for part in counted.split(b"\n\n") if b'"choices":[]' not in part]
    return b"\n\n".join(kept).replace(b',"usage":null', b"")


def usage_on_demand(counted: bytes, framing: str = "chunked", *, coded: bool = False) -> Answer:
    """As OpenAI does it: the usage chunk, and `usage: null` in the others, only for who asked."""

    def answer(wire: Wire, asked: Any) -> None:
        wants = (asked.get("stream_options") or {}).get("include_usage") is True
        body = counted if wants else without_usage(counted)
        if coded:
            sse("openai", gzip.compress(body, mtime=0), framing, content_encoding="gzip")(wire, asked)
        else:
            sse("openai", body, framing)(wire, asked)

    return answer


def whole(
    dialect: str, value: Any, status: int = 200, content_type: str = "application/json", **headers: str
) -> Answer:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()

    def answer(wire: Wire, asked: Any) -> None:
        wire.send(head(dialect, status, content_type, content_length=str(len(body)), **headers) + body)

    return answer


def error(dialect: str, status: int, **headers: str) -> Answer:
    """The provider's own refusal."""
    if dialect == "openai":
        message = f"Upstream says {status}."
        detail = {"message": message, "type": "invalid_request_error", "param": "p", "code": f"c{status}"}
        return whole(dialect, {"error": detail}, status, **headers)
    detail = {"type": "overloaded_error", "message": f"Upstream says {status}."}
    return whole(dialect, {"type": "error", "error": detail, "request_id": "req_body"}, status, **headers)


def in_turn(*answers: Answer) -> Answer:
    """The first answer to the first attempt (by the SDK's own count), the last to all further ones."""

    def answer(wire: Wire, asked: Any) -> bool | None:
        attempt = int(wire.seen.header("x-stainless-retry-count") or 0)
        return answers[min(attempt, len(answers) - 1)](wire, asked)

    return answer


def cut(dialect: str, sent: bytes, how: str, content_type: str = EVENTS) -> Answer:
    """An answer that breaks off: `eof` without the last chunk, `short` of its length, or a `reset`."""

    def answer(wire: Wire, asked: Any) -> bool:
        if how == "short":
            wire.send(head(dialect, 200, content_type, content_length=str(len(sent) + 1000)) + sent)
        else:
            wire.send(head(dialect, 200, content_type, transfer_encoding="chunked") + chunks(sent))
        time.sleep(0.05)  # so that what was sent is read before the connection breaks
        if how == "reset":
            wire.reset()
        return False

    return answer


def no_answer(wire: Wire, asked: Any) -> bool:
    """The connection closes before any head."""
    return False


def silence(wire: Wire, asked: Any) -> bool:
    """Nothing, until the other side gives up."""
    wire.wait_closed(20)
    return False


def then_silence(dialect: str, sent: bytes) -> Answer:
    def answer(wire: Wire, asked: Any) -> bool:
        wire.send(head(dialect, 200, EVENTS, transfer_encoding="chunked") + chunks(sent))
        wire.wait_closed(20)
        return False

    return answer


def endless(dialect: str, first: bytes, again: bytes) -> Answer:
    """A stream that only its client can end; a note is left when it did."""

    def answer(wire: Wire, asked: Any) -> bool:
        wire.send(head(dialect, 200, EVENTS, transfer_encoding="chunked") + chunks(first))
        until = time.monotonic() + 20
        try:
            while time.monotonic() < until:
                wire.send(chunks(again, len(again)))
                time.sleep(0.02)
        except OSError:
            wire.seen.closed_at = time.monotonic()
        return False

    return answer


def refuses_stream_options(body: bytes) -> Answer:
    """A server too old to know the option."""

    def answer(wire: Wire, asked: Any) -> None:
        if "stream_options" in asked:
            message = "Unrecognized request argument supplied: stream_options"
            whole("openai", {"error": {"message": message, "type": "invalid_request_error"}}, 400)(wire, asked)
        else:
            sse("openai", body)(wire, asked)

    return answer


def embedding(wire: Wire, asked: Any) -> None:
    """As base64 or as numbers, as asked."""
    vector: Any = [0.25, -1.5, 3.0]
    if asked.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack("<3f", *vector)).decode()
    data = [{"object": "embedding", "index": 0, "embedding": vector}]
    usage = {"prompt_tokens": 3, "total_tokens": 3}
    whole("openai", {"object": "list", "data": data, "model": "text-embedding-3-small", "usage": usage})(wire, asked)


def echo(wire: Wire, asked: Any) -> None:
    """The last message comes back as the answer: nothing was lost on the way there."""
    chat = json.loads(corpus("json/openai-chat-200.body"))
    chat["choices"][0]["message"]["content"] = asked["messages"][-1]["content"]
    whole("openai", json.dumps(chat, ensure_ascii=False).encode())(wire, asked)


def events(*values: dict[str, Any]) -> bytes:
    """Anthropic's events of these values."""
    return b"".join(f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode() for value in values)


def chat_chunk(content: str) -> bytes:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    value = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [choice]}
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def block(index: int, kind: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": kind},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def message(*blocks: list[dict[str, Any]], stop: str = "end_turn") -> bytes:
    """A whole Anthropic stream of these content blocks."""
    start = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": [], "stop_reason": None,
        "stop_sequence": None, "usage": {"input_tokens": 25, "output_tokens": 1},
    }  # fmt: skip
    return events(
        {"type": "message_start", "message": start},
        {"type": "ping"},
        *(event for part in blocks for event in part),
        {
            "type": "message_delta",
            "delta": {"stop_reason": stop, "stop_sequence": None},
            "usage": {"output_tokens": 89},
        },
        {"type": "message_stop"},
    )


def text_delta(text: str) -> dict[str, Any]:
    return {"type": "text_delta", "text": text}


TEXT = {"type": "text", "text": ""}
TOOLS = message(
    block(0, TEXT, text_delta("I'll check.")),
    block(
        1, {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {}},
        {"type": "input_json_delta", "partial_json": ""},
        {"type": "input_json_delta", "partial_json": '{"city": "Zür'},
        {"type": "input_json_delta", "partial_json": 'ich"}'},
    ),
    block(
        2, {"type": "tool_use", "id": "toolu_2", "name": "get_time", "input": {}},
        {"type": "input_json_delta", "partial_json": "{}"},
    ),
    stop="tool_use",
)  # fmt: skip
THINKING = message(
    block(
        0, {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "27 × 453 = "},
        {"type": "thinking_delta", "thinking": "12,231"},
        {"type": "signature_delta", "signature": "EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pk="},
    ),
    block(1, {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3pzix/LafPsn4aDFIT2Xlxh0L5L8rLVyIw"}),
    block(2, TEXT, text_delta("12,231")),
)  # fmt: skip
HUGE = "0123456789abcdef" * 65536
HUGE_CHAT = chat_chunk("a") + chat_chunk(HUGE) + chat_chunk("b") + b"data: [DONE]\n\n"
HUGE_MESSAGE = message(block(0, TEXT, text_delta("a"), text_delta(HUGE), text_delta("b")))

CHAT_COUNTED = corpus("openai/chat-include-usage.sse")
COMPLETIONS_COUNTED = corpus("openai/completions-legacy.sse")
ANTHROPIC = corpus("anthropic/basic.sse")


def first_events(body: bytes, count: int) -> bytes:
    return b"".join(part + b"\n\n" for part in body.split(b"\n\n")[:count])


def chat_of(**changes: Any) -> dict[str, Any]:
    """The corpus's chat answer with another first message or more choices."""
    value: dict[str, Any] = json.loads(corpus("json/openai-chat-200.body"))
    choice = value["choices"][0]
    choice["message"].update(changes.pop("message", {}))
    value["choices"] += [{**choice, "index": index} for index in range(1, changes.pop("n", 1))]
    choice.update(changes)
    return value


CHAT_TOOLS = chat_of(
    message={
        "content": None,
        "tool_calls": [
            {
                "id": "call_a1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city":"Zürich"}'},
            },
            {"id": "call_b2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
        ],
    },
    finish_reason="tool_calls",
)
COMPLETION = {
    "id": "cmpl-9", "object": "text_completion", "created": 1, "model": "gpt-3.5-turbo-instruct",
    "choices": [{"text": "The end", "index": 0, "logprobs": None, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 14, "completion_tokens": 16, "total_tokens": 30},
}  # fmt: skip


def message_of(*content: dict[str, Any], stop: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(corpus("json/anthropic-message-200.body"))
    return {**value, "content": list(content), "stop_reason": stop}
