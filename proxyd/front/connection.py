"""One client connection: one request at a time, no task and no future of its own.

Owns: when a request is read, served and answered; keep-alive, pipelining, the reading deadlines, the polite end of a
refused request. Must not know: routes, sessions, upstreams; the handler has those.

Invariants
- The next request of a pipelined sequence is looked at only when the answer before it is written completely.
- After an answer that closes, nothing more is parsed.
- What an answer announced is kept: an answer that says close is the last one, one that does not is followed by an idle
  connection. Only a node that ends closes those; a worker that retires offers them to its successors.
- Bounds: input as in `request`, output one answer, a deadline in every state that waits for the peer.
- While SERVING an end of the client's input counts as the client gone, as it does for nginx.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from proxyd.dialects.errors import error_body, is_anthropic
from proxyd.errors import Refusal
from proxyd.front import replies
from proxyd.front.channel import Channel
from proxyd.front.proxies import Identity, identify
from proxyd.front.request import Request, RequestReader, choose_request_id
from proxyd.front.states import State
from proxyd.front.wheel import NEVER
from proxyd.ids import new_request_id
from proxyd.wire.head import Headers, RequestHead

if TYPE_CHECKING:
    from proxyd.front.door import Door

__all__ = ["PIPELINE_TURN", "ClientConnection"]

# Requests answered in a row on one connection before others get their turn.
PIPELINE_TURN = 8

# A client that leaves stops its upstream within 100 ms, also one that pipelined more than we read. Few do: half would
# be as good, twice too late.
END_LOOK_S = 0.05

# Who was answered so was nobody we know: his next request comes after those of others.
_SUSPECT = frozenset((401, 403))
_READING = frozenset((State.IDLE, State.HEAD, State.BODY))


class ClientConnection(Channel):
    """What the door makes of an accepted socket, and what handlers answer through."""

    __slots__ = (
        "_advancing",
        "_door",
        "_head",
        "_is_suspect",
        "_keep",
        "_reader",
        "_trusted",
        "answered_bytes",
        "identity",
        "on_gone",
        "peer",
        "request_id",
        "served",
    )

    def __init__(self, door: Door, sock: socket.socket, peer: str, *, is_kept: bool = False) -> None:
        """Takes the non-blocking `sock`; `peer` is the address it was accepted from, or "unix". `is_kept`: another
        worker had it, so it is idle as after an answer."""
        super().__init__(door, sock, door.settings.send_timeout)
        self._door = door
        self.peer = peer
        self._trusted = door.proxies.trusts(peer)
        self.identity = Identity(peer, self._trusted, False)
        self.on_gone: Callable[[], None] | None = None
        self.request_id = ""
        self.served = 1 if is_kept else 0
        self.answered_bytes = 0
        self._reader = RequestReader(door.settings.max_head, door.settings.max_body)
        self._head: RequestHead | None = None
        self._keep = True
        self._is_suspect = False
        self._advancing = False
        # Without keep-alive what another worker gives away is a connection that never had its request.
        settings = door.settings
        self._arm(max(settings.keepalive, settings.head_timeout) if is_kept else settings.head_timeout)
        self._watch(True)

    # -- what handlers use ---------------------------------------------------------------------------------------

    def reply(self, status: int, headers: Headers, body: bytes, *, close: bool = False) -> None:
        """Answers the request being served, completely. A client that is gone makes this a no-op."""
        if self.state is not State.CLOSED:
            self._is_suspect = False
            self._answer(status, headers, body, close)

    def refuse(self, refusal: Refusal, extra: Headers | None = None) -> None:
        """Answers the request being served with an error in the shape of its route; `extra` are headers (CORS, say)."""
        if self.state is not State.CLOSED:
            headers, body = self._error(refusal)
            self._is_suspect = refusal.status in _SUSPECT
            self._answer(refusal.status, headers + (extra or []), body, refusal.close)

    def begin_stream(self) -> int:
        """Gives the descriptor's readiness to the relay and returns it. ConnectionResetError: the client is gone."""
        if self.state is State.CLOSED:
            raise ConnectionResetError("the client is gone")
        self._become(State.STREAMING)
        self._is_suspect = False
        self._watch(False)
        self.on_gone = None
        if self._head is not None:
            # A stream lasts for minutes: 3 KB of headers, the token among them, are not kept that long.
            self._head = replace(self._head, headers=[])
        return self.fd

    def end_stream(self, keep_alive: bool, leftover: bytes = b"") -> None:
        """Takes the descriptor back from the relay, which has unregistered it.

        keep_alive: the answer was complete and announced that the connection stays. `leftover` is what the relay read
        of the client meanwhile. Without keep_alive the client reads what was sent, then the end of the connection.
        """
        if self.state is State.CLOSED:
            return
        if leftover:
            self._reader.feed(leftover)
        self._keep = self._keep and keep_alive
        self._on_written()

    def begin_handover(self) -> tuple[socket.socket, bytes]:
        """Gives the socket itself away for the request being served, with the pipelined bytes behind that request."""
        if self.state is State.CLOSED or self.sock is None:
            raise ConnectionResetError("the client is gone")
        self._become(State.HANDED)
        self._watch(False)
        sock, self.sock, self.fd = self.sock, None, -1
        kept = bytes(self._reader.pending)
        self._reader.clear()
        return sock, kept

    def take_back(self, sock: socket.socket, kept: bytes) -> None:
        """Goes on with a handed connection: the answer is complete and keep-alive holds; `kept` came meanwhile."""
        if self.state is State.CLOSED:
            sock.close()
            return
        self.sock, self.fd = sock, sock.fileno()
        if kept:
            self._reader.feed(kept)
        self._on_written()

    def handover_ended(self) -> None:
        """The handed connection ended elsewhere."""
        self._close()

    @property
    def may_keep_alive(self) -> bool:
        """Whether an answer to the request being served may announce that the connection stays."""
        return self._keep and self._door.keeps_alive(has_input=bool(self._reader.pending))

    @property
    def date(self) -> bytes:
        """The `Date` of an answer that begins now."""
        return self._door.date()

    # -- what the door and the wheel use -------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether nothing of a request is here. What may lie in the kernel's buffer goes wherever the socket goes."""
        return self.state is State.IDLE and not self._reader.pending

    def drain(self) -> None:
        """The worker is leaving: an idle connection closes now, others after their answer (`Door.draining`)."""
        if self.is_idle:
            self._close()

    def offer(self, give: Callable[[socket.socket], bool]) -> bool:
        """Gives an idle connection away for good: `give` duplicates the socket to where it goes on. False, and
        everything is as before: it is not idle, or `give` could not."""
        if not self.is_idle or self.sock is None or not give(self.sock):
            return False
        self._close()
        return True

    def on_deadline(self, now: float) -> None:
        """What the deadline means depends on the state alone."""
        match self.state:
            case State.HEAD:
                self._refuse_reading(Refusal(408, "request_timeout", "The request head took too long.", close=True))
            case State.BODY:
                self._refuse_reading(Refusal(408, "request_timeout", "The request body took too long.", close=True))
            case State.REPLYING:
                self.abort()
            case _:
                self._close()

    # -- reading -------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        # Not read is not forgotten: the loop says it again in its next turn.
        if not (self._is_suspect and self.state is State.IDLE) or self._door.has_room_for_suspect():
            super()._on_readable()

    def _on_input(self, data: bytes) -> None:
        self._reader.feed(data)
        if self.state in _READING:
            self._advance()
        elif self._reader.is_full():
            # Enough of the next requests; the kernel's buffer holds the rest and the client waits. Its end lies behind
            # those bytes, where no read comes to it: it is looked for.
            self._watch(False)
            self._look_for_end()

    def _look_for_end(self) -> None:
        """Every END_LOOK_S while a request is served and its client's input is not read: is the client still there?"""
        if self.state is not State.SERVING or self._reading:
            return
        look = select.poll()
        look.register(self.fd, select.POLLRDHUP)
        if look.poll(0):
            self._on_end()
        else:
            self._owner.loop.call_later(END_LOOK_S, self._look_for_end)

    def _on_end(self) -> None:
        """The client sent its last byte, or is gone altogether."""
        if self.state is State.SERVING:
            on_gone = self.on_gone
            self._close()
            if on_gone is not None:
                on_gone()
        elif self.state is State.REPLYING:
            # The answer is made and on its way; there will be no other.
            self._keep = False
            self._watch(False)
        else:
            self._close()

    def _advance(self) -> None:
        """Reads requests out of the input until one is being served, more bytes are needed, or the turn is over."""
        if self._advancing:
            return
        self._advancing = True
        try:
            for _ in range(PIPELINE_TURN):
                if self.state not in _READING or not self._read_one():
                    return
        finally:
            self._advancing = False
        if self.state in _READING and self._reader.pending:
            self._owner.loop.call_soon(self._advance)

    def _read_one(self) -> bool:
        """One step of reading. False: waits for bytes. A Refusal here is answered here."""
        try:
            if self.state is not State.BODY:
                head = self._reader.take_head()
                if head is None:
                    self._await_head()
                    return False
                self._begin(head)
            body = self._reader.take_body()
            if body is None:
                self._await_body()
                return False
        except Refusal as refusal:
            self._refuse_reading(refusal)
            return True
        self._serve(body)
        return True

    def _await_head(self) -> None:
        if self._reader.pending and self.state is State.IDLE:
            # A fresh connection's clock has run since it was accepted.
            if self.served:
                self._arm(self._door.settings.head_timeout)
            self._become(State.HEAD)

    def _begin(self, head: RequestHead) -> None:
        self._head = head
        self._keep = head.keep_alive
        self.identity = identify(self.peer, self._trusted, head.headers, self._door.proxies)
        self.request_id = choose_request_id(head, self._trusted)
        self.served += 1
        self._reader.begin_body(head)
        self._door.check(head)

    def _await_body(self) -> None:
        """The whole body has body_timeout: between reads, it would let one byte every 29 s hold 8 MiB for years. The
        nginx in front collects slow uploads before it asks us."""
        if self.state is not State.BODY:
            self._become(State.BODY)
            self._arm(self._door.settings.body_timeout)
            asked = self._head is not None and self._head.expect_continue
            if asked and not self._reader.has_begun_body() and not self._send_now(replies.CONTINUE):
                self._close()

    def _serve(self, body: bytes) -> None:
        door, head, identity = self._door, self._head, self.identity
        assert head is not None, "_begin() came first"
        self._become(State.SERVING)
        self._arm(NEVER)
        received_at = door.clock.monotonic()
        request = Request(
            head, body, self.request_id, identity.peer, identity.trusted, identity.secure, received_at
        )
        try:
            door.handler(self, request)
        except Refusal as refusal:
            self.refuse(refusal)
            door.record_refusal(self, head, refusal, request.request_id)
        except Exception as error:  # noqa: BLE001 - here one request ends, not the worker
            door.log.error("handler_failed", request_id=request.request_id, error=repr(error))
            if self.state is State.SERVING:
                failure = Refusal(500, "internal_error", "The request could not be served.", close=True)
                self.refuse(failure)
                door.record_refusal(self, head, failure, request.request_id)
            else:
                self._close()
        if self.state is State.SERVING:
            self._watch_anew()

    # -- answering -----------------------------------------------------------------------------------------------

    def _refuse_reading(self, refusal: Refusal) -> None:
        """Answers what could not become a request. What the client still sends of it is not looked at."""
        head = self._head
        if head is None:
            self.request_id = new_request_id()
        # A refused request whose body is here already leaves the connection in order.
        close = refusal.close or head is None or not self._reader.is_body_here()
        cors = self._door.cors(head.headers) if head is not None else []
        request_id = self.request_id
        headers, body = self._error(refusal)
        self._answer(refusal.status, headers + cors, body, close)
        self._door.record_refusal(self, head, refusal, request_id)

    def _error(self, refusal: Refusal) -> tuple[Headers, bytes]:
        """Headers and body of an error, where the route's SDKs look for its parts."""
        path = self._head.path if self._head is not None else ""
        headers = replies.refusal_headers(refusal, anthropic_id=self.request_id if is_anthropic(path) else None)
        return headers, error_body(path, refusal, self.request_id)

    def _answer(self, status: int, headers: Headers, body: bytes, close: bool) -> None:
        head = self._head
        self._become(State.REPLYING)
        self.on_gone = None
        self._keep = not close and self.may_keep_alive
        if not self._keep:
            self._reader.clear()
        data = replies.reply_bytes(
            status,
            headers,
            body,
            request_id=self.request_id,
            version=head.version if head is not None else (1, 1),
            keep_alive=self._keep,
            date=self._door.date(),
            head_only=head is not None and head.method == "HEAD",
        )
        self.answered_bytes = len(data)
        self._write(data)

    def _on_written(self) -> None:
        if self._keep and not self._door.closes_idle:
            self._go_idle()
        else:
            self._linger()

    def _go_idle(self) -> None:
        self._become(State.IDLE)
        self._head = None
        self.request_id = ""
        self.on_gone = None
        self._keep = True
        self._arm(self._door.settings.keepalive)
        self._watch(True)
        if self._reader.pending and not self._advancing:
            # Not from here: the caller may be a handler in the middle of its own work.
            self._owner.loop.call_soon(self._advance)
        elif self._door.on_idle is not None:
            self._owner.loop.call_soon(self._door.on_idle, self)

    def _on_closed(self) -> None:
        """Lingering or closed: nothing of the request is kept."""
        self._reader.clear()
        self._head = None
        self.on_gone = None
        if self.state is State.CLOSED:
            self._door.forget(self)
