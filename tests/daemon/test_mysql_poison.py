"""Rows that the server refuses: found, set aside with its words, and their neighbours stored; and errors that are no
row's fault, which set nothing aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.store.mysql import STRANGE_TRIES
from proxyd.store.schema import Batch, Cursor, Row, StoreError
from tests.daemon.mariadb import Database
from tests.daemon.store_house import House, SetAside, mysql_house, never, row, rows

Spoil = Callable[[Row], Row]

# What a row may hold that the table does not take, and the number of the server's error.
FAULTS: dict[str, tuple[int, Spoil]] = {
    "out of range": (1264, lambda one: one._replace(user_id=2**64)),
    "negative": (1264, lambda one: one._replace(prompt_tokens=-1)),
    "too many attempts": (1264, lambda one: one._replace(attempts=128)),
    "too long": (1406, lambda one: one._replace(tenant="x" * 65)),
    "not ascii": (1366, lambda one: one._replace(request_id=f"{one.request_id}-é")),
    "before the epoch": (1292, lambda one: one._replace(created_at=-5.0)),
    "after 2038": (1292, lambda one: one._replace(created_at=2.0**33)),
}
SIZES = (1, 2, 1000)


@pytest.fixture
def house(mariadb: Database, tmp_path: Path) -> House:
    return mysql_house(mariadb, tmp_path)


def trigger(mariadb: Database, condition: str, number: int, state: str = "45000") -> None:
    mariadb.query(
        "CREATE TRIGGER guard BEFORE INSERT ON sys_ai_transactions FOR EACH ROW"
        f" IF {condition} THEN SIGNAL SQLSTATE '{state}' SET MESSAGE_TEXT = 'not this one', MYSQL_ERRNO = {number};"
        " END IF"
    )


def batch_of(some: list[Row]) -> Batch:
    return Batch(rows=some, cursors={"s": Cursor("s", 1, 1, False)})


async def commit(house: House, batch: Batch) -> SetAside:
    """Stores it; the cursors are there, whatever was set aside."""
    aside = SetAside()
    async with house.open() as store:
        assert await store.commit(batch, aside) == len(aside.rows)
        assert await store.cursors() == batch.cursors
    return aside


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_row_with_a_bad_value_is_set_aside_alone(house: House, fault: str, size: int) -> None:
    number, spoil = FAULTS[fault]
    some = rows(size)
    bad = spoil(some[size // 3])
    some[size // 3] = bad
    aside = await commit(house, batch_of(some))
    ((refused, reason),) = aside.rows
    assert refused is bad
    assert reason.startswith(f"{number}: ")
    assert house.stored() == [one.request_id for one in some if one is not bad]


@pytest.mark.parametrize("size", SIZES)
async def test_a_row_that_a_trigger_refuses_is_set_aside_alone(house: House, mariadb: Database, size: int) -> None:
    trigger(mariadb, "NEW.tenant = 'evil'", 1644)
    some = rows(size)
    some[-1] = some[-1]._replace(tenant="evil")
    aside = await commit(house, batch_of(some))
    assert aside.rows == [(some[-1], "1644: not this one")]
    assert house.stored() == [one.request_id for one in some[:-1]]


async def test_many_bad_rows_anywhere_are_set_aside_in_their_order(house: House) -> None:
    some = rows(1000)
    bad = sorted({0, 1, 2, 499, 500, 998, 999, *range(100, 160, 7)})
    kinds = list(FAULTS.values())
    for turn, place in enumerate(bad):
        some[place] = kinds[turn % len(kinds)][1](some[place])
    aside = await commit(house, batch_of(some))
    assert [refused for refused, _ in aside.rows] == [some[place] for place in bad]
    assert house.stored() == [one.request_id for place, one in enumerate(some) if place not in bad]


async def test_a_group_of_nothing_but_bad_rows_still_moves_its_cursors(house: House) -> None:
    some = [one._replace(tenant="x" * 65) for one in rows(50)]
    aside = await commit(house, batch_of(some))
    assert [refused for refused, _ in aside.rows] == some
    assert house.stored() == []


@pytest.mark.parametrize(
    ("sql", "number"),
    [
        ("ALTER TABLE sys_ai_transactions ADD CONSTRAINT few CHECK (prompt_tokens < 100)", 4025),
        ("CREATE UNIQUE INDEX once ON sys_ai_transactions (prompt_tokens, request_id)", 1062),
        (
            "ALTER TABLE sys_ai_transactions ADD CONSTRAINT known FOREIGN KEY (model_id) REFERENCES models (id)",
            1452,
        ),
    ],
)
async def test_a_constraint_that_somebody_added_refuses_single_rows(
    house: House, mariadb: Database, sql: str, number: int
) -> None:
    mariadb.query("CREATE TABLE models (id SMALLINT UNSIGNED PRIMARY KEY) ENGINE=InnoDB")
    mariadb.query("INSERT INTO models VALUES (1)")
    mariadb.query(sql)
    some = rows(20)
    some[7] = some[6]._replace(model_id=2) if number == 1452 else some[6]
    if number == 4025:
        some[7] = some[7]._replace(request_id="r7", prompt_tokens=100)
    aside = await commit(house, batch_of(some))
    ((refused, reason),) = aside.rows
    assert refused is some[7]
    assert reason.startswith(f"{number}: ")
    assert len(house.stored()) == 19


@pytest.mark.parametrize("number", [1205, 1213, 1040, 1114, 1021, 1142, 1290, 1317, 1364, 1526, 1969, 3024, 1665])
async def test_an_error_of_the_server_sets_nothing_aside_however_often_it_comes(
    house: House, mariadb: Database, number: int
) -> None:
    trigger(mariadb, "NEW.tenant = 'evil'", number)
    batch = batch_of([row("a"), row("b", tenant="evil")])
    async with house.open() as store:
        for _ in range(STRANGE_TRIES + 2):
            with pytest.raises(StoreError, match=f"error {number}"):
                await store.commit(batch, never)
            await store.open()
        mariadb.query("DROP TRIGGER guard")
        assert await store.commit(batch, never) == 0
    assert house.stored() == ["a", "b"]


async def test_a_lock_conflict_while_the_bad_row_is_looked_for_undoes_everything(
    house: House, mariadb: Database
) -> None:
    trigger(mariadb, "NEW.tenant = 'late'", 1205)
    batch = batch_of([row("a"), row("b", tenant="x" * 65), row("c", tenant="late")])
    async with house.open() as store:
        with pytest.raises(StoreError, match="error 1205"):
            await store.commit(batch, never)
        await store.open()
        assert await store.cursors() == {}
        assert house.stored() == []


@pytest.mark.parametrize("size", SIZES)
async def test_an_unknown_error_is_the_rows_fault_after_some_tries(house: House, mariadb: Database, size: int) -> None:
    trigger(mariadb, "NEW.tenant = 'evil'", 5999)
    some = rows(size)
    some[0] = some[0]._replace(tenant="evil")
    batch = batch_of(some)
    aside = SetAside()
    async with house.open() as store:
        for _ in range(STRANGE_TRIES):
            with pytest.raises(StoreError, match="error 5999"):
                await store.commit(batch, never)
            await store.open()
        assert await store.commit(batch, aside) == 1
        assert aside.rows == [(some[0], "5999: not this one")]
        assert house.stored() == [one.request_id for one in some[1:]]
        again = batch_of([row("next", tenant="evil")])
        with pytest.raises(StoreError, match="error 5999"):
            await store.commit(again, never)  # counted for each group anew


async def test_an_unknown_error_of_every_row_sets_nothing_aside(house: House, mariadb: Database) -> None:
    async with house.open() as store:
        await store.commit(batch_of([row("first")]), never)
        trigger(mariadb, "TRUE", 5999)
        batch = batch_of(rows(3))
        for _ in range(STRANGE_TRIES + 5):
            with pytest.raises(StoreError, match="error 5999"):
                await store.commit(batch, never)
            await store.open()
        mariadb.query("DROP TRIGGER guard")
        assert await store.commit(batch, never) == 0
    assert house.stored() == ["first", "r0", "r1", "r2"]


async def test_a_group_larger_than_a_packet_is_split_and_its_bad_row_found(house: House, mariadb: Database) -> None:
    (size,) = mariadb.query("SELECT @@GLOBAL.max_allowed_packet")[0]
    mariadb.query("SET GLOBAL max_allowed_packet = 16384")
    try:
        some: list[Any] = [row(f"r{n}", tenant="\\" * 64, upstream="'" * 64) for n in range(1000)]
        some[777] = some[777]._replace(tenant="x" * 65)
        cursors = {f"stream-{n}": Cursor(f"stream-{n}", 1, 1, False) for n in range(1000)}
        aside = await commit(house, Batch(rows=some, cursors=cursors))
        assert aside.ids == ["r777"]
        assert house.stored() == [one.request_id for one in some if one is not some[777]]
    finally:
        mariadb.query("SET GLOBAL max_allowed_packet = %s", size)


async def test_a_counter_at_its_end_is_no_rows_fault(house: House, mariadb: Database) -> None:
    mariadb.query("ALTER TABLE sys_ai_transactions AUTO_INCREMENT = 18446744073709551615")
    async with house.open() as store:
        with pytest.raises(StoreError):
            await store.commit(batch_of(rows(2)), never)
    assert house.stored() == []
