"""What the quota reads of SQLite: the founding query and the seconds of a window, from the index alone."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.store.queries import WINDOW_SUM, Asked, total, usage, user_totals, window_tokens
from proxyd.store.schema import Batch, Row, StoreError
from proxyd.store.sqlite import _SPENDS, SqliteReader, SqliteStore

NOW = 1_700_000_000


def row(user: int, second: int, tokens: int) -> Row:
    return Row(user, 1, tokens, 1, second + 0.7, "acme", "r", "completed", 0, 0, 0, "openai", 1, 3, 4)


def asked(path: Path, rows: list[Row], question: Callable[[SqliteStore], Awaitable[Any]]) -> Any:
    async def life() -> Any:
        store = SqliteStore(path, "os")
        await store.open()
        try:
            await store.commit(Batch(rows=rows), lambda refused: None)
            return await question(store)
        finally:
            await store.close()

    return asyncio.run(life())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "telemetry.db"


ROWS = [row(7, NOW + n // 2, 10) for n in range(8)] + [row(8, NOW, 99)]


@pytest.mark.parametrize("since, total", [(NOW, 88), (NOW + 0.9, 88), (NOW + 1, 66), (NOW + 3.5, 22), (NOW + 4, 0)])
def test_the_sum_is_of_whole_seconds_from_the_one_that_is_named(path: Path, since: float, total: int) -> None:
    assert asked(path, ROWS, lambda store: store.window_sum(7, since)) == total


def test_spends_are_seconds_oldest_first_and_no_more_than_asked_for(path: Path) -> None:
    found = asked(path, ROWS[::-1], lambda store: store.spends(7, NOW + 1, 2))
    assert found == [(NOW + 1.0, 22), (NOW + 2.0, 22)]
    assert all(type(second) is float for second, _ in found)


def test_a_user_without_rows_has_spent_nothing(path: Path) -> None:
    for user in (9, 2**63, 2**64 - 1):
        assert asked(path, ROWS, lambda store, user=user: store.window_sum(user, 0.0)) == 0
        assert asked(path, ROWS, lambda store, user=user: store.spends(user, 0.0, 5)) == []


@pytest.mark.parametrize("user", [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1])
def test_a_user_of_any_64_bits_is_billed_and_nobody_else_for_it(path: Path, user: int) -> None:
    rows = [row(one, NOW, 10 + one % 7) for one in (0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1)]
    spent = 11 + user % 7

    async def ask(store: SqliteStore) -> tuple[int, list[tuple[float, int]], bool]:
        (mine,) = [one for one in rows if one.user_id == user]
        return await store.window_sum(user, 0), await store.spends(user, 0, 5), await store.holds(mine)

    assert asked(path, rows, ask) == (spent, [(float(NOW), spent)], True)
    reader = SqliteReader(path)
    assert window_tokens(reader, user, 0) == user_totals(reader, user, 0).total_tokens == spent
    assert total(usage(reader, Asked(0, user))).total_tokens == spent
    assert reader.fetch("SELECT COUNT(*) FROM sys_ai_transactions WHERE printf('%u', user_id) = ?", (str(user),)) == [
        (1,)
    ]
    with pytest.raises(StoreError, match="64 bits"):
        reader.fetch("SELECT ?", (2**64,))
    reader.close()


def test_both_run_from_the_index_alone_and_in_its_order(path: Path) -> None:
    asked(path, [row(user, NOW + n, 1) for user in range(20) for n in range(20)], lambda store: store.window_sum(1, 0))
    database = sqlite3.connect(path)
    for statement, params in ((WINDOW_SUM, (7, "2023")), (_SPENDS, (7, "2023", 10))):
        plan = [step[3] for step in database.execute(f"EXPLAIN QUERY PLAN {statement}", params)]
        assert plan == [
            "SEARCH sys_ai_transactions USING COVERING INDEX idx_sys_ai_user_window (user_id=? AND created_at>?)"
        ]
    database.close()


def test_a_store_that_is_not_open_says_so(path: Path) -> None:
    async def life() -> None:
        store = SqliteStore(path, "os")
        with pytest.raises(StoreError, match="not open"):
            await store.window_sum(7, 0.0)
        with pytest.raises(StoreError, match="not open"):
            await store.spends(7, 0.0, 5)
        await store.close()

    asyncio.run(life())
