"""Deletes rows past their retention, in small batches between two groups.

Owns: when a batch is due, and how much of the store's time it may take. Must not know: groups, how a store deletes.

    once an hour: batch, pause, batch, pause ... until a batch is not full; a failure: again in a minute

The wall clock may be wrong, at a boot without RTC or NTP or by a slip of the hand, and rows are gone for good. So it is
believed only up to TRUST_S ahead of what is known: the youngest stored row as it was at the first look, and the time
that has passed since on the monotonic clock. A row that comes later, dated by a wrong clock, changes nothing. After
TRUST_S the look is taken anew: whoever wants to keep the rows has been told (`retention_held`) for that long. Rows of a
clock in the past go once it is right: they are as old as they say.

Bounds: a batch has BATCH_ROWS rows, and the pause behind it is PAUSES times as long as it took and PAUSE_MIN_S at
least: so rows that are to be stored wait for one batch at most, the store spends a tenth of its time here, and at most
10,000 rows go in a second, however many have piled up.
"""

from __future__ import annotations

from proxyd.clock import Clock
from proxyd.store.schema import Store, StoreError, utc_text
from proxyd.telemetry.spoolio import SpoolLog

__all__ = ["BATCH_ROWS", "EVERY_S", "PAUSES", "PAUSE_MIN_S", "RETRY_S", "TRUST_S", "Retention"]

EVERY_S = 3600.0
RETRY_S = 60.0
# Twice: a node that stood still for a weekend deletes later; half: a clock wrong in the evening has done it by morning.
TRUST_S = 86_400.0
# One short transaction between two groups. Ten times more would delay a group by tens of milliseconds.
BATCH_ROWS = 500
PAUSE_MIN_S = 0.05
# Twice: a backlog takes twice as long; half: a disk that is slow anyway does little else for hours.
PAUSES = 9


class Retention:
    """One a process. `keep_s` 0 keeps rows for ever."""

    __slots__ = (
        "_clock", "_deleted", "_has_failed", "_has_looked", "_has_told", "_keep_s", "_log", "_looked_at",
        "_newest", "due_at",
    )  # fmt: skip

    def __init__(self, keep_s: float, log: SpoolLog, clock: Clock) -> None:
        self._keep_s, self._log, self._clock = keep_s, log, clock
        # Monotonic seconds; the start of a node has other things to do.
        self.due_at = clock.monotonic() + RETRY_S if keep_s > 0 else float("inf")
        # The youngest row at the last look (wall s), and when that was (monotonic s).
        self._has_looked, self._newest, self._looked_at = False, 0.0, 0.0
        self._has_told = False  # that the clock is not believed, since that look
        self._deleted = 0
        self._has_failed = False

    async def maybe_delete(self, store: Store) -> bool:
        """Deletes a batch if one is due. False when the store failed: it is to be opened again."""
        began = self._clock.monotonic()
        if self._keep_s <= 0 or (began < self.due_at and (self._has_looked or self._has_failed)):
            return True
        try:
            # At once at the start: before rows of a wrong clock are there.
            if not self._has_looked or began - self._looked_at >= TRUST_S:
                await self._look(store, began)
            if began < self.due_at:
                return True
            cutoff = max(0.0, self._believed(began) - self._keep_s)
            gone = await store.delete_older(cutoff, BATCH_ROWS)
        except StoreError as error:
            self._log.warning("retention_failed", reason=str(error))
            self.due_at, self._has_failed = self._clock.monotonic() + RETRY_S, True
            return False
        now = self._clock.monotonic()
        self._deleted += gone
        if gone < BATCH_ROWS:
            self.due_at = now + EVERY_S
            if self._deleted:
                self._log.info("retention_deleted", rows=self._deleted, before=utc_text(cutoff))
            self._deleted = 0
        else:
            self.due_at = now + max(PAUSE_MIN_S, (now - began) * PAUSES)
        return True

    async def _look(self, store: Store, now: float) -> None:
        newest = await store.newest()
        self._newest = self._clock.wall() if newest is None else newest
        self._has_looked, self._looked_at, self._has_told = True, now, False

    def _believed(self, now: float) -> float:
        """The wall clock, or the latest that it can be."""
        wall, latest = self._clock.wall(), self._newest + (now - self._looked_at) + TRUST_S
        if wall > latest and not self._has_told:
            self._has_told = True
            self._log.warning(
                "retention_held",
                clock=utc_text(wall),
                newest=utc_text(self._newest),
                detail=f"rows are deleted as of {utc_text(latest)}, not as of the clock",
            )
        return min(wall, latest)
