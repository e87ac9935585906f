"""Names to addresses, without blocking the loop and without asking for every dial.

Owns: the cache and the lookups in flight. Must not know: ports' meaning, connections, which upstream asks.
Invariants: one lookup in flight per name (so at most one executor thread a name); at most MAX_NAMES entries; an answer
of the past is served on while the resolver fails; literal addresses never reach the resolver. No deadline of its own: a
lookup belongs to all who wait for it, each waits as long as its connect_timeout lets it.

TTLs are constants because getaddrinfo does not give the record's own (getaddrinfo(3)).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from proxyd.clock import Clock

# How long an answer is used. Half: twice the lookups for nothing, providers rotate by the minute. Twice: a provider
# that takes an address out of service is dialled there for a minute.
POSITIVE_TTL_S = 30.0
# How long a failure is remembered. It bounds a storm of lookups to one a second and name; longer delays the recovery.
NEGATIVE_TTL_S = 1.0
# How long after its TTL an answer still stands in for a resolver that fails. An outage of DNS is minutes, and addresses
# rarely move within ten; beyond, dialling an old address may reach somebody else.
STALE_S = 600.0
# Names are those of [[upstream]]; the bound is for what nobody foresaw. Beyond it the least recently used goes.
MAX_NAMES = 256


@dataclass(frozen=True, slots=True)
class Address:
    """One address to connect to: socket family, and the address as `socket.connect` takes it."""

    family: socket.AddressFamily
    sockaddr: tuple[Any, ...]

    def text(self) -> str:
        host, port = self.sockaddr[:2]
        return f"[{host}]:{port}" if self.family == socket.AF_INET6 else f"{host}:{port}"


@dataclass(slots=True)
class _Entry:
    hosts: tuple[Address, ...] = ()  # with port 0
    good_until_s: float = 0.0
    error: OSError | None = None
    error_until_s: float = 0.0


GetAddrInfo = Callable[..., list[Any]]


class Resolver:
    """See the head of the file."""

    __slots__ = ("_cache", "_clock", "_getaddrinfo", "_in_flight", "_loop")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, getaddrinfo: GetAddrInfo = socket.getaddrinfo
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._getaddrinfo = getaddrinfo
        self._cache: OrderedDict[str, _Entry] = OrderedDict()
        self._in_flight: dict[str, asyncio.Task[None]] = {}

    async def resolve(self, host: str, port: int) -> tuple[Address, ...]:
        """At least one address, in the resolver's order (RFC 6724). Raises OSError (gaierror) when there is none."""
        literal = _literal(host)
        if literal is not None:
            return (_at_port(literal, port),)
        entry = self._cache.get(host)
        if entry is None or not self._answers(entry):
            # shield: a lookup belongs to everybody who waits for it, one leaving must not end it
            await asyncio.shield(self._lookup(host))
            entry = self._cache.get(host)
        if entry is None:
            raise socket.gaierror(socket.EAI_AGAIN, "the answer was evicted")
        if host in self._cache:
            self._cache.move_to_end(host)
        if entry.hosts and self._clock.monotonic() < entry.good_until_s + STALE_S:
            return tuple(_at_port(address, port) for address in entry.hosts)
        raise entry.error or socket.gaierror(socket.EAI_NONAME, "no address")

    async def close(self) -> None:
        """Ends the lookups in flight (their threads run out by themselves)."""
        tasks = list(self._in_flight.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _answers(self, entry: _Entry) -> bool:
        """True while the entry may be used without asking again."""
        now = self._clock.monotonic()
        return now < entry.good_until_s or now < entry.error_until_s

    def _lookup(self, host: str) -> asyncio.Task[None]:
        task = self._in_flight.get(host)
        if task is None:
            task = self._in_flight[host] = self._loop.create_task(self._ask(host))
        return task

    async def _ask(self, host: str) -> None:
        """One lookup, its outcome into the cache; never raises but for cancellation."""
        try:
            found: list[Any] | None
            error: OSError | None = None
            try:
                found = await self._loop.run_in_executor(None, self._call, host)
            except OSError as failed:
                found, error = None, failed
            except UnicodeError:
                found, error = None, socket.gaierror(socket.EAI_NONAME, "not a host name")
            entry = self._cache.setdefault(host, _Entry())
            now = self._clock.monotonic()
            if found:
                hosts = (Address(socket.AddressFamily(item[0]), tuple(item[4])) for item in found)
                entry.hosts = tuple(dict.fromkeys(hosts))
                entry.good_until_s = now + POSITIVE_TTL_S
                entry.error = None
            else:
                entry.error = error or socket.gaierror(socket.EAI_NONAME, "no address")
                entry.error_until_s = now + NEGATIVE_TTL_S
            self._cache.move_to_end(host)
            while len(self._cache) > MAX_NAMES:
                self._cache.popitem(last=False)
        finally:
            self._in_flight.pop(host, None)

    def _call(self, host: str) -> list[Any]:
        """In a thread of the executor."""
        return self._getaddrinfo(host, 0, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)


def _literal(host: str) -> Address | None:
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if parsed.version == 6:
        scope = host.partition("%")[2]
        return Address(socket.AF_INET6, (str(parsed), 0, 0, _scope_id(scope)))
    return Address(socket.AF_INET, (host, 0))


def _scope_id(scope: str) -> int:
    """An interface name or number of a link-local literal; 0 for none or an unknown one."""
    if not scope:
        return 0
    try:
        return int(scope) if scope.isdecimal() else socket.if_nametoindex(scope)
    except OSError:
        return 0


def _at_port(address: Address, port: int) -> Address:
    return Address(address.family, (address.sockaddr[0], port, *address.sockaddr[2:]))
