"""The telemetry process: reads every spool stream and stores groups of rows, each exactly once.

Owns: when a group is due, the order commit -> remove files -> forget, retries, the end. Must not know: HTTP, workers,
which database it is; reading the spool is gather.py's, the workers' questions are desk.py's.

    step: gather, commit when due -> questions -> one batch of retention -> sleep -> step ...

Exactly once. Let a stream's cursor be the position recorded in the store.
1. A group holds the finals of every record between each stream's recorded cursor and its new one, and the new cursors;
   both are committed in one transaction. Killed before it commits: neither is there, and the same records are read
   again from the recorded cursor. Killed after: both are there, and reading goes on behind them. There is no third
   state.
2. A commit whose outcome is unknown (connection lost after COMMIT, I/O error) is decided by reading the cursors back:
   a group with rows moves at least one cursor, so all its cursors are there if and only if its rows are.
3. Reading only ever moves forward inside one process, and only one process reads: it holds `telemetry.lock` in
   state_dir.
4. A transaction without a final gets its row (`interrupted`) in the transaction that marks its stream `finished`,
   after the writer's lock was found free, no later segment existed after that, and the last segment was read to its
   end. A dead writer adds nothing, so no final can follow, and a finished stream is never read again.
5. Files are removed only after the commit that moved the cursor behind them, and a finished stream's cursor is deleted
   only after the directory is synced without its files. Killed in between: the recorded cursor tells that what is left
   is stale.
6. Leaving a segment stores (`sys_ai_spool_open`) what began in it and has not ended, in the transaction that moves the
   cursor, so a long stream pins no segment; its end deletes that in the transaction that stores its row.
7. A writer that copied unsynced records to its next segment (failed fsync, rotation) says which bytes they are; the
   cursor moves to behind those already consumed (segment.py).
8. Power loss may leave less of a segment than was read and stored. Then a final may be gone whose row is there, so each
   transaction that looks open is first looked up by user, second and request id.

All of it is one task: a question is answered, and the ledger written, while no commit is in flight.

When. A group is due `linger` after its first row was accepted, in a worker, so a row waits for that and for two commits
at most: one in flight when it came, and its own. Until then nobody looks; what came meanwhile is read when the group is
due. An idle writer is woken by the kernel (wake.py).

Bounds: a group holds `batch_rows` finals, waits `linger` for company; while the store fails exactly one group is in
memory and the spool grows instead; retries back off (trouble.py), also in a stop, which drains for DRAIN_S (hurry.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from proxyd.clock import SYSTEM, Clock
from proxyd.shm.beats import State
from proxyd.store.schema import OpenTransaction, Row, Store, StoreError
from proxyd.telemetry.committed import Committed
from proxyd.telemetry.desk import Accounts, Ceiling, Desk
from proxyd.telemetry.gather import PROBE_S, Gatherer, Group
from proxyd.telemetry.hurry import Hurried
from proxyd.telemetry.lock import LOCK_NAME, only_one
from proxyd.telemetry.making import make_patiently
from proxyd.telemetry.questions import Channel
from proxyd.telemetry.reader import interrupted
from proxyd.telemetry.recovery import remove_leftovers
from proxyd.telemetry.requeue import is_held
from proxyd.telemetry.retention import Retention
from proxyd.telemetry.segment import DEAD_LETTERS, ensure_spool_dir, list_spool
from proxyd.telemetry.spoolio import SpoolLog
from proxyd.telemetry.tally import Tally
from proxyd.telemetry.trouble import StoreTrouble, tell_left
from proxyd.telemetry.wake import Sleeper

# Where the kernel tells of no writes, an idle node looks at its spool this often; twice doubles a row's delay.
IDLE_MAX_S = 0.05
IDLE_WATCHED_S = PROBE_S  # where it does: as often as a dead writer is looked for
# Between two looks after one that found no row; and in a stop. Half: checkpoints of many streams keep a core busy.
POLL_MIN_S = 0.005
# The longest time between two looks while a group waits for company: it may be full long before a linger of seconds.
GATHER_MAX_S = 0.05
# How long a stop waits for live writers to close and for the store. The master kills after more than that.
DRAIN_S = 5.0
GAUGE_S = 1.0


class Metrics(Protocol):
    """What we need of shm.metrics.Metrics."""

    def counter(self, name: str, **labels: str) -> Any: ...
    def gauge(self, name: str, **labels: str) -> Any: ...
    def histogram(self, name: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of the configuration that the writer needs; seconds."""

    linger_s: float
    batch_rows: int
    retention_s: float
    drain_s: float = DRAIN_S
    epoch: int = 0  # this process's own: of its node's life are the streams whose epochs go with it
    spool_max: int = 0
    is_replaced: Callable[[], bool] = lambda: False  # see run()


