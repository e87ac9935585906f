"""A look at the telemetry store for `proxyd --check-config --probe`: is it there, is it ours, would rows survive.

Owns: what is asked of each kind of store, and in which words it is told. Must not know: the command, findings' form.
Invariants: nothing is written, created or locked. An SQLite file beside which there is no -wal is opened as immutable,
because a reader of a WAL database makes files of its own otherwise; one with a -wal is in use or was cut off, and is
read only where its -shm is there, too. Every wait is bounded by `seconds`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sqlite3
from pathlib import Path
from typing import Any, NamedTuple

from proxyd.config.secrets import Secret
from proxyd.config.sink import is_mysql
from proxyd.store.apply import missing_and_differing
from proxyd.store.schema import StoreError
from proxyd.store.sink import mysql_address, sqlite_path

_APPLY = "run `proxyd schema --apply`"


class Trouble(NamedTuple):
    """`is_error`: rows would wait in the spool until it is mended. `live` and `wanted`: of a server's setting."""

    is_error: bool
    message: str
    remedy: str
    live: str = ""
    wanted: str = ""


class Look(NamedTuple):
    """`words`: what the store is, in a line; "" when it could not be looked at."""

    words: str
    troubles: list[Trouble]


def look(sink: str, password: Secret | None, seconds: float, commits: str) -> Look:
    """`commits`: how many there are, in words, for what durability costs. Errors are troubles; nothing is raised."""
    if is_mysql(sink):
        try:
            return _mysql(mysql_address(sink, password), seconds, commits)
        except StoreError as error:
            return Look("", [Trouble(True, str(error), "rows wait in the spool until it can be used")])
    try:
        return _sqlite(sqlite_path(sink), seconds)
    except StoreError as error:
        return Look("", [Trouble(True, str(error), "rows wait in the spool until it can be used")])
    except (sqlite3.Error, OSError) as error:
        return Look("", [Trouble(True, f"{sqlite_path(sink)}: {error}", "see docs/running.md, `store_failed`")])


def _mysql(address: Any, seconds: float, commits: str) -> Look:
    # Imported where a sink names MySQL, and not before (store/sink).
    durability, reader, schema = (
        importlib.import_module(f"proxyd.store.{name}") for name in ("mysql_durability", "mysql_reader", "schema_mysql")
    )
    with contextlib.closing(reader.connect(address, read_timeout=seconds)) as connection:
        if address.ssl_ca and not connection._secure:
            raise StoreError(f"{address}: the server offers no TLS, and ssl_ca asks for it")
        ask = durability.asker(connection, address)
        found = schema.compare(*(ask(sql) for sql in schema.INSPECT))
        facts = durability.read(ask)
    troubles = [
        Trouble(
            one.stops,
            f"{address}: {one}" + ("" if one.stops else ": sums and retention read the whole table"),
            _APPLY if one.statement is not None else "change it by hand, or name another database",
        )
        for one in found
    ]
    if facts.is_statement_binlog:
        message = f"{address}: binlog_format is STATEMENT, wanted ROW: the server refuses every row"
        troubles.append(Trouble(True, message, "SET GLOBAL binlog_format = 'ROW' (conf/mysql)", "STATEMENT", "ROW"))
    for name, value, losses in facts.losses():
        message = (
            f"{address}: {name} is {value}, wanted 1: it may lose {losses}; 1 costs a flush of the disk for each"
            f" commit, {commits}"
        )
        remedy = f"SET GLOBAL {name} = 1 (for good: conf/mysql/60-proxyd.cnf), or accept it"
        troubles.append(Trouble(False, message, remedy, str(value), "1"))
    return Look(f"{address}: {facts.version}" + ("" if found else ", the schema is complete"), troubles)


def _sqlite(path: Path, seconds: float) -> Look:
    if not path.exists():
        return Look(f"{path}: not there yet, the daemon makes it", [])
    if not os.access(path, os.R_OK):
        remedy = "check as root or as the daemon's user"
        return Look("", [Trouble(False, f"{path} may not be read by this user (uid {os.geteuid()})", remedy)])
    has_wal, has_shm = (os.path.exists(f"{path}-{name}") for name in ("wal", "shm"))
    if has_wal and not has_shm:
        return Look(f"{path}: its -wal is of a daemon that was cut off; the next start reads it", [])
    mode = "mode=ro" if has_wal else "mode=ro&immutable=1"
    uri = f"{path.resolve().as_uri()}?{mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)) as database:
        if path.stat().st_size == 0:
            return Look(f"{path}: empty, the daemon makes its tables", [])
        missing, differing = missing_and_differing(database, path)
        if len(missing) and not differing and database.execute("PRAGMA user_version").fetchone()[0] == 0:
            return Look(f"{path}: has none of our tables yet, the daemon makes them", [])
    troubles = [Trouble(True, f"{path}: {one} is missing", _APPLY) for one in missing]
    troubles += [Trouble(True, f"{path}: {one}", "name another file, or move this one away") for one in differing]
    return Look(f"{path}: SQLite" + ("" if troubles else ", the schema is complete"), troubles)
