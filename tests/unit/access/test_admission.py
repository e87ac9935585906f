"""Admission by the shared ledger: models, quota and window, what is reserved, when the store is asked."""

from __future__ import annotations

import pytest

from proxyd.access.admission import FIRST_COMPLETION, MAX_FIRST_SEEN, Admission, NeedsReading
from proxyd.access.session import OFF_SESSION, Session
from tests.unit.access.keys import NOW
from tests.unit.access.ledger_world import headers_of, refusal_of, session, spend, world

# -- models ------------------------------------------------------------------------------------------------------------


def test_a_model_the_token_does_not_name_is_a_403_and_costs_nothing() -> None:
    here = world({"requests_per_minute": 1})
    assert here.first.admit(session(None, models=frozenset({"m"}), tenant="other"), "m")
    for models in (frozenset({"x"}), frozenset[str]()):
        refusal = refusal_of(here.first, session(models=models))
        assert (refusal.status, refusal.code, refusal.param) == (403, "model_not_allowed", "model")
    assert here.first.admit(session(None), "m")


# -- the token's quota -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quota", [0, -1, -(2**63)])
def test_a_session_without_tokens_is_refused_at_once_and_the_store_is_not_asked(quota: int) -> None:
    refusal = refusal_of(world().first, session(quota), may_wait=True)
    assert (refusal.status, refusal.code) == (429, "quota_exceeded")
    assert headers_of(refusal) == {"x-should-retry": "false", "retry-after": "60"}


def test_a_session_without_a_quota_is_not_limited_by_one_and_no_decision_is_counted() -> None:
    here = world()
    for _ in range(3):
        spend(here.first, session(None), 10**9)
    assert here.first.admit(session(None), "m", may_wait=True).tokens_left() is None
    assert here.decisions("store") == here.decisions("local") == 0


def test_what_one_worker_settles_counts_at_the_other() -> None:
    here = world()
    spend(here.first, session(), 60)
    spend(here.second, session(), 40)
    assert refusal_of(here.first, session()).code == "quota_exceeded"
    assert refusal_of(here.second, session()).reason == "token"


def test_what_the_store_says_counts_beside_what_was_settled_here() -> None:
    here, asker = world(), session(iat=NOW - 9)
    spend(here.first, asker, 60)
    here.read_token(base=39, iat=NOW - 9)
    spend(here.second, asker, 1)
    assert refusal_of(here.first, asker).reason == "token"
    assert here.first.admit(session(iat=NOW + 5), "m")


def test_a_base_below_zero_means_tokens_of_before_the_session() -> None:
    here = world()
    spend(here.first, session(None), 500)
    here.read_token(base=-500, iat=NOW + 9)
    ticket = here.first.admit(session(100, iat=NOW + 9), "m")
    assert ticket.tokens_left() == 100


def test_requests_side_by_side_do_not_all_pass_on_the_same_last_tokens() -> None:
    here, asker = world(), session(10)
    first = here.first.admit(asker, "m", prompt_tokens=3)
    for admission in [here.first, here.second] * 50:
        refusal = refusal_of(admission, asker)
        assert (refusal.reason, headers_of(refusal)) == ("under_way", {"retry-after": "1"})
    first.settle(4)
    assert here.second.admit(asker, "m").tokens_left() == 6


def test_a_token_without_iat_is_charged_from_its_first_sight_and_the_store_is_not_asked() -> None:
    here = world()
    spend(here.first, session(None), 99)
    asker = session(100, iat=None)
    here.second.admit(asker, "m", may_wait=True).settle(60)
    here.clock.advance(100)
    assert here.first.admit(asker, "m", may_wait=True).tokens_left() == 40
    assert here.first.admit(session(100, iat=None, jti="next"), "m", may_wait=True).tokens_left() == 100
    assert here.decisions("local") == 3
    assert here.asked == []


@pytest.mark.parametrize("iat", [NOW, NOW + 0.5])
def test_a_token_minted_in_the_second_of_its_predecessor_s_spending_begins_at_its_first_sight(iat: float) -> None:
    here, old = world(), session(iat=NOW, jti="old")
    spend(here.first, old, 60)
    here.read_token(base=7)  # of other nodes, in this second
    spend(here.first, old, 40)
    here.clock.advance(1.9)
    new = session(iat=iat, jti="new")
    here.second.admit(new, "m").settle(30)
    assert here.first.admit(new, "m", max_tokens=0).tokens_left() == 70
    assert refusal_of(here.second, old).reason == "token"
    here.clock.advance(60)
    here.read_token(base=7 + 50)  # spent elsewhere meanwhile
    assert here.second.admit(new, "m", max_tokens=0).tokens_left() == 20


def test_a_token_first_seen_later_or_older_than_the_node_is_charged_from_its_iat() -> None:
    for started_at, later_s in ((NOW - 1000.0, 2.1), (NOW + 0.1, 0.2)):
        here = world(started_at=started_at)
        spend(here.first, session(None), 60)
        here.read_token(base=0)
        here.clock.advance(later_s)
        assert here.second.admit(session(iat=NOW), "m").tokens_left() == 40


