"""What to do with an origin's connections, decided without touching one.

Owns: the bookkeeping of one origin in one worker (`PoolState`) and the one pure function that decides (`decide`).
Must not know: sockets, loops, clocks, tasks, metrics. Connections are opaque but for `uses`, `dialled_at_s`; waiters
are tickets with a place in the queue. Whoever drives it (`keeper`) carries the actions out.

    event --decide(state, event, now)--> actions --state.apply(event, actions)--> bookkeeping
                                            '------------the keeper------------> sockets, tasks, futures

    idle stack   oldest [c1 c2 c3] newest     taken from and given back to the newest end (LIFO): the tail ages out
    queue        w1 w2 w3                     first come first served; bounded by `max_waiting`
    connecting   n dials in flight            not tied to a waiter: whoever is first in the queue gets what arrives

Invariants, true between any two events:
- idle + busy + connecting <= max_connections.
- A waiter without a dial in flight for it (waiting > connecting) exists only when the limit is reached, or the ceiling.
- A waiter that takes any connection never waits beside an idle one.
- Every action costs O(1), but for the tick, which walks the idle stack once (<= max_idle).

The ceiling is there while the kernel has no local port for another connection (`NoPort`): who waits goes on waiting, a
connection that ends makes room for one dial, each tick tries one more, and each success two. With no waiter it goes.
This file is long because it is one table of events and actions: half of it alone says nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, Protocol, TypeVar

from proxyd.errors import UpstreamError

# Waiters per allowed connection. Half: a burst that would be served within two turns of the pool is refused. Twice: the
# last in the queue waits for eight generations, which no client does; he should hear 503 at once.
WAITERS_PER_CONNECTION = 4


class Pooled(Protocol):
    """What the pool looks at in a connection."""

    uses: int  # requests it has carried
    dialled_at_s: float


ConnT = TypeVar("ConnT", bound=Pooled)


@dataclass(frozen=True, slots=True)
class Limits:
    """The pool's bounds, out of [[upstream]]. `idle_expiry_s` of 0: a connection serves one request."""

    max_connections: int
    max_idle: int
    idle_expiry_s: float
    max_age_s: float

    @property
    def max_waiting(self) -> int:
        return WAITERS_PER_CONNECTION * self.max_connections


class Why(StrEnum):
    """Why a connection is closed, or a waiter refused."""

    EXPIRED = "idle_expiry"
    AGED = "max_age"
    SURPLUS = "max_idle"
    ROOM = "room for a fresh one"
    GONE = "closed by the peer while idle"
    SPENT = "not reusable"
    FULL = "queue full"
    SHUTDOWN = "shutting down"


class Waiter:
    """A place in the queue. `fresh`: only a connection that never carried a request will do. `seq` orders waiters and
    dials on one line: a dial that began before a waiter came was not begun for it."""

    __slots__ = ("fresh", "seq")

    def __init__(self, seq: int, fresh: bool = False) -> None:
        self.seq = seq
        self.fresh = fresh


WaiterT = TypeVar("WaiterT", bound=Waiter)


# Events: what happened.
@dataclass(frozen=True, slots=True)
class Acquire(Generic[WaiterT]):
    waiter: WaiterT


@dataclass(frozen=True, slots=True)
class Released(Generic[ConnT]):
    """A busy connection came back; `reusable` when its last exchange ended cleanly and nothing is left to read."""

    conn: ConnT
    reusable: bool


@dataclass(frozen=True, slots=True)
class Dialled(Generic[ConnT]):
    conn: ConnT


@dataclass(frozen=True, slots=True)
class DialFailed:
    """`seq` is the dial's own place on the line of waiters."""

    seq: int
    error: UpstreamError


@dataclass(frozen=True, slots=True)
class NoPort:
    """A dial ended because no local port was free: nobody's fault, so nobody's failure."""


@dataclass(frozen=True, slots=True)
class Gone(Generic[ConnT]):
    """An idle connection turned readable with an end of stream or bytes nobody asked for."""

    conn: ConnT


