"""Resolver: cache, one lookup in flight, failure; with a getaddrinfo of our own and a clock that is told the time."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.upstream.resolve import MAX_NAMES, NEGATIVE_TTL_S, POSITIVE_TTL_S, STALE_S, Address, Resolver


class Names:
    """A getaddrinfo that answers from a table, counts, and can be made to wait."""

    def __init__(self, *answers: str) -> None:
        self.answers: tuple[str, ...] | None = answers
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, host: str, port: int, **_: Any) -> list[Any]:
        self.asked.append(host)
        self.gate.wait()
        if self.answers is None:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (ip, port, 0, 0))
            if ":" in ip
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in self.answers
        ]


def v4(ip: str, port: int) -> Address:
    return Address(socket.AF_INET, (ip, port))


def test_an_answer_is_used_for_its_time_and_then_asked_again(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        names = Names("10.0.0.1", "2001:db8::1", "10.0.0.1")
        resolver = Resolver(world.loop, world.clock, names)
        expected = (v4("10.0.0.1", 80), Address(socket.AF_INET6, ("2001:db8::1", 80, 0, 0)))
        assert await resolver.resolve("api", 80) == expected
        assert (await resolver.resolve("api", 81))[0] == v4("10.0.0.1", 81)
        world.clock.advance(POSITIVE_TTL_S - 0.1)
        await resolver.resolve("api", 80)
        assert len(names.asked) == 1
        world.clock.advance(0.1)
        await resolver.resolve("api", 80)
        assert len(names.asked) == 2

    in_loop(scene)


def test_a_failure_is_remembered_for_a_second_only(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        names = Names()
        names.answers = None
        resolver = Resolver(world.loop, world.clock, names)
        for _ in range(3):
            with pytest.raises(socket.gaierror, match="Temporary failure"):
                await resolver.resolve("api", 80)
        assert len(names.asked) == 1
        names.answers = ("10.0.0.2",)
        world.clock.advance(NEGATIVE_TTL_S)
        assert await resolver.resolve("api", 80) == (v4("10.0.0.2", 80),)

    in_loop(scene)


def test_an_old_answer_stands_in_while_the_resolver_fails(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        names = Names("10.0.0.1")
        resolver = Resolver(world.loop, world.clock, names)
        await resolver.resolve("api", 80)
        names.answers = None
        world.clock.advance(POSITIVE_TTL_S + STALE_S - 1)
        assert await resolver.resolve("api", 80) == (v4("10.0.0.1", 80),)
        world.clock.advance(1)
        with pytest.raises(socket.gaierror):
            await resolver.resolve("api", 80)

    in_loop(scene)


def test_many_askers_share_one_lookup_and_one_leaving_does_not_end_it(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        names = Names("10.0.0.1")
        names.gate.clear()
        resolver = Resolver(world.loop, world.clock, names)
        askers = [asyncio.create_task(resolver.resolve("api", port)) for port in range(1, 21)]
        await world.until(lambda: names.asked)
        askers[0].cancel()
        await asyncio.sleep(0)
        names.gate.set()
        results = await asyncio.gather(*askers, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError)
        assert results[1:] == [(v4("10.0.0.1", port),) for port in range(2, 21)]
        assert len(names.asked) == 1

    in_loop(scene)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", v4("127.0.0.1", 80)),
        ("::1", Address(socket.AF_INET6, ("::1", 80, 0, 0))),
        ("fe80::1%7", Address(socket.AF_INET6, ("fe80::1", 80, 0, 7))),
    ],
)
def test_a_literal_address_is_never_looked_up(in_loop: Callable[..., None], host: str, address: Address) -> None:
    async def scene(world: Any) -> None:
        names = Names()
        assert await Resolver(world.loop, world.clock, names).resolve(host, 80) == (address,)
        assert names.asked == []

    in_loop(scene)


def test_the_cache_is_bounded(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        names = Names("10.0.0.1")
        resolver = Resolver(world.loop, world.clock, names)
        for index in range(MAX_NAMES + 1):
            await resolver.resolve(f"n{index}", 80)
        await resolver.resolve("n1", 80)
        assert len(names.asked) == MAX_NAMES + 1
        await resolver.resolve("n0", 80)
        assert len(names.asked) == MAX_NAMES + 2

    in_loop(scene)


def test_a_name_that_is_none_is_an_error_of_resolution(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        def refuse(*_: Any, **__: Any) -> list[Any]:
            raise UnicodeError("label empty or too long")

        with pytest.raises(socket.gaierror, match="not a host name"):
            await Resolver(world.loop, world.clock, refuse).resolve("a" * 70, 80)

    in_loop(scene)
