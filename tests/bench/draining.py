"""A node whose spool is full when it starts: how fast its telemetry process stores it, and for how much CPU.

Owns: that node, and the window measured: from the first tenth of the rows to the last row, by the store's own count.
Must not know: which benchmark asks.
"""

from __future__ import annotations

import contextlib
import sqlite3
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.databases import favour, fill_spool
from tests.bench.measure import Cpu
from tests.bench.tools import BenchError, wait_for
from tests.daemon.harness import Upstream, node
from tests.daemon.mariadb import Database

DRAIN_S = 120.0
COUNT = "SELECT COALESCE(MAX(transaction_id), 0) FROM sys_ai_transactions"


@dataclass(frozen=True)
class Drained:
    rows_per_s: float
    telemetry_us: float
    server_us: float


def count_of(made: Database | Path) -> Callable[[], int]:
    """How many rows the store has. Of a table in which nothing was deleted, so the last id tells it."""
    if isinstance(made, Path):

        def count() -> int:
            try:
                with contextlib.closing(sqlite3.connect(f"file:{made}?mode=ro", uri=True, timeout=10)) as db:
                    return int(db.execute(COUNT).fetchone()[0])
            except sqlite3.OperationalError:
                return 0

        return count

    connection = made.connect()

    def count_sql() -> int:
        with connection.cursor() as cursor:
            cursor.execute(COUNT)
            return int(cursor.fetchone()[0])

    return count_sql


def telemetry_options(made: Database | Path, more: str = "") -> str:
    sink = f"sqlite:///{made}" if isinstance(made, Path) else made.url()
    return f"sink = '{sink}'\nlinger = \"20ms\"\n{more}"


def drain(made: Database | Path, rows: int, server_pid: int | None = None) -> Drained:
    """Fills a spool with `rows`, starts a node on it, waits until all are stored."""
    upstream = Upstream(lambda wire: False)
    try:
        with tempfile.TemporaryDirectory(prefix="proxyd-bench-") as folder:
            if isinstance(made, Path):
                made = Path(folder) / "telemetry.db"
            before = count_of(made)()
            fill_spool(Path(folder), rows)
            with node(Path(folder), upstream, telemetry=telemetry_options(made)) as daemon:
                pid = daemon.child("telemetry")
                favour(pid)
                return watch(made, before, rows, pid, server_pid)
    finally:
        upstream.close()


def watch(made: Database | Path, before: int, rows: int, pid: int, server_pid: int | None) -> Drained:
    """The rate from the first tenth of `rows` more than `before` to the last."""
    count = count_of(made)
    wait_for(lambda: count() - before >= rows // 10, DRAIN_S, "the first tenth of the spool")
    first, began = count(), time.perf_counter()
    used, server = Cpu.of(pid).total, Cpu.of(server_pid).total if server_pid else 0.0
    wait_for(lambda: count() - before >= rows, DRAIN_S, "the whole spool")
    took, stored = time.perf_counter() - began, before + rows - first
    if stored <= 0:
        raise BenchError(f"{rows} rows were stored before anything could be measured; take more")
    server_us = (Cpu.of(server_pid).total - server) / stored if server_pid else 0.0
    return Drained(stored / took, (Cpu.of(pid).total - used) / stored, server_us)
