"""Liveness lines and the ring of revocations, across forks."""

from __future__ import annotations

import math
import os

import pytest

from proxyd.shm.beats import Beat, State
from proxyd.shm.region import REVOCATION_ENTRIES, Region
from proxyd.shm.revocations import VALUE_MAX, Kind, Revocation, RevocationFull, RevocationRing


def test_the_master_sees_a_childs_beat_and_its_silence() -> None:
    region = Region.create(2)
    beat = Beat(region, 1)
    beat.birth(0, 77, 100.0)
    pid = os.fork()
    if pid == 0:
        mine = Beat(region, 1)
        mine.beat(105.0)
        mine.enter(State.READY)
        mine.set_streams(12)
        os._exit(0)
    os.waitpid(pid, 0)
    beat.birth(pid, 77, 100.0)
    assert beat.silent_s(108.5) == pytest.approx(3.5)
    assert (beat.state, beat.streams, beat.epoch, beat.pid) == (State.READY, 12, 77, pid)
    assert beat.age_s(104.0) == pytest.approx(4.0)
    beat.death()
    beat.count_restart()
    assert (beat.state, beat.streams, beat.pid, beat.restarts, beat.epoch) == (State.GONE, 0, 0, 1, 77)
    assert Beat(region, 0).restarts == 0


def test_a_revocation_reaches_every_process_and_its_successors_once() -> None:
    region = Region.create(1)
    reader = RevocationRing(region)
    assert not reader.has_news()
    pid = os.fork()
    if pid == 0:
        RevocationRing(region).publish(Revocation(Kind.USER, "42", 10.0, 1000.0))
        RevocationRing(region).publish(Revocation(Kind.TENANT, "acmé", 10.0, math.inf))
        os._exit(0)
    os.waitpid(pid, 0)
    assert reader.has_news()
    expected = [Revocation(Kind.USER, "42", 10.0, 1000.0), Revocation(Kind.TENANT, "acmé", 10.0, math.inf)]
    assert reader.take() == expected
    assert not reader.has_news()
    assert reader.take() == []
    assert RevocationRing(region).take() == expected


def test_the_ring_replaces_only_entries_that_expired() -> None:
    region = Region.create(1)
    ring = RevocationRing(region)
    for n in range(REVOCATION_ENTRIES):
        ring.publish(Revocation(Kind.JTI, f"j{n}", 10.0, 50.0))
    with pytest.raises(RevocationFull):
        ring.publish(Revocation(Kind.JTI, "one more", 10.0, 50.0))
    ring.publish(Revocation(Kind.JTI, "one more", 51.0, 90.0))
    taken = ring.take()
    assert len(taken) == REVOCATION_ENTRIES
    assert taken[0].value == "j1"
    assert taken[-1].value == "one more"


def test_a_publisher_that_died_with_the_lock_does_not_stop_the_next() -> None:
    region = Region.create(1)
    pid = os.fork()
    if pid == 0:
        RevocationRing(region)._lock()
        os._exit(0)
    os.waitpid(pid, 0)
    RevocationRing(region).publish(Revocation(Kind.USER, "1", 1.0, 5.0))
    assert RevocationRing(region).take() == [Revocation(Kind.USER, "1", 1.0, 5.0)]


@pytest.mark.parametrize("value", ["", "x" * (VALUE_MAX + 1)])
def test_a_value_that_does_not_fit_is_refused(value: str) -> None:
    with pytest.raises(ValueError):
        RevocationRing(Region.create(1)).publish(Revocation(Kind.USER, value, 1.0, 5.0))


def test_the_longest_token_id_that_access_takes_fits() -> None:
    from proxyd.access.token import MAX_JTI_CHARS

    ring = RevocationRing(Region.create(1))
    value = "\N{GRINNING FACE}" * MAX_JTI_CHARS
    ring.publish(Revocation(Kind.JTI, value, 1.0, math.inf))
    assert ring.take()[0].value == value
