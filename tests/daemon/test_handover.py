"""Idle connections that change hands: two doors on loopback, one retires, the other takes what it gives away.

One process stands for two workers, so that each phase of a request can be held while the order comes.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from proxyd.front.connection import ClientConnection
from proxyd.front.door import FrontSettings
from proxyd.front.request import Request
from proxyd.front.states import State
from proxyd.host.passage import Passage
from proxyd.worker import handover as handover_module
from proxyd.worker.handover import Arrivals, HandOver
from tests.daemon.front_house import SETTINGS, Client, House, house, on_uvloop

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"


class Way:
    """The passage, with room for as many as a test says."""

    def __init__(self) -> None:
        self._passage = Passage.create()
        self.room = 1000

    @property
    def take_fd(self) -> int:
        return self._passage.take_fd

    @property
    def is_empty(self) -> bool:
        return not select.select([self.take_fd], [], [], 0)[0]

    def give(self, sock: socket.socket) -> bool:
        if self.room <= 0 or not self._passage.give(sock):
            return False
        self.room -= 1
        return True

    def take(self) -> socket.socket | None:
        found = self._passage.take()
        self.room += found is not None
        return found

    def close(self) -> None:
        self._passage.close()


class Pair:
    """The house that retires, the one that follows, and the way between them."""

    def __init__(self, old: House, new: House) -> None:
        self.old, self.new = old, new
        self.way = Way()
        self.hand_over = HandOver(old.loop, old.door, self.way, old.log)
        self.arrivals = Arrivals(new.loop, new.door, self.way)

    def retire(self) -> None:
        self.old.acceptor.pause()
        self.hand_over.begin()

    async def moved(self, count: int = 1) -> None:
        await self.new.until(lambda: len(self.new.door.connections) == count)


def by(name: bytes):  # type: ignore[no-untyped-def]
    def serve(conn: ClientConnection, request: Request) -> None:
        conn.reply(200, [], name + b":" + request.body)

    return serve


@asynccontextmanager
async def pair(  # type: ignore[no-untyped-def]
    old=by(b"old"), settings: FrontSettings = SETTINGS  # noqa: B008
) -> AsyncIterator[Pair]:
    async with house(old, settings) as first, house(by(b"new"), settings) as second:
        both = Pair(first, second)
        both.arrivals.resume()
        try:
            yield both
        finally:
            both.hand_over.stop()
            both.arrivals.pause()
            both.way.close()


async def ask(client: Client, body: bytes = b"hi") -> tuple[int, str, bytes]:
    client.send(POST + body)
    status, headers, answer = await client.answer()
    return status, headers.get("connection", "keep-alive"), answer


@on_uvloop
async def test_an_idle_connection_is_answered_by_the_next_generation() -> None:
    async with pair() as both:
        client = await both.old.connect()
        assert await ask(client) == (200, "keep-alive", b"old:hi")
        both.retire()
        await both.moved()
        assert not both.old.door.connections
        assert both.hand_over.count == 1
        for _ in range(3):
            assert await ask(client) == (200, "keep-alive", b"new:hi")


@on_uvloop
async def test_a_connection_that_never_sent_a_byte_goes_over_too() -> None:
    async with pair() as both:
        client = await both.old.connect()
        await both.old.connection()
        both.retire()
        await both.moved()
        assert await ask(client) == (200, "keep-alive", b"new:hi")


@on_uvloop
async def test_without_keep_alive_a_connection_that_never_sent_a_byte_has_its_request() -> None:
    async with pair(settings=replace(SETTINGS, keepalive=0)) as both:
        client = await both.old.connect()
        await both.old.connection()
        both.retire()
        await both.moved()
        await both.new.advance(5.0)
        assert await ask(client) == (200, "close", b"new:hi")


@on_uvloop
async def test_one_that_was_taken_over_has_the_time_of_a_kept_one() -> None:
    async with pair() as both:
        client = await both.old.connect()
        await ask(client)
        both.retire()
        await both.moved()
        await both.new.advance(60.0)  # head_timeout is 10, keepalive 75
        assert await ask(client) == (200, "keep-alive", b"new:hi")
        client.send(POST[:10])
        await both.new.until(lambda: both.new.door.count(State.HEAD) == 1)
        await both.new.advance(11.0)
        assert (await client.answer())[0] == 408, "its next head has head_timeout"


@on_uvloop
async def test_a_request_half_here_is_answered_here_and_is_the_last() -> None:
    for cut in (5, len(POST) - 1, len(POST), len(POST) + 1):
        async with pair() as both:
            client = await both.old.connect()
            await ask(client)
            data = POST + b"hi"
            client.send(data[:cut])
            await both.old.until(lambda both=both: both.old.door.count(State.IDLE) == 0)
            both.retire()
            client.send(data[cut:])
            status, headers, body = await client.answer()
            assert (status, headers["connection"], body) == (200, "close", b"old:hi")
            assert await client.rest() == b""
            assert both.hand_over.count == 0


@on_uvloop
async def test_an_answer_that_is_awaited_says_close_and_one_that_had_announced_to_stay_goes_over() -> None:
    held: list[tuple[ClientConnection, bool]] = []

    def hold(conn: ClientConnection, request: Request) -> None:
        held.append((conn, conn.may_keep_alive))

    async with pair(hold) as both:
        waiting, streaming = await both.old.connect(), await both.old.connect()
        waiting.send(POST + b"hi")
        streaming.send(POST + b"hi")
        await both.old.until(lambda: len(held) == 2)
        first, second = sorted(held, key=lambda one: one[0].sock.getpeername() != name_of(waiting))  # type: ignore
        assert second[1]
        second[0].begin_stream()
        both.retire()
        first[0].reply(200, [], b"late")
        status, headers, _ = await waiting.answer()
        assert (status, headers["connection"]) == (200, "close")
        assert await waiting.rest() == b""
        assert second[0].sock is not None
        second[0].sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nend")
        second[0].end_stream(True)
        assert (await streaming.answer())[2] == b"end"
        await both.moved()
        assert await ask(streaming) == (200, "keep-alive", b"new:hi")


def name_of(client: Client) -> object:
    return client.writer.get_extra_info("sockname")


@on_uvloop
async def test_pipelined_requests_are_answered_here_all_of_them() -> None:
    async with pair() as both:
        client = await both.old.connect()
        await ask(client)
        both.old.door.retire(lambda conn: None)  # the order came while the bytes were on their way
        client.send((POST + b"aa") + (POST + b"bb") + (POST + b"cc"))
        answers = [await client.answer() for _ in range(3)]
        assert [body for _, _, body in answers] == [b"old:aa", b"old:bb", b"old:cc"]
        assert [headers.get("connection") for _, headers, _ in answers] == [None, None, "close"]
        assert await client.rest() == b""


@on_uvloop
async def test_a_large_answer_that_is_taken_slowly_is_written_whole() -> None:
    body = b"x" * 8_000_000

    def large(conn: ClientConnection, request: Request) -> None:
        conn.reply(200, [], body)

    async with pair(large) as both:
        client = await both.old.connect(receive_buffer=4096)
        client.send(POST + b"hi")
        await both.old.until(lambda: both.old.door.count(State.REPLYING) == 1)
        both.retire()
        _, headers, got = await client.answer()
        assert got == body
        assert "connection" not in headers
        await both.moved()
        assert await ask(client) == (200, "keep-alive", b"new:hi")


@on_uvloop
async def test_a_connection_that_the_web_application_has_comes_back_and_goes_over() -> None:
    async with pair() as both:
        client = await both.old.connect()
        orders: list[None] = []

        def order() -> None:
            orders.append(None)
            both.retire()

        both.old.on_readyz = order
        client.send(b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")
        status, headers, _ = await client.answer()
        assert (status, "connection" in headers, len(orders)) == (503, False, 1)
        await both.moved()
        assert await ask(client) == (200, "keep-alive", b"new:hi")


@on_uvloop
async def test_a_request_sent_at_the_very_moment_has_its_answer() -> None:
    """Whoever reads it: the bytes are in the socket, and one of both has the socket."""
    seen = set()
    for number in range(300):
        async with pair() as both:
            client = await both.old.connect()
            await ask(client)
            fd = client.writer.get_extra_info("socket").fileno()
            if number % 3 == 0:
                os.write(fd, POST + b"hi")
                both.retire()
            elif number % 3 == 1:
                both.retire()
                os.write(fd, POST + b"hi")
            else:
                both.old.loop.call_soon(os.write, fd, POST + b"hi")
                both.old.loop.call_soon(both.retire)
            status, headers, body = await client.answer()
            assert status == 200
            seen.add(body)
            if body == b"old:hi":
                assert headers["connection"] == "close"
    assert b"new:hi" in seen


@on_uvloop
async def test_a_full_passage_is_tried_again_until_all_are_over() -> None:
    async with pair() as both:
        both.arrivals.pause()
        clients = [await both.old.connect() for _ in range(40)]
        await both.old.until(lambda: len(both.old.door.connections) == 40)
        both.way.room = 8
        both.retire()
        await both.old.until(lambda: both.hand_over.count == 8)
        await asyncio.sleep(0.05)
        assert len(both.old.door.connections) == 32
        both.arrivals.resume()
        await both.moved(40)
        for client in clients:
            assert await ask(client) == (200, "keep-alive", b"new:hi")


@on_uvloop
async def test_what_cannot_be_given_is_served_here_and_told_of(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(handover_module, "STUCK_S", 0.05)
    told: list[str] = []
    async with pair() as both:
        monkeypatch.setattr(both.old.log, "warning", lambda event, **fields: told.append(event))
        both.way.room = 0
        client = await both.old.connect()
        await ask(client)
        both.retire()
        await both.old.until(lambda: told == ["handover_stuck"])
        assert await ask(client) == (200, "close", b"old:hi")
        assert await client.rest() == b""


@on_uvloop
async def test_a_client_that_left_on_the_way_is_no_connection() -> None:
    async with pair() as both:
        both.arrivals.pause()
        client = await both.old.connect()
        await both.old.connection()
        both.retire()
        await both.old.until(lambda: not both.old.door.connections)
        client.reset()
        await asyncio.sleep(0.01)
        both.arrivals.resume()
        await both.new.until(lambda: both.way.is_empty)
        await asyncio.sleep(0.01)
        assert not both.new.door.connections


@on_uvloop
async def test_a_unix_client_stays_one() -> None:
    async with pair() as both:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        both.old.door.accept(ours, "")
        both.retire()
        await both.moved()
        assert next(iter(both.new.door.connections)).peer == "unix"
        theirs.close()


@on_uvloop
async def test_a_worker_that_ends_takes_what_lies_in_the_passage() -> None:
    async with pair() as both:
        both.arrivals.pause()
        client = await both.old.connect()
        await both.old.connection()
        both.retire()
        await both.old.until(lambda: both.hand_over.count == 1)
        both.arrivals.take_rest()
        assert len(both.new.door.connections) == 1
        assert await ask(client) == (200, "keep-alive", b"new:hi")
