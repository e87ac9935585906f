"""Generations and seats: which way a generation may go, who sits where, what is said when there is no room."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from proxyd.host.child import ChildSpec
from proxyd.master.generations import EDGES, Generation, NoSeats, Seats, Stage, tell_no_seats
from proxyd.master.slots import Phase, Slot
from proxyd.master.spec import GenerationSpec


def worker(number: int = 0, phase: Phase = Phase.RUNNING, *, is_ready: bool = True) -> Slot:
    slot = Slot(number, ChildSpec("worker", lambda birth: 0), seat=number, generation=1)
    slot.phase, slot.is_ready = phase, is_ready
    return slot


def generation(*slots: Slot, number: int = 1) -> Generation:
    return Generation(number, cast(GenerationSpec, None), list(slots), "1.0", 100.0)


@pytest.mark.parametrize(("start", "end"), list(itertools.product(Stage, Stage)))
def test_a_generation_moves_along_the_table_only(start: Stage, end: Stage) -> None:
    one = generation()
    one.stage = start
    if end in EDGES[start]:
        one.move(end, 107.0)
        assert (one.stage, one.since) == (end, 107.0)
    else:
        with pytest.raises(RuntimeError):
            one.move(end, 107.0)
        assert (one.stage, one.since) == (start, 100.0)


def test_gone_absorbs() -> None:
    assert EDGES[Stage.GONE] == frozenset()


def test_a_generation_is_ready_when_every_worker_serves() -> None:
    assert generation(worker(0), worker(1)).is_ready
    assert not generation(worker(0), worker(1, is_ready=False)).is_ready
    assert not generation(worker(0), worker(1, Phase.GONE)).is_ready
    assert not generation(worker(0), worker(1, Phase.BACKOFF)).is_ready


def test_a_worker_that_is_gone_before_its_generation_serves_is_found() -> None:
    lost = worker(1, Phase.GONE)
    assert generation(worker(0), lost).find_failed() is lost
    assert generation(worker(0), worker(1, is_ready=False)).find_failed() is None


def test_a_generation_is_over_when_nobody_of_it_is_left() -> None:
    assert generation(worker(0, Phase.GONE), worker(1, Phase.GONE)).is_over
    assert not generation(worker(0, Phase.GONE), worker(1, Phase.STOPPING)).is_over


def test_the_lowest_free_seats_are_taken() -> None:
    seats = Seats(8)
    assert seats.take(3, 1) == [0, 1, 2]
    assert seats.take(2, 2) == [3, 4]
    assert seats.give(1, 1)
    assert seats.take(2, 3) == [1, 5]


def test_a_seat_is_given_back_once_and_by_its_holder_only() -> None:
    seats = Seats(2)
    seats.take(1, 1)
    assert not seats.give(0, 2)
    assert seats.give(0, 1)
    assert not seats.give(0, 1)
    assert seats.take(2, 2) == [0, 1]
    assert not seats.give(0, 1)


def test_without_room_nothing_is_taken_and_the_holders_are_named() -> None:
    seats = Seats(4)
    seats.take(2, 1)
    seats.take(1, 2)
    with pytest.raises(NoSeats) as caught:
        seats.take(2, 3)
    assert (caught.value.wanted, caught.value.free, caught.value.holders) == (2, 1, {1: 2, 2: 1})
    assert seats.take(1, 3) == [3]


def test_seats_that_were_taken_before_an_upgrade_are_held_once() -> None:
    seats = Seats(4)
    seats.hold(2, 7)
    seats.hold(2, 7)
    assert seats.take(3, 8) == [0, 1, 3]
    for seat, number in ((2, 6), (9, 7), (-1, 7)):
        with pytest.raises(ValueError, match="seat"):
            seats.hold(seat, number)


def test_who_holds_the_seats_and_until_when_is_told() -> None:
    old, new = generation(number=1), generation(number=2)
    old.stage, old.ends_at = Stage.RETIRING, 160.0
    new.stage = Stage.SERVING
    told = tell_no_seats(NoSeats(2, 1, {1: 2, 2: 2}), 5, [old, new], 100.0)
    assert "generation 1 draining (2 workers, 60 s more at most)" in told
    assert "generation 2 serving (2 workers)" in told
    assert "lower server.drain_timeout" in told


def test_more_workers_than_would_ever_fit_need_a_restart() -> None:
    assert "systemctl restart proxyd" in tell_no_seats(NoSeats(100, 0, {}), 128, [], 0.0)


def test_a_slot_knows_what_it_is_by_its_numbers() -> None:
    made: dict[str, Any] = {"spec": ChildSpec("x", lambda birth: 0)}
    assert Slot(0, **made, seat=0).is_worker
    assert not Slot(-1, **made, seat=5).is_worker
    assert Slot(-1, **made, seat=5).has_beats
    assert not Slot(-1, **made).has_beats
