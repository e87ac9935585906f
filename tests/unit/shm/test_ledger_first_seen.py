"""When a token was first seen: noted once for all workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxyd.shm.ledger import Account, Ledger


def two() -> tuple[Account, Account]:
    ledger = Ledger.create(2)
    return ledger.at(0, 1).account(7), ledger.at(1, 1).account(7)


def test_the_first_worker_that_sees_a_token_notes_what_was_spent_before_it() -> None:
    one, other = two()
    one.add(settled=100)
    assert one.first_seen(1000) == 100
    other.add(settled=50)
    assert (one.first_seen(1000), other.first_seen(1000)) == (100, 100)


def test_the_newest_token_is_remembered_and_an_older_one_is_nobody_s() -> None:
    one, other = two()
    assert one.first_seen(2000) == 0
    assert other.first_seen(1000) is None
    one.add(settled=30)
    assert other.first_seen(3000) == 30
    assert one.first_seen(2000) is None


def test_a_moment_that_fits_no_word_is_not_noted() -> None:
    one, _ = two()
    for iat in (0, -1, 2**32, 2**62):
        assert one.first_seen(iat) is None
    assert one.first_seen(2**32 - 1) == 0


@given(st.integers(0, 2**50), st.lists(st.integers(0, 2**30), max_size=3))
def test_what_was_settled_then_is_exact_for_the_next_four_billion_tokens(before: int, later: list[int]) -> None:
    one, other = two()
    one.add(settled=before)
    assert one.first_seen(5) == before
    for tokens in later:
        other.add(settled=tokens)
    assert one.first_seen(5) == before
