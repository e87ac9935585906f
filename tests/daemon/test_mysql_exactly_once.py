"""Exactly once on MySQL: connections cut, servers frozen and killed, transactions that nobody believes in any more."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pymysql
import pytest

from proxyd.store.schema import Batch, Cursor, OpenTransaction, StoreError
from tests.daemon.harness import wait_for
from tests.daemon.mariadb import Database
from tests.daemon.mysql_cut import CutProxy
from tests.daemon.store_house import HASTY, NODE, House, Log, mysql_house, never, row, rows

STREAM = "000-89abcdef-0123456789abcdef"
OTHERS = ("0000000000000000", "ffffffffffffffff")  # before and behind NODE in the index


@pytest.fixture
def house(mariadb: Database, tmp_path: Path) -> House:
    return mysql_house(mariadb, tmp_path)


def group(number: int, size: int = 10) -> Batch:
    """Its position tells it from every other."""
    return Batch(rows=rows(size, f"{number}-"), cursors={STREAM: Cursor(STREAM, 1, number + 1, False)})


async def deliver(store: Any, batch: Batch, tries: int = 200) -> int:
    """What the telemetry process does: tries until the group is stored; how often it failed."""
    is_open = True
    for failures in range(tries):
        try:
            if not is_open:
                await store.open()
                recorded = await store.cursors()
                is_open = True
                if all(recorded.get(name) == cursor for name, cursor in batch.cursors.items()):
                    return failures
            await store.commit(batch, never)
            return failures
        except StoreError:
            is_open = False
            await asyncio.sleep(0.01)
    raise AssertionError(f"not stored in {tries} tries")


def expected(batches: Sequence[Batch]) -> list[str]:
    return [one.request_id for batch in batches for one in batch.rows]


def sessions(database: Database) -> int:
    sql = "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND user = 'proxyd'"
    return int(database.query(sql)[0][0])


def waiting(database: Database) -> int:
    """Sessions of this database that wait for a row: the server is shared, and another test's may be left on it."""
    sql = (
        "SELECT COUNT(*) FROM information_schema.innodb_trx t JOIN information_schema.processlist p"
        " ON p.id = t.trx_mysql_thread_id WHERE t.trx_state = 'LOCK WAIT' AND p.db = DATABASE()"
    )
    return int(database.query(sql)[0][0])


async def until(what: Any, seconds: float = 30.0) -> None:
    await asyncio.get_running_loop().run_in_executor(None, wait_for, what, seconds)


async def test_a_commit_whose_answer_is_lost_is_found_and_not_repeated(house: House, mariadb: Database) -> None:
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            batches = [group(number) for number in range(10)]
            for batch in batches:
                proxy.cut_after_commit()
                assert await deliver(store, batch) == 1
                proxy.cut_after_commit(0)
        assert proxy.cuts == 10
    assert house.stored() == expected(batches)


async def test_a_commit_that_never_arrived_is_repeated(house: House, mariadb: Database) -> None:
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            batches = [group(number) for number in range(10)]
            for batch in batches:
                proxy.cut_before_commit()
                assert await deliver(store, batch) == 1
    assert house.stored() == expected(batches)


@pytest.mark.parametrize("seed", range(4))
async def test_cuts_at_any_packet_lose_and_double_nothing(house: House, mariadb: Database, seed: int) -> None:
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            proxy.cut_at_random(0.02, seed)
            batches = [group(number) for number in range(100)]
            for batch in batches:
                await deliver(store, batch)
            proxy.cut_at_random(0.0)
        assert proxy.cuts > 10
    assert house.stored() == expected(batches)


async def test_a_server_frozen_with_the_commit_in_its_buffer(house: House, mariadb: Database) -> None:
    batch = group(0)
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port, bounds=HASTY) as store:
            proxy.at_commit(mariadb.server.freeze)
            with pytest.raises(StoreError, match="no answer within 2 s"):
                await store.commit(batch, never)
            with pytest.raises(StoreError, match="no connection within 2 s"):
                await store.open()
            mariadb.server.thaw()
            await deliver(store, batch)
            assert await store.cursors() == batch.cursors
    assert house.stored() == expected([batch])


