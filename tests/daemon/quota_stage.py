"""A provider that talks without end, in each dialect, and how its words are counted; for the tests of quotas.

Owns: the words, what is asked for them, the rows of a user. Must not know: what a test wants of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from tests.daemon.harness import (
    CHAT,
    Daemon,
    Wire,
    ask,
    chat_chunk,
    wait_for,
)  # fmt: skip

# One token of the vocabulary each, in five bytes.
WORD = " four"
# Claude's vocabulary is taken to make 1.3 times as many tokens of a text.
CLAUDE = 1.3
# A stream may use so much between two looks: 1 KiB of text.
MARK_TOKENS = 256


def block(document: dict[str, Any], name: str = "") -> bytes:
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + json.dumps(document).encode() + b"\n\n"


def claude_event(**document: Any) -> bytes:
    return block(document, document["type"])


def response_event(number: int, **document: Any) -> bytes:
    return block({"sequence_number": number, **document}, document["type"])


RESPONSE: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 1, "model": "m-1", "output": [], "status": "in_progress",
    "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
}  # fmt: skip
MESSAGE: dict[str, Any] = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-1", "content": [], "stop_reason": None,
    "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 1},
}  # fmt: skip


def words_of(path: str) -> Iterator[bytes]:
    """The beginning of an answer, then a word an event, without end."""
    if path == "/v1/messages":
        yield claude_event(type="message_start", message=MESSAGE)
        yield claude_event(type="content_block_start", index=0, content_block={"type": "text", "text": ""})
        while True:
            yield claude_event(type="content_block_delta", index=0, delta={"type": "text_delta", "text": WORD})
    if path == "/v1/responses":
        yield response_event(0, type="response.created", response=RESPONSE)
        number = 0
        while True:
            number += 1
            delta = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": WORD, "logprobs": []}
            yield response_event(number, type="response.output_text.delta", **delta)
    if path == "/v1/completions":
        while True:
            choice = {"index": 0, "text": WORD, "finish_reason": None, "logprobs": None}
            yield block({"id": "c", "object": "text_completion", "created": 1, "model": "m-1", "choices": [choice]})
    while True:
        yield chat_chunk(WORD)


class Provider:
    """Gives words without end, `burst` of them in one piece, until its client closes."""

    def __init__(self, burst: int = 1, gap: float = 0.002) -> None:
        self.burst = burst
        self.gap = gap
        self.closed = 0
        self.running = 0
        self._lock = threading.Lock()

    def __call__(self, wire: Wire) -> bool:
        words = words_of(wire.seen.path)
        with self._lock:
            self.running += 1
        try:
            wire.head(transfer_encoding="chunked")
            while True:
                wire.chunk(b"".join(next(words) for _ in range(self.burst)))
                time.sleep(self.gap)
        except OSError:
            with self._lock:
                self.closed += 1
            return False
        finally:
            with self._lock:
                self.running -= 1


def asked(path: str, model: str) -> dict[str, Any]:
    if path == "/v1/responses":
        return {"model": model, "stream": True, "input": "Say hello"}
    if path in ("/v1/completions", "/api/v1/stream"):
        return {"model": model, "stream": True, "prompt": "Say hello"}
    return {**CHAT, "model": model, "max_tokens": 4096}


WAYS = [
    ("/v1/chat/completions", "m"),
    ("/v1/completions", "m"),
    ("/v1/responses", "m"),
    ("/v1/messages", "claude"),
    ("/api/v1/stream", "m"),
    ("/api/v1/stream", "claude"),
]


def wait_for_vocabulary(daemon: Daemon, path: str = "/v1/chat/completions", model: str = "m") -> None:
    """Asks as user 1 until its words are counted; the first request of a worker has the vocabulary loaded."""

    def is_counted() -> bool:
        before = len(rows_of(daemon, 1, 0))
        body = ask(daemon, path, asked(path, model), token=daemon.token(1, quota_remaining=40)).body()
        row = rows_of(daemon, 1, before + 1)[-1]
        words = body.count(b'"' + WORD.encode() + b'"') * (CLAUDE if model == "claude" else 1)
        return bool(row["completion_tokens"] == round(words))

    wait_for(is_counted, 20, every=1.1)  # iat has whole seconds


def rows_of(daemon: Daemon, user: int, count: int) -> list[dict[str, Any]]:
    """The rows of a user, once there are `count`; more than that is a failure."""

    def found() -> list[dict[str, Any]]:
        return [row for row in daemon.rows() if row["user_id"] == user]

    wait_for(lambda: len(found()) >= count, 15)
    time.sleep(0.15)
    rows = found()
    assert not count or len(rows) == count, rows
    return rows
