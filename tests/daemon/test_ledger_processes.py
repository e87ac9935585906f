"""The ledger between real processes: at most the limit, one row a user, and nothing left behind by who was killed.

Nothing here asserts on time. Where the clock matters it is read before and after a call, and what cannot be told for
certain is left out.
"""

from __future__ import annotations

import itertools
import os
import random
import time

import pytest

from proxyd._shm import Words
from proxyd.shm.ledger import Ledger, SlotLedger
from tests.daemon.races import INSIDE, SLOTS, WRONG, Process, all_at_once, shared_words, together

# --- permits ---------------------------------------------------------------------------------------------------------


def hammer(ledger: Ledger, slot: int, limit: int, rounds: int, words: Words) -> tuple[int, int]:
    """(taken, refused). Says in `words` when more than the limit hold one."""
    tenant = ledger.at(slot, 1).tenant("t")
    taken = refused = 0
    for turn in range(rounds):
        permit = tenant.acquire(limit, 1)
        if permit < 0:
            refused += 1
            continue
        taken += 1
        if words.add(INSIDE, 1) > limit:
            words.add(WRONG, 1)
        if turn % 16 == 0:
            os.sched_yield()
        words.sub(INSIDE, 1)
        tenant.release(permit)
    return taken, refused


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_eight_processes_never_hold_more_than_the_limit_and_all_comes_back(limit: int) -> None:
    ledger = Ledger.create(SLOTS)
    words = shared_words()
    counts = all_at_once(lambda slot: hammer(ledger, slot, limit, 20_000, words))
    assert words.load(WRONG) == 0
    assert words.load(INSIDE) == 0
    assert sum(taken for taken, _ in counts) > 1_000
    assert sum(refused for _, refused in counts) > 0
    assert ledger.totals().permits == 0
    mine = ledger.at(0, 2).tenant("t")
    assert [mine.acquire(limit, 1) for _ in range(limit + 1)] == [*range(limit), -1]


def test_none_is_refused_while_fewer_than_the_limit_hold_one() -> None:
    """Each process holds one at most, so eight are always enough for eight, however they change hands meanwhile."""
    ledger = Ledger.create(SLOTS)
    words = shared_words()
    assert all_at_once(lambda slot: hammer(ledger, slot, 8, 40_000, words)) == [(40_000, 0)] * 8


def test_one_is_free_all_the_time_and_found_though_it_is_never_the_same() -> None:
    """A third holds all but two, far apart. One process goes to and fro between these and has one of them at most; the
    other must always find the other one, though it may be taken before its walk arrives and freed behind it."""
    ledger = Ledger.create(3)
    parked = ledger.at(2, 1).tenant("t")
    for _ in range(1_000):
        parked.acquire(1_000, 1)
    parked.release(3)
    parked.release(997)

    def go_to_and_fro() -> None:
        low, high = ledger.at(0, 1).tenant("t"), ledger.at(0, 1).tenant("t")  # two, for each walks from its last one
        while True:
            if low.acquire(4, 1) == 3:
                low.release(3)
            permit = high.acquire(1_000, 1)
            if permit >= 0:
                (high if permit == 997 else low).release(permit)

    mover = Process(go_to_and_fro)
    tenant = ledger.at(1, 1).tenant("t")
    refused = 0
    try:
        for _ in range(500_000):
            permit = tenant.acquire(1_000, 1)
            refused += permit < 0
            if permit >= 0:
                tenant.release(permit)
    finally:
        mover.kill()
    assert refused == 0


# --- windows ---------------------------------------------------------------------------------------------------------

SPEED = 20  # the test's minute lasts three seconds, a tick 12.5 ms: four hundred edges to race at
SPAN_NS = 5_000_000_000


def fast_ms() -> int:
    return time.monotonic_ns() * SPEED // 1_000_000


