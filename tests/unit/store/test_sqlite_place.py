"""The database's file is taken away while it is open: no row goes where nobody sees it."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.store.schema import Batch, Cursor, StoreError
from proxyd.store.sqlite import SqliteStore
from tests.unit.store.test_sqlite import never, query, row


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry.db"


def batch(name: str, position: int = 1) -> Batch:
    return Batch(rows=[row(request_id=name)], cursors={"s": Cursor("s", 1, position, False)})


def names(path: Path) -> list[str]:
    return [name for (name,) in query(path, "SELECT request_id FROM sys_ai_transactions ORDER BY transaction_id")]


def remove(path: Path) -> None:
    for one in path.parent.glob(f"{path.name}*"):
        one.unlink()


def remove_alone(path: Path) -> None:
    path.unlink()


def rename(path: Path) -> None:
    path.rename(path.with_name("old.db"))


def remove_log(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def remove_index(path: Path) -> None:
    path.with_name(f"{path.name}-shm").unlink()


def lived(path: Path, body: Callable[[SqliteStore], Awaitable[Any]]) -> Any:
    async def life() -> Any:
        store = SqliteStore(path, "os")
        await store.open()
        await store.commit(batch("before"), never)
        try:
            return await body(store)
        finally:
            await store.close()

    return asyncio.run(life())


@pytest.mark.parametrize("take", [remove, remove_alone, rename])
def test_a_group_goes_to_a_new_file_once_its_own_is_gone(path: Path, take: Callable[[Path], None]) -> None:
    async def go_on(store: SqliteStore) -> None:
        take(path)
        with pytest.raises(StoreError, match=r"telemetry\.db was removed or replaced while in use"):
            await store.commit(batch("after", 2), never)
        await store.open()
        assert await store.cursors() == {}
        await store.commit(batch("after", 2), never)

    lived(path, go_on)
    assert names(path) == ["after"]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_renamed_file_keeps_all_that_was_stored_until_then(path: Path) -> None:
    async def go_on(store: SqliteStore) -> None:
        rename(path)
        with pytest.raises(StoreError, match="removed or replaced"):
            await store.window_sum(42, 0.0)
        await store.open()
        await store.commit(batch("after"), never)

    lived(path, go_on)
    assert names(path.with_name("old.db")) == ["before"]
    assert names(path) == ["after"]


@pytest.mark.parametrize("take", [remove_log, remove_index])
def test_a_log_that_was_removed_costs_no_row(path: Path, take: Callable[[Path], None]) -> None:
    async def go_on(store: SqliteStore) -> None:
        take(path)
        with pytest.raises(StoreError, match="removed or replaced"):
            await store.commit(batch("after"), never)
        await store.open()
        assert await store.holds(row(request_id="before"))
        await store.commit(batch("after"), never)

    lived(path, go_on)
    assert names(path) == ["before", "after"]


def test_a_copy_that_replaces_the_file_is_written_from_then_on(path: Path) -> None:
    copy = path.with_name("copy.db")

    async def go_on(store: SqliteStore) -> None:
        source, target = sqlite3.connect(path), sqlite3.connect(copy)
        source.backup(target)
        source.close()
        target.close()
        await store.commit(batch("between", 2), never)
        shutil.move(copy, path)
        with pytest.raises(StoreError, match="removed or replaced"):
            await store.commit(batch("after", 3), never)
        await store.open()
        assert await store.cursors() == {"s": Cursor("s", 1, 1, False)}
        await store.commit(batch("after", 3), never)

    lived(path, go_on)
    assert names(path) == ["before", "after"]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_commit_whose_file_goes_before_it_is_over_does_not_count(path: Path) -> None:
    async def go_on(store: SqliteStore) -> None:
        def take_it(refused: Any) -> None:
            remove(path)

        with pytest.raises(StoreError, match="removed or replaced"):
            await store.commit(Batch(rows=[row(user=2**64), row(request_id="after")]), take_it)
        await store.open()
        await store.commit(batch("after"), never)

    lived(path, go_on)
    assert names(path) == ["after"]


def test_closing_twice_is_closing_and_what_comes_then_is_told_so(path: Path) -> None:
    async def life() -> None:
        store = SqliteStore(path, "os")
        await store.open()
        await store.close()
        await store.close()
        with pytest.raises(StoreError, match="closed"):
            await store.cursors()

    asyncio.run(life())
