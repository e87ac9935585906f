"""The accountant's copy of an encoded answer: bombs cost a bounded time, real streams are read to their end."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from proxyd.dialects.base import JSON, SSE, Media, Route, build, make_observer, parse_ask
from proxyd.relay.tap import MAX_INFLATED_BYTES, MAX_INFLATED_EVENTS, Tap

USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'


def read(media: Media, payload: bytes, piece: int) -> Any:
    ask = parse_ask(Route.CHAT, b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a"}]}')
    observer = make_observer(ask, "openai", build(ask, "openai", "m", False), request_id="r", epoch=7)
    kind = "text/event-stream" if media is SSE else "application/json"
    tap = Tap(observer, media, kind, 200, "gzip")
    for at in range(0, len(payload), piece):
        tap.feed(payload[at : at + piece])
    tap.finish(observer)
    observer.finish(True, tap.text_bytes)
    return observer


@pytest.mark.parametrize("filler", [b"data:x\n\n" * 200_000, b"a\n" * (8 << 20), b":" * (32 << 20)])
def test_a_bomb_of_events_is_given_up_and_its_usage_unknown(filler: bytes) -> None:
    observer = read(SSE, gzip.compress(filler + b"data: " + USAGE + b"\n\ndata: [DONE]\n\n"), 65536)
    assert (observer.outcome, observer.usage_source) == ("completed", "none")
    assert observer.parse_errors < 3 * MAX_INFLATED_EVENTS
    assert len(filler) > MAX_INFLATED_BYTES or filler.count(b"data") > MAX_INFLATED_EVENTS


def test_a_long_encoded_stream_in_pieces_is_read_to_its_end() -> None:
    chunks = b"".join(
        b'data: {"choices":[{"index":0,"delta":{"content":"%x"}}]}\n\n' % (n * 7919) for n in range(50_000)
    )
    observer = read(SSE, gzip.compress(chunks + b"data: " + USAGE + b"\n\ndata: [DONE]\n\n"), 16384)
    assert (observer.usage_source, observer.usage.prompt) == ("provider", 3)


def test_an_encoded_body_is_read_up_to_what_is_kept() -> None:
    whole = USAGE[:-1] + b',"x":"' + b"x" * 6_000_000 + b'"}'
    assert read(JSON, gzip.compress(whole), 1 << 20).usage.prompt == 3
    too_large = USAGE[:-1] + b',"x":"' + b"x" * 100_000_000 + b'"}'
    observer = read(JSON, gzip.compress(too_large), 1 << 20)
    assert (observer.outcome, observer.usage_source) == ("completed", "none")