def test_mode_off_has_no_quota() -> None:
    here = world(tokens=1)
    for _ in range(3):
        here.first.admit(OFF_SESSION, "m", prompt_tokens=100, may_wait=True).settle(100)
    assert here.ledger.totals().users == 0


# -- what is reserved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, most, held",
    [(10, None, 10 + FIRST_COMPLETION), (10, 20, 30), (10, 7, 26), (10, 0, 10), (0, 10**6, FIRST_COMPLETION)],
)
def test_a_reservation_is_the_prompt_and_the_completion_to_expect(prompt: int, most: int | None, held: int) -> None:
    here = world()
    ticket = here.first.admit(session(), "m", prompt_tokens=prompt, max_tokens=most)
    assert here.account().held == held
    ticket.refund()
    assert here.account().sums() == (0, 0, 0)


def test_the_completion_to_expect_is_learnt_from_the_user_s_own() -> None:
    here = world()
    spend(here.first, session(10**6), 50, prompt_tokens=10)
    here.second.admit(session(10**6), "m", prompt_tokens=5)
    assert here.account().held == 45
    here.second.admit(session(10**6, user_id=43), "m")
    assert here.account(43).held == FIRST_COMPLETION


def test_a_request_that_spends_more_than_was_set_aside_holds_what_it_spends() -> None:
    here = world()
    ticket = here.first.admit(session(10**6), "m", prompt_tokens=10, max_tokens=20)
    assert ticket.progress(25)
    assert here.account().sums() == (30, 25, 0)
    assert ticket.progress(99)
    assert here.account().sums() == (99, 99, 0)
    ticket.settle(120)
    assert here.account().sums() == (0, 0, 120)


# -- the line within answers -------------------------------------------------------------------------------------------


def test_an_answer_ends_when_its_user_s_answers_together_pass_the_line() -> None:
    here = world(started_at=NOW + 1.0)
    spend(here.first, session(), 40)
    one = here.first.admit(session(300), "m")
    one.progress(200)
    two = here.second.admit(session(340), "m", max_tokens=1)
    assert two.tokens_left() == 100
    assert two.progress(99)
    assert two.tokens_left() == 1
    assert two.progress(100)
    assert not two.progress(101)
    assert not one.progress(200)
    two.settle(101)
    assert not one.progress(200)
    assert one.tokens_left() == 300 - 141 - 200


def test_a_reading_of_the_store_moves_the_line_of_answers_under_way() -> None:
    here = world(tokens=1000)
    ticket = here.first.admit(session(None), "m")
    assert ticket.progress(500)
    here.read_window(base=501)
    assert not ticket.progress(500)


def test_an_answer_of_a_user_without_a_line_is_never_ended() -> None:
    here = world()
    ticket = here.first.admit(session(None), "m")
    assert ticket.progress(10**12)
    assert ticket.tokens_left() is None
    off = here.first.admit(OFF_SESSION, "m")
    assert off.progress(10**12)
    assert off.tokens_left() is None


# -- the window --------------------------------------------------------------------------------------------------------


def test_a_used_up_window_says_when_it_opens_again() -> None:
    here = world(tokens=100, window="1h")
    asker = session(None, ttl=10**6)
    spend(here.first, asker, 60)
    here.read_window(base=40, free_at=NOW + 700)
    refusal = refusal_of(here.second, asker, may_wait=True)
    assert (refusal.reason, headers_of(refusal)) == ("window", {"x-should-retry": "false", "retry-after": "701"})
    here.clock.advance(701)
    with pytest.raises(NeedsReading):
        here.second.admit(asker, "m", may_wait=True)
    here.read_window(base=-1)
    assert here.second.admit(asker, "m", may_wait=True).tokens_left() == 41


# -- when the store is asked -------------------------------------------------------------------------------------------


def needs(admission: Admission, asker: Session) -> NeedsReading:
    with pytest.raises(NeedsReading) as needed:
        admission.admit(asker, "m", may_wait=True)
    return needed.value


def test_a_user_first_seen_has_the_store_asked_for_what_matters_and_only_that() -> None:
    found = needs(world(tokens=100, window="1h").first, session(None))
    assert (found.user_id, found.window_since, found.token_iat) == (42, NOW - 3600.0, None)
    found = needs(world().first, session(100, iat=NOW - 7.25))
    assert (found.window_since, found.token_iat) == (None, NOW - 8)
    found = needs(world(tokens=100).first, session(100))
    assert (found.window_since, found.token_iat) == (NOW - 86_400.0, NOW)


def test_who_may_not_wait_is_decided_on_what_is_known_and_the_metric_says_so() -> None:
    here = world(tokens=100)
    assert here.first.admit(session(None), "m", max_tokens=1)
    assert (here.decisions("local"), here.decisions("store")) == (1, 0)
    here.read_window(base=0)
    assert here.second.admit(session(None), "m", may_wait=True, max_tokens=1)
    assert (here.decisions("local"), here.decisions("store")) == (1, 1)


