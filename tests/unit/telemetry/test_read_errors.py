"""Files of the spool that cannot be read or are not there: told, tried again, and in nobody's way."""

from __future__ import annotations

import errno
import os

import pytest

from proxyd.store.schema import Cursor, Row
from proxyd.telemetry.deadletter import DeadLetter, append_dead_letters
from proxyd.telemetry.gather import Gatherer
from proxyd.telemetry.requeue import new_requeue_path
from proxyd.telemetry.segment import DEAD_LETTERS, HEADER_BYTES, segment_name
from tests.unit.telemetry.world import World, final, intent


class Unreadable:
    """os.open or os.pread of one stream's files fails while `is_on`."""

    def __init__(self, call: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_on = True
        real_open, real_pread = os.open, os.pread

        def fail_open(path: object, *arguments: object, **more: object) -> int:
            if self.is_on and call == "open" and name in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real_open(path, *arguments, **more)  # type: ignore[arg-type]

        def fail_pread(fd: int, size: int, position: int) -> bytes:
            if self.is_on and call == "pread" and name in os.readlink(f"/proc/self/fd/{fd}"):
                raise OSError(errno.EIO, "Input/output error")
            return real_pread(fd, size, position)

        monkeypatch.setattr("proxyd.telemetry.reader.os.open", fail_open)
        monkeypatch.setattr("proxyd.telemetry.reader.os.pread", fail_pread)


@pytest.mark.parametrize("call", ["open", "pread"])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_stream_that_cannot_be_read_keeps_no_other_waiting_and_goes_on_where_it_was(
    world: World, monkeypatch: pytest.MonkeyPatch, call: str, is_known: bool
) -> None:
    bad, good = world.writer("os"), world.writer("os")
    bad.intent(intent(1))
    bad.final(final(2, "before"))
    bad.flush()
    if is_known:
        world.gather_once()  # the store has a cursor in the middle of it
    bad.final(final(1, "after"))
    good.final(final(1, "good"))
    world.turn()
    bad.close()
    good.close()
    fault = Unreadable(call, bad.stream, monkeypatch)
    world.drain(drain_s=0.2)
    assert {row[0] for row in world.rows()} == ({"before", "good"} if is_known else {"good"})
    (told,) = world.log.named("spool_unreadable")
    assert told["stream"] == bad.stream
    fault.is_on = False
    world.drain()
    assert sorted(row[0] for row in world.rows()) == ["after", "before", "good"]
    assert world.files() == []
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


def test_a_stream_that_can_be_read_again_is_taken_up_by_the_same_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    fault = Unreadable("open", spool.stream, monkeypatch)
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    cursor = Cursor(spool.stream, 1, HEADER_BYTES + len(world.final_frame(1)), False)
    gatherer.adopt(spool.stream, [1], cursor, [])
    gatherer.gather(False)
    gatherer.gather(False)
    assert gatherer.streams == {}
    assert len(world.log.named("spool_unreadable")) == 1
    fault.is_on = False
    spool.final(final(2))
    world.turn()
    gatherer.gather(False)
    assert [row.request_id for row in gatherer.group.batch.rows] == ["r2"]
    gatherer.close()


def test_a_dead_letter_waits_for_its_stream_while_that_cannot_be_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    spool.close()
    letter = DeadLetter(Row(*final(1)[1:-1]), "no", Cursor(spool.stream, 1, HEADER_BYTES + 10, False))
    append_dead_letters(world.spool, [letter])
    (world.spool / DEAD_LETTERS).rename(new_requeue_path(world.spool))
    fault = Unreadable("open", spool.stream, monkeypatch)
    world.drain(drain_s=0.2)
    assert world.rows() == []
    fault.is_on = False
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1"]
    assert [name for name in world.files() if not name.endswith(".skipped")] == []


def test_segments_missing_in_the_middle_are_told_and_the_others_stored(world: World) -> None:
    spool = world.writer("os", segment_bytes=50)
    for txn in range(1, 7):
        spool.final(final(txn))
        world.turn()
    spool.close()
    for sequence in (3, 4):
        (world.spool / segment_name(spool.stream, sequence)).unlink()
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1", "r2", "r5", "r6"]
    assert world.log.named("spool_segments_missing") == [{"stream": spool.stream, "first": 3, "segments": 2}]


def test_segments_that_are_gone_because_they_are_stored_are_not_missed(world: World) -> None:
    spool = world.writer("os", segment_bytes=50)
    for txn in range(1, 4):
        spool.final(final(txn))
        world.turn()
    world.gather_once()
    world.gather_once()
    spool.final(final(4))
    spool.close()
    world.drain()
    assert len(world.rows()) == 4
    assert world.log.named("spool_segments_missing") == []
