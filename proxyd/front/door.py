"""What all client connections of one worker share, and where their requests go.

Owns: the settings, the scratch buffer, the wheel, the set of connections, draining, and the way from a decided route to
the one who serves it. Must not know: the relay, aiohttp, sessions; they come in as callables.

    Acceptor -> Door.accept(sock, peer) -> ClientConnection -> Door.handler(conn, request)
                                                                 |- Relay     -> serve(conn, request)
                                                                 |- Preflight -> preflight(request)
                                                                 '- Web       -> web(conn, request)   (handoff)

Three ways to be: serving; retiring (each answer is its connection's last, unless the next request is here already;
idle connections are somebody else's soon); draining (each answer is the last; idle connections close, soon or now).

Invariants: a connection is in `connections` from accept to close, also while streamed or handed on; the scratch buffer
is valid only inside one readiness callback.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from proxyd.clock import Clock
from proxyd.errors import Refusal
from proxyd.front import replies, routes
from proxyd.front.connection import ClientConnection
from proxyd.front.proxies import UNIX_PEER, Proxies
from proxyd.front.request import Request
from proxyd.front.states import State
from proxyd.front.wheel import Wheel
from proxyd.log import Log
from proxyd.wire.head import Headers, RequestHead

__all__ = ["SCRATCH_BYTES", "Answered", "Door", "FrontSettings"]

# One recv takes at most this much before the next socket has its turn: a whole prompt in most cases. Half doubles the
# calls for long prompts, twice gives an uploading client a longer turn.
SCRATCH_BYTES = 64 * 1024
# Requests in one turn of the loop from connections whose last one had no valid session. 0.15 ms each: half gives a
# page that reloads its token with many connections at once a longer wait, twice lets a flood of forged tokens add twice
# as much to each turn of all others.
SUSPECTS_A_TURN = 4


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """The part of the configuration that the front reads. Times in seconds, sizes in bytes."""

    max_head: int
    max_body: int
    head_timeout: float
    body_timeout: float
    keepalive: float
    send_timeout: float
    """How long a client may take nothing of a complete answer (`stream.slow_client_timeout`)."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One request that the front or the web application answered, for the access log and the metrics.

    `route` has few values ("web", "front" or a relay route's path), `path` is what the client sent ("" if unreadable).
    """

    request_id: str
    route: str
    method: str
    path: str
    status: int
    peer: str
    bytes_sent: int
    duration_s: float
    cause: str = ""
    """Why it was refused, in a word; "" for one that was not."""
    detail: str = ""


Serve = Callable[[ClientConnection, Request], None]


def _no_cors(headers: Headers) -> Headers:
    return []


def _no_record(answered: Answered) -> None:
    return None


class Door:
    """The worker's front: it makes connections out of sockets and sends their requests on."""

    __slots__ = (
        "_date",
        "_date_second",
        "_preflight",
        "_serve",
        "_suspects",
        "_web",
        "clock",
        "closes_idle",
        "connections",
        "cors",
        "draining",
        "log",
        "loop",
        "on_idle",
        "proxies",
        "record",
        "scratch",
        "settings",
        "wheel",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        wheel: Wheel,
        log: Log,
        settings: FrontSettings,
        proxies: Proxies,
        *,
        serve: Serve,
        web: Serve,
        preflight: Callable[[Request], Headers],
        cors: Callable[[Headers], Headers] = _no_cors,
        record: Callable[[Answered], None] = _no_record,
    ) -> None:
        """serve: a relay route's request; web: everything else (`Handoff.give`); preflight: the headers of a 204, or it
        raises Refusal; cors: headers that let a page read our refusals. None of them may block; each answers through
        the connection, now or later. The owner ticks `wheel`."""
        self.loop = loop
        self.clock = clock
        self.wheel = wheel
        self.log = log
        self.settings = settings
        self.proxies = proxies
        self.cors = cors
        self.record = record
        self.draining = False
        self.closes_idle = False
        self.on_idle: Callable[[ClientConnection], None] | None = None
        self.connections: set[ClientConnection] = set()
        self.scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._serve = serve
        self._web = web
        self._preflight = preflight
        self._date = b""
        self._date_second = -1
        self._suspects = 0

    def accept(self, sock: socket.socket, address: object, *, is_kept: bool = False) -> None:
        """Takes a non-blocking accepted socket, with its address as accept() gave it. `is_kept`: it comes from another
        worker, which had answered on it."""
        peer = str(address[0]) if isinstance(address, tuple) else UNIX_PEER
        self.connections.add(ClientConnection(self, sock, peer, is_kept=is_kept))

    def handler(self, conn: ClientConnection, request: Request) -> None:
        """Sends a complete request to whoever serves it. Raises Refusal."""
        decision = routes.decide_route(request.head.method, request.head.path)
        if isinstance(decision, routes.Relay):
            self._serve(conn, request)
        elif isinstance(decision, routes.Web):
            self._web(conn, request)
        else:
            conn.reply(204, self._preflight(request), b"")
            self.record_answer(conn, request.head, 204, request.request_id)

    def has_room_for_suspect(self) -> bool:
        """Whether one more of SUSPECTS_A_TURN may be served in this turn of the loop; if so, it was counted."""
        if self._suspects >= SUSPECTS_A_TURN:
            return False
        if not self._suspects:
            self.loop.call_soon(self._end_turn)
        self._suspects += 1
        return True

    def _end_turn(self) -> None:
        self._suspects = 0

    def check(self, head: RequestHead) -> None:
        """Refuses, before its body is read, what no body could make right. Raises Refusal."""
        routes.decide_route(head.method, head.path)

    def keeps_alive(self, *, has_input: bool = False) -> bool:
        """Whether a connection may stay after an answer. `has_input`: its next request is here, at least in part, and
        a worker that retires answers that one, too."""
        if self.draining or self.settings.keepalive <= 0:
            return False
        return self.on_idle is None or has_input

    def retire(self, on_idle: Callable[[ClientConnection], None]) -> None:
        """From now on every answer is its connection's last, and `on_idle` is told which one becomes idle all the
        same, because its answer had announced so."""
        self.on_idle = on_idle

    def drain(self, *, fresh_only: bool = False) -> None:
        """From now on every answer is its connection's last; idle connections close at once. `fresh_only`: those that
        never had a request, alone; one that is kept may still ask, and is told that the node leaves."""
        self.draining = True
        self.closes_idle = self.closes_idle or not fresh_only
        for conn in list(self.connections):
            if not (fresh_only and conn.served):
                conn.drain()

    def close(self) -> None:
        """Resets every connection that is ours; streamed and handed ones are ended by who owns them."""
        for conn in list(self.connections):
            if conn.state not in (State.STREAMING, State.HANDED):
                conn.abort()

    def forget(self, conn: ClientConnection) -> None:
        """The connection closed."""
        self.connections.discard(conn)

    def count(self, state: State) -> int:
        """How many connections are in `state`. Cost: one pass; for status."""
        return sum(conn.state is state for conn in self.connections)

    def date(self) -> bytes:
        """The `Date` of this second."""
        second = int(self.clock.wall())
        if second != self._date_second:
            self._date_second = second
            self._date = replies.http_date(second)
        return self._date

    def record_refusal(
        self, conn: ClientConnection, head: RequestHead | None, refusal: Refusal, request_id: str
    ) -> None:
        """Reports an answer of the front's own that refused something."""
        self.record_answer(conn, head, refusal.status, request_id, refusal.cause, refusal.detail)

    def record_answer(
        self,
        conn: ClientConnection,
        head: RequestHead | None,
        status: int,
        request_id: str,
        cause: str = "",
        detail: str = "",
    ) -> None:
        """Reports an answer that the front itself gave."""
        self.record(
            Answered(
                request_id=request_id,
                route="front",
                method=head.method if head is not None else "",
                path=head.path if head is not None else "",
                status=status,
                peer=conn.identity.peer,
                bytes_sent=conn.answered_bytes,
                duration_s=0.0,
                cause=cause,
                detail=detail,
            )
        )
