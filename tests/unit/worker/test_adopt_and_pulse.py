"""Standing in for a vacant slot, and the pulse, without sockets."""

from __future__ import annotations

import asyncio

from proxyd.clock import FakeClock
from proxyd.host.child import Birth
from proxyd.log import Log, Sink
from proxyd.shm.beats import Beat
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.worker.adopt import Adoption
from proxyd.worker.beat import Pulse


class FakeAcceptor:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def resume(self) -> None:
        self.calls.append("resume")

    def pause(self) -> None:
        self.calls.append("pause")

    def close(self) -> None:
        self.calls.append("close")


def birth_at(slot: int, seat: int, generation: int) -> Birth:
    return Birth(slot, seat, generation, 0, -1, -1)


def test_a_vacant_slot_is_accepted_for_until_its_successor_serves() -> None:
    region = Region.create(7)
    for seat in range(3):
        Beat(region, seat).birth(0, 1, 0.0, slot=seat, generation=1)
    made: dict[int, FakeAcceptor] = {}

    def make(slot: int) -> FakeAcceptor:
        made[slot] = FakeAcceptor()
        return made[slot]

    adoption = Adoption(region, birth_at(0, 0, 1), make)
    adoption.pulse()
    assert made == {}
    Beat(region, 2).set_vacant(True)
    adoption.pulse()
    assert made[2].calls == ["resume"]
    Beat(region, 2).set_vacant(False)
    adoption.pulse()
    assert made[2].calls == ["resume", "pause"]
    Beat(region, 0).set_vacant(True)
    adoption.pulse()
    assert set(made) == {2}, "its own slot is never adopted"
    adoption.close()
    assert made[2].calls[-1] == "close"


def test_a_vacant_slot_is_that_of_its_own_generation_wherever_it_sits() -> None:
    region = Region.create(7)
    made: list[int] = []
    Beat(region, 1).birth(0, 1, 0.0, slot=1, generation=1)
    Beat(region, 1).set_vacant(True)
    Beat(region, 3).birth(0, 1, 0.0, slot=0, generation=2)
    Beat(region, 4).birth(0, 1, 0.0, slot=2, generation=2)

    def make(slot: int) -> FakeAcceptor:
        made.append(slot)
        return FakeAcceptor()

    adoption = Adoption(region, birth_at(0, 3, 2), make)
    adoption.pulse()
    assert made == [], "slot 1 of the generation before is not ours to serve"
    Beat(region, 4).set_vacant(True)
    adoption.pulse()
    assert made == [2]


async def test_the_pulse_beats_measures_lag_and_survives_a_failing_tick() -> None:
    region = Region.create(2)
    clock = FakeClock()
    beat = Beat(region, 0)
    metrics = Metrics(region, 0)
    log = Log(access="off", events=Sink(-1))
    pulse = Pulse(asyncio.get_running_loop(), clock, beat, metrics, log, "test")
    pulse.start()
    ticks: list[float] = []

    def fail() -> None:
        ticks.append(clock.monotonic())
        raise RuntimeError("a bug")

    pulse.serve(lambda: None, fail, lambda: "")
    for _ in range(20):
        clock.advance(0.35)
        pulse._run()
    pulse.stop()
    assert len(ticks) == 2
    assert beat.silent_s(clock.monotonic()) < 0.01
    lag = read(region, clock.monotonic()).histograms["proxyd_loop_lag_seconds"]
    assert lag.count == 20
    assert 0.2 < (lag.quantile_s(0.5) or 0) < 0.3
