"""Who closes first, on loopback: a peer that announced its close is let; and source addresses that are no good."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.connection import State
from proxyd.upstream.keeper import LEAVING_LEAST


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


def time_waits_towards(port: int) -> int:
    """Our ends of connections to `port` that rest in TIME_WAIT."""
    with open("/proc/self/net/tcp", encoding="ascii") as file:
        rows = [line.split() for line in file][1:]
    return sum(row[3] == "06" and int(row[2].rpartition(":")[2], 16) == port for row in rows)


def test_a_peer_that_closes_by_itself_is_waited_for_and_keeps_the_time_wait(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(False, ended=True)
        assert conn.state is State.LEAVING
        conn.release(True)  # a second word changes nothing
        assert conn.state is State.LEAVING
        assert upstreams.stats()["up"]["busy"] == 0
        world.peers.writers[0].close()
        await world.until(lambda: conn.state is State.CLOSED)
        assert time_waits_towards(port) == 0
        assert world.metrics.read("proxyd_egress_ports_used", upstream="up") == 0
        assert world.metrics.read("proxyd_upstream_keepalive_refused_total", upstream="up") == 1

    in_loop(scene)


def test_a_connection_that_is_too_old_is_not_waited_for_the_peer_would_keep_it(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_age": "10s"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        world.clock.advance(10.0)
        conn.release(True)
        assert conn.state is State.CLOSED
        assert world.metrics.read("proxyd_upstream_keepalive_refused_total", upstream="up") == 0

    in_loop(scene)


def test_a_peer_that_has_closed_already_is_closed_at_once(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        await world.until(lambda: world.peers.writers)
        world.peers.writers[0].close()
        await world.until(conn.is_over)
        conn.release(False, ended=True)
        assert conn.state is State.CLOSED
        assert time_waits_towards(port) == 0

    in_loop(scene)


def test_a_peer_that_waits_for_us_is_reset_so_that_no_port_rests(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        ends: list[type[BaseException]] = []

        async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await reader.read(1)
            except ConnectionError as error:
                ends.append(type(error))

        port = await world.peers.serve(patient)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(False, ended=True)
        await world.until(lambda: ends)
        assert (ends, conn.state) == ([ConnectionResetError], State.CLOSED)
        assert time_waits_towards(port) == 0

    in_loop(scene)


def test_a_connection_that_was_given_up_is_closed_at_once_and_its_port_counted(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}"})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        conn.release(False)
        assert conn.state is State.CLOSED
        assert world.metrics.read("proxyd_egress_ports_used", upstream="up") == 1
        assert world.metrics.read("proxyd_upstream_keepalive_refused_total", upstream="up") == 0

    in_loop(scene)


def test_so_many_are_left_to_their_peers_and_the_oldest_makes_room(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        upstreams = world.upstreams({"url": f"http://127.0.0.1:{port}", "max_connections": 64, "max_idle": 4})
        conns = [await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0) for _ in range(LEAVING_LEAST + 3)]
        for conn in conns:
            conn.release(False, ended=True)
        assert [conn.state for conn in conns] == [State.CLOSED] * 3 + [State.LEAVING] * LEAVING_LEAST
        await upstreams.close()
        assert {conn.state for conn in conns} == {State.CLOSED}
        assert world.metrics.read("proxyd_egress_ports_used", upstream="up") == 0

    in_loop(scene)


def test_a_source_address_that_is_not_ours_is_told_once_and_the_next_is_taken(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        sources = ["198.51.100.1", "127.0.0.2", "127.0.0.3"]
        dialer = world.dialer(world.origin(f"http://127.0.0.1:{port}", source_addresses=sources))
        seen = []
        for _ in range(6):
            with await dialer.dial(5.0) as sock:
                seen.append(sock.getsockname()[0])
        assert seen == ["127.0.0.2", "127.0.0.2", "127.0.0.3"] * 2
        ((event, fields),) = world.log.lines
        assert (event, fields["source"]) == ("source_address_unusable", "198.51.100.1")
        assert fields["reason"] == "Cannot assign requested address from 198.51.100.1"

    in_loop(scene)


def test_without_a_usable_source_address_the_failure_names_them(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        sources = ["198.51.100.1", "198.51.100.2"]
        dialer = world.dialer(world.origin(f"http://127.0.0.1:{port}", source_addresses=sources))
        with pytest.raises(UpstreamError) as caught:
            await dialer.dial(5.0)
        assert caught.value.kind is UpstreamErrorKind.UNREACHABLE
        assert "198.51.100.1" in caught.value.detail
        assert "198.51.100.2" in caught.value.detail
        assert world.peers.accepted == 0

    in_loop(scene)


def test_a_source_address_of_the_sixth_version_takes_its_port_at_connect(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo, host="::1")
        with await world.dialer(world.origin(f"http://[::1]:{port}", source_addresses=["::1"])).dial(5.0) as sock:
            assert sock.getsockopt(socket.IPPROTO_IP, 24) == 1, "IP_BIND_ADDRESS_NO_PORT"

    in_loop(scene)
