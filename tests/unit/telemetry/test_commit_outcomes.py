"""Exactly once when a commit's outcome is unknown, and when the process dies before or after any commit."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest

from proxyd.store.schema import Batch, SetAside, StoreError
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.segment import list_spool
from proxyd.telemetry.writer import Settings, Writer
from tests.unit.telemetry.world import World, checkpoint, final, intent


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs in this life."""


class Interrupting(SqliteStore):
    """A store whose n-th commit fails before or after it happened."""

    __slots__ = ("_at", "_count", "_failure", "_when")

    def __init__(self, world: World, at: int, when: str, failure: Callable[[], BaseException]) -> None:
        super().__init__(world.database, "os")
        self._at, self._when, self._failure, self._count = at, when, failure, 0

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        self._count += 1
        if self._count == self._at and self._when == "before":
            raise self._failure()
        refused = await super().commit(batch, set_aside)
        if self._count == self._at and self._when == "after":
            raise self._failure()
        return refused


def fill(world: World) -> set[str]:
    """Two dead writers with several segments each; returns the request ids that need a row."""
    expected = set()
    for name in ("a", "b"):
        spool = world.writer("os", segment_bytes=600)
        for txn in range(1, 20):
            spool.intent(intent(txn, f"{name}{txn}"))
            spool.checkpoint(checkpoint(txn, txn))
            if txn % 4:
                spool.final(final(txn, f"{name}{txn}"))
            if txn == 15:
                spool.final(final(4, f"{name}4"))
            world.turn()
            expected.add(f"{name}{txn}")
        world.die(spool)
    return expected


def live(world: World, store: SqliteStore) -> None:
    """One life of a telemetry process, until it is drained or killed."""

    async def life() -> None:
        stop = asyncio.Event()
        stop.set()
        await Writer(world.spool, store, Settings(0.0, 10, 0.0), world.metrics, world.log, stop).serve()

    asyncio.run(life())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 15))
def test_killed_at_any_commit_no_row_is_lost_and_none_doubled(world: World, at: int, when: str) -> None:
    expected = fill(world)
    try:
        live(world, Interrupting(world, at, when, Killed))
    except Killed:
        live(world, SqliteStore(world.database, "os"))
    check(world, expected)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 15))
def test_a_commit_whose_outcome_is_unknown_is_neither_lost_nor_repeated(world: World, at: int, when: str) -> None:
    expected = fill(world)
    live(world, Interrupting(world, at, when, lambda: StoreError("connection lost")))
    check(world, expected)


def check(world: World, expected: set[str]) -> None:
    rows = world.rows()
    assert Counter(row[0] for row in rows) == Counter(expected)
    interrupted = {row[0]: row[2] for row in rows if row[1] == "interrupted"}
    assert interrupted == {f"{name}{txn}": txn for name in "ab" for txn in range(8, 20, 4)}
    assert list_spool(world.spool) == ({}, [])
    assert world.query("SELECT COUNT(*) FROM sys_ai_spool_open") == [(0,)]
    assert world.query("SELECT COUNT(*) FROM sys_ai_spool_offsets") == [(0,)]


def test_the_cases_above_reach_beyond_the_last_commit(world: World) -> None:
    fill(world)
    store = Interrupting(world, 0, "never", Killed)
    live(world, store)
    assert 5 < store._count < 15