async def run(
    config: Any,
    secrets: Any,
    metrics: Metrics,
    log: SpoolLog,
    stop: asyncio.Event,
    *,
    clock: Clock = SYSTEM,
    drain_s: float = DRAIN_S,
    enter: Callable[[State], None] = lambda state: None,
    is_replaced: Callable[[], bool] = lambda: False,
    ledger: Accounts | None = None,
    questions: Channel | None = None,
    epoch: int = 0,
) -> None:
    """The telemetry process's life: returns when `stop` is set and all closed streams are stored, or `drain_s` later.

    `enter` is told what status shows: waiting for another process, failing, ready. `is_replaced`, asked in
    a stop: a successor stores what living workers write. `ledger` (the node's shm.ledger.Ledger), `questions` (its
    Channel) and `epoch` (of this process's birth) belong together: without them nobody is told what users have spent.
    Raises SpoolError when server.state_dir is missing or not ours; nothing else of disk or database ends it.
    """
    directory = ensure_spool_dir(config.server.state_dir)
    own = config.telemetry
    settings = Settings(own.linger, own.batch_rows, own.retention, drain_s, epoch, own.spool_max, is_replaced)
    async with only_one(Path(config.server.state_dir) / LOCK_NAME, stop, log, clock, enter) as is_ours:
        if is_ours:
            desk = None
            if ledger is not None and questions is not None:
                desk = Desk(questions.keep_answering(), ledger, Ceiling.of(config), clock)
            trouble = StoreTrouble(metrics, log, clock, enter)
            store = await make_patiently(config, secrets, directory, trouble, stop, log)
            if store is not None:
                await Writer(directory, store, settings, metrics, log, stop, clock, enter, desk).serve()


