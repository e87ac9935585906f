"""What lies in a spool directory, told from the files alone, beside a running daemon or without one.

Owns: the listing that `proxyd spool` prints. Must not know: the store; the cursors are given, or not.
Invariant: nothing is changed and no lock is taken. A look for a lock takes it: a writer that makes a segment then would
fail to, and the reader's proof that a writer is gone (segment.py) would be put off. So the kernel's own list of locks
is read, and a segment's writer is the process that its header names, if that holds the segment's lock.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxyd.store.schema import Cursor
from proxyd.telemetry.lock import LOCK_NAME
from proxyd.telemetry.reader import Stream
from proxyd.telemetry.record import Kind
from proxyd.telemetry.segment import (
    DAMAGED_SUFFIX,
    DEAD_LETTERS,
    HEADER_BYTES,
    NEW_PREFIX,
    REQUEUE_SUFFIX,
    SKIPPED_SUFFIX,
    is_ours,
    list_files,
    parse_header,
    parse_name,
    segment_name,
)

# What is read to count records, in all; of what is beyond it bytes are told. A second of a slow core.
MAX_COUNTED_BYTES = 64 * 1024 * 1024
_LOCKS = Path("/proc/locks")


@dataclass(slots=True)
class Waiting:
    """One stream. `rows` (ends of transactions) and `open` (begun and not ended) are None where nobody counted.

    `state`: live, ended (its writer is gone), re-queue, or unknown where the kernel tells no locks.
    """

    stream: str
    slot: int
    epoch: int
    state: str
    segments: int
    bytes: int
    rows: int | None
    open: int | None
    oldest: float | None


@dataclass(slots=True)
class Oddity:
    """A file that is not read, and why."""

    file: str
    kind: str
    bytes: int


@dataclass(slots=True)
class Survey:
    """The whole directory. `reader_pid`: the telemetry process at work."""

    streams: list[Waiting] = field(default_factory=list)
    odd: list[Oddity] = field(default_factory=list)
    reader_pid: int | None = None
    dead_letter_bytes: int = 0

    @property
    def bytes(self) -> int:
        """All that counts against telemetry.spool_max."""
        ours = sum(odd.bytes for odd in self.odd if odd.kind != "foreign")
        return sum(one.bytes for one in self.streams) + ours + self.dead_letter_bytes


def survey(state_dir: Path, directory: Path, cursors: Mapping[str, Cursor] | None) -> Survey:
    """`cursors`: what the store has of each stream; None when it was not asked. Raises OSError for the directory."""
    found = Survey()
    holders = lock_holders()
    found.reader_pid = _holder(holders, state_dir / LOCK_NAME, None)
    listing = list_files(directory)
    budget = [MAX_COUNTED_BYTES]
    for name in sorted(listing.streams):
        waiting = _stream(directory, name, listing.streams[name], (cursors or {}).get(name), holders, budget, found.odd)
        if waiting is not None:
            found.streams.append(waiting)
    for name in listing.requeues:
        found.streams.append(_requeue(directory, name, (cursors or {}).get(name), budget))
    found.dead_letter_bytes = _size(directory / DEAD_LETTERS)
    for file in sorted(os.listdir(directory)):
        if file.startswith(NEW_PREFIX):
            found.odd.append(Oddity(file, "unfinished", _size(directory / file)))
        elif file.endswith(DAMAGED_SUFFIX):
            found.odd.append(Oddity(file, "damaged", _size(directory / file)))
        elif file.startswith("requeue-") and not file.endswith(REQUEUE_SUFFIX) and is_ours(file):
            found.odd.append(
                Oddity(
                    file, "rows passed over" if file.endswith(SKIPPED_SUFFIX) else "bad lines", _size(directory / file)
                )
            )
        elif parse_name(file) is None and not is_ours(file):
            found.odd.append(Oddity(file, "foreign", _size(directory / file)))
    return found


def lock_holders() -> dict[int, set[int]] | None:
    """The processes that hold a flock, by the inode of the file; None where the kernel does not tell."""
    try:
        text = _LOCKS.read_text()
    except OSError:
        return None
    found: dict[int, set[int]] = {}
    for line in text.splitlines():
        words = line.split()
        # "1: FLOCK ADVISORY WRITE 4242 fd:01:131074 0 EOF"; "->" marks one that waits
        if len(words) >= 6 and words[1] == "FLOCK" and words[4].lstrip("-").isdigit():
            inode = words[5].rpartition(":")[2]
            if inode.isdigit():
                found.setdefault(int(inode), set()).add(int(words[4]))
    return found


def _holder(holders: dict[int, set[int]] | None, path: Path, pid: int | None) -> int | None:
    """Who holds the file's lock: `pid`, or anybody when that is None."""
    try:
        held = (holders or {}).get(path.stat().st_ino, set())
    except OSError:
        return None
    if pid is not None:
        return pid if pid in held else None
    return min(held, default=None)


