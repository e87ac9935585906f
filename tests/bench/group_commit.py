"""Durable rows a second: groups as the telemetry process commits them, beside one INSERT and COMMIT a row.

    python -m tests.bench.group_commit [--seconds 4] [--rounds 3] [--rows 150000] [--binlog off,on] [--sync-us 0,1000]
                                       [--only mariadb,sqlite] [--levers]

One server, one table with the real schema, in turns: single rows by PyMySQL and by aiomysql (INSERT, then COMMIT: two
answers, as an ORM does it; and with autocommit: one), groups of 1,000 by MysqlStore.commit, and the real telemetry
process of a node that finds --rows finals in its spool. innodb_flush_log_at_trx_commit is 1 throughout.
Budget: groups at least 50 times the single rows. What a single row costs is mostly the disk's sync, what a row of a
group costs is mostly the server's work, so the ratio is the disk's: --sync-us makes each sync of the server so much
longer (an LD_PRELOAD of fsync and fdatasync), as disks are that have no cache which outlives a power loss.
Neighbours on the disk make single rows slower, and the ratio better than it is. For a curve without them give TMPDIR a
tmpfs of your own: MariaDB takes the system's shared-memory mount for persistent memory, and syncs no log there.
--levers: what other schemas, statements and settings would give.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import aiomysql

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.schema import COLUMNS, SQLITE_DDL, Row, Store, utc_text
from proxyd.store.sqlite import SqliteStore
from tests.bench.databases import (
    BINLOG,
    batches,
    database,
    favoured,
    make_rows,
    mariadb,
    mysql_store,
    nobody,
    slow_disk,
    sync_ms,
)
from tests.bench.draining import drain
from tests.bench.levers import print_levers
from tests.bench.measure import Cpu, host, table
from tests.bench.tools import BenchError
from tests.daemon.mariadb import Database, MariaDb

BUDGET = 50
GROUP = 1000
# No round needs more, on any disk.
ROWS_MAX = 400_000
SQL = f"INSERT INTO sys_ai_transactions ({', '.join(COLUMNS)}) VALUES ({', '.join(['%s'] * len(COLUMNS))})"
SINGLE, SINGLE_AIO, AUTO = "INSERT, COMMIT (PyMySQL)", "INSERT, COMMIT (aiomysql)", "INSERT, autocommit (PyMySQL)"
GROUPS, REAL = "groups of 1,000", "telemetry process"
Rates = dict[str, list[float]]


def params(row: Row) -> tuple[Any, ...]:
    return (*row[:4], utc_text(row.created_at), *row[5:])


def paced(one: Callable[[Row], None], rows: list[Row], seconds: float) -> float:
    """Calls a second, for so long."""
    began = time.perf_counter()
    done = 0
    for row in rows:
        one(row)
        done += 1
        if time.perf_counter() - began >= seconds:
            break
    return done / (time.perf_counter() - began)


def single(made: Database, rows: list[Row], seconds: float, autocommit: bool) -> float:
    with contextlib.closing(made.connect(autocommit=autocommit)) as connection, connection.cursor() as cursor:

        def one(row: Row) -> None:
            cursor.execute(SQL, params(row))
            if not autocommit:
                connection.commit()

        return paced(one, rows, seconds)


async def single_aio(made: Database, rows: list[Row], seconds: float) -> float:
    address = MysqlAddress.parse(made.url())
    connection = await aiomysql.connect(**address.arguments(), db=address.database, autocommit=False)
    try:
        async with connection.cursor() as cursor:
            done, began = 0, time.perf_counter()
            for row in rows:
                await cursor.execute(SQL, params(row))
                await connection.commit()
                done += 1
                if time.perf_counter() - began >= seconds:
                    break
            return done / (time.perf_counter() - began)
    finally:
        connection.close()


async def grouped(store: Store, seconds: float, size: int, server_pid: int) -> tuple[float, float, float]:
    """Rows a second; microseconds of this process and of the server a row. The rows exist before."""
    await store.open()
    try:
        work = batches(make_rows(40 * size), size)
        await store.commit(work[0], nobody)
        us, server = Cpu.of(os.getpid()).total, Cpu.of(server_pid).total
        began = time.perf_counter()
        stored = 0
        while stored < ROWS_MAX and time.perf_counter() - began < seconds:
            for batch in work[:10]:
                await store.commit(batch, nobody)
                stored += size
        took = time.perf_counter() - began
        return stored / took, (Cpu.of(os.getpid()).total - us) / stored, (Cpu.of(server_pid).total - server) / stored
    finally:
        await store.close()


def compare(server: MariaDb, options: argparse.Namespace, rounds: int, real_rows: int) -> Rates:
    """All ways in turns on one server; each round begins with empty tables."""
    rates: Rates = {}
    for number in range(rounds):
        made = database(server)
        rows = make_rows(int(options.seconds * 30_000), number)

        def note(name: str, rate: float) -> None:
            rates.setdefault(name, []).append(rate)

        note(SINGLE, single(made, rows, options.seconds, False))
        note(SINGLE_AIO, asyncio.run(single_aio(made, rows, options.seconds)))
        note(AUTO, single(made, rows, options.seconds, True))
        rate, *cpu = asyncio.run(grouped(mysql_store(made), options.seconds, GROUP, server.pid))
        note(GROUPS, rate)
        for name, value in zip(("ours us/row", "server us/row"), cpu, strict=True):
            note(name, value)
        if real_rows:
            seen = drain(made, real_rows, server.pid)
            note(REAL, seen.rows_per_s)
            note("telemetry us/row", seen.telemetry_us)
            note("its server us/row", seen.server_us)
        made.drop()
    return rates


def middle(rates: Rates, name: str) -> float:
    return median(rates.get(name, [0.0]))


def of_mariadb(options: argparse.Namespace) -> None:
    rows = []
    verdicts = []
    for binlog in options.binlog.split(","):
        for sync_us in map(int, options.sync_us.split(",")):
            is_plain = sync_us == 0
            options_of = BINLOG if binlog == "on" else {}
            with slow_disk(sync_us) as environ, mariadb(environ, **options_of) as server:
                sync = sync_ms(server.folder, environ)
                rates = compare(server, options, options.rounds if is_plain else 1, options.rows if is_plain else 0)
            base = middle(rates, SINGLE)
            real = f"{middle(rates, REAL):,.0f}" if is_plain else ""
            ratios = [middle(rates, GROUPS) / middle(rates, name) for name in (SINGLE, SINGLE_AIO, AUTO)]
            rows.append(
                [
                    f"binlog {binlog}, sync {sync:.2f} ms",
                    *(f"{middle(rates, name):,.0f}" for name in (SINGLE, SINGLE_AIO, AUTO, GROUPS)),
                    real,
                    *(f"{ratio:.0f}" for ratio in ratios),
                    f"{middle(rates, 'ours us/row'):.1f}",
                    f"{middle(rates, 'server us/row'):.1f}",
                    f"{middle(rates, 'telemetry us/row'):.1f}" if is_plain else "",
                ]
            )
            print("  ".join(rows[-1]), flush=True)
            word = "within" if ratios[0] >= BUDGET else "UNDER"
            verdicts.append(
                f"binlog {binlog}, sync {sync:.2f} ms: groups {ratios[0]:.1f} times a row by PyMySQL ({base:,.0f}/s), "
                f"{ratios[1]:.1f} times by aiomysql ({word} the budget of {BUDGET})"
            )
    heads = ["rows/s", "PyMySQL", "aiomysql", "autocommit", GROUPS, REAL, "ratio", "aio", "auto"]
    print("\n" + table([*heads, "ours us/row", "server us/row", "telemetry us/row"], rows))
    print("\n".join(verdicts))


def of_sqlite(options: argparse.Namespace) -> None:
    """The node's own file, synced at each commit (durability row and second) and not (os)."""
    sql = SQL.replace("%s", "?")
    rows = []
    with tempfile.TemporaryDirectory(prefix="proxyd-bench-") as folder:
        for durability, synchronous in (("second", "FULL"), ("os", "NORMAL")):
            single_rates, group_rates, costs = [], [], []
            for number in range(options.rounds):
                with contextlib.closing(
                    sqlite3.connect(f"{folder}/{durability}{number}.db", isolation_level=None)
                ) as db:
                    db.execute("PRAGMA journal_mode = WAL")
                    db.execute(f"PRAGMA synchronous = {synchronous}")
                    for statement in SQLITE_DDL:
                        db.execute(statement)

                    def one(row: Row, db: sqlite3.Connection = db) -> None:
                        db.execute("BEGIN")
                        db.execute(sql, params(row))
                        db.execute("COMMIT")

                    single_rates.append(paced(one, make_rows(int(options.seconds * 60_000)), options.seconds))
                store = SqliteStore(Path(folder) / f"group-{durability}{number}.db", durability)
                rate, cost, _ = asyncio.run(grouped(store, options.seconds, GROUP, os.getpid()))
                group_rates.append(rate)
                costs.append(cost)
            ratio = median(group_rates) / median(single_rates)
            cells = [f"{median(single_rates):,.0f}", f"{median(group_rates):,.0f}", f"{ratio:.0f}"]
            rows.append([f"SQLite, {durability} ({synchronous})", *cells, f"{median(costs):.1f}"])
        sync = sync_ms(Path(folder))
    print(f"\nSQLite, sync {sync:.2f} ms")
    print(table(["rows/s", "one BEGIN, INSERT, COMMIT", GROUPS, "ratio", "us/row"], rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="group_commit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=4, help="of each way and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=150_000, help="in the spool that the telemetry process drains")
    parser.add_argument("--binlog", default="off,on")
    parser.add_argument("--sync-us", default="0,500,1000,2000", help="more for each of the server's syncs")
    parser.add_argument("--levers", action="store_true", help="other schemas, statements, settings, too")
    parser.add_argument("--only", default="mariadb,sqlite")
    options = parser.parse_args(argv)
    with favoured():
        print(f"host: {host()}", flush=True)
        if "mariadb" in options.only:
            of_mariadb(options)
        if "sqlite" in options.only:
            of_sqlite(options)
        if options.levers:
            print_levers(options.seconds)
        print(f"at the end: {host()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
