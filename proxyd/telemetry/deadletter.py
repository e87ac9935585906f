"""Rows that the store will never take, kept for a person to look at, and to be given to the store once more.

Owns: the dead-letter file, one JSON object a line, its writing, its reading and its count. Must not know: why a row is
refused.
  row     the columns; `user_id` as text, for a JavaScript reader would round it
  reason  the store's words
  from    [stream, segment, position, finished]: the cursor whose commit passed the row over. Until the store has that
          cursor the same row comes again out of the stream (requeue.py)
Invariants:
- A row is on disk here before the transaction that passes it over is committed. Killed in between, it is refused and
  appended again: the file may hold a row twice, the table never.
- An append that fails leaves the file as it was, or at worst a torn line that the next append ends.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from proxyd.store.schema import COLUMNS, Cursor, Row
from proxyd.telemetry.segment import DEAD_LETTERS

# A line of ours has under 2 KiB; what is longer was not written by us.
MAX_LINE_BYTES = 64 * 1024
# One read when lines are counted; and how much of a file that grew is counted at once.
_READ_BYTES = 1024 * 1024
_COUNTED_AT_ONCE = 8 * _READ_BYTES
_TEXTS = frozenset({"tenant", "request_id", "status", "upstream"})
_END_OF_TIME = 253402300800.0  # the year 10000, which no store has


class DeadLetter(NamedTuple):
    """One line. `origin` is None where nobody knows it: written by hand, or by an older version."""

    row: Row
    reason: str
    origin: Cursor | None


def append_dead_letters(directory: Path, letters: Sequence[DeadLetter]) -> None:
    """Appends and syncs. Raises OSError; then none of them is there, if the disk lets us take them back."""
    append_letters(directory / DEAD_LETTERS, letters)


def append_letters(path: Path, letters: Sequence[DeadLetter]) -> None:
    """The same, to a file of any name."""
    append_lines(path, b"".join(map(_line, letters)))


def append_lines(path: Path, lines: bytes) -> None:
    """Appends whole lines and syncs; begins with a line end where the file has a torn line."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[os.write(fd, lines) :]
            os.fsync(fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def parse_line(line: bytes) -> DeadLetter:
    """A line of the file. Raises ValueError that says what is wrong with it."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise ValueError("not JSON") from None
    columns = document.get("row") if isinstance(document, dict) else None
    if not isinstance(columns, dict):
        raise ValueError("no object `row`")
    if columns.keys() != set(COLUMNS):
        wrong = sorted(columns.keys() ^ set(COLUMNS))
        raise ValueError(f"`row` has not the columns of the table: {', '.join(wrong)[:200]}")
    reason = document.get("reason")
    values: list[Any] = [_value(name, columns[name]) for name in COLUMNS]
    return DeadLetter(Row(*values), reason if isinstance(reason, str) else "", _origin(document.get("from")))


def newest_first(path: Path, limit: int) -> Iterator[bytes]:
    """The last `limit` lines, the newest first; nothing when there is no such file. Reads no more than they need."""
    try:
        with path.open("rb") as file:
            position, rest, given = file.seek(0, os.SEEK_END), b"", 0
            while position and given < limit:
                size = min(_READ_BYTES, position)
                position -= size
                file.seek(position)
                lines = (file.read(size) + rest).split(b"\n")
                rest = lines[0] if len(lines[0]) <= MAX_LINE_BYTES else b""
                for line in reversed(lines[1:] if position else lines):
                    if line and given < limit:
                        given += 1
                        yield line
    except FileNotFoundError:
        return


class LineCount:
    """How many lines a file has that is only appended to: counts what is new since the last call."""

    __slots__ = ("_counted", "_inode", "_lines", "_path")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._counted = self._lines = 0

    def count(self) -> int:
        """0 without a file. Of a file that grew by very much, what was counted until now."""
        try:
            found = self._path.stat()
            if found.st_ino != self._inode or found.st_size < self._counted:
                self._inode, self._counted, self._lines = found.st_ino, 0, 0
            if found.st_size > self._counted:
                self._count_more()
        except OSError:
            self._inode = self._counted = self._lines = 0
        return self._lines

    def count_all(self) -> int:
        """The same to the end of the file, a last line without its end included: what it takes, for a command."""
        lines, before = self.count(), -1
        while self._counted != before:
            before, lines = self._counted, self.count()
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            file.seek(max(0, self._counted - 1))
            lines += file.read(1) not in (b"", b"\n")
        return lines

    def _count_more(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._counted)
            left = _COUNTED_AT_ONCE
            while left > 0 and (data := file.read(_READ_BYTES)):
                self._lines += data.count(b"\n")
                self._counted += len(data)
                left -= len(data)


def _line(letter: DeadLetter) -> bytes:
    document: dict[str, Any] = {"row": {**letter.row._asdict(), "user_id": str(letter.row.user_id)}}
    document["reason"] = letter.reason
    if letter.origin is not None:
        document["from"] = list(letter.origin)
    return orjson.dumps(document) + b"\n"


def _value(name: str, value: object) -> object:
    """A column's value as a Row has it. Raises ValueError."""
    if name == "user_id" and isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        return int(value)
    if name in _TEXTS:
        if isinstance(value, str):
            return value
    elif name == "created_at":
        if type(value) in (int, float) and math.isfinite(value) and 0 <= value < _END_OF_TIME:  # type: ignore[arg-type,operator]
            return value
    elif type(value) is int and value >= 0:
        return value
    raise ValueError(f"`{name}` cannot be {repr(value)[:80]}")


def _origin(found: object) -> Cursor | None:
    """What `from` says; None for anything else than we write there."""
    match found:
        case [str(stream), int(segment), int(position), bool(finished)]:
            return Cursor(stream, segment, position, finished)
    return None
