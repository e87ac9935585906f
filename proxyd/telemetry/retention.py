"""Deletes rows past their retention, in small batches between two groups.

Owns: when a batch is due, and how much of the store's time it may take. Must not know: groups, how a store deletes.

    once an hour: batch, pause, batch, pause ... until a batch is not full; a failure: again in a minute

Bounds: a batch has BATCH_ROWS rows, and the pause behind it is PAUSES times as long as it took and PAUSE_MIN_S at
least: so rows that are to be stored wait for one batch at most, the store spends a tenth of its time here, and at most
10,000 rows go in a second, however many have piled up.
"""

from __future__ import annotations

from proxyd.clock import Clock
from proxyd.store.schema import Store, StoreError
from proxyd.telemetry.spoolio import SpoolLog

__all__ = ["BATCH_ROWS", "EVERY_S", "PAUSES", "PAUSE_MIN_S", "RETRY_S", "Retention"]

EVERY_S = 3600.0
RETRY_S = 60.0
# One short transaction between two groups. Ten times more would delay a group by tens of milliseconds.
BATCH_ROWS = 500
PAUSE_MIN_S = 0.05
# Twice: a backlog takes twice as long; half: a disk that is slow anyway does little else for hours.
PAUSES = 9


class Retention:
    """One a process. `keep_s` 0 keeps rows for ever."""

    __slots__ = ("_clock", "_keep_s", "_log", "due_at")

    def __init__(self, keep_s: float, log: SpoolLog, clock: Clock) -> None:
        self._keep_s, self._log, self._clock = keep_s, log, clock
        # Monotonic seconds; the start of a node has other things to do.
        self.due_at = clock.monotonic() + RETRY_S if keep_s > 0 else float("inf")

    async def maybe_delete(self, store: Store) -> bool:
        """Deletes a batch if one is due. False when the store failed: it is to be opened again."""
        began = self._clock.monotonic()
        if began < self.due_at:
            return True
        try:
            gone = await store.delete_older(self._clock.wall() - self._keep_s, BATCH_ROWS)
        except StoreError as error:
            self._log.warning("retention_failed", reason=str(error))
            self.due_at = self._clock.monotonic() + RETRY_S
            return False
        now = self._clock.monotonic()
        self.due_at = now + (EVERY_S if gone < BATCH_ROWS else max(PAUSE_MIN_S, (now - began) * PAUSES))
        return True
