"""The store's tables as text, and made where they are missing: what `proxyd schema` does.

Owns: what SQLite's schema is compared by, and that nothing which exists is altered. Must not know: the command, rows.
Invariants: applying again changes nothing; a store of another version, or with somebody else's tables under our names,
is refused as the daemon refuses it; all calls block.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from proxyd.config.secrets import Secret
from proxyd.config.sink import is_mysql
from proxyd.store.schema import SCHEMA_VERSION, SQLITE_DDL, StoreError, StoreMisfit
from proxyd.store.sink import mysql_address, sqlite_path
from proxyd.store.sqlite import APPLICATION_ID

# How long another process's write lock is waited for; the daemon holds it for milliseconds.
_BUSY_TIMEOUT_S = 10.0
_SQLITE_HEAD = """\
-- The tables of proxyd's telemetry store, for SQLite 3: sqlite3 telemetry.db < this file.
-- The daemon makes them itself when it starts. What each is for: docs/accounting.md."""


class Applied(NamedTuple):
    """What was created, and what is there and is not as proxyd would have made it; each in words."""

    created: list[str]
    differing: list[str]


def ddl(sink: str) -> str:
    """The statements that make the sink's tables, as a file for the database's own client."""
    if is_mysql(sink):
        return str(_mysql().ddl_text())
    marks = (f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {SCHEMA_VERSION}")
    statements = ("BEGIN", *SQLITE_DDL, *marks, "COMMIT")
    return "\n".join([_SQLITE_HEAD, *(f"{statement};" for statement in statements)])


def apply(sink: str, password: Secret | None = None) -> Applied:
    """Creates what is missing. Raises StoreError when the store cannot be reached, StoreMisfit when it is not ours."""
    if is_mysql(sink):
        applied: Applied = Applied(*_mysql().apply(mysql_address(sink, password)))
        return applied
    path = sqlite_path(sink)
    try:
        return _apply_sqlite(path)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from error
    except OSError as error:
        message = f"{path}: {error.strerror}: ask as the daemon's user (this is uid {os.geteuid()}): sudo -u proxyd ..."
        raise StoreError(message) from error


def _mysql() -> Any:
    return importlib.import_module("proxyd.store.mysql_apply")


def _apply_sqlite(path: Path) -> Applied:
    if not path.parent.is_dir():
        raise StoreError(
            f"{path.parent}: no such directory; create it for the user that runs proxyd, or change telemetry.sink"
        )
    if path.is_dir():
        raise StoreError(f"{path}: is a directory; name a file in it with telemetry.sink")
    applied = Applied([], [])
    with contextlib.suppress(FileExistsError):
        # Created by us first, so that the mode does not depend on the umask; WAL and shm files copy it.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        applied.created.append(f"file {path} (mode 0600)")
    with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("BEGIN IMMEDIATE")
        _refuse_foreign(database, path)
        for kind, name, sql in _wanted():
            found = database.execute("SELECT type FROM sqlite_master WHERE name = ?", (name,)).fetchone()
            if found is None:
                database.execute(sql)
                applied.created.append(f"{kind} {name}")
            else:
                applied.differing.extend(_differences(database, kind, name))
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    return applied


def _refuse_foreign(database: sqlite3.Connection, path: Path) -> None:
    version = database.execute("PRAGMA user_version").fetchone()[0]
    taken = database.execute("SELECT name FROM sqlite_master WHERE name LIKE 'sys_ai_%'").fetchone()
    if version == 0 and taken is not None:
        raise StoreMisfit(
            f"{path}: has a table {taken[0]} that proxyd did not make; name another file in telemetry.sink"
        )
    if version not in (0, SCHEMA_VERSION):
        raise StoreMisfit(
            f"{path}: schema version {version}, this proxyd knows {SCHEMA_VERSION};"
            " use the proxyd that wrote it, or another file"
        )


def missing_and_differing(database: sqlite3.Connection, path: Path) -> tuple[list[str], list[str]]:
    """What a store that is only read lacks, and what is otherwise than it should be. Raises StoreMisfit when it is not
    ours."""
    _refuse_foreign(database, path)
    missing: list[str] = []
    differing: list[str] = []
    for kind, name, _ in _wanted():
        if database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (name,)).fetchone() is None:
            missing.append(f"{kind} {name}")
        else:
            differing.extend(_differences(database, kind, name))
    return missing, differing


def _model() -> sqlite3.Connection:
    """An empty store in memory: what the file is compared with."""
    model = sqlite3.connect(":memory:")
    for statement in SQLITE_DDL:
        model.execute(statement)
    return model


def _wanted() -> Iterator[tuple[str, str, str]]:
    """(table or index, name, statement), tables before their indexes."""
    with contextlib.closing(_model()) as model:
        for kind in ("table", "index"):
            yield from model.execute(
                "SELECT type, name, sql FROM sqlite_master"
                " WHERE type = ? AND sql IS NOT NULL AND name NOT LIKE 'sqlite_%' ORDER BY rowid",
                (kind,),
            )


def _differences(database: sqlite3.Connection, kind: str, name: str) -> Iterator[str]:
    with contextlib.closing(_model()) as model:
        wanted, found = _columns(model, kind, name), _columns(database, kind, name)
    if kind == "index":
        if list(found) != list(wanted):
            yield f"index {name} is on ({', '.join(found)}), not on ({', '.join(wanted)})"
        return
    for column, meaning in wanted.items():
        if column not in found:
            yield f"table {name} has no column {column} {meaning}"
        elif found[column] != meaning:
            yield f"column {name}.{column} is {found[column]}, not {meaning}"
    for column in found.keys() - wanted.keys():
        yield f"table {name} has a column {column} that proxyd does not know"


def _columns(database: sqlite3.Connection, kind: str, name: str) -> dict[str, str]:
    """Column name to what it holds, in the order of the table or index."""
    if kind == "index":
        return {column: "" for _, _, column in database.execute("SELECT * FROM pragma_index_info(?)", (name,))}
    found = database.execute("SELECT name, type, \"notnull\", pk FROM pragma_table_info(?)", (name,))
    return {
        column: " ".join([kind.upper(), *(["NOT NULL"] if needed else []), *([f"(key {key})"] if key else [])])
        for column, kind, needed, key in found
    }
