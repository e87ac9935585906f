"""Which sessions were ended before their time.

Owns: the set of revoked users, tenants and token ids, each with the instant it was revoked. Must not know: tokens'
bytes, HTTP, how the word spreads between workers (the caller sends every revocation to every worker; `snapshot` and
`restore` carry it over a restart).

Invariants
- A user's or tenant's tokens issued at or before the revocation are refused; so is one without `iat`, whose age
  nobody knows. `iat` has whole seconds, so a token minted in the same second as the revocation is refused too.
- A revoked `jti` is refused whatever its `iat`.
- Nothing is forgotten to make room: at MAX_ENTRIES a new revocation raises, because dropping an old one would let a
  revoked token in. Entries whose `until` has passed are dropped first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Protocol

from proxyd.access.tenants import is_tenant
from proxyd.access.token import MAX_JTI_CHARS, MAX_USER_ID

# About 20 MB at worst in each worker; half would be reached by a site that revokes a whole customer base one by one.
MAX_ENTRIES = 100_000


class Kind(StrEnum):
    """What a revocation names; the words of POST /sessions/revoke."""

    USER = "user"
    TENANT = "tenant"
    JTI = "jti"


class RevocationsFull(Exception):
    """There is no room for another revocation; the old ones hold."""


class Revocable(Protocol):
    """The parts of a session that a revocation can name."""

    @property
    def user_id(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def jti(self) -> str | None: ...
    @property
    def issued_at(self) -> float | None: ...


class Revocations:
    """Cut-offs by what they name. `is_revoked` costs three dictionary look-ups."""

    __slots__ = ("_cutoffs", "_max_entries")

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        # (kind, value) -> (cut-off, until), both wall seconds; `until` is infinite where nobody knows when the last
        # such token ends
        self._cutoffs: dict[tuple[Kind, int | str], tuple[float, float]] = {}
        self._max_entries = max_entries

    def __len__(self) -> int:
        return len(self._cutoffs)

    def revoke(self, kind: str, value: int | str, at: float, until: float = math.inf) -> None:
        """Refuses from now on what `kind` and `value` name, if it was issued at or before `at` (wall seconds).

        `until`: when the last of those tokens has expired, where that is known. A later call moves both times
        forward only. Raises ValueError for an unknown kind or a value that no token could carry, RevocationsFull
        when there is no room.
        """
        name = (Kind(kind), _checked(Kind(kind), value))
        known = self._cutoffs.get(name)
        if known is not None:
            at, until = max(at, known[0]), max(until, known[1])
        elif len(self._cutoffs) >= self._max_entries:
            self.expire(at)
            if len(self._cutoffs) >= self._max_entries:
                raise RevocationsFull(f"{self._max_entries} revocations are in force already")
        self._cutoffs[name] = (at, until)

    def is_revoked(self, session: Revocable) -> bool:
        """True when the session's user, tenant or token id was revoked after its token was issued."""
        cutoffs = self._cutoffs
        if not cutoffs:
            return False
        if session.jti is not None and (Kind.JTI, session.jti) in cutoffs:
            return True
        for name in ((Kind.USER, session.user_id), (Kind.TENANT, session.tenant)):
            cutoff = cutoffs.get(name)
            if cutoff is not None and (session.issued_at is None or session.issued_at <= cutoff[0]):
                return True
        return False

    def expire(self, now: float) -> None:
        """Drops what names only tokens that have expired by `now`."""
        for name in [name for name, (_, until) in self._cutoffs.items() if until <= now]:
            del self._cutoffs[name]

    def snapshot(self) -> list[tuple[str, int | str, float, float]]:
        """Every revocation in force, as arguments for `revoke`."""
        return [(kind.value, value, at, until) for (kind, value), (at, until) in self._cutoffs.items()]

    def restore(self, entries: Iterable[tuple[str, int | str, float, float]]) -> None:
        """Adds what another process's `snapshot` gave."""
        for kind, value, at, until in entries:
            self.revoke(kind, value, at, until)


def _checked(kind: Kind, value: int | str) -> int | str:
    """The value in its one spelling: users as numbers, the rest as strings. Raises ValueError."""
    if kind is Kind.USER:
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
            value = int(value)
        if type(value) is int and 0 <= value <= MAX_USER_ID:
            return value
        raise ValueError("user is not a user's number")
    if kind is Kind.TENANT:
        if is_tenant(value):
            return value
        raise ValueError("tenant is not a tenant's name")
    if isinstance(value, str) and 0 < len(value) <= MAX_JTI_CHARS:
        return value
    raise ValueError("jti is not a token's id")
