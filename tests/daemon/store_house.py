"""A store of either kind, open, for the tests of what both promise: SQLite in a file, MySQL on a real server.

Owns: how a test gets a store and looks behind its back. Must not know: what is promised.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyd.store.mysql import Bounds, MysqlReader, MysqlStore
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_apply import apply
from proxyd.store.node import Owner
from proxyd.store.schema import Reader, Row, Store
from proxyd.store.sqlite import SqliteReader, SqliteStore
from tests.daemon.mariadb import Database

NOW = 1_700_000_000.0
NODE = "00112233445566aa"
# Short, so that a test of a deadline takes a second; long enough for a busy machine in all others.
PATIENT = Bounds(connect=30.0, answer=60.0, lock=30, idle=40.0, server_wait=60)
HASTY = Bounds(connect=2.0, answer=2.0, lock=1, idle=40.0, server_wait=60)


class Log:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, /, **fields: Any) -> None:
        self.lines.append((event, fields))

    info = error = warning


@dataclass
class SetAside:
    """Collects what is set aside."""

    rows: list[tuple[Row, str]] = field(default_factory=list)

    def __call__(self, refused: Sequence[tuple[Row, str]]) -> None:
        self.rows.extend(refused)

    @property
    def ids(self) -> list[str]:
        return [row.request_id for row, _ in self.rows]


def never(refused: Any) -> None:
    raise AssertionError(refused)


def row(request_id: str = "r", user: int = 42, created_at: float = NOW, **fields: Any) -> Row:
    plain = Row(user, 1, 10, 20, created_at, "acme", request_id, "completed", 0, 0, 0, "openai", 1, 3, 4)
    return plain._replace(**fields)


def rows(count: int, prefix: str = "r") -> list[Row]:
    return [row(f"{prefix}{number}") for number in range(count)]


@dataclass
class House:
    """One kind of store, made anew as often as a test likes, and its tables seen from outside."""

    kind: str
    path: Path
    database: Database | None = None

    def make(
        self,
        node: str = NODE,
        bounds: Bounds = PATIENT,
        log: Log | None = None,
        port: int | None = None,
        owner: Owner | None = None,
    ) -> Store:
        if self.database is None:
            return SqliteStore(self.path, "os")
        return MysqlStore(self.address(port), node, log, bounds, owner)

    def address(self, port: int | None = None) -> MysqlAddress:
        assert self.database is not None
        return MysqlAddress.parse(self.database.url(port=port))

    @contextlib.asynccontextmanager
    async def open(self, **arguments: Any) -> AsyncIterator[Any]:
        store = self.make(**arguments)
        try:
            await store.open()
            yield store
        finally:
            await store.close()

    def reader(self) -> Reader:
        return SqliteReader(self.path) if self.database is None else MysqlReader(self.address())

    def query(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        if self.database is not None:
            return self.database.query(sql.replace("?", "%s"), *params)
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            return database.execute(sql, params).fetchall()

    def stored(self) -> list[str]:
        """The request ids of all rows, in the order in which they were stored."""
        found = self.query("SELECT request_id FROM sys_ai_transactions ORDER BY transaction_id")
        return [request_id for (request_id,) in found]


def mysql_house(database: Database, folder: Path) -> House:
    """With the schema applied."""
    house = House("mysql", folder / "unused.db", database)
    apply(house.address())
    return house