@dataclass(frozen=True, slots=True)
class Left(Generic[WaiterT]):
    """A waiter was cancelled or ran out of time. Its dial goes on and ends in the pool."""

    waiter: WaiterT


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


# Actions: what the keeper shall do.
@dataclass(frozen=True, slots=True)
class Reuse(Generic[ConnT, WaiterT]):
    """Take this idle connection for the waiter who is asking now."""

    waiter: WaiterT
    conn: ConnT


@dataclass(frozen=True, slots=True)
class Hand(Generic[ConnT, WaiterT]):
    """Give this connection, just released or just dialled, to a waiter in the queue."""

    waiter: WaiterT
    conn: ConnT


@dataclass(frozen=True, slots=True)
class Wait(Generic[WaiterT]):
    waiter: WaiterT


@dataclass(frozen=True, slots=True)
class Dial:
    pass


@dataclass(frozen=True, slots=True)
class Refuse(Generic[WaiterT]):
    """Turn the waiter away: the queue is full, or we are closing."""

    waiter: WaiterT
    why: Why


@dataclass(frozen=True, slots=True)
class Fail(Generic[WaiterT]):
    """The dial that this waiter waited for failed."""

    waiter: WaiterT
    error: UpstreamError


@dataclass(frozen=True, slots=True)
class Keep(Generic[ConnT]):
    """Push on the idle stack."""

    conn: ConnT


@dataclass(frozen=True, slots=True)
class Close(Generic[ConnT]):
    conn: ConnT
    why: Why


@dataclass(frozen=True, slots=True)
class Bound:
    """From now on at most so many connections, beside `max_connections`; None: that alone. For the books only."""

    ceiling: int | None


Event = (
    Acquire[WaiterT]
    | Released[ConnT]
    | Dialled[ConnT]
    | DialFailed
    | NoPort
    | Gone[ConnT]
    | Left[WaiterT]
    | Tick
    | Shutdown
)
Action = (
    Reuse[ConnT, WaiterT]
    | Hand[ConnT, WaiterT]
    | Wait[WaiterT]
    | Dial
    | Refuse[WaiterT]
    | Fail[WaiterT]
    | Keep[ConnT]
    | Close[ConnT]
    | Bound
)
Actions = tuple[Action[ConnT, WaiterT], ...]


class PoolState(Generic[ConnT, WaiterT]):
    """One origin's books. Only `apply` changes them."""

    __slots__ = ("any_waiters", "busy", "ceiling", "closed", "connecting", "fresh_waiters", "idle", "limits")

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # connection -> since when (monotonic s), oldest first. An OrderedDict: O(1) at both ends and in the middle,
        # where a plain dict would walk over the holes that removals from its front leave.
        self.idle: OrderedDict[ConnT, float] = OrderedDict()
        self.any_waiters: OrderedDict[WaiterT, None] = OrderedDict()
        self.fresh_waiters: OrderedDict[WaiterT, None] = OrderedDict()
        self.busy = 0
        self.connecting = 0
        self.ceiling: int | None = None
        self.closed = False

    @property
    def most(self) -> int:
        """How many connections may exist."""
        return self.limits.max_connections if self.ceiling is None else min(self.limits.max_connections, self.ceiling)

    @property
    def waiting(self) -> int:
        return len(self.any_waiters) + len(self.fresh_waiters)

    @property
    def total(self) -> int:
        """Connections that exist or are being made; what `max_connections` bounds."""
        return len(self.idle) + self.busy + self.connecting

    def head(self) -> WaiterT | None:
        """The waiter who has waited longest, of either kind."""
        first = next(iter(self.any_waiters), None)
        fresh = next(iter(self.fresh_waiters), None)
        if first is None or (fresh is not None and fresh.seq < first.seq):
            return fresh
        return first

    def apply(self, event: Event[WaiterT, ConnT], actions: Actions[ConnT, WaiterT], now: float) -> None:
        """Enters what happened and what was decided about it."""
        match event:
            case Released():
                self.busy -= 1
            case Dialled() | DialFailed() | NoPort():
                self.connecting -= 1
            case Left(waiter=waiter):
                self._leave(waiter)
            case Shutdown():
                self.closed = True
            case _:
                pass
        for action in actions:
            match action:
                case Reuse(conn=conn):
                    del self.idle[conn]
                    self.busy += 1
                case Hand(waiter=waiter):
                    self._leave(waiter)
                    self.busy += 1
                case Wait(waiter=waiter):
                    (self.fresh_waiters if waiter.fresh else self.any_waiters)[waiter] = None
                case Dial():
                    self.connecting += 1
                case Fail(waiter=waiter) | Refuse(waiter=waiter):
                    self._leave(waiter)
                case Keep(conn=conn):
                    self.idle[conn] = now
                case Close(conn=conn):
                    self.idle.pop(conn, None)
                case Bound(ceiling=ceiling):
                    self.ceiling = ceiling

    def _leave(self, waiter: WaiterT) -> None:
        (self.fresh_waiters if waiter.fresh else self.any_waiters).pop(waiter, None)


