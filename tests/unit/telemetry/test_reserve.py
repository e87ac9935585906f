"""Room that is reserved ahead on disk: new work is refused when there is no more, and those who run are written."""

from __future__ import annotations

import errno
import os

import pytest

from proxyd.telemetry.reserve import AHEAD_BYTES, LOW
from proxyd.telemetry.segment import HEADER_BYTES
from tests.unit.telemetry.test_spool import begin, segments
from tests.unit.telemetry.world import Disk, World, final


def used_blocks(world: World) -> int:
    return sum(path.stat().st_blocks * 512 for path in world.spool.iterdir())


def test_room_is_reserved_ahead_without_lengthening_the_file_and_given_back_at_the_end(world: World) -> None:
    disk = Disk()
    spool = world.writer("os", disk)
    begin(spool, 1)
    world.turn()
    (path,) = world.spool.iterdir()
    assert disk.reserved == [(HEADER_BYTES, AHEAD_BYTES)]
    assert path.stat().st_size == HEADER_BYTES + len(world.intent_frame(1))
    assert used_blocks(world) >= AHEAD_BYTES
    spool.close()
    assert used_blocks(world) < 64 * 1024
    world.drain()
    assert len(world.rows()) == 1


def test_a_reservation_is_renewed_each_eighth_and_not_each_turn(world: World) -> None:
    disk = Disk()
    spool = world.writer("os", disk)
    while spool._whole < AHEAD_BYTES:
        for _ in range(200):
            spool.final(final(1))
        world.turn()
    assert 7 <= len(disk.reserved) <= 10


def test_when_no_room_is_left_to_reserve_new_work_is_refused_and_those_who_run_are_written(world: World) -> None:
    disk = Disk()
    spool = world.writer(disk=disk)
    disk.room = 0
    refused_at = None
    for txn in range(1, 100_000):
        begin(spool, txn)
        world.turn()
        if spool.broken_reason is not None:
            refused_at = txn
            break
    assert refused_at is not None
    assert spool.broken_reason == "reserve: No space left on device"
    before = len(disk.written)
    for txn in range(1, refused_at + 1):
        spool.final(final(txn))
        world.turn()
    assert (len(disk.written) - before, spool.pending_records) == (refused_at, 0)
    assert len(world.log.named("spool_broken")) == 1
    disk.room = None
    spool.tick()
    assert spool.broken_reason is None
    assert world.log.named("spool_mended")[0]["reason"] == "reserve: No space left on device"
    spool.close()
    world.drain()
    assert {row[1] for row in world.rows()} == {"completed"}


def test_a_disk_too_full_for_a_next_segment_leaves_the_reserved_room_of_this_one_to_those_who_run(
    world: World,
) -> None:
    disk = Disk()
    spool = world.writer("os", disk, segment_bytes=2000)
    for txn in range(1, 26):
        begin(spool, txn)
    world.turn()
    disk.room = 0
    for txn in range(1, 26):
        spool.final(final(txn))
        world.turn()
        assert spool.pending_records == 0
        spool.tick()
    assert spool.broken_reason is not None
    assert len(segments(world)) == 1
    assert [line["reason"].partition(":")[0] for line in world.log.named("spool_broken")] == ["reserve", "new segment"]
    disk.room = None
    spool.tick()
    spool.tick()
    assert (spool.broken_reason, len(segments(world))) == (None, 2)
    assert len(world.log.named("spool_mended")) == 1
    spool.close()
    world.drain()
    assert {(row[0], row[1]) for row in world.rows()} == {(f"r{txn}", "completed") for txn in range(1, 26)}


@pytest.mark.parametrize("fault", [errno.EOPNOTSUPP, errno.EFBIG, errno.EIO])
def test_a_file_system_that_cannot_reserve_is_written_to_without(world: World, fault: int) -> None:
    class Plain(Disk):
        calls = 0

        def reserve(self, fd: int, start: int, length: int) -> None:
            self.calls += 1
            raise OSError(fault, os.strerror(fault))

    disk = Plain()
    spool = world.writer("os", disk)
    for txn in range(1, 50):
        begin(spool, txn)
        world.turn()
        spool.tick()
    assert (spool.broken_reason, disk.calls) == (None, 1)


def test_the_reserve_is_no_larger_than_a_segment(world: World) -> None:
    disk = Disk()
    world.writer("os", disk, spool_max=1024 * 1024)
    assert disk.reserved == [(HEADER_BYTES, 64 * 1024)]
    assert AHEAD_BYTES * LOW > 15_000 * 120


def test_a_write_that_the_disk_takes_again_is_told(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    disk.writes = [-errno.ENOSPC]
    begin(spool, 1)
    world.turn()
    spool.tick()
    assert world.log.named("spool_mended") == [{"reason": "write: No space left on device", "stream": spool.stream}]
