"""Who is asked and who is left alone: shares, breakers, retry budget, all on given instants."""

from __future__ import annotations

from collections import Counter

import pytest

from proxyd.errors import UpstreamErrorKind
from proxyd.upstream.balance import Balancer, Breaker, BreakerState, RetryBudget, Verdict, verdict

NAMES = {"a", "b", "c"}


def balancer(*tiers: tuple[str, ...], **weights: int) -> Balancer:
    names = {name for tier in tiers for name in tier}
    return Balancer({name: weights.get(name, 1) for name in names}, [tiers])


def eject(balance: Balancer, name: str, now: float) -> None:
    results = [balance.record(name, Verdict.BAD, now) for _ in range(5)]
    assert results == [False] * 4 + [True]


def test_names_are_tried_in_their_order_and_then_none_is_left() -> None:
    tiers = (("a",), ("b",), ("c",))
    balance = balancer(*tiers)
    tried: list[str] = []
    while (name := balance.choose(tiers, NAMES, tried, 0.0)) is not None:
        tried.append(name)
    assert tried == ["a", "b", "c"]


def test_an_inner_list_shares_by_weight_and_smoothly() -> None:
    tiers = (("a", "b", "c"),)
    balance = balancer(*tiers, a=5, b=1, c=1)
    order = [balance.choose(tiers, NAMES, (), 0.0) for _ in range(7)]
    assert order == ["a", "a", "b", "a", "c", "a", "a"]


def test_a_share_fails_over_within_its_list_before_the_next_tier() -> None:
    tiers = (("a", "b"), ("c",))
    balance = balancer(*tiers)
    first = balance.choose(tiers, NAMES, [], 0.0)
    second = balance.choose(tiers, NAMES, [str(first)], 0.0)
    third = balance.choose(tiers, NAMES, [str(first), str(second)], 0.0)
    assert ({first, second}, third) == ({"a", "b"}, "c")


def test_upstreams_of_another_dialect_are_passed_over() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    assert balance.choose(tiers, {"b"}, (), 0.0) == "b"
    assert balance.choose(tiers, set(), (), 0.0) is None


def test_five_failures_in_a_row_eject_for_thirty_seconds() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 100.0)
    assert balance.choose(tiers, NAMES, (), 129.9) == "b"
    assert balance.choose(tiers, NAMES, (), 130.0) == "a"


def test_a_success_in_between_starts_the_count_again() -> None:
    balance = balancer(("a",), ("b",))
    for _ in range(3):
        assert [balance.record("a", Verdict.BAD, 0.0) for _ in range(4)] == [False] * 4
        balance.record("a", Verdict.GOOD, 0.0)
    assert balance.breaker("a").state(0.0) is BreakerState.CLOSED


def test_neutral_outcomes_neither_count_nor_forgive() -> None:
    balance = balancer(("a",), ("b",))
    for _ in range(4):
        balance.record("a", Verdict.BAD, 0.0)
        balance.record("a", Verdict.NEUTRAL, 0.0)
    assert balance.record("a", Verdict.BAD, 0.0) is True


def test_half_open_lets_one_probe_through_at_a_time() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 0.0)
    assert balance.breaker("a").state(30.0) is BreakerState.HALF_OPEN
    assert balance.choose(tiers, NAMES, (), 30.0) == "a"
    assert balance.choose(tiers, NAMES, (), 30.0) == "b"
    balance.record("a", Verdict.GOOD, 31.0)
    assert balance.breaker("a").state(31.0) is BreakerState.CLOSED
    assert balance.choose(tiers, NAMES, (), 31.0) == "a"


def test_a_failed_probe_ejects_for_longer_each_time_up_to_three_hundred_seconds() -> None:
    balance = balancer(("a",), ("b",))
    eject(balance, "a", 0.0)
    now, lengths = 30.0, []
    for _ in range(12):
        balance.breaker("a").begin(now)
        assert balance.record("a", Verdict.BAD, now) is True
        lengths.append(balance.breaker("a").until_s() - now)
        now = balance.breaker("a").until_s()
    assert lengths == [60.0, 90.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0, 300.0, 300.0, 300.0]


def test_a_probe_that_reports_nothing_does_not_lock_the_upstream_out() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 0.0)
    assert balance.choose(tiers, NAMES, (), 30.0) == "a"
    assert balance.choose(tiers, NAMES, (), 89.9) == "b"
    assert balance.choose(tiers, NAMES, (), 90.0) == "a"


