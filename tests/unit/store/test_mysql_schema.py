"""The comparison of MySQL schemas, in the words of MariaDB and of MySQL 8."""

from __future__ import annotations

from typing import Any

import pytest

from proxyd.store.schema import COLUMNS
from proxyd.store.schema_mysql import MYSQL_DDL, TABLES, TRANSACTIONS, compare

MARIADB = {"bigint unsigned": "bigint(20) unsigned", "int unsigned": "int(10) unsigned", "tinyint": "tinyint(4)"}


def live(words: dict[str, str] | None = None) -> tuple[list[Any], list[Any], list[Any]]:
    """What a server that has exactly our schema answers."""
    tables: list[Any] = [(table.name, "BASE TABLE", "InnoDB") for table in TABLES]
    columns: list[Any] = []
    indexes: list[Any] = []
    for table in TABLES:
        for one in table.columns:
            kind = (words or {}).get(one.kind, one.kind)
            charset = "utf8mb4" if "VARCHAR" in one.type else None
            extra = "auto_increment" if "AUTO_INCREMENT" in one.more else ""
            columns.append((table.name, one.name, kind, "NO", None, charset, extra))
        indexes += [(table.name, name, column) for name, keys in table.indexes.items() for column in keys]
    return tables, columns, indexes


@pytest.mark.parametrize("words", [None, MARIADB])
def test_our_own_schema_has_no_findings(words: dict[str, str] | None) -> None:
    assert compare(*live(words)) == []


def test_types_may_come_as_bytes() -> None:
    tables, columns, indexes = live()
    assert compare(tables, [(*c[:2], c[2].encode(), *c[3:6], c[6].encode()) for c in columns], indexes) == []


def test_nothing_there_is_every_table_missing_with_its_statement() -> None:
    findings = compare([], [], [])
    assert [str(finding) for finding in findings] == [f"table {table.name} is missing" for table in TABLES]
    assert tuple(finding.statement for finding in findings) == MYSQL_DDL


def test_missing_columns_are_one_statement_with_what_old_rows_get() -> None:
    tables, columns, indexes = live()
    kept = [column for column in columns if column[1] not in ("tenant", "attempts")]
    (finding,) = compare(tables, kept, indexes)
    assert finding.statement == (
        "ALTER TABLE sys_ai_transactions ADD COLUMN tenant VARCHAR(64)"
        " CHARACTER SET utf8mb4 COLLATE utf8mb4_unicode_ci NOT NULL DEFAULT 'default',"
        " ADD COLUMN attempts TINYINT NOT NULL DEFAULT 1"
    )
    assert finding.stops


def test_a_missing_column_of_the_founding_table_is_left_to_a_person() -> None:
    tables, columns, indexes = live()
    kept = [column for column in columns if column[1] not in ("user_id", "tenant")]
    findings = compare(tables, kept, indexes)
    assert len(findings) == 2
    assert all(finding.statement is None and finding.stops for finding in findings)


def test_a_missing_index_does_not_stop_and_has_its_statement() -> None:
    tables, columns, indexes = live()
    (finding,) = compare(tables, columns, [key for key in indexes if key[1] != "idx_sys_ai_created"])
    assert not finding.stops
    assert finding.statement == "CREATE INDEX idx_sys_ai_created ON sys_ai_transactions (created_at)"


def test_an_index_of_our_name_on_other_columns_is_named_and_one_with_more_columns_is_fine() -> None:
    tables, columns, indexes = live()
    more = [*indexes, ("sys_ai_transactions", "idx_sys_ai_created", "user_id")]
    assert compare(tables, columns, more) == []
    other = [(t, n, "user_id" if n == "idx_sys_ai_created" else c) for t, n, c in indexes]
    (finding,) = compare(tables, columns, other)
    assert (finding.statement, finding.stops) == (None, False)
    assert str(finding) == "index idx_sys_ai_created is on (user_id), not on (created_at)"


@pytest.mark.parametrize(
    ("column", "kind", "is_fine"),
    [
        ("user_id", "bigint(20)", False),
        ("model_id", "smallint", False),
        ("model_id", "mediumint", True),
        ("prompt_tokens", "bigint", True),
        ("prompt_tokens", "decimal(20,0)", False),
        ("estimated", "tinyint(1)", True),
        ("created_at", "timestamp(6)", True),
        ("created_at", "datetime", False),
        ("tenant", "varchar(63)", False),
        ("tenant", "varchar(255)", True),
        ("tenant", "text", False),
        ("status", "char(16)", True),
        ("status", "enum('completed')", False),
    ],
)
def test_a_column_must_have_room_for_all_that_is_written(column: str, kind: str, is_fine: bool) -> None:
    tables, columns, indexes = live()
    changed = [(*one[:2], kind, *one[3:]) if one[1] == column else one for one in columns]
    findings = compare(tables, changed, indexes)
    assert [finding.statement for finding in findings] == ([] if is_fine else [None])


def test_the_rows_columns_are_those_of_the_contract() -> None:
    assert tuple(column.name for column in TRANSACTIONS.columns) == ("transaction_id", *COLUMNS)
