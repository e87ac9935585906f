"""The front under clients that are slow, greedy, confused or gone, through real sockets.

It is long because each way in which a client can misbehave is a case of its own at the same front.
"""

from __future__ import annotations

import errno
import os
import random
import socket

import pytest

from proxyd.errors import Refusal
from proxyd.front.channel import LINGER_IDLE_S
from proxyd.front.connection import ClientConnection
from proxyd.front.request import Request
from proxyd.front.states import State
from proxyd.wire.head import find_head_end
from tests.daemon.front_house import SETTINGS, house, on_uvloop
from tests.unit.wire.test_hostile_heads import REJECTED

GET_HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
HEALTHY = b'{"status":"ok"}'


def post(body: bytes, path: str = "/v1/messages", headers: bytes = b"") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (path.encode(), headers, len(body), body)


# Whole heads; the few others of the table are more or less than one head.
HOSTILE = [pytest.param(s, d, id=name) for name, s, d in REJECTED if len(d) < 4000 and find_head_end(d) == len(d)]


class Held:
    """A relay that answers when the test says so."""

    def __init__(self) -> None:
        self.served: list[tuple[ClientConnection, Request]] = []
        self.gone = 0

    def __call__(self, conn: ClientConnection, request: Request) -> None:
        self.served.append((conn, request))
        conn.on_gone = self._on_gone

    def _on_gone(self) -> None:
        self.gone += 1


# --- hand over and take back ------------------------------------------------------------------------------------------


@on_uvloop
async def test_relay_and_web_requests_alternate_on_one_connection() -> None:
    async with house() as home:
        client = await home.connect()
        for number in range(100):
            client.send(post(b"%d" % number) if number % 2 else GET_HEALTH)
            status, headers, body = await client.answer()
            assert status == 200
            assert body == (b"%d" % number if number % 2 else HEALTHY)
            assert headers["x-proxyd-request-id"] == headers["x-request-id"]
            assert "server" not in headers
        assert len(home.door.connections) == 1


@on_uvloop
async def test_fifty_pairs_pipelined_in_one_write_are_answered_in_order() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"".join(GET_HEALTH + post(b"%d" % number) for number in range(50)))
        for number in range(50):
            assert (await client.answer())[2] == HEALTHY
            assert (await client.answer())[2] == b"%d" % number


@on_uvloop
async def test_a_web_request_with_a_body_comes_back_too_and_the_body_is_not_the_next_request() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(post(GET_HEALTH * 3, "/healthz") + post(b"next"))
        status, headers, _ = await client.answer()
        assert (status, headers["allow"]) == (405, "GET, HEAD")
        assert (await client.answer())[2] == b"next"


@pytest.mark.parametrize("connection", [b"close", b"keep-alive"])
@on_uvloop
async def test_a_client_of_http_1_0_is_kept_only_if_it_asked(connection: bytes) -> None:
    async with house() as home:
        for first, expected in ((b"GET /healthz", HEALTHY), (b"POST /v1/messages", b"")):
            client = await home.connect()
            client.send(first + b" HTTP/1.0\r\nConnection: " + connection + b"\r\n\r\n")
            _, headers, body = await client.answer()
            assert body == expected
            if connection == b"close":
                assert await client.rest() == b""
            else:
                assert headers["connection"].lower() == "keep-alive"
                client.send(GET_HEALTH)
                assert (await client.answer())[2] == HEALTHY
            client.close()