def decide(state: PoolState[ConnT, WaiterT], event: Event[WaiterT, ConnT], now: float) -> Actions[ConnT, WaiterT]:
    """What follows from `event`. Reads the state and changes nothing; `now` is monotonic seconds."""
    match event:
        case Acquire(waiter=waiter):
            return _decide_acquire(state, waiter, now)
        case Released(conn=conn, reusable=reusable):
            return _decide_released(state, conn, reusable, now)
        case Dialled(conn=conn):
            head = state.head()
            if state.closed:
                return (Close(conn, Why.SHUTDOWN),)
            taken: Actions[ConnT, WaiterT] = (Hand(head, conn),) if head is not None else _keep(state, conn)
            return (*taken, *_raise_ceiling(state))
        case DialFailed():
            return _decide_dial_failed(state, event)
        case NoPort():
            return () if state.closed else (Bound(state.total - 1),)
        case Gone(conn=conn):
            if conn not in state.idle:
                return ()
            return (Close(conn, Why.GONE), *_refill(state, state.waiting, state.connecting, state.total - 1))
        case Left():
            return ()
        case Tick():
            aged = ((conn, _retire_reason(state.limits, conn, since, now)) for conn, since in state.idle.items())
            closing = tuple(Close(conn, why) for conn, why in aged if why is not None)
            return (*closing, *_try_ceiling(state, state.total - len(closing)))
        case Shutdown():
            return (
                *(Close(conn, Why.SHUTDOWN) for conn in state.idle),
                *(Refuse(waiter, Why.SHUTDOWN) for waiter in state.any_waiters),
                *(Refuse(waiter, Why.SHUTDOWN) for waiter in state.fresh_waiters),
            )


def _decide_acquire(state: PoolState[ConnT, WaiterT], waiter: WaiterT, now: float) -> Actions[ConnT, WaiterT]:
    """The newest idle connection that is still good; else a place in the queue, and a dial if none is on its way."""
    if state.closed:
        return (Refuse(waiter, Why.SHUTDOWN),)
    actions: list[Action[ConnT, WaiterT]] = []
    if not waiter.fresh:
        for conn in reversed(state.idle):
            why = _retire_reason(state.limits, conn, state.idle[conn], now)
            if why is None:
                return (*actions, Reuse(waiter, conn))
            actions.append(Close(conn, why))
    total = state.total - len(actions)
    if state.waiting >= state.limits.max_waiting:
        return (*actions, Refuse(waiter, Why.FULL))
    actions.append(Wait(waiter))
    if state.connecting > state.waiting:
        return tuple(actions)  # a dial whose waiter left is on its way: two connections for one request would be waste
    if total < state.most:
        actions.append(Dial())
    elif waiter.fresh and state.idle:
        actions += (Close(next(iter(state.idle)), Why.ROOM), Dial())
    return tuple(actions)


