"""Dialer on loopback: the race between addresses, options, source addresses, failures, nothing left open."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.dial import MAX_ADDRESSES, STAGGER_S, interleave
from proxyd.upstream.resolve import Address


class FixedNames:
    """A resolver that answers with these addresses."""

    def __init__(self, *addresses: tuple[str, int]) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int) -> tuple[Address, ...]:
        return tuple(
            Address(socket.AF_INET6, (ip, at, 0, 0)) if ":" in ip else Address(socket.AF_INET, (ip, at))
            for ip, at in self.addresses
        )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def full_listener() -> tuple[socket.socket, list[socket.socket]]:
    """A listener whose backlog is full: further SYNs get no answer at all."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    fillers = []
    for _ in range(3):
        filler = socket.socket()
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())
        fillers.append(filler)
    return listener, fillers


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)


def test_families_take_turns_beginning_with_the_first() -> None:
    v4 = [Address(socket.AF_INET, (f"10.0.0.{n}", 1)) for n in range(3)]
    v6 = [Address(socket.AF_INET6, (f"2001:db8::{n}", 1, 0, 0)) for n in range(2)]
    assert interleave([*v6, *v4]) == [v6[0], v4[0], v6[1], v4[1], v4[2]]
    assert len(interleave(v4 * 20)) == MAX_ADDRESSES


def test_the_socket_has_the_options_of_an_upstream_socket(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        sock = await world.dialer(world.origin(f"http://127.0.0.1:{port}", congestion_control="cubic")).dial(5.0)
        with sock:
            tcp = {
                option: sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_NODELAY,
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                    socket.TCP_NOTSENT_LOWAT,
                )
            }
            assert list(tcp.values()) == [1, 30, 10, 3, 20_000, 16_384]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
            assert not sock.getblocking()

    in_loop(scene)


def test_an_unknown_congestion_control_is_said_once_and_dialled_without(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        dialer = world.dialer(world.origin(f"http://127.0.0.1:{port}", congestion_control="nosuch"))
        for _ in range(3):
            (await dialer.dial(5.0)).close()
        assert [event for event, _ in world.log.lines] == ["congestion_control_unavailable"]
        assert world.log.lines[0][1]["wanted"] == "nosuch"

    in_loop(scene)


def test_source_addresses_take_turns(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        origin = world.origin(f"http://127.0.0.1:{port}", source_addresses=["127.0.0.2", "::1", "127.0.0.3"])
        dialer = world.dialer(origin)
        sources = []
        for _ in range(3):
            with await dialer.dial(5.0) as sock:
                sources.append(sock.getsockname()[0])
                assert sock.getsockopt(socket.IPPROTO_IP, 24) == 1, "IP_BIND_ADDRESS_NO_PORT"
        assert sources == ["127.0.0.2", "127.0.0.3", "127.0.0.2"]

    in_loop(scene)


def test_a_refused_port_is_told_as_refused(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = closed_port()
        before = open_files()
        with pytest.raises(UpstreamError) as caught:
            await world.dialer(world.origin(f"http://127.0.0.1:{port}")).dial(5.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.REFUSED, False)
        assert caught.value.detail == f"127.0.0.1:{port}: Connection refused"
        assert open_files() == before

    in_loop(scene)


def test_a_failed_address_is_followed_by_the_next_without_the_stagger(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        names = FixedNames(*[("127.0.0.1", closed_port()) for _ in range(10)], ("127.0.0.1", port))
        started = world.loop.time()
        with await world.dialer(world.origin("http://names"), names).dial(5.0) as sock:
            assert sock.getpeername()[1] == port
        assert world.loop.time() - started < 10 * STAGGER_S

    in_loop(scene)


def test_a_silent_address_is_overtaken_by_the_next_and_closed(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        listener, fillers = full_listener()
        port = await world.peers.serve(echo)
        before = open_files()
        names = FixedNames(("127.0.0.1", listener.getsockname()[1]), ("127.0.0.1", port))
        with await world.dialer(world.origin("http://names"), names).dial(30.0) as sock:
            assert sock.getpeername()[1] == port
            await world.until(lambda: world.peers.accepted == 1)
            await world.until(lambda: open_files() == before + 2)  # our end and the server's
        for each in (listener, *fillers):
            each.close()

    in_loop(scene)


def test_the_connect_timeout_covers_all_addresses(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        listener, fillers = full_listener()
        port = listener.getsockname()[1]
        before = open_files()
        dialer = world.dialer(world.origin("http://names"), FixedNames(("127.0.0.1", port), ("127.0.0.1", port)))
        with pytest.raises(UpstreamError) as caught:
            await dialer.dial(0.4)
        assert caught.value.kind is UpstreamErrorKind.CONNECT_TIMEOUT
        assert open_files() == before
        for each in (listener, *fillers):
            each.close()

    in_loop(scene)


def test_a_lookup_that_takes_too_long_is_a_connect_timeout(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        class Never:
            async def resolve(self, host: str, port: int) -> tuple[Address, ...]:
                await asyncio.Event().wait()
                return ()

        with pytest.raises(UpstreamError) as caught:
            await world.dialer(world.origin("http://slow.example"), Never()).dial(0.02)
        assert caught.value.kind is UpstreamErrorKind.CONNECT_TIMEOUT
        assert "resolving slow.example" in caught.value.detail

    in_loop(scene)


def test_a_name_without_an_address_is_told_as_resolve(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        class Nobody:
            async def resolve(self, host: str, port: int) -> tuple[Address, ...]:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

        with pytest.raises(UpstreamError) as caught:
            await world.dialer(world.origin("http://nobody.example"), Nobody()).dial(5.0)
        assert caught.value.kind is UpstreamErrorKind.RESOLVE
        assert caught.value.detail == "nobody.example: Name or service not known"

    in_loop(scene)


def test_a_source_address_that_is_not_ours_is_unreachable(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo)
        origin = world.origin(f"http://127.0.0.1:{port}", source_addresses=["192.0.2.1"])
        with pytest.raises(UpstreamError) as caught:
            await world.dialer(origin).dial(5.0)
        assert caught.value.kind is UpstreamErrorKind.UNREACHABLE

    in_loop(scene)


def test_a_cancelled_dial_closes_what_it_opened(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        listener, fillers = full_listener()
        before = open_files()
        names = FixedNames(("127.0.0.1", listener.getsockname()[1]))
        dialling = asyncio.create_task(world.dialer(world.origin("http://names"), names).dial(30.0))
        await world.until(lambda: open_files() == before + 1)
        dialling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dialling
        await world.until(lambda: open_files() == before)
        for each in (listener, *fillers):
            each.close()

    in_loop(scene)
