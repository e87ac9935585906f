"""The SQLite sink: one file, WAL mode, one writing connection in one thread.

Owns: the connection, its pragmas, the schema's creation and check, SQL in SQLite's dialect. Must not know: spool
files, metrics.
Invariants: a `Batch` is one IMMEDIATE transaction; the file is created with mode 0600; nothing here blocks an event
loop (each call runs in the store's own thread, at most `BUSY_TIMEOUT_S` longer than the disk takes); what was committed
is in the file that the path names.

A file that was removed, renamed or replaced under us is still open, and would take rows that nobody ever sees. So each
call first looks whether the path still names it, and a commit looks again behind itself; if not, that is a StoreError,
and the next `open` takes or makes the file that is at the path now. The old one gets all that its WAL holds.

User ids are unsigned, SQLite's integers are signed: an id from 2^63 on is stored as itself - 2^64.

Durability: spool segments are removed once their rows are committed here, so the store must never be weaker than the
spool.
  row, second   synchronous=FULL: one sync of the WAL a commit, at most 1/linger a second, in this thread
  os            synchronous=NORMAL: power loss may undo the last commits and never damages the file; OFF could damage
                it, and saves nothing that NORMAL does not
Source: sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous (read for 3.40).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from proxyd.store.queries import WINDOW_SUM
from proxyd.store.schema import (
    COLUMNS,
    SCHEMA_VERSION,
    SQLITE_DDL,
    Batch,
    Cursor,
    OpenTransaction,
    Row,
    SetAside,
    StoreError,
    StoreMisfit,
    StoreMissing,
    utc_text,
)

T = TypeVar("T")

# How long SQLite itself waits for another process's write lock. Ten times more would hold a shutdown past its deadline;
# ten times less turns every backup into retries and log lines.
BUSY_TIMEOUT_S = 1.0
_SYNCHRONOUS = {"row": "FULL", "second": "FULL", "os": "NORMAL"}
# "proxd" in ASCII, cut to 32 bits: marks the file as ours for file(1) and for the check below.
APPLICATION_ID = 0x70786400
# S608: the names are constants of this package; values are always parameters.
_INSERT = f"INSERT INTO sys_ai_transactions ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"  # noqa: S608
_FILES = ("", "-wal", "-shm")  # what we have open for as long as the connection is
_CREATED_AT = COLUMNS.index("created_at")
# From idx_sys_ai_user_window alone, and in its order, so that LIMIT ends the reading.
_SPENDS = (
    "SELECT CAST(strftime('%s', created_at) AS INTEGER), SUM(prompt_tokens + completion_tokens)"
    " FROM sys_ai_transactions WHERE user_id = ? AND created_at >= ? GROUP BY created_at ORDER BY created_at LIMIT ?"
)
# What SQLite or its binding says about one row's values, as opposed to the database's state.
_ROW_FAULTS = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.InterfaceError, OverflowError, ValueError)


def _values(row: Row) -> tuple[Any, ...]:
    """The row as SQLite takes it: the user signed, the time as UTC text."""
    return (_signed(row.user_id), *row[1:_CREATED_AT], utc_text(row.created_at), *row[_CREATED_AT + 1 :])


def _signed(user_id: int) -> int:
    """The user's id as it is stored. Raises OverflowError for what would be taken for another user's."""
    if not 0 <= user_id < 2**64:
        raise OverflowError(f"user id {user_id} is no unsigned integer of 64 bits")
    return user_id if user_id < 2**63 else user_id - 2**64


def _parameter(value: Any) -> Any:
    """Nothing but a user's id is ever that large."""
    return _signed(value) if isinstance(value, int) and value >= 2**63 else value


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file the path names now; None when it names none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _sync_directory(path: Path) -> None:
    """Puts the names in it on disk. A directory that we may write and not read cannot be opened for it."""
    with contextlib.suppress(PermissionError):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class SqliteStore:
    """The writing side; implements `schema.Store`. One task uses it at a time."""

    __slots__ = ("_connection", "_identity", "_is_closed", "_path", "_synchronous", "_thread")

    def __init__(self, path: Path, durability: str) -> None:
        self._path = path
        self._synchronous = _SYNCHRONOUS[durability]
        self._connection: sqlite3.Connection | None = None
        self._identity: list[tuple[int, int] | None] = []  # of _FILES
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, "store")

    async def open(self) -> None:
        await self._run(self._open)

    async def cursors(self) -> dict[str, Cursor]:
        return await self._run(self._cursors)

    async def open_transactions(self) -> list[OpenTransaction]:
        return await self._run(self._open_transactions)

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        return await self._run(lambda: self._commit(batch, set_aside))

    async def holds(self, row: Row) -> bool:
        return await self._run(lambda: self._holds(row))

    async def window_sum(self, user_id: int, since: float) -> int:
        return await self._run(lambda: self._window_sum(user_id, since))

    async def spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        return await self._run(lambda: self._spends(user_id, since, limit))

    async def delete_older(self, cutoff: float, limit: int) -> int:
        return await self._run(lambda: self._delete_older(cutoff, limit))

    async def newest(self) -> float | None:
        return await self._run(self._newest)

    async def close(self) -> None:
        if self._is_closed:
            return
        try:
            await self._run(self._close)
        finally:
            self._is_closed = True
            self._thread.shutdown(wait=False)

    async def _run(self, work: Callable[[], T]) -> T:
        """Runs in the store's thread; every driver error becomes a StoreError that names the file."""

        if self._is_closed:
            raise StoreError(f"{self._path}: closed")

        def guarded() -> T:
            try:
                return work()
            except sqlite3.Error as error:
                raise StoreError(f"{self._path}: {error}") from error
            except OSError as error:
                raise StoreError(str(error)) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, guarded)

    def _open(self) -> None:
        self._close()
        if not self._path.parent.is_dir():
            raise StoreError(
                f"{self._path.parent}: no such directory; create it for the user that runs proxyd,"
                " or change telemetry.sink"
            )
        # Created by us first, so that the mode does not depend on the umask; WAL and shm files copy it.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        made = _identity(self._path)
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=32
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            _ensure_schema(connection, self._path)
            # A new file is on disk only with its name; rows in it let go of the spool.
            _sync_directory(self._path.parent)
            identity = [_identity(Path(f"{self._path}{suffix}")) for suffix in _FILES]
            if identity[0] != made:
                raise StoreError(f"{self._path} was replaced while it was opened")
        except BaseException:
            connection.close()
            raise
        self._connection, self._identity = connection, identity

    def _live(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreError(f"{self._path}: not open")
        self._check_place()
        return self._connection

    def _check_place(self) -> None:
        """Raises StoreError when the path no longer names what is open."""
        for suffix, known in zip(_FILES, self._identity, strict=True):
            path = Path(f"{self._path}{suffix}")
            if _identity(path) != known:
                raise StoreError(
                    f"{path} was removed or replaced while in use; rows go to the file that is there now,"
                    " those stored before are in the old one only"
                )

    def _cursors(self) -> dict[str, Cursor]:
        found = self._live().execute("SELECT stream, segment, position, finished FROM sys_ai_spool_offsets")
        return {stream: Cursor(stream, segment, position, bool(end)) for stream, segment, position, end in found}

    def _open_transactions(self) -> list[OpenTransaction]:
        found = self._live().execute("SELECT stream, txn, intent, checkpoint FROM sys_ai_spool_open")
        return [OpenTransaction(*columns) for columns in found]

    def _commit(self, batch: Batch, set_aside: SetAside) -> int:
        connection = self._live()
        refused: list[tuple[Row, str]] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            try:
                # One prepared statement stepped for each row: in SQLite this is what a multi-row INSERT is elsewhere.
                connection.execute("SAVEPOINT together")
                connection.executemany(_INSERT, map(_values, batch.rows))
            except _ROW_FAULTS:
                connection.execute("ROLLBACK TO together")
                refused = _insert_singly(connection, batch.rows)
                set_aside(refused)
            _write_bookkeeping(connection, batch)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._check_place()
        return len(refused)

    def _holds(self, row: Row) -> bool:
        found = self._live().execute(
            "SELECT 1 FROM sys_ai_transactions WHERE user_id = ? AND created_at = ? AND request_id = ? LIMIT 1",
            (_signed(row.user_id), utc_text(row.created_at), row.request_id),
        )
        return found.fetchone() is not None

    def _window_sum(self, user_id: int, since: float) -> int:
        return int(self._live().execute(WINDOW_SUM, (_signed(user_id), utc_text(since))).fetchone()[0] or 0)

    def _spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        found = self._live().execute(_SPENDS, (_signed(user_id), utc_text(since), limit))
        return [(float(second), int(tokens)) for second, tokens in found]

    def _delete_older(self, cutoff: float, limit: int) -> int:
        return (
            self._live()
            .execute(
                "DELETE FROM sys_ai_transactions WHERE transaction_id IN"
                " (SELECT transaction_id FROM sys_ai_transactions WHERE created_at < ? ORDER BY created_at LIMIT ?)",
                (utc_text(cutoff), limit),
            )
            .rowcount
        )

    def _newest(self) -> float | None:
        found = self._live().execute("SELECT CAST(strftime('%s', MAX(created_at)) AS INTEGER) FROM sys_ai_transactions")
        (second,) = found.fetchone()
        return None if second is None else float(second)

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if _identity(self._path) == self._identity[0]:
            connection.close()
            return
        # Moved away: its WAL is merged into it here, or the file of that name at the path would be taken for the next
        # file's WAL, and what it holds be lost to this one.
        with contextlib.suppress(sqlite3.Error):
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
        for suffix, known in zip(_FILES[1:], self._identity[1:], strict=True):
            path = Path(f"{self._path}{suffix}")
            if known is not None and _identity(path) == known:
                path.unlink(missing_ok=True)


class SqliteReader:
    """The reading side; implements `schema.Reader`, in any process, whether the daemon runs or not. Blocking."""

    __slots__ = ("_connection", "_path")

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise StoreMissing(f"{path}: no telemetry store there yet")
        self._path = path
        try:
            self._connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
            self._check(path)
        except sqlite3.Error as error:
            is_other = getattr(error, "sqlite_errorcode", 0) in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
            raise (StoreMisfit if is_other else StoreError)(f"{path}: {error}") from error

    def _check(self, path: Path) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            _refuse_foreign(self._connection, path)
            raise StoreMissing(f"{path}: holds no telemetry yet")
        _check_version(version, path)

    def fetch(self, sql: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            return self._connection.execute(sql, [_parameter(value) for value in params]).fetchall()
        except (sqlite3.Error, OverflowError) as error:
            raise StoreError(f"{self._path}: {error}") from error

    def timestamp(self, seconds: float) -> str:
        return utc_text(seconds)

    def close(self) -> None:
        self._connection.close()


def _insert_singly(connection: sqlite3.Connection, rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Inserts what can be inserted; returns the rest with the reason."""
    refused: list[tuple[Row, str]] = []
    for row in rows:
        try:
            connection.execute(_INSERT, _values(row))
        except _ROW_FAULTS as error:
            refused.append((row, f"{type(error).__name__}: {error}"))
    return refused


def _write_bookkeeping(connection: sqlite3.Connection, batch: Batch) -> None:
    """Cursors and open transactions, inside the caller's transaction."""
    connection.executemany("INSERT OR REPLACE INTO sys_ai_spool_offsets VALUES (?, ?, ?, ?)", batch.cursors.values())
    connection.executemany("INSERT OR REPLACE INTO sys_ai_spool_open VALUES (?, ?, ?, ?)", batch.carried)
    connection.executemany("DELETE FROM sys_ai_spool_open WHERE stream = ? AND txn = ?", batch.closed)
    for table in ("sys_ai_spool_open", "sys_ai_spool_offsets"):
        connection.executemany(f"DELETE FROM {table} WHERE stream = ?", [(name,) for name in batch.forgotten])  # noqa: S608


def _ensure_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Creates the tables in an empty database; refuses one of another version or with other tables under our names."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            _refuse_foreign(connection, path)
            for statement in SQLITE_DDL:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        _check_version(version or SCHEMA_VERSION, path)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """For a file without our version: nothing in it may have one of our names."""
    taken = connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'sys_ai_%'").fetchone()
    if taken is not None:
        raise StoreMisfit(
            f"{path}: has a table {taken[0]} that proxyd did not make; name another file in telemetry.sink"
        )


def _check_version(version: int, path: Path) -> None:
    if version != SCHEMA_VERSION:
        raise StoreMisfit(
            f"{path}: schema version {version}, this proxyd knows {SCHEMA_VERSION};"
            " use the proxyd that wrote it, or another file"
        )
