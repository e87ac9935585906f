"""What every store promises, asked of SQLite and of MySQL by the same tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxyd.store.queries import WINDOW_SUM, user_totals, window_tokens
from proxyd.store.schema import Batch, Cursor, OpenTransaction, Row, StoreError, utc_text
from tests.daemon.store_house import NOW, House, SetAside, mysql_house, never, row, rows

COLUMNS = [
    *("transaction_id", "user_id", "model_id", "prompt_tokens", "completion_tokens", "created_at", "tenant"),
    *("request_id", "status", "estimated", "cached_tokens", "reasoning_tokens", "upstream", "attempts"),
    *("ttft_ms", "duration_ms"),
]
# Whatever trips over quoting, in SQL or in Python's formats.
HARD_TEXTS = [
    "it's", 'say "hi"', "back\\slash", "ends in \\", "100%", "%s %d %(x)s", "?", "a?b", "nul\0inside", "line\nline\r",
    "tab\t", "\x1a", "--", "/* */", ";", "'; DROP TABLE sys_ai_transactions; --", "\\'", "''", "\\0", "{me}", "Zürich",
    "日本語", "🦀 crab", "ａ", "\u202e", " lead and trail ", "`tick`", "\\\\'", "x" * 64, "é" * 64, "🦀" * 64,
]  # fmt: skip


@pytest.fixture(params=["sqlite", "mysql"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> House:
    if request.param == "sqlite":
        return House("sqlite", tmp_path / "telemetry.db")
    return mysql_house(request.getfixturevalue("mariadb"), tmp_path)


async def test_the_table_has_exactly_the_contracts_columns(house: House) -> None:
    async with house.open():
        pass
    if house.database is None:
        found = [column[1] for column in house.query("PRAGMA table_info(sys_ai_transactions)")]
    else:
        found = [column[0] for column in house.query("SHOW COLUMNS FROM sys_ai_transactions")]
    assert found == COLUMNS


async def test_a_row_is_stored_as_it_is(house: House) -> None:
    whole = Row(2**63 - 1, 65535, 2**32 - 1, 2**32 - 1, NOW + 0.9, "t", "id-1", "interrupted", 1, 5, 6, "up", 127, 7, 8)
    async with house.open() as store:
        assert await store.commit(Batch(rows=[whole], cursors={"s": Cursor("s", 1, 2, False)}), never) == 0
    ((number, *found),) = house.query(f"SELECT {', '.join(COLUMNS)} FROM sys_ai_transactions")
    assert number == 1
    found[4] = str(found[4])
    assert found == [*whole[:4], utc_text(NOW), *whole[5:]]


async def test_every_text_comes_back_as_it_was(house: House) -> None:
    batch = Batch(rows=[row(f"id-{n}", tenant=text, upstream=text) for n, text in enumerate(HARD_TEXTS)])
    async with house.open() as store:
        assert await store.commit(batch, never) == 0
    found = house.query("SELECT tenant, upstream FROM sys_ai_transactions ORDER BY transaction_id")
    assert found == [(text, text) for text in HARD_TEXTS]


async def test_rows_cursors_and_open_transactions_are_one_transaction(house: House) -> None:
    carried = OpenTransaction("s", 2**40, bytes(range(256)), b"")
    cursor = Cursor("s", 2**31, 2**40, False)
    async with house.open() as store:
        await store.commit(Batch(rows=[row()], cursors={"s": cursor}, carried=[carried]), never)
        assert await store.cursors() == {"s": cursor}
        assert await store.open_transactions() == [carried]
        later = Cursor("s", 2**31 + 1, 56, True)
        await store.commit(Batch(cursors={"s": later}, closed=[("s", 2**40)]), never)
        assert await store.cursors() == {"s": later}
        assert await store.open_transactions() == []


async def test_what_is_carried_is_upserted_then_closed_then_forgotten(house: House) -> None:
    first, second = OpenTransaction("s", 1, b"i", b"c"), OpenTransaction("s", 1, b"i", b"c2")
    async with house.open() as store:
        await store.commit(Batch(carried=[first]), never)
        await store.commit(Batch(carried=[second]), never)
        assert await store.open_transactions() == [second]
        await store.commit(Batch(carried=[first], closed=[("s", 1)]), never)
        assert await store.open_transactions() == []
        cursors = {name: Cursor(name, 1, 1, True) for name in ("s", "t")}
        others = [OpenTransaction("t", n, b"i", b"c") for n in (1, 2)]
        await store.commit(Batch(cursors=cursors, carried=[first, *others], forgotten=["s"]), never)
        assert await store.cursors() == {"t": cursors["t"]}
        assert await store.open_transactions() == others


async def test_many_streams_and_open_transactions_fit_into_one_batch(house: House) -> None:
    names = [f"{n:03d}-89abcdef-0123456789abcdef" for n in range(300)]
    batch = Batch(
        cursors={name: Cursor(name, 1, 1, False) for name in names},
        carried=[OpenTransaction(name, n, b"i" * 300, b"c" * 300) for name in names for n in range(3)],
    )
    async with house.open() as store:
        await store.commit(batch, never)
        assert await store.cursors() == batch.cursors
        assert sorted(await store.open_transactions()) == sorted(batch.carried)
        closed = [(name, n) for name in names for n in (0, 2)]
        await store.commit(Batch(closed=closed, forgotten=names[:10]), never)
        assert sorted(one.stream for one in await store.open_transactions()) == names[10:]
        assert set(await store.cursors()) == set(names[10:])


async def test_a_group_of_rows_alone_and_an_empty_one_are_fine(house: House) -> None:
    async with house.open() as store:
        assert await store.commit(Batch(), never) == 0
        assert await store.commit(Batch(rows=rows(3)), never) == 0
    assert house.stored() == ["r0", "r1", "r2"]


async def test_a_refused_row_is_set_aside_before_the_rest_is_committed(house: House) -> None:
    seen: list[list[str]] = []
    aside = SetAside()

    def look(refused: Any) -> None:
        seen.append(house.stored())
        aside(refused)

    bad = 2**64
    async with house.open() as store:
        assert await store.commit(Batch(rows=[row("a"), row("b", user=bad), row("c")]), look) == 1
    assert seen == [[]]
    assert aside.ids == ["b"]
    assert aside.rows[0][1]
    assert house.stored() == ["a", "c"]


async def test_a_row_that_cannot_be_set_aside_undoes_the_batch(house: House) -> None:
    def full(refused: Any) -> None:
        raise OSError("no space")

    async with house.open() as store:
        batch = Batch(rows=[row("a"), row("b", user=2**64)], cursors={"s": Cursor("s", 1, 1, False)})
        with pytest.raises((StoreError, OSError), match="no space"):
            await store.commit(batch, full)
        await store.open()
        assert await store.cursors() == {}
        assert house.stored() == []
        aside = SetAside()
        assert await store.commit(batch, aside) == 1
    assert house.stored() == ["a"]


async def test_a_row_without_any_sql_text_is_its_own_fault(house: House) -> None:
    bad: Any = [row("b", tenant="\ud800"), row("c", user="x"), row("d", created_at=float("nan"))]
    aside = SetAside()
    async with house.open() as store:
        if house.kind == "sqlite":
            bad = bad[:1]  # it takes text for a number
        assert await store.commit(Batch(rows=[row("a"), *bad, row("e")]), aside) == len(bad)
    assert aside.ids == [one.request_id for one in bad]
    assert house.stored() == ["a", "e"]


async def test_a_row_is_found_by_user_second_and_request(house: House) -> None:
    async with house.open() as store:
        await store.commit(Batch(rows=[row(created_at=NOW + 0.9)]), never)
        asked = [row(), row(user=1), row("x"), row(created_at=NOW + 1), row("' OR 1=1 --")]
        assert [await store.holds(one) for one in asked] == [True, False, False, False, False]


async def test_the_window_has_the_users_tokens_since_a_moment(house: House) -> None:
    some = [row(str(n), created_at=NOW + n, prompt_tokens=2**32 - 1) for n in range(4)]
    async with house.open() as store:
        assert await store.window_sum(42, NOW) == 0
        await store.commit(Batch(rows=[*some, row("other", user=7)]), never)
        assert [await store.window_sum(42, NOW + n) for n in range(5)] == [(4 - n) * (2**32 + 19) for n in range(5)]
        assert await store.window_sum(7, NOW) == 30


async def test_the_spends_are_by_second_oldest_first_and_bounded(house: House) -> None:
    some = [row(str(n), created_at=NOW + n // 2) for n in range(9)]
    async with house.open() as store:
        await store.commit(Batch(rows=list(reversed(some))), never)
        assert await store.spends(42, NOW + 1, 10) == [(NOW + 1, 60), (NOW + 2, 60), (NOW + 3, 60), (NOW + 4, 30)]
        assert await store.spends(42, NOW, 2) == [(NOW, 60), (NOW + 1, 60)]
        assert await store.spends(1, NOW, 2) == []


async def test_retention_deletes_the_oldest_in_small_batches(house: House) -> None:
    async with house.open() as store:
        await store.commit(Batch(rows=[row(str(n), created_at=NOW - n) for n in range(10)]), never)
        assert await store.newest() == NOW
        assert [await store.delete_older(NOW - 3, 4) for _ in range(3)] == [4, 2, 0]
    assert house.stored() == ["0", "1", "2", "3"]


async def test_opening_again_replaces_the_connection(house: House) -> None:
    async with house.open() as store:
        await store.commit(Batch(rows=[row("a")]), never)
        await store.open()
        await store.commit(Batch(rows=[row("b")]), never)
    assert house.stored() == ["a", "b"]


async def test_a_store_that_is_not_open_says_so(house: House) -> None:
    store = house.make()
    with pytest.raises(StoreError, match="not open"):
        await store.cursors()
    with pytest.raises(StoreError, match="not open"):
        await store.commit(Batch(rows=[row()]), never)
    await store.close()


async def test_a_reader_sees_what_is_committed_while_the_writer_is_open(house: House) -> None:
    async with house.open() as store:
        reader = house.reader()
        assert window_tokens(reader, 42, NOW - 1) == 0
        await store.commit(Batch(rows=rows(2)), never)
        assert window_tokens(reader, 42, NOW - 1) == 60
        assert user_totals(reader, 42, NOW).total_tokens == 60
        assert reader.fetch(WINDOW_SUM, (42, reader.timestamp(NOW + 1))) == [(None,)]
        reader.close()
