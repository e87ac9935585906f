"""From what the store remembers and what lies on disk to streams that go on exactly where they were.

Owns: the first look at a stream, and the removal of files. Must not know: batches, metrics, when to look.
Invariants:
- A stream resumes at its stored cursor; its open transactions are the store's carried ones and those that the segment
  under the cursor begins before it. Reading that part again hands out no final.
- A file goes only after the cursor behind it was committed, and the cursor's row only after the file's removal is on
  disk. So a file without a cursor was never consumed, a segment before its stream's cursor is stale, and a missing one
  is normal.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from proxyd.store.schema import Cursor, OpenTransaction
from proxyd.telemetry.reader import Open, Stream
from proxyd.telemetry.record import Kind
from proxyd.telemetry.segment import DAMAGED_SUFFIX, HEADER_BYTES, NEW_PREFIX, segment_name


def adopt(
    directory: Path, name: str, sequences: Sequence[int], cursor: Cursor | None, carried: Iterable[OpenTransaction]
) -> Stream | None:
    """The stream at its place. None when none of its files has a readable header and the store knows nothing of it.

    A stream that the store knows and whose files are gone still comes back: its carried transactions need their end.
    """
    stream = Stream(directory, name)
    for known in carried:
        stream.open[known.txn] = Open(known.intent, known.checkpoint, True)
    if cursor is None:
        return stream if any(stream.enter(sequence, None) for sequence in sequences) else None
    if cursor.segment in sequences and stream.enter(cursor.segment, None):
        _replay(stream, cursor.position)
        return stream
    for sequence in sequences:
        if sequence > cursor.segment and stream.enter(
            sequence, cursor.position if sequence == cursor.segment + 1 else None
        ):
            return stream
    stream.sequence, stream.position, stream.is_short = cursor.segment, cursor.position, True
    return stream


def _replay(stream: Stream, position: int) -> None:
    """Rebuilds the open transactions from what was consumed before, up to `position`."""
    while stream.position < position:
        frame = stream.next_frame()
        if frame is None:
            break
        stream.apply(frame)
        if frame.kind == Kind.FINAL:
            stream.end_transaction(frame.txn)
    # Only a power loss takes back bytes that were read once.
    stream.is_short = stream.position < position
    stream.position = position


def remove_segments(directory: Path, stream: str, sequences: Iterable[int], damaged: Iterable[int] = ()) -> None:
    """Removes consumed segments; the damaged ones are set aside under another name instead.

    Durable only after sync_directory: needed before a stream's cursor goes, for until then the cursor calls them stale.
    """
    kept = set(damaged)
    for sequence in sequences:
        path = directory / segment_name(stream, sequence)
        try:
            if sequence in kept:
                path.rename(path.with_name(path.name + DAMAGED_SUFFIX))
            else:
                path.unlink()
        except FileNotFoundError:
            continue


# Making a segment takes a millisecond: create, lock, header, rename. Between the first two its maker holds no lock
# yet, and our look for one could itself keep the maker from getting it. Half would do as well; twice only keeps an
# empty file.
LEFTOVER_AGE_S = 60.0


def remove_leftovers(directory: Path, now: float) -> int:
    """Removes segments that were never finished and whose maker is dead; returns how many. `now`: wall seconds."""
    removed = 0
    for name in os.listdir(directory):
        path = directory / name
        if name.startswith(NEW_PREFIX) and _is_older(path, now - LEFTOVER_AGE_S) and is_unlocked(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _is_older(path: Path, instant: float) -> bool:
    try:
        return path.stat().st_mtime < instant
    except FileNotFoundError:
        return False


def remove_if_empty(path: Path) -> bool:
    """Removes a segment of ours that is too short to hold even a header and that nobody writes."""
    try:
        if path.stat().st_size >= HEADER_BYTES or not is_unlocked(path):
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def is_unlocked(path: Path) -> bool:
    """True when no process holds the file's lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def sync_directory(directory: Path) -> None:
    """Puts the directory's own changes on disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
