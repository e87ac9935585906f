"""Heads as clients and servers send them."""
from __future__ import annotations

import pytest

from proxyd.wire.head import (
    BodyKind,
    HeadError,
    build_request_head,
    build_response_head,
    find_head_end,
    parse_request_head,
    parse_response_head,
)

SDK_HEAD = (
    b"POST /v1/chat/completions?beta=true HTTP/1.1\r\n"
    b"Host: 127.0.0.1:3000\r\n"
    b"Accept-Encoding: gzip, deflate\r\n"
    b"Connection: keep-alive\r\n"
    b"Authorization: Bearer a.b.c\r\n"
    b"X-Stainless-Lang: python\r\n"
    b"x-stainless-timeout: NOT_GIVEN\r\n"
    b"Content-Length: 120\r\n\r\n"
)


def request(*lines: bytes) -> bytes:
    return b"\r\n".join([*lines, b"", b""])


def test_an_sdk_head_gives_its_facts() -> None:
    head = parse_request_head(SDK_HEAD, 32768)
    assert (head.method, head.path, head.query) == ("POST", "/v1/chat/completions", b"beta=true")
    assert head.version == (1, 1)
    assert head.content_length == 120
    assert head.keep_alive
    assert not head.chunked
    assert not head.expect_continue
    assert not head.upgrade
    assert head.headers[0] == (b"host", b"127.0.0.1:3000")
    assert head.get(b"x-stainless-timeout") == b"NOT_GIVEN"
    assert head.get(b"absent") is None


def test_names_are_lowered_values_are_trimmed_and_order_is_kept() -> None:
    head = parse_request_head(request(b"GET / HTTP/1.1", b"HOST:\t x.example \t", b"B: 2", b"A:", b"B: \xe9"), 1000)
    assert head.headers == [(b"host", b"x.example"), (b"b", b"2"), (b"a", b""), (b"b", b"\xe9")]


@pytest.mark.parametrize(
    ("version", "connection", "kept"),
    [
        (b"1.1", None, True), (b"1.1", b"close", False), (b"1.1", b"Keep-Alive", True), (b"1.1", b"foo , CLOSE", False),
        (b"1.0", None, False), (b"1.0", b"keep-alive", True), (b"1.0", b"keep-alive, close", False),
    ],
)
def test_version_and_options_say_whether_to_keep_alive(version: bytes, connection: bytes | None, kept: bool) -> None:
    lines = [b"GET / HTTP/" + version, b"Host: x"]
    if connection is not None:
        lines.append(b"Connection: " + connection)
    assert parse_request_head(request(*lines), 1000).keep_alive is kept


def test_a_websocket_handshake_is_an_upgrade() -> None:
    lines = b"GET /api/v1/ws HTTP/1.1", b"Host: x", b"Connection: keep-alive, Upgrade", b"Upgrade: websocket"
    assert parse_request_head(request(*lines), 1000).upgrade
    assert not parse_request_head(request(lines[0], lines[1], lines[3]), 1000).upgrade
    assert not parse_request_head(request(*lines[:3]), 1000).upgrade


def test_expect_continue_counts_only_where_a_body_follows() -> None:
    post = b"POST / HTTP/1.1", b"Host: x", b"Expect: 100-Continue"
    assert parse_request_head(request(*post, b"Content-Length: 5"), 1000).expect_continue
    assert parse_request_head(request(*post, b"Transfer-Encoding: chunked"), 1000).expect_continue
    assert not parse_request_head(request(*post, b"Content-Length: 0"), 1000).expect_continue
    assert not parse_request_head(request(*post), 1000).expect_continue


def test_the_end_of_the_head_is_found_under_every_cut() -> None:
    stream = SDK_HEAD + b"{\r\n\r\n}"
    for first in range(len(stream)):
        searched = 0
        for size in (first, len(stream)):
            end = find_head_end(stream[:size], searched)
            searched = size
            if end >= 0:
                break
        assert end == len(SDK_HEAD)


def test_a_head_that_ends_with_bare_lf_is_found_so_that_it_can_be_refused() -> None:
    assert find_head_end(b"GET / HTTP/1.1\nHost: x\n\nrest") == 24
    assert find_head_end(b"GET / HTTP/1.1\r\nHost: x\n\r\n\r\n") == 26
    assert find_head_end(bytearray(b"GET / HTTP/1.1\r\nHost: x\r\n"), 3) == -1


