"""From `telemetry.sink` to the store behind it.

Owns: the meaning of the sink URL. Must not know: what is stored.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from proxyd.store.schema import Reader, Store, StoreError
from proxyd.store.sqlite import SqliteReader, SqliteStore


def make_store(sink: str, durability: str) -> Store:
    """The writing side of the sink, not yet open. Raises StoreError for a URL that names no database we speak to."""
    return SqliteStore(sqlite_path(sink), durability)


def open_reader(sink: str) -> Reader:
    """The reading side, open. Raises StoreMissing when nothing was ever stored, StoreError otherwise."""
    return SqliteReader(sqlite_path(sink))


def sqlite_path(sink: str) -> Path:
    """The file of `sqlite:////absolute/path` or `sqlite:///relative/path`."""
    parts = urlsplit(sink)
    if parts.scheme != "sqlite":
        # The URL may hold a password: only its scheme is named.
        raise StoreError(
            f"telemetry.sink: {parts.scheme or 'no scheme'}: this version stores in sqlite:////path/file.db only"
        )
    path = unquote(parts.path)[1:]
    if parts.netloc or not path:
        raise StoreError(
            "telemetry.sink: write sqlite:////absolute/path (four slashes) or sqlite:///relative/path (three)"
        )
    return Path(path)
