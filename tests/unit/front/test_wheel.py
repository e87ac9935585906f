"""The deadline wheel, on a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from proxyd.front.wheel import GRANULARITY_S, NEVER, NOT_PARKED, Wheel


class Thing:
    """Something with a deadline; remembers when it was called."""

    __slots__ = ("deadline", "fired", "on_fire", "parked")

    def __init__(self) -> None:
        self.deadline = NEVER
        self.parked = NOT_PARKED
        self.fired: list[float] = []
        self.on_fire = lambda: None

    def on_deadline(self, now: float) -> None:
        self.fired.append(now)
        self.on_fire()


def run_until(wheel: Wheel, start: float, end: float, step: float = GRANULARITY_S) -> float:
    now = start
    while now < end:
        now += step
        wheel.tick(now)
    return now


def test_a_deadline_fires_once_and_never_early() -> None:
    wheel, thing = Wheel(1000.0), Thing()
    wheel.add(thing, 1002.0)
    run_until(wheel, 1000.0, 1010.0)
    assert len(thing.fired) == 1
    assert 1002.0 <= thing.fired[0] <= 1002.0 + 2 * GRANULARITY_S + 1e-6
    assert len(wheel) == 0


def test_a_deadline_that_moves_later_waits_for_the_later_one() -> None:
    wheel, thing = Wheel(0.0), Thing()
    wheel.add(thing, 1.0)
    parked = thing.parked
    wheel.add(thing, 5.0)
    assert thing.parked == parked, "moving later costs an attribute, no bucket"
    run_until(wheel, 0.0, 4.9)
    assert thing.fired == []
    run_until(wheel, 4.9, 6.0)
    assert len(thing.fired) == 1


def test_a_deadline_that_moves_earlier_fires_at_the_earlier_one() -> None:
    wheel, thing = Wheel(0.0), Thing()
    wheel.add(thing, 60.0)
    wheel.add(thing, 1.0)
    assert len(wheel) == 1
    run_until(wheel, 0.0, 1.5)
    assert len(thing.fired) == 1
    run_until(wheel, 1.5, 70.0)
    assert len(thing.fired) == 1


def test_a_cancelled_object_is_not_kept() -> None:
    wheel, thing = Wheel(0.0), Thing()
    wheel.add(thing, 1.0)
    wheel.cancel(thing)
    assert len(wheel) == 0
    run_until(wheel, 0.0, 3.0)
    assert thing.fired == []


def test_a_disarmed_object_does_not_fire() -> None:
    wheel, thing = Wheel(0.0), Thing()
    wheel.add(thing, 1.0)
    wheel.add(thing, NEVER)
    run_until(wheel, 0.0, 3.0)
    assert thing.fired == []


def test_a_callback_may_cancel_its_neighbour_in_the_same_bucket() -> None:
    wheel, left, right = Wheel(0.0), Thing(), Thing()
    wheel.add(left, 1.0)
    wheel.add(right, 1.0)
    left.on_fire = lambda: wheel.cancel(right)
    right.on_fire = lambda: wheel.cancel(left)
    run_until(wheel, 0.0, 3.0)
    assert len(left.fired) + len(right.fired) == 1


def test_a_callback_may_arm_itself_again() -> None:
    wheel, thing = Wheel(0.0), Thing()
    thing.on_fire = lambda: wheel.add(thing, thing.fired[-1] + 1.0)
    wheel.add(thing, 1.0)
    run_until(wheel, 0.0, 10.0)
    assert 7 <= len(thing.fired) <= 9


def test_a_loop_that_stalled_fires_everything_that_became_due() -> None:
    wheel = Wheel(0.0)
    things = [Thing() for _ in range(50)]
    for number, thing in enumerate(things):
        wheel.add(thing, number * 0.5)
    wheel.tick(100.0)
    assert [len(thing.fired) for thing in things] == [1] * 50


@pytest.mark.parametrize("seed", range(5))
def test_any_mix_of_moves_fires_each_object_in_time(seed: int) -> None:
    dice = random.Random(seed)
    wheel, now = Wheel(0.0), 0.0
    things = [Thing() for _ in range(40)]
    due: dict[Thing, float] = {}
    for _ in range(600):
        now += dice.random() * 0.3
        wheel.tick(now)
        for thing, deadline in list(due.items()):
            if thing.fired:
                assert thing.fired[0] >= deadline
                thing.fired.clear()
                del due[thing]
            else:
                assert now <= deadline + 2 * GRANULARITY_S + 0.3
        thing = dice.choice(things)
        if dice.random() < 0.2:
            wheel.cancel(thing)
            due.pop(thing, None)
        else:
            due[thing] = now + dice.random() * 5
            wheel.add(thing, due[thing])
        assert len(wheel) == len(due)
