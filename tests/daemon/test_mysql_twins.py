"""Two daemons with one node.id, which is a copied disk or state_dir: one writes, the other waits and says why; and
whoever was displaced while its connection was lost stores nothing and forgets nothing."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from proxyd.store.mysql_session import Bounds
from proxyd.store.node import OWNER_NAME, Owner
from proxyd.store.schema import Batch, Cursor, StoreError, StoreMisfit
from tests.daemon.mariadb import Database
from tests.daemon.mysql_cut import CutProxy
from tests.daemon.store_house import HASTY, NODE, House, mysql_house, never, rows

MINE = {"000-89abcdef-0123456789abcdef": Cursor("000-89abcdef-0123456789abcdef", 1, 7, False)}
THEIRS = {"000-89abcdef-ffffffffffffffff": Cursor("000-89abcdef-ffffffffffffffff", 1, 1, False)}


@pytest.fixture
def house(mariadb: Database, tmp_path: Path) -> House:
    return mysql_house(mariadb, tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def copy_of(folder: Path) -> Path:
    return Path(shutil.copytree(folder, folder.with_name("copy")))


def session_ids(database: Database) -> list[int]:
    sql = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND user = 'proxyd'"
    return [number for (number,) in database.query(sql)]


async def start(store: Any) -> None:
    """What a telemetry process does first."""
    await store.open()
    await store.cursors()


async def test_a_daemon_that_nobody_uses_keeps_the_other_waiting(house: House, mariadb: Database) -> None:
    idle = Bounds(connect=30.0, answer=60.0, lock=30, idle=0.2, server_wait=5)
    async with house.open(bounds=idle) as store:
        await store.commit(Batch(rows=rows(1), cursors=MINE), never)
        (number,) = session_ids(mariadb)
        twin = house.make(bounds=HASTY)
        loop = asyncio.get_running_loop()
        until = loop.time() + 2 * idle.server_wait  # the server ends who was silent for half of that
        while loop.time() < until:
            with pytest.raises(
                StoreError, match=rf"connection {number} from 127\.0\.0\.1:\d+ writes .*copy of state_dir"
            ):
                await twin.open()
        assert await store.cursors() == MINE
        assert number in session_ids(mariadb)
        await store.close()
        await twin.open()
        await twin.close()


async def test_a_lost_session_comes_back_while_nobody_uses_it(house: House, mariadb: Database) -> None:
    async with house.open(bounds=Bounds(idle=0.2)) as store:
        await store.cursors()
        (number,) = session_ids(mariadb)
        mariadb.query(f"KILL {number}")
        for _ in range(300):
            if session_ids(mariadb) not in ([], [number]):
                break
            await asyncio.sleep(0.1)
        with pytest.raises(StoreError, match="writes for this node"):
            await house.make(bounds=HASTY).open()


async def test_a_daemon_that_was_displaced_while_its_connection_was_lost_stores_nothing_more(
    house: House, mariadb: Database, folder: Path
) -> None:
    await start(first := house.make(owner=Owner(folder)))  # an earlier life, so that the copy is not an empty one
    await first.close()
    copy = copy_of(folder)
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port, owner=Owner(folder)) as store:
            await store.cursors()
            await store.commit(Batch(rows=rows(1), cursors=MINE), never)
            proxy.cut_all()
            # The other has what the image had, and not the token that this one made when it started.
            twin = house.make(owner=Owner(copy))
            await twin.open()
            with pytest.raises(StoreMisfit, match=rf"another state_dir stored under this node's name \({NODE}\)"):
                await twin.cursors()
            await twin.close()
            assert await store.cursors() == MINE


async def test_a_copy_that_came_first_is_seen_by_the_other(house: House, mariadb: Database, folder: Path) -> None:
    """The image was taken while it ran, so that the copy knows the token in force, and comes when the lock is free."""
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port, owner=Owner(folder)) as store:
            await store.cursors()
            await store.commit(Batch(rows=rows(1), cursors=MINE), never)
            copy = copy_of(folder)
            proxy.cut_all()
            async with house.open(owner=Owner(copy)) as twin:
                assert await twin.cursors() == MINE
                await twin.commit(Batch(cursors=THEIRS, forgotten=list(MINE)), never)
            for call in (lambda: store.commit(Batch(rows=rows(2), cursors=MINE), never), store.open, store.open):
                with pytest.raises(StoreMisfit, match=r"remove node\.id"):
                    await call()
    restarted = house.make(owner=Owner(folder))
    await restarted.open()
    with pytest.raises(StoreMisfit):
        await restarted.cursors()
    await restarted.close()
    assert len(house.stored()) == 1
    async with house.open(owner=Owner(copy)) as twin:
        assert await twin.cursors() == THEIRS


async def test_a_name_copied_alone_is_refused(house: House, folder: Path, tmp_path: Path) -> None:
    await start(first := house.make(owner=Owner(folder)))
    await first.close()
    await (twin := house.make(owner=Owner(tmp_path))).open()
    with pytest.raises(StoreMisfit, match="two daemons"):
        await twin.cursors()
    await twin.close()
    assert not (tmp_path / OWNER_NAME).exists()


async def test_restarts_and_a_database_that_lost_its_last_commits_are_nobody_elses(
    house: House, mariadb: Database, folder: Path
) -> None:
    before = None
    for _ in range(3):
        async with house.open(owner=Owner(folder)) as store:
            for _ in range(2):
                await store.cursors()
                await store.open()
        found = mariadb.query("SELECT segment FROM sys_ai_spool_offsets WHERE stream = '@owner'")
        assert found != before
        before = before or found
    mariadb.query("UPDATE sys_ai_spool_offsets SET segment = %s WHERE stream = '@owner'", before[0][0])
    async with house.open(owner=Owner(folder)) as store:
        await store.cursors()
        mariadb.query("DELETE FROM sys_ai_spool_offsets")  # what an operator does who has decided
        await store.open()
        assert await store.cursors() == {}
