"""Dead letters that are stored again: each exactly once, whoever is killed whenever, whatever stands in the file.

This file is long because each way of being killed and each kind of line is a case of one table of promises.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from proxyd.store.schema import Batch, Cursor, Row, SetAside, StoreError
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.deadletter import (
    MAX_LINE_BYTES,
    DeadLetter,
    LineCount,
    append_dead_letters,
    newest_first,
    parse_line,
)
from proxyd.telemetry.gather import Gatherer
from proxyd.telemetry.requeue import REQUEUE_ROWS, is_requeue, new_requeue_path
from proxyd.telemetry.segment import DEAD_LETTERS
from proxyd.telemetry.writer import Settings, Writer
from tests.unit.telemetry.world import World, final, intent

REFUSE = """CREATE TRIGGER refuse BEFORE INSERT ON sys_ai_transactions WHEN NEW.request_id LIKE 'bad%'
BEGIN SELECT RAISE(ABORT, 'no such tenant'); END"""


class Killed(BaseException):
    """Stands for kill -9."""


class Faulty(SqliteStore):
    """A store whose n-th commit ends before, in the middle of (the dead letters are on disk) or after what it does."""

    __slots__ = ("_at", "_failure", "_when", "count")

    def __init__(
        self, world: World, at: int = 0, when: str = "", failure: Callable[[], BaseException] = Killed
    ) -> None:
        super().__init__(world.database, "os")
        self._at, self._when, self._failure, self.count = at, when, failure, 0

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        self.count += 1
        is_due = self.count == self._at

        def cut(refused: Sequence[tuple[Row, str]]) -> None:
            set_aside(refused)
            if is_due and self._when == "aside":
                raise self._failure()

        if is_due and self._when == "before":
            raise self._failure()
        refused = await super().commit(batch, cut)
        if is_due and self._when == "after":
            raise self._failure()
        return refused


def live(world: World, store: SqliteStore, batch_rows: int = 10) -> None:
    """A telemetry process from its start until all is drained or it is killed."""

    async def life() -> None:
        stop = asyncio.Event()
        stop.set()
        await Writer(world.spool, store, Settings(0.0, batch_rows, 0.0), world.metrics, world.log, stop).serve()

    asyncio.run(life())


def refuse(world: World) -> None:
    world.drain()
    world.query(REFUSE)


def heal(world: World) -> None:
    world.query("DROP TRIGGER refuse")


def write(world: World, count: int = 12) -> set[str]:
    """A dead writer's records, every third of them of the kind that the store refuses; one has no end."""
    names = {f"bad{n}" if n % 3 == 0 else f"r{n}" for n in range(1, count + 1)}
    spool = world.writer()
    for n in range(1, count + 1):
        name = f"bad{n}" if n % 3 == 0 else f"r{n}"
        spool.intent(intent(n, name))
        if n != 3:
            spool.final(final(n, name))
    spool.flush()
    world.die(spool)
    return names


def retry(world: World) -> Path | None:
    path = new_requeue_path(world.spool)
    try:
        os.rename(world.spool / DEAD_LETTERS, path)
    except FileNotFoundError:
        return None
    return path


def files(world: World) -> list[str]:
    """What is left but the record of letters that were stored already."""
    return [name for name in world.files() if not name.endswith(".skipped")]


def letters(world: World) -> list[str]:
    return [parse_line(line).row.request_id for line in newest_first(world.spool / DEAD_LETTERS, 1000)]


def stored(world: World) -> Counter[str]:
    return Counter(row[0] for row in world.rows())


def test_a_letter_is_stored_once_the_store_takes_it_and_its_file_and_cursor_go(world: World) -> None:
    refuse(world)
    names = write(world)
    world.drain()
    assert letters(world) == ["bad3", "bad12", "bad9", "bad6"]  # the one without an end came last
    heal(world)
    retry(world)
    world.drain()
    assert stored(world) == Counter(names)
    assert world.files() == []
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []
    assert world.log.named("requeue_ended")
    assert ("bad3", "interrupted", 0, 1) in world.rows()
    assert world.query("SELECT user_id, tenant, created_at FROM sys_ai_transactions WHERE request_id = 'bad6'") == [
        (42, "acme", "2023-11-14 22:13:20")
    ]


def test_a_letter_that_is_refused_again_is_a_letter_again(world: World) -> None:
    refuse(world)
    write(world)
    world.drain()
    before = sorted(letters(world))
    retry(world)
    world.drain()
    assert sorted(letters(world)) == before
    assert world.files() == [DEAD_LETTERS]


