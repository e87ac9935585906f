"""From `telemetry.sink` to the store behind it.

Owns: the meaning of the sink URL. Must not know: what is stored.
Invariant: aiomysql and PyMySQL are imported when a sink names MySQL, and not before: a node with SQLite, and each of
its workers, does without them.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from proxyd.config.secrets import Secret
from proxyd.config.sink import is_mysql
from proxyd.store.schema import Reader, Store, StoreError
from proxyd.store.sqlite import SqliteReader, SqliteStore


def make_store(
    sink: str, durability: str, *, password: Secret | None = None, node: str = "", log: Any = None, owner: Any = None
) -> Store:
    """The writing side of the sink, not yet open. `password`: of `telemetry.password_file`; `node`: whose spool
    positions these are, for a database that many nodes share; `owner`: its node.Owner.

    Raises StoreError for a URL that names no database we speak to.
    """
    if is_mysql(sink):
        store: Store = _module("mysql").MysqlStore(mysql_address(sink, password), node, log, owner=owner)
        return store
    return SqliteStore(sqlite_path(sink), durability)


def open_reader(sink: str, password: Secret | None = None) -> Reader:
    """The reading side, open. Raises StoreMissing when nothing was ever stored, StoreError otherwise."""
    if is_mysql(sink):
        reader: Reader = _module("mysql_reader").MysqlReader(mysql_address(sink, password))
        return reader
    return SqliteReader(sqlite_path(sink))


def load(sink: str) -> None:
    """Imports what a process that writes or reads there will need. Raises what a broken module raises."""
    if is_mysql(sink):
        for name in ("mysql", "mysql_reader"):
            _module(name)


def mysql_address(sink: str, password: Secret | None) -> Any:
    """The `MysqlAddress` of a mysql:// sink."""
    return _module("mysql_address").MysqlAddress.parse(sink, password)


def _module(name: str) -> Any:
    return importlib.import_module(f"proxyd.store.{name}")


def sqlite_path(sink: str) -> Path:
    """The file of `sqlite:////absolute/path` or `sqlite:///relative/path`."""
    parts = urlsplit(sink)
    if parts.scheme != "sqlite":
        # The URL may hold a password: only its scheme is named.
        raise StoreError(
            f"telemetry.sink: {parts.scheme or 'no scheme'}: write sqlite:////path/file.db or mysql://user@host/database"
        )
    path = unquote(parts.path)[1:]
    if parts.netloc or not path:
        raise StoreError(
            "telemetry.sink: write sqlite:////absolute/path (four slashes) or sqlite:///relative/path (three)"
        )
    return Path(path)
