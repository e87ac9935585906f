"""The databases under the benches: a MariaDB as a small production server has it, SQLite files, rows, spools, disks.

Owns: the server's settings (those of conf/mysql/60-proxyd.cnf where they matter here), rows that look like a day's,
prefilled spools, the cost of a sync, and a server whose syncs cost more. Must not know: what is measured.
Invariants: everything lies in temporary folders and ends with its `with`; only loopback.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from proxyd.store.mysql import MysqlStore
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_apply import apply
from proxyd.store.schema import Batch, Cursor, Row
from proxyd.telemetry.record import Final, Intent
from proxyd.telemetry.segment import ensure_spool_dir
from proxyd.telemetry.spool import SpoolWriter
from tests.bench.tools import PRIORITY, BenchError
from tests.daemon.mariadb import Database, MariaDb

NODE = "00bench0bench000"
USERS = 10_000
# Of 10,000 users, the first 20 % have 58 % of the rows with 3, and each of the first hundred 7 to 30 times the mean.
SKEW = 3
SERVER = {
    "innodb_buffer_pool_size": "1G",
    "innodb_log_file_size": "1G",
    "innodb_flush_method": "O_DIRECT",
    "innodb_io_capacity": 2000,
    "innodb_io_capacity_max": 4000,
    "innodb_buffer_pool_load_at_startup": "OFF",
    "innodb_buffer_pool_dump_at_shutdown": "OFF",
    "max_allowed_packet": "64M",
    "default_time_zone": "+00:00",
}
BINLOG = {"log_bin": "binlog", "sync_binlog": 1, "binlog_format": "ROW", "server_id": 1}
# As many writes as a percentile needs, and a second or two on a slow disk.
SYNCS = 300

_SLOW_C = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
static void wait_more(void) {
    struct timespec t = {0, 0};
    const char *us = getenv("BENCH_SYNC_US");
    t.tv_nsec = us ? 1000L * atol(us) : 0;
    prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    if (t.tv_nsec) nanosleep(&t, NULL);
}
int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_more();
    return real(fd);
}
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    wait_more();
    return real(fd);
}
"""


def favour(pid: int) -> None:
    """All threads of a process that shares its cores go first, if PROXYD_BENCH_NICE says so."""
    if not PRIORITY:
        return
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, int(task.name), PRIORITY)
    with contextlib.suppress(OSError):  # sched(7): with autogrouping only the session's nice value counts
        Path(f"/proc/{pid}/autogroup").write_text(str(PRIORITY))


@contextlib.contextmanager
def favoured() -> Iterator[None]:
    """This process and what it starts go first for the length of the block."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    favour(os.getpid())
    try:
        yield
    finally:
        if PRIORITY:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, 0, before)
                Path("/proc/self/autogroup").write_text("0")


def start(server: MariaDb) -> None:
    """Starts it, and puts it first."""
    try:
        server.start()
    except AssertionError as error:
        raise BenchError(str(error)[-1500:]) from error
    favour(server.pid)


@contextlib.contextmanager
def slow_disk(sync_us: int) -> Iterator[dict[str, str]]:
    """The environment of a process each of whose syncs takes so much longer; empty for 0."""
    with tempfile.TemporaryDirectory(prefix="proxyd-bench-") as folder:
        source, library = Path(folder) / "slow.c", Path(folder) / "slow.so"
        if not sync_us:
            yield {}
            return
        source.write_text(_SLOW_C)
        argv = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        made = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        if made.returncode:
            raise BenchError(f"gcc: {made.stderr}")
        yield {"LD_PRELOAD": str(library), "BENCH_SYNC_US": str(sync_us)}


@contextlib.contextmanager
def mariadb(environ: Mapping[str, str] | None = None, **options: Any) -> Iterator[MariaDb]:
    """A server of one's own, started with `environ` beside our own."""
    before = {name: os.environ.get(name) for name in environ or {}}
    server = MariaDb(**{**SERVER, **options})
    try:
        os.environ.update(environ or {})
        try:
            start(server)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        yield server
    finally:
        server.close()


