"""Bodies of both directions under every cut, and the ones that must be refused."""
from __future__ import annotations

import pytest

from proxyd._frame import BODY_CHUNKED, BODY_LENGTH, Unframer
from proxyd.wire.framing import (
    LAST_CHUNK,
    MAX_EXTENSION,
    MAX_EXTENSIONS_TOTAL,
    MAX_TRAILERS,
    BodyReader,
    Dechunker,
    FramingError,
    encode_chunk,
)
from tests.corpus_cases import cuts

BODY = b"5\r\nhello\r\n1A;a=b\r\nabcdefghijklmnopqrstuvwxyz\r\n000\r\nX-Sum: 1\r\nY:\r\n\r\n"
PAYLOAD = b"helloabcdefghijklmnopqrstuvwxyz"

MALFORMED_FOR_BOTH = [
    b"5\nhello\r\n",
    b"5\rhello\r\n",
    b"\r\nhello\r\n",
    b"-5\r\nhello\r\n",
    b"+5\r\nhello\r\n",
    b"0x5\r\nhello\r\n",
    b" 5\r\nhello\r\n",
    b"5g\r\nhello\r\n",
    b"5_0\r\nhello\r\n",
    b"00000000000000005\r\nhello\r\n",
    b"ffffffffffffffff\r\nhello\r\n",
    b"8000000000000000\r\nhello\r\n",
    b"5;a=\x00\r\nhello\r\n",
    b"5;a=b\nhello\r\n",
    b"5;a\rb\r\nhello\r\n",
    b"5\r\nhello\n0\r\n\r\n",
    b"5\r\nhello\r0\r\n\r\n",
    b"5\r\nhelloX\r\n",
    b"5\r\nhello0\r\n\r\n",
    b"5\r\nhello\r\n\r\n0\r\n\r\n",
    b"0\r\nX: 1\n\r\n",
    b"0\r\nX : 1\r\n\r\n",
    b"0\r\n: 1\r\n\r\n",
    b"0\r\nX: 1\r\n folded\r\n\r\n",
    b"0\r\nX\r\n\r\n",
    b"0\r\nX: \x00\r\n\r\n",
    b"0\r\n\n",
    b"0\r\n\r\r\n\r\n",
]
MALFORMED_REQUESTS = [b"5 \r\nhello\r\n", b"5\t;a\r\nhello\r\n", b"5;\xe9\r\nhello\r\n"]


def read_request(pieces: list[bytes], max_body: int = 1000) -> tuple[bytes, bytes, bool]:
    """(payload, unread rest, done)."""
    reader = BodyReader(None, True, max_body)
    payload = rest = b""
    for piece in pieces:
        part, consumed = reader.feed(piece)
        payload += part
        rest += piece[consumed:]
    return payload, rest, reader.done


def test_a_chunked_request_is_read_to_its_last_byte_and_no_further_under_every_cut() -> None:
    for label, pieces in cuts(BODY + b"GET / HTTP/1.1\r\n"):
        assert read_request(pieces) == (PAYLOAD, b"GET / HTTP/1.1\r\n", True), label


def test_an_incomplete_chunked_request_is_not_done() -> None:
    for end in range(len(BODY)):
        payload, rest, done = read_request([BODY[:end]])
        assert not done
        assert rest == b""
        assert PAYLOAD.startswith(payload)


@pytest.mark.parametrize("body", MALFORMED_FOR_BOTH + MALFORMED_REQUESTS)
def test_a_malformed_chunked_request_is_400_under_every_cut(body: bytes) -> None:
    for label, pieces in cuts(body):
        with pytest.raises(FramingError) as caught:
            read_request(pieces)
        assert caught.value.status == 400, label


def test_a_request_over_the_bound_is_413_when_the_size_is_known() -> None:
    assert read_request([b"5\r\nhello\r\n5\r\nhello\r\n0\r\n\r\n"], max_body=10)[0] == b"hellohello"
    for label, pieces in cuts(b"5\r\nhello\r\n6\r\n"):
        with pytest.raises(FramingError) as caught:
            read_request(pieces, max_body=10)
        assert caught.value.status == 413, label


def test_a_content_length_over_the_bound_is_413_before_the_body_is_read() -> None:
    with pytest.raises(FramingError) as caught:
        BodyReader(11, False, 10)
    assert caught.value.status == 413


def test_a_body_with_a_length_is_read_to_its_last_byte_and_no_further() -> None:
    reader = BodyReader(5, False, 10)
    assert not reader.done
    assert reader.feed(b"he") == (b"he", 2)
    assert reader.feed(b"llo, next") == (b"llo", 3)
    assert reader.done
    assert reader.feed(b"next") == (b"", 0)


@pytest.mark.parametrize("length", [None, 0])
def test_no_body_is_done_at_once(length: int | None) -> None:
    assert BodyReader(length, False, 10).done