def fill(ledger: Ledger, slot: int, limit: int, until_ns: int) -> list[tuple[int, int]]:
    """(clock, n) of what was let in, but of calls that took so long that they may have been too late for the ring."""
    window = ledger.at(slot, 1).tenant("t").tokens
    chance = random.Random(slot)
    made = []
    while time.monotonic_ns() < until_ns:
        n = chance.randint(1, 5)
        now = fast_ms()
        if window.try_add(n, limit, now) and fast_ms() - now < 3_500:
            made.append((now, n))
    return made


def test_sixty_seconds_of_eight_processes_never_sum_above_the_limit() -> None:
    limit = 20_000
    ledger = Ledger.create(SLOTS)
    until = time.monotonic_ns() + SPAN_NS
    made = sorted(itertools.chain.from_iterable(all_at_once(lambda slot: fill(ledger, slot, limit, until))))
    total = first = worst = 0
    for now, n in made:
        total += n
        while made[first][0] <= now - 60_000:
            total -= made[first][1]
            first += 1
        worst = max(worst, total)
    assert worst <= limit
    assert worst > limit * 0.9
    assert made[-1][0] - made[0][0] > 60_000  # else nothing was ever let in anew


def test_at_a_tick_s_edge_the_last_place_goes_to_one_of_two() -> None:
    """One reads its clock in the last millisecond of a tick, the other in the first of a later one."""
    ledger = Ledger.create(2)
    start = fast_ms() // 250 * 250

    words = shared_words()

    def work(slot: int) -> list[bool]:
        window = ledger.at(slot, 1).tenant("t").requests
        made = []
        for turn in together(words, slot):
            later = slot * (1 + turn % 200 * 250)
            made.append(window.try_add(1, 1, start + turn * 122_000 + 249 + later))
        return made

    one, other = all_at_once(work, 2)
    assert [a + b for a, b in zip(one, other, strict=True)] == [1] * len(one)


