"""What a committed group changes besides the store: counters, the log, the ledger.

Owns: the series of stored rows and their lag. Must not know: when or how a group is committed.

Which rows are in the ledger's `stored`: the finals that a worker of this node's life wrote, for it settled them too.
The rows of a dead worker's requests were settled by nobody: they are now, and count as stored, too. Not in `stored` are
the rows of streams of another life of the node, which were settled in another ledger, rows that were set aside, and
those that were re-queued later.
"""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import Any, Protocol

from proxyd.clock import Clock
from proxyd.ids import is_same_life
from proxyd.telemetry.desk import Desk
from proxyd.telemetry.gather import Group
from proxyd.telemetry.segment import epoch_of
from proxyd.telemetry.spoolio import SpoolLog
from proxyd.telemetry.tally import Tally

__all__ = ["REQUEST_IDS_TOLD", "Committed"]

# Of one line in the log; a worker that died may have had thousands, and their rows name them all.
REQUEST_IDS_TOLD = 20


class Metrics(Protocol):
    """What we need of shm.metrics.Metrics."""

    def counter(self, name: str, **labels: str) -> Any: ...
    def histogram(self, name: str) -> Any: ...


class Committed:
    """One a process. `epoch`: this process's own, of the node's life; `dead_letters`: where refused rows are."""

    __slots__ = (
        "_clock", "_dead", "_dead_letters", "_desk", "_epoch", "_interrupted", "_lag", "_log", "_stored", "_tally",
    )  # fmt: skip

    def __init__(
        self,
        metrics: Metrics,
        tally: Tally,
        desk: Desk | None,
        epoch: int,
        dead_letters: Path,
        log: SpoolLog,
        clock: Clock,
    ) -> None:
        self._tally, self._desk, self._epoch = tally, desk, epoch
        self._dead_letters, self._log, self._clock = dead_letters, log, clock
        self._stored = metrics.counter("proxyd_telemetry_rows_total", state="stored")
        self._interrupted = metrics.counter("proxyd_telemetry_rows_total", state="interrupted")
        self._dead = metrics.counter("proxyd_telemetry_rows_total", state="dead")
        self._lag = metrics.histogram("proxyd_telemetry_lag_seconds")

    def on_stored(self, group: Group, refused: int, aside: Set[int]) -> None:
        """`refused` rows were set aside, those whose id() is in `aside`."""
        now = self._clock.wall()
        self._tally.on_stored(len(group.batch.rows) - refused)
        self._stored.add(len(group.batch.rows) - len(group.interrupted) - refused)
        if group.interrupted:
            self._interrupted.add(len(group.interrupted))
            self._log.warning(
                "transactions_interrupted",
                rows=len(group.interrupted),
                request_ids=group.interrupted[:REQUEST_IDS_TOLD],
                more=max(0, len(group.interrupted) - REQUEST_IDS_TOLD),
            )
        if refused:
            self._dead.add(refused)
            self._log.error("rows_refused", rows=refused, file=str(self._dead_letters))
        for accepted_at in group.accepted_at:
            self._lag.record(max(0.0, now - accepted_at))
        if self._desk is not None:
            # By the stream and not by time: a wall clock that is set back makes young rows look old.
            streams = group.streams_of_rows() if group.accepted_at else {}
            first = len(group.accepted_at)  # finals stand first, behind them interrupted and re-queued rows
            self._desk.count_stored(
                row
                for row in group.batch.rows[:first]
                if id(row) not in aside and is_same_life(epoch_of(streams[id(row)]), self._epoch)
            )
            interrupted = group.batch.rows[first : first + len(group.interrupted)]
            self._desk.count_interrupted(row for row in interrupted if id(row) not in aside)
