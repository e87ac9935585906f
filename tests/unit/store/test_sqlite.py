"""The SQLite sink: the contract's table, one transaction a batch, and plain words when it cannot."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.store.queries import WINDOW_SUM, window_tokens
from proxyd.store.schema import Batch, Cursor, OpenTransaction, Row, StoreError, StoreMisfit, StoreMissing, utc_text
from proxyd.store.sink import make_store, open_reader, sqlite_path
from proxyd.store.sqlite import SqliteReader, SqliteStore

NOW = 1_700_000_000.0
CONTRACT_COLUMNS = [
    *("transaction_id", "user_id", "model_id", "prompt_tokens", "completion_tokens", "created_at", "tenant"),
    *("request_id", "status", "estimated", "cached_tokens", "reasoning_tokens", "upstream", "attempts"),
    *("ttft_ms", "duration_ms"),
]


def row(user: int = 42, request_id: str = "r", created_at: float = NOW, **fields: Any) -> Row:
    return Row(user, 1, 10, 20, created_at, "acme", request_id, "completed", 0, 0, 0, "openai", 1, 3, 4)._replace(
        **fields
    )


def with_store(path: Path, body: Callable[[SqliteStore], Awaitable[Any]], durability: str = "os") -> Any:
    async def life() -> Any:
        store = SqliteStore(path, durability)
        try:
            await store.open()
            return await body(store)
        finally:
            await store.close()

    return asyncio.run(life())


def never(refused: Any) -> None:
    raise AssertionError(refused)


def put(path: Path, *rows: Row, **fields: Any) -> int:
    return with_store(path, lambda store: store.commit(Batch(rows=list(rows), **fields), never))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry.db"


def query(path: Path, sql: str, *params: Any) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(path)
    try:
        return database.execute(sql, params).fetchall()
    finally:
        database.close()


def test_the_table_has_exactly_the_contracts_columns(path: Path) -> None:
    put(path)
    assert [column[1] for column in query(path, "PRAGMA table_info(sys_ai_transactions)")] == CONTRACT_COLUMNS


def test_the_file_is_private_and_in_wal_mode(path: Path) -> None:
    put(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert query(path, "PRAGMA journal_mode") == [("wal",)]


def test_the_founding_query_runs_from_an_index_alone(path: Path) -> None:
    put(path, *(row(request_id=str(n)) for n in range(50)))
    sql = (
        "SELECT SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions"
        " WHERE user_id = 42 AND created_at >= datetime('now', '-1 day')"
    )
    for statement in (sql, WINDOW_SUM.replace("?", "'1'")):
        (plan,) = query(path, f"EXPLAIN QUERY PLAN {statement}")
        assert "USING COVERING INDEX idx_sys_ai_user_window" in plan[3]


def test_the_founding_query_sums_the_last_day_only(path: Path) -> None:
    now = time.time()
    put(path, row(created_at=now - 60), row(created_at=now - 90_000), row(user=7, created_at=now))
    sql = (
        "SELECT SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions"
        " WHERE user_id = ? AND created_at >= datetime('now', '-1 day')"
    )
    assert query(path, sql, 42) == [(30,)]


@pytest.mark.parametrize(("durability", "level"), [("row", 2), ("second", 2), ("os", 1)])
def test_the_store_is_never_less_durable_than_the_spool(path: Path, durability: str, level: int) -> None:
    async def ask(store: SqliteStore) -> Any:
        return store._live().execute("PRAGMA synchronous").fetchone()

    assert with_store(path, ask, durability) == (level,)


def test_rows_cursors_and_open_transactions_are_one_transaction(path: Path) -> None:
    carried = OpenTransaction("s", 1, b"i", b"c")
    put(path, row(), cursors={"s": Cursor("s", 1, 90, False)}, carried=[carried])

    async def read(store: SqliteStore) -> Any:
        return await store.cursors(), await store.open_transactions()

    assert with_store(path, read) == ({"s": Cursor("s", 1, 90, False)}, [carried])
    put(path, cursors={"s": Cursor("s", 2, 56, True)}, closed=[("s", 1)])
    assert with_store(path, read) == ({"s": Cursor("s", 2, 56, True)}, [])
    put(path, carried=[carried], forgotten=["s"])
    assert with_store(path, read) == ({}, [])


def test_a_refused_row_is_set_aside_before_the_rest_is_committed(path: Path) -> None:
    refused: list[Any] = []

    async def commit(store: SqliteStore) -> int:
        batch = Batch(rows=[row(request_id="a"), row(user=2**64, request_id="b"), row(request_id="c")])
        return await store.commit(batch, refused.extend)

    assert with_store(path, commit) == 1
    assert [entry[0].request_id for entry in refused] == ["b"]
    assert query(path, "SELECT request_id FROM sys_ai_transactions") == [("a",), ("c",)]


def test_a_row_that_cannot_be_set_aside_undoes_the_batch(path: Path) -> None:
    def full(refused: Any) -> None:
        raise OSError("no space")

    async def commit(store: SqliteStore) -> int:
        return await store.commit(Batch(rows=[row(), row(user=2**64)]), full)

    with pytest.raises(StoreError, match="no space"):
        with_store(path, commit)
    assert query(path, "SELECT COUNT(*) FROM sys_ai_transactions") == [(0,)]


def test_a_row_is_found_by_user_second_and_request(path: Path) -> None:
    put(path, row(created_at=NOW + 0.9))

    async def ask(store: SqliteStore) -> list[bool]:
        return [await store.holds(r) for r in (row(), row(user=1), row(request_id="x"), row(created_at=NOW + 1))]

    assert with_store(path, ask) == [True, False, False, False]


def test_retention_deletes_the_oldest_in_small_batches(path: Path) -> None:
    put(path, *(row(request_id=str(n), created_at=NOW - n) for n in range(10)))

    async def delete(store: SqliteStore) -> list[int]:
        return [await store.delete_older(NOW - 3, 4) for _ in range(3)]

    assert with_store(path, lambda store: store.newest()) == NOW
    assert with_store(path, delete) == [4, 2, 0]
    assert query(path, "SELECT MIN(created_at), COUNT(*) FROM sys_ai_transactions") == [(utc_text(NOW - 3), 4)]


def test_a_store_without_rows_has_no_newest(path: Path) -> None:
    assert with_store(path, lambda store: store.newest()) is None


def test_another_schema_version_is_refused_in_words(path: Path) -> None:
    put(path)
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(StoreMisfit, match="schema version 99"):
        put(path)
    with pytest.raises(StoreMisfit, match="schema version 99"):
        SqliteReader(path)


def test_somebody_elses_table_under_our_name_is_refused(path: Path) -> None:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE sys_ai_transactions (x)")
    database.close()
    with pytest.raises(StoreMisfit, match="sys_ai_transactions"):
        put(path)


def test_a_missing_directory_and_a_broken_file_are_plain_errors(path: Path) -> None:
    with pytest.raises(StoreError, match="no such directory"):
        put(path.parent / "nowhere" / "t.db")
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        put(path)


def test_a_reader_sees_committed_rows_while_the_writer_has_the_file_open(path: Path) -> None:
    async def read(store: SqliteStore) -> int:
        reader = SqliteReader(path)
        before = window_tokens(reader, 42, NOW - 1)
        await store.commit(Batch(rows=[row()]), never)
        after = window_tokens(reader, 42, NOW - 1)
        reader.close()
        return after - before

    assert with_store(path, read) == 30


def test_a_reader_cannot_write(path: Path) -> None:
    put(path)
    reader = SqliteReader(path)
    with pytest.raises(StoreError, match="readonly"):
        reader.fetch("DELETE FROM sys_ai_transactions")
    reader.close()


def test_no_store_yet_is_said_so(path: Path) -> None:
    with pytest.raises(StoreMissing):
        open_reader(f"sqlite:///{path}")
    path.touch()
    with pytest.raises(StoreMissing):
        open_reader(f"sqlite:///{path}")


@pytest.mark.parametrize(
    ("sink", "path"), [("sqlite:////var/lib/x.db", "/var/lib/x.db"), ("sqlite:///x%20y.db", "x y.db")]
)
def test_sink_urls_name_files(sink: str, path: str) -> None:
    assert sqlite_path(sink) == Path(path)


@pytest.mark.parametrize("sink", ["postgres://user:hunter2@host/db", "sqlite://", "sqlite://host/x", "x", ""])
def test_other_sinks_are_refused_without_repeating_a_password(sink: str) -> None:
    with pytest.raises(StoreError) as caught:
        make_store(sink, "row")
    assert "hunter2" not in str(caught.value)
