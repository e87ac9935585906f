"""Opening a TCP connection to an origin: which address first, how long, with which socket options.

Owns: the race between addresses (RFC 8305, happy eyeballs), the options of upstream sockets, the turn of the source
addresses. Must not know: pools, TLS, requests.
Invariants: `dial` ends within its timeout, name resolution included; every socket it opened but the one it returns is
closed, whatever way it ends; at most MAX_ADDRESSES attempts. A source address that cannot be used costs no dial: the
next one is tried, and only when none is left the attempt fails with the names of all.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections import deque
from collections.abc import Iterable

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.log import Log
from proxyd.upstream.origin import Origin
from proxyd.upstream.readiness import Readiness, Ready
from proxyd.upstream.resolve import Address, Resolver

# RFC 8305, section 8: "Connection Attempt Delay" of 250 ms recommended, 100 ms to 2 s allowed.
STAGGER_S = 0.250
# A name with more addresses than this is a list to choose from, not one to work through while a client waits.
MAX_ADDRESSES = 16
# 30 s idle, then 3 probes 10 s apart: a dead peer is noticed within a minute, before a NAT forgets the flow (minutes).
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
# Unacknowledged data for this long ends the connection (tcp(7)); it also bounds the keepalive probes.
USER_TIMEOUT_MS = 20_000
# Bytes the kernel takes beyond what it has sent: what we queue there we cannot take back for a client who left.
NOTSENT_LOWAT_BYTES = 16_384
# ip(7), since Linux 4.2: the port is chosen at connect(), so one source port serves many destinations.
IP_BIND_ADDRESS_NO_PORT = 24
# What says at once that a source address cannot reach this one: not ours, none of its ports free, or no way from there.
_OF_SOURCES = frozenset((errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES))
# Between two lines about one source address.
SOURCE_REPEAT_S = 60.0


class NoPort(OSError):
    """No local port is free towards this address: not the address's fault."""


def interleave(addresses: Iterable[Address]) -> list[Address]:
    """RFC 8305, section 4: families in turn, beginning with the first address's, otherwise in the given order."""
    by_family: dict[socket.AddressFamily, deque[Address]] = {}
    for address in addresses:
        by_family.setdefault(address.family, deque()).append(address)
    lines = list(by_family.values())
    ordered: list[Address] = []
    while any(lines):
        ordered += [line.popleft() for line in lines if line]
    return ordered[:MAX_ADDRESSES]


