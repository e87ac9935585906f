"""The pool alive on loopback: how many connections it opens, who gets them, what is left behind."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.errors import UpstreamErrorKind
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.upstream.connection import State
from proxyd.upstream.upstreams import Upstreams


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


def counts(upstreams: Any) -> tuple[int, int, int, int]:
    stats = upstreams.stats()["up"]
    return stats["idle"], stats["busy"], stats["connecting"], stats["waiting"]


def test_ten_thousand_requests_in_a_row_open_one_connection(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        origin = upstreams.origins["up"]
        for index in range(10_000):
            conn = await upstreams.acquire(origin, timeout_s=5.0)
            if index % 100 == 0:  # an exchange now and then; the rest is the pool alone
                await conn.send(b"x", 5.0)
                assert await conn.recv(10, 5.0) == b"x"
            conn.release(True)
        read = world.metrics.read
        assert read("proxyd_upstream_connects_total", upstream="up") == world.peers.accepted == 1
        assert read("_upstream_acquires", upstream="up") == 10_000
        assert read("_upstream_reuses", upstream="up") == 9_999
        assert read("proxyd_upstream_connections", upstream="up", state="idle") == 1
        assert conn.uses == 10_000

    in_loop(scene)


def test_as_many_connections_are_opened_as_were_ever_needed_at_once(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        origin = upstreams.origins["up"]

        async def client() -> None:
            for _ in range(50):
                conn = await upstreams.acquire(origin, timeout_s=5.0)
                await conn.send(b"x", 5.0)
                await conn.recv(10, 5.0)
                conn.release(True)

        await asyncio.gather(*(client() for _ in range(20)))
        assert upstreams.stats()["up"]["connects"] <= 20
        assert counts(upstreams)[1:] == (0, 0, 0)

    in_loop(scene)


def test_the_first_use_is_not_a_reuse_and_the_second_is(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        seen = []
        for _ in range(2):
            conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
            seen.append((conn.reused, conn.uses))
            conn.release(True)
        assert seen == [(False, 1), (True, 2)]

    in_loop(scene)


def test_a_connection_that_the_peer_closes_while_idle_is_noticed(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(True)
        await world.until(lambda: world.peers.writers)
        world.peers.writers[0].close()
        await world.until(lambda: counts(upstreams)[0] == 0)
        assert conn.state is State.CLOSED

    in_loop(scene)


def test_bytes_nobody_asked_for_retire_an_idle_connection(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(True)
        await world.until(lambda: world.peers.writers)
        world.peers.writers[0].write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        await world.until(lambda: counts(upstreams)[0] == 0)

    in_loop(scene)


def test_a_close_that_the_loop_has_not_seen_yet_is_caught_when_it_is_taken(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"})
        origin = upstreams.origins["up"]
        old = await upstreams.acquire(origin, timeout_s=5.0)
        old.release(True)
        listener.accept()[0].close()
        assert select.select([old.fd], [], [], 5.0)[0]  # it is there to see, and the loop gets no turn before we ask
        new = await upstreams.acquire(origin, timeout_s=5.0)
        assert new is not old
        assert (old.state, new.reused) == (State.CLOSED, False)
        assert counts(upstreams) == (0, 1, 0, 0)
        new.release(False)
        listener.close()

    in_loop(scene)


@pytest.mark.parametrize("how", ["not reusable", "unread bytes", "half an answer"])
def test_what_must_not_be_pooled_is_closed_on_release(in_loop: Callable[..., None], how: str) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        if how != "not reusable":
            await conn.send(b"abcdef", 5.0)
            if how == "half an answer":
                await conn.recv(3, 5.0)
            else:
                await world.until(lambda: _readable(conn.fd))
        conn.release(how != "not reusable")
        assert conn.state is State.CLOSED
        assert counts(upstreams) == (0, 0, 0, 0)

    in_loop(scene)


def _readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_a_second_release_changes_nothing(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(True)
        conn.release(False)
        conn.release(True)
        assert counts(upstreams) == (1, 0, 0, 0)

    in_loop(scene)


def test_the_tick_closes_what_has_expired(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "idle_expiry": "60s"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(True)
        world.clock.advance(59)
        upstreams.tick()
        assert counts(upstreams) == (1, 0, 0, 0)
        world.clock.advance(1)
        upstreams.tick()
        assert (counts(upstreams), conn.state) == ((0, 0, 0, 0), State.CLOSED)
        assert world.metrics.read("proxyd_upstream_connections", upstream="up", state="idle") == 0

    in_loop(scene)


def test_nothing_is_registered_on_a_connection_in_use(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        origin = upstreams.origins["up"]
        for _ in range(2):  # fresh from the dial, then out of the pool
            conn = await upstreams.acquire(origin, timeout_s=5.0)
            await conn.send(b"x", 5.0)
            await conn.recv(10, 5.0)
            assert not world.loop.remove_reader(conn.fd)
            assert not world.loop.remove_writer(conn.fd)
            conn.release(True)

    in_loop(scene)


def test_reports_eject_count_and_show_in_the_gauge(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        upstreams = world.upstreams(
            {"name": "a", "url": "http://127.0.0.1:1"},
            {"name": "b", "url": "http://127.0.0.1:2", "dialect": "anthropic"},
            models=[{"name": "m", "id": 1, "upstreams": ["a", "b"]}],
        )
        config = world.config({"url": "http://x"}, models=[{"name": "m", "id": 1, "upstreams": ["a", "b"]}])
        model, a = config.model[0], upstreams.origins["a"]
        for _ in range(3):
            upstreams.report(a, False, UpstreamErrorKind.RESET)
        upstreams.report(a, False, 503)
        upstreams.report(a, False, 429)
        upstreams.report(upstreams.origins["b"], False, 404)
        assert upstreams.plan(model, {"openai", "anthropic"}).next() is a
        upstreams.report(a, False, 529)
        read = world.metrics.read
        assert read("proxyd_breaker_state", upstream="a") == 2
        assert read("proxyd_upstream_errors_total", upstream="a", kind="reset") == 3
        assert read("proxyd_upstream_errors_total", upstream="a", kind="status_429") == 1
        assert read("proxyd_upstream_errors_total", upstream="b", kind="status_404") == 0
        assert [event for event, _ in world.log.lines] == ["upstream_failing", "upstream_ejected"]
        assert world.log.lines[1][1] == {"upstream": "a", "kind": "529", "seconds": 30}
        plan = upstreams.plan(model, {"openai", "anthropic"})
        assert [plan.next(), plan.next()] == [upstreams.origins["b"], None]
        assert upstreams.plan(model, {"embedded"}).next() is None
        world.clock.advance(30)
        upstreams.tick()
        assert read("proxyd_breaker_state", upstream="a") == 1
        assert upstreams.plan(model, {"openai"}).next() is a
        upstreams.report(a, True)
        assert (read("proxyd_breaker_state", upstream="a"), upstreams.stats()["a"]["breaker"]) == (0, "closed")

    in_loop(scene)


def test_it_writes_the_real_metrics(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        region = Region.create(1)
        config: Config = world.config({"url": f"http://127.0.0.1:{await world.peers.serve(echo)}"})
        metrics = Metrics(region, 0)
        upstreams = Upstreams(config, Secrets(), metrics, world.log, world.clock, world.loop)
        (await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)).release(True)
        snapshot = read(region, world.clock.monotonic())
        assert snapshot.total("proxyd_upstream_connects_total") == 1
        assert snapshot.total("_upstream_acquires") == 1
        await upstreams.close()

    in_loop(scene)
