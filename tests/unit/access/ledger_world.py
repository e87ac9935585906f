"""Two workers' admissions over one ledger, for the tests of admission: no process, no socket, a fake clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import pytest

from proxyd.access.admission import Admission
from proxyd.access.cookies import Via
from proxyd.access.session import Session
from proxyd.clock import FakeClock
from proxyd.config.schema import Config
from proxyd.errors import Refusal
from proxyd.shm.ledger import Account, Ledger
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from tests.unit.access.keys import NOW, clock_at_now


def session(
    quota: int | None = 100,
    user_id: int = 42,
    models: frozenset[str] | None = None,
    iat: float | None = NOW,
    ttl: int = 3600,
    tenant: str = "default",
    jti: str | None = None,
) -> Session:
    """A token of its own for each user, `iat` and `jti`."""
    key = sha256(repr((user_id, iat, jti)).encode()).digest()
    return Session(user_id, tenant, quota, iat, float(NOW + ttl), models, jti, Via.BEARER, token_key=key)


@dataclass
class World:
    """Two workers' admissions over one ledger, and a hand that writes what the telemetry process would."""

    clock: FakeClock
    ledger: Ledger
    region: Region
    first: Admission
    second: Admission
    asked: list[tuple[int, float | None, int | None]] = field(default_factory=list)

    @property
    def now_ms(self) -> int:
        return self.first.now_ms()

    def account(self, user_id: int = 42) -> Account:
        found = self.ledger.find(user_id)
        assert found is not None
        return found

    def read_window(self, base: int, free_at: int = 0, user_id: int = 42) -> None:
        self.account(user_id).set_window(base, self.now_ms, free_at)

    def read_token(self, base: int, iat: int = NOW, user_id: int = 42) -> None:
        self.account(user_id).set_token(iat, base, self.now_ms)

    def decisions(self, basis: str) -> int:
        counters = read(self.region, 0.0).counters.get("proxyd_quota_decisions_total", {})
        return counters.get((("basis", basis),), 0)


def world(limits: dict[str, Any] | None = None, started_at: float = NOW - 1000.0, **quota: Any) -> World:
    config = Config.model_validate({"quota": quota, "limits": limits or {}})
    clock, region, ledger = clock_at_now(), Region.create(2), Ledger.create(2, permits=config.limits.most_streams)
    asked: list[tuple[int, float | None, int | None]] = []

    def make(slot: int) -> Admission:
        return Admission(
            config,
            clock,
            ledger.at(slot, 7 + slot),
            Metrics(region, slot),
            refresh=lambda *question: asked.append(question),
            started_at=started_at,
        )

    return World(clock, ledger, region, make(0), make(1), asked)


def refusal_of(admission: Admission, asker: Session, **more: Any) -> Refusal:
    with pytest.raises(Refusal) as refused:
        admission.admit(asker, "m", **more)
    return refused.value


def headers_of(refusal: Refusal) -> dict[str, str]:
    return dict(refusal.headers)


def spend(admission: Admission, asker: Session, tokens: int, **more: Any) -> None:
    admission.admit(asker, "m", **more).settle(tokens)
