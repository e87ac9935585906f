"""The questions asked of the rows, of SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxyd.store.queries import USER_TOTALS, WINDOW_SUM, Asked, Totals, split, total, usage, user_totals
from proxyd.store.sqlite import SqliteReader
from tests.unit.store.test_sqlite import NOW, put, row


@pytest.fixture
def reader(tmp_path: Path) -> SqliteReader:
    put(
        tmp_path / "t.db",
        row(),
        row(status="interrupted", estimated=1, completion_tokens=50),
        row(model_id=2, tenant="b"),
        row(user=7),
        row(created_at=NOW - 100),
    )
    return SqliteReader(tmp_path / "t.db")


def test_groups_are_summed_and_split(reader: SqliteReader) -> None:
    groups = usage(reader, Asked(NOW, 42))
    everything = total(groups)
    assert (everything.transactions, everything.prompt_tokens, everything.completion_tokens) == (3, 30, 90)
    assert (everything.total_tokens, everything.estimated_share) == (120, 0.5)
    by_status = {key: part.transactions for key, part in split(groups, "status").items()}
    assert by_status == {"completed": 2, "interrupted": 1}
    assert list(split(groups, "model_id")) == ["1", "2"]
    assert total(usage(reader, Asked(NOW, 999))) == Totals()
    assert total(usage(reader, Asked(NOW, tenant="acme"))).transactions == 3
    assert total(usage(reader, Asked(NOW, model_id=2, tenant="acme"))).transactions == 0
    assert total(usage(reader, Asked(0.0))).transactions == 5


def test_the_index_alone_tells_the_same_of_a_user(reader: SqliteReader) -> None:
    for since in (0.0, NOW - 100, NOW, NOW + 1):
        summed = total(usage(reader, Asked(since, 42)))
        assert user_totals(reader, 42, since) == Totals(*[*vars_of(summed)[:3], 0])


def vars_of(totals: Totals) -> list[int]:
    return [totals.transactions, totals.prompt_tokens, totals.completion_tokens, totals.estimated_tokens]


@pytest.mark.parametrize("sql", [WINDOW_SUM, USER_TOTALS])
def test_a_users_totals_read_the_index_alone(reader: SqliteReader, sql: str) -> None:
    plan = reader.fetch(f"EXPLAIN QUERY PLAN {sql}", (42, reader.timestamp(NOW)))
    assert ["USING COVERING INDEX idx_sys_ai_user_window" in line[3] for line in plan] == [True]


def test_values_are_parameters(reader: SqliteReader) -> None:
    assert usage(reader, Asked(NOW, tenant="' OR 1=1 --")) == []