def test_a_probe_without_a_verdict_leaves_the_door_to_the_next() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 0.0)
    assert balance.choose(tiers, NAMES, (), 30.0) == "a"
    balance.record("a", Verdict.NEUTRAL, 31.0)
    assert balance.choose(tiers, NAMES, (), 31.0) == "a"


def test_long_service_forgives_earlier_ejections() -> None:
    balance = balancer(("a",), ("b",))
    eject(balance, "a", 1000.0)
    balance.breaker("a").begin(1030.0)
    balance.record("a", Verdict.GOOD, 1030.0)
    eject(balance, "a", 1031.0)
    assert balance.breaker("a").until_s() == 1031.0 + 60.0
    balance.breaker("a").begin(1091.0)
    balance.record("a", Verdict.GOOD, 1091.0)
    eject(balance, "a", 1391.0)
    assert balance.breaker("a").until_s() == 1391.0 + 30.0


def test_the_only_upstream_is_never_ejected() -> None:
    balance = balancer(("a",))
    assert not any(balance.record("a", Verdict.BAD, 0.0) for _ in range(50))
    assert balance.choose((("a",),), NAMES, (), 0.0) == "a"


def test_the_last_upstream_in_service_is_not_ejected() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 0.0)
    assert not any(balance.record("b", Verdict.BAD, 1.0) for _ in range(50))
    assert balance.choose(tiers, NAMES, (), 1.0) == "b"


def test_a_model_whose_only_upstream_is_ejected_for_others_still_gets_it() -> None:
    shared, alone = (("a",), ("b",)), (("a",),)
    balance = Balancer({"a": 1, "b": 1}, [shared, alone])
    eject(balance, "a", 0.0)
    assert balance.choose(alone, NAMES, (), 1.0) == "a"
    assert balance.choose(alone, NAMES, ("a",), 1.0) is None


def test_of_several_ejected_the_one_that_returns_first_is_offered() -> None:
    tiers = (("a", "b"),)
    balance = Balancer({"a": 1, "b": 1, "c": 1}, [(("a", "b", "c"),)])
    eject(balance, "a", 10.0)
    eject(balance, "b", 5.0)
    assert balance.choose(tiers, NAMES, (), 11.0) == "b"


def test_an_ejected_upstream_is_no_fail_over_for_one_in_service() -> None:
    tiers = (("a",), ("b",))
    balance = balancer(*tiers)
    eject(balance, "a", 0.0)
    assert balance.choose(tiers, NAMES, ("b",), 1.0) is None


def test_outcomes_of_requests_from_before_the_ejection_change_nothing() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.record(Verdict.BAD, 0.0, may_eject=True)
    breaker.record(Verdict.GOOD, 1.0, may_eject=True)
    assert breaker.record(Verdict.BAD, 1.0, may_eject=True) is False
    assert (breaker.state(29.0), breaker.until_s()) == (BreakerState.OPEN, 30.0)


def test_every_error_kind_has_a_verdict() -> None:
    neutral = {kind for kind in UpstreamErrorKind if verdict(kind) is Verdict.NEUTRAL}
    assert neutral == {
        UpstreamErrorKind.TOTAL_TIMEOUT,
        UpstreamErrorKind.POOL_FULL,
        UpstreamErrorKind.POOL_TIMEOUT,
        UpstreamErrorKind.NO_PORTS,
        UpstreamErrorKind.NO_UPSTREAM,
    }


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, Verdict.GOOD),
        (404, Verdict.GOOD),
        (429, Verdict.NEUTRAL),
        (500, Verdict.NEUTRAL),
        (501, Verdict.NEUTRAL),
        (502, Verdict.BAD),
        (503, Verdict.BAD),
        (504, Verdict.BAD),
        (529, Verdict.BAD),
    ],
)
def test_the_statuses_that_count_against_an_upstream(status: int, expected: Verdict) -> None:
    assert verdict(status) is expected


def test_the_breaker_gauge_values_are_the_contracts() -> None:
    assert {state.name: state.value for state in BreakerState} == {"CLOSED": 0, "HALF_OPEN": 1, "OPEN": 2}


def test_an_idle_worker_may_have_three_retries() -> None:
    budget = RetryBudget()
    assert [budget.try_retry() for _ in range(4)] == [True, True, True, False]
    budget.end_retry()
    assert budget.try_retry()


def test_a_fifth_of_the_active_requests_may_be_retries() -> None:
    budget = RetryBudget()
    for _ in range(100):
        budget.begin()
    assert Counter(budget.try_retry() for _ in range(50)) == {True: 20, False: 30}
    for _ in range(50):
        budget.end()
    for _ in range(11):
        budget.end_retry()
    assert [budget.try_retry(), budget.try_retry()] == [True, False]
