"""One client connection: a raw socket, one request at a time, no task and no future of its own.

Owns: the socket's readiness (except while STREAMING and HANDED), the deadlines of reading and replying, keep-alive and
pipelining, and the polite end of a refused request. Must not know: routes, sessions, upstreams; the handler has those.

Invariants
- The states and their moves are the table in `states`; `_become()` is the only writer of `state`.
- The next request of a pipelined sequence is looked at only when the answer before it is written completely.
- After an answer that closes, nothing more is parsed.
- One bounded recv a readiness; what it brings is copied out of the worker's scratch buffer only to be kept.
- Bounds: input as in `request`; output one answer; deadlines in every state that waits for the peer.
- While SERVING an end of the client's input counts as the client gone, as it does for nginx.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from proxyd.dialects.errors import error_body
from proxyd.errors import Refusal
from proxyd.front import replies
from proxyd.front.proxies import Identity, identify
from proxyd.front.request import Request, RequestReader
from proxyd.front.states import State, check_edge
from proxyd.front.wheel import NEVER, NOT_PARKED
from proxyd.ids import is_request_id, new_request_id
from proxyd.wire.head import Headers, RequestHead

if TYPE_CHECKING:
    from proxyd.front.door import Door

__all__ = ["BODY_TOTAL_FACTOR", "LINGER_BYTES", "LINGER_IDLE_S", "LINGER_TOTAL_S", "ClientConnection"]

# A body may take this many body_timeouts in all. body_timeout alone lets one byte every 29 s hold 8 MiB for seven years.
# At 10 and 30 s, 8 MiB need 28 KB/s; half would cut people on poor lines, twice only feeds the slow-body game.
BODY_TOTAL_FACTOR = 10

# nginx lingers 5 s between reads, 30 s in all. A client that still writes reads our answer within a round trip.
LINGER_IDLE_S = 2.0
LINGER_TOTAL_S = 10.0
# Enough for every client that sends the whole of a body four times max_body before it reads; then it gets its RST.
LINGER_BYTES = 32 * 1024 * 1024

# Requests answered in a row on one connection before others get their turn.
PIPELINE_TURN = 8

_READING = frozenset((State.IDLE, State.HEAD, State.BODY))
_WATCHING = frozenset((State.SERVING, State.REPLYING))


class ClientConnection:
    """What the door makes of an accepted socket, and what handlers answer through."""

    __slots__ = (
        "_advancing",
        "_bound_s",
        "_door",
        "_head",
        "_keep",
        "_lingered_bytes",
        "_out",
        "_reader",
        "_reading",
        "_trusted",
        "_writing",
        "answered_bytes",
        "deadline",
        "fd",
        "identity",
        "on_gone",
        "parked",
        "peer",
        "request_id",
        "served",
        "sock",
        "state",
    )

    def __init__(self, door: Door, sock: socket.socket, peer: str) -> None:
        """Takes the non-blocking `sock`; `peer` is the address it was accepted from, or "unix"."""
        self._door = door
        self.sock: socket.socket | None = sock
        self.fd = sock.fileno()
        self.peer = peer
        self._trusted = door.proxies.trusts(peer)
        self.identity = Identity(peer, self._trusted, False)
        self.state = State.IDLE
        self.deadline = NEVER
        self.parked = NOT_PARKED
        self.served = 0
        self.answered_bytes = 0
        self.on_gone: Callable[[], None] | None = None
        self.request_id = ""
        self._reader = RequestReader(door.settings.max_head, door.settings.max_body)
        self._head: RequestHead | None = None
        self._out: memoryview | None = None
        self._keep = True
        self._advancing = False
        self._reading = False
        self._writing = False
        self._lingered_bytes = 0
        self._bound_s = NEVER
        door.wheel.add(self, door.clock.monotonic() + door.settings.head_timeout)
        self._watch(True)

    # -- what handlers use ---------------------------------------------------------------------------------------

    def reply(self, status: int, headers: Headers, body: bytes, *, close: bool = False) -> None:
        """Answers the request being served, completely. A client that is gone makes this a no-op."""
        if self.state is State.CLOSED:
            return
        self._answer(status, headers, body, close)

    def refuse(self, refusal: Refusal, extra: Headers | None = None) -> None:
        """Answers the request being served with an error in the shape of its route; `extra` are headers (CORS, say)."""
        if self.state is State.CLOSED:
            return
        self._answer(refusal.status, _refusal_headers(refusal) + (extra or []), self._error_body(refusal), refusal.close)

    def begin_stream(self) -> int:
        """Gives the descriptor's readiness to the relay; returns it. Raises ConnectionResetError if the client is gone."""
        if self.state is State.CLOSED:
            raise ConnectionResetError("the client is gone")
        self._become(State.STREAMING)
        self._watch(False)
        self.on_gone = None
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
        if keep_alive and self._may_keep():
            self._go_idle()
        else:
            self._linger()

    def abort(self) -> None:
        """Closes at once, with a reset: what the client did not take is dropped. From any state."""
        if self.state is State.CLOSED:
            return
        if self.sock is not None:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            except OSError:
                # Already reset by the peer: what we want.
                pass
        self._close()

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
        if not self._may_keep():
            self._close()
            return
        self._go_idle()

    def handover_ended(self) -> None:
        """The handed connection ended elsewhere."""
        self._close()

    @property
    def may_keep_alive(self) -> bool:
        """Whether an answer to the request being served may announce that the connection stays."""
        return self._may_keep()

    # -- what the door uses --------------------------------------------------------------------------------------

    def drain(self) -> None:
        """The worker is leaving: an idle connection closes now, others after their answer (`Door.draining`)."""
        if self.state is State.IDLE and not self._reader.pending:
            self._close()

    def on_deadline(self, now: float) -> None:
        """The wheel's callback: what the deadline means depends on the state alone."""
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
        sock = self.sock
        if sock is None:
            return
        scratch = self._door.scratch
        try:
            count = sock.recv_into(scratch)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._on_end()
            return
        if not count:
            self._on_end()
            return
        if self.state is State.LINGERING:
            self._discard(count)
            return
        self._reader.feed(bytes(scratch[:count]))
        if self.state in _READING:
            self._advance()
        elif self._reader.is_full():
            # Enough of the next requests; the kernel's buffer holds the rest and the client waits.
            self._watch(False)

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
            self._door.loop.call_soon(self._advance)

    def _read_one(self) -> bool:
        """One step of reading. False: waits for bytes or for the handler. A Refusal here is answered here."""
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
                self._door.wheel.add(self, self._door.clock.monotonic() + self._door.settings.head_timeout)
            self._become(State.HEAD)

    def _begin(self, head: RequestHead) -> None:
        self._head = head
        self._keep = head.keep_alive
        self.identity = identify(self.peer, self._trusted, head.headers, self._door.proxies)
        self.request_id = self._choose_id(head)
        self._bound_s = NEVER
        self._reader.begin_body(head)
        self._door.check(head)

    def _await_body(self) -> None:
        door = self._door
        now = door.clock.monotonic()
        if self.state is not State.BODY:
            self._become(State.BODY)
            self._bound_s = now + door.settings.body_timeout * BODY_TOTAL_FACTOR
            assert self._head is not None
            if self._head.expect_continue and not self._reader.has_begun_body():
                self._send_continue()
                if self.state is not State.BODY:
                    return
        door.wheel.add(self, min(now + door.settings.body_timeout, self._bound_s))

    def _send_continue(self) -> None:
        assert self.sock is not None
        try:
            sent = self.sock.send(replies.CONTINUE)
        except OSError:
            sent = 0
        if sent != len(replies.CONTINUE):
            # Nothing of ours is unread by this client, so 25 bytes always fit: it is gone, or has no window at all.
            self._close()

    def _serve(self, body: bytes) -> None:
        door = self._door
        head, identity = self._head, self.identity
        assert head is not None
        self._become(State.SERVING)
        door.wheel.add(self, NEVER)
        self.served += 1
        request = Request(
            head,
            body,
            self.request_id,
            identity.peer,
            identity.trusted,
            identity.secure,
            door.clock.monotonic(),
        )
        try:
            door.handler(self, request)
        except Refusal as refusal:
            self.refuse(refusal)
            door.record_refusal(self, head, refusal.status)
        except Exception as error:
            door.log.error("handler_failed", request_id=self.request_id, error=repr(error))
            if self.state is State.SERVING:
                self.refuse(Refusal(500, "internal_error", "The request could not be served.", close=True))
                door.record_refusal(self, head, 500)
            else:
                self._close()

    def _choose_id(self, head: RequestHead) -> str:
        if self._trusted:
            given = head.get(b"x-request-id")
            if given is not None and is_request_id(given):
                return given.decode("ascii")
        return new_request_id()

    # -- answering -----------------------------------------------------------------------------------------------

    def _refuse_reading(self, refusal: Refusal) -> None:
        """Answers what could not become a request. What the client still sends of it is not looked at."""
        head = self._head
        if head is None:
            self.request_id = new_request_id()
        # A refused request whose body is here already leaves the connection in order.
        close = refusal.close or head is None or not self._reader.is_body_here()
        cors = self._door.cors(head.headers) if head is not None else []
        self._answer(refusal.status, _refusal_headers(refusal) + cors, self._error_body(refusal), close)
        self._door.record_refusal(self, head, refusal.status)

    def _error_body(self, refusal: Refusal) -> bytes:
        path = self._head.path if self._head is not None else ""
        return error_body(path, refusal, self.request_id)

    def _answer(self, status: int, headers: Headers, body: bytes, close: bool) -> None:
        head = self._head
        self._become(State.REPLYING)
        self.on_gone = None
        self._keep = not close and self._may_keep()
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
        self._out = memoryview(data)
        self._flush()

    def _flush(self) -> None:
        sock, out = self.sock, self._out
        if sock is None or out is None:
            return
        try:
            sent = sock.send(out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._close()
            return
        if sent == len(out):
            self._out = None
            self._stop_writing()
            self._finish_reply()
            return
        self._out = out[sent:]
        self._door.wheel.add(self, self._door.clock.monotonic() + self._door.settings.send_timeout)
        if not self._writing:
            self._writing = True
            self._door.loop.add_writer(self.fd, self._flush)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._door.loop.remove_writer(self.fd)

    def _finish_reply(self) -> None:
        if self._keep and self._may_keep():
            self._go_idle()
        else:
            self._linger()

    def _may_keep(self) -> bool:
        return self._keep and self._door.keeps_alive()

    def _go_idle(self) -> None:
        self._become(State.IDLE)
        self._head = None
        self.request_id = ""
        self.on_gone = None
        self._keep = True
        self._door.wheel.add(self, self._door.clock.monotonic() + self._door.settings.keepalive)
        self._watch(True)
        if self._reader.pending:
            if self._advancing:
                return
            # Not from here: the caller may be a handler in the middle of its own work.
            self._door.loop.call_soon(self._advance)

    # -- the end -------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Half-closes and waits for the client to close. close() with unread input would send RST and destroy the answer."""
        sock = self.sock
        assert sock is not None
        self._become(State.LINGERING)
        self._reader.clear()
        self._release_request()
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()
            return
        now = self._door.clock.monotonic()
        self._bound_s = now + LINGER_TOTAL_S
        self._door.wheel.add(self, now + LINGER_IDLE_S)
        self._watch(True)

    def _discard(self, count: int) -> None:
        self._lingered_bytes += count
        if self._lingered_bytes > LINGER_BYTES:
            self._close()
            return
        self._door.wheel.add(self, min(self._door.clock.monotonic() + LINGER_IDLE_S, self._bound_s))

    def _release_request(self) -> None:
        self._head = None
        self.on_gone = None

    def _close(self) -> None:
        if self.state is State.CLOSED:
            return
        self._watch(False)
        self._stop_writing()
        self._become(State.CLOSED)
        self._out = None
        self._door.wheel.cancel(self)
        self._reader.clear()
        self._release_request()
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.fd = -1
        self._door.forget(self)

    def _become(self, state: State) -> None:
        """The one transition."""
        check_edge(self.state, state)
        self.state = state

    def _watch(self, wanted: bool) -> None:
        if wanted is self._reading:
            return
        self._reading = wanted
        if wanted:
            self._door.loop.add_reader(self.fd, self._on_readable)
        else:
            self._door.loop.remove_reader(self.fd)


_LINGER_ZERO = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")


def _refusal_headers(refusal: Refusal) -> Headers:
    extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers]
    return replies.json_headers() + extra
