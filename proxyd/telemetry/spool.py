"""The writing end of the spool: a process's records go to its own segments, one write(2) per loop turn.

It is long because every part of it works on the one descriptor and the counts of what is in it.

Owns: the live segment, what is not yet written, what is not yet synced. Must not know: the store, who reads,
configuration.
Invariants:
- A record is *accepted* once write(2) took all of it: no death of the process loses it. Until then it is in `_pending`.
- Under `row` and `second` a record is *durable* once synced. Until then its bytes are also in `_unsynced`.
- A descriptor whose fsync failed is never synced again: its unsynced bytes head the next segment (segment.py).
- Memory is bounded: at `HELD_SOFT_BYTES` (pending and unsynced) `broken_reason` is set and checkpoints are dropped,
  they are replaceable; at `HELD_HARD_BYTES` finals are lost, counted in `lost` and logged. Between the two only
  streams that already run add.
- Disk blocks are reserved ahead (reserve.py): new work is refused before a write fails for want of them.
- Every wait has an end: a retry and a sync are due each `TICK_S`; close() tries once.
- What is copied is less than half of what was added: a segment is left for its size only when no sync of it is under
  way and what it added is twice what its successor must carry. Else a slow sync makes copies, and they a slow sync.
- telemetry.spool_max is measured at each tick and after each segment's worth of bytes, so each worker passes it by one
  segment, and by the ends of what runs. At it a segment is left early: all of it may be stored, and it counts.

  segment   |header|carried| ...synced... | ...unsynced... |partial|        _pending: [record, record, ...]
            0                     _synced ^          _whole ^                 `partial` = what write(2) took of the
            first one

Durability: `row` syncs inside flush(), so that a record is on disk before anything follows from it; it holds the loop
for one fdatasync a turn, which is its price. `second` syncs in a thread, one at a time, at least each second. `os`
leaves it to the kernel.
Cost: final() 2 us with its encoding; flush() one write(2), 2 to 4 us.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Self

from proxyd.clock import SYSTEM, Clock
from proxyd.telemetry.record import Checkpoint, Final, Intent, encode_checkpoint, encode_final, encode_intent
from proxyd.telemetry.reserve import Reserve
from proxyd.telemetry.segment import (
    HEADER_BYTES,
    NEW_PREFIX,
    Header,
    SpoolError,
    build_header,
    folder_bytes,
    segment_name,
)
from proxyd.telemetry.spoolio import InThread, SpoolIO, SpoolLog, sync_thread

# Twice: longer restarts of the reader, which scans one segment a stream; half: more renames and directory syncs.
SEGMENT_BYTES = 16 * 1024 * 1024
# A live segment counts against spool_max even when all of it is stored: with 64 workers at most a quarter of it.
_SEGMENTS_IN_SPOOL_MAX, _SEGMENT_LEAST_BYTES = 256, 64 * 1024
_PART_LEFT_WHEN_FULL = 4  # a full spool's segment is left at a quarter of its length: with 64 workers a sixteenth of it
HELD_SOFT_BYTES = 8 * 1024 * 1024  # about 70,000 records: a second of a full disk at the busiest node we know
HELD_HARD_BYTES = 64 * 1024 * 1024
# Half of what `second` promises, so that the sync itself may take the other half.
TICK_S = 0.5
RETRY_S = 0.25
RETRY_MAX_S = 30.0
_SPOOL_MAX_WARN = 0.8
# Errors of write(2) that another descriptor may not have: this file is too long, or its device is failing it.
_SEGMENT_FAULTS = frozenset({errno.EFBIG, errno.EIO, errno.ESTALE})


class SpoolWriter:
    """One process's spool. Every method belongs to the loop's thread.

    `call_soon` flushes at the end of the turn. Without `call_later` the owner calls `tick()` twice a second. Without
    `in_thread` the syncs of `second` happen inside tick(). Use `on_loop` to have all three from a running loop.
    Raises SpoolError when the first segment cannot be made.
    """

    __slots__ = (
        "_bound_fault", "_call_later", "_call_soon", "_clock", "_closed", "_counter", "_directory",
        "_directory_synced", "_durability", "_epoch", "_fd", "_in_thread", "_io", "_is_near_full", "_log",
        "_must_rotate", "_nonce", "_partial", "_pending", "_pending_bytes", "_reserve", "_retry_at", "_scheduled",
        "_seed", "_segment_bytes", "_sequence", "_slot", "_spool_max", "_start", "_stream", "_sync_failures",
        "_sync_fault", "_synced", "_syncing_fd", "_tainted", "_timer", "_unmeasured", "_unsynced", "_unsynced_bytes",
        "_whole", "_write_fault", "lost",
    )  # fmt: skip

    def __init__(
        self,
        directory: Path,
        slot: int,
        epoch: int,
        durability: str,
        log: SpoolLog,
        call_soon: Callable[[Callable[[], None]], object],
        *,
        call_later: Callable[[float, Callable[[], None]], Any] | None = None,
        in_thread: InThread | None = None,
        io: SpoolIO | None = None,
        clock: Clock = SYSTEM,
        segment_bytes: int = SEGMENT_BYTES,
        spool_max: int = 0,
    ) -> None:
        self._directory, self._slot, self._epoch, self._durability = directory, slot, epoch, durability
        self._log, self._call_soon, self._call_later, self._in_thread = log, call_soon, call_later, in_thread
        self._io, self._clock, self._spool_max = io or SpoolIO(), clock, spool_max
        largest = max(spool_max // _SEGMENTS_IN_SPOOL_MAX, _SEGMENT_LEAST_BYTES) if spool_max else SEGMENT_BYTES
        self._segment_bytes = min(segment_bytes, largest)
        self._reserve = Reserve(self._io, self._segment_bytes)
        self._nonce = int.from_bytes(os.urandom(8), "little")
        header = Header(slot, epoch, self._nonce, 0, 0, 0.0, 0, 0)
        self._seed, self._stream = header.seed, header.stream
        self._counter = count(1).__next__
        self._fd, self._sequence = -1, 0
        # `_start`: where this segment's own bytes begin, behind the carried ones.
        self._whole = self._synced = self._start = HEADER_BYTES
        self._unmeasured = 0  # bytes written since the spool was last measured against its maximum
        self._pending: list[bytes] = []
        self._pending_bytes = self._partial = 0
        self._unsynced: list[bytes] = []
        self._unsynced_bytes = 0
        # `_must_rotate`: this segment takes no more bytes; `_tainted`: it takes them, but a sync of it proves nothing.
        self._scheduled = self._must_rotate = self._tainted = self._closed = self._is_near_full = (
            self._directory_synced
        ) = False
        self._write_fault: str | None = None
        self._sync_fault: str | None = None
        self._bound_fault: str | None = None
        self._sync_failures, self._syncing_fd, self._retry_at = 0, -1, 0.0
        self._timer: Any = None
        self.lost = 0
        if not self._rotate():
            raise SpoolError(f"{directory}: cannot make a spool segment: {self.broken_reason}")
        self._arm()

    @classmethod
    def on_loop(
        cls,
        loop: asyncio.AbstractEventLoop,
        directory: Path,
        slot: int,
        epoch: int,
        durability: str,
        log: SpoolLog,
        *,
        spool_max: int = 0,
        io: SpoolIO | None = None,
    ) -> Self:
        """The spool of a process that runs `loop`: its timers, and one thread of its own for syncs."""
        given = directory, slot, epoch, durability, log, loop.call_soon
        return cls(*given, call_later=loop.call_later, in_thread=sync_thread(loop), spool_max=spool_max, io=io)

    @property
    def stream(self) -> str:
        return self._stream

    @property
    def pending_records(self) -> int:
        """Records that are not accepted yet: 0 after a flush, unless the disk refuses."""
        return len(self._pending)

    def new_txn(self) -> int:
        """The next transaction's number, unique within this stream."""
        return self._counter()

    def intent(self, record: Intent) -> None:
        """Takes an intent; call flush() before the first byte goes upstream, or let the turn end."""
        self._take(encode_intent(record, self._seed))

    def checkpoint(self, record: Checkpoint) -> None:
        """Takes a checkpoint; dropped while the spool holds too much, for the next one replaces it."""
        if self._pending_bytes < HELD_SOFT_BYTES:
            self._take(encode_checkpoint(record, self._seed))

    def final(self, record: Final) -> None:
        """Takes the transaction's end. Once for each intent."""
        self._take(encode_final(record, self._seed, self._clock.wall()))

    @property
    def broken_reason(self) -> str | None:
        """Why records are not safe now, in words for a log; None while all is well. Else refuse new billable work."""
        return self._write_fault or self._sync_fault or self._bound_fault or self._reserve.fault

    def flush(self) -> None:
        """Writes what is pending, now. Never raises: what the disk refuses stays pending and `broken_reason` is set.

        While the disk refuses, it is asked again only every RETRY_S: joining megabytes each turn would stall the loop.
        """
        self._scheduled = False
        if (
            self._pending
            and not self._closed
            and (self._write_fault is None or self._clock.monotonic() >= self._retry_at)
        ):
            self._flush()

    def tick(self) -> None:
        """What is due twice a second: retries a refused write, syncs, measures the spool against its maximum."""
        if self._closed:
            return
        if self._pending:
            self._flush()
        if self._reserve.fault is not None:
            self._regain_reserve()
        if self._unsynced or self._sync_fault:
            self._start_sync()
        self._check_bounds()

    def close(self) -> None:
        """Writes and syncs what is left, gives the lock up: the reader then knows that nothing follows. Idempotent."""
        if self._closed:
            return
        if self._pending:
            self._flush()
        if self._unsynced and (not self._tainted or self._rotate()):
            self._sync_now()
        if self._pending:
            self.lost += len(self._pending)
            self._log.error(
                "spool_records_lost", records=len(self._pending), reason=self.broken_reason, stream=self._stream
            )
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        # A sync under way still uses the descriptor; its end closes it (or the process's).
        self._reserve.leave(self._fd)
        if self._fd != self._syncing_fd:
            os.close(self._fd)

    def _take(self, frame: bytes) -> None:
        if self._closed or self._pending_bytes + self._unsynced_bytes > HELD_HARD_BYTES:
            self.lost += 1
            self._log.error(
                "spool_record_lost", lost=self.lost, reason="closed" if self._closed else self.broken_reason
            )
            return
        self._pending.append(frame)
        self._pending_bytes += len(frame)
        if not self._scheduled:
            self._scheduled = True
            self._call_soon(self.flush)

    def _arm(self) -> None:
        if self._call_later is not None and not self._closed:
            self._timer = self._call_later(TICK_S, self._on_timer)

    def _on_timer(self) -> None:
        self.tick()
        self._arm()

    def _flush(self) -> None:
        """Writes until all is taken or the system refuses; then the rest stays."""
        if self._must_rotate:
            if not self._rotate():
                return
        elif self._is_long(self._segment_bytes) and self._reserve.fault is None and not self._rotate():
            # This segment is only long enough: what is reserved behind it is for those who run.
            self._reserve.fault, self._write_fault = self._write_fault, None
        while self._pending:
            data = self._pending[0] if len(self._pending) == 1 else b"".join(self._pending)
            try:
                written = self._write(self._fd, data[self._partial :] if self._partial else data)
            except OSError as error:
                self._must_rotate = error.errno in _SEGMENT_FAULTS
                self._on_write_failed(f"write: {error.strerror}")
                return
            self._on_written(self._partial + written, data)
        self._mended(self._write_fault)
        self._write_fault = None
        if self._reserve.fault is None:
            self._keep_reserve()
        if self._durability == "row" and not self._tainted:
            self._sync_now()
        if self._unmeasured >= self._segment_bytes:
            self._check_bounds()

    def _is_long(self, size: int) -> bool:
        """True when this segment has added `size` bytes and its successor would carry little of them."""
        added = self._whole - self._start
        return added >= size and self._syncing_fd < 0 and 2 * self._unsynced_bytes <= added

    def _regain_reserve(self) -> None:
        """Tries again after a refusal; a segment that is long enough is left first."""
        if self._is_long(self._segment_bytes):
            before = self._write_fault
            if not self._rotate():
                self._reserve.fault, self._write_fault = self._write_fault, before
            return
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        """Blocks for those who run; while there are none, new work is refused."""
        before = self._reserve.fault
        self._reserve.keep(self._fd, self._whole + self._partial)
        if self._reserve.fault is None:
            self._mended(before)
        elif before is None:
            self._tell_broken(self._reserve.fault)

    def _write(self, fd: int, data: bytes) -> int:
        written = self._io.write(fd, data)
        if written <= 0:
            raise OSError(errno.ENOSPC, "nothing was written")
        return written

    def _on_written(self, taken: int, data: bytes) -> None:
        """Moves records that are wholly in the file out of `_pending`; `data` is that joined, `taken` of it written."""
        if taken == len(data):
            whole, self._partial = taken, 0
            self._pending = []
        else:
            whole = records = 0
            while whole + len(self._pending[records]) <= taken:
                whole += len(self._pending[records])
                records += 1
            del self._pending[:records]
            self._partial = taken - whole
        self._pending_bytes -= whole
        self._whole += whole
        self._unmeasured += whole
        if self._durability == "os":
            self._synced = self._whole
        elif whole:
            self._unsynced.append(data[:whole])
            self._unsynced_bytes += whole

    def _rotate(self) -> bool:
        """Opens the next segment, headed by what is not synced of this one. False leaves all as it was, but broken."""
        carried = b"".join(self._unsynced)
        sequence = self._sequence + 1
        header = Header(
            self._slot, self._epoch, self._nonce, sequence, os.getpid(), self._clock.wall(), self._synced, len(carried)
        )
        name = segment_name(self._stream, sequence)
        new = self._directory / (NEW_PREFIX + name)
        fd = -1
        try:
            fd = self._io.create(new)
            rest = build_header(header) + carried
            while rest:
                rest = rest[self._write(fd, rest) :]
            os.rename(new, self._directory / name)
        except OSError as error:
            self._on_write_failed(f"new segment: {error.strerror}")
            if fd >= 0:
                os.close(fd)
                new.unlink(missing_ok=True)
            return False
        # From here on the new name is visible; only now may the old lock go (segment.py, "The lock").
        old, self._fd, self._sequence, self._partial = self._fd, fd, sequence, 0
        self._must_rotate = self._tainted = self._directory_synced = False
        self._synced, self._whole = HEADER_BYTES, HEADER_BYTES + len(carried)
        self._start = self._whole
        self._unmeasured += self._whole
        if old >= 0:
            self._reserve.leave(old)
            if old != self._syncing_fd:
                os.close(old)
        self._reserve.enter()
        self._keep_reserve()
        if self._durability == "row":
            self._sync_now()
        return True

    def _sync(self, fd: int) -> None:
        """Makes a segment durable: its bytes, and its name. Any thread."""
        self._io.fdatasync(fd)
        if not self._directory_synced:
            self._io.sync_directory(self._directory)

    def _sync_now(self) -> None:
        try:
            self._sync(self._fd)
        except OSError as error:
            self._on_sync_failed(error)
            return
        self._on_synced(len(self._unsynced))

    def _start_sync(self) -> None:
        """Syncs, in the thread where there is one; a tainted segment is replaced first, when that is due."""
        if self._syncing_fd >= 0 or self._durability == "os":
            return
        if self._tainted and (self._clock.monotonic() < self._retry_at or not self._rotate()):
            return
        if self._in_thread is None or self._durability == "row":
            self._sync_now()
            return
        self._syncing_fd = fd = self._fd
        sequence, chunks = self._sequence, len(self._unsynced)

        def on_done(error: OSError | None) -> None:
            self._syncing_fd = -1
            if self._closed or self._sequence != sequence:
                # Rotated meanwhile: the successor carries all that was not synced, whatever became of this one.
                os.close(fd)
            elif error is None:
                self._on_synced(chunks)
            else:
                self._on_sync_failed(error)

        self._in_thread(lambda: self._sync(fd), on_done)

    def _on_synced(self, chunks: int) -> None:
        size = sum(map(len, self._unsynced[:chunks]))
        del self._unsynced[:chunks]
        self._unsynced_bytes -= size
        self._synced += size
        self._directory_synced = True
        self._sync_failures = 0
        self._mended(self._sync_fault)
        self._sync_fault = None

    def _on_sync_failed(self, error: OSError) -> None:
        """The kernel may have marked the lost pages clean: this descriptor's word is worth nothing any more.

        The first failure makes a new segment at once; a disk that goes on failing gets one each RETRY_S, doubling to
        RETRY_MAX_S, and meanwhile records are still written, accepted though not durable.
        """
        self._tainted = True
        self._sync_failures += 1
        self._sync_fault = f"fsync: {error.strerror}"
        self._log.error(
            "spool_sync_failed",
            reason=error.strerror,
            stream=self._stream,
            segment=self._sequence,
            bytes=self._unsynced_bytes,
        )
        self._retry_at = self._clock.monotonic() + min(RETRY_S * 2**self._sync_failures, RETRY_MAX_S)
        if self._sync_failures == 1:
            self._rotate()

    def _on_write_failed(self, reason: str) -> None:
        self._retry_at = self._clock.monotonic() + RETRY_S
        if reason not in (self._write_fault, self._reserve.fault):
            self._tell_broken(reason)
        self._write_fault = reason

    def _tell_broken(self, reason: str) -> None:
        self._log.error("spool_broken", reason=reason, stream=self._stream, waiting=len(self._pending))

    def _mended(self, fault: str | None) -> None:
        """The fault is over."""
        if fault is not None:
            self._log.warning("spool_mended", reason=fault, stream=self._stream)

    def _check_bounds(self) -> None:
        fault, self._unmeasured = None, 0
        held = self._pending_bytes + self._unsynced_bytes
        used = folder_bytes(self._directory) if self._spool_max else 0
        if held > HELD_SOFT_BYTES:
            fault = f"{held} bytes of records wait for the disk"
        elif self._spool_max and used >= self._spool_max:
            fault = f"the spool is full: telemetry.spool_max is {self._spool_max} bytes"
            if not self._must_rotate and self._is_long(self._segment_bytes // _PART_LEFT_WHEN_FULL):
                before = self._write_fault
                if not self._rotate():
                    self._write_fault = before
        if fault is not None and self._bound_fault is None:
            self._log.error("spool_broken", reason=fault, stream=self._stream, bytes=used)
        if fault is None:
            self._mended(self._bound_fault)
        self._bound_fault = fault
        is_near = bool(self._spool_max) and used >= self._spool_max * _SPOOL_MAX_WARN
        if is_near and not self._is_near_full:
            self._log.warning("spool_nearly_full", bytes=used, spool_max=self._spool_max)
        self._is_near_full = is_near
