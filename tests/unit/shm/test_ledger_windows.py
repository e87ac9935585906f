"""Any sixty seconds hold at most the limit, nothing is refused that would fit, and the wait that is told is true."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd._ledger import Table, Writer
from proxyd._shm import Words
from proxyd.shm.ledger import Ledger, Window

NOW = 987_654_321
TICKS = 250


def window() -> Window:
    return Ledger.create(1, tenants=1, users=1).at(0, 1).tenant("default").requests


# (ms since the call before, how old the caller's clock reading is, n)
calls = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 20), st.integers(0, 3_000), st.integers(56_000, 64_000), st.integers(0, 200_000)),
        st.one_of(st.just(0), st.integers(0, 3_750)),
        st.integers(1, 5),
    ),
    min_size=1,
    max_size=80,
)


@given(calls, st.integers(5, 20))
@settings(deadline=None)
def test_any_sixty_seconds_hold_the_limit_and_no_refusal_is_wrong(schedule: list[tuple[int, int, int]], limit: int):
    subject = window()
    real = NOW
    made: list[tuple[int, int, int]] = []  # the caller's clock, the real time, n
    for pause, age, n in schedule:
        real += pause
        if subject.try_add(n, limit, real - age):
            made.append((real - age, real, n))
        else:
            # 241 ticks, the first of them whole: less than 60.25 s before the caller's clock
            assert sum(m for _, at, m in made if at > real - age - 60_250) + n > limit
    for first, _, _ in made:
        assert sum(n for now, _, n in made if first <= now < first + 60_000) <= limit


@given(calls, st.integers(1, 20), st.integers(0, 25), st.integers(0, 3_750))
@settings(deadline=None)
def test_after_the_wait_that_was_told_it_succeeds_and_not_before(
    schedule: list[tuple[int, int, int]], limit: int, n: int, age: int
) -> None:
    subject = window()
    real = NOW
    for pause, behind, m in schedule:
        real += pause
        subject.add(m, real - behind) if m == 3 else subject.try_add(m, limit, real - behind)
    wait = subject.wait_ms(n, limit, real - age)
    if wait:
        assert not subject.try_add(n, limit, real - age)
        assert not subject.try_add(n, limit, real - age + wait - 1)
    assert subject.wait_ms(n, limit, real - age + wait) == 0
    assert subject.try_add(n, limit, real - age + wait)


@given(calls)
@settings(deadline=None)
def test_what_is_given_back_with_its_own_time_is_gone_while_it_counts(schedule: list[tuple[int, int, int]]) -> None:
    subject = window()
    real = NOW
    taken: list[tuple[int, int, int]] = []
    for pause, age, n in schedule:
        real += pause
        if subject.try_add(n, 10**6, real - age):
            taken.append((real - age, real, n))
    for now, _, n in taken:
        subject.add(-n, now)
    assert subject.total(real) == 0


def test_the_limit_is_reached_exactly() -> None:
    subject = window()
    assert [subject.try_add(4, 10, NOW) for _ in range(3)] == [True, True, False]
    assert subject.try_add(2, 10, NOW)
    assert not subject.try_add(1, 10, NOW)
    assert subject.total(NOW) == 10


def test_nothing_more_fits_into_a_full_minute_except_nothing() -> None:
    subject = window()
    subject.add(10, NOW)
    assert subject.try_add(0, 10, NOW)
    assert subject.wait_ms(0, 10, NOW) == 0
    subject.add(1, NOW)
    assert not subject.try_add(0, 10, NOW)


def test_a_request_larger_than_the_limit_passes_alone() -> None:
    subject = window()
    assert subject.try_add(500, 10, NOW)
    assert not subject.try_add(1, 10, NOW)
    assert not subject.try_add(500, 10, NOW)
    wait = subject.wait_ms(500, 10, NOW)
    assert 60_000 < wait <= 60_250
    assert subject.try_add(500, 10, NOW + wait)


def test_a_long_idle_window_is_empty_whatever_its_ring_still_holds() -> None:
    for idle in (60_250, 64_000, 64_250, 128_000, 10**6, 10**9, 31 * 10**9):
        subject = window()
        for k in range(256):
            subject.add(1, NOW + k * TICKS)
        then = NOW + 255 * TICKS + idle
        assert subject.total(then) == 0
        assert subject.wait_ms(10, 10, then) == 0
        assert subject.try_add(10, 10, then)
        assert subject.total(then) == 10


def test_the_same_ring_serves_lap_after_lap() -> None:
    subject = window()
    for k in range(2_000):
        assert subject.try_add(1, 241, NOW + k * TICKS), k
        assert subject.total(NOW + k * TICKS) == min(k + 1, 241)
    assert not subject.try_add(1, 241, NOW + k * TICKS)


def test_the_lap_s_number_may_wrap() -> None:
    """After 34 years of uptime, but nobody should have to know."""
    subject = window()
    end = (1 << 24) * 256 * TICKS
    assert subject.try_add(3, 5, end - 100)
    assert not subject.try_add(3, 5, end + 100)
    assert subject.try_add(2, 5, end + 100)
    assert subject.total(end + 100) == 5
    assert subject.try_add(3, 5, end + 60_000)


def test_the_first_minute_after_the_machine_s_start_counts_too() -> None:
    subject = window()
    assert subject.try_add(5, 5, 0)
    assert not subject.try_add(1, 5, 59_999)
    assert not subject.try_add(1, 5, 60_249)
    assert subject.try_add(1, 5, 60_250)


def test_a_caller_with_an_older_clock_sees_what_the_newer_one_added() -> None:
    subject = window()
    assert subject.try_add(10, 10, NOW + 250)
    assert not subject.try_add(1, 10, NOW)
    assert subject.total(NOW) == 10


def test_a_caller_with_an_older_clock_counts_from_its_own_minute_on() -> None:
    subject = window()
    assert subject.try_add(10, 10, NOW)
    assert subject.try_add(1, 10, NOW + 61_000)
    assert not subject.try_add(1, 10, NOW + 59_000)
    assert (subject.total(NOW + 61_000), subject.total(NOW + 59_000)) == (1, 11)
    assert subject.wait_ms(1, 10, NOW + 59_000) > 1_000


def test_a_caller_that_was_stopped_for_minutes_is_neither_lost_nor_in_the_way() -> None:
    subject = window()
    assert subject.try_add(5, 10, NOW + 300_000)
    assert subject.try_add(5, 10, NOW)
    assert not subject.try_add(1, 10, NOW)
    assert not subject.try_add(1, 10, NOW + 300_000)
    assert subject.total(NOW + 300_000) == 10


def test_more_than_is_there_is_never_given_back() -> None:
    subject = window()
    subject.add(5, NOW)
    subject.add(-7, NOW)
    assert subject.total(NOW) == 0
    subject.add(5, NOW + TICKS)
    subject.add(-7, NOW - 60_000)
    assert subject.total(NOW + TICKS) == 5
    subject.add(-(2**63), NOW + TICKS)
    assert subject.total(NOW + TICKS) == 0


def test_a_tick_s_count_stops_at_what_its_bits_hold() -> None:
    subject = window()
    subject.add(2**62, NOW)
    subject.add(2**62, NOW)
    assert subject.total(NOW) == 2**39 - 1
    assert not subject.try_add(2**62, 10**12, NOW)
    assert subject.total(NOW + 60_250) == 0


def test_a_negative_request_is_refused_as_a_mistake() -> None:
    with pytest.raises(ValueError):
        window().try_add(-1, 10, NOW)


def test_a_tick_closed_by_one_who_died_then_is_left_for_the_next_with_its_count() -> None:
    memory = mmap.mmap(-1, Table.measure(1, 1, 1, 0))
    table = Table(memory, 1, 1, 1, 0)
    subject = Writer(table, 0, 1).tenant(1).requests
    assert subject.try_add(4, 10, NOW)
    ring = Words(memory, len(memory) - 69 * 4096 + 16 * 8, 256)  # 68 pages before the plane's: the first row
    at = NOW // TICKS % 256
    assert ring.load(at) & 0xFF == 4
    ring.store(at, ring.load(at) | 1 << 39)
    assert subject.total(NOW) == 4
    assert subject.try_add(5, 10, NOW)
    assert not subject.try_add(2, 10, NOW)
    assert ring.load((at + 1) % 256) & 0xFF == 5
    subject.add(-4, NOW)
    assert subject.total(NOW) == 5
    assert subject.try_add(5, 10, NOW + TICKS)


def test_the_two_windows_of_a_tenant_and_those_of_another_are_apart() -> None:
    ledger = Ledger.create(2, tenants=2, users=1)
    one, other = ledger.at(0, 1), ledger.at(1, 1)
    one.tenant("a").requests.add(3, NOW)
    one.tenant("a").tokens.add(5, NOW)
    assert other.tenant("a").requests.total(NOW) == 3
    assert other.tenant("a").tokens.total(NOW) == 5
    assert other.tenant("b").requests.total(NOW) == 0
