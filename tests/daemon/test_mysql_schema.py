"""MySQL's schema, plans and settings on a real server: compared, created, read from indexes alone, kept small."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from proxyd.config.secrets import Secret
from proxyd.store.mysql import MysqlReader, MysqlStore
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_apply import apply, ddl_text, inspect
from proxyd.store.queries import USER_TOTALS, WINDOW_SUM
from proxyd.store.schema import Batch, Store, StoreError, StoreMisfit, StoreMissing, utc_text
from proxyd.store.schema_mysql import MYSQL_DDL, TABLES
from tests.daemon.mariadb import PASSWORD, Database, MariaDb
from tests.daemon.store_house import HASTY, NODE, NOW, House, Log, mysql_house, never, row, rows

FOUNDING = """
CREATE TABLE sys_ai_transactions (
    transaction_id BIGINT(20) UNSIGNED NOT NULL AUTO_INCREMENT,
    user_id BIGINT(20) UNSIGNED NOT NULL,
    model_id SMALLINT(5) UNSIGNED NOT NULL,
    prompt_tokens INT(10) UNSIGNED NOT NULL,
    completion_tokens INT(10) UNSIGNED NOT NULL,
    created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (transaction_id),
    INDEX idx_user_time (user_id, created_at)
) ENGINE=InnoDB
"""
NAMES = [table.name for table in TABLES]


@pytest.fixture
def address(mariadb: Database) -> MysqlAddress:
    return MysqlAddress.parse(mariadb.url())


@pytest.fixture
def house(mariadb: Database, tmp_path: Path) -> House:
    return mysql_house(mariadb, tmp_path)


async def opened(address: MysqlAddress, log: Log | None = None) -> Store:
    store = MysqlStore(address, NODE, log, HASTY)
    try:
        await store.open()
    finally:
        await store.close()
    return store


# -- the schema --------------------------------------------------------------------------------------------------------


async def test_an_empty_database_is_told_so_and_nothing_is_created(mariadb: Database, address: MysqlAddress) -> None:
    with pytest.raises(StoreMisfit, match=r"table sys_ai_transactions is missing.*run `proxyd schema --apply`"):
        await opened(address)
    assert mariadb.query("SHOW TABLES") == []
    with pytest.raises(StoreMissing, match="proxyd schema --apply"):
        MysqlReader(address)


async def test_apply_creates_all_once(mariadb: Database, address: MysqlAddress) -> None:
    assert apply(address) == ([f"table {name}" for name in NAMES], [])
    assert apply(address) == ([], [])
    assert inspect(address) == []
    assert sorted(name for (name,) in mariadb.query("SHOW TABLES")) == sorted(NAMES)
    await opened(address)


def test_the_printed_statements_make_the_same_schema(mariadb: Database, address: MysqlAddress) -> None:
    for statement in ddl_text().split(";\n"):
        text = re.sub(r"^--.*$", "", statement, flags=re.MULTILINE).strip().rstrip(";")
        if text:
            mariadb.query(text)
    assert inspect(address) == []


@pytest.mark.parametrize("charset", ["latin1", "utf8mb4"])
async def test_the_founding_table_gets_what_it_lacks_and_keeps_its_rows(
    mariadb: Database, address: MysqlAddress, charset: str
) -> None:
    mariadb.query(f"ALTER DATABASE CHARACTER SET {charset}")
    mariadb.query(FOUNDING)
    mariadb.query(
        "INSERT INTO sys_ai_transactions (user_id, model_id, prompt_tokens, completion_tokens) VALUES (7,1,2,3)"
    )
    with pytest.raises(StoreMisfit, match=r"columns tenant, request_id, .* are missing"):
        await opened(address)
    created, differing = apply(address)
    assert differing == []
    assert [subject.split()[0] for subject in created] == ["columns", "index", "index", "table", "table"]
    assert apply(address) == ([], [])
    store = MysqlStore(address, NODE)
    await store.open()
    await store.commit(Batch(rows=[row()]), never)
    await store.close()
    found = mariadb.query("SELECT user_id, tenant, status, prompt_tokens FROM sys_ai_transactions")
    assert found == [(7, "default", "completed", 2), (42, "acme", "completed", 10)]


async def test_one_missing_column_is_added(mariadb: Database, address: MysqlAddress) -> None:
    apply(address)
    mariadb.query("ALTER TABLE sys_ai_transactions DROP COLUMN ttft_ms")
    with pytest.raises(StoreMisfit, match="column ttft_ms of sys_ai_transactions is missing; run"):
        await opened(address)
    assert apply(address) == (["column ttft_ms of sys_ai_transactions"], [])


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("ALTER TABLE sys_ai_transactions MODIFY user_id INT UNSIGNED", "user_id .* is int.* must be bigint unsigned"),
        ("ALTER TABLE sys_ai_transactions MODIFY prompt_tokens INT", "column prompt_tokens .* must be int unsigned"),
        ("ALTER TABLE sys_ai_transactions MODIFY created_at DATETIME", "is datetime and must be timestamp"),
        ("ALTER TABLE sys_ai_transactions MODIFY tenant VARCHAR(10)", r"tenant .* is varchar\(10\) and must be"),
        (
            "ALTER TABLE sys_ai_transactions MODIFY tenant VARCHAR(64) CHARACTER SET latin1",
            "tenant .* character set latin1 and must have utf8mb4",
        ),
        ("ALTER TABLE sys_ai_transactions MODIFY transaction_id BIGINT UNSIGNED", "is not AUTO_INCREMENT"),
        ("ALTER TABLE sys_ai_transactions ADD COLUMN note INT NOT NULL", "note .* not proxyd's, NOT NULL and without"),
        ("ALTER TABLE sys_ai_transactions DROP COLUMN model_id", "model_id .* is missing: somebody else's table"),
        ("ALTER TABLE sys_ai_transactions ENGINE=MyISAM", "is a MyISAM table and must be an InnoDB table"),
        (
            "ALTER TABLE sys_ai_spool_offsets DROP PRIMARY KEY, ADD PRIMARY KEY (stream)",
            r"primary key of sys_ai_spool_offsets is \(stream\), not \(node, stream\)",
        ),
        ("ALTER TABLE sys_ai_spool_open DROP COLUMN node, ADD PRIMARY KEY (stream, txn)", "column node .* is missing"),
    ],
)  # fmt: skip
async def test_what_is_there_and_wrong_is_named_and_never_altered(
    mariadb: Database, address: MysqlAddress, sql: str, words: str
) -> None:
    apply(address)
    if "DROP COLUMN node" in sql:
        mariadb.query("ALTER TABLE sys_ai_spool_open DROP PRIMARY KEY")
    mariadb.query(sql)
    with pytest.raises(StoreMisfit, match=rf"{words}.*; change it by hand"):
        await opened(address)
    before = [mariadb.query(f"SHOW CREATE TABLE {name}") for name in NAMES]
    created, differing = apply(address)
    assert created == []
    assert any(re.search(words, line) for line in differing)
    assert [mariadb.query(f"SHOW CREATE TABLE {name}") for name in NAMES] == before


async def test_a_view_under_our_name_is_refused(mariadb: Database, address: MysqlAddress) -> None:
    apply(address)
    mariadb.query("RENAME TABLE sys_ai_transactions TO t")
    mariadb.query("CREATE VIEW sys_ai_transactions AS SELECT * FROM t")
    with pytest.raises(StoreMisfit, match="sys_ai_transactions is a view"):
        await opened(address)


@pytest.mark.parametrize(
    "sql",
    [
        "ALTER TABLE sys_ai_transactions MODIFY model_id INT UNSIGNED, MODIFY tenant VARCHAR(99), MODIFY attempts INT",
        "ALTER TABLE sys_ai_transactions ADD COLUMN note VARCHAR(10), ADD COLUMN cost INT NOT NULL DEFAULT 0",
        "ALTER TABLE sys_ai_transactions ADD INDEX mine (tenant)",
        "ALTER TABLE sys_ai_spool_open MODIFY intent LONGBLOB",
    ],
)
async def test_a_schema_with_more_room_than_ours_is_fine(mariadb: Database, address: MysqlAddress, sql: str) -> None:
    apply(address)
    mariadb.query(sql)
    await opened(address)


async def test_a_missing_index_is_told_once_and_does_not_stop_the_rows(
    mariadb: Database, address: MysqlAddress
) -> None:
    apply(address)
    mariadb.query("ALTER TABLE sys_ai_transactions DROP INDEX idx_sys_ai_user_window")
    log = Log()
    store = MysqlStore(address, NODE, log)
    for _ in range(2):
        await store.open()
        await store.commit(Batch(rows=[row()]), never)
    await store.close()
    expected = {"index": "index idx_sys_ai_user_window", "complaint": "is missing"}
    assert log.lines == [("store_index_missing", expected)]
    assert apply(address) == (["index idx_sys_ai_user_window"], [])


# -- settings ----------------------------------------------------------------------------------------------------------


async def test_settings_that_may_lose_rows_are_told_once_with_what_they_cost(house: House, mariadb: Database) -> None:
    log = Log()
    store = house.make(log=log)
    await store.open()
    assert log.lines == []
    try:
        for value in (2, 2, 0):
            mariadb.query(f"SET GLOBAL innodb_flush_log_at_trx_commit = {value}")
            await store.open()
    finally:
        mariadb.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
        await store.close()
    assert [(event, fields["setting"], fields["value"]) for event, fields in log.lines] == [
        ("store_not_durable", "innodb_flush_log_at_trx_commit", value) for value in (2, 0)
    ]
    assert "second" in log.lines[0][1]["may_lose"]


async def test_a_binlog_costs_no_row_and_its_settings_are_read(tmp_path: Path) -> None:
    with MariaDb(log_bin="bin", server_id=1, sync_binlog=0, binlog_format="MIXED") as server:
        log = Log()
        house = mysql_house(server.create(), tmp_path)
        async with house.open(log=log) as store:
            await store.commit(Batch(rows=rows(10)), never)
            assert await store.delete_older(NOW + 1, 4) == 4
            assert [fields["setting"] for _, fields in log.lines] == ["sync_binlog"]
            server.query("SET GLOBAL binlog_format = 'STATEMENT'")
            with pytest.raises(StoreMisfit, match="binlog_format is STATEMENT"):
                await store.open()
        assert len(house.stored()) == 6


async def test_times_are_utc_whatever_the_servers_zone_is(house: House, mariadb: Database) -> None:
    assert mariadb.query("SELECT @@GLOBAL.time_zone") == [("-07:30",)]
    async with house.open() as store:
        await store.commit(Batch(rows=[row(created_at=NOW)]), never)
        assert await store.spends(42, NOW, 1) == [(NOW, 30)]
    assert mariadb.query("SELECT UNIX_TIMESTAMP(created_at) FROM sys_ai_transactions") == [(int(NOW),)]
    reader = house.reader()
    assert reader.fetch("SELECT COUNT(*) FROM sys_ai_transactions WHERE created_at = ?", (utc_text(NOW),)) == [(1,)]
    reader.close()


@pytest.mark.parametrize("password", [b"wrong-secret", None])
async def test_a_refused_user_is_told_so_without_the_password(mariadb: Database, password: bytes | None) -> None:
    url = mariadb.url(with_password=False)
    address = MysqlAddress.parse(url, Secret(password) if password else None)
    for attempt in (opened(address), asyncio.to_thread(MysqlReader, address), asyncio.to_thread(apply, address)):
        with pytest.raises(StoreError, match=r"Access denied for user 'proxyd'.*error 1045.*password_file") as caught:
            await attempt
        assert "wrong-secret" not in str(caught.value)


async def test_a_database_or_server_that_is_not_there_is_told_so(mariadb: Database) -> None:
    nowhere = MysqlAddress.parse(mariadb.server.url("nowhere"))
    with pytest.raises(StoreMissing, match=r"Unknown database 'nowhere'.*create it"):
        await opened(nowhere)
    gone = MysqlAddress.parse("mysql://u:hunter2@127.0.0.1:1/db")
    for attempt in (opened(gone), asyncio.to_thread(MysqlReader, gone)):
        with pytest.raises(StoreError, match=r"mysql u@127.0.0.1:1/db: Can't connect.*is the server running") as caught:
            await attempt
        assert "hunter2" not in str(caught.value)


async def test_the_password_may_come_apart_from_the_url_and_the_socket_serves_too(mariadb: Database) -> None:
    apply(MysqlAddress.parse(mariadb.url()))
    secret = Secret(PASSWORD.encode())
    for url in (mariadb.url(with_password=False), mariadb.url_socket(with_password=False)):
        await opened(MysqlAddress.parse(url, secret))
    await opened(MysqlAddress.parse(mariadb.url_socket()))


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions"
        " WHERE user_id = 4092 AND created_at >= NOW() - INTERVAL 1 DAY",
        WINDOW_SUM.replace("?", "4092", 1).replace("?", "'2023-11-14 00:00:00'"),
        USER_TOTALS.replace("?", "4092", 1).replace("?", "'2023-11-14 00:00:00'"),
        "SELECT UNIX_TIMESTAMP(created_at), SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions"
        " WHERE user_id = 4092 AND created_at >= '2023-11-14' GROUP BY created_at ORDER BY created_at LIMIT 10",
    ],
)
@pytest.mark.parametrize("is_founding", [False, True])
def test_a_users_sums_run_from_the_index_alone(
    mariadb: Database, address: MysqlAddress, sql: str, is_founding: bool
) -> None:
    if is_founding:  # which has an index of its own, on the same first columns
        mariadb.query(FOUNDING)
    apply(address)
    mariadb.query(
        "INSERT INTO sys_ai_transactions (user_id, model_id, prompt_tokens, completion_tokens, created_at, tenant,"
        " request_id, status, estimated, cached_tokens, reasoning_tokens, upstream, attempts, ttft_ms, duration_ms)"
        " SELECT 4000 + seq % 200, 1, seq, 1, NOW() - INTERVAL seq SECOND, 't', seq, 'completed', 0, 0, 0, 'o', 1, 1, 1"
        " FROM seq_1_to_20000"
    )
    mariadb.query("ANALYZE TABLE sys_ai_transactions")
    ((*_, key, _, _, _, extra),) = mariadb.query(f"EXPLAIN {sql}")
    assert key == "idx_sys_ai_user_window"
    assert "Using index" in extra
    assert "filesort" not in extra
    assert "temporary" not in extra
    if "COUNT" not in sql and "UNIX" not in sql and "NOW" in sql:
        assert mariadb.query(sql)[0][0] == sum(n + 1 for n in range(1, 20001) if n % 200 == 92)


# -- retention ---------------------------------------------------------------------------------------------------------


async def test_retention_and_inserts_of_two_nodes_go_on_side_by_side(house: House) -> None:
    old = [row(f"old{n}", created_at=NOW - 1000 + n // 10) for n in range(3000)]
    async with house.open(bounds=HASTY) as mine, house.open(node="other", bounds=HASTY) as theirs:
        await mine.commit(Batch(rows=old), never)

        async def delete(store: Store) -> int:
            gone = 0
            while count := await store.delete_older(NOW, 100):
                gone += count
            return gone

        async def insert(store: Store, name: str) -> int:
            for number in range(30):
                some = [row(f"{name}{number}-{n}", created_at=NOW + number) for n in range(100)]
                await store.commit(Batch(rows=some), never)
            return 0

        async with house.open(node="third", bounds=HASTY) as third, house.open(node="fourth", bounds=HASTY) as fourth:
            gone = await asyncio.gather(delete(mine), delete(theirs), insert(third, "a"), insert(fourth, "b"))
    assert sum(gone) == 3000
    assert len(house.stored()) == 6000


async def test_retention_passes_over_what_another_holds_and_waits_for_nobody(house: House, mariadb: Database) -> None:
    async with house.open(bounds=HASTY) as store:
        await store.commit(Batch(rows=[row(str(n), created_at=NOW - n) for n in range(6)]), never)
        holder = mariadb.connect(autocommit=False)
        with holder.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute("SELECT * FROM sys_ai_transactions WHERE transaction_id IN (5, 6) FOR UPDATE")
            assert await store.delete_older(NOW, 10) == 3
            cursor.execute("ROLLBACK")
        holder.close()
        assert await store.delete_older(NOW, 10) == 2
    assert house.stored() == ["0"]


def test_retention_reads_the_index_on_time(house: House, mariadb: Database) -> None:
    mariadb.query(
        "INSERT INTO sys_ai_transactions (user_id, model_id, prompt_tokens, completion_tokens, created_at, tenant,"
        " request_id, status, estimated, cached_tokens, reasoning_tokens, upstream, attempts, ttft_ms, duration_ms)"
        " SELECT seq % 200, 1, seq, 1, NOW() - INTERVAL seq SECOND, 't', seq, 'completed', 0, 0, 0, 'o', 1, 1, 1"
        " FROM seq_1_to_20000"
    )
    mariadb.query("ANALYZE TABLE sys_ai_transactions")
    ((*_, key, _, _, _, extra),) = mariadb.query(
        "EXPLAIN SELECT transaction_id FROM sys_ai_transactions WHERE created_at < NOW() - INTERVAL 4 HOUR"
        " ORDER BY created_at LIMIT 500 FOR UPDATE SKIP LOCKED"
    )
    assert key == "idx_sys_ai_created"
    assert "filesort" not in extra


def test_the_ddl_has_no_word_of_mariadb_alone() -> None:
    text = " ".join(MYSQL_DDL).upper()
    for word in ("IF NOT EXISTS", "RETURNING", "SEQUENCE", "ARIA", "PERSISTENT", "PAGE_CHECKSUM", "UUID"):
        assert word not in text
