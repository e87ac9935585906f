"""Ending a worker, standing in for a vacant slot, and the pulse, without sockets."""

from __future__ import annotations

import asyncio

from proxyd.clock import FakeClock
from proxyd.log import Log, Sink
from proxyd.shm.beats import Beat
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.worker import drain as drain_module
from proxyd.worker.adopt import Adoption
from proxyd.worker.beat import Pulse
from proxyd.worker.drain import drain


class Stage:
    """Services that finish one request each time somebody looks, unless they are stuck."""

    def __init__(self, clock: FakeClock, busy: int, *, stuck: bool = False) -> None:
        self._clock = clock
        self._busy = busy
        self._is_stuck = stuck
        self.calls: list[str] = []

    @property
    def busy(self) -> int:
        self._clock.advance(1.0)
        if self._busy and not self._is_stuck:
            self._busy -= 1
        return self._busy

    def stop_accepting(self) -> None:
        self.calls.append("stop_accepting")

    def abort(self) -> None:
        self.calls.append("abort")

    async def close(self) -> None:
        self.calls.append("close")


async def test_a_drain_waits_for_what_runs_and_cuts_nothing(monkeypatch) -> None:
    monkeypatch.setattr(drain_module, "LOOK_S", 0)
    clock = FakeClock()
    stage = Stage(clock, 3)
    assert await drain(stage, clock, lambda: 1e9) == 0
    assert stage.calls == ["stop_accepting"]


async def test_past_the_deadline_the_rest_is_ended_and_counted(monkeypatch) -> None:
    monkeypatch.setattr(drain_module, "LOOK_S", 0)
    clock = FakeClock()
    stage = Stage(clock, 3, stuck=True)
    deadline = clock.monotonic() + 10
    assert await drain(stage, clock, lambda: deadline) == 3
    assert stage.calls == ["stop_accepting", "abort"]
    assert clock.monotonic() < deadline + 20


async def test_a_deadline_that_comes_nearer_is_heeded(monkeypatch) -> None:
    monkeypatch.setattr(drain_module, "LOOK_S", 0)
    clock = FakeClock()
    stage = Stage(clock, 1, stuck=True)
    near = clock.monotonic() + 5
    deadlines = iter([1e9, 1e9])
    assert await drain(stage, clock, lambda: next(deadlines, near)) == 1
    assert clock.monotonic() < 1e6


class FakeAcceptor:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def resume(self) -> None:
        self.calls.append("resume")

    def pause(self) -> None:
        self.calls.append("pause")

    def close(self) -> None:
        self.calls.append("close")


def test_a_vacant_slot_is_accepted_for_until_its_successor_serves() -> None:
    region = Region.create(5)
    made: dict[int, FakeAcceptor] = {}

    def make(slot: int) -> FakeAcceptor:
        made[slot] = FakeAcceptor()
        return made[slot]

    adoption = Adoption(region, 0, 3, make)
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