def _decide_released(
    state: PoolState[ConnT, WaiterT], conn: ConnT, reusable: bool, now: float
) -> Actions[ConnT, WaiterT]:
    """To the next waiter, else on the stack; closed when it is spent or too old."""
    if state.closed:
        return (Close(conn, Why.SHUTDOWN),)
    why = _retire_reason(state.limits, conn, now, now) if reusable else Why.SPENT
    if why is None:
        head = state.head()
        if head is None:
            return _keep(state, conn)
        # A waiter that needs a fresh connection and has no dial under way gets this one's room when he is first, or
        # when nobody else wants it; else a steady stream of ordinary waiters would starve him.
        if state.any_waiters and not (head.fresh and state.connecting == 0):
            return (Hand(next(iter(state.any_waiters)), conn),)
        if state.waiting <= state.connecting:
            return _keep(state, conn)
        why = Why.ROOM
    return (Close(conn, why), *_refill(state, state.waiting, state.connecting, state.total - 1))


def _decide_dial_failed(state: PoolState[ConnT, WaiterT], event: DialFailed) -> Actions[ConnT, WaiterT]:
    """One failed dial fails one waiter, the first; nobody when more dials are under way than waiters.

    A waiter who came after the dial began has not had his own: it is dialled again, so each waiter sees the outcome of
    one whole dial and no failure is charged to him that began before he came.
    """
    connecting = state.connecting - 1
    head = state.head()
    if state.closed or head is None or state.waiting <= connecting:
        return ()
    if head.seq > event.seq:
        return (Dial(),)
    return (Fail(head, event.error), *_refill(state, state.waiting - 1, connecting, state.total - 1))


def _keep(state: PoolState[ConnT, WaiterT], conn: ConnT) -> Actions[ConnT, WaiterT]:
    """On the stack; the oldest makes room, since the newest is the likeliest to be alive."""
    if state.limits.max_idle <= 0:
        return (Close(conn, Why.SURPLUS),)
    if len(state.idle) >= state.limits.max_idle:
        return (Close(next(iter(state.idle)), Why.SURPLUS), Keep(conn))
    return (Keep(conn),)


def _refill(state: PoolState[ConnT, WaiterT], waiting: int, connecting: int, total: int) -> Actions[ConnT, WaiterT]:
    """Dials for the waiters that have none, as far as there is room, given the counts after the event."""
    return (Dial(),) * max(0, min(waiting - connecting, state.most - total))


def _raise_ceiling(state: PoolState[ConnT, WaiterT]) -> Actions[ConnT, WaiterT]:
    """A dial had a port: two more may try, so that ports that came back are all in use within a few round trips."""
    if state.ceiling is None:
        return ()
    total, connecting = state.total, state.connecting - 1
    without_dial = max(0, state.waiting - 1 - connecting)
    most = min(state.limits.max_connections, total + 2)
    return (Bound(most), *(Dial(),) * max(0, min(without_dial, most - total)))


def _try_ceiling(state: PoolState[ConnT, WaiterT], total: int) -> Actions[ConnT, WaiterT]:
    """Once a second one dial beyond the ceiling: ports come back without a word. One, for a connect() that finds none
    has looked at every port there is, which costs milliseconds."""
    if state.ceiling is None:
        return ()
    if not state.waiting:
        return (Bound(None),)
    if state.waiting <= state.connecting or total >= state.limits.max_connections:
        return ()
    most = max(state.ceiling, total + 1)
    return (Bound(most), *(Dial(),) * min(state.waiting - state.connecting, most - total))


def _retire_reason(limits: Limits, conn: Pooled, idle_since: float, now: float) -> Why | None:
    """Why this connection must not carry another request, or None."""
    if now - idle_since >= limits.idle_expiry_s:
        return Why.EXPIRED
    if now - conn.dialled_at_s >= limits.max_age_s:
        return Why.AGED
    return None
