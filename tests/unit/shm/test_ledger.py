"""The ledger's table: rows, bounds, what a full table does, what a dead worker leaves."""

from __future__ import annotations

import os
import resource

import pytest

from proxyd.shm import ledger as module
from proxyd.shm.ledger import Account, Ledger, SlotLedger, Standing, Sums


def small(slots: int = 2, users: int = 4, tenants: int = 2) -> Ledger:
    return Ledger.create(slots, users=users, tenants=tenants)


# --- users -----------------------------------------------------------------------------------------------------------


def test_what_one_slot_adds_all_slots_see() -> None:
    ledger = small()
    ledger.at(0, 1).account(7).add(held=100, running=40)
    ledger.at(1, 1).account(7).add(held=-10, settled=25, at_ms=555)
    found = ledger.find(7)
    assert found is not None
    assert found.sums() == Sums(90, 40, 25)
    assert (found.held, found.running, found.settled, found.settled_at) == (90, 40, 25, 555)


def test_looking_for_a_user_makes_no_row() -> None:
    ledger = small()
    assert ledger.find(7) is None
    assert ledger.totals().users == 0


def test_every_64_bit_user_id_has_a_row_of_its_own() -> None:
    ledger = Ledger.create(1, users=4_096)
    hand = ledger.at(0, 1)
    ids = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, *(n << 20 for n in range(1, 1_000)), *range(10_000, 12_000)]
    rows = {user: hand.account(user).row for user in ids}
    assert len(set(rows.values())) == len(rows) == ledger.totals().users
    for user, row in rows.items():
        found = ledger.find(user)
        assert found is not None
        assert (found.row, found.user_id) == (row, user)


@pytest.mark.parametrize("user", [-1, 2**64])
def test_a_user_id_beyond_64_bits_is_an_error(user: int) -> None:
    with pytest.raises(OverflowError):
        small().at(0, 1).account(user)


def test_a_found_account_has_no_slot_to_add_to() -> None:
    ledger = small()
    ledger.at(0, 1).account(7)
    found = ledger.find(7)
    assert found is not None
    with pytest.raises(ValueError, match="reading"):
        found.add(held=1)


def test_an_account_found_with_a_slot_adds_to_that_one() -> None:
    ledger = small(slots=2)
    mine = ledger.at(0, 1).account(7)
    found = ledger.find(7, 1)
    assert found is not None
    found.add(held=3, settled=20)
    mine.add(held=4, settled=5)
    ledger.reclaim(1)
    assert mine.sums() == Sums(4, 0, 25)
    for slot in (-2, 2):
        with pytest.raises(IndexError):
            ledger.find(7, slot)


def test_without_a_time_a_settle_takes_the_clock_s() -> None:
    account = small().at(0, 1).account(7)
    account.add(settled=1)
    assert account.settled_at > 0


def test_a_heal_takes_all_that_was_settled_for_stored() -> None:
    ledger = small()
    for slot in (0, 1):
        ledger.at(slot, 1).account(7).add(settled=10 + slot)
    found = ledger.find(7)
    assert found is not None
    found.add_stored(5)
    assert found.stored == 5
    found.heal()
    assert found.stored == 21


def test_a_standing_is_none_until_it_was_read_and_may_be_negative() -> None:
    account = small().at(0, 1).account(7)
    assert account.window is None
    assert account.token(0) is None
    account.set_window(-5, 1_000, 0)
    account.set_token(0, -6, 0)
    assert account.window == Standing(-5, 1_000, 0)
    assert account.token(0) == Standing(-6, 1, 0, -6)


def test_four_tokens_of_a_user_are_known_and_the_one_read_longest_ago_goes_first() -> None:
    account = small().at(0, 1).account(7)
    for iat in range(1, 5):
        account.set_token(iat, iat * 100, 10 + iat)
    account.set_token(1, 111, 20)
    account.set_token(5, 500, 21)
    assert [account.token(iat) is not None for iat in range(1, 6)] == [True, False, True, True, True]
    assert account.token(1) == Standing(111, 20, 0, 100)
    assert account.token(5) == Standing(500, 21, 0, 500)


