"""decide() by tables, without sockets: what a pool does with each event, and its invariants over random histories."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proxyd.clock import FakeClock
from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.pool import (
    Acquire,
    Close,
    Dial,
    DialFailed,
    Dialled,
    Fail,
    Gone,
    Hand,
    Keep,
    Left,
    Limits,
    NoPort,
    PoolState,
    Refuse,
    Released,
    Reuse,
    Shutdown,
    Tick,
    Wait,
    Waiter,
    Why,
    decide,
)


class Conn:
    """A connection as far as the pool sees it."""

    def __init__(self, name: str, dialled_at_s: float = 1000.0) -> None:
        self.name = name
        self.uses = 0
        self.dialled_at_s = dialled_at_s

    def __repr__(self) -> str:
        return self.name


class Desk:
    """A pool's books with a clock and a counter of places."""

    def __init__(
        self, max_connections: int = 2, max_idle: int = 10, idle_expiry_s: float = 60, max_age_s: float = 3600
    ):
        self.state: PoolState[Conn, Waiter] = PoolState(Limits(max_connections, max_idle, idle_expiry_s, max_age_s))
        self.clock = FakeClock()
        self._seq = 0

    def seq(self) -> int:
        self._seq += 1
        return self._seq

    def waiter(self, fresh: bool = False) -> Waiter:
        return Waiter(self.seq(), fresh)

    def on(self, event: Any) -> tuple[Any, ...]:
        now = self.clock.monotonic()
        actions = decide(self.state, event, now)
        assert decide(self.state, event, now) == actions, "a decision changes nothing"
        self.state.apply(event, actions, now)
        return actions

    def busy(self, *names: str) -> list[Conn]:
        """Connections that are in use, each come by acquire and dial."""
        made = []
        for name in names:
            waiter = self.waiter()
            assert self.on(Acquire(waiter)) == (Wait(waiter), Dial())
            made.append(Conn(name, self.clock.monotonic()))
            assert self.on(Dialled(made[-1])) == (Hand(waiter, made[-1]),)
        return made

    def idle(self, *names: str) -> list[Conn]:
        made = self.busy(*names)
        for conn in made:
            assert self.on(Released(conn, True)) == (Keep(conn),)
        return made


def refused(detail: str = "no") -> UpstreamError:
    return UpstreamError(UpstreamErrorKind.REFUSED, "up", detail)


def test_the_first_request_waits_for_a_dial() -> None:
    desk = Desk()
    waiter = desk.waiter()
    assert desk.on(Acquire(waiter)) == (Wait(waiter), Dial())


def test_an_idle_connection_is_reused_newest_first() -> None:
    desk = Desk(max_connections=3)
    a, b, c = desk.idle("a", "b", "c")
    taken = [desk.on(Acquire(waiter)) for waiter in (desk.waiter(), desk.waiter(), desk.waiter())]
    assert [actions[0].conn for actions in taken] == [c, b, a]
    assert all(isinstance(actions[0], Reuse) and len(actions) == 1 for actions in taken)


def test_a_request_at_the_limit_waits_without_a_dial() -> None:
    desk = Desk(max_connections=1)
    desk.busy("a")
    waiter = desk.waiter()
    assert desk.on(Acquire(waiter)) == (Wait(waiter),)


def test_a_released_connection_goes_to_who_has_waited_longest() -> None:
    desk = Desk(max_connections=1)
    (a,) = desk.busy("a")
    first, second = desk.waiter(), desk.waiter()
    desk.on(Acquire(first))
    desk.on(Acquire(second))
    assert desk.on(Released(a, True)) == (Hand(first, a),)
    assert desk.on(Released(a, True)) == (Hand(second, a),)
    assert desk.on(Released(a, True)) == (Keep(a),)


def test_the_queue_is_bounded_by_four_waiters_a_connection() -> None:
    desk = Desk(max_connections=2)
    desk.busy("a", "b")
    for _ in range(8):
        waiter = desk.waiter()
        assert desk.on(Acquire(waiter)) == (Wait(waiter),)
    last = desk.waiter()
    assert desk.on(Acquire(last)) == (Refuse(last, Why.FULL),)


