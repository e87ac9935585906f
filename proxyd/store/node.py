"""The name of this node: who owns which spool positions in a database that several nodes share.

Owns: the file `node.id` in `server.state_dir`: 16 hex digits and a line end, made once. Must not know: databases.
Invariants: the file is whole and on disk before its name is visible, so a kill leaves none or all of it; of two
processes that make it at once, both get the same; it goes with the spool, because the positions are about that.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from proxyd.store.schema import StoreError, StoreMisfit

NAME = "node.id"
_ID = re.compile(r"[0-9a-f]{16}")


def node_id(state_dir: str | Path) -> str:
    """16 hex digits, the same for ever. StoreMisfit: the file holds something else; StoreError: the disk fails."""
    path = Path(state_dir) / NAME
    try:
        if not path.exists():
            _make(path)
        text = path.read_text(errors="replace").strip()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; it names this node to the database") from error
    if not _ID.fullmatch(text):
        raise StoreMisfit(
            f"{path}: does not hold 16 hex digits; put the old ones back, or, when the spool beside it is empty,"
            " remove the file: a new one is made"
        )
    return text


def _make(path: Path) -> None:
    new = path.with_name(f".{NAME}.{os.urandom(4).hex()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(os.urandom(8).hex().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its name counts
            os.link(new, path)
    finally:
        os.unlink(new)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
