"""Ending a worker: which requests may go on until when, and what is told of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from proxyd.clock import FakeClock
from proxyd.worker import drain as drain_module
from proxyd.worker.drain import (
    ABORT_S,
    Tale,
    Window,
    decide_keep,
    drain,
    retire,
    window_of_retire,
    window_of_term,
)


class Stage:
    """Services with requests that last as long as a test says; each look at `busy` is 0.1 s."""

    def __init__(self, clock: FakeClock, running: int, *, last_s: float = 1e9, deaf: int = 0) -> None:
        self._clock = clock
        self._until = clock.monotonic() + last_s
        self._deaf = deaf
        self.running = running
        self.awaited = 0
        self.master_dies_at = 1e9
        self.finished = 0
        self.handed_over = 0
        self.ended = 0
        self.named: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.ended_at: list[float] = []

    @property
    def is_orphan(self) -> bool:
        self._clock.advance(0.1)
        if self._clock.monotonic() >= self._until:
            self._over(self.running)
        return self._clock.monotonic() >= self.master_dies_at

    @property
    def busy(self) -> int:
        self._clock.advance(0.1)
        if self._clock.monotonic() >= self._until:
            self._over(self.running)
        return self.running

    @property
    def held(self) -> int:
        return self.busy

    def _over(self, count: int) -> None:
        self.running -= count
        self.finished += count

    def retire(self) -> None:
        self.calls.append("retire")

    def refuse(self) -> None:
        self.calls.append("refuse")

    def stop_accepting(self) -> None:
        self.calls.append("stop_accepting")

    def interrupt(self, keep: int) -> int:
        count = max(0, self.running - max(keep, self._deaf))
        self.ended += count
        self.ended_at += [self._clock.monotonic()] * count
        self.running -= count
        return count

    async def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    monkeypatch.setattr(drain_module, "LOOK_S", 0)
    return FakeClock()


def test_all_may_go_on_until_the_window_begins_and_nobody_past_its_end() -> None:
    window = Window(60.0, 120.0)
    assert decide_keep(1000, window, 59.9) == 1000
    assert decide_keep(1000, window, 60.0) == 1000
    assert decide_keep(1000, window, 120.0) == 0


def test_within_the_window_as_many_may_go_on_as_is_left_of_it() -> None:
    window = Window(60.0, 120.0)
    assert decide_keep(1000, window, 90.0) == 500
    assert decide_keep(4, window, 75.0) == 3
    assert decide_keep(1, window, 119.9) == 1, "one alone has all the time there is"


def test_never_more_go_on_later_than_before() -> None:
    window = Window(0.0, 7.0)
    kept = [decide_keep(23, window, tick / 10) for tick in range(80)]
    assert kept == sorted(kept, reverse=True)
    assert max(a - b for a, b in pairwise(kept)) == 1


def test_a_term_ends_requests_in_the_second_half_of_its_time() -> None:
    assert window_of_term(100.0, 220.0) == Window(160.0, 220.0)


def test_a_short_term_ends_them_at_its_end() -> None:
    assert window_of_term(100.0, 100.5) == Window(100.5, 100.5)
    assert window_of_term(100.0, 100.0) == Window(100.0, 100.0)


def test_a_term_gives_a_retiring_worker_no_more_time_than_it_had() -> None:
    assert window_of_term(100.0, 220.0, 110.0) == Window(106.0, 112.0)
    assert window_of_term(100.0, 105.0, 110.0) == Window(102.5, 105.0)
    assert window_of_term(100.0, 220.0, 97.0) == Window(100.0, 100.0)


def test_a_generation_that_retires_has_all_of_its_time() -> None:
    assert window_of_retire(220.0).begin == 220.0


async def test_a_drain_waits_for_what_runs_and_cuts_nothing(clock: FakeClock) -> None:
    stage = Stage(clock, 3, last_s=5)
    end = clock.monotonic() + 10
    await drain(stage, clock, lambda: Window(end, end))
    assert (stage.calls, stage.ended, stage.finished) == (["refuse", "stop_accepting"], 0, 3)


async def test_newcomers_are_answered_until_the_last_request_is_over(clock: FakeClock) -> None:
    stage = Stage(clock, 3, last_s=5)
    end = clock.monotonic() + 10
    task = asyncio.ensure_future(drain(stage, clock, lambda: Window(end, end)))
    await asyncio.sleep(0)
    assert stage.calls == ["refuse"]
    await task
    assert stage.calls == ["refuse", "stop_accepting"]


async def test_one_that_is_done_goes_on_refusing_while_others_at_the_same_listeners_run(clock: FakeClock) -> None:
    stage = Stage(clock, 0)
    stage.awaited = 1
    end = clock.monotonic() + 10
    task = asyncio.ensure_future(drain(stage, clock, lambda: Window(end, end)))
    await asyncio.sleep(0)
    assert stage.calls == ["refuse"]
    stage.awaited = 0
    await task
    assert stage.calls == ["refuse", "stop_accepting"]


async def test_it_does_so_no_longer_than_its_own_time(clock: FakeClock) -> None:
    stage = Stage(clock, 0)
    stage.awaited = 1
    end = clock.monotonic() + 10
    await drain(stage, clock, lambda: Window(end, end))
    assert clock.monotonic() <= end + 1


async def test_an_orphan_leaves_the_addresses_to_the_next_master_at_once(clock: FakeClock) -> None:
    stage = Stage(clock, 3, last_s=5)
    stage.master_dies_at = clock.monotonic() + 2
    end = clock.monotonic() + 10
    task = asyncio.ensure_future(drain(stage, clock, lambda: Window(end, end)))
    while "stop_accepting" not in stage.calls:
        await asyncio.sleep(0)
    assert stage.running == 3
    await task
    assert stage.finished == 3


async def test_the_rest_is_ended_one_by_one(clock: FakeClock) -> None:
    stage = Stage(clock, 10)
    began = clock.monotonic()
    await drain(stage, clock, lambda: window_of_term(began, began + 20))
    gaps = [b - a for a, b in pairwise(stage.ended_at)]
    assert stage.ended == 10
    assert stage.ended_at[0] >= began + 10
    assert began + 19.8 <= stage.ended_at[-1] <= began + 20.2
    assert min(gaps) > 0.5


async def test_one_that_takes_no_ending_is_not_waited_for(clock: FakeClock) -> None:
    stage = Stage(clock, 3, deaf=1)
    end = clock.monotonic() + 10
    tale = Tale(stage, clock.monotonic())
    await drain(stage, clock, lambda: Window(end, end))
    assert end + ABORT_S <= clock.monotonic() < end + ABORT_S + 1
    assert tale.report("term", clock.monotonic()) | {"took_s": 0} == {
        "why": "term", "running": 3, "finished": 0, "ended": 2, "dropped": 1, "handed_over": 0, "took_s": 0, "left": [],
    }  # fmt: skip


async def test_a_deadline_that_comes_nearer_is_heeded(clock: FakeClock) -> None:
    stage = Stage(clock, 1)
    near = clock.monotonic() + 5
    ends = iter([1e9, 1e9])

    def window() -> Window:
        end = next(ends, near)
        return Window(end, end)

    await drain(stage, clock, window)
    assert clock.monotonic() < near + 5


async def _retire(stage: Stage, clock: FakeClock, deadline: float, is_stopped: Callable[[], bool]) -> None:
    await retire(stage, clock, lambda: deadline, is_stopped)


async def test_a_retiring_worker_is_done_when_nothing_holds_it(clock: FakeClock) -> None:
    stage = Stage(clock, 2, last_s=3)
    began = clock.monotonic()
    await _retire(stage, clock, began + 100, lambda: False)
    assert stage.calls == ["retire"]
    assert clock.monotonic() < began + 4


async def test_a_retiring_worker_ends_nobody_before_its_deadline(clock: FakeClock) -> None:
    stage = Stage(clock, 2)
    deadline = clock.monotonic() + 30
    await _retire(stage, clock, deadline, lambda: False)
    assert stage.ended == 0
    assert deadline <= clock.monotonic() < deadline + 1


async def test_a_retiring_worker_heeds_a_stop(clock: FakeClock) -> None:
    stage = Stage(clock, 2)
    began = clock.monotonic()
    await _retire(stage, clock, began + 100, lambda: clock.monotonic() > began + 2)
    assert clock.monotonic() < began + 3


async def test_those_who_came_meanwhile_count_as_finished(clock: FakeClock) -> None:
    stage = Stage(clock, 2, last_s=3)
    tale = Tale(stage, clock.monotonic())
    stage.running += 5
    await _retire(stage, clock, clock.monotonic() + 100, lambda: False)
    report = tale.report("retire", clock.monotonic())
    assert (report["running"], report["finished"], report["ended"]) == (2, 7, 0)
