"""Gives a connection to the web application for one request, and takes it back.

Owns: the way there (descriptor, the request's bytes) and the way back (a duplicate of the descriptor, what the client
sent meanwhile). Must not know: aiohttp. The protocol comes from a factory that the worker passes in.

    ClientConnection          Handoff                      protocol (web.handed)
    begin_handover() ---> connect_accepted_socket() ---> connection_made
                          feed_request(head + body) ---> ... answers ...
    take_back(dup, kept) <------- on_end(dup, kept) ---- connection_lost, its own descriptor is closed by then

nginx mixes relay and web requests on one upstream connection, so a connection that went away for good with its first
web request would answer the next relay request from the wrong server.

Invariants
- The web side sees exactly one complete request, framed by our strict reader: its body has a Content-Length whatever
  the client used, `Expect` was answered already, and nothing that follows reaches it. Only for a WebSocket does it read
  the socket's own bytes.
- Every handed connection ends in exactly one of take_back() and handover_ended().
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from proxyd.front.connection import ClientConnection
from proxyd.front.request import Request
from proxyd.log import Log
from proxyd.wire.head import Headers, build_request_head

__all__ = ["HandedProtocol", "Handoff", "OnEnd", "ProtocolFactory", "is_websocket", "rebuild"]

OnEnd = Callable[[socket.socket | None, bytes], None]

_NOT_PASSED = frozenset((
    b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"content-length", b"te", b"trailer",
    b"upgrade", b"expect",
))


class HandedProtocol(Protocol):
    """What Handoff needs of the web side's protocol, beside being an asyncio.Protocol."""

    def feed_request(self, data: bytes) -> None:
        """The one request, after connection_made(); a no-op when the connection was lost meanwhile."""


# (request, may keep alive, pipelined bytes, on_end) -> protocol
ProtocolFactory = Callable[[Request, bool, bytes, OnEnd], HandedProtocol]


class Handoff:
    """The passage of one worker."""

    __slots__ = ("_factory", "_log", "_loop", "_tasks")

    def __init__(self, loop: asyncio.AbstractEventLoop, factory: ProtocolFactory, log: Log) -> None:
        self._loop = loop
        self._factory = factory
        self._log = log
        self._tasks: set[asyncio.Task[None]] = set()

    def give(self, conn: ClientConnection, request: Request) -> None:
        """Hands `conn` over for `request`. Costs a task until the transport exists, then none of ours."""
        may_keep = conn.may_keep_alive
        sock, kept = conn.begin_handover()

        def on_end(descriptor: socket.socket | None, rest: bytes) -> None:
            # Not from inside the transport's own teardown: libuv lets go of its descriptor after this callback.
            self._loop.call_soon(_come_back, conn, descriptor, rest)

        protocol = self._factory(request, may_keep, kept, on_end)
        task = self._loop.create_task(self._pass_on(conn, request, may_keep, sock, protocol))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, conn: ClientConnection, request: Request, may_keep: bool, sock: socket.socket, protocol: HandedProtocol
    ) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, sock)  # type: ignore[type-var]
        except OSError as error:
            # The peer reset it between two callbacks of ours.
            self._log.debug("handover_failed", request_id=request.request_id, error=str(error))
            sock.close()
            conn.handover_ended()
            return
        protocol.feed_request(rebuild(request, may_keep))


def _come_back(conn: ClientConnection, descriptor: socket.socket | None, rest: bytes) -> None:
    if descriptor is None:
        conn.handover_ended()
    else:
        conn.take_back(descriptor, rest)


def is_websocket(request: Request) -> bool:
    """Whether the request asks for a WebSocket; other upgrades (h2c, say) are ignored (RFC 9110 section 7.8)."""
    return request.head.upgrade and (request.head.get(b"upgrade") or b"").lower() == b"websocket"


def rebuild(request: Request, may_keep: bool) -> bytes:
    """The request as one message with a length: the same method, target, version and end-to-end headers."""
    head = request.head
    headers: Headers = [(name, value) for name, value in head.headers if name not in _NOT_PASSED]
    if is_websocket(request):
        headers += [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
    elif not may_keep:
        headers.append((b"connection", b"close"))
    elif head.version == (1, 0):
        headers.append((b"connection", b"keep-alive"))
    if request.body or head.chunked or head.content_length is not None:
        headers.append((b"content-length", b"%d" % len(request.body)))
    data = build_request_head(head.method, head.target, headers)
    if head.version == (1, 0):
        # build_request_head() writes our own version; the answer must suit the client's.
        data = data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", 1)
    return data + request.body
