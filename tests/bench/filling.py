"""Millions of rows in a table of either database, with the real schema and its indexes, in the order of time.

Owns: how they get there fast (the server makes them itself), and progress. Rows go in with the indexes in place, as in
life: an index built afterwards would be packed, and faster to read than a real one.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path

from proxyd.store.schema import SCHEMA_VERSION, SQLITE_DDL
from proxyd.store.sqlite import APPLICATION_ID
from tests.bench.databases import SKEW, USERS
from tests.daemon.mariadb import Database

CHUNK = 200_000
_COLUMNS = (
    "user_id, model_id, prompt_tokens, completion_tokens, created_at, tenant, request_id, status, estimated,"
    " cached_tokens, reasoning_tokens, upstream, attempts, ttft_ms, duration_ms"
)


def fill_mysql(made: Database, rows: int, start: float, seconds: float, cap_s: float) -> int:
    """Rows from `start` on, evenly over `seconds`; how many there are when `cap_s` is over."""
    began, done = time.monotonic(), 0
    made.query("SET GLOBAL innodb_flush_log_at_trx_commit = 0")
    with contextlib.closing(made.connect(read_timeout=600)) as connection, connection.cursor() as cursor:
        while done < rows and time.monotonic() - began < cap_s:
            count = min(CHUNK, rows - done)
            cursor.execute(
                f"INSERT INTO sys_ai_transactions ({_COLUMNS}) SELECT"
                f" 1 + FLOOR({USERS} * POW(RAND(), {SKEW})), 1 + FLOOR(RAND() * 3), 5 + FLOOR(RAND() * 8000),"
                f" 1 + FLOOR(RAND() * 2000), FROM_UNIXTIME({start:.0f} + FLOOR((seq + {done}) * {seconds / rows:.9f})),"
                f" ELT(1 + FLOOR(RAND() * 3), 'default', 'acme', 'globex-research'), MD5(seq + {done}), 'completed',"
                f" 0, 0, 0, 'openai', 1, 100 + FLOOR(RAND() * 2000), 200 + FLOOR(RAND() * 30000) FROM seq_1_to_{count}"
            )
            done += count
            _tell("MariaDB", done, rows, began)
    made.query("SET GLOBAL innodb_flush_log_at_trx_commit = 1")
    return done


def fill_sqlite(path: Path, rows: int, start: float, seconds: float, cap_s: float) -> int:
    began, done = time.monotonic(), 0
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        for pragma in ("journal_mode = WAL", "synchronous = OFF", "cache_size = -1500000"):
            db.execute(f"PRAGMA {pragma}")
        for statement in SQLITE_DDL:
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        share = "((random() & 9007199254740991) / 9007199254740992.0)"
        while done < rows and time.monotonic() - began < cap_s:
            count = min(CHUNK, rows - done)
            db.execute(
                f"INSERT INTO sys_ai_transactions ({_COLUMNS})"
                f" WITH RECURSIVE s(seq, r) AS (SELECT {done + 1}, {share} UNION ALL SELECT seq + 1, {share} FROM s"
                f" LIMIT {count}) SELECT 1 + CAST({USERS} * r * r * r AS INTEGER), 1 + abs(random() % 3),"
                f" 5 + abs(random() % 8000), 1 + abs(random() % 2000),"
                f" datetime({start:.0f} + CAST(seq * {seconds / rows:.9f} AS INTEGER), 'unixepoch'), 'default',"
                " lower(hex(randomblob(16))), 'completed', 0, 0, 0, 'openai', 1, 700, 9000 FROM s"
            )
            done += count
            _tell("SQLite", done, rows, began)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return done


def _tell(name: str, done: int, rows: int, began: float) -> None:
    if done % (10 * CHUNK) == 0 or done == rows:
        took = time.monotonic() - began
        print(f"  {name}: {done:,} of {rows:,} rows, {took:.0f} s, {done / took:,.0f} rows/s", flush=True)
