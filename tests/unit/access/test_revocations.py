"""Revocations: what they end, what they spare, and that none is forgotten to make room."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from proxyd.access.revocations import Revocations, RevocationsFull


def session(
    user_id: int = 42, tenant: str = "acme", jti: str | None = "j", issued_at: float | None = 100.0
) -> SimpleNamespace:
    return SimpleNamespace(user_id=user_id, tenant=tenant, jti=jti, issued_at=issued_at)


@pytest.mark.parametrize(
    "kind, value", [("user", 42), ("user", "42"), ("user", "042"), ("tenant", "acme"), ("jti", "j")]
)
def test_what_is_named_is_revoked_and_nothing_else(kind: str, value: int | str) -> None:
    revocations = Revocations()
    revocations.revoke(kind, value, 100.0)
    assert revocations.is_revoked(session())
    assert not revocations.is_revoked(session(user_id=43, tenant="other", jti="k"))
    assert not revocations.is_revoked(session(user_id=43, tenant="other", jti=None))


@pytest.mark.parametrize("kind, value", [("user", 42), ("tenant", "acme")])
@pytest.mark.parametrize(
    "issued_at, revoked", [(None, True), (99.0, True), (100.0, True), (100.5, False), (101.0, False)]
)
def test_only_tokens_issued_until_then_are_revoked(
    kind: str, value: int | str, issued_at: float | None, revoked: bool
) -> None:
    revocations = Revocations()
    revocations.revoke(kind, value, 100.0)
    assert revocations.is_revoked(session(issued_at=issued_at)) is revoked


def test_a_token_id_is_revoked_whenever_it_was_issued() -> None:
    revocations = Revocations()
    revocations.revoke("jti", "j", 100.0)
    assert revocations.is_revoked(session(issued_at=1e9))


def test_an_earlier_revocation_never_weakens_a_later_one() -> None:
    revocations = Revocations()
    revocations.revoke("user", 42, 100.0)
    revocations.revoke("user", 42, 50.0, until=60.0)
    revocations.expire(1e9)
    assert revocations.is_revoked(session(issued_at=100.0))
    assert len(revocations) == 1


def test_a_revocation_ends_when_its_tokens_have_expired() -> None:
    revocations = Revocations()
    revocations.revoke("user", 42, 100.0, until=200.0)
    revocations.revoke("tenant", "other", 100.0)
    revocations.expire(199.0)
    assert len(revocations) == 2
    revocations.expire(200.0)
    assert revocations.snapshot() == [("tenant", "other", 100.0, math.inf)]


def test_a_full_set_refuses_rather_than_forgets() -> None:
    revocations = Revocations(max_entries=2)
    revocations.revoke("user", 1, 100.0)
    revocations.revoke("user", 42, 100.0, until=150.0)
    with pytest.raises(RevocationsFull):
        revocations.revoke("user", 3, 120.0)
    assert revocations.is_revoked(session())
    revocations.revoke("user", 42, 120.0, until=150.0)
    revocations.revoke("user", 3, 150.0)
    assert revocations.is_revoked(session(user_id=1))
    assert revocations.is_revoked(session(user_id=3))


@pytest.mark.parametrize(
    "kind, value",
    [("users", 1), ("user", "x"), ("user", ""), ("user", -1), ("user", 2**64), ("user", "٤٢"), ("user", "9" * 5000),
    ("user", True),
     ("tenant", ""), ("tenant", "a b"), ("tenant", 1), ("jti", ""), ("jti", 1), ("jti", "j" * 257)],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_what_no_token_could_carry_is_refused(kind: str, value: int | str) -> None:
    with pytest.raises(ValueError):
        Revocations().revoke(kind, value, 0.0)


def test_a_snapshot_restores_the_same_revocations() -> None:
    first, second = Revocations(), Revocations()
    first.revoke("user", "42", 100.0)
    first.revoke("jti", "x", 100.0, until=500.0)
    second.restore(first.snapshot())
    assert second.snapshot() == first.snapshot()
    assert second.is_revoked(session())
