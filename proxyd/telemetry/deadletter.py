"""Rows that the store will never take, kept for a person to look at.

Owns: the dead-letter file, one JSON object a line: `row` and the store's `reason`. Must not know: why a row is refused.
Invariant: a row is on disk here before the transaction that passes it over is committed. Killed in between, it is
refused and appended again: the file may hold a row twice, the table never.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from proxyd.store.schema import Row
from proxyd.telemetry.segment import DEAD_LETTERS


def append_dead_letters(directory: Path, refused: Sequence[tuple[Row, str]]) -> None:
    """Appends and syncs. Raises OSError; then some may be there."""
    lines = b"".join(
        orjson.dumps({"row": {**row._asdict(), "user_id": str(row.user_id)}, "reason": reason}) + b"\n"
        for row, reason in refused
    )
    fd = os.open(directory / DEAD_LETTERS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        while lines:
            lines = lines[os.write(fd, lines) :]
        os.fsync(fd)
    finally:
        os.close(fd)
