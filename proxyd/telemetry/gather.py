"""Reads every spool stream into the group that is stored next.

It is long because the group and who fills it change in one step, or neither does.

Owns: the streams, the group being gathered, files that are no segments, the removal of consumed ones. Must not know:
the store's connection, retries, when a group is due.
Invariants:
- What a stream handed out is in the group: a failing read leaves both as they were before the record that failed.
- A stream takes at most one step (next segment, end) a group, so what the group must carry is what the stream has open.
- No stream keeps another waiting: of a group's room each has its share, what one leaves goes to those that have more,
  and re-queued rows have theirs.
- A stream that ended in this process's life is never read again, even if its files could not be removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxyd.clock import Clock
from proxyd.store.schema import Batch, Cursor, OpenTransaction, Row, Store
from proxyd.telemetry.deadletter import DeadLetter, append_dead_letters
from proxyd.telemetry.reader import Moved, Phase, Stream
from proxyd.telemetry.record import Final
from proxyd.telemetry.recovery import adopt, remove_if_empty, remove_segments, sync_directory
from proxyd.telemetry.requeue import REQUEUE_ROWS, Requeue, identity, is_held, is_past, is_requeue
from proxyd.telemetry.segment import directory_bytes, list_files, segment_name
from proxyd.telemetry.spoolio import SpoolLog

# How often an idle stream's lock is tried: what a dead worker left open becomes rows at most this much later.
PROBE_S = 0.25
TELL_AGAIN_S = 60.0


@dataclass(slots=True)
class Group:
    """What is gathered for one commit. `since` is the monotonic time of its first row.

    `batch.rows` begins with the finals, of which `accepted_at` has a time each; behind them stand interrupted and
    re-queued rows, which are put there when the group is stored.
    """

    batch: Batch = field(default_factory=Batch)
    touched: dict[str, Stream] = field(default_factory=dict)
    moved: list[tuple[Stream, Moved]] = field(default_factory=list)
    ended: list[tuple[Stream, Moved]] = field(default_factory=list)
    accepted_at: list[float] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)  # their request ids
    since: float | None = None
    requeue: Requeue | None = None  # the file that was read for this group
    requeued: list[Row] = field(default_factory=list)  # its rows, not looked up yet
    passed_over: list[Row] = field(default_factory=list)  # those of them that seem to be stored
    _requeued_at: int | None = None  # where its rows begin
    _origins: list[tuple[int, str]] = field(default_factory=list)  # (first row, stream), ascending
    _aside: dict[int, Row] = field(default_factory=dict)  # the rows that are dead letters already, by id()

    @property
    def must_commit(self) -> bool:
        """True when there is more than rows in it, which waits for no company."""
        return bool(self.moved or self.ended or self.batch.forgotten or self.requeue is not None)

    def begin(self, stream: str) -> None:
        """The rows added from now on are this stream's."""
        if not self._origins or self._origins[-1][1] != stream:
            self._origins.append((len(self.batch.rows), stream))

    async def take_requeued(self, store: Store) -> None:
        """Adds the re-queued rows that are neither stored nor in the group. Raises StoreError; then go on with another
        call."""
        if self.requeue is None or not self.requeued:
            return
        self.begin(self.requeue.name)
        rows = self.batch.rows
        if self._requeued_at is None:
            self._requeued_at = len(rows)
        streams, letters = set(map(identity, rows[: self._requeued_at])), set(rows[self._requeued_at :])
        while self.requeued:
            row = self.requeued[0]
            if identity(row) in streams or row in letters or await is_held(store, row):
                self.passed_over.append(row)
            else:
                rows.append(row)
                letters.add(row)
            del self.requeued[0]
        self.requeue.keep_passed_over(self.passed_over)

    def set_aside(self, directory: Path, refused: Sequence[tuple[Row, str]]) -> None:
        """Makes dead letters of rows of this group that are none yet: a commit may be tried more than once."""
        fresh = [(row, reason) for row, reason in refused if id(row) not in self._aside]
        if not fresh:
            return
        origins = self.streams_of_rows()
        cursors = self.batch.cursors
        append_dead_letters(
            directory, [DeadLetter(row, reason, cursors.get(origins.get(id(row), ""))) for row, reason in fresh]
        )
        self._aside.update((id(row), row) for row, _ in fresh)

    def streams_of_rows(self) -> dict[int, str]:
        """The stream that each row came from, by the row's id()."""
        found: dict[int, str] = {}
        rows, ends = self.batch.rows, [first for first, _ in self._origins[1:]]
        for (first, stream), end in zip(self._origins, [*ends, len(rows)], strict=True):
            found.update((id(row), stream) for row in rows[first:end])
        return found

    def complete(self) -> None:
        """Adds the cursors, and what is to be carried of the streams that left a segment. Idempotent."""
        batch = self.batch
        batch.cursors = {
            name: Cursor(name, stream.sequence, stream.position, stream.phase is Phase.ENDED)
            for name, stream in self.touched.items()
        }
        if self.requeue is not None:
            batch.cursors[self.requeue.name] = self.requeue.cursor
        batch.carried = [
            OpenTransaction(stream.name, txn, opened.intent, opened.checkpoint)
            for stream, _ in self.moved
            for txn, opened in stream.open.items()
        ]