@pytest.mark.parametrize("at", ["commit", "start"])
async def test_a_server_killed_with_the_commit_in_its_hand(house: House, mariadb: Database, at: str) -> None:
    batches = [group(number) for number in range(4)]
    server = mariadb.server
    with CutProxy(server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            for batch in batches:
                if at == "commit":
                    proxy.at_commit(server.kill)
                else:
                    server.kill()
                delivery = asyncio.create_task(deliver(store, batch, 3000))
                await until(lambda: not server.is_running)
                await asyncio.sleep(0.1)
                server.start()
                await delivery
    assert house.stored() == expected(batches)


async def test_a_database_that_is_frozen_gives_an_error_within_the_deadline_and_no_session_stays(
    house: House, mariadb: Database
) -> None:
    async with house.open(bounds=HASTY) as store:
        mariadb.server.freeze()
        for call in (store.commit(group(0), never), store.cursors(), store.window_sum(1, 0.0)):
            with pytest.raises(StoreError, match=r"no answer|not open"):
                await asyncio.wait_for(call, 20)
        mariadb.server.thaw()
        await until(lambda: sessions(mariadb) == 0)
        await deliver(store, group(0))
        assert sessions(mariadb) == 1


async def test_a_transaction_that_only_the_server_believes_in_is_ended_by_its_own_process(
    house: House, mariadb: Database
) -> None:
    batch = group(0)
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port, bounds=HASTY) as store:
            proxy.strand_at_commit()
            with pytest.raises(StoreError):
                await store.commit(batch, never)
            assert proxy.stranded == 1
            await deliver(store, batch, 5)  # the server would end it after a minute: it is killed
            proxy.release()
            await deliver(store, group(1))
    assert house.stored() == expected([batch, group(1)])


async def test_a_successor_waits_for_the_end_of_such_a_transaction(house: House, mariadb: Database) -> None:
    batch = group(0)
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            proxy.strand_at_commit()
            with pytest.raises(StoreError):
                await store.commit(batch, never)
            successor = house.make(bounds=HASTY)
            with pytest.raises(StoreError, match="writes for this node"):
                await successor.open()
            proxy.release()
            await until(lambda: house.stored() != [])
            await deliver(successor, batch)
            assert await successor.cursors() == batch.cursors
            await successor.close()
    assert house.stored() == expected([batch])


@pytest.mark.parametrize(
    "sql",
    [
        f"INSERT INTO sys_ai_spool_offsets VALUES ('{NODE}', 'new', 1, 7, 0)",
        f"UPDATE sys_ai_spool_offsets SET position = 7 WHERE node = '{NODE}'",
        f"DELETE FROM sys_ai_spool_offsets WHERE node = '{NODE}'",
    ],
)
@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_cursors_waits_for_a_running_transaction_even_without_the_nodes_lock(
    house: House, mariadb: Database, sql: str, end: str
) -> None:
    async with house.open() as store:
        await store.commit(group(0), never)
        before = await store.cursors()
        other = mariadb.connect(autocommit=False)
        with other.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute(sql)
            reading = asyncio.create_task(store.cursors())
            await until(lambda: waiting(mariadb) == 1)
            assert not reading.done()
            cursor.execute(end)
        other.close()
        found = await reading
        assert (found == before) == (end == "ROLLBACK")


