"""Decisions about children: back-off, silence, when to give up, which way a slot may go."""

from __future__ import annotations

import itertools

import pytest

from proxyd.host.child import EXIT_CANNOT_BOOT, ChildSpec
from proxyd.master import slots as judge
from proxyd.master.slots import EDGES, Phase, Slot


def make_slot(*, is_worker: bool = True) -> Slot:
    return Slot(0 if is_worker else -1, ChildSpec("worker 0", lambda birth: 0), seat=0)


def in_phase(phase: Phase, exit_code: int | None = None) -> Slot:
    slot = make_slot()
    slot.phase = phase
    slot.exit_code = exit_code
    return slot


def test_one_sudden_death_is_answered_at_once() -> None:
    assert judge.decide_delay(3600.0, 0, -9) == (0, 0.0)
    assert judge.decide_delay(0.1, 0, -9) == (1, 0.0)


def test_a_crash_loop_waits_twice_as_long_each_time_up_to_a_bound() -> None:
    failures, delays = 0, []
    for _ in range(20):
        failures, delay = judge.decide_delay(0.1, failures, 1)
        delays.append(delay)
    assert delays[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert all(b in (2 * a, judge.BACKOFF_MAX_S) for a, b in itertools.pairwise(delays[1:]))
    assert delays[-1] == judge.BACKOFF_MAX_S


def test_one_that_served_is_kept_waiting_less_long() -> None:
    assert judge.decide_delay(0.1, 50, -9, has_served=True)[1] == judge.BACKOFF_SERVED_MAX_S
    assert judge.decide_delay(0.1, 50, EXIT_CANNOT_BOOT, has_served=True)[1] == judge.BACKOFF_MAX_S


def test_a_long_life_ends_the_crash_loop() -> None:
    assert judge.decide_delay(judge.YOUNG_S, 9, -11) == (0, 0.0)
    assert judge.decide_delay(judge.YOUNG_SERVED_S, 9, -9, has_served=True) == (0, 0.0)
    assert judge.decide_delay(judge.YOUNG_SERVED_S, 9, -9)[1] > 0


def test_one_that_cannot_boot_is_never_retried_at_once() -> None:
    assert judge.decide_delay(60.0, 0, EXIT_CANNOT_BOOT) == (1, judge.CANNOT_BOOT_S)
    assert judge.decide_delay(60.0, 50, EXIT_CANNOT_BOOT)[1] == judge.BACKOFF_MAX_S


def test_silence_counts_from_the_last_new_beat() -> None:
    slot = make_slot()
    slot.is_ready = True
    assert not judge.is_silent(slot, 100.0, 1, 10.0, 30.0)
    assert not judge.is_silent(slot, 110.0, 1, 10.0, 30.0)
    assert judge.is_silent(slot, 110.1, 1, 10.0, 30.0)
    assert not judge.is_silent(slot, 110.2, 2, 10.0, 30.0)


def test_a_booting_child_may_be_silent_longer() -> None:
    slot = make_slot()
    judge.is_silent(slot, 100.0, 1, 10.0, 30.0)
    assert not judge.is_silent(slot, 129.0, 1, 10.0, 30.0)
    assert judge.is_silent(slot, 131.0, 1, 10.0, 30.0)


def test_a_pause_of_the_whole_machine_is_nobodys_silence() -> None:
    slot = make_slot()
    slot.is_ready = True
    judge.is_silent(slot, 100.0, 1, 10.0, 30.0)
    judge.forgive_pause([slot], 500.0, 1.0)
    assert not judge.is_silent(slot, 601.0, 1, 10.0, 30.0)
    judge.forgive_pause([slot], 1.2, 1.0)
    assert judge.is_silent(slot, 611.0, 1, 10.0, 30.0)


def test_the_node_gives_up_only_if_no_worker_ever_could_boot() -> None:
    refused = [in_phase(Phase.BACKOFF, EXIT_CANNOT_BOOT) for _ in range(2)]
    assert judge.can_nobody_boot(refused)
    assert not judge.can_nobody_boot([*refused, in_phase(Phase.RUNNING)])
    assert not judge.can_nobody_boot([*refused, in_phase(Phase.BACKOFF, 1)])
    refused[0].was_ready = True
    assert not judge.can_nobody_boot(refused)


def test_the_node_has_started_when_one_serves_and_none_is_in_its_first_start() -> None:
    serving, starting = in_phase(Phase.RUNNING), in_phase(Phase.RUNNING)
    serving.was_ready = True
    assert not judge.has_started([serving, starting])
    starting.exit_code = EXIT_CANNOT_BOOT
    assert judge.has_started([serving, starting])
    assert not judge.has_started([starting])


@pytest.mark.parametrize("start, end", list(itertools.product(Phase, Phase)))
def test_a_slot_moves_along_the_table_only(start: Phase, end: Phase) -> None:
    slot = in_phase(start)
    if end in EDGES[start]:
        slot.move(end, 7.0)
        assert (slot.phase, slot.due_at) == (end, 7.0)
    else:
        with pytest.raises(RuntimeError):
            slot.move(end)
        assert slot.phase is start
