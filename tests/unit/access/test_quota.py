"""The lines of a user: what is left, what is refused in which words, when the store must be asked."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.access.quota import Kind, Line, Times, age_ms, decide_refusal, left_of, must_read

NOW = 1_800_000_000.0
TIMES = Times(NOW, NOW + 3600, 86_400.0)


def window(spent: int, limit: int = 100, read_at_ms: int | None = 0, free_at: int = 0) -> Line:
    return Line(Kind.WINDOW, limit, spent, read_at_ms, free_at)


def token(spent: int, limit: int = 100, read_at_ms: int | None = 0) -> Line:
    return Line(Kind.TOKEN, limit, spent, read_at_ms)


def told(lines: list[Line], held: int = 0, times: Times = TIMES) -> tuple[str, int, bool]:
    """(reason, Retry-After, whether SDKs may retry) of the refusal."""
    refusal = decide_refusal(lines, held, times)
    assert refusal is not None
    assert (refusal.status, refusal.code) == (429, "quota_exceeded")
    headers = dict(refusal.headers)
    return refusal.reason, int(headers["retry-after"]), headers.get("x-should-retry") != "false"


def test_whichever_line_leaves_less_decides() -> None:
    assert left_of([], 5) is None
    assert left_of([window(60), token(30)], 0) == 40
    assert left_of([window(60), token(90)], 25) == -15


def test_the_last_token_may_be_asked_for_and_not_one_more() -> None:
    assert decide_refusal([window(99)], 0, TIMES) is None
    assert told([window(100)])[0] == "window"
    assert decide_refusal([], 10**9, TIMES) is None


def test_what_only_requests_under_way_hold_may_be_asked_for_again_in_a_second() -> None:
    assert told([window(60)], held=40) == ("under_way", 1, True)
    assert told([token(99)], held=1) == ("under_way", 1, True)


def test_a_spent_line_is_final_also_while_requests_are_under_way() -> None:
    assert told([token(100)], held=50) == ("token", 60, False)


@pytest.mark.parametrize("ttl, wait_s", [(3600, 60), (60, 60), (30, 30), (0.4, 1), (0, 1), (-3, 1)])
def test_a_spent_token_is_told_what_it_has_left_a_minute_at_most(ttl: float, wait_s: int) -> None:
    assert told([token(100)], times=Times(NOW, NOW + ttl, 60.0))[1] == wait_s


@pytest.mark.parametrize("free_in, wait_s", [(1, 2), (120, 121), (-5, 1)])
def test_a_window_says_when_it_opens(free_in: int, wait_s: int) -> None:
    assert told([window(100, free_at=int(NOW) + free_in)]) == ("window", wait_s, False)


def test_a_window_that_nobody_knows_the_end_of_takes_its_whole_length() -> None:
    assert told([window(100)])[1] == 86_401
    assert told([window(100)], times=Times(NOW, NOW + 9, 2.5))[1] == 4


def test_where_both_are_spent_the_longer_wait_is_told() -> None:
    assert told([window(100, free_at=int(NOW) + 500), token(100)])[:2] == ("window", 501)
    assert told([window(100, free_at=int(NOW) + 5), token(100)])[:2] == ("token", 60)


def test_the_store_is_asked_when_a_line_that_matters_was_never_read() -> None:
    assert must_read([window(0, read_at_ms=None)], False, NOW, 10)
    assert must_read([window(0), token(0, read_at_ms=None)], False, NOW, 10)
    assert not must_read([window(0), token(0)], False, NOW, 10**9)


def test_the_store_is_asked_before_a_refusal_that_would_rest_on_an_old_reading() -> None:
    full = window(100, read_at_ms=5000, free_at=int(NOW) + 5)
    assert not must_read([full], True, NOW, 6000)
    assert must_read([full], True, NOW, 6001)
    assert not must_read([full], False, NOW, 60_000)


def test_no_refusal_rests_on_a_reading_of_before_the_window_was_to_open() -> None:
    def is_asked(read_at_ms: int, opened_ms: int) -> bool:
        line = window(100, read_at_ms=read_at_ms, free_at=int(NOW) - 1)
        return must_read([line], True, NOW + opened_ms / 1000, 9000)

    assert not is_asked(read_at_ms=8600, opened_ms=-1)
    assert is_asked(read_at_ms=8600, opened_ms=100)
    assert is_asked(read_at_ms=8600, opened_ms=399)
    assert not is_asked(read_at_ms=8600, opened_ms=401)
    assert is_asked(read_at_ms=7900, opened_ms=5000)


def test_the_store_is_asked_sooner_where_it_could_not_tell_when_the_window_opens() -> None:
    assert must_read([window(100, read_at_ms=5000)], True, NOW, 5251)
    assert not must_read([window(100, read_at_ms=5000)], True, NOW, 5250)
    assert not must_read([window(40, read_at_ms=5000)], True, NOW, 5900)


def test_nobody_asks_for_a_session_that_came_without_tokens_or_whose_spending_nobody_can_date() -> None:
    assert not must_read([window(0, read_at_ms=None), token(0, limit=0, read_at_ms=None)], True, NOW, 10)
    assert not must_read([Line(Kind.TOKEN, 10, 10, is_readable=False)], True, NOW, 10)


def test_the_age_is_that_of_the_line_read_longest_ago() -> None:
    assert age_ms([], 7) == 0
    assert age_ms([window(0, read_at_ms=5), token(0, read_at_ms=2)], 10) == 8
    assert math.isinf(age_ms([window(0, read_at_ms=5), token(0, read_at_ms=None)], 10))


@given(
    st.lists(st.builds(token, st.integers(0, 300), st.integers(-5, 200)), max_size=2),
    st.integers(0, 300),
    st.integers(0, 10**6),
)
def test_a_refusal_comes_exactly_when_nothing_is_left_and_waiting_is_never_for_nothing(
    lines: list[Line], held: int, ttl: int
) -> None:
    refusal = decide_refusal(lines, held, Times(NOW, NOW + ttl, 60.0))
    left = left_of(lines, held)
    assert (refusal is not None) == (left is not None and left <= 0)
    if refusal is not None:
        assert 1 <= int(dict(refusal.headers)["retry-after"]) <= 60
