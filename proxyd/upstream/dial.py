"""Opening a TCP connection to an origin: which address first, how long, with which socket options.

Owns: the race between addresses (RFC 8305, happy eyeballs), the options of upstream sockets, the turn of the source
addresses. Must not know: pools, TLS, requests.
Invariants: `dial` ends within its timeout, name resolution included; every socket it opened but the one it returns is
closed, whatever way it ends; at most MAX_ADDRESSES attempts.
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

    __slots__ = ("_congestion", "_log", "_loop", "_origin", "_resolver", "_sources", "_turn")

    def __init__(self, origin: Origin, resolver: Resolver, loop: asyncio.AbstractEventLoop, log: Log) -> None:
        self._origin = origin
        self._resolver = resolver
        self._loop = loop
        self._log = log
        self._congestion: bytes = origin.config.congestion_control.encode("ascii")
        self._sources: dict[socket.AddressFamily, list[str]] = {}
        self._turn: dict[socket.AddressFamily, int] = {}
        for source in map(str, origin.config.source_addresses):
            version = ipaddress.ip_address(source).version
            self._sources.setdefault(socket.AF_INET if version == 4 else socket.AF_INET6, []).append(source)

    async def dial(self, timeout_s: float) -> socket.socket:
        """A connected non-blocking socket. Raises UpstreamError RESOLVE, REFUSED, UNREACHABLE or CONNECT_TIMEOUT."""
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
        """One connect. Raises OSError; the socket is closed then, and when cancelled."""
        sock = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self._set_options(sock)
            self._bind(sock, address.family)
            code = sock.connect_ex(address.sockaddr)
            if code in (errno.EINPROGRESS, errno.EINTR):
                ready = await Readiness(self._loop, sock.fileno()).wait(Ready.WRITE, deadline - self._loop.time())
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) if ready else errno.ETIMEDOUT
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

    def _bind(self, sock: socket.socket, family: socket.AddressFamily) -> None:
        """The next source address of this family, if any are configured."""
        sources = self._sources.get(family)
        if not sources:
            return
        turn = self._turn.get(family, 0)
        self._turn[family] = (turn + 1) % len(sources)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((sources[turn], 0))

    def _error(self, kind: UpstreamErrorKind, detail: str) -> UpstreamError:
        return UpstreamError(kind, self._origin.name, detail)


def _close_loser(task: asyncio.Task[socket.socket]) -> None:
    """A loser that was cancelled closed its own socket; one that connected in the same turn is closed here."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()


def _kind_of(error: OSError) -> UpstreamErrorKind:
    if error.errno == errno.ECONNREFUSED:
        return UpstreamErrorKind.REFUSED
    if error.errno == errno.ETIMEDOUT:
        return UpstreamErrorKind.CONNECT_TIMEOUT
    return UpstreamErrorKind.UNREACHABLE


def _describe(address: Address, error: OSError) -> str:
    return f"{address.text()}: {error.strerror or error}"