def test_an_average_begins_with_its_first_sample_and_follows_by_an_eighth() -> None:
    account = small().at(0, 1).account(7)
    assert account.average_completion is None
    account.learn_completion(0)
    assert account.average_completion == 0
    account.learn_completion(800)
    assert account.average_completion == 100
    for _ in range(100):
        account.learn_completion(2**63)
    assert 2**39 < account.average_completion <= 2**40


# --- full tables -----------------------------------------------------------------------------------------------------


def test_a_user_too_many_is_counted_by_his_own_worker_alone() -> None:
    ledger = small(users=4)
    hands = [ledger.at(0, 1), ledger.at(1, 1)]
    for user in range(4):
        assert hands[user % 2].account(user).is_shared
    for hand in hands:
        account = hand.account(99)
        assert not account.is_shared
        account.add(held=7, settled=3)
        assert hand.account(99).sums() == Sums(7, 0, 3)
    assert ledger.find(99) is None
    totals = ledger.totals()
    assert (totals.users, totals.held, totals.overflow) == (4, 0, 2)
    assert hands[0].account(2).is_shared


def test_the_private_table_starts_anew_when_it_is_full_and_old_accounts_stay_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_PRIVATE_USERS", 8)
    hand = small(users=1).at(0, 1)
    hand.account(1)
    first = hand.account(2)
    first.add(held=5)
    for user in range(3, 40):
        assert not hand.account(user).is_shared
    first.add(held=-5, settled=9)
    assert first.sums() == Sums(0, 0, 9)
    assert hand.account(2).sums() == Sums(0, 0, 0)


def test_tenants_too_many_share_few_rows_and_know_it() -> None:
    ledger = small(tenants=2)
    hand, other = ledger.at(0, 1), ledger.at(1, 1)
    assert [hand.tenant(name).is_own for name in ("a", "b", "c", "a")] == [True, True, False, True]
    rows: dict[int, list[str]] = {}
    for n in range(500):
        rows.setdefault(other.tenant(f"t{n}").row, []).append(f"t{n}")
    assert len(rows) == 64
    one, two, *_ = next(iter(rows.values()))
    assert hand.tenant(one).acquire(1, 1) == 0
    assert other.tenant(two).acquire(1, 1) == -1
    for names in list(rows.values())[1:]:
        assert other.tenant(names[0]).acquire(1, 1) == 0
    totals = ledger.totals()
    assert (totals.tenants, totals.permits, totals.overflow) == (2, 64, 502)
    assert (ledger.reclaim(0), ledger.reclaim(1)) == (1, 63)
    assert ledger.totals().permits == 0


def test_a_flood_of_tenants_does_not_grow_what_a_process_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NAMES", 16)
    hand = small(tenants=2).at(0, 1)
    kept = hand.tenant("a")
    permit = kept.acquire(3, 1)
    for n in range(100):
        hand.tenant(f"t{n}")
        assert len(hand._tenants) <= 16
    assert hand.tenant("a").in_use(3) == 1
    kept.release(permit)
    assert hand.tenant("a").in_use(3) == 0


# --- permits ---------------------------------------------------------------------------------------------------------


def test_the_lowest_permits_go_first_again() -> None:
    tenant = small().at(0, 1).tenant("a")
    assert [tenant.acquire(5, 1) for _ in range(6)] == [0, 1, 2, 3, 4, -1]
    tenant.release(3)
    tenant.release(1)
    assert [tenant.acquire(5, 1) for _ in range(3)] == [1, 3, -1]


def test_a_permit_freed_by_another_process_is_found_wherever_it_is() -> None:
    ledger = small()
    mine, other = ledger.at(0, 1).tenant("a"), ledger.at(1, 1).tenant("a")
    for _ in range(10):
        other.acquire(20, 1)
    for _ in range(10):
        mine.acquire(20, 1)
    for permit in range(10):
        other.release(permit)
        assert mine.acquire(20, 1) == permit
        assert mine.acquire(20, 1) == -1


