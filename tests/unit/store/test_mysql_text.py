"""Batches as SQL text, and whose fault an error is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pymysql.converters import escape_string

from proxyd.store.mysql_faults import Blame, SqlFault, blame
from proxyd.store.mysql_text import bookkeeping, inserts, row_texts
from proxyd.store.schema import Batch, Cursor, OpenTransaction, Row

ROW = Row(7, 1, 10, 20, 1_700_000_000.9, "it's", "r", "completed", 0, 1, 2, "o\\", 1, 3, 4)
LARGE = 1 << 20


def test_a_row_is_quoted_and_its_time_is_utc() -> None:
    ((_, text),), refused = row_texts([ROW], escape_string)
    assert text == rb"(7,1,10,20,'2023-11-14 22:13:20','it\'s','r','completed',0,1,2,'o\\',1,3,4)"
    assert refused == []


def test_a_row_without_text_is_refused_and_the_others_keep_their_order() -> None:
    bad: list[Any] = [
        ROW._replace(tenant="\ud800"),
        ROW._replace(created_at=float("inf")),
        ROW._replace(created_at=1e300),
        ROW._replace(status=None),
        ROW._replace(user_id="7"),
    ]
    good = [ROW._replace(request_id=str(number)) for number in range(len(bad))]
    mixed = [one for pair in zip(good, bad, strict=True) for one in pair]
    texts, refused = row_texts(mixed, escape_string)
    assert [row for row, _ in texts] == good
    assert [row for row, _ in refused] == bad
    assert all("has no SQL text" in reason for _, reason in refused)


def test_a_group_is_one_statement() -> None:
    texts, _ = row_texts([ROW] * 1000, escape_string)
    (statement,) = inserts((text for _, text in texts), LARGE)
    assert statement.startswith(b"INSERT INTO sys_ai_transactions (user_id, model_id,")
    assert statement.count(b"completed") == 1000


@pytest.mark.parametrize("limit", [1024, 1500, 5000])
def test_a_statement_is_split_only_where_it_had_to_be_longer_than_allowed(limit: int) -> None:
    texts, _ = row_texts([ROW._replace(request_id=str(number)) for number in range(100)], escape_string)
    statements = list(inserts((text for _, text in texts), limit))
    assert all(len(statement) <= limit for statement in statements)
    assert all(len(one) + len(texts[0][1]) > limit - 8 for one in statements[:-1])
    assert re.findall(rb"'(\d+)','completed'", b"".join(statements)) == [b"%d" % number for number in range(100)]


def test_no_rows_and_nothing_to_keep_are_no_statement() -> None:
    assert list(inserts([], LARGE)) == []
    assert list(bookkeeping(Batch(), "n", escape_string, LARGE)) == []


def test_each_kind_of_bookkeeping_is_one_statement_in_its_order() -> None:
    batch = Batch(
        cursors={name: Cursor(name, 1, 2, True) for name in ("a'", "b")},
        carried=[OpenTransaction("a", 1, b"\0'", b""), OpenTransaction("b", 2, b"x", b"y")],
        closed=[("a", 1), ("b", 3), ("a", 2)],
        forgotten=["a", "b"],
    )
    assert list(bookkeeping(batch, "n", escape_string, LARGE)) == [
        rb"INSERT INTO sys_ai_spool_offsets (node, stream, segment, position, finished) VALUES"
        rb" ('n','a\'',1,2,1),('n','b',1,2,1)"
        rb" ON DUPLICATE KEY UPDATE segment = VALUES(segment), position = VALUES(position),"
        rb" finished = VALUES(finished)",
        b"INSERT INTO sys_ai_spool_open (node, stream, txn, intent, checkpoint) VALUES"
        b" ('n','a',1,X'0027',X''),('n','b',2,X'78',X'79')"
        b" ON DUPLICATE KEY UPDATE intent = VALUES(intent), checkpoint = VALUES(checkpoint)",
        b"DELETE FROM sys_ai_spool_open WHERE node = 'n' AND stream = 'a' AND txn IN (1,2)",
        b"DELETE FROM sys_ai_spool_open WHERE node = 'n' AND stream = 'b' AND txn IN (3)",
        b"DELETE FROM sys_ai_spool_open WHERE node = 'n' AND stream IN ('a','b')",
        b"DELETE FROM sys_ai_spool_offsets WHERE node = 'n' AND stream IN ('a','b')",
    ]


@pytest.mark.parametrize("number", [1048, 1264, 1292, 1366, 1406, 1452, 1644, 3819, 4025])
def test_values_are_the_rows_fault(number: int) -> None:
    assert blame(number, "") is Blame.ROWS


@pytest.mark.parametrize(
    "number",
    [0, 1021, 1040, 1053, 1054, 1114, 1142, 1146, 1205, 1213, 1290, 1317, 1364, 1526, 1927, 2006, 2013, 2999, 3024],
)
def test_locks_space_rights_schema_and_the_network_are_the_servers(number: int) -> None:
    assert blame(number, "") is Blame.SERVER


def test_a_number_nobody_knows_is_unknown() -> None:
    assert blame(5999, "") is Blame.UNKNOWN


@pytest.mark.parametrize("key", ["'PRIMARY'", "'sys_ai_transactions.PRIMARY'"])
def test_a_number_that_the_server_gave_twice_is_its_own_fault(key: str) -> None:
    assert blame(1062, f"Duplicate entry '9' for key {key}") is Blame.SERVER
    assert blame(1062, "Duplicate entry 'r' for key 'once'") is Blame.ROWS


@pytest.mark.parametrize(
    ("number", "is_lost"), [(2013, True), (2006, True), (1927, True), (1205, False), (1146, False)]
)
def test_a_lost_session_is_told_from_a_refused_statement(number: int, is_lost: bool) -> None:
    assert SqlFault("m", number, "t").is_lost is is_lost
