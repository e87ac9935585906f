"""The writing end: one write a turn, and what it does when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat

import pytest

from proxyd.telemetry import spool as module
from proxyd.telemetry.segment import HEADER_BYTES, SpoolError, ensure_spool_dir, parse_header, segment_name
from tests.unit.telemetry.world import Disk, World, checkpoint, final, intent


def segments(world: World) -> list[str]:
    return [name for name in world.files() if name.endswith(".spool")]


def begin(spool, *txns: int) -> None:
    for txn in txns:
        spool.intent(intent(txn))


def test_all_records_of_a_turn_go_out_in_one_write(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    before = len(disk.written)
    begin(spool, 1, 2, 3)
    spool.final(final(1))
    assert len(disk.written) == before
    world.turn()
    assert len(disk.written) == before + 1
    assert spool.pending_records == 0


def test_a_segment_is_private_locked_and_says_whose_it_is(world: World) -> None:
    spool = world.writer()
    path = world.spool / segment_name(spool.stream, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(world.spool.stat().st_mode) == 0o700
    header = parse_header(path.read_bytes())
    assert header is not None
    assert (header.slot, header.epoch, header.sequence, header.pid) == (3, 77, 1, os.getpid())
    with path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_transactions_are_numbered_without_repetition(world: World) -> None:
    spool = world.writer()
    assert [spool.new_txn() for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("taken", [1, 10, 66, 67, 68, 200])
def test_a_short_write_is_continued_where_it_stopped(world: World, disk: Disk, taken: int) -> None:
    spool = world.writer(disk=disk)
    begin(spool, 1, 2, 3)
    spool.final(final(2))
    disk.writes = [taken, -errno.ENOSPC]
    world.turn()
    assert spool.broken_reason is not None
    spool.tick()
    assert (spool.broken_reason, spool.pending_records) == (None, 0)
    spool.close()
    world.drain()
    assert sorted(world.rows()) == [
        ("r1", "interrupted", 0, 1),
        ("r2", "completed", 20, 0),
        ("r3", "interrupted", 0, 1),
    ]


def test_a_full_disk_keeps_records_in_memory_and_says_so_until_it_has_room(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    disk.writes = [-errno.ENOSPC] * 3
    begin(spool, 1)
    world.turn()
    spool.tick()
    assert "No space" in (spool.broken_reason or "")
    assert len(world.log.named("spool_broken")) == 1
    spool.tick()
    spool.tick()
    assert spool.broken_reason is None
    assert segments(world) == [segment_name(spool.stream, 1)]


def test_a_refusing_disk_is_not_asked_every_turn(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    disk.writes = [-errno.ENOSPC]
    begin(spool, 1)
    world.turn()
    before = len(disk.written)
    begin(spool, 2)
    world.turn()
    assert len(disk.written) == before
    world.clock.advance(module.RETRY_S)
    begin(spool, 3)
    world.turn()
    assert (len(disk.written), spool.pending_records) == (before + 1, 0)


@pytest.mark.parametrize("fault", [errno.EIO, errno.EFBIG])
def test_a_segment_that_takes_no_more_is_followed_by_another(world: World, disk: Disk, fault: int) -> None:
    spool = world.writer(disk=disk)
    begin(spool, 1)
    world.turn()
    spool.final(final(1))
    disk.writes = [30, -fault]
    world.turn()
    spool.tick()
    assert (spool.broken_reason, len(segments(world))) == (None, 2)
    spool.close()
    world.drain()
    assert world.rows() == [("r1", "completed", 20, 0)]


def test_a_real_file_size_limit_is_survived(world: World) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    spool = world.writer("os")
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        for txn in range(1, 9):
            begin(spool, txn)
            world.turn()
            spool.tick()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert spool.pending_records == 0
    assert len(segments(world)) > 1
    spool.close()
    world.drain()
    assert [row[0] for row in world.rows()] == [f"r{txn}" for txn in range(1, 9)]


def test_a_failed_sync_is_never_retried_on_that_descriptor(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    begin(spool, 1, 2)
    world.turn()
    tainted = spool._fd
    disk.syncs = [1]
    spool.tick()
    assert len(segments(world)) == 2
    assert spool.broken_reason is not None
    spool.tick()
    assert spool.broken_reason is None
    assert disk.synced
    assert tainted not in disk.synced
    header = parse_header((world.spool / segments(world)[1]).read_bytes())
    assert header is not None
    assert (header.carried_from, header.carried_bytes) == (HEADER_BYTES, 2 * len(world.intent_frame(1)))


def test_a_disk_that_fails_every_sync_gets_few_new_segments_and_still_takes_records(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    disk.syncs = [1] * 1000
    for txn in range(1, 101):
        begin(spool, txn)
        world.turn()
        spool.tick()
        world.clock.advance(0.5)
    assert 2 <= len(segments(world)) <= 10
    assert len(disk.failed_files) == len(segments(world))
    assert spool.pending_records == 0
    spool.close()
    world.drain()
    assert sorted(row[0] for row in world.rows()) == sorted(f"r{txn}" for txn in range(1, 101))


def test_what_was_synced_is_not_copied_to_the_next_segment(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk, segment_bytes=50)
    begin(spool, 1)
    world.turn()
    spool.tick()
    begin(spool, 2)
    world.turn()
    header = parse_header((world.spool / segments(world)[1]).read_bytes())
    assert header is not None
    assert header.carried_bytes == 0


def test_durability_row_syncs_before_flush_returns(world: World, disk: Disk) -> None:
    spool = world.writer("row", disk)
    before = len(disk.synced)
    begin(spool, 1)
    spool.flush()
    assert len(disk.synced) == before + 1


def test_durability_os_never_syncs(world: World, disk: Disk) -> None:
    spool = world.writer("os", disk)
    begin(spool, 1)
    world.turn()
    spool.tick()
    spool.close()
    assert disk.synced == []


def test_durability_second_syncs_in_the_thread_and_only_once_at_a_time(world: World, disk: Disk) -> None:
    jobs: list[tuple] = []
    spool = world.writer(disk=disk, in_thread=lambda work, done: jobs.append((work, done)))
    begin(spool, 1)
    world.turn()
    spool.tick()
    spool.tick()
    assert (len(jobs), disk.synced) == (1, [])
    work, done = jobs.pop()
    work()
    done(None)
    spool.tick()
    assert jobs == []


def test_a_segment_left_while_its_sync_runs_keeps_its_descriptor_until_the_sync_ends(world: World, disk: Disk) -> None:
    jobs: list[tuple] = []
    spool = world.writer(disk=disk, in_thread=lambda work, done: jobs.append((work, done)))
    begin(spool, 1)
    world.turn()
    spool.tick()
    old = spool._fd
    begin(spool, 2)
    disk.writes = [-errno.EFBIG]  # this one must be left
    world.turn()
    spool.tick()
    assert spool._fd != old
    os.fstat(old)
    jobs[0][1](OSError(errno.EIO, "late"))
    with pytest.raises(OSError):
        os.fstat(old)
    spool.close()
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1", "r2"]


def test_too_much_waiting_for_the_disk_refuses_work_and_drops_checkpoints_only(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk)
    disk.writes = [-errno.ENOSPC] * 1000
    txn = 0
    while spool._pending_bytes < module.HELD_SOFT_BYTES:
        txn += 1
        begin(spool, txn)
    world.turn()
    waiting = spool.pending_records
    spool.checkpoint(checkpoint(1, 5))
    assert spool.pending_records == waiting
    spool.final(final(1))
    assert spool.pending_records == waiting + 1
    assert spool.broken_reason is not None
    disk.writes = []
    spool.tick()
    assert (spool.pending_records, spool.lost) == (0, 0)


def test_at_spool_max_new_work_is_refused_and_near_it_a_warning_is_given(world: World) -> None:
    spool = world.writer("os", spool_max=1000)
    txn = 0
    while spool.broken_reason is None:
        txn += 1
        begin(spool, txn)
        world.turn()
        spool.tick()
    assert txn * len(world.intent_frame(1)) >= 1000 - HEADER_BYTES - 100
    assert len(world.log.named("spool_nearly_full")) == 1
    spool.final(final(1))
    world.turn()
    assert spool.pending_records == 0


def test_a_missing_state_dir_is_named_with_its_remedy(world: World) -> None:
    with pytest.raises(SpoolError, match="does not exist: create it"):
        ensure_spool_dir(world.state_dir / "nowhere")


def test_a_disk_that_refuses_the_first_segment_is_a_plain_error(world: World, disk: Disk) -> None:
    disk.writes = [-errno.ENOSPC]
    with pytest.raises(SpoolError, match="cannot make a spool segment"):
        world.writer(disk=disk)
    assert world.files() == []


def test_closing_gives_up_the_lock_and_takes_nothing_more(world: World) -> None:
    spool = world.writer()
    begin(spool, 1)
    spool.close()
    spool.close()
    begin(spool, 2)
    assert spool.lost == 1
    with (world.spool / segments(world)[0]).open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_segments_are_small_beside_a_small_spool_max(world: World) -> None:
    spool = world.writer("os", spool_max=16 * 1024 * 1024)
    for txn in range(1, 1500):
        begin(spool, txn)
        if txn % 100 == 0:
            world.turn()
    assert len(segments(world)) == 2


def test_a_sync_that_takes_long_has_nothing_copied_meanwhile_and_little_afterwards(world: World, disk: Disk) -> None:
    jobs: list[tuple] = []
    spool = world.writer(disk=disk, segment_bytes=4096, in_thread=lambda work, done: jobs.append((work, done)))
    added = 0

    def load(turns: int) -> None:
        nonlocal added
        for txn in range(turns):
            begin(spool, txn)
            added += len(world.intent_frame(txn))
            world.turn()
            if txn % 20 == 0:
                spool.tick()

    load(21)
    assert len(jobs) == 1
    load(1000)  # twenty segments' worth while the disk does not answer
    assert (len(jobs), len(segments(world))) == (1, 1)
    for _ in range(50):
        while jobs:
            work, done = jobs.pop()
            work()
            done(None)
        load(100)  # the next sync takes as long as this
    assert len(segments(world)) > 10
    assert sum(disk.written) < 1.6 * added
    spool.close()


def test_a_segment_goes_on_behind_what_it_carries_for_as_long_as_another(world: World, disk: Disk) -> None:
    spool = world.writer(disk=disk, segment_bytes=4096)
    size = len(world.intent_frame(1))
    begin(spool, *range(2 * 4096 // size))
    world.turn()
    disk.syncs = [1]
    spool.tick()  # the sync fails: all goes to the next segment, which is longer than one before it begins
    assert len(segments(world)) == 2
    spool.tick()
    for txn in range(4096 // size - 1):
        begin(spool, txn)
        world.turn()
    spool.tick()
    assert len(segments(world)) == 2


def test_the_spool_is_measured_after_each_segments_worth_of_bytes(world: World) -> None:
    spool = world.writer("os", spool_max=512 * 1024)
    txn = 0
    while spool.broken_reason is None:
        txn += 1
        begin(spool, txn)
        world.turn()  # no tick
    assert "spool is full" in spool.broken_reason
    size = sum((world.spool / name).stat().st_size for name in segments(world))
    assert size < 512 * 1024 + 2 * 64 * 1024


def test_a_full_spool_whose_live_segment_is_all_of_it_is_left_so_that_it_may_go(world: World) -> None:
    spool = world.writer("os", spool_max=32 * 1024)
    while spool.broken_reason is None:
        begin(spool, 1)
        spool.final(final(1))
        world.turn()
        spool.tick()
    world.gather_once()
    spool.tick()
    assert spool.broken_reason is None
    assert len(segments(world)) == 1
    spool.tick()
    assert len(segments(world)) == 1
