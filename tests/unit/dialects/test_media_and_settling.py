"""Media types, inflating a copy, and what is booked in the end."""

from __future__ import annotations

import gzip
import zlib
from typing import Any

import pytest

from proxyd._sse import Splitter
from proxyd.dialects.base import (
    JSON,
    NDJSON,
    OPAQUE,
    SSE,
    Inflater,
    Media,
    Observer,
    Route,
    Tally,
    estimate,
    inflater,
    is_identity,
    media_kind,
    parse_ask,
    settle,
)
from tests.unit.dialects.corpus_runs import request_body, run
from tests.unit.dialects.test_provider_shapes import (
    DONE,
    STOP,
    answered,
    chunk,
    delta,
    observer,
    sse,
    start,
    usage,
)


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        ("text/event-stream", SSE), ("Text/Event-Stream; charset=utf-8", SSE), ("text/event-stream;", SSE),
        (" text/event-stream ;x=y;", SSE), ("text/event-stream charset=utf-8", OPAQUE), ("x bogus", OPAQUE),
        ("text/event-streams", OPAQUE), ("application/json", JSON), ("APPLICATION/JSON;charset=UTF-8", JSON),
        ("application/problem+json", JSON), ("application/x-ndjson", NDJSON), ("application/jsonl", NDJSON),
        ("text/html", OPAQUE), ("", OPAQUE), (None, OPAQUE),
    ],
)  # fmt: skip
def test_the_parser_is_chosen_by_the_media_type_alone(content_type: str | None, kind: Media) -> None:
    assert media_kind(content_type) is kind


def test_an_answer_without_a_type_is_a_stream_when_one_was_asked_for() -> None:
    assert media_kind(None, streaming=True) is SSE
    assert media_kind("text/html", streaming=True) is OPAQUE


def inflate(coding: str, body: bytes, size: int) -> bytes:
    decoder = inflater(coding)
    assert decoder is not None
    out = []
    for at in range(0, len(body), size):
        out.append(decoder.feed(body[at : at + size]))
        while decoder.more:
            out.append(decoder.feed(b""))
    assert not decoder.failed
    return b"".join(out)


TEXT = b"data: {}\n\n" * 200_000


@pytest.mark.parametrize("size", [1000, 1 << 20])
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("X-GZIP", gzip.compress(TEXT)),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", zlib.compress(TEXT)[2:-4]),
        ("gzip", gzip.compress(TEXT[:1000]) + gzip.compress(TEXT[1000:])),
        ("gzip", gzip.compress(TEXT) + b"\0" * 7),
    ],
)
def test_a_coding_is_undone_in_any_pieces(coding: str, body: bytes, size: int) -> None:
    assert inflate(coding, body, size) == TEXT


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br", "compress", "x"])
def test_other_codings_are_unknown(coding: str) -> None:
    assert inflater(coding) is None
    assert not is_identity(coding)


@pytest.mark.parametrize("coding", [None, "", "identity", " Identity "])
def test_no_coding_is_no_coding(coding: str | None) -> None:
    assert is_identity(coding)


def test_a_bomb_is_bounded_by_call_and_in_total() -> None:
    decoder = Inflater("gzip", max_total=1 << 20)
    most = len(decoder.feed(gzip.compress(b"\0" * (8 << 20))))
    while decoder.more:
        most = max(most, len(decoder.feed(b"")))
    assert most <= 256 * 1024
    assert decoder.failed
    assert decoder.feed(b"more") == b""


def test_damaged_input_fails_for_good_and_raises_nothing() -> None:
    decoder = Inflater("gzip")
    assert decoder.feed(b"no gzip at all") == b""
    assert decoder.failed


# --- settling ----------------------------------------------------------------------------------------------------


def booked(route: Route, body: bytes, *, clean: bool = True, delivered: bool = True, **more: Any) -> Tally:
    seen = observer(route)
    _, splitter = run(Splitter, seen, [body], clean=clean)
    return settle(seen, parse_ask(route, request_body(route, **more)), splitter.text_bytes, delivered)


