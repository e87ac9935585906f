"""From spool to rows: recovery, damage, carrying, and a store that fails. Each case drives the real run()."""

from __future__ import annotations

import fcntl
import os
import random
import sqlite3
import zlib

import pytest

from proxyd.store.schema import Cursor
from proxyd.telemetry.gather import Gatherer
from proxyd.telemetry.reader import Stream
from proxyd.telemetry.record import Kind
from proxyd.telemetry.recovery import adopt
from proxyd.telemetry.segment import HEADER_BYTES, list_spool, segment_name
from tests.unit.telemetry.world import Disk, World, checkpoint, final, intent


def test_a_final_becomes_the_row_it_says(world: World) -> None:
    spool = world.writer()
    spool.intent(intent(1))
    spool.final(final(1))
    spool.close()
    world.drain()
    assert world.query("SELECT * FROM sys_ai_transactions") == [
        (1, 42, 1, 10, 20, "2023-11-14 22:13:20", "acme", "r1", "completed", 0, 1, 2, "openai", 1, 3, 4)
    ]
    assert world.files() == []
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


def test_an_intent_without_an_end_becomes_an_interrupted_row_with_the_last_checkpoint(world: World) -> None:
    spool = world.writer()
    spool.intent(intent(1))
    spool.intent(intent(2))
    spool.checkpoint(checkpoint(1, 5))
    spool.checkpoint(checkpoint(1, 260))
    world.turn()
    world.die(spool)
    world.drain()
    assert world.rows() == [("r1", "interrupted", 260, 1), ("r2", "interrupted", 0, 1)]
    assert world.query("SELECT prompt_tokens, duration_ms FROM sys_ai_transactions") == [(10, 1500), (9, 0)]
    assert world.metrics.series["proxyd_telemetry_rows_total:interrupted"].value == 2


def test_draining_again_stores_nothing_again(world: World) -> None:
    spool = world.writer()
    spool.intent(intent(1))
    spool.final(final(1))
    spool.close()
    world.drain()
    world.drain()
    assert len(world.rows()) == 1


@pytest.mark.parametrize("tail", [1, 4, 15, 50, 200])
def test_a_torn_tail_is_cut_at_the_record_that_is_torn(world: World, tail: int) -> None:
    spool = world.writer()
    spool.intent(intent(1))
    spool.final(final(1))
    spool.final(final(2))
    world.turn()
    world.die(spool)
    path = world.spool / segment_name(spool.stream, 1)
    record = len(world.final_frame(2))
    os.truncate(path, path.stat().st_size - min(tail, record))
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1"]
    assert world.files() == []


def test_garbage_longer_than_a_torn_write_is_set_aside_and_reported(world: World) -> None:
    spool = world.writer()
    spool.final(final(1))
    world.turn()
    world.die(spool)
    with (world.spool / segment_name(spool.stream, 1)).open("ab") as segment:
        segment.write(random.Random(1).randbytes(5000))
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1"]
    assert world.files() == [segment_name(spool.stream, 1) + ".damaged"]
    assert world.log.named("spool_tail_cut")[0]["bytes"] == 5000


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1])
def test_a_segment_too_short_for_its_header_is_removed(world: World, length: int) -> None:
    spool = world.writer()
    world.die(spool)
    os.truncate(world.spool / segment_name(spool.stream, 1), length)
    world.drain()
    assert world.files() == []


def test_a_foreign_file_is_left_alone_and_reported_once(world: World) -> None:
    (world.spool / "notes.txt").write_text("mine")
    (world.spool / segment_name("003-00000001-0000000000000002", 1)).write_bytes(b"x" * 500)
    (world.spool / segment_name("003-00000001-0000000000000003", 1)).mkdir()
    spool = world.writer()
    spool.final(final(1))
    spool.close()
    world.drain()
    assert len(world.files()) == 3
    assert len(world.log.named("spool_foreign_file")) == 3
    assert len(world.rows()) == 1


def test_a_missing_spool_is_normal_and_a_missing_first_segment_is_told(world: World) -> None:
    world.drain()
    spool = world.writer("os", segment_bytes=50)
    for txn in range(1, 6):
        spool.final(final(txn))
        world.turn()
    spool.close()
    (world.spool / segment_name(spool.stream, 1)).unlink()
    world.drain()
    assert [row[0] for row in world.rows()][-1] == "r5"
    assert world.files() == []
    assert world.log.named("spool_segments_missing") == [{"stream": spool.stream, "first": 1, "segments": 1}]


