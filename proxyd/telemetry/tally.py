"""What status tells of the telemetry process: groups and their size, dead letters, what is being re-queued.

Owns: those series. Must not know: how a group came about. All are in shared memory, so that any worker tells them.

`_telemetry_group_rows` is a histogram because histograms know their last minute: a row counts as a microsecond, so its
count is groups and its sum is rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from proxyd.telemetry.deadletter import LineCount
from proxyd.telemetry.segment import DEAD_LETTERS, folder_bytes

GROUP_ROWS = "_telemetry_group_rows"
ROW_S = 1e-6


class Metrics(Protocol):
    """What we need of shm.metrics.Metrics."""

    def gauge(self, name: str, **labels: str) -> Any: ...
    def histogram(self, name: str) -> Any: ...


class Tally:
    """One a process."""

    __slots__ = ("_dead_letters", "_directory", "_groups", "_lines", "_requeue_bytes", "_used")

    def __init__(self, metrics: Metrics, directory: Path, spool_max: int) -> None:
        self._directory = directory
        self._groups = metrics.histogram(GROUP_ROWS)
        self._dead_letters = metrics.gauge("_telemetry_dead_letters")
        self._requeue_bytes = metrics.gauge("_telemetry_requeue_bytes")
        self._used = metrics.gauge("_telemetry_spool_used")
        metrics.gauge("_telemetry_spool_max").set(spool_max)
        self._lines = LineCount(directory / DEAD_LETTERS)

    def on_stored(self, rows: int) -> None:
        """A group was committed with so many rows; one without any (cursors alone) is no group."""
        if rows:
            self._groups.record(rows * ROW_S)

    def measure(self, requeue_bytes: int) -> None:
        """What lies in the files now. Once a second."""
        self._dead_letters.set(self._lines.count())
        self._requeue_bytes.set(requeue_bytes)
        self._used.set(folder_bytes(self._directory))
