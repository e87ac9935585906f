"""Waiters of a live pool: their order, their deadlines, their cancellation, failed dials, shutdown."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.connection import State


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


def counts(upstreams: Any) -> tuple[int, int, int, int]:
    stats = upstreams.stats()["up"]
    return stats["idle"], stats["busy"], stats["connecting"], stats["waiting"]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_waiters_are_served_in_their_order(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 1})
        origin, served = upstreams.origins["up"], []
        held = await upstreams.acquire(origin, timeout_s=5.0)

        async def wait(index: int) -> None:
            conn = await upstreams.acquire(origin, timeout_s=5.0)
            served.append(index)
            conn.release(True)

        waiting = [asyncio.create_task(wait(index)) for index in range(4)]
        await world.until(lambda: counts(upstreams)[3] == 4)
        held.release(True)
        await asyncio.gather(*waiting)
        assert served == [0, 1, 2, 3]
        assert upstreams.stats()["up"]["connects"] == 1

    in_loop(scene)


def test_a_full_queue_refuses_and_a_late_waiter_is_told_so(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 1})
        origin = upstreams.origins["up"]
        held = await upstreams.acquire(origin, timeout_s=5.0)
        waiting = [asyncio.create_task(upstreams.acquire(origin, timeout_s=0.05)) for _ in range(4)]
        await world.until(lambda: counts(upstreams)[3] == 4)
        with pytest.raises(UpstreamError) as full:
            await upstreams.acquire(origin, timeout_s=5.0)
        assert (full.value.kind, full.value.sent) == (UpstreamErrorKind.POOL_FULL, False)
        late = await asyncio.gather(*waiting, return_exceptions=True)
        assert [error.kind for error in late] == [UpstreamErrorKind.POOL_TIMEOUT] * 4
        assert counts(upstreams) == (0, 1, 0, 0)
        held.release(True)
        assert counts(upstreams) == (1, 0, 0, 0)

    in_loop(scene)


def test_a_dial_of_a_cancelled_waiter_ends_in_the_pool(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        origin = upstreams.origins["up"]
        asking = asyncio.create_task(upstreams.acquire(origin, timeout_s=5.0))
        await asyncio.sleep(0)
        assert counts(upstreams) == (0, 0, 1, 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await world.until(lambda: counts(upstreams) == (1, 0, 0, 0))
        conn = await upstreams.acquire(origin, timeout_s=5.0)
        assert (conn.uses, conn.reused) == (1, True)
        conn.release(True)

    in_loop(scene)


def test_a_waiter_cancelled_in_the_turn_it_is_served_gives_the_connection_back(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 1})
        origin = upstreams.origins["up"]
        for release_first in (True, False):
            held = await upstreams.acquire(origin, timeout_s=5.0)
            asking = asyncio.create_task(upstreams.acquire(origin, timeout_s=5.0))
            await world.until(lambda: counts(upstreams)[3] == 1)
            if release_first:
                held.release(True)
                asking.cancel()
            else:
                asking.cancel()
                held.release(True)
            with pytest.raises(asyncio.CancelledError):
                await asking
            await world.until(lambda: counts(upstreams) == (1, 0, 0, 0))
        assert upstreams.stats()["up"]["connects"] == 1

    in_loop(scene)


def test_storms_of_cancelled_waiters_leak_nothing(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        chance = random.Random(7)
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 8, "max_idle": 8})
        origin = upstreams.origins["up"]
        before = open_files()

        async def client() -> None:
            conn = await upstreams.acquire(origin, timeout_s=chance.choice((0.001, 5.0)), fresh=chance.random() < 0.2)
            try:
                await asyncio.sleep(0)
            finally:
                conn.release(chance.random() < 0.8)

        for _ in range(60):
            storm = [asyncio.create_task(client()) for _ in range(30)]
            for task in storm:
                if chance.random() < 0.6:
                    world.loop.call_later(chance.random() * 0.004, task.cancel)
            outcomes = await asyncio.gather(*storm, return_exceptions=True)
            for outcome in outcomes:
                assert outcome is None or isinstance(outcome, UpstreamError | asyncio.CancelledError)
            assert sum(counts(upstreams)[:3]) <= 8
        await world.until(lambda: counts(upstreams)[1:] == (0, 0, 0))
        await upstreams.close()
        await world.until(lambda: open_files() <= before)
        assert counts(upstreams) == (0, 0, 0, 0)

    in_loop(scene)


def test_every_waiter_of_a_refused_port_hears_of_it(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            upstreams = world.upstreams({"url": f"http://127.0.0.1:{sock.getsockname()[1]}", "max_connections": 2})
            origin = upstreams.origins["up"]
            asking = [upstreams.acquire(origin, timeout_s=5.0) for _ in range(8)]
            outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert [outcome.kind for outcome in outcomes] == [UpstreamErrorKind.REFUSED] * 8
        assert counts(upstreams) == (0, 0, 0, 0)

    in_loop(scene)


def test_a_dial_slower_than_its_waiter_is_a_connect_timeout(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        with pytest.raises(UpstreamError) as caught:
            await upstreams.acquire(upstreams.origins["up"], timeout_s=0.05)
        assert caught.value.kind is UpstreamErrorKind.CONNECT_TIMEOUT
        assert counts(upstreams) == (0, 0, 1, 0)
        await upstreams.close()
        assert counts(upstreams) == (0, 0, 0, 0)
        for each in (listener, *fillers):
            each.close()

    in_loop(scene)


def test_closing_refuses_waiters_and_closes_busy_connections_on_release(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 1})
        origin = upstreams.origins["up"]
        held = await upstreams.acquire(origin, timeout_s=5.0)
        asking = asyncio.create_task(upstreams.acquire(origin, timeout_s=5.0))
        await world.until(lambda: counts(upstreams)[3] == 1)
        await upstreams.close()
        with pytest.raises(UpstreamError, match="shutting down"):
            await asking
        await held.send(b"x", 5.0)
        assert await held.recv(10, 5.0) == b"x"
        held.release(True)
        assert held.state is State.CLOSED

    in_loop(scene)