def test_unfinished_segments_of_a_dead_maker_are_removed(world: World) -> None:
    old = world.spool / ".new-003-00000001-0000000000000002-000001.spool"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    world.drain()
    assert world.files() == []


def test_a_segment_that_is_just_being_made_is_left_alone_though_its_maker_has_no_lock_yet(world: World) -> None:
    fresh = world.spool / ".new-003-00000001-0000000000000002-000001.spool"
    fresh.write_bytes(b"")
    world.drain()
    assert fresh.exists()


def test_a_long_stream_does_not_pin_the_segments_it_began_in(world: World) -> None:
    spool = world.writer("os", segment_bytes=300)
    spool.intent(intent(1))
    for txn in range(2, 40):
        spool.final(final(txn))
        world.turn()
    spool.checkpoint(checkpoint(1, 77))
    world.turn()
    world.gather_once()
    assert len(world.files()) == 1
    assert world.query("SELECT txn FROM sys_ai_spool_open") == [(1,)]
    world.die(spool)
    world.drain()
    assert world.rows()[-1] == ("r1", "interrupted", 77, 1)
    assert len(world.rows()) == 39
    assert world.query("SELECT * FROM sys_ai_spool_open") == []


def test_a_carried_transaction_that_ends_well_is_not_interrupted(world: World) -> None:
    spool = world.writer("os", segment_bytes=300)
    spool.intent(intent(1))
    for txn in range(2, 20):
        spool.final(final(txn))
        world.turn()
    world.gather_once()
    spool.final(final(1))
    spool.close()
    world.drain()
    assert world.rows()[-1] == ("r1", "completed", 20, 0)
    assert world.query("SELECT * FROM sys_ai_spool_open") == []


def test_a_live_writers_torn_record_is_waited_for(world: World) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    stream = Stream(world.spool, spool.stream)
    assert stream.enter(1, None)
    half = world.final_frame(2)[:50]
    os.write(spool._fd, half)
    assert stream.next_frame() is not None
    assert stream.next_frame() is None
    assert not stream.is_writer_gone()
    os.write(spool._fd, world.final_frame(2)[50:])
    frame = stream.next_frame()
    assert frame is not None
    assert (frame.kind, frame.txn) == (Kind.FINAL, 2)
    stream.close()


def test_a_record_of_a_later_version_is_passed_over_and_reported(world: World) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    body = b"\x03\x00\x63" + (5).to_bytes(8, "little") + b"new"
    os.write(spool._fd, body + zlib.crc32(body, spool._seed).to_bytes(4, "little"))
    spool.final(final(2))
    spool.close()
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1", "r2"]
    assert world.log.named("spool_records_unknown")[0]["records"] == 1


def test_a_finished_streams_files_are_stale_whatever_they_hold(world: World) -> None:
    """Killed between the commit that finished a stream and the removal of its files."""
    spool = world.writer()
    spool.final(final(1))
    spool.close()
    world.drain()
    kept = world.writer()
    kept.final(final(2))
    kept.close()
    world.query(f"INSERT INTO sys_ai_spool_offsets VALUES ('{kept.stream}', 1, 200, 1)")
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1"]
    assert world.files() == []
    assert world.query("SELECT * FROM sys_ai_spool_offsets") == []


def test_after_power_loss_a_stored_final_that_left_the_disk_is_not_doubled(world: World) -> None:
    spool = world.writer("os")
    for txn in (1, 2):
        spool.intent(intent(txn))
    world.turn()
    path = world.spool / segment_name(spool.stream, 1)
    before = path.stat().st_size
    spool.final(final(1))
    world.turn()
    world.gather_once()
    assert [row[0] for row in world.rows()] == ["r1"]
    world.die(spool)
    os.truncate(path, before)
    world.drain()
    assert world.rows() == [("r1", "completed", 20, 0), ("r2", "interrupted", 0, 1)]


def test_a_stream_resumes_inside_the_copy_that_heads_its_next_segment(world: World) -> None:
    """Segment 1 was consumed up to its second record; segment 2 begins with a copy of records 1 to 3."""
    disk = Disk()
    spool = world.writer("second", disk)
    for txn in (1, 2, 3):
        spool.final(final(txn))
    world.turn()
    disk.syncs = [1]
    spool.tick()
    spool.final(final(4))
    world.turn()
    spool.close()
    assert len(world.files()) == 2
    record = len(world.final_frame(1))
    stream = adopt(world.spool, spool.stream, [2], Cursor(spool.stream, 1, HEADER_BYTES + 2 * record, False), ())
    assert stream is not None
    found = []
    while (frame := stream.next_frame()) is not None:
        found.append(frame.txn)
    stream.close()
    assert found == [3, 4]


