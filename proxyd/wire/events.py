"""The frames of our own event streams: `/api/v1/stream`, tasks (CONTRACT section 4).

Owns: the bytes of a normalised frame.
Must not know: who counts the ids, when a frame is sent, what an upstream said.

    id: 1a2b3c4d-7 LF            content, usage and done only: what a client's cursor may stand on
    event: done LF               absent for deltas
    data: {"finish_reason":"stop"} LF LF

Invariants: one data line a frame, its JSON without a raw CR or LF; control frames never carry an id.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson


def content(epoch: int, n: int, payload: Mapping[str, Any]) -> bytes:
    """A content frame, such as {"delta": "text"}; `n` counts from 1 without gaps in `epoch` (32 bits)."""
    return b"id: %08x-%d\ndata: %b\n\n" % (epoch, n, _to_json(payload))


def usage(
    epoch: int,
    n: int,
    *,
    prompt_tokens: int | None,
    completion_tokens: int | None,
    cached_tokens: int | None,
    reasoning_tokens: int | None,
    estimated: bool,
) -> bytes:
    """What the answer used; a count nobody knows is null."""
    counts = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cached_tokens": cached_tokens,
        "reasoning_tokens": reasoning_tokens,
        "estimated": estimated,
    }
    return b"id: %08x-%d\nevent: usage\ndata: %b\n\n" % (epoch, n, _to_json(counts))


def done(epoch: int, n: int, finish_reason: str) -> bytes:
    """The good end of a stream; nothing follows it."""
    return b"id: %08x-%d\nevent: done\ndata: %b\n\n" % (epoch, n, _to_json({"finish_reason": finish_reason}))


def start(
    *,
    request_id: str,
    model: str,
    epoch: int,
    first: int,
    head: int,
    state: str,
    task_id: str | None = None,
    retry_ms: int | None = None,
) -> bytes:
    """The first frame. `first` (`from` on the wire): where the content goes on; `head`: the newest number there is."""
    fields: dict[str, Any] = {"request_id": request_id, "model": model}
    if task_id is not None:
        fields["task_id"] = task_id
    fields |= {"epoch": "%08x" % epoch, "from": first, "head": head, "state": state}  # noqa: UP031
    return (b"" if retry_ms is None else retry(retry_ms)) + _control(b"start", fields)


def retry(retry_ms: int) -> bytes:
    """The `retry:` line that the stream's first frame begins with; no frame by itself."""
    return b"retry: %d\n" % retry_ms


def reset(reason: str) -> bytes:
    """The client discards its text, a replay from 1 follows. `reason`: epoch, evicted or future."""
    return _control(b"reset", {"reason": reason})


def throttle(reason: str, retry_ms: int) -> bytes:
    """Events come slower for a while. `reason`: slow_reader, queue or upstream."""
    return _control(b"throttle", {"reason": reason, "retry_ms": retry_ms})


def drain(retry_ms: int) -> bytes:
    """This process is going; come back after `retry_ms`."""
    return _control(b"drain", {"retry_ms": retry_ms})


def error(details: Mapping[str, Any], *, retryable: bool) -> bytes:
    """The bad end of a stream; nothing follows it. `details` is an error object (message, type, code, ...)."""
    return _control(b"error", {"error": details, "retryable": retryable})


def _control(name: bytes, fields: Mapping[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, _to_json(fields))


def _to_json(value: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:
        # Half a surrogate pair: upstreams cut emoji between two deltas, and a client that joins the texts mends them.
        # orjson has no way to write one; escaped, it passes.
        return json.dumps(value, separators=(",", ":")).encode("ascii")
