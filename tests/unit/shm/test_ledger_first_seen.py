"""When a token was first seen: noted once for all workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxyd.shm.ledger import Account, Ledger


def two() -> tuple[Account, Account]:
    ledger = Ledger.create(2, users=16, tenants=1)
    return ledger.at(0, 1).account(7), ledger.at(1, 1).account(7)


def test_the_first_worker_that_sees_a_token_notes_what_was_spent_before_it_and_whether_it_was_new() -> None:
    one, other = two()
    one.add(settled=100)
    assert one.first_seen(1000, True) == (100, True)
    other.add(settled=50)
    assert one.first_seen(1000, False) == other.first_seen(1000, False) == (100, True)
    assert other.first_seen(0, False) == (150, False)
    assert one.first_seen(0, True) == (150, False)


def test_eight_tokens_of_a_user_are_remembered_and_the_one_seen_first_goes_first() -> None:
    one, other = two()
    for number in range(9):
        assert (one, other)[number % 2].first_seen(number, True) == (number, True)
        one.add(settled=1)
    assert [other.first_seen(number, False) for number in range(8, 0, -1)] == [(n, True) for n in range(8, 0, -1)]
    assert other.first_seen(0, False) == (9, False)


@given(st.integers(0, 2**50), st.lists(st.integers(0, 2**30), max_size=3), st.integers(0, 2**64 - 1), st.booleans())
def test_what_was_settled_then_is_exact_for_the_next_four_billion_tokens(
    before: int, later: list[int], token: int, is_new: bool
) -> None:
    one, other = two()
    one.add(settled=before)
    assert one.first_seen(token, is_new) == (before, is_new)
    for tokens in later:
        other.add(settled=tokens)
    assert one.first_seen(token, not is_new) == (before, is_new)
