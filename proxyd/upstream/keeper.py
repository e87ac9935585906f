"""Carries out what the pool decides, for one origin in one worker.

Owns: the connections of the origin, the dials under way, the waiters' futures, the watch on idle sockets, the gauges.
Must not know: the rules (`pool.decide` has them), breakers, HTTP.
Invariants:
- Every change goes through `_step`: decide, enter in the books, act. Acting never calls back into `_step` before the
  books are right.
- An idle connection is watched for readability; end of stream or bytes nobody asked for close it at once.
- A cancelled or late waiter leaves nothing behind: a connection it was just given goes back, its dial ends in the pool.
- Bounds: max_connections, max_idle, 4 x max_connections waiters; each waiter's deadline is its caller's `timeout_s`,
  more where the loop was held (HELD_MOST); each dial's (name, TCP and TLS together) is connect_timeout.
- A connection whose peer is about to close is out of the pool's books and left to it for LEAVE_S, at most a quarter of
  max_connections of them; then it is reset, and at once where ports are low. Either way no TIME_WAIT keeps a port.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from proxyd.clock import Clock
from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.log import Log
from proxyd.shm.metrics import Metrics
from proxyd.upstream import pool
from proxyd.upstream.connection import Connection, State
from proxyd.upstream.dial import Dialer
from proxyd.upstream.origin import Origin
from proxyd.upstream.ports import Ports
from proxyd.upstream.tls import OriginTls

# A peer that announced its close does it with its last bytes, so a round trip away at most. Half: far ones on bad lines
# are reset; twice: a peer that waits for our close holds a descriptor for so much longer.
LEAVE_S = 1.0
# How many may be left to their peers at once, beside max_connections: descriptors that the start's check has spare.
LEAVING_SHARE = 4
LEAVING_LEAST = 16
# A waiter's timer that comes later than this was held up with the loop, and the news of its connection stands behind
# it, a few turns away: it and those of the next second wait once more for as long as the loop was held, HELD_MOST times
# at most. Half: the pause of a collection. A dial that fails is told all the while, so nobody waits in vain.
HELD_S = 0.1
HELD_MOST = 10
HELD_ECHO_S = 1.0


class Ticket(pool.Waiter):
    """A waiter with the future that its caller sleeps on; `granted` when there was nothing to sleep for."""

    __slots__ = ("future", "granted", "refused")

    def __init__(self, seq: int, fresh: bool) -> None:
        super().__init__(seq, fresh)
        self.future: asyncio.Future[Connection] | None = None
        self.granted: Connection | None = None
        self.refused: UpstreamError | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a keeper needs of its worker."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    metrics: Metrics
    log: Log


class Keeper:
    """The pool of one origin, alive."""

    __slots__ = (
        "_acquires",
        "_clock",
        "_connects",
        "_dialer",
        "_dials",
        "_gauges",
        "_held_at",
        "_held_s",
        "_leaving",
        "_leaving_timer",
        "_log",
        "_loop",
        "_next_seq",
        "_ports",
        "_reuses",
        "_shown",
        "_state",
        "_tls",
        "origin",
    )

    def __init__(
        self, origin: Origin, dialer: Dialer, tls: OriginTls | None, around: Surroundings, ports: Ports
    ) -> None:
        config = origin.config
        self.origin = origin
        self._dialer = dialer
        self._tls = tls
        self._loop, self._clock, self._log = around.loop, around.clock, around.log
        self._state: pool.PoolState[Connection, Ticket] = pool.PoolState(
            pool.Limits(config.max_connections, config.max_idle, config.idle_expiry, config.max_age)
        )
        self._dials: set[asyncio.Task[None]] = set()
        self._ports = ports
        self._leaving: OrderedDict[Connection, float] = OrderedDict()  # until when, oldest first
        self._leaving_timer: asyncio.TimerHandle | None = None
        self._next_seq = 0
        self._held_at, self._held_s = -HELD_ECHO_S, 0.0
        metrics, name = around.metrics, origin.name
        self._connects = metrics.counter("proxyd_upstream_connects_total", upstream=name)
        # proxyd_upstream_reuse_ratio is a quotient over the whole node: each slot counts both, the reader divides.
        self._acquires = metrics.counter("_upstream_acquires", upstream=name)
        self._reuses = metrics.counter("_upstream_reuses", upstream=name)
        self._gauges = tuple(
            metrics.gauge("proxyd_upstream_connections", upstream=name, state=state)
            for state in ("idle", "busy", "connecting")
        )
        self._shown = (0, 0, 0)

    # -- for the facade --------------------------------------------------------------------------------------------

    async def acquire(self, timeout_s: float, fresh: bool = False) -> Connection:
        """A BUSY connection, within `timeout_s`. Raises UpstreamError: POOL_FULL, POOL_TIMEOUT (every connection was in
        use all the time), NO_PORTS (no local port was free all the time), CONNECT_TIMEOUT, or what the dial met. Safe
        to cancel at any point."""
        deadline = self._loop.time() + timeout_s
        conn = await self._obtain(timeout_s, fresh)
        # One that ended while idle, before the loop told us: the next newest, or a dial. What a dial gives is given on
        # as it is: an upstream that hangs up on accept is an answer, not a reason to dial it again.
        while conn.reused and not conn.is_quiet():
            self._step(pool.Released(conn, False))
            conn = await self._obtain(deadline - self._loop.time(), fresh)
        self._acquires.add(1)
        if conn.uses > 0:
            self._reuses.add(1)
        conn.uses += 1
        return conn

    def tick(self) -> None:
        """Once a second: expiry and age of the idle ones; one more dial where ports were out."""
        self._step(pool.Tick())
        self._ports.tick(self._clock.monotonic())

    async def close(self) -> None:
        """Idle connections close, waiters are refused, dials end. Busy ones close when they are released."""
        self._step(pool.Shutdown())
        dials = list(self._dials)
        for task in dials:
            task.cancel()
        await asyncio.gather(*dials, return_exceptions=True)
        for conn in list(self._leaving):
            self._end(conn, abrupt=True)

    def stats(self) -> dict[str, Any]:
        """Counts for `/status`."""
        state = self._state
        return {
            "idle": len(state.idle),
            "busy": state.busy,
            "connecting": state.connecting,
            "waiting": state.waiting,
            "connects": self._connects.value,
            "acquires": self._acquires.value,
            "reuses": self._reuses.value,
        }

    # -- waiting ---------------------------------------------------------------------------------------------------

    async def _obtain(self, timeout_s: float, fresh: bool) -> Connection:
        """One pass through the pool: a connection at once, or after a place in the queue."""
        ticket = Ticket(self._take_seq(), fresh)
        self._step(pool.Acquire(ticket))
        if ticket.refused is not None:
            raise ticket.refused
        if ticket.future is not None:
            return await self._wait(ticket, ticket.future, timeout_s)
        assert ticket.granted is not None
        return ticket.granted

    async def _wait(self, ticket: Ticket, future: asyncio.Future[Connection], timeout_s: float) -> Connection:
        due = self._loop.time() + max(0.0, timeout_s)
        timer = self._loop.call_at(due, self._on_late, ticket, future, timeout_s, due, HELD_MOST)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._on_release(future.result(), True)  # given in the same turn as we were cancelled: not used
            else:
                self._step(pool.Left(ticket))
            raise
        finally:
            timer.cancel()

    def _on_late(
        self, ticket: Ticket, future: asyncio.Future[Connection], timeout_s: float, due: float, chances: int
    ) -> None:
        if future.done():
            return
        now = self._loop.time()
        if now - due > HELD_S:
            self._held_s, self._held_at = now - due, now
        if now - self._held_at < HELD_ECHO_S and chances and timeout_s > 0:
            again = now + min(self._held_s, timeout_s)
            self._loop.call_at(again, self._on_late, ticket, future, timeout_s, again, chances - 1)
            return
        dialling = self._state.connecting >= self._state.waiting
        is_out = self._state.ceiling is not None
        self._step(pool.Left(ticket))
        if is_out:
            error = self._error(UpstreamErrorKind.NO_PORTS, f"no local port was free for {timeout_s:g} s")
        elif dialling:
            error = self._error(UpstreamErrorKind.CONNECT_TIMEOUT, f"no connection within {timeout_s:g} s")
        else:
            error = self._error(UpstreamErrorKind.POOL_TIMEOUT, f"all connections in use for {timeout_s:g} s")
        future.set_exception(error)

    # -- deciding and acting ---------------------------------------------------------------------------------------

    def _step(self, event: pool.Event[Ticket, Connection]) -> None:
        now = self._clock.monotonic()
        actions = pool.decide(self._state, event, now)
        self._state.apply(event, actions, now)
        for action in actions:
            self._act(action)
        if self._state.ceiling is None:
            self._ports.on_enough()
        shown = (len(self._state.idle), self._state.busy, self._state.connecting)
        if shown != self._shown:
            for gauge, value in zip(self._gauges, shown, strict=True):
                gauge.set(value)
            self._shown = shown

    def _act(self, action: pool.Action[Connection, Ticket]) -> None:
        match action:
            case pool.Reuse(waiter=ticket, conn=conn):
                self._loop.remove_reader(conn.fd)
                conn.reused = True
                conn.take()
                ticket.granted = conn
            case pool.Hand(waiter=ticket, conn=conn):
                self._hand(ticket, conn)
            case pool.Wait(waiter=ticket):
                ticket.future = self._loop.create_future()
            case pool.Dial():
                task = self._loop.create_task(self._dial(self._take_seq()))
                self._dials.add(task)
                task.add_done_callback(self._dials.discard)
            case pool.Refuse(waiter=ticket, why=why):
                self._refuse(ticket, why)
            case pool.Fail(waiter=ticket, error=error):
                if ticket.future is not None and not ticket.future.done():
                    ticket.future.set_exception(error)
            case pool.Keep(conn=conn):
                conn.park()
                self._loop.add_reader(conn.fd, self._on_idle_readable, conn)
            case pool.Close(conn=conn):
                is_low = self._ports.is_low
                may_leave = conn.peer_closes and conn.state is State.BUSY and not (is_low or self._state.closed)
                if may_leave and not conn.is_over():
                    self._leave(conn)
                else:
                    self._end(conn, abrupt=is_low)
            case pool.Bound():
                pass

    def _hand(self, ticket: Ticket, conn: Connection) -> None:
        """To a waiter in the queue. One that was cancelled and has not run yet cannot take it: it goes round again."""
        conn.reused = conn.uses > 0
        conn.park()
        conn.take()
        if ticket.future is not None and not ticket.future.done():
            ticket.future.set_result(conn)
        else:
            self._loop.call_soon(self._on_release, conn, True)

    def _refuse(self, ticket: Ticket, why: pool.Why) -> None:
        error = self._error(UpstreamErrorKind.POOL_FULL, str(why))
        if ticket.future is None:
            ticket.refused = error
        elif not ticket.future.done():
            ticket.future.set_exception(error)

    # -- ends of connections ---------------------------------------------------------------------------------------

    def _end(self, conn: Connection, *, abrupt: bool) -> None:
        """Closes it and enters what becomes of its port."""
        if conn.state in (State.IDLE, State.LEAVING):
            self._loop.remove_reader(conn.fd)
            self._leaving.pop(conn, None)
        by_us = conn.close(abrupt)
        if conn.held is not None:
            self._ports.on_closed(conn.held, by_us, self._clock.monotonic())
            conn.held = None

    def _leave(self, conn: Connection) -> None:
        """Its answer is whole and it may not be used again: the peer's close is waited for."""
        conn.leave()
        self._leaving[conn] = self._loop.time() + LEAVE_S
        self._loop.add_reader(conn.fd, self._on_leaving_readable, conn)
        if len(self._leaving) > max(LEAVING_LEAST, self._state.limits.max_connections // LEAVING_SHARE):
            self._end(next(iter(self._leaving)), abrupt=True)
        if self._leaving_timer is None:
            self._leaving_timer = self._loop.call_later(LEAVE_S, self._on_leave_late)

    def _on_leaving_readable(self, conn: Connection) -> None:
        if conn.is_over():
            self._end(conn, abrupt=False)

    def _on_leave_late(self) -> None:
        """The peers whose time is over did not close: they are reset."""
        self._leaving_timer = None
        now = self._loop.time()
        while self._leaving:
            conn, until = next(iter(self._leaving.items()))
            if until > now:
                self._leaving_timer = self._loop.call_later(until - now, self._on_leave_late)
                return
            self._end(conn, abrupt=True)

    # -- what happens to connections -------------------------------------------------------------------------------

    async def _dial(self, seq: int) -> None:
        """One dial, from the name to the end of the TLS handshake; tells the pool how it ended, exactly once."""
        event: pool.Event[Ticket, Connection]
        self._ports.on_dial(self._clock.monotonic())
        try:
            event = pool.Dialled(await self._connect())
        except UpstreamError as error:
            event = pool.DialFailed(seq, error)
            if error.kind is UpstreamErrorKind.NO_PORTS:
                event = pool.NoPort()
                self._ports.on_none(self._clock.monotonic(), error.detail)
        except asyncio.CancelledError:
            self._step(pool.DialFailed(seq, self._error(UpstreamErrorKind.POOL_FULL, str(pool.Why.SHUTDOWN))))
            raise
        except Exception as error:  # noqa: BLE001 a connection ends here: a waiter must hear of it whatever it was
            self._log.error("dial_failed_unexpectedly", upstream=self.origin.name, error=repr(error))
            event = pool.DialFailed(seq, self._error(UpstreamErrorKind.UNREACHABLE, type(error).__name__))
        else:
            self._connects.add(1)
        finally:
            self._ports.on_dialled()
        self._step(event)

    async def _connect(self) -> Connection:
        timeout_s = self.origin.config.connect_timeout
        deadline = self._loop.time() + timeout_s
        if self._ports.is_low:
            for conn in list(itertools.islice(self._leaving, 2)):  # two, so that they become fewer
                self._end(conn, abrupt=True)
        sock: socket.socket = await self._dialer.dial(timeout_s)
        conn = Connection(
            self.origin,
            sock,
            self._loop,
            dialled_at_s=self._clock.monotonic(),
            on_release=self._on_release,
            tls=self._tls,
        )
        conn.held = self._ports.on_open(_peer_of(sock), self._clock.monotonic())
        if self._tls is not None:
            with contextlib.ExitStack() as undo:
                undo.callback(self._end, conn, abrupt=self._ports.is_low)
                await conn.handshake(deadline - self._loop.time())
                undo.pop_all()
        return conn

    def _on_release(self, conn: Connection, reusable: bool) -> None:
        quiet = reusable and conn.is_quiet()
        conn.remember_session()
        if conn.has_ended:
            self._ports.on_answered(not reusable, self._clock.monotonic())
        self._step(pool.Released(conn, quiet))

    def _on_idle_readable(self, conn: Connection) -> None:
        if conn.is_quiet():  # a TLS record without data, such as a session ticket
            conn.remember_session()
        else:
            self._step(pool.Gone(conn))

    def _take_seq(self) -> int:
        self._next_seq += 1
        return self._next_seq

    def _error(self, kind: UpstreamErrorKind, detail: str) -> UpstreamError:
        return UpstreamError(kind, self.origin.name, detail)


def _peer_of(sock: socket.socket) -> str:
    """The address it was dialled at; "" when it is gone already."""
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return ""
