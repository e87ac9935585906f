"""When the writer looks, stores, deletes and sleeps."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from proxyd.clock import FakeClock
from proxyd.store.schema import Batch, Row, StoreError, utc_text
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.retention import BATCH_ROWS, EVERY_S, PAUSE_MIN_S, PAUSES, RETRY_S, TRUST_S, Retention
from proxyd.telemetry.wake import Sleeper
from proxyd.telemetry.writer import Settings, Writer
from tests.unit.telemetry.world import LogBook, Meters, World, final, intent


class Old:
    """A store with so many old rows, whose deletions take so long."""

    def __init__(self, clock: FakeClock, rows: int, takes_s: float = 0.0) -> None:
        self.clock, self.rows, self.takes_s = clock, rows, takes_s
        self.batches: list[float] = []
        self.cutoffs: list[float] = []
        self.error: StoreError | None = None
        self.youngest: float | None = None

    async def newest(self) -> float | None:
        if self.error is not None:
            raise self.error
        return self.clock.wall() if self.youngest is None else self.youngest

    async def delete_older(self, cutoff: float, limit: int) -> int:
        if self.error is not None:
            raise self.error
        self.batches.append(self.clock.monotonic())
        self.cutoffs.append(cutoff)
        self.clock.advance(self.takes_s)
        gone = min(limit, self.rows)
        self.rows -= gone
        return gone


async def run_for(retention: Retention, store: Old, seconds: float, step_s: float = 0.01) -> None:
    until = store.clock.monotonic() + seconds
    while store.clock.monotonic() < until:
        assert await retention.maybe_delete(store)  # type: ignore[arg-type]
        store.clock.advance(step_s)


@pytest.mark.parametrize("takes_s", [0.0, 0.004, 0.05])
async def test_old_rows_go_in_small_batches_that_take_a_tenth_of_the_stores_time(takes_s: float) -> None:
    clock = FakeClock()
    store, retention = Old(clock, 1_000_000, takes_s), Retention(3600.0, LogBook(), clock)
    clock.advance(RETRY_S)
    await run_for(retention, store, 20.0)
    deleted = 1_000_000 - store.rows
    assert deleted == len(store.batches) * BATCH_ROWS
    assert deleted <= 20 * BATCH_ROWS / PAUSE_MIN_S + BATCH_ROWS
    assert len(store.batches) * takes_s <= 20 / PAUSES + takes_s
    gaps = [after - before for before, after in zip(store.batches, store.batches[1:], strict=False)]
    assert min(gaps) >= takes_s + max(PAUSE_MIN_S, PAUSES * takes_s) - 1e-9
    assert len(store.batches) > 20  # and it does get on


async def test_a_batch_that_is_not_full_is_the_last_for_an_hour() -> None:
    clock = FakeClock()
    store, retention = Old(clock, BATCH_ROWS + 1), Retention(3600.0, LogBook(), clock)
    clock.advance(RETRY_S)
    await run_for(retention, store, EVERY_S - 1, step_s=0.5)
    assert len(store.batches) == 2
    assert store.cutoffs[0] == pytest.approx(clock.wall() - EVERY_S + 1 - 3600.0, abs=1.0)
    await run_for(retention, store, 3.0)
    assert len(store.batches) == 3


async def test_rows_that_are_kept_for_ever_are_never_looked_for() -> None:
    clock = FakeClock()
    store, retention = Old(clock, 10), Retention(0.0, LogBook(), clock)
    await run_for(retention, store, 3 * EVERY_S, step_s=60.0)
    assert store.batches == []


async def test_a_deletion_that_fails_is_told_and_comes_again_in_a_minute() -> None:
    clock, log = FakeClock(), LogBook()
    store, retention = Old(clock, 10), Retention(3600.0, log, clock)
    clock.advance(RETRY_S)
    store.error = StoreError("locked")
    assert not await retention.maybe_delete(store)  # type: ignore[arg-type]
    assert log.named("retention_failed") == [{"reason": "locked"}]
    assert await retention.maybe_delete(store)  # type: ignore[arg-type]
    store.error = None
    clock.advance(RETRY_S)
    await run_for(retention, store, 1.0)
    assert len(store.batches) == 1


async def test_what_was_deleted_is_told_once_a_pass() -> None:
    clock, log = FakeClock(), LogBook()
    store, retention = Old(clock, 2 * BATCH_ROWS + 1), Retention(3600.0, log, clock)
    clock.advance(RETRY_S)
    await run_for(retention, store, 5.0)
    (told,) = log.named("retention_deleted")
    assert (told["rows"], told["before"]) == (2 * BATCH_ROWS + 1, utc_text(store.cutoffs[-1]))
    await run_for(retention, store, EVERY_S, step_s=60.0)
    assert len(log.named("retention_deleted")) == 1


async def test_a_clock_that_leaps_ahead_deletes_no_row_that_is_due_within_a_day_later_at_most() -> None:
    """Nor when rows of that clock have come meanwhile."""
    clock, log = FakeClock(wall=1_700_000_000.0), LogBook()
    store, retention = Old(clock, 10), Retention(90 * TRUST_S, log, clock)
    store.youngest = clock.wall() - 5.0
    assert await retention.maybe_delete(store)  # type: ignore[arg-type]
    true = clock.wall()
    clock.step_wall(200 * TRUST_S)
    store.youngest = clock.wall()
    await run_for(retention, store, 3 * EVERY_S, step_s=60.0)
    assert store.cutoffs
    assert max(store.cutoffs) <= true + 3 * EVERY_S + TRUST_S - 90 * TRUST_S
    assert len(log.named("retention_held")) == 1


async def test_a_clock_that_was_wrong_at_the_start_is_not_believed_for_a_day_and_then_it_is() -> None:
    clock, log = FakeClock(wall=1_700_000_000.0), LogBook()
    store, retention = Old(clock, 10), Retention(90 * TRUST_S, log, clock)
    store.youngest = clock.wall() - 200 * TRUST_S  # or the node stood still for so long
    await run_for(retention, store, TRUST_S - EVERY_S, step_s=60.0)
    assert max(store.cutoffs) < store.youngest + 2 * TRUST_S - 90 * TRUST_S
    store.youngest = clock.wall()
    await run_for(retention, store, 2 * EVERY_S, step_s=60.0)
    assert store.cutoffs[-1] == pytest.approx(clock.wall() - 90 * TRUST_S, abs=2 * EVERY_S)


async def test_a_clock_in_the_past_deletes_nothing_and_its_rows_go_when_it_is_right() -> None:
    clock, log = FakeClock(wall=100.0), LogBook()
    store, retention = Old(clock, 10), Retention(3600.0, log, clock)
    store.youngest = 1_700_000_000.0
    clock.advance(RETRY_S)
    await run_for(retention, store, 1.0)
    assert store.cutoffs == [0.0]
    clock.step_wall(1_700_000_100.0 - clock.wall())
    await run_for(retention, store, EVERY_S + RETRY_S, step_s=60.0)
    assert store.cutoffs[-1] == pytest.approx(1_700_000_100.0, abs=2 * EVERY_S)
    assert log.named("retention_held") == []


def test_rows_come_in_between_two_batches_of_a_deletion(world: World) -> None:
    """2,000 old rows and a busy worker: after each batch a group is stored."""
    order: list[str] = []

    class Told(SqliteStore):
        __slots__ = ()

        async def commit(self, batch, set_aside):  # type: ignore[no-untyped-def]
            order.extend(["group"] if batch.rows else [])
            return await super().commit(batch, set_aside)

        async def delete_older(self, cutoff: float, limit: int) -> int:
            order.append("batch")
            return await super().delete_older(cutoff, limit)

    async def life() -> None:
        store = Told(world.database, "os")
        writer = Writer(world.spool, store, Settings(0.0, 100, 60.0), Meters(), world.log, asyncio.Event(), world.clock)
        assert await writer.recover()
        ancient = Row(42, 1, 1, 1, world.clock.wall() - 1000, "acme", "old", "completed", 0, 0, 0, "openai", 1, 3, 4)
        await store.commit(Batch(rows=[ancient] * 2000), lambda refused: None)
        order.clear()
        spool = world.writer("os")
        world.clock.advance(RETRY_S)
        for txn in range(1, 7):
            spool.intent(intent(txn))
            spool.final(final(txn, created_at=world.clock.wall()))
            spool.flush()
            await writer.step()
            assert await writer.attend()
            world.clock.advance(1.0)
        await store.close()

    asyncio.run(life())
    assert order == ["group", "batch"] * 5 + ["group"]
    assert world.query("SELECT request_id FROM sys_ai_transactions") == [(f"r{txn}",) for txn in range(1, 7)]


async def stepped(world: World, linger_s: float, batch_rows: int = 100) -> tuple[Writer, SqliteStore]:
    store = SqliteStore(world.database, "os")
    config = Settings(linger_s, batch_rows, 0.0)
    writer = Writer(world.spool, store, config, Meters(), world.log, asyncio.Event(), world.clock)
    assert await writer.recover()
    return writer, store


async def test_a_row_lingers_from_its_acceptance_not_from_when_it_was_found(world: World) -> None:
    writer, store = await stepped(world, 1.0)
    spool = world.writer("os")
    spool.final(final(1, created_at=world.clock.wall()))
    spool.flush()
    world.clock.advance(0.9)
    await writer.step()
    assert world.rows() == []
    spool.final(final(2, created_at=world.clock.wall()))
    spool.flush()
    world.clock.advance(0.11)
    await writer.step()
    assert [row[0] for row in world.rows()] == ["r1", "r2"]  # the second came along
    await store.close()


async def test_a_wall_clock_set_back_makes_no_row_wait_longer_than_linger(world: World) -> None:
    writer, store = await stepped(world, 1.0)
    spool = world.writer("os")
    spool.final(final(1, created_at=world.clock.wall()))
    spool.flush()
    world.clock.step_wall(-3600.0)
    await writer.step()
    assert world.rows() == []
    world.clock.advance(1.01)
    await writer.step()
    assert len(world.rows()) == 1
    await store.close()


async def test_what_piled_up_is_stored_in_full_groups_without_a_pause(world: World) -> None:
    spool = world.writer("os")
    for txn in range(1, 36):
        spool.final(final(txn, created_at=world.clock.wall()))
    spool.flush()
    world.clock.advance(60.0)
    writer, store = await stepped(world, 1.0, batch_rows=10)
    sleeper = Sleeper(world.spool, asyncio.Event())
    sizes = []
    for _ in range(4):
        before = len(world.rows())
        is_idle = await writer.step()
        sizes.append(len(world.rows()) - before)
        assert writer._wait(is_idle, sleeper) == 0.0
    assert sizes == [10, 10, 10, 5]
    sleeper.close()
    await store.close()


async def test_an_idle_writer_looks_once_more_after_it_laid_its_watch_and_then_sleeps_long(world: World) -> None:
    writer, store = await stepped(world, 1.0)
    sleeper = Sleeper(world.spool, asyncio.Event())
    assert writer._wait(await writer.step(), sleeper) == 0.0
    assert sleeper.is_watching
    assert writer._wait(await writer.step(), sleeper) == 0.25
    sleeper.close()
    assert [writer._wait(True, sleeper) for _ in range(5)] == [0.005, 0.01, 0.02, 0.04, 0.05]  # nobody tells: a poll
    await store.close()


async def test_a_write_to_the_spool_ends_an_idle_sleep_and_the_watch(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "segment", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sleeper = Sleeper(tmp_path, asyncio.Event())
    for _ in range(3):
        assert sleeper.watch()
        asyncio.get_running_loop().call_soon(os.write, fd, b"x")
        async with asyncio.timeout(20):
            await sleeper.sleep(3600.0)
        assert not sleeper.is_watching
    os.close(fd)
    sleeper.close()


async def test_a_file_that_appears_by_renaming_ends_it_too(tmp_path: Path) -> None:
    spool, outside = tmp_path / "spool", tmp_path / "outside"
    spool.mkdir()
    outside.write_bytes(b"x")
    sleeper = Sleeper(spool, asyncio.Event())
    assert sleeper.watch()
    asyncio.get_running_loop().call_soon(outside.rename, spool / "inside")
    async with asyncio.timeout(20):
        await sleeper.sleep(3600.0)
    sleeper.close()


async def test_a_wake_that_comes_before_the_sleep_lets_it_not_begin(tmp_path: Path) -> None:
    stop = asyncio.Event()
    sleeper = Sleeper(tmp_path, stop)
    sleeper.wake()
    async with asyncio.timeout(20):
        await sleeper.sleep(3600.0)
        asyncio.get_running_loop().call_soon(stop.set)
        await sleeper.sleep(3600.0)
    sleeper.close()


async def test_a_directory_that_is_gone_cannot_be_watched(tmp_path: Path) -> None:
    sleeper = Sleeper(tmp_path / "gone", asyncio.Event())
    assert not sleeper.watch()
    sleeper.close()
    sleeper.close()
