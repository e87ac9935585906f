"""One connection to an origin: its states, and sending and receiving with deadlines.

Owns: the socket (plain or TLS) from the dial to its close. Must not know: the pool's rules, HTTP, who asks.
The pool's keeper gives `on_release`; the relay may use `sock`/`fd` itself between acquire and release.

    CONNECTING --> TLS_HANDSHAKE --> IDLE <--> BUSY --> LEAVING
        |                |            |          |         |
        '----------------'-----+------'----------'---------'--> CLOSED (absorbs)

LEAVING: the answer was read to its end and the peer is about to close. Who closes first keeps the port for a minute
(TIME_WAIT), so it is let go first, for a moment.

Invariants:
- Only `transition` changes `state`; the descriptor is open in every state but CLOSED.
- Nothing is registered on the descriptor but inside `send`, `recv` and `handshake` (see `readiness`), and while IDLE by
  the keeper.
- A connection is quiet (fit for the pool) only when nothing failed, nothing is half sent and nothing is left to read.
- Every wait has the caller's deadline; `send` and `recv` are not for two tasks at once.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import sys
from collections.abc import Callable
from enum import Enum, auto

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.origin import Origin
from proxyd.upstream.ports import Held
from proxyd.upstream.readiness import Readiness, Ready
from proxyd.upstream.tls import OriginTls, describe

# One read of an answer that comes while we still send. An error answer fits; what does not is read by the next recv().
EARLY_READ_BYTES = 16 * 1024
# How long the peer may take no byte of the body after it began to answer, before we take its answer for final. Half: a
# server that answers a head first and reads on slowly is cut off. Twice: a refused upload hangs for that much longer.
EARLY_ANSWER_GRACE_S = 1.0
# tcp_states.h: both ends are open, so the one that closes now has the TIME_WAIT.
_TCP_ESTABLISHED = 1
_LINGER_ZERO = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)


class State(Enum):
    CONNECTING = auto()
    TLS_HANDSHAKE = auto()
    IDLE = auto()
    BUSY = auto()
    LEAVING = auto()
    CLOSED = auto()


_EDGES: dict[State, frozenset[State]] = {
    State.CONNECTING: frozenset({State.TLS_HANDSHAKE, State.IDLE, State.CLOSED}),
    State.TLS_HANDSHAKE: frozenset({State.IDLE, State.CLOSED}),
    State.IDLE: frozenset({State.BUSY, State.CLOSED}),
    State.BUSY: frozenset({State.IDLE, State.LEAVING, State.CLOSED}),
    State.LEAVING: frozenset({State.CLOSED}),
    State.CLOSED: frozenset({State.CLOSED}),
}


def transition(old: State, new: State) -> State:
    """`new`, where the table has the edge; anything else is a bug of ours and raises."""
    if new not in _EDGES[old]:
        raise RuntimeError(f"no edge from {old.name} to {new.name}")
    return new


class Connection:
    """See the head of the file. `reused`: it has been in the pool since its dial, so the peer may have closed it
    meanwhile."""

    __slots__ = (
        "_damaged",
        "_early",
        "_eof",
        "_loop",
        "_on_release",
        "_readiness",
        "_received",
        "_sent",
        "_tls",
        "dialled_at_s",
        "fd",
        "has_ended",
        "held",
        "origin",
        "peer_closes",
        "reused",
        "sock",
        "state",
        "tls",
        "uses",
    )

    def __init__(
        self,
        origin: Origin,
        sock: socket.socket,
        loop: asyncio.AbstractEventLoop,
        *,
        dialled_at_s: float,
        on_release: Callable[[Connection, bool], None],
        tls: OriginTls | None = None,
    ) -> None:
        """Takes `sock` over: connected, non-blocking. With `tls`, `handshake` comes before anything else."""
        self.origin = origin
        self.sock: socket.socket | ssl.SSLSocket = sock
        self.fd = sock.fileno()
        self.tls = tls is not None
        self.state = State.CONNECTING
        self.reused = False
        self.uses = 0
        self.dialled_at_s = dialled_at_s
        self.held: Held | None = None  # its local port, in the keeper's books
        self.has_ended = False  # the last answer was read to its end
        self.peer_closes = False  # and the peer announced that this was the last
        self._tls = tls
        self._loop = loop
        self._on_release = on_release
        self._readiness = Readiness(loop, self.fd)
        self._early = b""  # answer bytes read while sending; recv() gives them first
        self._eof = False  # the peer's end was seen while sending
        self._damaged = False  # something failed or was left half done: never again in the pool
        self._sent = False  # a byte of the current request may have reached the peer
        self._received = False  # a byte of the current answer has come

    def __repr__(self) -> str:
        return f"<Connection {self.origin.name} fd={self.fd} {self.state.name} uses={self.uses}>"

    # -- life ------------------------------------------------------------------------------------------------------

    async def handshake(self, timeout_s: float) -> None:
        """TLS over the connected socket. Raises UpstreamError TLS, RESET or CONNECT_TIMEOUT; the caller then closes."""
        assert self._tls is not None
        self.state = transition(self.state, State.TLS_HANDSHAKE)
        deadline = self._loop.time() + timeout_s
        try:
            wrapped = self.sock = self._tls.wrap(self.sock)
            while True:
                try:
                    wrapped.do_handshake()
                    return
                except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                    await self._wait(_direction(wants), deadline, UpstreamErrorKind.CONNECT_TIMEOUT, "TLS handshake")
        except ssl.SSLError as error:
            self._tls.forget()
            raise self._error(UpstreamErrorKind.TLS, describe(error, self.origin.host)) from error
        except OSError as error:
            raise self._error(UpstreamErrorKind.RESET, f"TLS handshake: {_os_detail(error)}") from error

    def park(self) -> None:
        """Into the pool, or on its way through it to the next user."""
        self.state = transition(self.state, State.IDLE)

    def take(self) -> None:
        """Out of the pool, for one exchange."""
        self.state = transition(self.state, State.BUSY)
        self._sent = self._received = self.has_ended = False

    def leave(self) -> None:
        """Waits for the peer's close, in the keeper's hands."""
        self.state = transition(self.state, State.LEAVING)

    def is_over(self) -> bool:
        """Whether there is anything to read on a connection that is done with: the peer's end, or what nobody asked
        for. One system call, no wait."""
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                self.sock.recv(1)
            else:
                self.sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError:
            pass
        return True

    def is_quiet(self) -> bool:
        """True when nothing is left to read and the peer is still there. One system call, no wait.

        TLS: records that carry no data (session tickets, key updates) are taken in here and do not count as data.
        """
        if self._damaged or self._eof or self._early or self.state is State.CLOSED:
            return False
        try:
            if isinstance(self.sock, ssl.SSLSocket):
                if not self.sock.pending():
                    self.sock.recv(1)
            else:
                self.sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        self._damaged = True
        return False

    def release(self, reusable: bool, *, ended: bool = False) -> None:
        """Gives the connection back. `reusable` is the caller's word that the answer was read to its end and neither
        side said `close`; without it the socket is closed before this returns, or, where the answer had `ended`, when
        the peer has closed it. Only the first call counts."""
        if self.state is State.BUSY:
            self.has_ended = reusable or ended
            self.peer_closes = ended and not reusable
            self._on_release(self, reusable)

    def remember_session(self) -> None:
        """Keeps the TLS session for the origin's next dial. Late, since TLS 1.3 tickets come after the handshake."""
        if self._tls is not None and isinstance(self.sock, ssl.SSLSocket):
            self._tls.remember(self.sock)

    def close(self, abrupt: bool = False) -> bool:
        """Closes the socket; a send or recv that waits on it raises RESET. Idempotent. `abrupt`: with a reset, which
        leaves no TIME_WAIT; only where nothing that the peer has not taken is of use. True when the port stays taken
        for a TIME_WAIT."""
        if self.state is State.CLOSED:
            return False
        clean = self.state is State.IDLE and not self._damaged
        self.state = transition(self.state, State.CLOSED)
        self._readiness.interrupt(self._error(UpstreamErrorKind.RESET, "closed on our side"))
        if clean and not abrupt and isinstance(self.sock, ssl.SSLSocket):
            try:
                self.sock.unwrap()  # sends close_notify; the peer's answer is not waited for
            except (OSError, ValueError):
                pass
        abrupt = abrupt or (self._damaged and self._sent)
        holds_port = False
        try:
            holds_port = not abrupt and self._tcp_state() == _TCP_ESTABLISHED
        except OSError:
            pass
        if abrupt:
            # A reset: what of the request the peer has not read yet is dropped, and a peer that does not read hears of
            # our end all the same. A FIN would wait behind that data for as long as the peer likes.
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            except OSError:
                pass
        self.sock.close()
        return holds_port

    def _tcp_state(self) -> int:
        """The first byte of struct tcp_info (tcp(7)): ESTABLISHED, CLOSE_WAIT once the peer has closed, and so on."""
        return self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]

    # -- bytes -----------------------------------------------------------------------------------------------------

    async def send(self, data: bytes, timeout_s: float) -> bool:
        """Sends all of `data` within `timeout_s`; True when it did.

        False: the peer began to answer and took nothing more for EARLY_ANSWER_GRACE_S; the rest is not sent, recv()
        gives the answer. Raises RESET when the peer closed or reset, IDLE_TIMEOUT when the time was not enough; when an
        answer had come before, `pending` is above 0 and recv() gives it. After False or an error the connection never
        goes back into the pool.
        """
        deadline = self._loop.time() + timeout_s
        view = memoryview(data)
        give_up = deadline
        self._damaged = True  # until the last byte is out: a cancelled send leaves half a request
        while view:
            try:
                if self.tls:
                    self._sent = True  # a failed TLS write does not tell how much went out
                count = self.sock.send(view)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                if self._early:
                    if not await self._room(_direction(wants, Ready.WRITE), give_up, deadline):
                        return False
                    continue
                wanted = _direction(wants, Ready.WRITE) | Ready.READ
                ready = await self._wait(wanted, deadline, UpstreamErrorKind.IDLE_TIMEOUT, "sending the request")
                if ready is Ready.READ and self._read_early():
                    give_up = self._loop.time() + EARLY_ANSWER_GRACE_S
                continue
            except ssl.SSLError as error:
                self._salvage()
                raise self._error(UpstreamErrorKind.RESET, describe(error, self.origin.host)) from error
            except OSError as error:
                self._salvage()
                raise self._error(UpstreamErrorKind.RESET, f"sending: {_os_detail(error)}") from error
            self._sent = True
            view = view[count:]
            if self._early:
                give_up = self._loop.time() + EARLY_ANSWER_GRACE_S
        self._damaged = False
        return True

    async def recv(self, max_bytes: int, timeout_s: float) -> bytes:
        """1..max_bytes bytes of the answer, or b"" at the peer's end (over TLS also without close_notify: framing and
        the dialect's terminal event tell a cut answer from a whole one).

        Raises FIRST_BYTE_TIMEOUT (no byte since acquire), IDLE_TIMEOUT, RESET.
        """
        if self._early:
            data, self._early = self._early[:max_bytes], self._early[max_bytes:]
            self._received = True
            return data
        if self._eof:
            return b""
        deadline = self._loop.time() + timeout_s
        late = UpstreamErrorKind.IDLE_TIMEOUT if self._received else UpstreamErrorKind.FIRST_BYTE_TIMEOUT
        while True:
            try:
                data = self.sock.recv(max_bytes)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as wants:
                await self._wait(_direction(wants), deadline, late, f"nothing for {timeout_s:g} s")
                continue
            except ssl.SSLError as error:
                raise self._error(UpstreamErrorKind.RESET, describe(error, self.origin.host)) from error
            except OSError as error:
                raise self._error(UpstreamErrorKind.RESET, f"receiving: {_os_detail(error)}") from error
            if data:
                self._received = True
            else:
                self._eof = True
            return data

    @property
    def has_answered(self) -> bool:
        """Whether a byte of the current answer has come, of an interim head, too."""
        return self._received or bool(self._early)

    def take_early(self) -> bytes:
        """Answer bytes read while the request was sent, for a caller that reads on by itself."""
        data, self._early = self._early, b""
        return data

    def pending(self) -> int:
        """Bytes that recv() can give without the descriptor being readable."""
        if isinstance(self.sock, ssl.SSLSocket) and self.state is not State.CLOSED:
            return len(self._early) + self.sock.pending()
        return len(self._early)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _read_early(self) -> bool:
        """Something is readable while we send: True when it is data, False when it was a TLS record without any. Raises
        RESET when it is the peer's end."""
        try:
            data = self.sock.recv(EARLY_READ_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except OSError as error:
            raise self._error(UpstreamErrorKind.RESET, f"sending: {_os_detail(error)}") from error
        if not data:
            self._eof = True
            raise self._error(UpstreamErrorKind.RESET, "closed by the peer while we were sending")
        self._early = data
        return True

    def _salvage(self) -> None:
        """After a failed send: takes in what came before the failure, so that `pending` tells that there is an answer.
        Not when nothing of the request was sent: whatever came is no answer to it."""
        if self._early or not self._sent:
            return
        try:
            self._early = self.sock.recv(EARLY_READ_BYTES)
        except OSError:
            pass

    async def _room(self, wanted: Ready, give_up: float, deadline: float) -> bool:
        """Waits for room to send beside an early answer; False when there was none until `give_up`."""
        until = min(give_up, deadline)
        return bool(await self._readiness.wait(wanted, until - self._loop.time()))

    async def _wait(self, wanted: Ready, deadline: float, late: UpstreamErrorKind, doing: str) -> Ready:
        ready = await self._readiness.wait(wanted, deadline - self._loop.time())
        if not ready:
            raise self._error(late, doing)
        return ready

    def _error(self, kind: UpstreamErrorKind, detail: str) -> UpstreamError:
        """The error to raise; marks the connection as one that must not be pooled."""
        self._damaged = True
        return UpstreamError(kind, self.origin.name, detail, sent=self._sent)


def _direction(wants: BaseException, otherwise: Ready = Ready.READ) -> Ready:
    """What a call that would block waits for: TLS says it, a plain socket waits for its own direction."""
    if isinstance(wants, ssl.SSLWantReadError):
        return Ready.READ
    if isinstance(wants, ssl.SSLWantWriteError):
        return Ready.WRITE
    return otherwise


def _os_detail(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "") or type(error).__name__
