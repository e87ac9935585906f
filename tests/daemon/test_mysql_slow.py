"""A server that is slow for each row, and one whose settings for everybody are odd."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxyd.store.mysql_rows import STRANGE_TRIES
from proxyd.store.mysql_session import Bounds
from proxyd.store.schema import Batch, Cursor, StoreError
from tests.daemon.mariadb import Database
from tests.daemon.store_house import House, Log, SetAside, mysql_house, never, row, rows

# 60 rows take 3 s, and 30 almost all of its 2.
SLOW = "CREATE TRIGGER slow BEFORE INSERT ON sys_ai_transactions FOR EACH ROW SET @x = SLEEP(0.05)"
TWO_S = Bounds(connect=30.0, answer=2.0, lock=1)


@pytest.fixture
def house(mariadb: Database, tmp_path: Path) -> House:
    return mysql_house(mariadb, tmp_path)


def batch_of(size: int, prefix: str) -> Batch:
    return Batch(rows=rows(size, prefix), cursors={"s": Cursor("s", 1, 1, False)})


async def test_a_group_too_large_for_a_slow_server_is_stored_in_pieces(house: House, mariadb: Database) -> None:
    mariadb.query(SLOW)
    log, batch = Log(), batch_of(60, "a")
    failures = 0
    async with house.open(bounds=TWO_S, log=log) as store:
        while True:
            try:
                await store.commit(batch, never)
                break
            except StoreError as error:
                assert "no answer within 2 s to an INSERT of" in str(error)  # noqa: PT017
                assert "telemetry.batch_rows" in str(error)  # noqa: PT017
                failures += 1
                await store.open()
                assert await store.cursors() == {}
        assert 1 <= failures <= 2  # 60 rows and, on a busy machine, 30
        await store.commit(batch_of(40, "b"), never)  # it has learned
        told = [fields for event, fields in log.lines if event == "store_slow"]
        assert all(fields["next_rows"] < fields["rows"] and fields["took_s"] > 1 for fields in told)
        mariadb.query("DROP TRIGGER slow")
        for number in range(10):
            await store.commit(batch_of(100, f"c{number}-"), never)
    assert len(house.stored()) == 60 + 40 + 1000


async def test_a_bad_row_is_found_on_a_slow_server(house: House, mariadb: Database) -> None:
    mariadb.query(SLOW)
    batch, aside = batch_of(50, "a"), SetAside()
    batch.rows[33] = batch.rows[33]._replace(tenant="x" * 65)
    async with house.open(bounds=TWO_S) as store:
        for _ in range(5):
            try:
                assert await store.commit(batch, aside) == 1
                break
            except StoreError:
                await store.open()
        assert await store.cursors() == batch.cursors
    assert aside.ids == ["a33"]
    assert len(house.stored()) == 49


async def test_a_limit_for_every_select_of_the_server_is_not_ours(mariadb: Database, tmp_path: Path) -> None:
    mariadb.query("SET GLOBAL sql_select_limit = 1")
    try:
        house = mysql_house(mariadb, tmp_path)
        cursors = {name: Cursor(name, 1, 1, False) for name in ("s", "t", "u")}
        async with house.open() as store:
            await store.commit(Batch(rows=rows(3), cursors=cursors), never)
            assert await store.cursors() == cursors
            reader = house.reader()
            assert len(reader.fetch("SELECT request_id FROM sys_ai_transactions")) == 3
            reader.close()
    finally:
        mariadb.query("SET GLOBAL sql_select_limit = DEFAULT")


async def test_after_a_restart_a_row_of_the_table_tells_whose_fault_a_strange_error_is(
    house: House, mariadb: Database
) -> None:
    async with house.open() as store:
        await store.commit(Batch(rows=[row("old", tenant="acme")]), never)
    mariadb.query(
        "CREATE TRIGGER guard BEFORE INSERT ON sys_ai_transactions FOR EACH ROW IF NEW.tenant <> 'acme' THEN"
        " SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'who is this', MYSQL_ERRNO = 5999; END IF"
    )
    batch, aside = Batch(rows=[row("new", tenant="evil")]), SetAside()
    async with house.open() as store:
        for _ in range(STRANGE_TRIES):
            with pytest.raises(StoreError, match="error 5999"):
                await store.commit(batch, never)
            await store.open()
        assert await store.commit(batch, aside) == 1
    assert aside.ids == ["new"]
    assert house.stored() == ["old"]