class Writer:
    """Gathers and stores. One instance a process, under the lock."""

    __slots__ = (
        "_clock", "_committed", "_desk", "_directory", "_drain_until", "_gatherer", "_has_given_up", "_has_stored",
        "_is_open", "_is_quiet", "_log", "_next_gauge", "_pause_s", "_poll_s", "_refused", "_retention",
        "_settings", "_spool_bytes", "_stop", "_store", "_tally", "_trouble",
    )  # fmt: skip

    def __init__(
        self,
        directory: Path,
        store: Store,
        settings: Settings,
        metrics: Metrics,
        log: SpoolLog,
        stop: asyncio.Event,
        clock: Clock = SYSTEM,
        enter: Callable[[State], None] = lambda state: None,
        desk: Desk | None = None,
    ) -> None:
        self._directory, self._settings = directory, settings
        self._store = Hurried(store, stop, self._time_left)
        self._log, self._stop, self._clock = log, stop, clock
        self._spool_bytes = metrics.gauge("proxyd_telemetry_spool_bytes")
        self._tally = Tally(metrics, directory, settings.spool_max)
        letters = directory / DEAD_LETTERS
        self._committed = Committed(metrics, self._tally, desk, settings.epoch, letters, log, clock)
        self._gatherer = Gatherer(directory, settings.batch_rows, log, clock)
        self._desk = desk
        self._retention = Retention(settings.retention_s, log, clock)
        # Of the last step: whether it stored a group; whether it found nothing and nothing waits.
        self._has_stored = self._is_quiet = False
        self._refused: set[int] = set()  # rows that the last try of a commit set aside, by id()
        self._is_open = self._has_given_up = False
        self._trouble = StoreTrouble(metrics, log, clock, enter)
        self._pause_s: float | None = None
        self._drain_until: float | None = None
        self._next_gauge = 0.0
        self._poll_s = POLL_MIN_S

    async def serve(self) -> None:
        """Recovers, then gathers and stores until told to stop and drained."""
        removed = remove_leftovers(self._directory, self._clock.wall())
        if removed:
            self._log.info("spool_leftovers_removed", files=removed)
        sleeper = Sleeper(self._directory, self._stop)
        if self._desk is not None:
            self._desk.open(asyncio.get_running_loop(), sleeper.wake)
        try:
            while not await self.recover():
                if not await self._pause_after_failure():
                    return
            while True:
                is_idle = await self.step()
                if self._has_given_up or self._is_over(is_idle):
                    return
                self._measure()
                if not await self.attend():
                    return
                await sleeper.sleep(self._wait(is_idle, sleeper))
        finally:
            sleeper.close()
            if self._desk is not None:
                self._desk.close()
            self._gatherer.close()
            with contextlib.suppress(StoreError):
                await self._store.close()

    async def step(self) -> bool:
        """Gathers once, and stores the group if it is due; True when there was nothing to do."""
        try:
            is_idle = self._gatherer.gather(self._stop.is_set())
        except OSError as error:
            self._log.error("spool_unreadable", directory=str(self._directory), reason=str(error))
            is_idle = True
            self._is_quiet = False
        else:
            self._is_quiet = is_idle and self._gatherer.group.since is None
        self._has_stored = self._is_due()
        if self._has_stored:
            self._has_given_up = not await self._store_group()
            is_idle = False
        return is_idle

    async def attend(self) -> bool:
        """What is done between two groups: answers, a batch of retention. False when told to stop while the store
        fails."""
        while True:
            try:
                if not self._is_open:  # now: questions would have no answer until the next group
                    await self._open_store()
                if self._is_quiet:  # while rows wait, only a commit tells that they are taken
                    self._on_works()
                if self._desk is not None and self._desk.waiting:
                    await self._desk.serve(self._store, self._is_quiet)
                if self._stop.is_set() or await self._retention.maybe_delete(self._store):
                    return True
                self._is_open = False
            except StoreError as error:
                self._on_failure(error)
                if not await self._pause_after_failure():
                    return False

    async def recover(self) -> bool:
        """Opens the store and puts every stream at its recorded place; False when the store cannot be read."""
        self._gatherer.forget.clear()
        try:
            await self._open_store()
            cursors = await self._store.cursors()
            carried: dict[str, list[OpenTransaction]] = {}
            for known in await self._store.open_transactions():
                carried.setdefault(known.stream, []).append(known)
            listing, _ = list_spool(self._directory)
            for name in cursors.keys() | listing.keys():
                self._gatherer.adopt(name, listing.get(name, []), cursors.get(name), carried.get(name, []))
        except (StoreError, OSError) as error:
            self._on_failure(error)
            return False
        return True

    def _is_due(self) -> bool:
        """True when the group is to be stored now."""
        group = self._gatherer.group
        if self._gatherer.forget:
            group.batch.forgotten, self._gatherer.forget = self._gatherer.forget, []
        if group.must_commit or (self._stop.is_set() and group.batch.rows):
            return True
        if group.since is None:
            return False
        return len(group.batch.rows) >= self._settings.batch_rows or self._linger_left(group) <= 0

    def _linger_left(self, group: Group) -> float:
        """How long the group may still wait: counted from when its oldest row was accepted, or, if the wall clock was
        set meanwhile, at most from when it was read."""
        assert group.since is not None
        waited = self._clock.monotonic() - group.since
        if group.accepted_at:
            waited = max(waited, self._clock.wall() - min(group.accepted_at))
        return self._settings.linger_s - waited

    def _is_over(self, is_idle: bool) -> bool:
        """True when a stop was asked for, and nothing more can come or its time is up."""
        is_done = is_idle and (not self._gatherer.streams or self._settings.is_replaced())
        return self._stop.is_set() and (is_done or self._time_left() <= 0)

    def _wait(self, is_idle: bool, sleeper: Sleeper) -> float:
        """How long until the next look. A question, a stop, and a write to an idle spool end it early."""
        group = self._gatherer.group
        if self._stop.is_set():
            return POLL_MIN_S if is_idle or group.since is not None else 0.0
        if self._has_stored or (self._desk is not None and self._desk.waiting):
            return 0.0
        if group.since is not None:
            return min(self._linger_left(group), GATHER_MAX_S)
        if not is_idle:
            self._poll_s = wait = min(POLL_MIN_S, max(self._settings.linger_s, 0.001))
        elif sleeper.is_watching:
            wait = IDLE_WATCHED_S
        elif sleeper.watch():
            wait = 0.0  # look once more: it tells only what comes from now on
        else:
            wait = self._poll_s
            self._poll_s = min(self._poll_s * 2, IDLE_MAX_S)
        return min(wait, max(0.0, self._retention.due_at - self._clock.monotonic()))

    def _time_left(self) -> float:
        """Of a stop, which begins when this is asked first."""
        if self._drain_until is None:
            self._drain_until = self._clock.monotonic() + self._settings.drain_s
        return self._drain_until - self._clock.monotonic()

    async def _store_group(self) -> bool:
        """Commits the group, then removes what it made superfluous. False when told to stop while the store fails."""
        group = self._gatherer.group
        is_complete = False
        while not is_complete:
            try:
                if not self._is_open:
                    await self._open_store()
                    if await self._is_stored(group):
                        refused = 0
                        break
                if group.ended:
                    await self._end_transactions(group)
                await group.take_requeued(self._store)
                group.complete()
                self._refused.clear()
                refused = await self._store.commit(group.batch, self._set_aside)
                is_complete = True
            except (StoreError, OSError) as error:
                self._on_failure(error)
                if not await self._pause_after_failure():
                    return False
        self._on_works()
        self._gatherer.group = Group()
        self._committed.on_stored(group, refused, self._refused)
        self._gatherer.on_stored(group)
        return True

    async def _is_stored(self, group: Group) -> bool:
        """True when the commit that seemed to fail did happen."""
        recorded = await self._store.cursors()
        cursors = group.batch.cursors
        return bool(cursors) and all(recorded.get(name) == cursor for name, cursor in cursors.items())

    async def _end_transactions(self, group: Group) -> None:
        """Adds the rows of the transactions that died with their writers; done once for each ended stream."""
        for stream, _ in group.ended:
            group.begin(stream.name)
            for txn, opened in list(stream.open.items()):
                final = interrupted(txn, opened)
                if final is None:
                    self._log.error("spool_intent_unreadable", stream=stream.name, txn=txn)
                elif not (stream.is_short and await is_held(self._store, Row(*final[1:-1]))):
                    group.batch.rows.append(Row(*final[1:-1]))
                    group.interrupted.append(final.request_id)
                if stream.end_transaction(txn):
                    group.batch.closed.append((stream.name, txn))

    def _set_aside(self, refused: Sequence[tuple[Row, str]]) -> None:
        """Called in the store's thread while the commit waits for it; a retried commit does not append again."""
        self._gatherer.group.set_aside(self._directory, refused)
        self._refused.update(id(row) for row, _ in refused)

    def _measure(self) -> None:
        now = self._clock.monotonic()
        if now >= self._next_gauge:
            self._next_gauge = now + GAUGE_S
            self._spool_bytes.set(self._gatherer.waiting_bytes())
            self._tally.measure(self._gatherer.requeue_bytes())

    async def _open_store(self) -> None:
        await self._store.open()
        self._is_open = True

    def _on_works(self) -> None:
        self._trouble.on_success()
        if self._desk is not None:
            self._desk.is_failing = False

    def _on_failure(self, error: Exception) -> None:
        self._is_open = False
        if self._desk is not None:
            self._desk.fail()
        waiting = self._gatherer.waiting_bytes()
        self._spool_bytes.set(waiting)
        left_s = self._time_left() if self._stop.is_set() else None
        rows = len(self._gatherer.group.batch.rows)
        self._pause_s = self._trouble.on_failure(error, left_s, rows, waiting)

    async def _pause_after_failure(self) -> bool:
        """Waits before the next try; False when a stop's time is up: what is not stored stays in the spool."""
        if self._pause_s is None:
            tell_left(self._directory, self._gatherer.streams, len(self._gatherer.group.batch.rows), self._log)
            return False
        self._measure()  # nothing is stored meanwhile, but the spool grows
        if self._stop.is_set():
            await asyncio.sleep(self._pause_s)
        else:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), self._pause_s)
        return True
