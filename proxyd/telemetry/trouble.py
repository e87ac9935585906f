"""A store that fails: how long until the next try, what is said of it, and what stays behind.

Owns: the back-off, the words in log and status, the count of records in a spool. Must not know: what a commit is.
Bounds: the pause doubles from RETRY_MIN_S to RETRY_MAX_S, and no pause is longer than what is left until a deadline.
Invariant: a recovery is told if and only if its failure was; giving up is told in any case.

    fails -> store_failed -> again after REPEAT_S, or for a reason not told yet -> works -> store_recovered
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from proxyd.clock import Clock
from proxyd.shm.beats import State
from proxyd.telemetry.reader import Stream
from proxyd.telemetry.record import Kind
from proxyd.telemetry.segment import directory_bytes, list_spool
from proxyd.telemetry.spoolio import SpoolLog

__all__ = ["RETRY_MAX_S", "RETRY_MIN_S", "StoreTrouble", "count_left", "tell_left"]

RETRY_MIN_S = 0.05
RETRY_MAX_S = 5.0
# Between two lines of one trouble. Half: a night's outage is a thousand lines; twice: a tail of the log looks healthy.
REPEAT_S = 60.0
# Between any two lines: a store that fails and recovers all the time is not two lines each.
GAP_S = 5.0
# Reasons of one trouble that are told as they come up; a store with more of them has them told each REPEAT_S.
MAX_REASONS = 8
# A series of shared memory has 240 bytes for its name and labels.
MAX_REASON = 200
# What is read to count records at the very end; a larger spool is told in bytes only. Half a second of a slow core.
MAX_COUNTED_BYTES = 64 * 1024 * 1024


class Gauges(Protocol):
    """What we need of shm.metrics.Metrics."""

    def gauge(self, name: str, **labels: str) -> Any: ...


class StoreTrouble:
    """The failures in a row of one store. `enter`: what status shows of this process."""

    __slots__ = (
        "_clock", "_enter", "_gauge", "_gauges", "_is_told", "_log", "_pause_s", "_reasons", "_since_s", "_told_s",
        "_tries",
    )  # fmt: skip

    def __init__(self, gauges: Gauges, log: SpoolLog, clock: Clock, enter: Callable[[State], None]) -> None:
        self._gauges, self._log, self._clock, self._enter = gauges, log, clock, enter
        self._gauge: Any = None
        self._pause_s = RETRY_MIN_S
        self._since_s = 0.0
        self._tries = 0
        self._told_s: float | None = None
        self._is_told = False
        self._reasons: set[str] = set()  # told of this trouble

    def on_failure(self, error: Exception, left_s: float | None, waiting_rows: int, spool_bytes: int) -> float | None:
        """Says what failed, if that is due; the pause until the next try, or None when there is none within `left_s`
        (None: no deadline)."""
        now = self._clock.monotonic()
        if not self._tries:
            self._since_s = now
            # For status and /readyz only, in wall seconds.
            self._gauge = self._gauges.gauge("_store_failing_since", reason=_plain(str(error)))
            self._gauge.set(int(self._clock.wall()))
            self._enter(State.FAILING)
        self._tries += 1
        pause_s: float | None = self._pause_s
        if left_s is not None:
            pause_s = min(self._pause_s, left_s) if left_s > 0 else None
        self._pause_s = min(self._pause_s * 2, RETRY_MAX_S)
        if pause_s is not None and not self._is_due(str(error), now):
            return pause_s
        self._told_s, self._is_told = now, True
        self._log.error(
            "store_failed",
            reason=str(error),
            tries=self._tries,
            failing_s=round(now - self._since_s, 1),
            retry_s=None if pause_s is None else round(pause_s, 2),
            waiting_rows=waiting_rows,
            spool_bytes=spool_bytes,
        )
        return pause_s

    def _is_due(self, reason: str, now: float) -> bool:
        """Whether this failure gets a line. Reasons are compared without their numbers, which count and name things."""
        kind = re.sub(r"[0-9]+", "0", reason)
        is_new = kind not in self._reasons and len(self._reasons) < MAX_REASONS
        gap_s = GAP_S if is_new else REPEAT_S
        if self._told_s is not None and now - self._told_s < gap_s:
            return False
        if is_new:
            self._reasons.add(kind)
        return True

    def on_success(self) -> None:
        """The store did what it was asked for."""
        if not self._tries:
            return
        if self._is_told:
            failed_s = round(self._clock.monotonic() - self._since_s, 1)
            self._log.info("store_recovered", tries=self._tries, failed_s=failed_s)
        self._tries, self._pause_s, self._is_told = 0, RETRY_MIN_S, False
        self._reasons.clear()
        self._gauge.set(0)
        self._enter(State.READY)


def count_left(directory: Path, known: Mapping[str, Stream]) -> tuple[int | None, int]:
    """Ends of transactions in the spool behind what `known` has read (all of a stream that it does not have), and the
    bytes of its files. None for a spool that is too large to be counted."""
    size = directory_bytes(directory)
    if size > MAX_COUNTED_BYTES:
        return None, size
    count = 0
    for name, sequences in list_spool(directory)[0].items():
        stream = known.get(name)
        first = stream.sequence if stream is not None else 0
        for sequence in sequences:
            reader = Stream(directory, name)
            if sequence < first or reader.enter(sequence, None) is None:
                continue
            if stream is not None and sequence == first:
                reader.position = stream.position
            while (frame := reader.next_frame()) is not None:
                count += frame.kind == Kind.FINAL
            reader.close()
    return count, size


def tell_left(directory: Path, known: Mapping[str, Stream], gathered: int, log: SpoolLog) -> None:
    """The last word of a stop while the store fails. `gathered` rows are read and not stored."""
    try:
        records, size = count_left(directory, known)
    except OSError as error:
        log.error("spool_unreadable", directory=str(directory), reason=str(error))
        return
    if records == 0 and not gathered:
        return
    log.error(
        "rows_left_in_spool",
        records=None if records is None else records + gathered,
        bytes=size,
        directory=str(directory),
        detail="the next start stores them, once the store works",
    )


def _plain(reason: str) -> str:
    """Bounded, printable ASCII; of a long text the end, for it begins with a path."""
    text = "".join(char if " " <= char <= "~" else "?" for char in reason)
    return text if len(text) <= MAX_REASON else f"...{text[3 - MAX_REASON :]}"