def test_a_spent_connection_is_closed_and_its_room_dialled_for_who_waits() -> None:
    desk = Desk(max_connections=1)
    (a,) = desk.busy("a")
    desk.on(Acquire(desk.waiter()))
    assert desk.on(Released(a, False)) == (Close(a, Why.SPENT), Dial())
    assert desk.state.total == 1


def test_a_dial_whose_waiter_was_served_by_a_release_ends_in_the_pool() -> None:
    desk = Desk(max_connections=2)
    (a,) = desk.busy("a")
    waiter = desk.waiter()
    assert desk.on(Acquire(waiter)) == (Wait(waiter), Dial())
    assert desk.on(Released(a, True)) == (Hand(waiter, a),)
    late = Conn("late")
    assert desk.on(Dialled(late)) == (Keep(late),)


def test_a_dial_whose_waiter_left_ends_in_the_pool_and_a_newcomer_starts_no_second_one() -> None:
    desk = Desk(max_connections=5)
    gone, newcomer = desk.waiter(), desk.waiter()
    desk.on(Acquire(gone))
    assert desk.on(Left(gone)) == ()
    assert desk.on(Acquire(newcomer)) == (Wait(newcomer),)
    conn = Conn("c")
    assert desk.on(Dialled(conn)) == (Hand(newcomer, conn),)


def test_one_failed_dial_fails_one_waiter_the_first() -> None:
    desk = Desk(max_connections=5)
    first, second = desk.waiter(), desk.waiter()
    desk.on(Acquire(first))
    desk.on(Acquire(second))
    error = refused()
    assert desk.on(DialFailed(desk.seq(), error)) == (Fail(first, error),)
    assert desk.on(DialFailed(desk.seq(), error)) == (Fail(second, error),)
    assert desk.state.total == desk.state.waiting == 0


def test_a_waiter_who_came_after_the_dial_began_is_dialled_again_instead_of_failed() -> None:
    desk = Desk(max_connections=5)
    gone = desk.waiter()
    desk.on(Acquire(gone))
    old_dial = desk.seq()
    desk.on(Left(gone))
    newcomer = desk.waiter()
    desk.on(Acquire(newcomer))
    assert desk.on(DialFailed(old_dial, refused())) == (Dial(),)
    error = refused()
    assert desk.on(DialFailed(desk.seq(), error)) == (Fail(newcomer, error),)


def test_a_failed_dial_at_the_limit_makes_room_for_the_next_waiter() -> None:
    desk = Desk(max_connections=1)
    first, second = desk.waiter(), desk.waiter()
    desk.on(Acquire(first))
    assert desk.on(Acquire(second)) == (Wait(second),)
    error = refused()
    assert desk.on(DialFailed(desk.seq(), error)) == (Fail(first, error), Dial())


def test_a_surplus_dial_fails_in_silence() -> None:
    desk = Desk()
    gone = desk.waiter()
    desk.on(Acquire(gone))
    desk.on(Left(gone))
    assert desk.on(DialFailed(desk.seq(), refused())) == ()
    assert desk.state.total == 0


def test_a_fresh_request_dials_beside_idle_connections() -> None:
    desk = Desk(max_connections=3)
    desk.idle("a", "b")
    waiter = desk.waiter(fresh=True)
    assert desk.on(Acquire(waiter)) == (Wait(waiter), Dial())


def test_a_fresh_request_at_the_limit_closes_the_oldest_idle_for_room() -> None:
    desk = Desk(max_connections=2)
    a, _ = desk.idle("a", "b")
    waiter = desk.waiter(fresh=True)
    assert desk.on(Acquire(waiter)) == (Wait(waiter), Close(a, Why.ROOM), Dial())
    assert desk.state.total == 2