def test_a_lower_limit_leaves_permits_above_it_valid() -> None:
    tenant = small().at(0, 1).tenant("a")
    taken = [tenant.acquire(10, 50 - n) for n in range(10)]
    assert tenant.acquire(4, 1) == -1
    assert (tenant.in_use(4), tenant.in_use(10)) == (4, 10)
    assert (tenant.oldest_start(4), tenant.oldest_start(10)) == (47, 41)
    for permit in taken:
        tenant.release(permit)
    assert [tenant.acquire(4, 1) for _ in range(5)] == [0, 1, 2, 3, -1]
    assert tenant.acquire(5, 1) == 4


def test_a_limit_beyond_the_table_counts_as_the_table_s_size() -> None:
    tenant = Ledger.create(1, permits=2_000, users=1, tenants=1).at(0, 1).tenant("a")
    assert sum(tenant.acquire(10**12, 1) >= 0 for _ in range(2_100)) == 2_000
    assert tenant.in_use(10**12) == 2_000


def test_a_permit_is_not_released_for_its_next_holder() -> None:
    ledger = small()
    mine, other = ledger.at(0, 1).tenant("a"), ledger.at(1, 1).tenant("a")
    permit = mine.acquire(1, 1)
    mine.release(permit)
    assert other.acquire(1, 1) == permit
    mine.release(permit)
    assert other.in_use(1) == 1
    successor = ledger.at(1, 2).tenant("a")
    successor.release(permit)
    assert other.in_use(1) == 1
    with pytest.raises(IndexError):
        mine.release(-1)
    with pytest.raises(IndexError):
        mine.release(10**9)


def test_nobody_holds_a_permit_of_an_untouched_tenant() -> None:
    tenant = small().at(0, 1).tenant("a")
    assert (tenant.in_use(10), tenant.oldest_start(10), tenant.acquire(0, 1)) == (0, 0, -1)
    assert (tenant.average_tokens, tenant.average_ms) == (None, None)


# --- the dead --------------------------------------------------------------------------------------------------------


def busy(hand: SlotLedger) -> Account:
    account = hand.account(7)
    account.add(held=100, running=50, settled=10)
    for name in ("a", "b", "c"):
        hand.tenant(name).acquire(5, 3)
    return account


def test_a_dead_worker_s_words_and_permits_are_freed_and_no_other_s() -> None:
    ledger = small()
    dead, alive = ledger.at(0, 3), ledger.at(1, 4)
    busy(dead)
    account = busy(alive)
    assert ledger.totals().permits == 6
    assert ledger.reclaim(0) == 3
    assert account.sums() == Sums(100, 50, 20)
    assert ledger.totals().permits == 3
    assert ledger.reclaim(0) == 0
    successor = busy(ledger.at(0, 4))
    assert successor.sums() == Sums(200, 100, 30)


def test_a_slot_that_is_not_there_is_an_error() -> None:
    ledger = small(slots=2)
    for slot in (-1, 2):
        with pytest.raises(IndexError):
            ledger.at(slot, 1)
        with pytest.raises(IndexError):
            ledger.reclaim(slot)


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "permits", "users", "tenants"),
    [
        (1, 0, 1_048_576, 32_768),
        (130, 1_024, 1_048_576, 32_768),
        (247, 15_000, 1_048_576, 4_024),
        (4_098, 10**12, 65_000, 416),
    ],
)
def test_the_mapping_stays_within_nine_gigabytes_and_untouched_pages_cost_nothing(
    slots: int, permits: int, users: int, tenants: int
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    size = mapped()
    ledger = Ledger.create(slots, permits=permits)
    assert mapped() - size < 8_900 << 20
    table = ledger._table
    assert table.max_users >= users
    assert table.max_tenants >= tenants
    busy(ledger.at(slots - 1, 1))
    assert ledger.reclaim(slots - 1) == 3
    assert ledger.totals()[:5] == (1, 3, 0, 0, 0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1_000


def test_counts_out_of_range_are_named() -> None:
    for slots in (0, 8_191):
        with pytest.raises(ValueError, match=f"slots out of range: {slots}"):
            Ledger.create(slots)


def mapped() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGESIZE")
