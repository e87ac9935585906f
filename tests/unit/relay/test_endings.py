"""In which order requests are ended when a worker leaves, and what is told of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from proxyd.relay.ending import MAX_NAMED, Endings
from proxyd.relay.outcome import Transaction


@dataclass(eq=False)
class Request:
    """As much of a transaction as the order looks at."""

    started: float
    request_id: str = "r"
    route: str = "/v1/chat/completions"
    upstream: str = "openai"
    is_finished: bool = False
    session: Any = field(default_factory=lambda: SimpleNamespace(tenant="acme", user_id=7))


def live(*requests: Request) -> Any:
    return lambda: cast("list[Transaction]", list(requests))


def test_those_that_run_longest_go_first() -> None:
    endings = Endings()
    young, old, middle = Request(30.0), Request(10.0), Request(20.0)
    all_of_them = live(young, old, middle)
    assert [endings.next(all_of_them) for _ in range(4)] == [old, middle, young, None]


def test_each_is_told_once_and_one_that_finished_meanwhile_never() -> None:
    endings = Endings()
    first, second, third = Request(1.0), Request(2.0), Request(3.0)
    assert endings.next(live(first, second, third)) is first
    second.is_finished = True
    assert endings.next(live(first, third)) is third
    assert endings.next(live(first, third)) is None
    assert endings.under_way == 2
    endings.forget(cast("Transaction", first))
    assert endings.under_way == 1


def test_one_that_came_after_the_order_was_made_is_found() -> None:
    endings = Endings()
    first, late = Request(1.0), Request(2.0)
    assert endings.next(live(first)) is first
    assert endings.next(live(first, late)) is late


def test_the_report_names_the_first_ones_and_counts_all() -> None:
    endings = Endings()
    for number in range(MAX_NAMED + 5):
        endings.ended(cast("Transaction", Request(float(number), f"r{number}")), 100.0)
    assert endings.count == MAX_NAMED + 5
    assert [one["request_id"] for one in endings.named] == [f"r{number}" for number in range(MAX_NAMED)]
    assert endings.named[0] == {
        "request_id": "r0",
        "route": "/v1/chat/completions",
        "tenant": "acme",
        "upstream": "openai",
        "seconds": 100.0,
    }


def test_those_that_were_ended_and_are_over_are_counted() -> None:
    endings = Endings()
    at_once, later = Request(1.0, is_finished=True), Request(2.0)
    endings.ended(cast("Transaction", at_once), 5.0)
    endings.ended(cast("Transaction", later), 5.0)
    assert (endings.count, endings.over) == (2, 1)
    endings.forget(cast("Transaction", later))
    assert endings.over == 2