def database(server: MariaDb) -> Database:
    """A fresh one with the real schema."""
    made = server.create()
    apply(MysqlAddress.parse(made.url()))
    return made


def mysql_store(made: Database, node: str = NODE) -> MysqlStore:
    return MysqlStore(MysqlAddress.parse(made.url()), node)


def sync_ms(folder: Path, environ: Mapping[str, str] | None = None) -> float:
    """The median of one fdatasync after an append of 512 bytes, by a process of that environment."""
    code = f"""
import os, statistics, sys, time
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
took = []
for number in range({SYNCS}):
    os.pwrite(fd, b"x" * 512, number * 512)
    began = time.perf_counter()
    os.fdatasync(fd)
    took.append(time.perf_counter() - began)
print(statistics.median(took) * 1e3)
"""
    path = folder / "sync.probe"
    try:
        argv = [sys.executable, "-c", code, str(path)]
        env = {**os.environ, **(environ or {})}
        made = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=True)
        return float(made.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        raise BenchError(f"the cost of a sync could not be measured: {error}") from error
    finally:
        path.unlink(missing_ok=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The ceil(share * n)-th smallest; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(len(ordered) * share) - 1))] if ordered else 0.0


def user_of(rng: random.Random, users: int = USERS, skew: float = SKEW) -> int:
    return 1 + int(users * rng.random() ** skew)


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows of now, of uneven users."""
    rng = random.Random(seed)
    now = time.time()
    tenants, models = ("default", "acme", "globex-research"), (1, 2, 7)
    return [
        Row(
            user_of(rng), rng.choice(models), rng.randrange(5, 8000), rng.randrange(1, 2000), now,
            rng.choice(tenants), f"{rng.getrandbits(128):032x}", "completed", 0, 0, 0, "openai", 1,
            rng.randrange(100, 2000), rng.randrange(200, 30_000),
        )
        for _ in range(count)
    ]  # fmt: skip


def batches(rows: Sequence[Row], size: int) -> list[Batch]:
    """The rows in groups, each with a cursor as the writer has it."""
    made = []
    for number, first in enumerate(range(0, len(rows), size), 1):
        cursor = Cursor("000-00000001-00000000000000aa", 1, number, False)
        made.append(Batch(list(rows[first : first + size]), {cursor.stream: cursor}))
    return made


def nobody(refused: Any) -> None:
    raise BenchError(f"a row was refused: {refused[:1]}")


class _Log:
    """A spool that cannot be written is the rig's fault."""

    def info(self, event: str, /, **fields: Any) -> None:
        pass

    def warning(self, event: str, /, **fields: Any) -> None:
        raise BenchError(f"{event}: {fields}")

    error = warning


class SpoolOf:
    """A worker's spool, without the worker: one intent and one final a row, as a short request leaves them."""

    def __init__(self, state_dir: Path, slot: int = 60) -> None:
        self.writer = SpoolWriter(ensure_spool_dir(state_dir), slot, 1, "os", _Log(), lambda flush: None)

    def add(self, row: Row, flush: bool = True) -> None:
        """A row that is accepted, with its flush."""
        txn = self.writer.new_txn()
        known = row.request_id, row.user_id, row.tenant, row.model_id, row.upstream, row.created_at
        self.writer.intent(Intent(txn, *known, 10))
        self.writer.final(Final(txn, *row))
        if flush:
            self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def fill_spool(state_dir: Path, count: int, streams: int = 2) -> None:
    """`count` finals of dead writers, for a telemetry process that starts later. Blocking: about 6 us a row."""
    rows = make_rows(min(count, 20_000), seed=count)
    for stream in range(streams):
        spool = SpoolOf(state_dir, 60 + stream)
        for number in range(stream, count, streams):
            row = rows[number % len(rows)]
            spool.add(row._replace(request_id=f"{number:016x}{row.request_id[:16]}"), flush=False)
            if spool.writer.pending_records >= 200:
                spool.writer.flush()
        spool.close()