def booked_body(route: Route, seen: Observer, **more: Any) -> Tally:
    return settle(seen, parse_ask(route, request_body(route, **more)), 0, True)


PROMPT: Any = [{"role": "user", "content": "12345678"}]
ASKED = 3 + 3 + 1 + 3  # 123 456 78, three a message, its role, the start of the answer


def test_the_providers_numbers_are_booked_as_they_are() -> None:
    told = usage(20, 2, prompt_tokens_details={"cached_tokens": 4}, completion_tokens_details={"reasoning_tokens": 1})
    body = sse(chunk("a", "stop"), {"choices": [], "usage": told}, DONE)
    assert booked(Route.CHAT, body, messages=PROMPT) == Tally(20, 2, 4, 1, False)


def test_both_sides_are_estimated_when_the_provider_gave_none() -> None:
    body = sse(chunk("12345"), chunk("Ü", "stop"), DONE)
    assert booked(Route.CHAT, body, messages=PROMPT) == Tally(ASKED, 3, 0, 0, True)  # 123 45 Ü


def test_a_side_that_is_missing_is_estimated_beside_the_one_that_is_known() -> None:
    text = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "12345678"}}
    body = sse(start(input_tokens=25), text)
    assert booked(Route.MESSAGES, body, clean=False) == Tally(25, 4, 0, 0, True)  # 1.3 times 123 456 78
    body += sse(delta("end_turn", output_tokens=7), STOP)
    assert booked(Route.MESSAGES, body) == Tally(25, 7, 0, 0, False)


def test_nothing_is_booked_for_a_request_that_was_refused_or_never_answered() -> None:
    nothing = Tally(0, 0, 0, 0, True)
    assert booked_body(Route.CHAT, answered(Route.CHAT, {"error": "no"}, 429), messages=PROMPT) == nothing
    assert booked(Route.CHAT, b"", clean=False, delivered=False, messages=PROMPT) == nothing
    assert booked(Route.CHAT, sse({"error": {"message": "x"}}), messages=PROMPT) == nothing


def test_what_was_delivered_before_an_error_is_booked() -> None:
    body = sse(chunk("12345678"), {"error": {"message": "x"}}, DONE)
    assert booked(Route.CHAT, body, messages=PROMPT) == Tally(ASKED, 3, 0, 0, True)


def test_embeddings_are_prompt_only_and_counting_costs_nothing() -> None:
    answer = {"model": "e", "data": [], "usage": {"prompt_tokens": 8, "total_tokens": 8}}
    seen = answered(Route.EMBEDDINGS, answer)
    assert booked_body(Route.EMBEDDINGS, seen, input="12345") == Tally(8, 0, 0, 0, False)
    bare = answered(Route.EMBEDDINGS, {"data": []})
    assert booked_body(Route.EMBEDDINGS, bare, input="12345") == Tally(2, 0, 0, 0, True)
    counted = answered(Route.COUNT_TOKENS, {"input_tokens": 99})
    assert booked_body(Route.COUNT_TOKENS, counted, messages=PROMPT) == Tally(0, 0, 0, 0, False)
    assert counted.outcome == "completed"


def test_a_json_answer_without_usage_is_estimated_from_its_text() -> None:
    message = {"role": "assistant", "content": "12345"}
    seen = answered(Route.CHAT, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    assert booked_body(Route.CHAT, seen, messages=PROMPT) == Tally(ASKED, 2, 0, 0, True)


def test_counts_beyond_the_column_are_cut_and_nonsense_is_unknown() -> None:
    body = sse(chunk("a", "stop", usage=usage(2**40, 2**40)), DONE)
    assert booked(Route.CHAT, body).prompt_tokens == 2**32 - 1
    nonsense = {"prompt_tokens": -1, "completion_tokens": "7", "total_tokens": True}
    assert booked(Route.CHAT, sse(chunk("a", "stop", usage=nonsense), DONE)) == Tally(0, 1, 0, 0, True)


@pytest.mark.parametrize(("size", "tokens"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_an_estimate_is_a_quarter_rounded_up(size: int, tokens: int) -> None:
    assert estimate(size) == tokens
