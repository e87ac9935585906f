"""The ledger with many seats, few of them used; and the same ledger in the next image."""

from __future__ import annotations

import os
import random
import struct

import pytest

from proxyd.shm.ledger import Ledger, Sums

SEATS = 130


def pages(ledger: Ledger) -> int:
    """Kilobytes of the memory that exist."""
    return os.fstat(ledger.fd).st_blocks // 2


def test_sums_have_every_seat_that_ever_had_a_process_whatever_the_order() -> None:
    ledger = Ledger.create(SEATS, users=64, tenants=2)
    seats = [*range(SEATS)]
    random.Random(4).shuffle(seats)
    held = 0
    for n, seat in enumerate(seats):
        account = ledger.at(seat, 1).account(7)
        account.add(held=n, running=1, settled=2, at_ms=n + 1)
        held += n
        assert account.sums() == Sums(held, n + 1, 2 * (n + 1))
        assert account.settled_at == n + 1
    assert ledger.totals()[:4] == (1, 0, held, SEATS)
    for seat in seats:
        ledger.reclaim(seat)
    assert account.sums() == Sums(0, 0, 2 * SEATS)


def test_telemetrys_seat_is_within_the_sums_from_its_first_find() -> None:
    ledger = Ledger.create(SEATS, users=64, tenants=2)
    worker = ledger.at(3, 1).account(7)
    telemetry = ledger.find(7, SEATS - 1)
    assert telemetry is not None
    telemetry.add(settled=5)
    assert (worker.settled, telemetry.settled) == (5, 5)


def test_a_process_in_a_seat_that_nobody_had_is_seen_by_those_that_were_there_before() -> None:
    ledger = Ledger.create(SEATS, users=64, tenants=2)
    mine = ledger.at(0, 1).account(7)
    assert mine.sums() == Sums(0, 0, 0)
    pid = os.fork()
    if pid == 0:
        ledger.at(77, 2).account(7).add(held=5, running=1, settled=3)
        os._exit(0)
    os.waitpid(pid, 0)
    assert mine.sums() == Sums(5, 1, 3)
    assert mine.first_seen(1234, True) == (3, True)
    ledger.reclaim(77)
    assert mine.sums() == Sums(0, 0, 3)


def test_unused_seats_cost_no_memory_and_looking_at_all_of_them_neither() -> None:
    ledger = Ledger.create(SEATS)
    hands = [ledger.at(seat, 1) for seat in range(4)]
    for user in range(200):
        for hand in hands:
            hand.account(user * 5000).add(held=1, running=1)
    assert (ledger.reclaim(SEATS - 1), ledger.totals()[2]) == (0, 800)  # reads the tenants' keys, once for all
    before = pages(ledger)
    assert before < 8000
    for seat in range(4, SEATS):
        assert ledger.reclaim(seat) == 0
    assert ledger.totals()[2] == 800
    assert pages(ledger) == before


def test_the_next_image_has_the_same_ledger() -> None:
    first = Ledger.create(SEATS, permits=2_000, users=100, tenants=3)
    hand = first.at(1, 1)
    hand.account(42).add(held=10, running=1, settled=4)
    assert hand.tenant("a").acquire(5, 1) == 0
    fd = os.dup(first.fd)
    os.set_inheritable(fd, True)
    del first, hand
    second = Ledger.adopt(fd)
    assert (second.fd, second.permits, os.get_inheritable(fd)) == (fd, 2_000, False)
    account = second.find(42)
    assert account is not None
    assert account.sums() == Sums(10, 1, 4)
    assert second.reclaim(1) == 1
    assert second.totals()[:5] == (1, 1, 0, 0, 0)


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (2048, 1, "not proxyd's"),
        (2056, 9, "version 9, this program's is 2"),
        (2060, 9, "for 9 slots"),
        (2076, 56, "user words 56, this program's are 32"),
    ],
)
def test_a_ledger_of_another_layout_is_refused_with_what_differs(offset: int, value: int, named: str) -> None:
    first = Ledger.create(2, users=4, tenants=1)
    struct.pack_into("=I", first._memory.map, offset, value)
    fd = os.dup(first.fd)
    with pytest.raises(ValueError, match=named):
        Ledger.adopt(fd)
    os.close(fd)  # still the caller's


def test_what_is_no_memory_at_all_is_refused() -> None:
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match=f"descriptor {reading}"):
        Ledger.adopt(reading)
    os.close(reading)
    os.close(writing)