async def test_reading_the_cursors_puts_what_it_saw_on_disk(house: House, mariadb: Database) -> None:
    def lsn(name: str) -> int:
        return int(mariadb.query(f"SHOW GLOBAL STATUS LIKE 'Innodb_lsn_{name}'")[0][1])

    async with house.open() as store:
        mariadb.query("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
        try:
            mariadb.query("INSERT INTO sys_ai_spool_open VALUES ('x', 'x', 1, '', '')")
            mariadb.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
            before = lsn("current")
            await store.cursors()
            assert lsn("flushed") > before
        finally:
            mariadb.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1")


async def test_a_cut_between_two_groups_goes_unnoticed(house: House, mariadb: Database) -> None:
    with CutProxy(mariadb.server.port) as proxy:
        async with house.open(port=proxy.port) as store:
            for number, cut in enumerate((proxy.cut_all, mariadb.server.restart, mariadb.server.kill)):
                await store.commit(group(number), never)
                cut()
                mariadb.server.heal()
            assert await store.window_sum(42, 0.0) == 900
            proxy.cut_all()
            assert await store.holds(row("0-1"))
            proxy.cut_all()
            assert await store.delete_older(0.0, 10) == 0
            await store.commit(group(3), never)
    assert house.stored() == expected([group(number) for number in range(4)])


async def test_nodes_on_one_database_do_not_touch_each_others_streams(house: House, mariadb: Database) -> None:
    carried = OpenTransaction(STREAM, 1, b"i", b"c")
    async with house.open() as mine:
        await mine.commit(Batch(cursors={STREAM: Cursor(STREAM, 1, 1, False)}, carried=[carried]), never)
        for other in OTHERS:
            async with house.open(node=other) as theirs:
                assert await theirs.cursors() == {}
                assert await theirs.open_transactions() == []
                later = Batch(cursors={STREAM: Cursor(STREAM, 9, 9, True)}, closed=[(STREAM, 1)])
                await theirs.commit(later, never)
                assert await theirs.cursors() == later.cursors
                await theirs.commit(Batch(forgotten=[STREAM]), never)
                assert await theirs.cursors() == {}
        assert await mine.cursors() == {STREAM: Cursor(STREAM, 1, 1, False)}
        assert await mine.open_transactions() == [carried]


@pytest.mark.parametrize("other", OTHERS)
async def test_a_node_in_the_middle_of_a_transaction_keeps_no_other_waiting(
    house: House, mariadb: Database, other: str
) -> None:
    async with house.open(node=other) as theirs:
        await theirs.commit(group(0), never)
    held = mariadb.connect(autocommit=False)
    with held.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        cursor.execute(f"UPDATE sys_ai_spool_offsets SET position = 99 WHERE node = '{other}'")
        cursor.execute(f"INSERT INTO sys_ai_spool_offsets VALUES ('{other}', 'new', 1, 1, 0)")
        cursor.execute(f"INSERT INTO sys_ai_spool_open VALUES ('{other}', '{STREAM}', 1, '', '')")
        async with house.open(bounds=HASTY) as mine:
            assert await mine.cursors() == {}
            await mine.commit(group(1), never)
            await mine.commit(Batch(carried=[OpenTransaction(STREAM, 1, b"i", b"c")]), never)
            await mine.commit(Batch(cursors=group(2).cursors, closed=[(STREAM, 1)]), never)
            assert await mine.cursors() == group(2).cursors
            await mine.commit(Batch(forgotten=[STREAM]), never)
            assert await mine.cursors() == {}
        cursor.execute("ROLLBACK")
    held.close()


async def test_a_deadlock_is_an_error_and_the_whole_group_is_tried_again(house: House, mariadb: Database) -> None:
    async with house.open() as store:
        await store.commit(group(0), never)
        mariadb.query("CREATE TABLE heavy (a INT PRIMARY KEY) ENGINE=InnoDB")
        rival = mariadb.connect(autocommit=False)
        with rival.cursor() as cursor:
            # The server undoes the lighter transaction: the rival has written more.
            cursor.execute("INSERT INTO heavy SELECT seq FROM seq_1_to_5000")
            cursor.execute(f"SELECT * FROM sys_ai_spool_offsets WHERE node = '{NODE}' FOR UPDATE")
            committing = asyncio.create_task(store.commit(group(1), never))
            await until(lambda: waiting(mariadb) == 1)
            loop = asyncio.get_running_loop()
            sql = "UPDATE sys_ai_transactions SET attempts = 2 WHERE user_id = 42"
            await loop.run_in_executor(None, cursor.execute, sql)
            with pytest.raises(StoreError, match=r"error 1213"):
                await committing
            cursor.execute("ROLLBACK")
        rival.close()
        await deliver(store, group(1))
    assert house.stored() == expected([group(0), group(1)])


async def test_a_lock_that_somebody_holds_is_an_error_in_words(house: House, mariadb: Database) -> None:
    async with house.open(bounds=HASTY) as store:
        await store.commit(group(0), never)
        holder = mariadb.connect(autocommit=False)
        with holder.cursor() as cursor:
            cursor.execute("SELECT * FROM sys_ai_spool_offsets FOR UPDATE")
            with pytest.raises(StoreError, match="error 1205"):
                await store.commit(group(1), never)
            cursor.execute("ROLLBACK")
        holder.close()
        await deliver(store, group(1))
    assert house.stored() == expected([group(0), group(1)])


async def test_a_cancelled_commit_leaves_no_session_and_no_doubt(house: House, mariadb: Database) -> None:
    async with house.open() as store:
        await store.commit(group(0), never)
        holder = mariadb.connect(autocommit=False)
        with holder.cursor() as cursor:
            cursor.execute("SELECT * FROM sys_ai_spool_offsets FOR UPDATE")
            committing = asyncio.create_task(store.commit(group(1), never))
            await until(lambda: waiting(mariadb) == 1)
            committing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await committing
            with pytest.raises(StoreError, match="not open"):
                await store.cursors()
            cursor.execute("ROLLBACK")
        holder.close()
        await store.open()
        assert await store.cursors() == group(0).cursors
    assert house.stored() == expected([group(0)])


async def test_an_error_says_where_and_what_and_never_the_password(house: House, mariadb: Database) -> None:
    log = Log()
    async with house.open(log=log) as store:
        mariadb.query("ALTER TABLE sys_ai_transactions RENAME TO gone")
        with pytest.raises(StoreError) as caught:
            await store.commit(group(0), never)
        message = str(caught.value)
        assert "sys_ai_transactions' doesn't exist (error 1146)" in message
        assert f"mysql proxyd@127.0.0.1:{mariadb.server.port}/{mariadb.name}: " in message
        assert mariadb.password not in message
        assert log.lines == []
    with pytest.raises(pymysql.Error):
        mariadb.query("SELECT 1 FROM sys_ai_transactions")