def test_additions_and_what_is_given_back_by_eight_processes_leave_nothing() -> None:
    """Each at its own pace through ten ticks, so that they are never further apart than the ring allows."""
    ledger = Ledger.create(SLOTS)
    now = fast_ms()

    def work(slot: int) -> int:
        window = ledger.at(slot, 1).tenant("t").tokens
        for turn in range(20_000):
            window.add(3, now + turn // 8)
            window.add(-3, now + turn // 8)
        return slot

    all_at_once(work)
    assert ledger.at(0, 2).tenant("t").tokens.total(now + 5_000) == 0


# --- users -----------------------------------------------------------------------------------------------------------


def test_users_that_eight_processes_create_at_once_have_one_row_each() -> None:
    users = [n * 2**40 + n for n in range(3_000)]
    ledger = Ledger.create(SLOTS, users=4_096)

    def work(slot: int) -> dict[int, int]:
        hand = ledger.at(slot, 1)
        mine = users[:]
        random.Random(slot // 4).shuffle(mine)  # four and four go the same way, and meet at every user
        rows = {}
        for user in mine:
            account = hand.account(user)
            account.add(settled=slot + 1)
            rows[user] = account.row
        return rows

    found = all_at_once(work)
    assert all(rows == found[0] for rows in found)
    assert len(set(found[0].values())) == len(users)
    assert len(users) <= ledger.totals().users <= len(users) + 8
    for user in users:
        account = ledger.find(user)
        assert account is not None
        assert account.settled == sum(range(1, 9))


def test_a_user_that_two_processes_create_at_the_same_instant_has_one_row() -> None:
    ledger = Ledger.create(2, users=16_384)

    words = shared_words()

    def work(slot: int) -> list[int]:
        hand = ledger.at(slot, 1)
        return [hand.account(turn).row for turn in together(words, slot)]

    one, other = all_at_once(work, 2)
    assert one == other
    assert len(set(one)) == len(one)
    assert ledger.totals().users <= len(one) + 2


def test_what_was_spent_before_a_token_s_first_sight_is_the_same_for_two_who_see_it_at_once() -> None:
    ledger = Ledger.create(2)

    words = shared_words()

    def work(slot: int) -> list[tuple[int, bool]]:
        account = ledger.at(slot, 1).account(7)
        seen = []
        for turn in together(words, slot):
            account.add(settled=1_000)
            seen.append(account.first_seen(turn, slot == 0))
        return seen

    one, other = all_at_once(work, 2)
    assert one == other
    assert all(2_000 * turn < settled <= 2_000 * (turn + 1) for turn, (settled, _) in enumerate(one))


def test_tenants_that_eight_processes_create_at_once_have_one_row_each() -> None:
    names = [f"t{n}" for n in range(60)]
    ledger = Ledger.create(SLOTS, tenants=64)

    def work(slot: int) -> list[int]:
        hand = ledger.at(slot, 1)
        return [hand.tenant(name).row for name in names]

    found = all_at_once(work)
    assert found == [found[0]] * 8
    assert len(set(found[0])) == len(names) == ledger.totals().tenants


# --- kill -9 ---------------------------------------------------------------------------------------------------------

KILLS = 200
WORKERS = 4
LIMIT = 10
CROWD = 50


def serve(hand: SlotLedger, seed: int) -> None:
    """A worker's life as far as the ledger sees it, until it is killed."""
    chance = random.Random(seed)
    while True:
        now = time.monotonic_ns() // 1_000_000
        account = hand.account(chance.randrange(CROWD) * 977)
        tenant = hand.tenant(f"t{chance.randrange(3)}")
        permit = tenant.acquire(LIMIT, now // 1000)
        if permit < 0:
            continue
        tenant.requests.try_add(1, 10**9, now)
        tenant.tokens.try_add(30, 10**9, now)
        account.add(held=30)
        for _ in range(3):
            account.add(running=10)
        tenant.tokens.add(-7, now)
        tenant.release(permit)
        account.add(held=-30, running=-30, settled=23)


def test_whoever_is_killed_leaves_nothing_held_nothing_running_and_no_permit() -> None:
    ledger = Ledger.create(WORKERS)
    chance = random.Random(3)
    epoch = 0
    workers: dict[int, Process] = {}
    settled = 0
    try:
        for kill in range(KILLS):
            for slot in range(WORKERS):
                if slot not in workers:
                    epoch += 1
                    workers[slot] = Process(lambda slot=slot, epoch=epoch: serve(ledger.at(slot, epoch), epoch))
            time.sleep(chance.random() * 0.01)  # so that it dies anywhere
            victims = list(workers) if kill % 10 == 9 else [chance.choice(list(workers))]
            for slot in victims:
                workers.pop(slot).kill()
                ledger.reclaim(slot)
            totals = ledger.totals()
            if not workers:
                assert totals[2:] == (0, 0, 0, 0), kill
            now = sum(account.settled for account in map(ledger.find, range(0, CROWD * 977, 977)) if account)
            assert now >= settled
            settled = now
    finally:
        for process in workers.values():
            process.kill()
    for slot in workers:
        ledger.reclaim(slot)
    totals = ledger.totals()
    assert totals[1:] == (3, 0, 0, 0, 0)
    assert CROWD <= totals.users <= CROWD + KILLS
    assert settled > 0
    hand = ledger.at(0, epoch + 1)
    later = time.monotonic_ns() // 1_000_000 + 60_250
    for name in ("t0", "t1", "t2"):
        assert [hand.tenant(name).acquire(LIMIT, 1) for _ in range(LIMIT + 1)] == [*range(LIMIT), -1]
        assert hand.tenant(name).tokens.try_add(5, 5, later)  # whatever tick they died in, the window goes on
        assert not hand.tenant(name).tokens.try_add(1, 5, later)


def test_a_dead_worker_s_permit_survives_the_reclaim_of_another_slot() -> None:
    ledger = Ledger.create(2)
    assert Process(lambda: ledger.at(1, 2).tenant("t").acquire(3, 1)).result() == 0
    assert ledger.reclaim(0) == 0
    assert ledger.totals().permits == 1
    assert ledger.reclaim(1) == 1
    assert ledger.totals().permits == 0