class Gatherer:
    """All streams of one spool directory."""

    __slots__ = (
        "_blocked", "_clock", "_directory", "_finished", "_kept", "_limit", "_log", "_next_probe", "_rejected",
        "_requeues", "_turn", "_unreadable", "forget", "group", "streams",
    )  # fmt: skip

    def __init__(self, directory: Path, limit: int, log: SpoolLog, clock: Clock) -> None:
        self._directory, self._limit, self._log, self._clock = directory, limit, log, clock
        self.streams: dict[str, Stream] = {}
        self._requeues: dict[str, Requeue] = {}
        self.group = Group()
        # Ended streams without files, whose cursors the next commit may delete.
        self.forget: list[str] = []
        # Streams whose files could not be read when they were to be taken up: what the store has of them.
        self._blocked: dict[str, tuple[Cursor | None, Sequence[OpenTransaction]]] = {}
        self._rejected: set[str] = set()
        self._finished: set[str] = set()
        self._kept: set[str] = set()
        self._next_probe = 0.0
        self._turn = 0  # which stream is read first
        # What could not be read, why, and when that is told again.
        self._unreadable: dict[str, tuple[str, float]] = {}

    def adopt(
        self, name: str, sequences: Sequence[int], cursor: Cursor | None, carried: Sequence[OpenTransaction]
    ) -> None:
        """Takes a stream up at its cursor; what the cursor says is stale goes. A repeated call starts it over.

        One that cannot be read now is tried again by each gather, and keeps nobody else waiting.
        """
        try:
            if is_requeue(name):
                self._adopt_requeue(name, cursor)
            else:
                self._adopt(name, sequences, cursor, carried)
        except OSError as error:
            self._blocked[name] = cursor, carried
            self._tell_unreadable(name, cursor.segment if cursor is not None else 0, str(error))

    def _adopt(
        self, name: str, sequences: Sequence[int], cursor: Cursor | None, carried: Sequence[OpenTransaction]
    ) -> None:
        known = self.streams.pop(name, None)
        if known is not None:
            known.close()
        if cursor is not None and cursor.finished:
            self._finished.add(name)
            remove_segments(self._directory, name, sequences)
            sync_directory(self._directory)
            self.forget.append(name)
            return
        stream = adopt(self._directory, name, sequences, cursor, carried)
        if stream is None:
            for sequence in sequences:
                self._reject(segment_name(name, sequence))
            return
        if cursor is not None:
            remove_segments(self._directory, name, [number for number in sequences if number < cursor.segment])
            if stream.is_short:
                self._log.error(
                    "spool_shorter_than_stored", stream=name, segment=cursor.segment, position=cursor.position
                )
        expected = range(cursor.segment if cursor is not None else 1, stream.sequence)
        self._tell_missing(name, [sequence for sequence in expected if sequence not in sequences])
        self.streams[name] = stream

    def _tell_missing(self, name: str, sequences: Sequence[int]) -> None:
        """Segments go only once the stream has left them; so these were taken away, or are in another store."""
        if sequences:
            self._log.error("spool_segments_missing", stream=name, first=sequences[0], segments=len(sequences))

    def _adopt_requeue(self, name: str, cursor: Cursor | None) -> None:
        requeue = Requeue(self._directory, name, cursor.position if cursor is not None else 0)
        if cursor is not None and cursor.finished:
            self._finished.add(name)
            requeue.path.unlink(missing_ok=True)
            sync_directory(self._directory)
            self.forget.append(name)
            return
        self._requeues[name] = requeue

    def _reject(self, name: str) -> None:
        """A file that is no segment we can read: reported once and left alone, or removed if it is ours and empty."""
        if name in self._rejected:
            return
        if name.endswith(".spool") and remove_if_empty(self._directory / name):
            self._log.warning("spool_empty_segment_removed", file=name)
            return
        self._rejected.add(name)
        self._log.warning("spool_foreign_file", file=name, directory=str(self._directory))

    def gather(self, is_stopping: bool) -> bool:
        """Reads what the streams hold now into the group; True when there was nothing. Blocking: a segment a stream."""
        # Listed first: a successor seen here was made before the reads below, so its predecessor is complete by then.
        listing, foreign, requeues = list_files(self._directory)
        for name in foreign:
            self._reject(name)
        for name in (listing.keys() | self._blocked.keys()) - self.streams.keys() - self._finished:
            sequences = listing.get(name, [])
            known = self._blocked.pop(name, None)
            if known is not None:
                self.adopt(name, sequences, *known)
            elif any(segment_name(name, sequence) not in self._rejected for sequence in sequences):
                self.adopt(name, sequences, None, [])
        now = self._clock.monotonic()
        is_probe_due = is_stopping or now >= self._next_probe
        if is_probe_due:
            self._next_probe = now + PROBE_S
        for name in requeues:
            if name not in self._requeues and name not in self._finished:
                self._adopt_requeue(name, None)
        has_read = self._read_streams(listing, is_probe_due)
        if self._requeues and self.group.requeue is None:
            has_read |= self._read_requeue(min(self._requeues))
        return not has_read

    def _read_streams(self, listing: Mapping[str, Sequence[int]], is_probe_due: bool) -> bool:
        """True when any stream moved. Whoever has more than its share takes what the others left."""
        rows, limit = self.group.batch.rows, self._limit
        if self._requeues and self.group.requeue is None:
            limit -= min(REQUEUE_ROWS, limit // 2)
        stepped = {id(stream) for stream, _ in self.group.moved}  # one step a commit
        names = [name for name, one in self.streams.items() if one.phase is not Phase.ENDED and id(one) not in stepped]
        if not names:
            return False
        self._turn = (self._turn + 1) % len(names)
        has_read, share, more = False, max(1, (limit - len(rows)) // len(names)), []
        for name in names[self._turn :] + names[: self._turn]:
            room = min(limit, len(rows) + share)
            has_read |= self._try_read(name, listing, is_probe_due, room)
            if len(rows) >= room:
                more.append(name)
        for name in more:
            if len(rows) < limit:
                has_read |= self._try_read(name, listing, is_probe_due, limit)
        return has_read

    def _try_read(self, name: str, listing: Mapping[str, Sequence[int]], is_probe_due: bool, limit: int) -> bool:
        stream = self.streams[name]
        try:
            has_read = self._read(name, stream, listing.get(name, []), is_probe_due, limit)
        except OSError as error:
            self._tell_unreadable(name, stream.sequence, str(error))
            return False
        self._unreadable.pop(name, None)
        return has_read

    def _tell_unreadable(self, name: str, segment: int, reason: str) -> None:
        """Once, and again each minute while it lasts: an idle process looks twenty times a second."""
        now = self._clock.monotonic()
        told, again_at = self._unreadable.get(name, ("", 0.0))
        if reason != told or now >= again_at:
            self._unreadable[name] = reason, now + TELL_AGAIN_S
            self._log.error("spool_unreadable", stream=name, segment=segment, reason=reason)

    def _is_settled(self, origin: Cursor) -> bool:
        return origin.stream not in self._blocked and is_past(self.streams, self._requeues, origin)

    def _read_requeue(self, name: str) -> bool:
        """True when a step was taken in this file of dead letters."""
        group, requeue = self.group, self._requeues[name]
        limit = min(REQUEUE_ROWS, self._limit - len(group.batch.rows))
        if limit <= 0:
            return False
        try:
            rows = requeue.take(self._is_settled, self._log, limit)
        except OSError as error:
            self._tell_unreadable(name, 1, str(error))
            return False
        self._unreadable.pop(name, None)
        if rows is None:
            return False
        group.requeue, group.requeued = requeue, rows
        if rows and group.since is None:
            group.since = self._clock.monotonic()
        return True

    def _read(self, name: str, stream: Stream, known: Sequence[int], is_probe_due: bool, limit: int) -> bool:
        """Takes rows until the group has `limit`, or a step; True when the stream moved or may have more."""
        group = self.group
        before = stream.position
        try:
            while len(group.batch.rows) < limit:
                frame = stream.next_frame()
                if frame is None:
                    break
                final = stream.apply(frame)
                if final is not None:
                    self._add(stream, final)
            else:
                return True
        finally:
            # Also when a read failed: rows without the cursor that covers them would be stored again by a successor.
            if stream.position != before:
                group.touched[name] = stream
        moved = stream.leave(known)
        if moved is not None:
            group.moved.append((stream, moved))
            group.touched[name] = stream
            return True
        if stream.phase is Phase.ABANDONED:
            group.ended.append((stream, stream.end()))
            group.touched[name] = stream
            return True
        if is_probe_due and stream.is_writer_gone():
            stream.transition(Phase.ABANDONED)
            return True
        return stream.position != before

    def _add(self, stream: Stream, final: Final) -> None:
        group = self.group
        group.begin(stream.name)
        if stream.end_transaction(final.txn):
            group.batch.closed.append((stream.name, final.txn))
        group.batch.rows.append(Row(*final[1:-1]))
        group.accepted_at.append(final.accepted_at)
        if group.since is None:
            group.since = self._clock.monotonic()

    def waiting_bytes(self) -> int:
        """Bytes in the spool that are not read yet; the stored part of a live segment waits for nothing."""
        read = sum(stream.position for stream in self.streams.values() if stream.phase is not Phase.ENDED)
        return max(0, directory_bytes(self._directory) - read) + self.requeue_bytes()

    def requeue_bytes(self) -> int:
        """Bytes of dead letters that are to be stored again."""
        return sum(requeue.left_bytes() for requeue in self._requeues.values())

    def on_stored(self, group: Group) -> None:
        """After the group's commit: removes the files that it left behind, and the ended streams."""
        for stream, _ in group.moved:
            for opened in stream.open.values():
                opened.carried = True
        for stream, moved in (*group.moved, *group.ended):
            self._remove(stream, moved)
        for stream, _ in group.ended:
            del self.streams[stream.name]
            self._finished.add(stream.name)
        if group.requeue is not None and group.passed_over:
            file = str(group.requeue.skipped_path)
            self._log.warning("requeue_passed_over", rows=len(group.passed_over), file=file)
        if group.requeue is not None and group.requeue.is_ended:
            self._remove_requeue(group.requeue)

    def _remove_requeue(self, requeue: Requeue) -> None:
        del self._requeues[requeue.name]
        self._finished.add(requeue.name)
        try:
            requeue.path.unlink(missing_ok=True)
            sync_directory(self._directory)
        except OSError as error:
            # As for a stream: the cursor says that the file is stale, and the next start removes it.
            self._log.error("spool_not_removed", stream=requeue.name, reason=str(error))
            return
        self._log.info("requeue_ended", file=requeue.path.name)
        self.forget.append(requeue.name)

    def _remove(self, stream: Stream, moved: Moved) -> None:
        cut = moved.cut
        if cut is not None:
            log = self._log.error if cut.is_damage else self._log.warning
            log("spool_tail_cut", stream=stream.name, segment=cut.segment, position=cut.position, bytes=cut.bytes)
        if moved.skipped_bytes:
            self._log.error(
                "spool_records_missing", stream=stream.name, segment=stream.sequence, bytes=moved.skipped_bytes
            )
        self._tell_missing(stream.name, moved.missing)
        for sequence in moved.unreadable:
            self._log.error("spool_segment_damaged", file=segment_name(stream.name, sequence))
        if stream.skipped_records:
            self._log.error("spool_records_unknown", stream=stream.name, records=stream.skipped_records)
            stream.skipped_records = 0
        try:
            damaged = [*moved.unreadable, *([cut.segment] if cut is not None and cut.is_damage else [])]
            remove_segments(self._directory, stream.name, [*moved.done_with, *moved.unreadable], damaged)
            if stream.phase is Phase.ENDED:
                sync_directory(self._directory)
        except OSError as error:
            # The cursor says that they are stale, and the next start removes them; so the cursor must stay till then.
            self._kept.add(stream.name)
            self._log.error("spool_not_removed", stream=stream.name, reason=str(error))
            return
        if stream.phase is Phase.ENDED and stream.name not in self._kept:
            self.forget.append(stream.name)

    def close(self) -> None:
        for stream in self.streams.values():
            stream.close()