def test_a_head_over_its_bound_is_431() -> None:
    with pytest.raises(HeadError) as caught:
        parse_request_head(SDK_HEAD, len(SDK_HEAD) - 1)
    assert caught.value.status == 431
    assert parse_request_head(SDK_HEAD, len(SDK_HEAD)).method == "POST"


@pytest.mark.parametrize(
    ("head", "method", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", "POST", BodyKind.CLOSE),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "POST", BodyKind.LENGTH),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST", BodyKind.LENGTH),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n", "POST", BodyKind.CHUNKED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD", BodyKind.NONE),
        (b"HTTP/1.1 204 No Content\r\n\r\n", "POST", BodyKind.NONE),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "GET", BodyKind.NONE),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "POST", BodyKind.NONE),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", "POST", BodyKind.NONE),
    ],
)
def test_a_response_head_says_how_its_body_ends(head: bytes, method: str, kind: BodyKind) -> None:
    assert parse_response_head(head).body_kind(method) is kind


@pytest.mark.parametrize(
    ("head", "status", "reason", "kept"),
    [
        (b"HTTP/1.1 200 \r\n\r\n", 200, b"", True),
        (b"HTTP/1.1 200\r\n\r\n", 200, b"", True),
        (b"HTTP/1.1 529 Overloaded\r\nx: \xe9t\xe9\r\n\r\n", 529, b"Overloaded", True),
        (b"HTTP/1.1 404 Pas trouv\xe9\r\nConnection: close\r\n\r\n", 404, b"Pas trouv\xe9", False),
        (b"HTTP/1.0 200 OK\r\n\r\n", 200, b"OK", False),
        (b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\n", 200, b"OK", True),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", 101, b"Switching Protocols",
         False),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204, b"No Content", True),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", 204, b"No Content", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: y\r\ncontent-length: 5\r\n\r\n", 200, b"OK", True),
    ],
)
def test_what_real_servers_send_is_understood(head: bytes, status: int, reason: bytes, kept: bool) -> None:
    parsed = parse_response_head(head)
    assert (parsed.status, parsed.reason, parsed.keep_alive) == (status, reason, kept)


def test_equal_content_lengths_become_one() -> None:
    parsed = parse_response_head(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length:  5\r\nA: b\r\n\r\n")
    assert parsed.content_length == 5
    assert parsed.headers == [(b"content-length", b"5"), (b"a", b"b")]


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 05\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 5\n\n",
        b"HTTP/1.1 200 OK\r\nA: b\rContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n: b\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/0.9 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 201 + b"\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"\r\n\r\n",
        b"",
    ],
)
def test_an_upstream_head_that_could_move_the_end_of_its_body_is_refused(head: bytes) -> None:
    with pytest.raises(HeadError) as caught:
        parse_response_head(head)
    assert caught.value.status == 502


def test_a_built_request_head_is_read_back() -> None:
    headers = [(b"host", b"api.example"), (b"content-length", b"3"), (b"empty", b"")]
    head = parse_request_head(build_request_head("POST", b"/v1/messages?x=1", headers), 1000)
    assert (head.method, head.target, head.headers) == ("POST", b"/v1/messages?x=1", headers)


@pytest.mark.parametrize(("status", "line"), [(200, b"HTTP/1.1 200 OK"), (529, b"HTTP/1.1 529 ")])
def test_a_built_response_head_has_the_registered_phrase_or_none(status: int, line: bytes) -> None:
    head = build_response_head(status, [(b"x-a", b"b")])
    assert head == line + b"\r\nx-a: b\r\n\r\n"
    assert parse_response_head(head).status == status


@pytest.mark.parametrize(
    "field", [(b"a", b"b\r\nc: d"), (b"a", b"b\nc"), (b"a", b"\0"), (b"a b", b"c"), (b"", b"c"), (b"a", b"b\r\n")]
)
def test_a_head_is_not_built_from_parts_that_would_make_another_one(field: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="do not belong"):
        build_request_head("GET", b"/", [field])
    with pytest.raises(ValueError, match="do not belong"):
        build_response_head(200, [field])


@pytest.mark.parametrize("target", [b"/a b", b"/a\r\nx", b"", b"/\xe9"])
def test_a_target_with_other_bytes_is_not_built(target: bytes) -> None:
    with pytest.raises(ValueError, match="do not belong"):
        build_request_head("GET", target, [])