def test_needing_a_reading_consumes_nothing_and_is_no_decision() -> None:
    here = world({"concurrent_streams": 1, "requests_per_minute": 1}, tokens=100)
    for _ in range(5):
        needs(here.first, session(None))
    assert here.decisions("local") == here.decisions("store") == 0
    assert here.first.admit(session(None), "m")


def test_a_reading_older_than_the_refresh_is_asked_for_anew_without_waiting() -> None:
    here = world(tokens=100, refresh="30s")
    here.first.admit(session(None), "m").refund()
    here.asked.clear()
    here.read_window(base=0)
    for passed, questions in [(29.9, 0), (0.2, 1), (25, 2)]:
        here.clock.advance(passed)
        here.first.admit(session(None), "m", may_wait=True, max_tokens=1).refund()
        assert len(here.asked) == questions
    assert here.asked[-1][0::2] == (42, None)
    assert here.asked[-1][1] == pytest.approx(here.clock.wall() - 86_400)


def test_a_reading_older_than_two_refreshes_and_a_second_is_local_knowledge() -> None:
    here = world(tokens=100, refresh="10s")
    here.first.admit(session(None), "m").refund()
    here.read_window(base=0)
    here.clock.advance(21.0)
    here.first.admit(session(None), "m").refund()
    assert (here.decisions("local"), here.decisions("store")) == (1, 1)
    here.clock.advance(0.1)
    here.first.admit(session(None), "m").refund()
    assert (here.decisions("local"), here.decisions("store")) == (2, 1)


def test_who_comes_seldom_is_not_let_in_on_a_reading_of_any_age() -> None:
    here = world(tokens=100, refresh="10s")
    here.first.admit(session(None), "m").refund()
    here.read_window(base=0)
    here.clock.advance(21.0)
    here.first.admit(session(None), "m", may_wait=True).refund()
    here.clock.advance(0.1)
    needs(here.first, session(None))
    here.read_window(base=1)
    assert here.first.admit(session(None), "m", may_wait=True).tokens_left() == 99


def test_a_request_under_way_has_the_reading_made_anew_once_a_second_at_most() -> None:
    here = world(tokens=10**6, refresh="10s")
    asker = session(10**6)
    ticket = here.first.admit(asker, "m")
    here.read_window(base=0)
    here.read_token(base=0)
    here.asked.clear()
    for passed, questions in ((10, 0), (0.1, 1), (0.9, 1), (0.1, 2), (5, 3)):
        here.clock.advance(passed)
        assert ticket.progress(1)
        ticket.share()
        assert len(here.asked) == questions
    assert here.asked[-1] == (42, pytest.approx(here.clock.wall() - 86_400), NOW)
    here.read_window(base=0)
    here.clock.advance(2)
    ticket.progress(1)
    assert len(here.asked) == 4  # the token's is as old as it was
    here.read_token(base=0)
    here.clock.advance(2)
    ticket.progress(1)
    assert len(here.asked) == 4


def test_a_refusal_rests_on_a_fresh_reading_where_one_can_be_had() -> None:
    here = world(tokens=100)
    here.first.admit(session(None), "m").refund()
    here.read_window(base=100, free_at=NOW + 50)
    here.clock.advance(0.9)
    assert refusal_of(here.first, session(None), may_wait=True).reason == "window"
    here.clock.advance(0.2)
    needs(here.first, session(None))
    assert refusal_of(here.first, session(None), may_wait=False).reason == "window"


def test_without_the_store_a_new_session_is_not_charged_what_was_spent_before_it() -> None:
    here = world()
    spend(here.first, session(None), 10**6)
    young = session(100, iat=NOW)
    ticket = here.second.admit(young, "m")
    assert ticket.tokens_left() == 100
    ticket.settle(30)
    assert here.first.admit(young, "m", max_tokens=0).tokens_left() == 70
    old = session(100, iat=NOW - 5)
    here.second.admit(old, "m", max_tokens=0).settle(20)
    assert here.second.admit(old, "m", max_tokens=0).tokens_left() == 80
    assert here.second.admit(young, "m", max_tokens=0).tokens_left() == 50


def test_without_the_store_a_session_older_than_the_node_is_charged_all_that_the_node_saw() -> None:
    here = world(started_at=NOW + 1.0)
    spend(here.first, session(None), 30)
    assert here.second.admit(session(100, iat=NOW), "m").tokens_left() == 70


def test_the_memory_of_sessions_first_seen_is_bounded() -> None:
    here = world(started_at=0.0)
    for number in range(MAX_FIRST_SEEN + 100):
        here.first.admit(session(100, user_id=number % 50, iat=NOW - number // 50), "m").refund()
    assert len(here.first._first_seen) == MAX_FIRST_SEEN
