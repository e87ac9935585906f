"""What the store holds, independent of the database: rows, cursors, batches, DDL, errors and the interface of a sink.

Owns: the column list of `sys_ai_transactions` (CONTRACT section 5), the two bookkeeping tables, and `Store`, the
interface that `sqlite.py` implements and every other database implements likewise. Must not know: spool files, event
loops, SQL drivers.
Invariants: `COLUMNS` is the order of `Row`; a batch is committed as one transaction or not at all.

  sys_ai_transactions    the rows, exactly the contract's columns
  sys_ai_spool_offsets   per spool stream: how far its records are in the table (segment, position, finished)
  sys_ai_spool_open      transactions begun in a segment that is gone and not yet ended: their records, carried
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

SCHEMA_VERSION = 1


class Row(NamedTuple):
    """A transaction. `created_at` is seconds since the epoch; the store keeps whole seconds, in UTC."""

    user_id: int
    model_id: int
    prompt_tokens: int
    completion_tokens: int
    created_at: float
    tenant: str
    request_id: str
    status: str
    estimated: int
    cached_tokens: int
    reasoning_tokens: int
    upstream: str
    attempts: int
    ttft_ms: int
    duration_ms: int


COLUMNS: tuple[str, ...] = Row._fields


class Cursor(NamedTuple):
    """How far a spool stream is stored: every record before `position` of `segment`, and all segments before it.

    `finished`: the stream's writer is dead and nothing of the stream remains to be stored; its files may be removed.
    """

    stream: str
    segment: int
    position: int
    finished: bool


class OpenTransaction(NamedTuple):
    """A transaction without an end whose segment is being removed: the payloads of its intent and last checkpoint."""

    stream: str
    txn: int
    intent: bytes
    checkpoint: bytes


@dataclass(slots=True)
class Batch:
    """What is stored together: rows, the cursors that cover them, and the open transactions to remember or to forget.

    `carried` is upserted, `closed` (stream, txn) deleted, and every trace of the streams in `forgotten` deleted; in
    this order.
    """

    rows: list[Row] = field(default_factory=list)
    cursors: dict[str, Cursor] = field(default_factory=dict)
    carried: list[OpenTransaction] = field(default_factory=list)
    closed: list[tuple[str, int]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)


class StoreError(Exception):
    """The store cannot take or give anything now; try later. A commit that raises it may or may not have happened."""


class StoreMissing(StoreError):
    """There is no store at the configured place yet."""


class StoreMisfit(StoreError):
    """The store exists and is not ours to use: another schema version, or somebody else's table under our name."""


# Called with the rows that the store refused for what they hold, and why, before the transaction commits; it must have
# them safe on disk when it returns. An exception from it undoes the transaction.
SetAside = Callable[[Sequence[tuple[Row, str]]], None]


class Store(Protocol):
    """A sink. Each call may raise `StoreError`; after one the owner calls `open` again before anything else."""

    async def open(self) -> None:
        """Connects, creates or checks the schema. Idempotent: an open connection is closed and replaced."""
        ...

    async def cursors(self) -> dict[str, Cursor]:
        """All recorded cursors, by stream."""
        ...

    async def open_transactions(self) -> list[OpenTransaction]:
        """All carried open transactions."""
        ...

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        """Stores the batch in one transaction and returns how many rows were refused and set aside."""
        ...

    async def holds(self, row: Row) -> bool:
        """True when a row with this row's user, second and request id is stored."""
        ...

    async def window_sum(self, user_id: int, since: float) -> int:
        """The founding query: the user's tokens in rows of `since` (seconds since the epoch) or later; from the index
        alone."""
        ...

    async def spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        """(second, tokens) of the first `limit` seconds, from `since` on, in which the user has rows; oldest first,
        from the index alone."""
        ...

    async def newest(self) -> float | None:
        """When the youngest row was created (seconds since the epoch); None without rows."""
        ...

    async def delete_older(self, cutoff: float, limit: int) -> int:
        """Deletes at most `limit` rows created before `cutoff` (seconds since the epoch); returns how many went."""
        ...

    async def close(self) -> None:
        """Disconnects. Idempotent."""
        ...


class Reader(Protocol):
    """A read-only view of the store, for commands and the quota's refresh; SQL uses `?` for parameters."""

    def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]: ...

    def timestamp(self, seconds: float) -> Any: ...

    def close(self) -> None: ...


def utc_text(seconds: float) -> str:
    """`YYYY-MM-DD HH:MM:SS` in UTC: what SQLite's `datetime()` gives, so that text comparison is time comparison."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d %H:%M:%S")


SQLITE_DDL: tuple[str, ...] = (
    """CREATE TABLE sys_ai_transactions (
  transaction_id INTEGER PRIMARY KEY AUTOINCREMENT,
  user_id BIGINT UNSIGNED NOT NULL,
  model_id SMALLINT UNSIGNED NOT NULL,
  prompt_tokens INT UNSIGNED NOT NULL,
  completion_tokens INT UNSIGNED NOT NULL,
  created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
  tenant VARCHAR(64) NOT NULL,
  request_id VARCHAR(64) NOT NULL,
  status VARCHAR(16) NOT NULL,
  estimated TINYINT NOT NULL,
  cached_tokens INT UNSIGNED NOT NULL,
  reasoning_tokens INT UNSIGNED NOT NULL,
  upstream VARCHAR(64) NOT NULL,
  attempts TINYINT NOT NULL,
  ttft_ms INT UNSIGNED NOT NULL,
  duration_ms INT UNSIGNED NOT NULL
)""",
    # Holds all that the rolling sum reads, so that it never touches the table.
    """CREATE INDEX idx_sys_ai_user_window
  ON sys_ai_transactions (user_id, created_at, prompt_tokens, completion_tokens)""",
    # Retention finds the oldest rows by it; without it each hourly pass would read the whole table.
    "CREATE INDEX idx_sys_ai_created ON sys_ai_transactions (created_at)",
    """CREATE TABLE sys_ai_spool_offsets (
  stream VARCHAR(64) PRIMARY KEY,
  segment INTEGER NOT NULL,
  position INTEGER NOT NULL,
  finished TINYINT NOT NULL
) WITHOUT ROWID""",
    """CREATE TABLE sys_ai_spool_open (
  stream VARCHAR(64) NOT NULL,
  txn INTEGER NOT NULL,
  intent BLOB NOT NULL,
  checkpoint BLOB NOT NULL,
  PRIMARY KEY (stream, txn)
) WITHOUT ROWID""",
)
