"""Disk blocks ahead of a segment's end, so that who runs can still write when the disk is full.

Owns: how much is reserved of the live segment, and the fault while there is no more to be had. Must not know: records.
Invariant: while `fault` is None, what is written next finds LOW of `ahead` bytes on disk; so new work is refused, by
the fault, that much before a write fails. A file system that cannot reserve (EOPNOTSUPP), or a limit that is not the
disk's, gives no fault: then a full disk is met by the write, and records wait in memory (spool.py).
"""

from __future__ import annotations

import errno

from proxyd.telemetry.spoolio import SpoolIO

# Finals of 15,000 streams of one worker. Twice: nothing more on a node of ours; half: fewer than a worker may have.
AHEAD_BYTES = 2 * 1024 * 1024
# A new reservation each time an eighth was used: a call of 30 us for 2,000 finals.
LOW = 7 / 8
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Reserve:
    """Of one writer: the segment it has now."""

    __slots__ = ("_ahead", "_io", "_until", "fault")

    def __init__(self, io: SpoolIO, segment_bytes: int) -> None:
        self._io, self._ahead = io, min(AHEAD_BYTES, segment_bytes)
        self._until: float = 0
        self.fault: str | None = None

    def enter(self) -> None:
        """Another segment is written from now on."""
        self._until = 0

    def keep(self, fd: int, position: int) -> None:
        """Sees to what is ahead of `position`; call after writes, and again later while there is a fault."""
        if self.fault is None and self._until >= position + self._ahead * LOW:
            return
        until: float = position + self._ahead
        try:
            self._io.reserve(fd, position, self._ahead)
        except OSError as error:
            if error.errno in _FULL:
                self.fault = f"reserve: {error.strerror}"
                return
            until = float("inf")  # not for this file: then without
        self._until, self.fault = until, None

    def leave(self, fd: int) -> None:
        """Gives back what was not written."""
        self._io.release(fd)