class Dialer:
    """Dials one origin."""

    __slots__ = ("_congestion", "_log", "_loop", "_origin", "_resolver", "_sources", "_told_s", "_turn")

    def __init__(self, origin: Origin, resolver: Resolver, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self._origin = origin
        self._resolver = resolver
        self._loop = loop
        self._log = log
        self._congestion: bytes = origin.config.congestion_control.encode("ascii")
        self._sources: dict[socket.AddressFamily, list[str]] = {}
        self._turn: dict[socket.AddressFamily, int] = {}
        self._told_s: dict[str, float] = {}
        for source in map(str, origin.config.source_addresses):
            version = ipaddress.ip_address(source).version
            self._sources.setdefault(socket.AF_INET if version == 4 else socket.AF_INET6, []).append(source)

    async def dial(self, timeout_s: float) -> socket.socket:
        """A connected non-blocking socket. Raises UpstreamError RESOLVE, REFUSED, UNREACHABLE, CONNECT_TIMEOUT, or
        NO_PORTS."""
        deadline = self._loop.time() + timeout_s
        host, port = self._origin.host, self._origin.port
        try:
            found = await asyncio.wait_for(self._resolver.resolve(host, port), timeout_s)
        except TimeoutError as error:
            raise self._error(UpstreamErrorKind.CONNECT_TIMEOUT, f"resolving {host}") from error
        except OSError as error:
            raise self._error(UpstreamErrorKind.RESOLVE, f"{host}: {error.strerror or error}") from error
        return await self._race(interleave(found), deadline)

    async def _race(self, addresses: list[Address], deadline: float) -> socket.socket:
        """The first address that connects: the next one starts when the last failed, or STAGGER_S after it began."""
        waiting = deque(addresses)
        running: dict[asyncio.Task[socket.socket], Address] = {}
        failures: list[tuple[Address, OSError]] = []
        start_next = True
        try:
            while waiting or running:
                if waiting and start_next:
                    address = waiting.popleft()
                    running[self._loop.create_task(self._attempt(address, deadline))] = address
                pause = STAGGER_S if waiting else None  # the last attempts bring their own deadline
                done, _ = await asyncio.wait(running, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
                start_next = not done
                for task in done:
                    error = task.exception()
                    if error is None:
                        del running[task]
                        return task.result()
                    if not isinstance(error, OSError):
                        raise error
                    failures.append((running.pop(task), error))
                    start_next = True
        finally:
            for loser in running:
                loser.cancel()
                loser.add_done_callback(_close_loser)
        raise self._error(_kind_of(failures[0][1]), "; ".join(_describe(*failure) for failure in failures[:3]))

    async def _attempt(self, address: Address, deadline: float) -> socket.socket:
        """One connect, from one source address after the other. Raises OSError."""
        failed: list[OSError] = []
        for source in self._in_turn(address.family):
            try:
                return await self._connect(address, source, deadline)
            except OSError as error:
                if source is None or error.errno not in _OF_SOURCES:
                    raise
                failed.append(error)
                if not isinstance(error, NoPort):
                    self._tell_source(source, address, error)
        for failure in failed:
            if isinstance(failure, NoPort):
                raise failure
        raise OSError(failed[0].errno, "; ".join(str(error.strerror) for error in failed[:3]))

    def _in_turn(self, family: socket.AddressFamily) -> list[str | None]:
        """The source addresses of this family, beginning with the next one's turn; None leaves it to the kernel."""
        sources = self._sources.get(family)
        if not sources:
            return [None]
        turn = self._turn.get(family, 0)
        self._turn[family] = (turn + 1) % len(sources)
        return [*sources[turn:], *sources[:turn]]

    async def _connect(self, address: Address, source: str | None, deadline: float) -> socket.socket:
        """One connect. Raises OSError; the socket is closed then, and when cancelled."""
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._set_options(sock)
            if source is not None:
                self._bind(sock, source)
            code = sock.connect_ex(address.sockaddr)
            if code == errno.EADDRNOTAVAIL and _has_source(address, source):
                raise NoPort(code, f"no local port is free{_from(source)}")
            if code in (errno.EINPROGRESS, errno.EINTR):
                ready = await Readiness(self._loop, sock.fileno()).wait(Ready.WRITE, deadline - self._loop.time())
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
            elif code and source is not None:
                raise OSError(code, os.strerror(code) + _from(source))
            if code:
                raise OSError(code, os.strerror(code))
            if sock.getsockname() == sock.getpeername():
                # A local port without a listener, and the kernel chose it for our own end: TCP's simultaneous open.
                raise OSError(errno.ECONNREFUSED, "connected to itself")
        except BaseException:
            sock.close()
            raise
        return sock

    def _set_options(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
        if self._congestion:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion)
            except OSError as error:
                self._log.warning(
                    "congestion_control_unavailable",
                    upstream=self._origin.name,
                    wanted=self._congestion.decode("ascii"),
                    reason=error.strerror,
                    remedy="load the module (tcp_bbr) and allow it in net.ipv4.tcp_allowed_congestion_control",
                )
                self._congestion = b""  # said once; the system's own is used from here on

    def _bind(self, sock: socket.socket, source: str) -> None:
        """Takes the address now and the port at connect(): it may be in use towards other destinations."""
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        try:
            sock.bind((source, 0))
        except OSError as error:
            raise OSError(error.errno, (error.strerror or str(error)) + _from(source)) from error

    def _tell_source(self, source: str, address: Address, error: OSError) -> None:
        """A source address that cannot be used, once in a while: the next one stands in for it."""
        now = self._loop.time()
        told = self._told_s.get(source)
        if told is not None and now - told < SOURCE_REPEAT_S:
            return
        self._told_s[source] = now
        self._log.warning(
            "source_address_unusable",
            upstream=self._origin.name,
            source=source,
            address=address.text(),
            reason=error.strerror,
            remedy="give this host the address, or take it out of upstream.source_addresses",
        )

    def _error(self, kind: UpstreamErrorKind, detail: str) -> UpstreamError:
        return UpstreamError(kind, self._origin.name, detail)


def _close_loser(task: asyncio.Task[socket.socket]) -> None:
    """A loser that was cancelled closed its own socket; one that connected in the same turn is closed here."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _has_source(address: Address, source: str | None) -> bool:
    """Whether there is a local address towards this one, so that what a connect() lacked was a port. A datagram
    socket's connect() chooses the address alike, takes no TCP port and sends nothing."""
    with socket.socket(address.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            if source is not None:
                probe.bind((source, 0))
        except OSError:
            return True  # it was bound for TCP before
        return probe.connect_ex(address.sockaddr) != errno.EADDRNOTAVAIL


def _from(source: str | None) -> str:
    return f" from {source}" if source is not None else ""


def _kind_of(error: OSError) -> UpstreamErrorKind:
    if isinstance(error, NoPort):
        return UpstreamErrorKind.NO_PORTS
    if error.errno == errno.ECONNREFUSED:
        return UpstreamErrorKind.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return UpstreamErrorKind.CONNECT_TIMEOUT
    return UpstreamErrorKind.UNREACHABLE


def _describe(address: Address, error: OSError) -> str:
    return f"{address.text()}: {error.strerror or error}"
