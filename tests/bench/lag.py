"""How late rows are: from a transaction's end to its row in the store, under load, beside the time of one commit.

    python -m tests.bench.lag [--rates 100,1000,4000] [--seconds 10] [--stores mariadb,sqlite]

A real node, and beside its workers a spool writer of ours that accepts rows at random instants, each with a write of
its own, as a busy worker does. The lag is the node's own proxyd_telemetry_lag_seconds (to 3 %). One commit is measured
meanwhile: five times a second, another node's session commits a group as large as the node's would be at that rate.
Budget: p99 at most 2 x linger + one commit (its median; with its p99 beside it, for disks have bad moments).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyd.store.schema import Store
from proxyd.store.sqlite import SqliteStore
from tests.bench.databases import (
    SpoolOf,
    batches,
    database,
    favour,
    favoured,
    make_rows,
    mariadb,
    mysql_store,
    nobody,
    percentile,
    sync_ms,
)
from tests.bench.draining import telemetry_options
from tests.bench.measure import Cpu, host, table
from tests.bench.tools import BenchError, wait_for
from tests.daemon.harness import Daemon, Upstream, node
from tests.daemon.mariadb import Database

LINGER_MS = 20.0
PROBES_PER_S = 5


@dataclass
class Probe:
    """Commits groups beside the node until it is stopped; `took` in milliseconds."""

    store: Store
    size: int
    took: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Probe:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work()), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    async def _work(self) -> None:
        await self.store.open()
        try:
            (batch,) = batches(make_rows(self.size, 3), self.size)
            await self.store.commit(batch, nobody)
            while not self._stop.wait(1 / PROBES_PER_S):
                began = time.perf_counter()
                await self.store.commit(batch, nobody)
                self.took.append((time.perf_counter() - began) * 1e3)
        finally:
            await self.store.close()


def accept(state_dir: Path, rate: int, seconds: float) -> int:
    """Rows at `rate` a second, at random instants; how many."""
    rng = random.Random(rate)
    rows = make_rows(5000, rate)
    spool = SpoolOf(state_dir)
    done, began = 0, time.monotonic()
    due = began
    try:
        while due - began < seconds:
            due += rng.expovariate(rate)
            left = due - time.monotonic()
            if left > 0:
                time.sleep(left)
            row = rows[done % len(rows)]
            spool.add(row._replace(request_id=f"{done:08x}{row.request_id[:24]}", created_at=time.time()))
            done += 1
    finally:
        spool.close()
    return done


def status(daemon: Daemon) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(daemon.admin("/status")[1])
    return answer


def one(made: Database | None, beside: Database | None, rate: int, options: argparse.Namespace) -> list[str]:
    """A node of its own for each rate, so that its histogram is of this load alone."""
    upstream = Upstream(lambda wire: False)
    with contextlib.closing(upstream), tempfile.TemporaryDirectory(prefix="proxyd-bench-") as name:
        folder = Path(name)
        sink = made if made is not None else folder / "telemetry.db"
        size = max(1, round(rate * LINGER_MS / 1e3))
        store = mysql_store(beside) if beside is not None else SqliteStore(folder / "beside.db", "second")
        with node(folder, upstream, telemetry=telemetry_options(sink)) as daemon, Probe(store, size) as probe:
            pid = daemon.child("telemetry")
            favour(pid)
            before = Cpu.of(pid).total
            count = accept(folder, rate, options.seconds)
            wait_for(lambda: status(daemon)["telemetry"]["rows"].get("stored", 0) >= count, 60, "all rows stored")
            used = Cpu.of(pid).total - before
            seen = status(daemon)
        lag = seen["latency"]["proxyd_telemetry_lag_seconds"]["since_start"]
        p50, p99 = (lag[key] * 1e3 for key in ("p50", "p99"))
        commit, commit_99 = percentile(probe.took, 0.5), percentile(probe.took, 0.99)
        budget = 2 * LINGER_MS + commit
        groups = seen["telemetry"]["groups"]
        kind = "SQLite" if made is None else "MariaDB"
        word = (
            "within" if p99 <= budget else ("within, by a p99 commit" if p99 <= budget - commit + commit_99 else "OVER")
        )
        cells = [f"{count / options.seconds:,.0f}", f"{count / max(groups, 1):.1f}", f"{p50:.1f}", f"{p99:.1f}"]
        return [kind, *cells, f"{commit:.2f}", f"{commit_99:.2f}", f"{budget:.1f}", word, f"{used / count:.1f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lag", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rates", default="100,1000,4000", help="rows a second")
    parser.add_argument("--seconds", type=float, default=20, help="of each rate")
    parser.add_argument("--stores", default="mariadb,sqlite")
    options = parser.parse_args(argv)
    rows = []
    with favoured(), tempfile.TemporaryDirectory(prefix="proxyd-bench-") as folder:
        print(f"host: {host()}, sync {sync_ms(Path(folder)):.2f} ms", flush=True)
        for kind in options.stores.split(","):
            with mariadb() if kind == "mariadb" else contextlib.nullcontext() as server:
                for rate in map(int, options.rates.split(",")):
                    made, beside = (database(server), database(server)) if server is not None else (None, None)
                    rows.append(one(made, beside, rate, options))
                    print("  ".join(rows[-1]), flush=True)
    heads = [
        "store",
        "rows/s",
        "rows/group",
        "lag p50 ms",
        "p99",
        "commit p50",
        "p99",
        "budget",
        "",
        "telemetry us/row",
    ]
    print(f"\nlinger {LINGER_MS:g} ms, {options.seconds:g} s each\n{table(heads, rows)}\nat the end: {host()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
