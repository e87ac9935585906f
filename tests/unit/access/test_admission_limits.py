"""Admission by the shared ledger: permits, the sliding minute, what a refusal costs, tickets that end once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proxyd.access.admission import PARTS_OF_A_MINUTE, Ticket, TicketState, decide_wait_s
from proxyd.access.session import OFF_SESSION
from proxyd.access.ticket import MOST_LEARNT
from proxyd.errors import Refusal
from tests.unit.access.ledger_world import World, headers_of, refusal_of, session, spend, world

# -- concurrency -------------------------------------------------------------------------------------------------------


def test_a_permit_is_held_until_its_release_and_workers_share_them() -> None:
    here = world({"concurrent_streams": 2})
    one = here.first.admit(session(None), "m")
    two = here.second.admit(session(None), "m")
    refusal = refusal_of(here.first, session(None))
    assert (refusal.status, refusal.code, headers_of(refusal)) == (
        429, "concurrency_limit_exceeded", {"retry-after": "10"},
    )  # fmt: skip
    one.release()
    one.release()
    three = here.second.admit(session(None), "m")
    assert refusal_of(here.first, session(None)).code == "concurrency_limit_exceeded"
    for ticket in (one, two, three):
        ticket.settle(1)
    assert here.ledger.totals()[2:5] == (0, 0, 0)


def test_a_full_house_says_when_its_oldest_request_may_end() -> None:
    here = world({"concurrent_streams": 1})
    ticket = here.first.admit(session(None), "m")
    here.clock.advance(20)
    ticket.release()
    here.first.admit(session(None), "m")
    here.clock.advance(6)
    assert headers_of(refusal_of(here.second, session(None)))["retry-after"] == "20"
    here.clock.advance(100)
    assert headers_of(refusal_of(here.second, session(None)))["retry-after"] == "60"


@pytest.mark.parametrize(
    ("average_s", "elapsed_s", "wait_s"),
    [(20, 0, 25), (20, 5, 20), (20, 20, 5), (20, 21, 21), (0.2, 0, 1), (0.2, 0.2, 1), (4, 4.5, 5), (20, 900, 60)],
)
def test_a_client_is_called_back_a_little_late_rather_than_too_early(
    average_s: float, elapsed_s: float, wait_s: int
) -> None:
    assert decide_wait_s(average_s, elapsed_s) == wait_s


def test_a_dead_worker_s_permits_and_holds_come_back() -> None:
    here = world({"concurrent_streams": 3})
    for _ in range(3):
        here.second.admit(session(10**6), "m").progress(50)
    assert here.ledger.reclaim(1) == 3
    assert here.ledger.totals()[2:5] == (0, 0, 0)
    for _ in range(3):
        assert here.first.admit(session(None), "m")


# -- the sliding minute ------------------------------------------------------------------------------------------------


def test_so_many_requests_pass_and_the_next_is_told_the_truth() -> None:
    here = world({"requests_per_minute": 20})
    for number in range(20):
        [here.first, here.second][number % 2].admit(session(None), "m").settle(0)
        here.clock.advance(1)
    refusal = refusal_of(here.first, session(None))
    wait_s = int(headers_of(refusal)["retry-after"])
    assert (refusal.code, refusal.reason, 40 <= wait_s <= 41) == ("rate_limit_exceeded", "requests", True)
    here.clock.advance(wait_s - 1)
    assert refusal_of(here.first, session(None)).code == "rate_limit_exceeded"
    here.clock.advance(1)
    assert here.first.admit(session(None), "m")


def test_tokens_of_a_minute_are_reserved_and_set_right_at_the_end() -> None:
    here = world({"tokens_per_minute": 1000})
    ticket = here.first.admit(session(None), "m", prompt_tokens=100, max_tokens=800)
    minute = here.first._ledger.tenant("default").tokens
    assert minute.total(here.now_ms) == 100 + 1000 // PARTS_OF_A_MINUTE
    here.clock.advance(10)
    ticket.progress(500)
    assert minute.total(here.now_ms) == 500
    ticket.settle(450)
    assert minute.total(here.now_ms) == 450
    here.clock.advance(50.5)
    assert minute.total(here.now_ms) == 288
    here.clock.advance(10)
    assert minute.total(here.now_ms) == 0


def test_a_short_answer_and_a_refund_give_the_minute_back() -> None:
    here = world({"tokens_per_minute": 1000})
    minute = here.first._ledger.tenant("default").tokens
    here.first.admit(session(None), "m", prompt_tokens=100).settle(20)
    assert minute.total(here.now_ms) == 20
    ticket = here.first.admit(session(None), "m", prompt_tokens=100)
    here.clock.advance(3)
    ticket.progress(400)
    ticket.refund()
    assert minute.total(here.now_ms) == 20


def test_an_answer_that_was_counted_too_high_and_ends_below_its_reservation_is_set_right() -> None:
    here = world({"tokens_per_minute": 1000})
    minute = here.first._ledger.tenant("default").tokens
    ticket = here.first.admit(session(None), "m", prompt_tokens=100, max_tokens=100)
    here.clock.advance(3)
    ticket.progress(260)
    ticket.settle(150)
    assert minute.total(here.now_ms) == 150


def test_a_full_minute_of_tokens_says_when_the_next_request_fits() -> None:
    here = world({"tokens_per_minute": 300})
    here.first.admit(session(None), "m", max_tokens=150).settle(150)
    here.clock.advance(30)
    here.first.admit(session(None), "m", max_tokens=150).settle(150)
    refusal = refusal_of(here.second, session(None), max_tokens=100)
    wait_s = int(headers_of(refusal)["retry-after"])
    assert (refusal.code, refusal.reason, 30 <= wait_s <= 31) == ("rate_limit_exceeded", "tokens", True)
    here.clock.advance(wait_s)
    assert here.second.admit(session(None), "m", max_tokens=100)


def test_a_request_larger_than_the_limit_passes_alone() -> None:
    here = world({"tokens_per_minute": 50})
    ticket = here.first.admit(session(None), "m", prompt_tokens=1000)
    assert refusal_of(here.second, session(None)).reason == "tokens"
    ticket.refund()
    assert here.second.admit(session(None), "m", prompt_tokens=1000)


def test_a_new_user_is_expected_to_ask_like_his_tenant_s_others() -> None:
    here = world({"tokens_per_minute": 10_000})
    here.first.admit(session(None), "m", prompt_tokens=10).settle(40)
    minute = here.first._ledger.tenant("default").tokens
    here.second.admit(session(None, user_id=43), "m", prompt_tokens=15)
    assert minute.total(here.now_ms) == 40 + 40
    here.second.admit(session(None, user_id=44), "m", prompt_tokens=100)
    assert minute.total(here.now_ms) == 40 + 40 + 100


def admitted(here: World, count: int, user_id: int = 42) -> list[Ticket]:
    """Of `count` short requests at one instant, those that were let in."""
    found = []
    for number in range(count):
        try:
            asker = session(None, user_id=user_id)
            found.append([here.first, here.second][number % 2].admit(asker, "m", prompt_tokens=6))
        except Refusal:
            pass
    return found


def test_short_requests_side_by_side_fit_in_a_minute_that_has_room_for_them() -> None:
    here = world({"tokens_per_minute": 2000})
    for ticket in admitted(here, 10):
        ticket.settle(16)
    assert here.first._ledger.tenant("default").tokens.total(here.now_ms) == 160


@pytest.mark.parametrize("limit, cost", [(2000, 1500), (2000, 4 * 10**9), (10**6, 4 * 10**9)])
@pytest.mark.parametrize("user_id", [42, 43])
def test_one_long_answer_does_not_keep_the_next_minute_s_short_ones_away(limit: int, cost: int, user_id: int) -> None:
    here = world({"tokens_per_minute": limit})
    spend(here.first, session(None), cost, prompt_tokens=6)
    assert refusal_of(here.second, session(None), prompt_tokens=2000).reason == "tokens"
    here.clock.advance(60.5)
    tickets = admitted(here, 10, user_id)
    assert len(tickets) == 10
    for ticket in tickets:
        ticket.settle(16)
    for _ in range(10):
        assert [ticket.settle(16) for ticket in admitted(here, 1, user_id)]
    assert here.first._ledger.tenant("default").tokens.total(here.now_ms) == 20 * 16


def test_requests_that_begin_together_overshoot_a_minute_by_sixteen_answers_at_most() -> None:
    here = world({"tokens_per_minute": 1000})
    for _ in range(2):
        tickets = admitted(here, 100)
        assert 14 <= len(tickets) <= 16
        for ticket in tickets:
            ticket.settle(106)
        assert admitted(here, 1) == []
        here.clock.advance(60.5)


def test_a_refusal_for_tokens_names_the_moment_at_which_what_is_set_aside_fits() -> None:
    here = world({"tokens_per_minute": 1600})
    spend(here.first, session(None), 1500)
    here.clock.advance(30)
    spend(here.first, session(None), 90)
    refusal = refusal_of(here.second, session(None), prompt_tokens=100)
    wait_s = int(headers_of(refusal)["retry-after"])
    assert 30 <= wait_s <= 31
    here.clock.advance(wait_s)
    assert here.second.admit(session(None), "m", prompt_tokens=100)


def test_no_answer_teaches_more_than_any_can_have() -> None:
    here = world({"tokens_per_minute": 10**9})
    spend(here.first, session(10**12), 2**32)
    assert here.account().average_completion == MOST_LEARNT
    assert here.first._ledger.tenant("default").average_tokens == MOST_LEARNT
    here.clock.advance(61)
    for _ in range(100):
        spend(here.second, session(10**12), 16)
    assert (here.account().average_completion or 0) < 32


# -- all together ------------------------------------------------------------------------------------------------------


def test_limits_hold_for_mode_off_as_for_the_tenant_default() -> None:
    here = world({"requests_per_minute": 1})
    assert here.first.admit(OFF_SESSION, "m")
    assert refusal_of(here.second, session(None)).code == "rate_limit_exceeded"


def test_a_tenant_s_own_limits_stand_for_the_general_ones() -> None:
    own = {"big": {"requests_per_minute": 3}, "free": {"requests_per_minute": 0}}
    here = world({"requests_per_minute": 1, "tenants": own})

    def passes(tenant: str) -> int:
        count = 0
        for _ in range(10):
            try:
                here.first.admit(session(None, tenant=tenant), "m")
                count += 1
            except Refusal:
                pass
        return count

    assert (passes("big"), passes("free"), passes("default"), passes("unheard-of")) == (3, 10, 1, 1)


def test_what_costs_no_tokens_counts_as_a_request_only() -> None:
    here = world({"concurrent_streams": 1, "requests_per_minute": 3, "tokens_per_minute": 1}, tokens=1)
    here.first.admit(session(0), "m", counts=False, may_wait=True).refund()
    here.first.admit(session(0), "m", counts=False).refund()
    assert here.ledger.totals()[:1] + here.ledger.totals()[2:5] == (0, 0, 0, 0)
    assert here.first.admit(session(None), "m")
    assert refusal_of(here.first, session(0), counts=False).code == "rate_limit_exceeded"


@pytest.mark.parametrize(
    "limits, quota, code",
    [
        ({"concurrent_streams": 1, "requests_per_minute": 2, "tokens_per_minute": 10_000}, 10**6,
         "concurrency_limit_exceeded"),
        ({"concurrent_streams": 9, "requests_per_minute": 1, "tokens_per_minute": 10_000}, 10**6,
         "rate_limit_exceeded"),
        ({"concurrent_streams": 9, "requests_per_minute": 9, "tokens_per_minute": 11}, 10**6, "rate_limit_exceeded"),
        ({"concurrent_streams": 9, "requests_per_minute": 9, "tokens_per_minute": 10_000}, 100, "quota_exceeded"),
    ],
)  # fmt: skip
def test_a_refused_request_consumes_nothing(limits: dict[str, int], quota: int, code: str) -> None:
    here = world(limits)
    here.first.admit(session(quota), "m", prompt_tokens=10)
    tenant = here.first._ledger.tenant("default")

    def state() -> tuple[int, ...]:
        streams = limits["concurrent_streams"]
        counts = tenant.in_use(streams), tenant.requests.total(here.now_ms), tenant.tokens.total(here.now_ms)
        return (*counts, *here.account().sums())

    before = state()
    for admission in [here.first, here.second] * 20:
        assert refusal_of(admission, session(quota)).code == code
    assert state() == before


# -- tickets -----------------------------------------------------------------------------------------------------------

_ENDS: dict[str, Callable[[Ticket], object]] = {
    "settle": lambda ticket: ticket.settle(30),
    "refund": lambda ticket: ticket.refund(),
}


@pytest.mark.parametrize("first", _ENDS)
@pytest.mark.parametrize("second", _ENDS)
def test_a_ticket_ends_once(first: str, second: str) -> None:
    here = world({"concurrent_streams": 1, "tokens_per_minute": 1000})
    ticket = here.first.admit(session(), "m", prompt_tokens=50)
    ticket.progress(20)
    _ENDS[first](ticket)
    other = here.second.admit(session(None), "m", max_tokens=0)
    spent = 30 if first == "settle" else 0
    _ENDS[second](ticket)
    assert ticket.progress(10**6)
    ticket.release()
    assert refusal_of(here.first, session(None)).code == "concurrency_limit_exceeded", "the other's permit is its own"
    other.refund()
    assert ticket.state is (TicketState.SETTLED if first == "settle" else TicketState.REFUNDED)
    assert here.account().sums() == (0, 0, spent)
    assert here.first._ledger.tenant("default").tokens.total(here.now_ms) == spent


def test_ten_thousand_mixed_ends_leave_nothing_held() -> None:
    here = world({"concurrent_streams": 64, "requests_per_minute": 10**6, "tokens_per_minute": 10**9})
    tickets: list[Ticket] = []
    spent = 0
    for number in range(10_000):
        admission = [here.first, here.second][number % 2]
        tickets.append(admission.admit(session(None, user_id=number % 97), "m", prompt_tokens=number % 13))
        here.clock.advance(0.001)
        if number % 3 == 0:
            tickets[-1].progress(number % 500)
        if len(tickets) > 50:
            ticket = tickets.pop(number % 50)
            if number % 5 == 0:
                ticket.release()
            if number % 4:
                ticket.settle(number % 400)
                spent += number % 400
            else:
                ticket.refund()
    for ticket in tickets:
        ticket.refund()
    assert here.ledger.totals()[2:] == (0, 0, 0, 0)
    assert sum(here.account(user).settled for user in range(97)) == spent
    assert here.first._ledger.tenant("default").tokens.total(here.now_ms) == spent