def test_a_used_connection_is_not_handed_to_a_fresh_waiter_but_gives_its_room() -> None:
    desk = Desk(max_connections=1)
    (a,) = desk.busy("a")
    fresh, plain = desk.waiter(fresh=True), desk.waiter()
    desk.on(Acquire(fresh))
    desk.on(Acquire(plain))
    assert desk.on(Released(a, True)) == (Close(a, Why.ROOM), Dial())
    new = Conn("new")
    assert desk.on(Dialled(new)) == (Hand(fresh, new),)
    assert desk.on(Released(new, True)) == (Hand(plain, new),)


def test_an_ordinary_waiter_before_a_fresh_one_is_served_by_a_release() -> None:
    desk = Desk(max_connections=1)
    (a,) = desk.busy("a")
    plain, fresh = desk.waiter(), desk.waiter(fresh=True)
    desk.on(Acquire(plain))
    desk.on(Acquire(fresh))
    assert desk.on(Released(a, True)) == (Hand(plain, a),)


def test_expired_idle_connections_are_closed_by_the_tick_oldest_first() -> None:
    desk = Desk(max_connections=3, idle_expiry_s=60)
    a, b, c = desk.busy("a", "b", "c")
    desk.on(Released(a, True))
    desk.clock.advance(30)
    desk.on(Released(b, True))
    desk.clock.advance(30)
    assert desk.on(Tick()) == (Close(a, Why.EXPIRED),)
    desk.on(Released(c, True))
    desk.clock.advance(30)
    assert desk.on(Tick()) == (Close(b, Why.EXPIRED),)
    assert list(desk.state.idle) == [c]


def test_an_expired_connection_is_never_reused_even_before_the_tick() -> None:
    desk = Desk(idle_expiry_s=60)
    a, b = desk.idle("a", "b")
    desk.clock.advance(60)
    waiter = desk.waiter()
    assert desk.on(Acquire(waiter)) == (Close(b, Why.EXPIRED), Close(a, Why.EXPIRED), Wait(waiter), Dial())


def test_a_connection_past_its_age_is_closed_on_release_and_on_the_tick() -> None:
    desk = Desk(max_connections=2, max_age_s=100, idle_expiry_s=1000)
    a, b = desk.busy("a", "b")
    desk.on(Released(a, True))
    desk.clock.advance(100)
    assert desk.on(Released(b, True)) == (Close(b, Why.AGED),)
    assert desk.on(Tick()) == (Close(a, Why.AGED),)


def test_an_aged_connection_is_not_handed_to_a_waiter() -> None:
    desk = Desk(max_connections=1, max_age_s=100)
    (a,) = desk.busy("a")
    desk.on(Acquire(desk.waiter()))
    desk.clock.advance(100)
    assert desk.on(Released(a, True)) == (Close(a, Why.AGED), Dial())


def test_the_oldest_idle_makes_room_beyond_max_idle() -> None:
    desk = Desk(max_connections=3, max_idle=2)
    a, b, c = desk.busy("a", "b", "c")
    desk.on(Released(a, True))
    desk.on(Released(b, True))
    assert desk.on(Released(c, True)) == (Close(a, Why.SURPLUS), Keep(c))


@pytest.mark.parametrize("limits", [{"max_idle": 0}, {"idle_expiry_s": 0.0}])
def test_a_pool_that_keeps_nothing_closes_on_release(limits: dict[str, Any]) -> None:
    desk = Desk(**limits)
    (a,) = desk.busy("a")
    (action,) = desk.on(Released(a, True))
    assert isinstance(action, Close)
    assert action.conn is a


def test_an_idle_connection_that_went_is_closed_once() -> None:
    desk = Desk()
    (a,) = desk.idle("a")
    assert desk.on(Gone(a)) == (Close(a, Why.GONE),)
    assert desk.on(Gone(a)) == ()


