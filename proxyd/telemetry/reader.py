"""The reading end of one stream: its records in order, its open transactions, and the proof that its writer is gone.

Owns: the position in a stream, the table of transactions that began and did not end. Must not know: the store, other
streams, time. Blocking file reads of at most READ_BYTES; the telemetry process has nothing else to serve.
Invariants:
- The position is always a record boundary; everything before it has been handed out once.
- A segment is left only when its successor was seen before the segment was read to its end (segment.py, "The lock").
- A live writer's torn record is waited for; what is torn in a segment that nobody writes is cut.
- The table of open transactions is bounded by the writer's concurrent streams, not by the time they take.

  READING ---- lock is free ----> ABANDONED ---- listed again: no successor; read to its end ----> ENDED (terminal)
     ^------- a successor -----------'
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path

from proxyd.telemetry.record import (
    MAX_FRAME_BYTES,
    Checkpoint,
    Final,
    Frame,
    Intent,
    Kind,
    decode_checkpoint,
    decode_final,
    decode_intent,
    find_frame,
    read_ending,
)
from proxyd.telemetry.segment import HEADER_BYTES, Header, parse_header, segment_name

# One read(2). Twice: a catch-up saves few calls; half: twice the calls. Far above MAX_FRAME_BYTES, or a record could
# never fit.
READ_BYTES = 1024 * 1024


class Phase(Enum):
    """Where a stream is in its life."""

    READING = auto()
    ABANDONED = auto()
    ENDED = auto()


_EDGES = {
    (Phase.READING, Phase.ABANDONED),
    (Phase.ABANDONED, Phase.READING),  # the verdict was about a segment that turned out to have a successor
    (Phase.ABANDONED, Phase.ENDED),
}


@dataclass(slots=True)
class Open:
    """A transaction without an end: the payloads of its records; `carried` when the store holds them too."""

    intent: bytes
    checkpoint: bytes = b""
    carried: bool = False


@dataclass(slots=True, frozen=True)
class Cut:
    """Bytes at the end of a segment that are no record. More than a torn write leaves means damage."""

    segment: int
    position: int
    bytes: int

    @property
    def is_damage(self) -> bool:
        return self.bytes > MAX_FRAME_BYTES


@dataclass(slots=True)
class Moved:
    """What leaving a segment came to: segments to remove once this is stored, and what was cut or skipped.

    `unreadable` are later segments that were passed over because their header is damaged; `missing` such that are not
    there.
    """

    done_with: list[int]
    cut: Cut | None = None
    skipped_bytes: int = 0
    unreadable: list[int] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Stream:
    """One writer's records. `sequence` 0 means that no segment is open yet."""

    directory: Path
    name: str
    sequence: int = 0
    position: int = HEADER_BYTES
    seed: int = 0
    slot: int = -1
    open: dict[int, Open] = field(default_factory=dict)
    phase: Phase = Phase.READING
    # A finished reader may find less on disk than it had stored (power loss): then an open transaction may have its
    # row already.
    is_short: bool = False
    skipped_records: int = 0
    _fd: int = -1
    _buffer: bytes = b""
    _start: int = 0

    def transition(self, phase: Phase) -> None:
        """Moves along an edge of the drawing above."""
        if (self.phase, phase) not in _EDGES:
            raise AssertionError(f"stream {self.name}: {self.phase.name} to {phase.name}")
        self.phase = phase

    def path(self, sequence: int) -> Path:
        return self.directory / segment_name(self.name, sequence)

    def enter(self, sequence: int, consumed: int | None) -> Header | None:
        """Opens a segment at the right place, having consumed the one before up to `consumed` (None: not at all).

        None, and nothing changed, when there is no such file or it has no header of this stream.
        """
        try:
            fd = os.open(self.path(sequence), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            header = parse_header(os.pread(fd, HEADER_BYTES, 0))
        except IsADirectoryError:
            header = None
        except OSError:
            os.close(fd)
            raise
        if header is None or header.stream != self.name or header.sequence != sequence:
            os.close(fd)
            return None
        self.close()
        self._fd, self.sequence, self.seed, self.slot = fd, sequence, header.seed, header.slot
        self.position = header.entry(consumed)
        return header

    def next_frame(self) -> Frame | None:
        """The record at the position, which moves behind it; None when there is no whole one now."""
        frame = find_frame(self._buffer, self.position - self._start, self.seed)
        if frame is None:
            if self._fd < 0:
                return None
            self._buffer, self._start = os.pread(self._fd, READ_BYTES, self.position), self.position
            frame = find_frame(self._buffer, 0, self.seed)
            if frame is None:
                return None
        self.position = self._start + frame.end
        return frame

    def apply(self, frame: Frame) -> Final | None:
        """Takes a record into the table of open transactions; a final comes back. Unknown ones are counted."""
        try:
            if frame.kind == Kind.FINAL:
                return decode_final(frame.txn, frame.payload)
            if frame.kind == Kind.INTENT:
                known = self.open.get(frame.txn)
                self.open[frame.txn] = Open(
                    frame.payload, known.checkpoint if known else b"", bool(known and known.carried)
                )
            elif frame.kind == Kind.CHECKPOINT:
                opened = self.open.get(frame.txn)
                if opened is not None:
                    opened.checkpoint = frame.payload
            else:
                self.skipped_records += 1
        except ValueError:
            self.skipped_records += 1
        return None

    def end_transaction(self, txn: int) -> bool:
        """Forgets an open transaction; True when the store carries it and must forget it too."""
        opened = self.open.pop(txn, None)
        return opened is not None and opened.carried

    def is_writer_gone(self) -> bool:
        """True when nobody holds the open segment's lock: death, unless the segment has a successor *afterwards*."""
        if self._fd < 0:
            return True
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return True

    def size(self) -> int:
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def leave(self, known: Sequence[int]) -> Moved | None:
        """Moves from a segment read to its end to the next one in `known` (ascending, listed before that read).

        None when there is no readable successor yet.
        """
        later = [sequence for sequence in known if sequence > self.sequence]
        cut, left = self._cut(), self.sequence
        for sequence in later:
            # Bytes were copied from the direct predecessor only; after a gap nothing of this segment was seen.
            consumed = self.position if sequence == left + 1 and left else None
            header = self.enter(sequence, consumed)
            if header is not None:
                skipped = max(0, header.carried_from - consumed) if consumed is not None and header.carried_bytes else 0
                unreadable = [number for number in later if number < sequence]
                if self.phase is Phase.ABANDONED:
                    self.transition(Phase.READING)
                missing = [number for number in range(left + 1, sequence) if number not in later] if left else []
                return Moved([left] if left else [], cut, skipped, unreadable, missing)
        return None

    def end(self) -> Moved:
        """The last segment is read and its writer dead: nothing will come any more."""
        self.transition(Phase.ENDED)
        cut = self._cut()
        self.close()
        return Moved([self.sequence] if self.sequence else [], cut)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._buffer, self._start = -1, b"", 0

    def _cut(self) -> Cut | None:
        rest = self.size() - self.position
        return Cut(self.sequence, self.position, rest) if rest > 0 else None


def interrupted(txn: int, opened: Open) -> Final | None:
    """The end that a transaction gets when its writer died, with its last checkpoint's counts; None if unreadable.

    A checkpoint that announced the end is that end: the client may have seen it.
    """
    try:
        intent: Intent = decode_intent(txn, opened.intent)
    except ValueError:
        return None
    last = Checkpoint(txn, intent.prompt_estimate, 0)
    if opened.checkpoint:
        try:
            last = decode_checkpoint(txn, opened.checkpoint)
        except ValueError:
            last = Checkpoint(txn, intent.prompt_estimate, 0)
    status, estimated = read_ending(last.ending) or ("interrupted", 1)
    return Final(
        txn=txn,
        user_id=intent.user_id,
        model_id=intent.model_id,
        prompt_tokens=last.prompt_tokens,
        completion_tokens=last.completion_tokens,
        created_at=intent.created_at,
        tenant=intent.tenant,
        request_id=intent.request_id,
        status=status,
        estimated=estimated,
        cached_tokens=last.cached_tokens,
        reasoning_tokens=last.reasoning_tokens,
        upstream=last.upstream or intent.upstream,
        attempts=last.attempts,
        ttft_ms=last.ttft_ms,
        duration_ms=last.duration_ms,
    )
