"""The founding query among millions of rows, and inserts beside retention.

    python -m tests.bench.window_query [--rows 10000000] [--queries 5000] [--spreads 1,90] [--stores mariadb,sqlite]
                                       [--pool 1G] [--cap 360]

10,000 uneven users; all rows within 24 hours (--spreads 1: 1,000 a user and window, 7,000 of the user at the 99th
percentile) or over 90 days (11 a user and window). Users are drawn evenly, each asked once cold (the server
has just started, its pool is empty; SQLite: the file was dropped from the page cache) and once warm, through the
store's own window_sum, as the telemetry process does it, one at a time. Budget: 2.4 ms p99, the founding document's.
Retention: the writer's turn (a group of 100 rows each 20 ms, then a batch of retention when due) with the oldest
twentieth of the rows to be deleted; how late a group's commit ends. Beside it the same batches from another node.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median
from typing import Any

from proxyd.clock import SYSTEM
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_reader import MysqlReader
from proxyd.store.queries import WINDOW_SUM
from proxyd.store.schema import Store
from proxyd.store.sqlite import SqliteReader, SqliteStore
from proxyd.telemetry.retention import BATCH_ROWS, Retention
from tests.bench.databases import (
    USERS,
    batches,
    database,
    favoured,
    make_rows,
    mariadb,
    mysql_store,
    nobody,
    percentile,
    start,
)
from tests.bench.filling import fill_mysql, fill_sqlite
from tests.bench.measure import host, table
from tests.bench.tools import BenchError
from tests.daemon.mariadb import Database, MariaDb

BUDGET_MS = 2.4
DAY_S = 86_400
LINGER_S, GROUP = 0.02, 100
OTHER_NODE = "00bench1bench111"


class _Log:
    def warning(self, event: str, /, **fields: Any) -> None:
        raise BenchError(f"{event}: {fields}")

    info = error = warning


async def ask(store: Store, users: list[int], since: float) -> list[float]:
    """Milliseconds of each user's sum."""
    await store.open()
    try:
        took = []
        for user in users:
            began = time.perf_counter()
            await store.window_sum(user, since)
            took.append((time.perf_counter() - began) * 1e3)
        return took
    finally:
        await store.close()


def row_of(name: str, took: list[float]) -> list[str]:
    p99 = percentile(took, 0.99)
    shares = [f"{percentile(took, share):.2f}" for share in (0.5, 0.9, 0.99)]
    return [name, *shares, f"{max(took):.1f}", "within" if p99 <= BUDGET_MS else "OVER"]


async def turns(
    store: Store, seconds: float, retention: Retention | None, beside: Callable[[], Awaitable[None]] | None = None
) -> list[float]:
    """Milliseconds from when each group was due to its commit's answer, in the writer's order of things."""
    await store.open()
    other = asyncio.ensure_future(beside()) if beside is not None else None
    try:
        work = batches(make_rows(20 * GROUP), GROUP)
        took: list[float] = []
        due, until = time.perf_counter(), time.perf_counter() + seconds
        while due < until:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            await store.commit(work[len(took) % len(work)], nobody)
            took.append((time.perf_counter() - due) * 1e3)
            if retention is not None:
                await retention.maybe_delete(store)
            due = max(due + LINGER_S, time.perf_counter() - LINGER_S)
        return took
    finally:
        if other is not None:
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)
        await store.close()


def at_once(keep_s: float) -> Retention:
    retention = Retention(keep_s, _Log(), SYSTEM)
    retention.due_at = 0.0
    return retention


async def delete_on(store: Store, keep_s: float) -> None:
    """Another node's retention, at its own pace, until cancelled."""
    await store.open()
    retention = at_once(keep_s)
    try:
        while True:
            await retention.maybe_delete(store)
            await asyncio.sleep(max(0.001, min(retention.due_at - time.monotonic(), 0.05)))
    finally:
        await store.close()


def print_retention(
    make: Callable[[str], Store], keep_s: float, seconds: float, has_nodes: bool, count: Callable[[], int]
) -> None:
    rows = []
    scenes: list[tuple[str, Retention | None, Callable[[], Awaitable[None]] | None]] = [
        ("no retention", None, None),
        ("between the groups", at_once(keep_s), None),
    ]
    if has_nodes:
        scenes.append(("from another node", None, lambda: delete_on(make(OTHER_NODE), keep_s)))
    for name, retention, beside in scenes:
        before = count()
        took = asyncio.run(turns(make("00bench0bench000"), seconds, retention, beside))
        gone = before + len(took) * GROUP - count()
        shares = [f"{percentile(took, share):.2f}" for share in (0.5, 0.99)]
        rows.append([name, f"{len(took):,}", *shares, f"{max(took):.1f}", f"{gone / seconds:,.0f}"])
        print("  " + "  ".join(rows[-1]), flush=True)
    heads = ["retention", "groups", "due to stored p50 ms", "p99", "longest", "deleted rows/s"]
    print(f"\ngroups of {GROUP} each {LINGER_S * 1e3:g} ms\n{table(heads, rows)}", flush=True)