@pytest.mark.parametrize("when", ["before", "aside", "after"])
@pytest.mark.parametrize("at", range(1, 8))
def test_killed_at_any_commit_while_letters_come_and_are_retried_nothing_is_lost_or_doubled(
    world: World, at: int, when: str
) -> None:
    refuse(world)
    names = write(world)
    try:
        live(world, Faulty(world, at, when), batch_rows=5)
    except Killed:
        pass
    heal(world)
    retry(world)  # some letters' records may still be in the spool, before their cursor
    try:
        live(world, Faulty(world, at, when), batch_rows=5)
    except Killed:
        retry(world)
    live(world, Faulty(world))
    retry(world)
    live(world, Faulty(world))
    assert stored(world) == Counter(names)
    assert files(world) == []
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


@pytest.mark.parametrize("when", ["before", "aside", "after"])
@pytest.mark.parametrize("at", range(1, 8))
def test_a_commit_of_unknown_outcome_neither_loses_nor_doubles_a_letter(world: World, at: int, when: str) -> None:
    refuse(world)
    names = write(world)
    live(world, Faulty(world, at, when, lambda: StoreError("connection lost")), batch_rows=5)
    assert sorted(letters(world)) == ["bad12", "bad3", "bad6", "bad9"]
    retry(world)
    live(world, Faulty(world, at, when, lambda: StoreError("connection lost")), batch_rows=2)
    assert sorted(letters(world)) == ["bad12", "bad3", "bad6", "bad9"]
    heal(world)
    retry(world)
    live(world, Faulty(world, at, when, lambda: StoreError("connection lost")), batch_rows=2)
    assert stored(world) == Counter(names)


