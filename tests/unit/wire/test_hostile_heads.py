"""Request heads that must be refused, with their status, and odd ones that must not be (SAFETY, "Hostile HTTP")."""
from __future__ import annotations

import pytest

from proxyd.wire.head import HeadError, find_head_end, parse_request_head

MAX_HEAD = 32 * 1024
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
END = b"\r\n"

REJECTED: list[tuple[str, int, bytes]] = [
    # Host
    ("no Host", 400, b"GET / HTTP/1.1\r\n\r\n"),
    ("two Hosts", 400, GET + b"Host: y\r\n\r\n"),
    ("two equal Hosts", 400, GET + b"host: x\r\n\r\n"),
    ("empty Host", 400, b"GET / HTTP/1.1\r\nHost:\r\n\r\n"),
    ("Host with a space", 400, b"GET / HTTP/1.1\r\nHost: x y\r\n\r\n"),
    ("Host with userinfo", 400, b"GET / HTTP/1.1\r\nHost: u@x\r\n\r\n"),
    ("Host with a path", 400, b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n"),
    ("Host list", 400, b"GET / HTTP/1.1\r\nHost: x, y\r\n\r\n"),
    ("Host with a bad port", 400, b"GET / HTTP/1.1\r\nHost: x:8a\r\n\r\n"),
    ("Host with a port out of range", 400, b"GET / HTTP/1.1\r\nHost: x:65536\r\n\r\n"),
    ("Host with two ports", 400, b"GET / HTTP/1.1\r\nHost: x:1:2\r\n\r\n"),
    ("Host that is only a port", 400, b"GET / HTTP/1.1\r\nHost: :80\r\n\r\n"),
    ("Host with a broken IPv6 literal", 400, b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n"),
    ("Host with a false IPv6 literal", 400, b"GET / HTTP/1.1\r\nHost: [:::1]\r\n\r\n"),
    ("Host with a high byte", 400, b"GET / HTTP/1.1\r\nHost: \xe9\r\n\r\n"),
    ("Host with a percent escape", 400, b"GET / HTTP/1.1\r\nHost: %78\r\n\r\n"),
    ("overlong Host", 400, b"GET / HTTP/1.1\r\nHost: " + b"a" * 256 + b"\r\n\r\n"),
    ("two Hosts on HTTP/1.0", 400, b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n"),
    ("invalid Host on HTTP/1.0", 400, b"GET / HTTP/1.0\r\nHost: x y\r\n\r\n"),
    # method
    ("unknown method", 501, b"FROB / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("lower-case method", 501, b"get / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("CONNECT", 501, b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n"),
    ("method with a bracket", 400, b"G(T / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("method with a NUL", 400, b"G\0T / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("empty method", 400, b" / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("space before the method", 400, b" GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    # target
    ("empty target", 400, b"GET  HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("relative target", 400, b"GET v1/models HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("asterisk with GET", 400, b"GET * HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("authority-form with GET", 400, b"GET x:80 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("high byte in the target", 400, b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("high byte in the query", 400, b"GET /?\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("control byte in the target", 400, b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("NUL in the target", 400, b"GET /\0 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("DEL in the target", 400, b"GET /\x7f HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("TAB in the target", 400, b"GET /\t HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("space in the target", 400, b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("fragment in the target", 400, b"GET /#a HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("fragment in the query", 400, b"GET /?a#b HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("backslash in the path", 400, b"GET /a\\b HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("half a percent escape", 400, b"GET /%4 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("false percent escape", 400, b"GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("overlong target", 414, b"GET /" + b"a" * 8192 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form for another host", 400, b"GET http://y/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form for another port", 400, b"GET http://x:81/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form with userinfo", 400, b"GET http://u@x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form of another scheme", 400, b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form without an authority", 400, b"GET http:///a HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form with a fragment", 400, b"GET http://x/#a HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form without Host", 400, b"GET http://x/ HTTP/1.1\r\n\r\n"),
    # version and request line
    ("HTTP/0.9", 400, b"GET /\r\n\r\n"),
    ("HTTP/0.9 spelled out", 505, b"GET / HTTP/0.9\r\nHost: x\r\n\r\n"),
    ("HTTP/2.0", 505, b"GET / HTTP/2.0\r\nHost: x\r\n\r\n"),
    ("the HTTP/2 preface", 505, b"PRI * HTTP/2.0\r\n\r\n"),
    ("HTTP/1.2", 505, b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    ("HTTP/3.0", 505, b"GET / HTTP/3.0\r\nHost: x\r\n\r\n"),
    ("HTTP/1", 400, b"GET / HTTP/1\r\nHost: x\r\n\r\n"),
    ("HTTP/1.10", 400, b"GET / HTTP/1.10\r\nHost: x\r\n\r\n"),
    ("HTTP/01.1", 400, b"GET / HTTP/01.1\r\nHost: x\r\n\r\n"),
    ("lower-case http", 400, b"GET / http/1.1\r\nHost: x\r\n\r\n"),
    ("another protocol", 400, b"GET / ICE/1.0\r\nHost: x\r\n\r\n"),
    ("RTSP", 400, b"DESCRIBE / RTSP/1.0\r\nHost: x\r\n\r\n"),
    ("two spaces in the request line", 400, b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("TAB in the request line", 400, b"GET\t/\tHTTP/1.1\r\nHost: x\r\n\r\n"),
    ("space after the version", 400, b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n"),
    ("two empty lines in front", 400, b"\r\n\r\n" + GET + END),
    ("bare LF in front", 400, b"\n" + GET + END),
    ("a TLS hello", 400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    # line ends and folds
    ("bare LF everywhere", 400, b"GET / HTTP/1.1\nHost: x\n\n"),
    ("bare LF after the request line", 400, b"GET / HTTP/1.1\nHost: x\r\n\r\n"),
    ("bare LF after a field", 400, GET + b"A: b\nC: d\r\n\r\n"),
    ("bare LF as the blank line", 400, GET + b"\n"),
    ("bare CR in a value", 400, GET + b"A: b\rC: d\r\n\r\n"),
    ("bare CR before the colon", 400, GET + b"A\r: b\r\n\r\n"),
    ("CR CR LF", 400, GET + b"A: b\r\r\n\r\n"),
    ("fold with a space", 400, GET + b"A: b\r\n c\r\n\r\n"),
    ("fold with a TAB", 400, GET + b"A: b\r\n\tc\r\n\r\n"),
    ("fold in the first field", 400, b"GET / HTTP/1.1\r\n Host: x\r\n\r\n"),
    ("fold of Transfer-Encoding", 400, POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n"),
    # field names and values
    ("space before the colon", 400, GET + b"A : b\r\n\r\n"),
    ("TAB before the colon", 400, GET + b"A\t: b\r\n\r\n"),
    ("space before the colon of Content-Length", 400, POST + b"Content-Length : 5\r\n\r\n"),
    ("space inside a name", 400, GET + b"A b: c\r\n\r\n"),
    ("empty name", 400, GET + b": b\r\n\r\n"),
    ("no colon", 400, GET + b"Abc\r\n\r\n"),
    ("NUL in a name", 400, GET + b"A\0b: c\r\n\r\n"),
    ("high byte in a name", 400, GET + b"\xc3\x84: c\r\n\r\n"),
    ("bracket in a name", 400, GET + b"A[0]: c\r\n\r\n"),
    ("NUL in a value", 400, GET + b"A: b\0c\r\n\r\n"),
    ("control byte in a value", 400, GET + b"A: b\x08c\r\n\r\n"),
    ("DEL in a value", 400, GET + b"A: b\x7fc\r\n\r\n"),
    ("vertical tab before a value", 400, POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n"),
    ("content_length", 400, POST + b"Content_Length: 5\r\n\r\n"),
    ("transfer_encoding", 400, POST + b"TRANSFER_ENCODING: chunked\r\n\r\n"),
    ("x_forwarded_for", 400, GET + b"X_Forwarded-For: 127.0.0.1\r\n\r\n"),
    ("Connection names Content-Length", 400, POST + b"Content-Length: 5\r\nConnection: content-length\r\n\r\n"),
    ("Connection names Host", 400, GET + b"Connection: close, Host\r\n\r\n"),
    # lengths
    ("both lengths", 400, POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("both lengths, the other order", 400, POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"),
    ("two Content-Lengths", 400, POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"),
    ("two equal Content-Lengths", 400, POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\n"),
    ("Content-Length list", 400, POST + b"Content-Length: 5, 5\r\n\r\n"),
    ("empty Content-Length", 400, POST + b"Content-Length:\r\n\r\n"),
    ("Content-Length with plus", 400, POST + b"Content-Length: +5\r\n\r\n"),
    ("Content-Length with minus", 400, POST + b"Content-Length: -5\r\n\r\n"),
    ("hexadecimal Content-Length", 400, POST + b"Content-Length: 0x5\r\n\r\n"),
    ("Content-Length with a space", 400, POST + b"Content-Length: 5 0\r\n\r\n"),
    ("Content-Length with an underscore", 400, POST + b"Content-Length: 1_0\r\n\r\n"),
    ("Content-Length with a point", 400, POST + b"Content-Length: 5.0\r\n\r\n"),
    ("Content-Length with letters", 400, POST + b"Content-Length: 5a\r\n\r\n"),
    ("Content-Length in quotes", 400, POST + b'Content-Length: "5"\r\n\r\n'),
    ("Content-Length over 64 bits", 400, POST + b"Content-Length: 18446744073709551617\r\n\r\n"),
    ("Content-Length of 19 digits", 400, POST + b"Content-Length: 1000000000000000000\r\n\r\n"),
    ("Arabic-Indic digits", 400, POST + "Content-Length: ٥\r\n\r\n".encode()),
    # transfer codings
    ("Transfer-Encoding identity", 400, POST + b"Transfer-Encoding: identity\r\n\r\n"),
    ("empty Transfer-Encoding", 400, POST + b"Transfer-Encoding:\r\n\r\n"),
    ("chunked twice in a list", 400, POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n"),
    ("chunked twice", 400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ("chunked, then identity", 400, POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n"),
    ("chunked is not last", 400, POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n"),
    ("gzip alone", 400, POST + b"Transfer-Encoding: gzip\r\n\r\n"),
    ("gzip, chunked", 501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n"),
    ("xchunked", 400, POST + b"Transfer-Encoding: xchunked\r\n\r\n"),
    ("chunked with a parameter", 400, POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n"),
    ("chunked in quotes", 400, POST + b'Transfer-Encoding: "chunked"\r\n\r\n'),
    ("chunked with a comma", 400, POST + b"Transfer-Encoding: ,chunked\r\n\r\n"),
    ("Transfer-Encoding on HTTP/1.0", 400, b"POST / HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"),
    # limits, rest
    ("unknown expectation", 417, POST + b"Content-Length: 5\r\nExpect: 200-maybe\r\n\r\n"),
    ("201 fields", 431, GET + b"A: b\r\n" * 200 + END),
    ("100,000 fields", 431, GET + b"A: b\r\n" * 100_000 + END),
    ("a head over the bound", 431, GET + b"A: " + b"b" * MAX_HEAD + b"\r\n\r\n"),
    ("two heads", 400, GET + END + GET + END),
    ("a body after the head", 400, GET + END + b"x"),
    ("no blank line", 400, GET),
    ("nothing", 400, b""),
    ("only an empty line", 400, b"\r\n"),
    ("only empty lines", 400, b"\r\n\r\n"),
]

ACCEPTED: list[tuple[str, bytes]] = [
    ("the least", GET + END),
    ("one empty line in front", b"\r\n" + GET + END),
    ("HTTP/1.0 without Host", b"GET / HTTP/1.0\r\n\r\n"),
    ("HTTP/1.0 with Host", b"GET / HTTP/1.0\r\nHost: x\r\n\r\n"),
    ("Host with a port", b"GET / HTTP/1.1\r\nHost: x.example:8080\r\n\r\n"),
    ("Host with an empty port", b"GET / HTTP/1.1\r\nHost: x:\r\n\r\n"),
    ("Host with an IPv6 literal", b"GET / HTTP/1.1\r\nHost: [::ffff:127.0.0.1]:3000\r\n\r\n"),
    ("Host with an underscore", b"GET / HTTP/1.1\r\nHost: my_service\r\n\r\n"),
    ("Host last", b"GET / HTTP/1.1\r\nA: b\r\nHoSt:x\r\n\r\n"),
    ("no space after the colon", GET + b"A:b\r\n\r\n"),
    ("space around a value", GET + b"A: \t b \t \r\n\r\n"),
    ("empty value", GET + b"A:\r\n\r\n"),
    ("high bytes in a value", GET + b"Last-Event-ID: \xe2\x80\xa6\r\n\r\n"),
    ("TAB in a value", GET + b"A: b\tc\r\n\r\n"),
    ("every token byte in a name", GET + b"!#$%&'*+-.^_`|~0Az: b\r\n\r\n"),
    ("an underscore in a harmless name", GET + b"my_field: b\r\n\r\n"),
    ("absolute-form", b"GET http://X:80/a?b HTTP/1.1\r\nHost: x:80\r\n\r\n"),
    ("absolute-form with https and no path", b"GET HTTPS://x HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("absolute-form with a query only", b"GET http://x?a=b HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("OPTIONS of the server", b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("OPTIONS of the server through a proxy", b"OPTIONS http://x HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a long target", b"GET /" + b"a" * 8000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("an escaped path", b"GET /a%20b/%2e%2E/;c=d HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a query as browsers send it", b"GET /?a[0]={b}|c`d^e\\f%zz HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a query with question marks", b"GET /?a?b=/?c HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("chunked in any case", POST + b"transfer-encoding: ChUnKeD\r\n\r\n"),
    ("Content-Length zero", POST + b"Content-Length: 0\r\n\r\n"),
    ("Content-Length with leading zeros", POST + b"Content-Length: 0005\r\n\r\n"),
    ("Content-Length of 18 digits", POST + b"Content-Length: 999999999999999999\r\n\r\n"),
    ("200 fields", GET + b"A: b\r\n" * 199 + END),
    ("a WebSocket handshake", GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"),
    ("an offer of HTTP/2", GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"),
    ("Expect", POST + b"Content-Length: 5\r\nExpect: 100-continue\r\n\r\n"),
    ("a method for the routes to refuse", b"PROPFIND / HTTP/1.1\r\nHost: x\r\n\r\n"),
    ("a GET with a body", GET + b"Content-Length: 5\r\n\r\n"),
    ("TE and trailers", GET + b"TE: trailers\r\nConnection: TE\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "head"), [row[1:] for row in REJECTED], ids=[row[0] for row in REJECTED])
def test_a_hostile_head_is_refused(status: int, head: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(head, MAX_HEAD if b"b" * MAX_HEAD in head else 1024 * 1024)
    assert caught.value.status == status


@pytest.mark.parametrize("head", [row[1] for row in ACCEPTED], ids=[row[0] for row in ACCEPTED])
def test_an_unusual_head_is_served(head: bytes) -> None:
    assert find_head_end(head) == len(head)
    parsed = parse_request_head(head, MAX_HEAD)
    assert parsed.content_length is None or not parsed.chunked


def test_the_tables_are_as_long_as_they_were_meant_to_be() -> None:
    assert len(REJECTED) >= 90
    assert len(ACCEPTED) >= 20


def test_a_refusal_repeats_none_of_the_hostile_bytes() -> None:
    for _, _, head in REJECTED:
        with pytest.raises(HeadError) as caught:
            parse_request_head(head[:4096], MAX_HEAD)
        assert caught.value.reason.isprintable()
        assert len(caught.value.reason) < 120


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", b""), (b"/a?", "/a", b""), (b"/a?b?c", "/a", b"b?c"), (b"//x/a", "//x/a", b""),
        (b"http://x", "/", b""), (b"http://x?a", "/", b"a"), (b"http://X/v1/models?a=b", "/v1/models", b"a=b"),
    ],
)
def test_path_and_query_come_from_any_form_of_target(target: bytes, path: str, query: bytes) -> None:
    head = parse_request_head(b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n", MAX_HEAD)
    assert (head.path, head.query, head.target) == (path, query, target)
