"""Admission: models, quotas that count down, tickets that end once."""

from __future__ import annotations

import pytest

from proxyd.access.admission import Admission, TicketState
from proxyd.access.cookies import Via
from proxyd.access.ledger import MAX_SPENDS, LocalLedger
from proxyd.access.session import OFF_SESSION, Session
from proxyd.clock import FakeClock
from proxyd.config.schema import Config
from proxyd.errors import Refusal
from tests.unit.access.keys import NOW, clock_at_now


def session(
    quota: int | None = 100,
    user_id: int = 42,
    models: frozenset[str] | None = None,
    iat: float | None = NOW,
    ttl: int = 3600,
) -> Session:
    return Session(user_id, "default", quota, iat, float(NOW + ttl), models, None, Via.BEARER)


def admission_with(clock: FakeClock, tokens: int = 0, window: str = "1h") -> Admission:
    return Admission(Config.model_validate({"quota": {"tokens": tokens, "window": window}}), clock)


def refusal_of(admission: Admission, asker: Session) -> Refusal:
    with pytest.raises(Refusal) as refused:
        admission.admit(asker, "m")
    return refused.value


def headers_of(refusal: Refusal) -> dict[str, str]:
    return dict(refusal.headers)


@pytest.mark.parametrize("quota", [0, -1, -(2**63)])
def test_no_tokens_left_is_a_429_with_a_small_retry_after_and_no_sdk_retries(quota: int) -> None:
    refusal = refusal_of(admission_with(clock_at_now()), session(quota))
    assert (refusal.status, refusal.code) == (429, "quota_exceeded")
    assert headers_of(refusal) == {"x-should-retry": "false", "retry-after": "60"}


@pytest.mark.parametrize("ttl, told", [(3600, "60"), (60, "60"), (30, "30"), (0, "1"), (-3, "1")])
def test_retry_after_is_what_the_token_has_left_a_minute_at_most(ttl: int, told: str) -> None:
    assert headers_of(refusal_of(admission_with(clock_at_now()), session(0, ttl=ttl)))["retry-after"] == told


def test_a_session_without_a_quota_is_not_limited_by_one() -> None:
    admission = admission_with(clock_at_now())
    for _ in range(3):
        admission.admit(session(None), "m").settle(10**9)
    assert admission.tokens_left(session(None)) is None


def test_what_was_spent_counts_against_the_token() -> None:
    admission, asker = admission_with(clock_at_now()), session(100)
    admission.admit(asker, "m").settle(60)
    assert admission.tokens_left(asker) == 40
    admission.admit(asker, "m").settle(40)
    assert refusal_of(admission, asker).code == "quota_exceeded"


def test_two_tokens_of_one_user_share_what_was_spent_since_each_was_issued() -> None:
    clock = clock_at_now()
    admission = admission_with(clock)
    old = session(100, iat=NOW - 600)
    admission.admit(old, "m").settle(70)
    clock.advance(10)
    new = session(100, iat=NOW + 10)
    assert (admission.tokens_left(old), admission.tokens_left(new)) == (30, 100)
    admission.admit(new, "m").settle(25)
    assert (admission.tokens_left(old), admission.tokens_left(new)) == (5, 75)
    assert admission.tokens_left(session(100, user_id=43)) == 100


def test_a_token_without_iat_is_charged_all_that_is_known() -> None:
    clock = clock_at_now()
    admission = admission_with(clock)
    admission.admit(session(None), "m").settle(99)
    clock.advance(1000)
    assert admission.tokens_left(session(100, iat=None)) == 1


def test_a_refunded_request_costs_nothing() -> None:
    admission, asker = admission_with(clock_at_now()), session(10)
    admission.admit(asker, "m", estimate_tokens=10).refund()
    assert admission.tokens_left(asker) == 10


def test_requests_side_by_side_do_not_all_pass_on_the_same_last_tokens() -> None:
    admission, asker = admission_with(clock_at_now()), session(10)
    first = admission.admit(asker, "m", estimate_tokens=10)
    for _ in range(99):
        assert refusal_of(admission, asker).status == 429
    first.settle(4)
    assert admission.tokens_left(asker) == 6
    assert admission.admit(asker, "m")


