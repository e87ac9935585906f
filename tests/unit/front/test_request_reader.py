"""Requests out of bytes, whatever the cuts."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from proxyd.errors import Refusal
from proxyd.front.handoff import rebuild
from proxyd.front.request import Request, RequestReader
from proxyd.wire.head import find_head_end, parse_request_head
from tests.unit.wire.test_hostile_heads import ACCEPTED, REJECTED

MAX_HEAD, MAX_BODY = 4096, 1000

PLAIN = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = (
    b"POST /b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;e=1\r\nde\r\n0\r\nT: v\r\n\r\n"
)
BARE = b"GET /c HTTP/1.1\r\nHost: x\r\n\r\n"
AFTER_EMPTY_LINE = b"\r\n" + BARE
SEQUENCE = PLAIN + CHUNKED + BARE + AFTER_EMPTY_LINE + PLAIN
EXPECTED = [("/a", b"hello"), ("/b", b"abcde"), ("/c", b""), ("/c", b""), ("/a", b"hello")]


def read_all(pieces: Iterable[bytes], max_head: int = MAX_HEAD) -> list[tuple[str, bytes]]:
    """The requests in `pieces`, as the connection takes them."""
    reader, requests, head = RequestReader(max_head, MAX_BODY), [], None
    for piece in pieces:
        reader.feed(piece)
        while True:
            if head is None:
                head = reader.take_head()
                if head is None:
                    break
                reader.begin_body(head)
            body = reader.take_body()
            if body is None:
                break
            requests.append((head.path, body))
            head = None
    return requests


def test_a_sequence_is_the_same_whole_and_byte_by_byte() -> None:
    assert read_all([SEQUENCE]) == EXPECTED
    assert read_all(SEQUENCE[at : at + 1] for at in range(len(SEQUENCE))) == EXPECTED


def test_a_sequence_is_the_same_at_every_split() -> None:
    for at in range(1, len(SEQUENCE)):
        assert read_all([SEQUENCE[:at], SEQUENCE[at:]]) == EXPECTED, at


@pytest.mark.parametrize("seed", range(20))
def test_a_sequence_is_the_same_in_random_pieces(seed: int) -> None:
    dice, pieces, at = random.Random(seed), [], 0
    while at < len(SEQUENCE):
        size = dice.randint(1, 40)
        pieces.append(SEQUENCE[at : at + size])
        at += size
    assert read_all(pieces) == EXPECTED


def outcome(pieces: Iterable[bytes], max_head: int) -> int:
    """The status of the refusal that the pieces end in, 0 for none, negative if it would keep the connection."""
    try:
        read_all(pieces, max_head)
    except Refusal as refusal:
        return refusal.status if refusal.close else -refusal.status
    return 0


# The table is of whole heads for the parser; a stream never gives it more or less than one (the few others are out).
WHOLE = [(name, status, data) for name, status, data in REJECTED if find_head_end(data) == len(data)]


def test_most_of_the_hostile_table_is_run_as_a_stream() -> None:
    assert len(WHOLE) > 0.9 * len(REJECTED)


@pytest.mark.parametrize(("status", "data"), [pytest.param(s, d, id=name) for name, s, d in WHOLE])
def test_a_hostile_head_is_refused_whole_and_in_two(status: int, data: bytes) -> None:
    limit = 32 * 1024
    assert outcome([data], limit) == status
    # Cut within the head: what decides may come later, but the answer is a refusal all the same.
    assert outcome([data[: len(data) // 2], data[len(data) // 2 :]], limit) in (status, 400)


@pytest.mark.parametrize("data", [pytest.param(d, id=name) for name, d in ACCEPTED])
def test_an_unusual_head_is_taken_at_every_cut(data: bytes) -> None:
    whole = outcome([data], 32 * 1024)
    assert whole in (0, 413), "what it announces may be more than we take; its form is not refused"
    for at in range(1, min(len(data), 200)):
        assert outcome([data[:at], data[at:]], 32 * 1024) == whole, at


def test_a_head_that_never_ends_is_431_as_soon_as_it_is_too_long() -> None:
    reader = RequestReader(MAX_HEAD, MAX_BODY)
    reader.feed(b"GET / HTTP/1.1\r\nX: ")
    assert reader.take_head() is None
    reader.feed(b"a" * MAX_HEAD)
    with pytest.raises(Refusal) as refused:
        reader.take_head()
    assert refused.value.status == 431


def test_an_announced_large_body_is_413_before_a_byte_of_it() -> None:
    reader = RequestReader(MAX_HEAD, MAX_BODY)
    reader.feed(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n")
    head = reader.take_head()
    assert head is not None
    with pytest.raises(Refusal) as refused:
        reader.begin_body(head)
    assert refused.value.status == 413


def test_a_chunked_body_is_413_once_it_is_too_large() -> None:
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"a" * 100 + b"\r\n"
    assert outcome([data] + [b"64\r\n" + b"a" * 100 + b"\r\n"] * 10, MAX_HEAD) == 413


@pytest.mark.parametrize(
    "body",
    [b"5\nhello\r\n", b"-5\r\n", b"5 \r\nhello\r\n", b"5\r\nhelloX", b"g\r\n", b"0\r\nA b: c\r\n\r\n"],
)
def test_a_broken_chunk_is_400(body: bytes) -> None:
    data = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert outcome([data, body], MAX_HEAD) == 400
    assert outcome([data] + [body[at : at + 1] for at in range(len(body))], MAX_HEAD) == 400


def test_another_protocol_is_400_at_its_first_byte() -> None:
    assert outcome([b"\x16\x03\x01"], MAX_HEAD) == 400


def test_an_idle_reader_holds_nothing() -> None:
    reader = RequestReader(MAX_HEAD, MAX_BODY)
    reader.feed(BARE)
    head = reader.take_head()
    assert head is not None
    reader.begin_body(head)
    reader.take_body()
    assert reader.pending == b""


@pytest.mark.parametrize("may_keep", [True, False])
@pytest.mark.parametrize("data", [PLAIN, CHUNKED, BARE, BARE.replace(b"HTTP/1.1", b"HTTP/1.0")])
def test_a_request_is_handed_on_with_one_plain_framing(data: bytes, may_keep: bool) -> None:
    (path, body), end = read_all([data])[0], data.index(b"\r\n\r\n") + 4
    head = parse_request_head(data[:end], MAX_HEAD)
    again = rebuild(Request(head, body, "id", "peer", False, False, 0.0), may_keep)
    assert read_all([again]) == [(path, body)]
    rebuilt = parse_request_head(again[: again.index(b"\r\n\r\n") + 4], MAX_HEAD)
    assert (rebuilt.version, rebuilt.chunked, rebuilt.keep_alive) == (head.version, False, may_keep)
    assert not rebuilt.expect_continue
