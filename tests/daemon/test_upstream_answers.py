"""Upstreams that answer oddly, break off, or refuse early; and the edges of request bodies."""

from __future__ import annotations

import json
import socket
import time

import pytest

from tests.daemon.harness import (
    CHAT,
    Reply,
    chat_chunk,
    request_bytes,
)  # fmt: skip
from tests.daemon.odd_stage import BODY, GOOD, PATH, SSE, Stage, running_stage, stage_at_rest, whole  # noqa: F401
from tests.daemon.peer import Line

# -- heads and framings ------------------------------------------------------------------------------------------------

UNREADABLE = {
    "nothing at all": b"",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "a few odd bytes": b"\x15\x03\x01\x00\x02\x02\x46",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Ty",
    "a head of 100 kB": b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
    "two thousand fields": b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(2000)) + b"\r\n",
    "both lengths": b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a negative length": b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: -1\r\n\r\n",
    "a length in hex": b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: 0x3\r\n\r\nabc",
    "another coding": b"HTTP/1.1 200 OK\r\n" + SSE + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\n" + b"Content-Length: 0\n\n",
    "a folded field": b"HTTP/1.1 200 OK\r\nX-A: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    "an upgrade nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
    b"Connection: upgrade\r\n\r\n\x81\x05hello",
    "early hints without end": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 4000,
}  # fmt: skip


@pytest.mark.parametrize("stay", [False, True], ids=["then closed", "then open"])
@pytest.mark.parametrize("label", UNREADABLE)
def test_an_answer_that_is_no_http_is_a_502_and_the_connection_is_dropped(label: str, stay: bool, stage: Stage) -> None:
    answered: list[Line] = []

    def script(line: Line) -> None:
        line.read_request()
        answered.append(line)
        line.send(UNREADABLE[label])
        if stay:
            line.wait_end(10)

    stage.a = script
    began = time.monotonic()
    reply, body, row = stage.ask()
    if stay and label in ("nothing at all", "half a head"):
        assert (reply.status, row["status"]) == (504, "timeout")
    else:
        assert (reply.status, row["status"]) == (502, "upstream_error")
        assert json.loads(body)["error"]["request_id"] == reply.header("x-proxyd-request-id")
    assert row["attempts"] == 1
    assert len(answered) == 1
    assert answered[0].gone.wait(5)
    assert time.monotonic() - began < 10


PASSED = {
    "1xx heads before it": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + GOOD,
    "equal lengths": GOOD.replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(BODY), 1),
    "no reason": GOOD.replace(b"200 OK", b"200", 1),
    "a 60 kB head": GOOD.replace(b"\r\n\r\n", b"\r\nX-Long: " + b"x" * 60_000 + b"\r\n\r\n", 1),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + SSE + b"\r\n" + BODY,
    "HTTP/1.0 with a length": GOOD.replace(b"HTTP/1.1", b"HTTP/1.0", 1),
    "Connection: close": b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + SSE + b"\r\n" + BODY,
    "trailers and extensions": b"HTTP/1.1 200 OK\r\n" + SSE + b"Transfer-Encoding: Chunked\r\n\r\n%x;a=b\r\n%b\r\n"
    b"0\r\nX-Sum: 1\r\n\r\n" % (len(BODY), BODY),
    "bytes behind its end": GOOD + b"HTTP/1.1 200 OK\r\n",
}  # fmt: skip
REUSED = {"1xx heads before it", "equal lengths", "no reason", "a 60 kB head", "trailers and extensions"}


@pytest.mark.parametrize("label", PASSED)
def test_an_unusual_answer_passes_and_its_connection_is_kept_only_where_it_may_be(label: str, stage: Stage) -> None:
    def script(line: Line) -> None:
        while line.read_request():
            line.send(PASSED[label])
            if label in ("HTTP/1.0", "Connection: close"):
                return

    stage.a = script
    before = stage.connections()
    for _ in range(2):
        reply, body, row = stage.ask()
        assert (reply.status, body, reply.ended) == (200, BODY, True)
        assert (row["status"], row["attempts"]) == ("completed", 1)
        assert reply.header("link") is None
    assert stage.connections() - before == (1 if label in REUSED else 2)


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_passes_and_the_connection_goes_on(status: int, stage: Stage) -> None:
    def script(line: Line) -> None:
        while line.read_request():
            line.send(b"HTTP/1.1 %d X\r\nX-Mark: yes\r\n\r\n" % status)

    stage.a = script
    before = stage.connections()
    sock = stage.daemon.connect()
    for _ in range(3):
        user = next(stage.users)
        sock.sendall(request_bytes(PATH, CHAT, stage.daemon.token(user)))
        reply = Reply(sock)
        assert (reply.status, reply.header("x-mark"), reply.header("content-length")) == (status, "yes", None)
        assert stage.row(user)["upstream"] == "odd"
    assert stage.connections() - before == 1


BAD_CHUNKS = {
    "no size": b"xyz\r\n",
    "a signed size": b"-5\r\nhello\r\n",
    "a size beyond 64 bits": b"fffffffffffffffff\r\nhello\r\n",
    "0x": b"0x5\r\nhello\r\n",
    "no CRLF behind the data": b"5\r\nhelloX",
    "a bare LF": b"5\nhello\r\n",
    "nothing more": b"",
}


