"""The questions asked of the stored rows.

Owns: their SQL, written for SQLite and MySQL alike (`?` parameters, the reader's own timestamp form). Must not know:
connections.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyd.store.schema import Reader

# The rolling sum of the contract; it must run from idx_sys_ai_user_window alone (a test asks the planner).
WINDOW_SUM = (
    "SELECT SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ?"
)

_TOTALS = (
    "COUNT(*), COALESCE(SUM(prompt_tokens), 0), COALESCE(SUM(completion_tokens), 0),"
    " COALESCE(SUM(CASE WHEN estimated <> 0 THEN prompt_tokens + completion_tokens ELSE 0 END), 0)"
)
_BY = ("status", "model_id", "tenant", "upstream")


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of some set of rows. `estimated_tokens` is the part of `total_tokens` that no provider reported."""

    transactions: int
    prompt_tokens: int
    completion_tokens: int
    estimated_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def estimated_share(self) -> float:
        """0.0 to 1.0 of the tokens; 0.0 when there are none."""
        return self.estimated_tokens / self.total_tokens if self.total_tokens else 0.0


def window_tokens(reader: Reader, user_id: int, since: float) -> int:
    """A user's tokens since a moment (seconds since the epoch), 0 for an unknown user."""
    return int(reader.fetch(WINDOW_SUM, (user_id, reader.timestamp(since)))[0][0] or 0)


def usage(reader: Reader, user_id: int, since: float) -> Totals:
    """A user's totals since a moment."""
    sql = f"SELECT {_TOTALS} FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ?"  # noqa: S608
    return Totals(*map(int, reader.fetch(sql, (user_id, reader.timestamp(since)))[0]))


def usage_by(reader: Reader, column: str, user_id: int, since: float) -> dict[str, Totals]:
    """The same, split by `status`, `model_id`, `tenant` or `upstream`; most transactions first."""
    if column not in _BY:
        raise ValueError(f"usage cannot be split by {column!r}")
    sql = (
        f"SELECT {column}, {_TOTALS} FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ?"  # noqa: S608
        f" GROUP BY {column} ORDER BY COUNT(*) DESC, {column}"
    )
    found = reader.fetch(sql, (user_id, reader.timestamp(since)))
    return {str(name): Totals(*map(int, counts)) for name, *counts in found}
