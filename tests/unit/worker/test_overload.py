"""When a loop that is late is an overload, and when it is over."""

from __future__ import annotations

from proxyd.worker.overload import CALM_S, REFUSE_AFTER_S, UNREADY_AFTER_S, LagWatch


def pulses(watch: LagWatch, now: float, lag: float, count: int) -> float:
    """`count` pulses that are each `lag` late; the time of the last."""
    for _ in range(count):
        now += 0.1 + lag
        watch.see(lag, now)
    return now


def test_a_loop_that_is_in_time_is_no_overload() -> None:
    watch = LagWatch()
    pulses(watch, 0.0, 0.2, 100)
    assert not watch.is_overloaded


def test_one_pulse_is_never_an_overload_however_late() -> None:
    watch = LagWatch()
    now = pulses(watch, 0.0, 60.0, 1)
    assert not watch.is_overloaded
    pulses(watch, now, 0.0, 30)
    assert not watch.is_overloaded


def test_a_loop_that_stays_late_is_first_not_ready_and_then_refuses() -> None:
    watch = LagWatch()
    now = pulses(watch, 0.0, 1.5, 1)
    began = now
    while now - began < UNREADY_AFTER_S:
        assert not watch.is_overloaded
        now = pulses(watch, now, 1.5, 1)
    assert watch.is_overloaded
    assert not watch.is_refusing
    while now - began < REFUSE_AFTER_S:
        now = pulses(watch, now, 1.5, 1)
    assert watch.is_refusing


def test_it_is_over_when_no_pulse_was_late_for_a_while_and_not_at_the_first_good_one() -> None:
    watch = LagWatch()
    now = pulses(watch, 0.0, 1.5, 5)
    assert watch.is_overloaded
    now = pulses(watch, now, 0.0, 10)
    assert watch.is_overloaded
    pulses(watch, now, 0.0, round(CALM_S * 10))
    assert not watch.is_overloaded
    assert not watch.is_refusing
