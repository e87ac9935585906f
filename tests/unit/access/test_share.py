"""How far a stream may go until it is looked at again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxyd.access.quota import share_of

TOKENS = st.integers(1, 1 << 40)


@given(left=st.integers(-(1 << 40), 1 << 40), held=TOKENS)
def test_a_request_that_is_alone_may_use_all_that_is_left(left: int, held: int) -> None:
    assert share_of(left, held, 0) == left


@given(left=st.integers(-(1 << 40), 0), held=TOKENS, others=TOKENS)
def test_behind_the_line_there_is_nothing_to_share(left: int, held: int, others: int) -> None:
    assert share_of(left, held, others) == left


@given(left=TOKENS, helds=st.lists(TOKENS, min_size=2, max_size=20))
def test_side_by_side_all_together_may_use_half_of_it(left: int, helds: list[int]) -> None:
    shares = [share_of(left, held, sum(helds) - held) for held in helds]
    assert all(share >= 0 for share in shares)
    assert left // 2 - len(helds) <= sum(shares) <= left // 2
