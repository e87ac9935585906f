"""The MySQL schema as a file, and created where it is missing: the work of `proxyd schema`.

Owns: one blocking connection. Must not know: the command's words, rows.
Invariants: applying again changes nothing; nothing that exists is altered; each statement stands alone, because DDL
commits by itself: whatever was cut off is completed by the next call.
"""

from __future__ import annotations

import contextlib

import pymysql

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_reader import connect, explained
from proxyd.store.schema import StoreError
from proxyd.store.schema_mysql import INSPECT, MYSQL_DDL, Finding, compare

_HEAD = """\
-- The tables of proxyd's telemetry store, for MariaDB 10.11 and MySQL 8: mysql DATABASE < this file.
-- `proxyd schema --apply` creates what is missing of them. What each is for: docs/accounting.md."""


def ddl_text() -> str:
    """All statements, as a file for the database's own client."""
    return "\n\n".join([_HEAD, *(f"{statement};" for statement in MYSQL_DDL)])


def inspect(address: MysqlAddress) -> list[Finding]:
    """How the live schema differs. Raises StoreError when the database cannot be reached."""
    with contextlib.closing(connect(address)) as connection:
        return _inspect(connection, address)


def apply(address: MysqlAddress) -> tuple[list[str], list[str]]:
    """Creates what is missing; what was created, and what is there and not as it should be, in words."""
    created: list[str] = []
    with contextlib.closing(connect(address, read_timeout=None)) as connection:
        for finding in _inspect(connection, address):
            if finding.statement is not None:
                _run(connection, address, finding.statement)
                created.append(finding.subject)
        return created, [str(finding) for finding in _inspect(connection, address)]


def _inspect(connection: pymysql.Connection, address: MysqlAddress) -> list[Finding]:
    tables, columns, indexes = (_run(connection, address, sql) for sql in INSPECT)
    return compare(tables, columns, indexes)


def _run(connection: pymysql.Connection, address: MysqlAddress, sql: str) -> list[tuple[object, ...]]:
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql)
            return list(cursor.fetchall())
    except (pymysql.Error, OSError) as error:
        raise StoreError(explained(address, error)) from error
