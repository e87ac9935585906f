"""Upstreams that answer oddly, refuse early, or not at all; and what may be asked a second time.

One daemon: `odd` stands alone behind every model name; pairs `NAME-a`, `NAME-b` (each test its own, so that no breaker
remembers another test) stand behind the model NAME. Rows are found by the user, of which each request has its own.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    Daemon,
    Reply,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    request_bytes,
    upstream_text,
    wait_for,
)  # fmt: skip
from tests.daemon.peer import Line, Peer

PAIRS = ("over502", "over503", "over504", "over529", "passed", "breaker", "silent", "stale", "budget", "dead")
TIMES = """max_connections = 64
max_idle = 16
connect_timeout = "2s"
first_byte_timeout = "3s"
idle_timeout = "700ms"
total_timeout = "20s"
"""
PATH = "/v1/chat/completions"
SSE = b"Content-Type: text/event-stream\r\n"
BODY = chat_chunk("hello") + FINISH + DONE
GOOD = b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def whole(status: int, document: Any, more: bytes = b"") -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (
        status,
        more,
        len(body),
        body,
    )


class Stage:
    """The daemon, and two upstreams that do what `a` and `b` say."""

    def __init__(self, folder: Path) -> None:
        self.users = itertools.count(100)
        self.a: Callable[[Line], object] = self.well
        self.b: Callable[[Line], object] = self.well
        self.peers = {"a": Peer(lambda line: self.a(line)), "b": Peer(lambda line: self.b(line))}
        gone = free_port()
        text = upstream_text(self.peers["a"].url + "/v1", name="odd", more=TIMES)
        for pair in PAIRS:
            first = f"http://127.0.0.1:{gone}" if pair == "dead" else self.peers["a"].url
            text += upstream_text(first + "/v1", name=f"{pair}-a", more=TIMES)
            text += upstream_text(self.peers["b"].url + "/v1", name=f"{pair}-b", more=TIMES)
            text += model_text(pair, 10 + PAIRS.index(pair), json.dumps([f"{pair}-a", f"{pair}-b"]))
        text += upstream_text(f"http://127.0.0.1:{gone}/v1", name="gone", more=TIMES)
        text += model_text("main", 3, '["gone"]', 'fallback = "spare"')
        text += upstream_text(self.peers["b"].url + "/v1", name="busy", more=TIMES)
        text += model_text("busy", 5, '["busy"]', 'fallback = "spare"')
        text += model_text("spare", 4, '["odd"]', 'upstream_model = "spare-1"')
        text += upstream_text(self.peers["a"].url, name="claude", dialect="anthropic", more=TIMES)
        text += model_text("claude", 2, '["claude"]') + model_text("*", 1, '["odd"]')
        port = free_port()
        self.daemon = Daemon(folder, config_text(folder, port, text))
        self.daemon.port = port

    def well(self, line: Line) -> None:
        while line.read_request():
            line.send(GOOD)

    def begin(
        self, body: Any = CHAT, path: str = PATH, user: int | None = None, **headers: str
    ) -> tuple[socket.socket, int]:
        user = user or next(self.users)
        sock = self.daemon.connect()
        sock.settimeout(15)
        sock.sendall(request_bytes(path, body, self.daemon.token(user), **headers))
        return sock, user

    def ask(self, body: Any = CHAT, path: str = PATH, **headers: str) -> tuple[Reply, bytes, dict[str, Any]]:
        """(reply, body, row) of one request."""
        sock, user = self.begin(body, path, **headers)
        reply = Reply(sock)
        return reply, reply.body(), self.row(user)

    def hang_up(self) -> None:
        """Ends every upstream connection: the next ones run what `a` and `b` say then."""
        for peer in self.peers.values():
            for line in peer.lines:
                line.end()
        wait_for(lambda: self.daemon.metric("proxyd_upstream_connections") == 0)

    def row(self, user: int) -> dict[str, Any]:
        wait_for(lambda: [row for row in self.daemon.rows() if row["user_id"] == user])
        (row,) = [row for row in self.daemon.rows() if row["user_id"] == user]
        return row

    def connections(self, name: str = "a") -> int:
        return len(self.peers[name].lines)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("answers"))
    try:
        stage.daemon.start()
        yield stage
        stage.daemon.close_clients()
        assert stage.daemon.stop() == 0
        assert "Traceback" not in stage.daemon.log()
    finally:
        for peer in stage.peers.values():
            peer.close()
        stage.daemon.close_clients()
        stage.daemon.kill()


@pytest.fixture
def stage(running: Stage) -> Iterator[Stage]:
    """With nothing in the pools, and at rest again after the test."""
    yield running
    running.a = running.b = running.well
    running.daemon.close_clients()
    running.hang_up()
    wait_for(lambda: running.daemon.metric("proxyd_streams_active") == 0)


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
    assert stage.connections() - before <= 4
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


# -- a second upstream -------------------------------------------------------------------------------------------------


def answering(answer: bytes, into: list[bytes] | None = None) -> Callable[[Line], None]:
    def script(line: Line) -> None:
        while line.read_request():
            if into is not None:
                into.append(line.body)
            line.send(answer)

    return script


@pytest.mark.parametrize("status", [502, 503, 504, 529])
def test_an_upstream_that_cannot_is_followed_by_the_next_one_once(status: int, stage: Stage) -> None:
    model = f"over{status}"
    stage.a = answering(whole(status, {"error": {"message": "busy"}}))
    reply, body, row = stage.ask({**CHAT, "model": model})
    assert (reply.status, body) == (200, BODY)
    assert (row["upstream"], row["attempts"], row["status"]) == (f"{model}-b", 2, "completed")
    stage.b = answering(whole(503, {"error": {"message": "busy too"}}))
    stage.hang_up()
    reply, body, row = stage.ask({**CHAT, "model": model})
    assert (reply.status, json.loads(body)) == (503, {"error": {"message": "busy too"}})
    assert (row["upstream"], row["attempts"], row["prompt_tokens"]) == (f"{model}-b", 2, 0)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_other_refusals_are_the_clients_and_nobody_else_is_asked(status: int, stage: Stage) -> None:
    stage.a = answering(whole(status, {"error": {"message": "no"}}))
    before = stage.connections("b")
    reply, body, row = stage.ask({**CHAT, "model": "passed"})
    assert (reply.status, json.loads(body)) == (status, {"error": {"message": "no"}})
    assert (row["upstream"], row["attempts"], row["status"]) == ("passed-a", 1, "upstream_error")
    assert stage.connections("b") == before


def test_five_failures_in_a_row_open_the_breaker_and_the_others_are_asked_first(stage: Stage) -> None:
    asked: list[bytes] = []
    stage.a = answering(whole(503, {"error": {"message": "busy"}}), asked)
    for _ in range(7):
        assert stage.ask({**CHAT, "model": "breaker"})[1] == BODY
    assert len(asked) == 5
    assert stage.daemon.metric("proxyd_breaker_state", upstream="breaker-a") == 2
    assert stage.daemon.metric("proxyd_breaker_state", upstream="breaker-b") == 0
    assert stage.ask({**CHAT, "model": "breaker"})[2]["attempts"] == 1


@pytest.mark.parametrize("end", ["closes", "resets"])
def test_a_request_that_was_sent_on_a_fresh_connection_is_never_sent_again(end: str, stage: Stage) -> None:
    asked: list[bytes] = []

    def script(line: Line) -> None:
        line.read_request()
        asked.append(line.body)
        if end == "resets":
            line.reset()

    stage.a = script
    before = stage.connections("b")
    reply, body, row = stage.ask({**CHAT, "model": "silent"})
    assert (reply.status, json.loads(body)["error"]["code"]) == (502, "upstream_reset")
    assert (len(asked), stage.connections("b") - before) == (1, 0)
    assert (row["attempts"], row["status"], row["estimated"]) == (1, "upstream_error", 1)
    assert row["prompt_tokens"] > 0  # it may have been billed


def test_a_stale_connection_is_replaced_once_and_then_it_is_over(stage: Stage) -> None:
    asked: list[int] = []

    def script(line: Line) -> None:
        while line.read_request():
            asked.append(line.number)
            if len(asked) > 1:
                return
            line.send(GOOD)

    stage.a = script
    before = stage.connections("b")
    assert stage.ask({**CHAT, "model": "stale"})[1] == BODY
    reply, _, row = stage.ask({**CHAT, "model": "stale"})
    assert (reply.status, row["attempts"]) == (502, 2)
    assert len(asked) == 3  # the answer; the stale connection; the fresh one
    assert asked[0] == asked[1] != asked[2]
    assert stage.connections("b") == before


def test_retries_are_at_most_three_of_ten_at_once(stage: Stage) -> None:
    together, release = threading.Barrier(10), threading.Event()
    asked: list[bytes] = []

    def busy(line: Line) -> None:
        line.read_request()
        together.wait(10)
        line.send(whole(503, {"error": {"message": "busy"}}))

    def slow(line: Line) -> None:
        line.read_request()
        asked.append(line.body)
        release.wait(10)
        line.send(GOOD)

    stage.a, stage.b = busy, slow
    begun = [stage.begin({**CHAT, "model": "budget"}) for _ in range(10)]
    wait_for(lambda: len([row for row in stage.daemon.rows() if row["user_id"] in {user for _, user in begun}]) == 7)
    wait_for(lambda: len(asked) == 3)
    release.set()
    assert sorted(Reply(sock).status for sock, _ in begun) == [200] * 3 + [503] * 7
    assert sorted(stage.row(user)["attempts"] for _, user in begun) == [1] * 7 + [2] * 3


def test_an_upstream_that_cannot_be_reached_costs_no_retry_and_a_fallback_model_answers(stage: Stage) -> None:
    _, body, row = stage.ask({**CHAT, "model": "dead"})
    assert (body, row["upstream"], row["attempts"]) == (BODY, "dead-b", 2)
    asked: list[bytes] = []
    stage.a = answering(GOOD, asked)
    assert stage.daemon.metric("proxyd_upstream_errors_total", upstream="dead-a", kind="refused") == 1
    _, body, row = stage.ask({**CHAT, "model": "main"})
    assert (body, row["upstream"], row["model_id"]) == (BODY, "odd", 4)
    assert json.loads(asked[0])["model"] == "spare-1"
    stage.b = answering(whole(503, {"error": {"message": "busy"}}))
    _, body, row = stage.ask({**CHAT, "model": "busy"})
    assert (body, row["upstream"], row["model_id"], row["attempts"]) == (BODY, "odd", 4, 2)


# -- questions the contract leaves to us -------------------------------------------------------------------------------

ANTHROPIC = [
    {"type": "message_start", "message": {"model": "c", "usage": {"input_tokens": 9, "output_tokens": 1}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
    {"type": "message_stop"},
]
COMPLETED = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2}}}


def named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


LEAVING = {
    "chat, after [DONE]": (PATH, CHAT, [chat_chunk("a"), FINISH, DONE], DONE, "completed"),
    "chat, before [DONE]": (PATH, CHAT, [chat_chunk("a"), FINISH], b'"stop"', "client_aborted"),
    "responses": ("/v1/responses", {"model": "m", "stream": True, "input": "x"}, [named(COMPLETED)], b"completed",
                  "completed"),
    "messages": ("/v1/messages", {**CHAT, "model": "claude"}, [named(event) for event in ANTHROPIC], b"message_stop",
                 "completed"),
    "messages, before the end": ("/v1/messages", {**CHAT, "model": "claude"},
                                 [named(event) for event in ANTHROPIC[:3]], b"message_delta", "client_aborted"),
    "the site's route": ("/api/v1/stream", {"prompt": "x", "model": "m"}, [chat_chunk("a"), FINISH, DONE],
                         b"event: done", "completed"),
}  # fmt: skip


@pytest.mark.parametrize("label", LEAVING)
def test_a_client_that_leaves_after_the_terminal_event_had_all_of_it(label: str, stage: Stage) -> None:
    path, body, pieces, last, status = LEAVING[label]

    def script(line: Line) -> None:
        line.read_request()
        line.send(b"HTTP/1.1 200 OK\r\n" + SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            line.chunk(piece)
        line.wait_end(10)

    stage.a = script
    sock, user = stage.begin(body, path)
    reply = Reply(sock)
    got = b""
    for piece in reply.pieces():
        got += piece
        if last in got:
            break
    sock.close()
    assert stage.row(user)["status"] == status
    line = stage.peers["a"].lines[-1]
    assert line.gone.wait(5)


@pytest.mark.parametrize("status", [201, 202, 204, 206, 299])
def test_the_sites_route_takes_nothing_but_200_for_an_answer(status: int, stage: Stage) -> None:
    def script(line: Line) -> None:
        while line.read_request():
            if status == 204:
                line.send(b"HTTP/1.1 204 X\r\n\r\n")
            else:
                line.send(GOOD.replace(b"200 OK", b"%d X" % status))

    stage.a = script
    reply, body, row = stage.ask({"prompt": "x", "model": "m"}, "/api/v1/stream")
    assert (reply.status, reply.header("content-type")) == (502, "application/json")
    assert json.loads(body)["error"]["message"]
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == ("upstream_error", 0, 0)
    # a native route passes it on as it is, and reads no events out of it (WHATWG HTML 9.2.2)
    sock, user = stage.begin()
    reply, row = Reply(sock), stage.row(user)
    assert (reply.status, b"" if status == 204 else reply.body()) == (status, b"" if status == 204 else BODY)
    assert (row["status"], row["completion_tokens"], row["estimated"]) == ("completed", 0, 1)


def test_request_ids_are_the_trusted_proxys_or_ours_and_the_upstreams_own_is_shown_beside(stage: Stage) -> None:
    given = {"trace-1": "trace-1", "a" * 64: "a" * 64, "b" * 65: None, "two words": None, "x;y": None, "": None}
    for value, wanted in given.items():
        reply, _, row = stage.ask(X_Request_Id=value)
        ours = reply.header("x-proxyd-request-id")
        assert ours == row["request_id"] == reply.header("x-request-id")
        assert ours == wanted or (wanted is None and ours != value and len(str(ours)) == 32)
        assert f"x-request-id: {ours}".encode() in stage.peers["a"].lines[-1].head.lower()
    stage.a = answering(GOOD.replace(SSE, SSE + b"X-Request-Id: req_theirs\r\nX-Proxyd-Request-Id: lie\r\n"))
    stage.hang_up()
    reply, _, row = stage.ask(X_Request_Id="trace-2")
    assert reply.header("x-request-id") == "req_theirs"
    assert reply.header("x-proxyd-request-id") == row["request_id"] == "trace-2"
    assert [name for name, _ in reply.headers].count("x-proxyd-request-id") == 1
