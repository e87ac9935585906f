"""Dead letters that are given to the store once more: files that are read like streams.

Owns: requeue-<16 hex>.jsonl, their reading, what becomes of lines that are no rows. Must not know: when a group is due.

`proxyd spool --retry` renames dead-letter.jsonl to such a name; nothing else is needed, for a rename is whole or not
there. The telemetry process reads the file from its cursor: stream `requeue-<16 hex>`, segment 1, position in bytes.

Exactly once:
1. A file's rows and its cursor are committed in one transaction, as a stream's are (writer.py, 1 to 3). At its end the
   cursor is `finished`; then the file goes, the directory is synced, and only then the cursor (writer.py, 5).
2. The file does not change once it is read. It is renamed from under an append at worst, and appends happen while the
   telemetry process, the only one, waits for its commit: it reads the directory between commits, and opens the
   dead-letter file by its name anew for each append.
3. A kill between a dead letter's append and its commit leaves the letter and, in the spool, the record that it was
   made of. So a letter tells the cursor of its commit, and waits until its stream has come that far or has ended: by
   then the record has been read (again), and its row was stored, or refused into a new letter, or is in this group.
4. So before a row is given to the store, it is looked up there and in its group by user, second and request id; what is
   there is passed over, told, and kept in requeue-<16 hex>.jsonl.skipped: a client may send one request id twice in a
   second, and the table cannot tell the two. Letters of one group are told apart by all their columns.
5. A row that is refused again becomes a dead letter again, in the same commit that moves the cursor behind it.
Bounds: REQUEUE_ROWS a group, one file at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxyd.store.schema import Cursor, Row, Store
from proxyd.telemetry.deadletter import MAX_LINE_BYTES, DeadLetter, append_letters, append_lines, parse_line
from proxyd.telemetry.reader import Phase, Stream
from proxyd.telemetry.segment import BAD_SUFFIX, REQUEUE_SUFFIX, SKIPPED_SUFFIX
from proxyd.telemetry.spoolio import SpoolLog

# One look-up each, between two groups of everybody else: ten times more would delay those by a fifth of a second.
REQUEUE_ROWS = 100
_READ_BYTES = 4 * MAX_LINE_BYTES
_NAME = re.compile(r"requeue-[0-9a-f]{16}")


def is_requeue(stream: str) -> bool:
    """True for a stream name that is such a file's."""
    return _NAME.fullmatch(stream) is not None


def new_requeue_path(directory: Path) -> Path:
    """A name that no file has."""
    return directory / f"requeue-{os.urandom(8).hex()}{REQUEUE_SUFFIX}"


@dataclass(slots=True)
class Taken:
    """What one look took: rows, and lines that are none."""

    rows: list[Row] = field(default_factory=list)
    bad: list[tuple[bytes, str]] = field(default_factory=list)


@dataclass(slots=True)
class Requeue:
    """One file. `position` is the start of a line; everything before it has been handed out once."""

    directory: Path
    name: str
    position: int = 0
    is_ended: bool = False

    @property
    def path(self) -> Path:
        return self.directory / (self.name + REQUEUE_SUFFIX)

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.name, 1, self.position, self.is_ended)

    @property
    def skipped_path(self) -> Path:
        return self.path.with_name(self.path.name + SKIPPED_SUFFIX)

    def keep_passed_over(self, rows: Sequence[Row]) -> None:
        """Rows that are not given to the store; on disk before their commit, so after a kill they may be there twice.
        Raises OSError."""
        if rows:
            append_letters(self.skipped_path, [DeadLetter(row, "passed over: stored already", None) for row in rows])

    def left_bytes(self) -> int:
        """Bytes that are not read yet."""
        try:
            return max(0, self.path.stat().st_size - self.position)
        except OSError:
            return 0

    def take(self, is_settled: Callable[[Cursor], bool], log: SpoolLog, limit: int) -> list[Row] | None:
        """At most `limit` rows; None when nothing moved. Raises OSError, and then nothing has moved.

        Lines that are no rows are on disk beside the file when this returns. `is_settled`: the commit that a letter
        tells of has happened, or cannot happen any more.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.is_ended = True  # somebody took it away: nothing is left of it but its cursor
            return []
        try:
            taken, position, is_end = self._read(fd, is_settled, limit)
        finally:
            os.close(fd)
        if position == self.position and not is_end:
            return None
        if taken.bad:
            bad_path = self.path.with_name(self.path.name + BAD_SUFFIX)
            append_lines(bad_path, b"".join(line + b"\n" for line, _ in taken.bad))
            log.error("requeue_lines_bad", lines=len(taken.bad), reason=taken.bad[0][1], file=str(bad_path))
        self.position, self.is_ended = position, is_end
        return taken.rows

    def _read(self, fd: int, is_settled: Callable[[Cursor], bool], limit: int) -> tuple[Taken, int, bool]:
        taken, position = Taken(), self.position
        data = os.pread(fd, _READ_BYTES, position)
        is_last = position + len(data) >= os.fstat(fd).st_size
        start = 0
        while start < len(data) and len(taken.rows) + len(taken.bad) < limit:
            end = data.find(b"\n", start)
            if end < 0 and not is_last and start:
                break  # the rest of the line comes with the next read
            line, behind = (data[start:end], end + 1) if end >= 0 else (data[start:], len(data))
            if line.strip():
                try:
                    letter = parse_line(line)
                except ValueError as error:
                    taken.bad.append((line, str(error)))
                else:
                    if letter.origin is not None and not is_settled(letter.origin):
                        break
                    taken.rows.append(letter.row)
            start = behind
        return taken, position + start, is_last and start >= len(data)


def is_past(streams: Mapping[str, Stream], requeues: Mapping[str, Requeue], origin: Cursor) -> bool:
    """True when what was before the cursor `origin` has been read, or will never be."""
    requeue = requeues.get(origin.stream)
    if requeue is not None:
        return requeue.is_ended or requeue.position >= origin.position
    stream = streams.get(origin.stream)
    if stream is None or stream.phase is Phase.ENDED:
        return True
    return not origin.finished and (stream.sequence, stream.position) >= (origin.segment, origin.position)


async def is_held(store: Store, row: Row) -> bool:
    """True when the row is stored. A value that the store cannot even be asked for is not."""
    try:
        return await store.holds(row)
    except (OverflowError, ValueError):
        return False


def identity(row: Row) -> tuple[int, int, str]:
    """What tells a row from another, as the store tells it."""
    return row.user_id, int(row.created_at), row.request_id
