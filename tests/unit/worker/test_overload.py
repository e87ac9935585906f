"""When a loop that is late is an overload, and when it is over."""

from __future__ import annotations

from proxyd.worker.overload import CALM_REFUSE_S, CALM_S, REFUSE_AFTER_S, UNREADY_AFTER_S, LagWatch


def pulses(watch: LagWatch, now: float, lag: float, count: int) -> float:
    """`count` pulses that are each `lag` late; the time of the last."""
    for _ in range(count):
        now += 0.1 + lag
        watch.see(lag, now)
    return now


def test_a_loop_that_is_in_time_or_a_little_late_is_no_overload() -> None:
    watch = LagWatch()
    now = pulses(watch, 0.0, 0.0, 100)
    pulses(watch, now, 0.9, 100)
    assert not watch.is_overloaded


def test_a_process_that_is_stopped_again_and_again_is_no_overload() -> None:
    watch = LagWatch()
    now = 0.0
    for _ in range(10):
        now = pulses(watch, now, 4.0, 1)
        assert not watch.is_overloaded
        now = pulses(watch, now, 0.0, 5)
    assert not watch.is_refusing


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


def test_a_pulse_that_is_only_a_little_late_does_not_end_it() -> None:
    watch = LagWatch()
    now = 0.0
    for _ in range(5):
        now = pulses(watch, now, 1.5, 1)
        now = pulses(watch, now, 0.6, 1)
    assert watch.is_overloaded
    assert watch.is_refusing


def test_requests_are_taken_again_as_soon_as_there_is_room_and_it_is_ready_a_while_later() -> None:
    watch = LagWatch()
    now = pulses(watch, 0.0, 1.5, 6)
    assert watch.is_refusing
    now = pulses(watch, now, 0.0, 1)
    assert watch.is_refusing, "one good pulse is not enough"
    now = pulses(watch, now, 0.0, round(CALM_REFUSE_S * 10) + 1)
    assert not watch.is_refusing
    assert watch.is_overloaded
    pulses(watch, now, 0.0, round(CALM_S * 10) + 1)
    assert not watch.is_overloaded
