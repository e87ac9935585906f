"""What /readyz says, and in which order of reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from proxyd.clock import FakeClock
from proxyd.log import Log, Sink
from proxyd.shm.beats import Standing, State
from proxyd.shm.region import Region
from proxyd.worker.readiness import NodeReadiness


@dataclass
class Acceptor:
    is_starved: bool = False


@dataclass
class Spool:
    broken_reason: str | None = None


class Totals:
    def read(self, now: float) -> dict[str, object]:
        return {}


class World:
    def __init__(self) -> None:
        self.clock = FakeClock()
        self.standing = Standing()
        self.standing.state = State.READY
        self.spool, self.acceptor = Spool(), Acceptor()
        self.ready = NodeReadiness(
            Region.create(4),
            self.standing,
            cast("Any", self.spool),
            cast("Any", Totals()),
            cast("Any", lambda: self.acceptor),
            self.clock,
            Log(access="off", events=Sink(-1)),
        )

    def pulses(self, count: int, late_s: float) -> None:
        for _ in range(count):
            self.clock.advance(0.1 + late_s)
            self.ready.pulse(self.clock.monotonic())

    @property
    def says(self) -> tuple[bool, str]:
        answer = self.ready.read()
        return answer.ready, answer.reason


@pytest.fixture
def world() -> World:
    return World()


def test_a_worker_that_serves_is_ready(world: World) -> None:
    assert world.says == (True, "ready")


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING])
def test_one_that_starts_or_drains_says_so_before_all_else(world: World, state: State) -> None:
    world.standing.state = state
    world.spool.broken_reason = "disk full"
    assert world.says == (False, state.name.lower())


def test_a_spool_that_takes_no_rows_is_told_with_its_reason(world: World) -> None:
    world.spool.broken_reason = "the spool is full"
    assert world.says == (False, "spool_unavailable")
    assert world.ready.read().details == {"spool": "the spool is full"}


def test_without_descriptors_it_is_overloaded_until_there_are_some(world: World) -> None:
    world.acceptor.is_starved = True
    assert world.says == (False, "overloaded")
    world.acceptor.is_starved = False
    assert world.says == (True, "ready")


def test_a_loop_that_stays_late_is_overloaded_then_refuses_and_recovers(world: World) -> None:
    world.pulses(10, 0.0)
    world.pulses(3, 1.2)
    assert world.says == (False, "overloaded")
    assert not world.ready.is_refusing
    world.pulses(5, 3.2)
    assert world.ready.is_refusing
    world.pulses(25, 0.0)
    assert world.says == (True, "ready")
    assert not world.ready.is_refusing


def test_a_process_that_was_stopped_for_a_minute_is_ready_at_once(world: World) -> None:
    world.pulses(10, 0.0)
    world.pulses(1, 60.0)
    assert world.says == (True, "ready")
