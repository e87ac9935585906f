"""What the status says of limits and quotas."""

from __future__ import annotations

from typing import Any

from proxyd.config.schema import Limits
from proxyd.shm.ledger import Ledger
from proxyd.web.limits_status import MAX_TENANTS, TotalsCache, limits_status

NOTHING = {"users": 0, "held": 0, "running": 0, "permits": 0, "overflow": 0}


def limits(**options: Any) -> Limits:
    return Limits.model_validate(options)


def test_totals_are_taken_at_most_once_a_second() -> None:
    ledger = Ledger.create(1)
    totals = TotalsCache(ledger)
    assert totals.read(100.0) == NOTHING
    account = ledger.at(0, 1).account(7)
    account.add(held=30, running=20)
    assert totals.read(100.9) == NOTHING
    assert totals.read(101.0) == {**NOTHING, "users": 1, "held": 30, "running": 20}


def test_a_clock_that_has_just_begun_has_totals_too() -> None:
    assert TotalsCache(Ledger.create(1)).read(0.0) == NOTHING


def test_without_limits_no_tenant_is_told_and_no_row_is_made() -> None:
    ledger = Ledger.create(1)
    found = limits_status(NOTHING, ledger.at(0, 1), limits(), ["a", "b"], 10.0)
    assert found == {**NOTHING, "tenants": {}}
    assert ledger.totals().tenants == 0


def test_each_limited_tenant_has_what_it_uses_and_may() -> None:
    ledger = Ledger.create(1)
    share = ledger.at(0, 1)
    general = limits(concurrent_streams=3, tenants={"big": {"requests_per_minute": 9, "concurrent_streams": 0}})
    share.tenant("now").acquire(3, 5)
    share.tenant("big").requests.try_add(2, 9, 10_000)
    found = limits_status(NOTHING, share, general, ["now", "big"], 10.0)
    assert found["tenants"] == {
        "big": {"requests_per_minute": {"used": 2, "limit": 9}},
        "default": {"concurrent_streams": {"used": 0, "limit": 3}},
        "now": {"concurrent_streams": {"used": 1, "limit": 3}},
    }


def test_a_minute_that_has_passed_is_not_told() -> None:
    share = Ledger.create(1).at(0, 1)
    share.tenant("default").tokens.add(500, 10_000)
    minute = limits(tokens_per_minute=1000)

    def used(now: float) -> int:
        told = limits_status(NOTHING, share, minute, [], now)["tenants"]["default"]
        return int(told["tokens_per_minute"]["used"])

    assert (used(10.0), used(69.0), used(71.0)) == (500, 500, 0)


def test_so_many_tenants_are_told_and_no_more() -> None:
    share = Ledger.create(1).at(0, 1)
    found = limits_status(NOTHING, share, limits(requests_per_minute=1), (f"t{n}" for n in range(10_000)), 1.0)
    assert len(found["tenants"]) == MAX_TENANTS