def print_batches(made: Database, cutoff: float) -> None:
    """One batch of retention by the index on created_at, and by the primary key; and what the indexes weigh."""
    ways = {
        "idx_sys_ai_created": "WHERE created_at < FROM_UNIXTIME(%s) ORDER BY created_at",
        "the primary key": "FORCE INDEX (PRIMARY) WHERE created_at < FROM_UNIXTIME(%s) ORDER BY transaction_id",
    }
    rows = []
    with contextlib.closing(made.connect(autocommit=False)) as connection, connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        for name, where in ways.items():
            took = []
            for _ in range(20):
                began = time.perf_counter()
                cursor.execute(
                    f"SELECT transaction_id FROM sys_ai_transactions {where} LIMIT {BATCH_ROWS} FOR UPDATE SKIP LOCKED",
                    (cutoff,),
                )
                ids = ",".join(str(number) for (number,) in cursor.fetchall())
                if not ids:
                    raise BenchError("nothing old is left to delete; take more rows or fewer --seconds")
                cursor.execute(f"DELETE FROM sys_ai_transactions WHERE transaction_id IN ({ids})")
                connection.commit()
                took.append((time.perf_counter() - began) * 1e3)
            rows.append([name, f"{median(took):.2f}", f"{max(took):.1f}"])
    print("\n" + table([f"a batch of {BATCH_ROWS} by", "p50 ms", "longest"], rows))
    for name, hint in (("with", ""), ("without", "IGNORE INDEX (idx_sys_ai_created)")):
        began = time.perf_counter()
        made.query(
            f"SELECT tenant, COUNT(*), SUM(prompt_tokens) FROM sys_ai_transactions {hint}"
            " WHERE created_at >= (SELECT MAX(created_at) FROM sys_ai_transactions) - INTERVAL 1 DAY GROUP BY tenant"
        )
        print(f"a day's usage by tenant {name} idx_sys_ai_created: {time.perf_counter() - began:.2f} s")
    sizes = made.query(
        "SELECT index_name, stat_value * @@innodb_page_size FROM mysql.innodb_index_stats"
        " WHERE database_name = DATABASE() AND table_name = 'sys_ai_transactions' AND stat_name = 'size'"
    )
    ((count,),) = made.query("SELECT COUNT(*) FROM sys_ai_transactions")
    print("bytes a row: " + ", ".join(f"{name} {float(size) / count:.0f}" for name, size in sizes), flush=True)


def of_mariadb(options: argparse.Namespace, spread: int, users: list[int]) -> list[list[str]]:
    with mariadb(innodb_buffer_pool_size=options.pool) as server:
        made = database(server)
        began = time.time() - spread * DAY_S
        rows = fill_mysql(made, options.rows, began, spread * DAY_S, options.cap)
        end = began + rows / options.rows * spread * DAY_S
        since = end - DAY_S if spread > 1 else began
        made.query("ANALYZE TABLE sys_ai_transactions")
        with contextlib.closing(MysqlReader(MysqlAddress.parse(made.url()))) as reader:
            explained = reader.fetch(f"EXPLAIN {WINDOW_SUM}", (users[0], reader.timestamp(since)))
            print(f"EXPLAIN: {explained}", flush=True)
        found = [row_of(f"MariaDB, {spread} d, {name}", took) for name, took in asked(server, made, users, since)]
        if spread > 1:
            keep = time.time() - began - spread * DAY_S / 20
            print_retention(
                lambda node: mysql_store(made, node), keep, options.seconds, True,
                lambda: int(made.query("SELECT COUNT(*) FROM sys_ai_transactions")[0][0]),
            )  # fmt: skip
            print_batches(made, began + spread * DAY_S / 8)
        return found


def asked(server: MariaDb, made: Database, users: list[int], since: float) -> list[tuple[str, list[float]]]:
    server.stop()
    start(server)
    return [(name, asyncio.run(ask(mysql_store(made), users, since))) for name in ("cold", "warm", "warm again")]


def of_sqlite(options: argparse.Namespace, spread: int, users: list[int]) -> list[list[str]]:
    with tempfile.TemporaryDirectory(prefix="proxyd-bench-") as folder:
        path = Path(folder) / "telemetry.db"
        began = time.time() - spread * DAY_S
        rows = fill_sqlite(path, options.rows, began, spread * DAY_S, options.cap)
        end = began + rows / options.rows * spread * DAY_S
        since = end - DAY_S if spread > 1 else began
        with contextlib.closing(SqliteReader(path)) as reader:
            print(f"EXPLAIN: {reader.fetch(f'EXPLAIN QUERY PLAN {WINDOW_SUM}', (users[0], reader.timestamp(since)))}")
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        found = []
        for name in ("cold", "warm", "warm again"):
            took = asyncio.run(ask(SqliteStore(path, "second"), users, since))
            found.append(row_of(f"SQLite, {spread} d, {name}", took))
        if spread > 1:

            def count() -> int:
                with contextlib.closing(SqliteReader(path)) as reader:
                    return int(reader.fetch("SELECT COUNT(*) FROM sys_ai_transactions")[0][0])

            keep = time.time() - began - spread * DAY_S / 20
            print_retention(lambda node: SqliteStore(path, "second"), keep, options.seconds, False, count)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="window_query", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--spreads", default="1,90", help="days over which the rows are")
    parser.add_argument("--stores", default="mariadb,sqlite")
    parser.add_argument("--pool", default="1G", help="innodb_buffer_pool_size")
    parser.add_argument("--cap", type=float, default=360, help="seconds of loading at most, each")
    parser.add_argument("--seconds", type=float, default=15, help="of each scene of retention")
    options = parser.parse_args(argv)
    users = random.Random(1).choices(range(1, USERS + 1), k=options.queries)
    ways = {"mariadb": of_mariadb, "sqlite": of_sqlite}
    rows: list[list[str]] = []
    with favoured():
        print(f"host: {host()}", flush=True)
        for kind in options.stores.split(","):
            for spread in map(int, options.spreads.split(",")):
                rows += ways[kind](options, spread, users)
                print("  ".join(rows[-2]), flush=True)
        heads = [f"{options.rows:,} rows, {USERS:,} users", "p50 ms", "p90", "p99", "longest", f"of {BUDGET_MS} ms p99"]
        print(f"\n{table(heads, rows)}\nat the end: {host()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