@on_uvloop
async def test_web_answers_have_our_shapes() -> None:
    async with house() as home:
        client = await home.connect()
        for data, expected in [
            (b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 404),
            (b"GET /v1/messages/ HTTP/1.1\r\nHost: x\r\n\r\n", 404),
            (b"GET /v1%2Fmodels HTTP/1.1\r\nHost: x\r\n\r\n", 404),
            (b"GET /healthz?a=b HTTP/1.1\r\nHost: x\r\n\r\n", 200),
            (b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n", 503),
            (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405),
            (b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n", 405),
            (b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n", 204),
            (b"OPTIONS /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 204),
            (b"OPTIONS /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ]:
            client.send(data)
            status, headers, body = await client.answer()
            assert status == expected, data
            assert len(headers["x-proxyd-request-id"]) == 32
            if status in (404, 405):
                error = b'{"type":"error","error":' if b"/v1/messages" in data else b'{"error":{'
                assert body.startswith(error), body
            if status == 405:
                assert headers["allow"]
            if status == 503:
                assert headers["retry-after"] == "7"


@on_uvloop
async def test_head_has_the_headers_of_get_and_no_body() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"HEAD /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d" % len(HEALTHY) in head.lower()
        client.send(GET_HEALTH)
        assert (await client.answer())[2] == HEALTHY


@pytest.mark.parametrize(("host", "given"), [(b"127.0.0.1:3000", True), (b"localhost", True), (b"evil.example", False)])
@on_uvloop
async def test_the_demos_session_is_not_given_to_another_name(host: bytes, given: bool) -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        status, headers, body = await client.answer()
        assert status == 200
        assert b"<title>" in body
        assert ("set-cookie" in headers) is given


# --- framing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "data"), HOSTILE)
@on_uvloop
async def test_a_hostile_head_gets_one_refusal_and_nothing_behind_it_is_served(status: int, data: bytes) -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        client.send(data + post(b"smuggled"))
        answers = await client.rest()
        assert answers.startswith(b"HTTP/1.1 %d " % status)
        assert answers.count(b"x-proxyd-request-id: ") == 1
        assert b"connection: close" in answers
        assert not held.served


@on_uvloop
async def test_a_chunked_body_arrives_whole_at_every_cut() -> None:
    chunked = (
        b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nTrailer: t\r\n\r\n"
    )
    async with house() as home:
        client = await home.connect()
        for at in range(1, len(chunked)):
            conn = await home.connection()
            client.send(chunked[:at])
            await home.until(lambda at=at, conn=conn: conn._reader.pending or conn.state is not State.IDLE)
            client.send(chunked[at:])
            assert (await client.answer())[2] == b"hello world", at


@on_uvloop
async def test_a_request_is_served_byte_by_byte() -> None:
    async with house() as home:
        client = await home.connect()
        for byte in post(b"slow"):
            client.send(bytes((byte,)))
            await home.advance(0.001)
        assert (await client.answer())[2] == b"slow"


@on_uvloop
async def test_nothing_is_parsed_after_an_answer_that_closes() -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + post(b"second"))
        await home.until(lambda: len(held.served) == 1)
        held.served[0][0].reply(200, [], b"")
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.rest() == b""
        assert len(held.served) == 1


@on_uvloop
async def test_the_next_request_waits_until_the_answer_before_it_is_complete() -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        client.send(post(b"first") + post(b"second"))
        await home.until(lambda: len(held.served) == 1)
        conn = held.served[0][0]
        conn.begin_stream()
        for _ in range(5):
            await home.advance(1)
        assert len(held.served) == 1
        assert conn.sock is not None
        conn.sock.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        conn.end_stream(True)
        assert (await client.answer())[2] == b"ok"
        await home.until(lambda: len(held.served) == 2)
        assert held.served[1][1].body == b"second"


@on_uvloop
async def test_what_the_relay_read_while_streaming_is_the_next_request() -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        client.send(post(b"first"))
        await home.until(lambda: len(held.served) == 1)
        conn = held.served[0][0]
        conn.begin_stream()
        conn.end_stream(True, post(b"read by the relay"))
        await home.until(lambda: len(held.served) == 2)
        assert held.served[1][1].body == b"read by the relay"


# --- limits and Expect ------------------------------------------------------------------------------------------------


@on_uvloop
async def test_an_announced_large_body_is_413_and_a_client_that_goes_on_sending_reads_it() -> None:
    async with house() as home:
        client = await home.connect()
        size = 4 * 1024 * 1024
        client.send(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        client.send(b"a" * size)
        status, headers, body = await client.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert b'"request_too_large"' in body
        assert await client.rest() == b""
        await client.writer.drain()


@on_uvloop
async def test_a_chunked_large_body_is_413() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(20):
            client.send(b"1000\r\n" + b"a" * 0x1000 + b"\r\n")
        assert (await client.answer())[0] == 413
        assert await client.rest() == b""


@on_uvloop
async def test_a_large_head_is_431() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 10_000)
        assert (await client.answer())[0] == 431
        assert await client.rest() == b""


@on_uvloop
async def test_continue_is_said_when_asked_and_only_then() -> None:
    async with house() as home:
        client = await home.connect()
        head, body = post(b"hello", headers=b"Expect: 100-continue\r\n").split(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert (await client.answer())[2] == b"hello"
        client.send(head + b"\r\n\r\n" + body)
        assert (await client.answer())[0] == 200
        client.send(post(b"hello"))
        assert (await client.answer())[0] == 200


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n", 413),
        (b"PUT /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n", 405),
    ],
)
@on_uvloop
async def test_a_refused_body_is_not_asked_for(head: bytes, status: int) -> None:
    async with house() as home:
        client = await home.connect()
        client.send(head + b"Expect: 100-continue\r\n\r\n")
        assert (await client.answer())[0] == status
        assert await client.rest() == b""


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("started", [b"G", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"])
@on_uvloop
async def test_a_slow_head_is_408_however_steadily_it_drips(started: bytes) -> None:
    async with house() as home:
        client = await home.connect()
        conn = await home.connection()
        client.send(started)
        await home.until(lambda: conn.state is State.HEAD)
        for _ in range(8):
            await home.advance(1)
            client.send(b"a")
        assert conn.state is State.HEAD
        await home.advance(2.5)
        assert (await client.answer())[0] == 408
        assert await client.rest() == b""


@on_uvloop
async def test_a_client_that_says_nothing_is_closed_without_a_word() -> None:
    async with house() as home:
        client = await home.connect()
        await home.connection()
        await home.advance(SETTINGS.head_timeout + 0.5)
        assert await client.rest() == b""


@on_uvloop
async def test_an_idle_kept_connection_is_closed_without_a_word_and_not_before_its_time() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(post(b""))
        assert (await client.answer())[0] == 200
        conn = await home.connection()
        await home.advance(SETTINGS.keepalive - 1)
        assert conn.state is State.IDLE
        await home.advance(2)
        assert await client.rest() == b""


@on_uvloop
async def test_a_slow_body_is_408_whether_it_is_silent_or_drips() -> None:
    async with house() as home:
        for pause in (SETTINGS.body_timeout + 0.5, SETTINGS.body_timeout - 1):
            client = await home.connect()
            conn = await home.connection()
            client.send(b"POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            await home.until(lambda conn=conn: conn.state is State.BODY)
            drips = 0
            while conn.state is State.BODY:
                client.send(b"a")
                before = conn.deadline
                await home.until(lambda conn=conn, n=drips: len(conn._reader._body) > n or conn.state is not State.BODY)
                assert conn.deadline == before
                drips += 1
                await home.advance(pause)
            assert (drips == 1) is (pause > SETTINGS.body_timeout)
            assert drips <= 3
            assert (await client.answer())[0] == 408
            client.close()
            await home.until(lambda: not home.door.connections)


@on_uvloop
async def test_a_client_that_does_not_take_its_answer_is_reset() -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect(receive_buffer=4096)
        client.writer.transport.pause_reading()
        client.send(post(b""))
        await home.until(lambda: len(held.served) == 1)
        conn = held.served[0][0]
        conn.reply(200, [], b"a" * 32 * 1024 * 1024)
        assert conn.state is State.REPLYING
        await home.advance(SETTINGS.send_timeout + 0.5)
        assert conn.state is State.CLOSED
        assert not home.door.connections


@on_uvloop
async def test_a_refused_client_that_never_closes_is_closed() -> None:
    async with house() as home:
        client = await home.connect()
        client.send(b"\x16\x03\x01\x02\x00")
        assert (await client.answer())[0] == 400
        conn = await home.connection()
        assert conn.state is State.LINGERING
        await home.advance(LINGER_IDLE_S + 0.5)
        assert conn.state is State.CLOSED


# --- gone -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("state", [State.IDLE, State.HEAD, State.BODY, State.SERVING, State.REPLYING, State.LINGERING])
@on_uvloop
async def test_a_client_may_leave_in_any_state(state: State, how: str) -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        conn = await home.connection()
        if state is State.HEAD:
            client.send(b"GET / HT")
        elif state is State.BODY:
            client.send(post(b"hello")[:-2])
        elif state in (State.SERVING, State.REPLYING):
            client.send(post(b"hello"))
            await home.until(lambda: conn.state is State.SERVING)
            if state is State.REPLYING:
                client.writer.transport.pause_reading()
                conn.reply(200, [], b"a" * 64 * 1024 * 1024)
        elif state is State.LINGERING:
            client.send(b"\0")
        await home.until(lambda: conn.state is state)
        if how == "rst":
            client.reset()
        else:
            client.close()
        await home.until(lambda: not home.door.connections)
        assert conn.state is State.CLOSED
        assert len(home.wheel) == 0
        assert held.gone == (1 if state is State.SERVING else 0)
        conn.reply(200, [], b"to nobody")
        conn.end_stream(True)
        with pytest.raises(ConnectionResetError):
            conn.begin_stream()


@on_uvloop
async def test_a_client_that_leaves_during_a_web_request_is_forgotten() -> None:
    async with house() as home:
        for data in (GET_HEALTH, GET_HEALTH * 30, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            client = await home.connect()
            client.send(data)
            await home.until(lambda: len(home.door.connections) == 1)
            client.reset()
            await home.until(lambda: not home.door.connections)


@pytest.mark.parametrize("seed", range(6))
@on_uvloop
async def test_random_cuts_of_random_requests_leave_nothing_behind(seed: int) -> None:
    dice = random.Random(seed)
    async with house() as home:
        # The first stream of a loop makes libuv open a reserve descriptor of its own.
        (await home.connect()).close()
        await home.until(lambda: not home.door.connections)
        opened = len(os.listdir("/proc/self/fd"))
        for _ in range(40):
            client = await home.connect()
            data = b"".join(dice.choice((GET_HEALTH, post(b"x" * dice.randint(0, 3000)))) for _ in range(5))
            data = data[: dice.randint(1, len(data))]
            at = 0
            while at < len(data):
                size = dice.randint(1, 2000)
                client.send(data[at : at + size])
                at += size
                await home.advance(0.001)
            if dice.random() < 0.5:
                client.reset()
            else:
                client.close()
        await home.until(lambda: not home.door.connections)
        assert len(home.wheel) == 0
        await home.until(lambda: len(os.listdir("/proc/self/fd")) <= opened)


# --- refusals, drain, descriptors -------------------------------------------------------------------------------------


@on_uvloop
async def test_a_handler_that_refuses_or_fails_answers_and_the_worker_goes_on() -> None:
    def serve(conn: ClientConnection, request: Request) -> None:
        if request.body == b"refuse":
            raise Refusal(429, "rate_limited", "Too many.", retry_after_s=3)
        raise KeyError("a bug")

    async with house(serve) as home:
        client = await home.connect()
        client.send(post(b"refuse", "/v1/chat/completions"))
        status, headers, body = await client.answer()
        assert (status, headers["retry-after"]) == (429, "3")
        assert b'"code":"rate_limited"' in body
        client.send(post(b"break"))
        assert (await client.answer())[0] == 500
        assert await client.rest() == b""
        assert [record.status for record in home.records] == [429, 500]


@on_uvloop
async def test_a_trusted_proxys_request_id_is_the_answers() -> None:
    held = Held()
    async with house(held) as home:
        client = await home.connect()
        client.send(post(b"", headers=b"X-Request-Id: from-nginx.1\r\nX-Forwarded-For: 203.0.113.9\r\n"))
        await home.until(lambda: len(held.served) == 1)
        conn, request = held.served[0]
        assert (request.request_id, request.peer, request.trusted) == ("from-nginx.1", "203.0.113.9", True)
        conn.reply(200, [(b"X-Request-Id", b"req_upstream")], b"")
        headers = (await client.answer())[1]
        assert (headers["x-proxyd-request-id"], headers["x-request-id"]) == ("from-nginx.1", "req_upstream")


@on_uvloop
async def test_draining_closes_idle_connections_and_lets_the_others_have_their_answer() -> None:
    held = Held()
    async with house(held) as home:
        idle, busy = await home.connect(), await home.connect()
        busy.send(post(b"x"))
        await home.until(lambda: len(held.served) == 1 and len(home.door.connections) == 2)
        home.acceptor.pause()
        home.door.drain()
        assert await idle.rest() == b""
        held.served[0][0].reply(200, [], b"late")
        _, headers, body = await busy.answer()
        assert (headers["connection"], body) == ("close", b"late")
        assert await busy.rest() == b""


@on_uvloop
async def test_a_web_request_that_is_answered_while_draining_is_its_connections_last() -> None:
    async with house() as home:
        client = await home.connect()
        home.on_readyz = home.door.drain
        client.send(b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await client.answer())[0] == 503
        assert await client.rest() == b""
        client.close()
        await home.until(lambda: not home.door.connections)


@on_uvloop
async def test_without_descriptors_a_client_is_told_and_accepting_goes_on_later() -> None:
    class Starved:
        """A listener that the kernel refuses once."""

        def __init__(self, real: socket.socket) -> None:
            self._real = real
            self.family = real.family
            self.refusals = 1

        def accept(self) -> tuple[socket.socket, object]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return self._real.accept()

    async with house() as home:
        starved = Starved(home.listener)
        home.acceptor.pause()
        first = await home.connect()
        home.acceptor._running = True
        home.acceptor._on_readable(starved)  # type: ignore[arg-type]
        status, headers, _ = await first.answer()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert len(headers["x-proxyd-request-id"]) == 32
        assert headers["x-request-id"] == headers["x-proxyd-request-id"]
        assert await first.rest() == b""
        second = await home.connect()
        second.send(GET_HEALTH)
        assert (await second.answer())[2] == HEALTHY
