"""The questions asked of the stored rows.

Owns: their SQL, written for SQLite and MySQL alike (`?` parameters, the reader's own timestamp form). Must not know:
connections.
Invariant: WINDOW_SUM and USER_TOTALS read nothing but idx_sys_ai_user_window (tests ask both planners).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from proxyd.store.schema import Reader

# The rolling sum of the contract.
WINDOW_SUM = (
    "SELECT SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ?"
)
# The same, with its parts.
USER_TOTALS = (
    "SELECT COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0)"
    " FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ?"
)
# MySQL's text columns may call Acme, ACME and "acme " equal; HEX tells them apart, and SQLite has it, too.
_GROUPS = (
    "SELECT status, model_id, MIN(tenant), COUNT(*), SUM(prompt_tokens), SUM(completion_tokens),"
    " SUM(CASE WHEN estimated <> 0 THEN prompt_tokens + completion_tokens ELSE 0 END) FROM sys_ai_transactions"
)
SPLITS = ("status", "model_id", "tenant")


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of some set of rows. `estimated_tokens` is the part of `total_tokens` that no provider reported."""

    transactions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def estimated_share(self) -> float:
        """0.0 to 1.0 of the tokens; 0.0 when there are none."""
        return self.estimated_tokens / self.total_tokens if self.total_tokens else 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.transactions + other.transactions,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.estimated_tokens + other.estimated_tokens,
        )


class Asked(NamedTuple):
    """Which rows: since a moment (seconds since the epoch), and of whom; None is everybody."""

    since: float
    user_id: int | None = None
    tenant: str | None = None
    model_id: int | None = None


class Group(NamedTuple):
    """The rows that share a status, a model and a tenant."""

    status: str
    model_id: int
    tenant: str
    totals: Totals


def window_tokens(reader: Reader, user_id: int, since: float) -> int:
    """A user's tokens since a moment, 0 for an unknown user."""
    return int(reader.fetch(WINDOW_SUM, (user_id, reader.timestamp(since)))[0][0] or 0)


def user_totals(reader: Reader, user_id: int, since: float) -> Totals:
    """A user's transactions and tokens since a moment. What is estimated is not in the index, and not told."""
    return Totals(*map(int, reader.fetch(USER_TOTALS, (user_id, reader.timestamp(since)))[0]))


def usage(reader: Reader, asked: Asked) -> list[Group]:
    """All the rows asked for, by their group; this reads the table."""
    tenant = None if asked.tenant is None else asked.tenant.encode(errors="surrogateescape").hex().upper()
    conditions = {"user_id = ?": asked.user_id, "HEX(tenant) = ?": tenant, "model_id = ?": asked.model_id}
    given = {condition: value for condition, value in conditions.items() if value is not None}
    where = " AND ".join([*given, "created_at >= ?"])
    sql = f"{_GROUPS} WHERE {where} GROUP BY status, model_id, HEX(tenant)"
    found = reader.fetch(sql, (*given.values(), reader.timestamp(asked.since)))
    return [
        Group(str(status), int(model_id), str(tenant), Totals(*map(int, counts)))
        for status, model_id, tenant, *counts in found
    ]


def total(groups: Iterable[Group]) -> Totals:
    """All of them together."""
    return sum((group.totals for group in groups), Totals())


def split(groups: Iterable[Group], column: str) -> Mapping[str, Totals]:
    """The totals by one of SPLITS, as text; most transactions first."""
    parts: dict[str, Totals] = {}
    for group in groups:
        key = str(getattr(group, column))
        parts[key] = parts.get(key, Totals()) + group.totals
    return dict(sorted(parts.items(), key=lambda part: (-part[1].transactions, part[0])))