def test_rows_the_store_cannot_hold_go_to_the_dead_letters_and_their_neighbours_are_stored(world: World) -> None:
    world.drain()
    world.refuse_user(2**64 - 1)
    spool = world.writer()
    for txn in (1, 2, 3):
        spool.final(final(txn, user_id=2**64 - 1 if txn == 2 else 42))
    spool.close()
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1", "r3"]
    dead = (world.spool / "dead-letter.jsonl").read_text()
    assert '"request_id":"r2"' in dead
    assert str(2**64 - 1) in dead
    assert world.metrics.series["proxyd_telemetry_rows_total:dead"].value == 1
    world.drain()
    assert len(world.rows()) == 2


def test_a_group_never_holds_more_than_batch_rows(world: World) -> None:
    world.batch_rows = 7
    spool = world.writer()
    for txn in range(1, 51):
        spool.final(final(txn))
    spool.close()
    world.drain()
    assert [row[0] for row in world.rows()] == [f"r{txn}" for txn in range(1, 51)]


def test_the_lag_is_measured_from_acceptance_to_commit(world: World) -> None:
    spool = world.writer()
    world.clock.step_wall(1.0)
    spool.final(final(1, created_at=world.clock.wall() - 5))
    spool.close()
    world.drain()
    (lag,) = world.metrics.series["proxyd_telemetry_lag_seconds"].records
    assert lag > 1_000_000  # the fake clock's year is 2023, the process's is not


def test_a_store_that_is_no_database_leaves_everything_in_the_spool(world: World) -> None:
    world.database.write_bytes(b"this is not a database, " * 100)
    spool = world.writer()
    spool.final(final(1))
    spool.close()
    world.drain(drain_s=0.0)
    assert len(world.files()) == 1
    assert world.log.named("store_failed")
    world.database.unlink()
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1"]


def test_a_locked_database_is_waited_out(world: World) -> None:
    world.drain()
    spool = world.writer()
    spool.final(final(1))
    spool.close()
    other = sqlite3.connect(world.database, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    world.drain(drain_s=0.0)
    other.execute("ROLLBACK")
    other.close()
    assert world.rows() == []
    assert len(world.files()) == 1
    world.drain()
    assert len(world.rows()) == 1


def test_a_second_telemetry_process_stays_out_while_the_first_holds_the_lock(world: World) -> None:
    spool = world.writer()
    spool.final(final(1))
    spool.close()
    with (world.state_dir / "telemetry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        world.drain()
        assert not world.database.exists()
    world.drain()
    assert len(world.rows()) == 1


def test_nothing_is_left_of_a_drained_spool(world: World) -> None:
    for _ in range(3):
        spool = world.writer(segment_bytes=200)
        for txn in range(1, 10):
            spool.intent(intent(txn))
            world.turn()
        spool.close()
    world.drain()
    assert list_spool(world.spool) == ({}, [])
    assert len(world.rows()) == 27


def test_what_waits_in_the_spool_is_zero_once_all_is_stored_though_the_segment_stays(world: World) -> None:
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    assert gatherer.waiting_bytes() > 0
    gatherer.gather(False)
    assert gatherer.waiting_bytes() == 0
    assert len(world.files()) == 1
    gatherer.close()


def test_a_segment_with_a_damaged_header_is_set_aside_and_its_successors_are_read(world: World) -> None:
    spool = world.writer("os", segment_bytes=50)
    for txn in range(1, 6):
        spool.final(final(txn))
        world.turn()
    world.die(spool)
    damaged = world.spool / segment_name(spool.stream, 2)
    with damaged.open("r+b") as segment:
        segment.write(b"damage")
    world.drain()
    assert world.rows()[0][0] == "r1"
    assert world.rows()[-1][0] == "r5"
    assert world.files() == [damaged.name + ".damaged"]
    assert world.log.named("spool_segment_damaged") == [{"file": damaged.name}]


def test_segments_that_come_back_before_their_streams_cursor_are_stale(world: World) -> None:
    spool = world.writer("os", segment_bytes=50)
    for txn in range(1, 6):
        spool.final(final(txn))
        world.turn()
    world.die(spool)
    contents = {path: path.read_bytes() for path in world.spool.iterdir()}
    world.gather_once()
    for path, content in contents.items():
        path.write_bytes(content)
    world.drain()
    assert len(world.rows()) == 5
    assert world.files() == []