def test_a_broken_body_stays_broken_and_gives_what_came_before() -> None:
    reader = BodyReader(None, True, 1000)
    with pytest.raises(FramingError) as caught:
        reader.feed(b"5\r\nhello\r\nx\r\n")
    assert caught.value.payload == b"hello"
    with pytest.raises(FramingError) as again:
        reader.feed(b"0\r\n\r\n")
    assert again.value.payload == b""
    assert not reader.done


def test_extensions_are_bounded_one_by_one_and_together() -> None:
    fits = b"1;" + b"a" * (MAX_EXTENSION - 1) + b"\r\nx\r\n"
    assert read_request([fits + LAST_CHUNK])[0] == b"x"
    with pytest.raises(FramingError):
        read_request([b"0000000000000001;" + b"a" * MAX_EXTENSION + b"\r\nx\r\n"])
    with pytest.raises(FramingError):
        read_request([fits * (MAX_EXTENSIONS_TOTAL // MAX_EXTENSION + 1)])
    with pytest.raises(FramingError):
        read_request([b"1;" + b"a" * 100_000])


def test_trailers_are_bounded() -> None:
    assert read_request([b"0\r\n" + b"A: b\r\n" * 100 + b"\r\n"])[2]
    for pieces in ([b"0\r\n" + b"A: b\r\n" * MAX_TRAILERS], [b"0\r\nA:", b" " * MAX_TRAILERS]):
        with pytest.raises(FramingError):
            read_request(pieces)


@pytest.mark.parametrize("body", [
    BODY,
    BODY.replace(b"5\r\n", b"5 \r\n", 1),
    BODY.replace(b"1A;a=b", b'001a \t ; a="b;c" ;d'),
    BODY.replace(b"000", b"0;\xe9"),
])
def test_a_chunked_response_is_unframed_under_every_cut(body: bytes) -> None:
    for label, pieces in cuts(body + b"HTTP/1.1"):
        dechunker = Dechunker()
        assert b"".join(dechunker.feed(piece) for piece in pieces) == PAYLOAD, label
        assert dechunker.done
        assert dechunker.leftover == b"HTTP/1.1"
        assert dechunker.error is None


@pytest.mark.parametrize("body", MALFORMED_FOR_BOTH)
def test_a_malformed_chunked_response_is_refused_under_every_cut(body: bytes) -> None:
    for label, pieces in cuts(body):
        dechunker = Dechunker()
        with pytest.raises(FramingError):
            list(map(dechunker.feed, pieces))
        assert dechunker.error is not None, label
        assert not dechunker.done


@pytest.mark.parametrize("body", [
    BODY,
    BODY.replace(b"5\r\n", b"5 \r\n", 1),
    BODY.replace(b"1A;a=b", b'001a \t ; a="b;c" ;d'),
    BODY.replace(b"000", b"0;\xe9"),
    LAST_CHUNK,
])
def test_the_compiled_unframer_reads_what_its_twin_reads_under_every_cut(body: bytes) -> None:
    for label, pieces in cuts(body + b"HTTP/1.1"):
        twin, unframer = Dechunker(), Unframer(BODY_CHUNKED)
        for piece in pieces:
            assert unframer.feed(piece) == twin.feed(piece), label
            assert unframer.done == twin.done, label
        assert unframer.leftover == len(twin.leftover) == 8


@pytest.mark.parametrize("body", [
    b"-5\r\nhello\r\n", b"+5\r\nhello\r\n", b"0x5\r\nhello\r\n", b" 5\r\nhello\r\n", b"5g\r\nhello\r\n",
    b"5_0\r\nhello\r\n", b"\r\nhello\r\n", b"5\rhello\r\n", b"00000000000000005\r\nhello\r\n",
    b"ffffffffffffffff\r\nhello\r\n", b"5\r\nhelloX\r\n", b"5\r\nhello\r0\r\n\r\n", b"5\r\nhello0\r\n\r\n",
    b"0\r\n\r\r\n\r\n", b"1;" + b"a" * 100_000,
])
def test_the_compiled_unframer_refuses_what_could_move_the_end_of_a_body(body: bytes) -> None:
    for label, pieces in cuts(body) if len(body) < 100 else [("whole", [body])]:
        unframer = Unframer(BODY_CHUNKED)
        with pytest.raises(ValueError, match="chunked"):
            list(map(unframer.feed, pieces))
        assert not unframer.done, label


def test_the_compiled_unframer_stops_at_a_length() -> None:
    for label, pieces in cuts(b"helloHTTP/1.1"):
        unframer = Unframer(BODY_LENGTH, 5)
        assert b"".join(map(unframer.feed, pieces)) == b"hello", label
        assert unframer.done
        assert unframer.leftover == 8


def test_what_is_encoded_is_decoded() -> None:
    payloads = [b"a", b"", b"\r\n", b"x" * 70_000]
    framed = b"".join(map(encode_chunk, payloads)) + LAST_CHUNK
    dechunker = Dechunker()
    assert dechunker.feed(framed) == b"".join(payloads)
    assert dechunker.done


def test_an_empty_payload_does_not_end_the_body() -> None:
    assert encode_chunk(b"") == b""
    assert encode_chunk(b"a" * 26) == b"1a\r\n" + b"a" * 26 + b"\r\n"