def test_shutdown_closes_the_idle_refuses_the_waiting_and_closes_the_busy_as_they_come_back() -> None:
    desk = Desk(max_connections=2)
    a, b = desk.busy("a", "b")
    waiter, fresh = desk.waiter(), desk.waiter(fresh=True)
    desk.on(Acquire(waiter))
    desk.on(Acquire(fresh))
    assert desk.on(Shutdown()) == (Refuse(waiter, Why.SHUTDOWN), Refuse(fresh, Why.SHUTDOWN))
    assert desk.on(Released(a, True)) == (Close(a, Why.SHUTDOWN),)
    assert desk.on(Released(b, False)) == (Close(b, Why.SHUTDOWN),)
    late = desk.waiter()
    assert desk.on(Acquire(late)) == (Refuse(late, Why.SHUTDOWN),)
    assert desk.state.total == 0


@pytest.mark.parametrize("seed", range(40))
def test_any_history_keeps_the_books_and_serves_everybody(seed: int) -> None:
    """Random events against the invariants of the file's head, then everything comes back and nobody is left
    waiting."""
    chance = random.Random(seed)
    desk = Desk(max_connections=chance.randint(1, 5), max_idle=chance.randint(0, 5), idle_expiry_s=5, max_age_s=40)
    state, busy, waiting, dials, opened = desk.state, [], [], [], 0

    def feed(event: Any) -> None:
        for action in desk.on(event):
            match action:
                case Wait(waiter=waiter):
                    waiting.append(waiter)
                case Dial():
                    dials.append(desk.seq())
                case Hand(waiter=waiter, conn=conn):
                    waiting.remove(waiter)
                    assert not (waiter.fresh and conn.uses)
                    conn.uses += 1
                    busy.append(conn)
                case Reuse(waiter=waiter, conn=conn):
                    assert not waiter.fresh
                    conn.uses += 1
                    busy.append(conn)
                case Fail(waiter=waiter):
                    waiting.remove(waiter)
        assert state.total <= state.limits.max_connections
        assert (state.busy, state.connecting, state.waiting) == (len(busy), len(dials), len(waiting))
        assert len(state.idle) <= state.limits.max_idle
        assert not (state.any_waiters and state.idle)
        assert state.waiting <= state.connecting or state.total >= state.most

    def take(pool: list[Any]) -> Any:
        return pool.pop(chance.randrange(len(pool)))

    for _ in range(600):
        desk.clock.advance(chance.choice((0, 0, 0.1, 1)))
        kind = chance.choices("arRdfgltn", (8, 5, 1, 5, 1, 1, 2, 1, 1))[0]
        if kind == "a":
            feed(Acquire(desk.waiter(fresh=chance.random() < 0.2)))
        elif kind in "rR" and busy:
            feed(Released(take(busy), kind == "r"))
        elif kind == "d" and dials:
            take(dials)
            opened += 1
            feed(Dialled(Conn(f"c{opened}", desk.clock.monotonic())))
        elif kind == "f" and dials:
            feed(DialFailed(take(dials), refused()))
        elif kind == "g" and state.idle:
            feed(Gone(chance.choice(list(state.idle))))
        elif kind == "l" and waiting:
            feed(Left(take(waiting)))
        elif kind == "t":
            feed(Tick())
        elif kind == "n" and dials:
            take(dials)
            feed(NoPort())
    while busy or dials or waiting:
        if waiting and not (busy or dials):
            feed(Tick())  # the last ports were out
        elif dials:
            take(dials)
            feed(Dialled(Conn("end", desk.clock.monotonic())))
        else:
            feed(Released(take(busy), True))
    assert state.waiting == 0


def test_a_thousand_connections_expire_in_one_walk() -> None:
    """No scan per connection: a tick looks at each idle connection once, an acquire only at those it closes."""
    desk = Desk(max_connections=1000, max_idle=1000, idle_expiry_s=60)
    names = [f"c{index}" for index in range(1000)]
    desk.idle(*names)
    desk.clock.advance(60)
    assert len(desk.on(Tick())) == 1000
    assert desk.state.total == 0