@pytest.mark.parametrize("label", BAD_CHUNKS)
def test_bad_chunks_end_a_stream_with_an_error_event_and_no_end_mark(label: str, stage: Stage) -> None:
    def script(line: Line) -> None:
        line.read_request()
        line.send(b"HTTP/1.1 200 OK\r\n" + SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        line.chunk(chat_chunk("a"))
        line.send(BAD_CHUNKS[label])

    stage.a = script
    reply, body, row = stage.ask()
    assert (reply.status, reply.ended) == (200, False)
    assert body.startswith(chat_chunk("a") + b'data: {"error":')
    assert row["status"] == "upstream_error"


def test_a_head_that_drips_is_a_timeout_however_often_a_byte_comes(stage: Stage) -> None:
    def script(line: Line) -> None:
        line.read_request()
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"z" * 400:
            line.send(bytes([byte]))
            time.sleep(0.05)

    stage.a = script
    began = time.monotonic()
    reply, _, row = stage.ask()
    assert (reply.status, row["status"]) == (504, "timeout")
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n"])
def test_an_upstream_that_hangs_up_on_accept_is_not_dialled_without_end(greeting: bytes, stage: Stage) -> None:
    stage.a = lambda line: line.send(greeting)
    before, began = stage.connections(), time.monotonic()
    reply, _, row = stage.ask()
    assert reply.status in (408, 502, 504)  # its own answer counts where it came in time to be one
    assert row["status"] in ("upstream_error", "timeout")
    assert stage.connections() - before == 1
    assert time.monotonic() - began < 8


# -- early answers, large bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["waits", "closes at once"])
@pytest.mark.parametrize("status", [413, 429])
def test_a_refusal_before_the_body_was_read_reaches_the_client(status: int, end: str, stage: Stage) -> None:
    error = {"error": {"message": "no", "type": "x", "code": "early", "param": None}}

    def script(line: Line) -> None:
        line.read_head()
        line.send(whole(status, error, b"Retry-After: 7\r\n"))
        if end == "waits":
            line.wait_end(10)

    stage.a = script
    before = stage.connections()
    large = {**CHAT, "messages": [{"role": "user", "content": "x" * (6 << 20)}]}
    reply, body, row = stage.ask(large)
    assert (reply.status, json.loads(body), reply.header("retry-after")) == (status, error, "7")
    assert (row["status"], row["prompt_tokens"], row["attempts"]) == ("upstream_error", 0, 1)
    stage.a = stage.well
    assert stage.ask()[1] == BODY
    assert stage.connections() - before == 2  # a connection with half a request on it is not used again


def raw(stage: Stage, head: str, *parts: bytes) -> socket.socket:
    sock = stage.daemon.connect()
    sock.settimeout(15)
    token = stage.daemon.token(next(stage.users))
    sock.sendall((head.replace("\n", "\r\n") + f"Authorization: Bearer {token}\r\n\r\n").encode())
    for part in parts:
        sock.sendall(part)
    return sock


def sized(length: int) -> bytes:
    """A chat request of exactly this many bytes."""
    frame = json.dumps({**CHAT, "pad": ""}).encode()
    return frame[:-2] + b"p" * (length - len(frame)) + frame[-2:]


def test_a_client_that_expects_100_continue_gets_it_and_then_its_answer(stage: Stage) -> None:
    data = sized(2 << 20)
    head = f"POST {PATH} HTTP/1.1\nHost: x\nExpect: 100-continue\nContent-Length: {len(data)}\n"
    sock = raw(stage, head)
    assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    sock.sendall(data)
    assert Reply(sock).body() == BODY
    assert stage.peers["a"].lines[-1].body[-1000:].count(b"p") > 800
    assert b"expect" not in stage.peers["a"].lines[-1].head.lower()


def test_the_edges_of_max_body(stage: Stage) -> None:
    limit = 8 << 20
    head = f"POST {PATH} HTTP/1.1\nHost: x\nContent-Length: %d\n"
    sock = raw(stage, head % limit, sized(limit))
    assert Reply(sock).body() == BODY
    before = stage.connections()
    for expect in ("", "Expect: 100-continue\n"):
        reply = Reply(raw(stage, head % (limit + 1) + expect))
        assert reply.status == 413
        assert json.loads(reply.body())["error"]["type"] == "invalid_request_error"
    assert stage.connections() == before


def test_a_chunked_request_goes_upstream_with_a_length_and_is_bounded_as_well(stage: Stage) -> None:
    data = sized(1 << 20)
    head = f"POST {PATH} HTTP/1.1\nHost: x\nTransfer-Encoding: chunked\n"
    pieces = [data[at : at + 70_000] for at in range(0, len(data), 70_000)]
    sock = raw(stage, head, *[b"%x;e=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces], b"0\r\nT: x\r\n\r\n")
    assert Reply(sock).body() == BODY
    line = stage.peers["a"].lines[-1]
    assert b"transfer-encoding" not in line.head.lower()
    # the injected stream_options are all that was added
    assert json.loads(line.body) == {**json.loads(data), "stream_options": {"include_usage": True}}
    sock = raw(stage, head)
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    try:
        for _ in range(9):
            sock.sendall(chunk)
    except OSError:
        pass  # refused before it was all sent
    assert Reply(sock).status == 413
