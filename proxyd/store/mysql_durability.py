"""Settings of a MySQL or MariaDB server with which committed rows may be lost, and what may be.

Owns: which settings and values those are, for the daemon's log and for `--probe`. Must not know: who asks, rows.
proxyd removes its own copy of a row once the commit is answered, so what the server loses then is gone.
Sources: mariadb.com/kb (innodb_flush_log_at_trx_commit, sync_binlog), dev.mysql.com/doc/refman/8.0 (the same).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pymysql

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_reader import explained
from proxyd.store.schema import StoreError

LOSES: Mapping[str, Mapping[int, str]] = {
    "innodb_flush_log_at_trx_commit": {
        0: "up to a second of stored rows when the server process or its machine dies",
        2: "up to a second of stored rows when the server's machine dies",
    },
    "sync_binlog": {0: "replicas and backups by binlog may miss rows when the server's machine dies"},
}

Ask = Callable[[str], list[tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a server says of itself."""

    version: str
    values: Mapping[str, int]
    has_binlog: bool
    binlog_format: str

    @property
    def is_statement_binlog(self) -> bool:
        """Then it refuses every row at the isolation level that we write at."""
        return self.has_binlog and self.binlog_format.upper() == "STATEMENT"

    def losses(self) -> Iterator[tuple[str, int, str]]:
        """(setting, value, what may be lost) of each that is not safe."""
        for name, losses in LOSES.items():
            value = self.values[name]
            if value in losses and (name != "sync_binlog" or self.has_binlog):
                yield name, value, losses[value]


def read(ask: Ask) -> Facts:
    """Raises what `ask` raises."""
    names = tuple(LOSES)
    ((version, has_binlog, form, *values),) = ask(
        f"SELECT @@version, @@log_bin, @@binlog_format, {', '.join(f'@@{name}' for name in names)}"
    )
    return Facts(str(version), dict(zip(names, map(int, values), strict=True)), bool(has_binlog), str(form))


def asker(connection: pymysql.Connection, address: MysqlAddress) -> Ask:
    """Runs one statement; StoreError, in words, when it fails."""

    def ask(sql: str) -> list[tuple[Any, ...]]:
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql)
                return list(cursor.fetchall())
        except (pymysql.Error, OSError) as error:
            raise StoreError(explained(address, error)) from error

    return ask
