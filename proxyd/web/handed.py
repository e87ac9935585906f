"""aiohttp's protocol for one handed request, after which the connection goes back.

Owns: where aiohttp's RequestHandler is let in and out. Must not know: routes, sessions, what the front does next.

    feed_request()  the request, complete                       -> aiohttp parses, the handler answers
    data_received() what the client sends meanwhile             -> kept back (after a WebSocket upgrade: aiohttp's)
    finish_response() the answer is written and keep-alive holds -> duplicate the descriptor, let aiohttp close its own
    connection_lost() the transport flushed and let go          -> on_end(duplicate or None, kept)

Closing a transport closes its descriptor without shutdown(2), so the duplicate keeps the connection; what the transport
still had to write was written before connection_lost(None).

Leans on aiohttp 3.14's RequestHandler (`start()`, `finish_response()`, `_close`, `_upgraded`), which is why the version
is pinned to its minor; tests/unit/web and tests/daemon notice when it moves.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from proxyd.front.handoff import OnEnd, is_websocket
from proxyd.front.request import Request
from proxyd.wire.head import MAX_HEADERS

__all__ = ["KEEP_LIMIT_BYTES", "HandedRequestHandler"]

# What a client may send behind the request being answered. uvloop reads up to 256 KB before a pause takes effect;
# beyond this the connection is closed after its answer instead of being taken back.
KEEP_LIMIT_BYTES = 512 * 1024


class HandedRequestHandler(RequestHandler):
    """One request on a borrowed connection."""

    __slots__ = ("_duplicate", "_is_upgrade", "_kept", "_may_keep", "_on_end", "front")

    def __init__(
        self,
        manager: web.Server,
        loop: asyncio.AbstractEventLoop,
        request: Request,
        may_keep: bool,
        kept: bytes,
        on_end: OnEnd,
        max_head: int,
    ) -> None:
        # Our reader has judged the head already: aiohttp's own limits must not be the tighter ones.
        super().__init__(
            manager,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]
            tcp_keepalive=False,
            keepalive_timeout=0,
            max_line_size=max_head,
            max_field_size=max_head,
            max_headers=MAX_HEADERS + 4,
            lingering_time=0,
            auto_decompress=False,
        )
        self.front = request
        self._is_upgrade = is_websocket(request)
        self._may_keep = may_keep and not self._is_upgrade
        self._kept = bytearray(kept)
        self._on_end: OnEnd | None = on_end
        self._duplicate: socket.socket | None = None

    def feed_request(self, data: bytes) -> None:
        """The one request. A no-op when the connection was lost already."""
        if self.transport is None:
            return
        super().data_received(data)
        if self._is_upgrade and self._kept:
            # Frames sent ahead of our 101; aiohttp keeps them until the upgrade is accepted.
            tail, self._kept = bytes(self._kept), bytearray()
            super().data_received(tail)

    def data_received(self, data: bytes) -> None:
        """Bytes from the socket, and aiohttp's own b"" that means: go on parsing what you hold."""
        if not data or self._is_upgrade:
            super().data_received(data)
            return
        self._kept += data
        if len(self._kept) >= KEEP_LIMIT_BYTES:
            self._may_keep = False
            self._pause_transport_reading()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Writes the answer; then, if it announced keep-alive, begins the way back."""
        if self._is_upgrade and self._payload_parser is None:
            # Declined: what follows would be parsed as requests of this protocol, which has not our routes.
            self._message_tail = b""
        if isinstance(resp, web.StreamResponse) and not resp.prepared and not self._can_return(request):
            resp.force_close()
        resp, reset = await super().finish_response(request, resp, start_time)
        if not reset and resp.keep_alive and self._can_return(request):
            self._begin_return()
        return resp, reset

    def connection_lost(self, exc: BaseException | None) -> None:
        """The transport is done with its descriptor, or the peer is gone."""
        if self._messages and not self._request_in_progress and self._task_handler is not None:
            # Parsed but not begun: start() would wake up to a request without the factory that super() takes away.
            self._task_handler.cancel()
        super().connection_lost(exc)
        duplicate, self._duplicate = self._duplicate, None
        on_end, self._on_end = self._on_end, None
        if duplicate is not None and (exc is not None or not self._may_keep):
            duplicate.close()
            duplicate = None
        if on_end is not None:
            on_end(duplicate, bytes(self._kept))

    def _can_return(self, request: web.BaseRequest) -> bool:
        # A body that the handler left unread sits half parsed in aiohttp's flow control: such a connection is closed.
        return self._may_keep and (request._payload is None or request._payload.is_eof())

    def _begin_return(self) -> None:
        transport: Any = self.transport
        if transport is None or transport.is_closing():
            return
        original = transport.get_extra_info("socket")
        self._duplicate = socket.socket(
            original.family, original.type, original.proto, fileno=os.dup(original.fileno())
        )
        self._duplicate.setblocking(False)
        # Ends aiohttp's request loop, which then closes its transport as it does after any last request.
        self.close()
