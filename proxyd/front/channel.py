"""The lower half of a client connection: the socket, its readiness, its state, and how it ends.

Owns: reading and writing bytes, the one transition, the deadline's place on the wheel, lingering, reset and close. Must
not know: requests, answers, keep-alive; the upper half (`connection`) says when to do what.

    readable -> recv into the worker's scratch buffer -> _on_input(bytes) | _on_end()
    _write(data) -> send, the rest when writable      -> _on_written()

Invariants
- The states and their moves are the table in `states`; `_become()` is the only writer of `state`.
- One bounded recv a readiness; what it brings is copied out of the scratch buffer only to be kept.
- At most one answer is being written, and progress is bounded by `send_timeout`.
- CLOSED is final: no reader, no writer, no deadline, no descriptor.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Protocol

from proxyd.clock import Clock
from proxyd.front.states import State, check_edge
from proxyd.front.wheel import NEVER, NOT_PARKED, Wheel

__all__ = ["LINGER_BYTES", "LINGER_IDLE_S", "LINGER_TOTAL_S", "Channel", "Owner"]

# nginx lingers 5 s between reads, 30 s in all. A client that still writes reads our answer within a round trip.
LINGER_IDLE_S = 2.0
LINGER_TOTAL_S = 10.0
# While the worker leaves: a few round trips, because somebody waits for the process to end.
LINGER_DRAINING_S = 0.3
# Enough for a client that sends the whole of a body four times max_body before it reads; beyond, it gets its RST.
LINGER_BYTES = 32 * 1024 * 1024

_LINGER_ZERO = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")


class Owner(Protocol):
    """What a channel shares with the others of its worker."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    wheel: Wheel
    scratch: memoryview
    draining: bool


class Channel:
    """A non-blocking client socket. Subclassed, not used alone."""

    __slots__ = (
        "_linger_until",
        "_lingered_bytes",
        "_out",
        "_owner",
        "_reading",
        "_send_timeout",
        "_writing",
        "deadline",
        "fd",
        "parked",
        "sock",
        "state",
    )

    def __init__(self, owner: Owner, sock: socket.socket, send_timeout: float) -> None:
        self._owner = owner
        self._send_timeout = send_timeout
        self.sock: socket.socket | None = sock
        self.fd = sock.fileno()
        self.state = State.IDLE
        self.deadline = NEVER
        self.parked = NOT_PARKED
        self._out: memoryview | None = None
        self._reading = False
        self._writing = False
        self._linger_until = NEVER
        self._lingered_bytes = 0

    # -- what the upper half implements --------------------------------------------------------------------------

    def _on_input(self, data: bytes) -> None:
        raise AssertionError("the upper half has it")

    def _on_end(self) -> None:
        raise AssertionError("the upper half has it")

    def _on_written(self) -> None:
        raise AssertionError("the upper half has it")

    def on_deadline(self, now: float) -> None:
        """The wheel's callback."""
        raise AssertionError("the upper half has it")

    def _on_closed(self) -> None:
        raise AssertionError("the upper half has it")

    # -- states and deadlines ------------------------------------------------------------------------------------

    def _become(self, state: State) -> None:
        """The one transition."""
        check_edge(self.state, state)
        self.state = state

    def _arm(self, seconds: float) -> None:
        """Moves the deadline to `seconds` from now; NEVER disarms."""
        self._owner.wheel.add(self, self._owner.clock.monotonic() + seconds)

    # -- reading -------------------------------------------------------------------------------------------------

    def _watch(self, wanted: bool) -> None:
        """Registers for input, or does not."""
        if wanted is self._reading:
            return
        self._reading = wanted
        if wanted:
            self._owner.loop.add_reader(self.fd, self._on_readable)
        else:
            self._owner.loop.remove_reader(self.fd)

    def _watch_anew(self) -> None:
        """Registers again. libuv ends a poll handle at the first EPOLLERR, after one last callback: a reset that came
        together with the request was read as the request, and nobody would hear of it while the request is served."""
        if self._reading:
            self._watch(False)
            self._watch(True)

    def _on_readable(self) -> None:
        sock = self.sock
        if sock is None:
            return
        scratch = self._owner.scratch
        try:
            count = sock.recv_into(scratch)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # Reset by the peer, or timed out by the kernel (TCP_USER_TIMEOUT).
            count = 0
        if self.state is State.LINGERING:
            self._discard(count)
        elif count:
            self._on_input(bytes(scratch[:count]))
        else:
            self._on_end()

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        """Writes all of `data`, now or as the client takes it, then calls _on_written()."""
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
            self._on_written()
            return
        self._out = out[sent:]
        self._arm(self._send_timeout)
        if not self._writing:
            self._writing = True
            self._owner.loop.add_writer(self.fd, self._flush)

    def _stop_writing(self) -> None:
        if self._writing:
            self._writing = False
            self._owner.loop.remove_writer(self.fd)

    def _send_now(self, data: bytes) -> bool:
        """Sends a few bytes that must not wait. False: the client takes none, although nothing of ours is unread."""
        assert self.sock is not None
        try:
            return self.sock.send(data) == len(data)
        except OSError:
            return False

    # -- the end -------------------------------------------------------------------------------------------------

    def _linger(self) -> None:
        """Half-closes and waits, bounded, for the client to close.

        close() with unread input makes the kernel send RST, which destroys the answer in the client's own buffer.
        """
        sock = self.sock
        assert sock is not None
        self._become(State.LINGERING)
        self._on_closed()
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._close()
            return
        idle_s, total_s = (LINGER_DRAINING_S,) * 2 if self._owner.draining else (LINGER_IDLE_S, LINGER_TOTAL_S)
        self._linger_until = self._owner.clock.monotonic() + total_s
        self._arm(idle_s)
        self._watch(True)

    def _discard(self, count: int) -> None:
        self._lingered_bytes += count
        if not count or self._lingered_bytes > LINGER_BYTES:
            self._close()
            return
        now = self._owner.clock.monotonic()
        self._owner.wheel.add(self, min(now + LINGER_IDLE_S, self._linger_until))

    def abort(self) -> None:
        """Closes at once, with a reset: what the client did not take is dropped. From any state."""
        # A lingering client has its answer and the end of it; a reset could only take them away again.
        if self.sock is not None and self.state is not State.LINGERING:
            try:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
            except OSError:
                # Already reset by the peer: what we want.
                pass
        self._close()

    def _close(self) -> None:
        if self.state is State.CLOSED:
            return
        self._watch(False)
        self._stop_writing()
        self._become(State.CLOSED)
        self._out = None
        self._owner.wheel.cancel(self)
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.fd = -1
        self._on_closed()
