"""A stop does not wait for a store that hangs; and what a recovered store is."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from proxyd.store.schema import Batch, SetAside, StoreError
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.hurry import Hurried
from proxyd.telemetry.writer import Settings, Writer
from tests.unit.telemetry.world import World, final, intent


class Hanging(SqliteStore):
    """Its commits never end."""

    __slots__ = ("began", "cancelled")

    def __init__(self, world: World) -> None:
        super().__init__(world.database, "os")
        self.began, self.cancelled = asyncio.Event(), 0

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        self.began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return 0


class Failing(SqliteStore):
    """Opens and reads; refuses so many commits."""

    __slots__ = ("failures",)

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        if self.failures and batch.rows:
            self.failures -= 1
            raise StoreError("too slow")
        return await super().commit(batch, set_aside)


def fill(world: World, rows: int = 3) -> None:
    spool = world.writer()
    for txn in range(1, rows + 1):
        spool.intent(intent(txn))
        spool.final(final(txn))
    spool.close()


def writer(world: World, store: Any, stop: asyncio.Event, drain_s: float) -> Writer:
    return Writer(world.spool, store, Settings(0.0, 10, 0.0, drain_s), world.metrics, world.log, stop)


@pytest.mark.parametrize("stops_first", [True, False])
async def test_a_stop_gives_up_a_commit_that_hangs_and_says_what_stays(world: World, stops_first: bool) -> None:
    fill(world)
    stop, store = asyncio.Event(), Hanging(world)
    if stops_first:
        stop.set()
    began = time.monotonic()
    life = asyncio.create_task(writer(world, store, stop, 0.2).serve())
    await asyncio.wait_for(store.began.wait(), 60)
    stop.set()
    await asyncio.wait_for(life, 60)
    assert store.cancelled == 1
    assert time.monotonic() - began >= 0.2
    (left,) = world.log.named("rows_left_in_spool")
    assert left["records"] == 3
    (failed,) = world.log.named("store_failed")
    assert "within the time that a stop has" in failed["reason"]
    await asyncio.to_thread(world.drain)
    assert [row[0] for row in world.rows()] == ["r1", "r2", "r3"]


async def test_without_a_stop_a_call_has_all_the_time_and_its_own_errors(world: World) -> None:
    store = Hurried(SqliteStore(world.database, "os"), asyncio.Event(), lambda: 0.0)
    with pytest.raises(StoreError, match="not open"):
        await store.cursors()
    await store.open()
    assert await store.cursors() == {}
    await store.close()


async def test_a_cancelled_caller_cancels_the_call(world: World) -> None:
    hanging = Hanging(world)
    call = asyncio.create_task(Hurried(hanging, asyncio.Event(), lambda: 9.0).commit(Batch(), lambda refused: None))
    await hanging.began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert hanging.cancelled == 1
    await hanging.close()


async def test_a_store_that_opens_and_takes_no_rows_has_not_recovered(world: World) -> None:
    fill(world)
    stop, store = asyncio.Event(), Failing(world.database, "os")
    store.failures = 3
    stop.set()
    await writer(world, store, stop, 60.0).serve()
    events = [name for name, _ in world.log.events if name.startswith("store_")]
    assert events == ["store_failed", "store_recovered"]
    assert len(world.rows()) == 3


async def test_a_store_that_opens_again_while_nothing_waits_has_recovered(world: World) -> None:
    stop = asyncio.Event()
    world.database.mkdir()
    life = asyncio.create_task(writer(world, SqliteStore(world.database, "os"), stop, 60.0).serve())
    while not world.log.named("store_failed"):
        await asyncio.sleep(0.01)
    world.database.rmdir()
    while not world.log.named("store_recovered"):
        await asyncio.sleep(0.01)
    stop.set()
    await asyncio.wait_for(life, 60)


async def test_one_that_is_replaced_stores_what_is_there_and_leaves_the_living_writers_to_its_successor(
    world: World,
) -> None:
    spool = world.writer()
    spool.intent(intent(1))
    spool.final(final(1))
    spool.intent(intent(2))
    world.turn()
    stop = asyncio.Event()
    stop.set()
    settings = Settings(0.0, 10, 0.0, 3600.0, is_replaced=lambda: True)
    store = SqliteStore(world.database, "os")
    life = Writer(world.spool, store, settings, world.metrics, world.log, stop).serve()
    await asyncio.wait_for(life, 60)  # an hour, were it to wait for the writer
    assert len(world.rows()) == 1