def test_a_refused_request_burns_nothing() -> None:
    admission, asker = admission_with(clock_at_now()), session(10, models=frozenset({"m"}))
    with pytest.raises(Refusal):
        admission.admit(asker, "other", estimate_tokens=10)
    assert admission.tokens_left(asker) == 10


@pytest.mark.parametrize(
    "first, second", [("settle", "settle"), ("settle", "refund"), ("refund", "settle"), ("refund", "refund")]
)
def test_a_ticket_ends_once(first: str, second: str) -> None:
    admission, asker = admission_with(clock_at_now()), session(100)
    ticket = admission.admit(asker, "m", estimate_tokens=50)
    for end, tokens in ((first, 30), (second, 7)):
        if end == "settle":
            ticket.settle(tokens)
        else:
            ticket.refund()
    assert admission.tokens_left(asker) == (70 if first == "settle" else 100)
    assert ticket.state is (TicketState.SETTLED if first == "settle" else TicketState.REFUNDED)


def test_a_model_the_token_does_not_name_is_a_403() -> None:
    admission = admission_with(clock_at_now())
    assert admission.admit(session(models=frozenset({"m"})), "m")
    for models in (frozenset({"other"}), frozenset[str]()):
        refusal = refusal_of(admission, session(models=models))
        assert (refusal.status, refusal.code, refusal.param) == (403, "model_not_allowed", "model")


def test_mode_off_is_neither_limited_nor_counted() -> None:
    admission = admission_with(clock_at_now(), tokens=1)
    for _ in range(3):
        admission.admit(OFF_SESSION, "m", estimate_tokens=100).settle(100)


def test_a_used_up_window_says_when_it_opens_again() -> None:
    clock = clock_at_now()
    admission, asker = admission_with(clock, tokens=100, window="1h"), session(None, ttl=10**6)
    admission.admit(asker, "m").settle(60)
    clock.advance(600)
    admission.admit(asker, "m").settle(60)
    refusal = refusal_of(admission, asker)
    wait_s = int(headers_of(refusal)["retry-after"])
    assert (refusal.status, refusal.code) == (429, "quota_exceeded")
    assert 3000 <= wait_s <= 3001
    clock.advance(wait_s)
    assert admission.admit(asker, "m")


def test_many_spends_are_merged_without_inventing_or_losing_any() -> None:
    clock = clock_at_now()
    ledger = LocalLedger(clock)
    asker = session(None)
    for _ in range(4 * MAX_SPENDS):
        ledger.reserve(asker, 0).settle(3)
        clock.advance(1)
    account = ledger._accounts[42]
    assert len(account.spends) <= MAX_SPENDS
    assert ledger.spent_since(asker, NOW) == 4 * MAX_SPENDS * 3
    for age_s in range(1, 4 * MAX_SPENDS, 17):
        assert ledger.spent_since(asker, clock.wall() - age_s) <= age_s * 3
    assert ledger.spent_since(asker, clock.wall() - MAX_SPENDS // 4) == MAX_SPENDS // 4 * 3


def test_a_clock_set_back_keeps_the_spends_in_order() -> None:
    clock = clock_at_now()
    ledger = LocalLedger(clock)
    ledger.reserve(session(None), 0).settle(5)
    clock.step_wall(-100)
    ledger.reserve(session(None), 0).settle(5)
    assert ledger.spent_since(session(None), NOW) == 10


def test_the_memory_of_users_is_bounded_and_keeps_those_with_requests_under_way() -> None:
    clock = clock_at_now()
    ledger = LocalLedger(clock, max_accounts=3)
    open_one = ledger.reserve(session(None, user_id=1), 7)
    for user_id in range(2, 50):
        ledger.reserve(session(None, user_id=user_id), 1).settle(1)
    assert len(ledger._accounts) == 3
    assert ledger.spent_since(session(None, user_id=1), 0) == 7
    open_one.settle(9)
    assert ledger.spent_since(session(None, user_id=1), 0) == 9