def test_a_rename_under_an_append_loses_no_letter(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(world)
    names = write(world)
    renamed = []
    real_write = os.write

    def write_after_rename(fd: int, data: bytes) -> int:
        """The file is open under its old name; then it is renamed, and what is appended goes to the new one."""
        if data.startswith(b'{"row"'):
            renamed.append(retry(world))
        return real_write(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr("proxyd.telemetry.deadletter.os.write", write_after_rename)
        with pytest.raises(Killed):
            live(world, Faulty(world, 2, "after"), batch_rows=10)
    assert renamed
    assert all(renamed)
    heal(world)
    live(world, Faulty(world))
    retry(world)
    live(world, Faulty(world))
    assert stored(world) == Counter(names)
    assert files(world) == []


def test_lines_that_hold_no_row_are_set_aside_and_the_others_stored(world: World) -> None:
    refuse(world)
    names = write(world)
    world.drain()
    heal(world)
    path = retry(world)
    assert path is not None
    lines = path.read_bytes().splitlines()
    edited = json.loads(lines[0])
    edited["row"]["tenant"] = 7
    long = b'{"row": "' + b"x" * (5 * MAX_LINE_BYTES) + b'"}'
    path.write_bytes(
        b"\n".join([b"not JSON", lines[0], b"[]", b"", json.dumps(edited).encode(), long, *lines[1:], lines[0][:50]])
    )
    world.drain()
    assert stored(world) == Counter(names)
    bad = world.spool / (path.name + ".bad")
    assert world.files() == [bad.name]
    told = world.log.named("requeue_lines_bad")
    assert told[0]["reason"] == "not JSON"
    assert told[0]["file"] == str(bad)
    kept = bad.read_bytes().splitlines()
    assert (kept[0], kept[1], kept[-1]) == (b"not JSON", b"[]", lines[0][:50])
    assert json.dumps(edited).encode() in kept
    world.drain()
    assert world.log.named("spool_foreign_file") == []


def test_a_corrected_line_without_a_line_end_is_stored(world: World) -> None:
    append_dead_letters(world.spool, [DeadLetter(Row(*final(1, user_id=2**64 - 1)[1:-1]), "too large", None)])
    path = retry(world)
    assert path is not None
    path.write_bytes(path.read_bytes().replace(str(2**64 - 1).encode(), b"4092").strip())
    world.drain()
    assert world.query("SELECT user_id, request_id FROM sys_ai_transactions") == [(4092, "r1")]


def test_a_value_that_the_store_cannot_even_be_asked_for_is_refused_again_and_holds_nothing_up(world: World) -> None:
    append_dead_letters(world.spool, [DeadLetter(Row(*final(1, user_id=2**64)[1:-1]), "too large", None)])
    retry(world)
    world.drain()
    assert letters(world) == ["r1"]
    assert world.files() == [DEAD_LETTERS]


def test_more_letters_than_fit_a_group_are_all_stored(world: World) -> None:
    count = 2 * REQUEUE_ROWS + 7
    rows = [Row(*final(n)[1:-1]) for n in range(count)]
    append_dead_letters(world.spool, [DeadLetter(row, "no", None) for row in rows])
    append_dead_letters(world.spool, [DeadLetter(row, "no", None) for row in rows[:5]])
    retry(world)
    world.drain()
    assert stored(world) == Counter(f"r{n}" for n in range(count))


def test_a_file_that_was_taken_away_is_forgotten(world: World) -> None:
    world.drain()
    world.query("INSERT INTO sys_ai_spool_offsets VALUES ('requeue-0123456789abcdef', 1, 200, 0)")
    world.drain()
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


def test_a_file_whose_cursor_is_finished_is_stale(world: World) -> None:
    world.drain()
    append_dead_letters(world.spool, [DeadLetter(Row(*final(1)[1:-1]), "no", None)])
    path = retry(world)
    assert path is not None
    name = path.name.removesuffix(".jsonl")
    assert is_requeue(name)
    world.query(f"INSERT INTO sys_ai_spool_offsets VALUES ('{name}', 1, 1, 1)")
    world.drain()
    assert (world.files(), world.rows()) == ([], [])
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


def test_a_letter_waits_for_the_stream_that_still_has_its_record(world: World) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    row = Row(*final(1)[1:-1])
    append_dead_letters(world.spool, [DeadLetter(row, "no", Cursor(spool.stream, 1, 10_000, False))])
    retry(world)
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    gatherer.gather(False)
    gatherer.gather(False)
    assert gatherer.group.requeue is None
    assert gatherer.requeue_bytes() > 0
    gatherer.close()
    world.die(spool)
    world.drain()
    assert stored(world) == Counter(["r1"])
    assert files(world) == []


def test_a_file_that_cannot_be_read_is_told_once_a_minute_and_holds_nothing_up(world: World) -> None:
    (world.spool / "requeue-0123456789abcdef.jsonl").mkdir()
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    for _ in range(5):
        gatherer.gather(False)
    assert len(world.log.named("spool_unreadable")) == 1
    world.clock.advance(61.0)
    gatherer.gather(False)
    assert len(world.log.named("spool_unreadable")) == 2
    gatherer.close()


def test_an_append_after_a_torn_line_begins_a_line_of_its_own(world: World) -> None:
    path = world.spool / DEAD_LETTERS
    letter = DeadLetter(Row(*final(1)[1:-1]), "no", Cursor("s", 1, 2, False))
    path.write_bytes(b'{"row": {"user')
    append_dead_letters(world.spool, [letter])
    torn, whole = path.read_bytes().splitlines()
    assert torn == b'{"row": {"user'
    assert parse_line(whole) == letter


def test_lines_are_counted_as_the_file_grows_and_anew_when_it_is_another(world: World) -> None:
    path = world.spool / DEAD_LETTERS
    count = LineCount(path)
    assert count.count() == 0
    letter = DeadLetter(Row(*final(1)[1:-1]), "no", None)
    append_dead_letters(world.spool, [letter, letter])
    assert count.count() == 2
    append_dead_letters(world.spool, [letter])
    assert count.count() == 3
    retry(world)
    assert count.count() == 0
    append_dead_letters(world.spool, [letter])
    assert count.count() == 1


@pytest.mark.parametrize("length", [10, 300_000])
def test_the_newest_lines_come_first_however_long_they_are(world: World, length: int) -> None:
    path = world.spool / DEAD_LETTERS
    path.write_bytes(b"".join(b"%d" % n + b"x" * min(length, MAX_LINE_BYTES - 2) + b"\n" for n in range(40)))
    assert [line[:2].strip(b"x") for line in newest_first(path, 30)] == [b"%d" % n for n in range(39, 9, -1)]
    assert list(newest_first(world.spool / "nowhere", 5)) == []


def test_letters_of_one_user_second_and_request_id_are_all_stored_and_one_like_a_stored_row_is_told_and_kept(
    world: World,
) -> None:
    rows = [Row(*final(n, "same", duration_ms=n)[1:-1]) for n in range(1, 5)]
    append_dead_letters(world.spool, [DeadLetter(row, "no", None) for row in [*rows, rows[0]]])
    path = retry(world)
    assert path is not None
    world.drain()
    assert world.query("SELECT duration_ms FROM sys_ai_transactions ORDER BY 1") == [(1,), (2,), (3,), (4,)]
    append_dead_letters(world.spool, [DeadLetter(rows[1]._replace(duration_ms=9), "no", None)])
    later = retry(world)
    assert later is not None
    world.drain()
    kept = [world.spool / f"{one.name}.skipped" for one in (path, later)]
    assert [parse_line(one.read_bytes()).row.duration_ms for one in kept] == [1, 9]
    assert world.log.named("requeue_passed_over") == [{"rows": 1, "file": str(one)} for one in kept]
    assert world.files() == sorted(one.name for one in kept)