def _stream(
    directory: Path,
    name: str,
    sequences: Sequence[int],
    cursor: Cursor | None,
    holders: dict[int, set[int]] | None,
    budget: list[int],
    odd: list[Oddity],
) -> Waiting | None:
    slot, epoch = name.split("-")[:2]
    size, segments, oldest, pid = 0, 0, None, None
    for sequence in sequences:
        path = directory / segment_name(name, sequence)
        try:
            with path.open("rb") as file:
                header = parse_header(file.read(HEADER_BYTES))
        except FileNotFoundError:
            continue  # stored meanwhile
        except OSError as error:
            odd.append(Oddity(path.name, f"unreadable: {error.strerror}", _size(path)))
            continue
        if header is None or header.stream != name:
            odd.append(Oddity(path.name, "no segment, or its header is damaged", _size(path)))
            continue
        segments += 1
        size += _size(path)
        oldest, pid = oldest or header.created, header.pid
    if not segments:
        return None
    state = "unknown"
    if holders is not None:
        newest = directory / segment_name(name, sequences[-1])
        state = "live" if pid is not None and _holder(holders, newest, pid) else "ended"
    rows, begun = _count(directory, name, sequences, cursor, budget)
    return Waiting(name, int(slot), int(epoch, 16), state, segments, size, rows, begun, oldest)


def _count(
    directory: Path, name: str, sequences: Sequence[int], cursor: Cursor | None, budget: list[int]
) -> tuple[int | None, int | None]:
    """Ends behind the cursor, and transactions without an end; None for what is too large to be read now."""
    reader, rows, begun = Stream(directory, name), 0, set()
    try:
        for sequence in sequences:
            consumed = reader.position if sequence == reader.sequence + 1 and reader.sequence else None
            if reader.enter(sequence, consumed) is None:
                continue
            budget[0] -= reader.size()
            if budget[0] < 0:
                return None, None
            stored_to = HEADER_BYTES
            if cursor is not None and sequence <= cursor.segment:
                stored_to = cursor.position if sequence == cursor.segment else reader.size()
            while (frame := reader.next_frame()) is not None:
                if frame.kind == Kind.INTENT:
                    begun.add(frame.txn)
                elif frame.kind == Kind.FINAL:
                    begun.discard(frame.txn)
                    rows += reader.position > stored_to
    except OSError:
        return None, None
    finally:
        reader.close()
    return rows, len(begun)


def _requeue(directory: Path, name: str, cursor: Cursor | None, budget: list[int]) -> Waiting:
    path = directory / (name + REQUEUE_SUFFIX)
    size, rows, oldest = _size(path), None, None
    budget[0] -= size
    try:
        oldest = path.stat().st_mtime
        if budget[0] >= 0:
            rows = path.read_bytes()[cursor.position if cursor is not None else 0 :].count(b"\n")
    except OSError:
        rows = None
    return Waiting(name, -1, 0, "re-queue", 1, size, rows, 0, oldest)


def _size(path: Path) -> int:
    """Bytes of a file; 0 of one that is gone, or that is none."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0
