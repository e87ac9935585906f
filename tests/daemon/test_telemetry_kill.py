"""Real spool writers and the real telemetry process, killed at random instants: no row lost, none doubled.

The writers' disk also fails now and then: short writes, ENOSPC, EIO on fsync (through the `io` object of SpoolWriter).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import random
import signal
import sqlite3
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from proxyd.store.schema import StoreError
from proxyd.store.sqlite import SqliteReader
from proxyd.telemetry.record import Checkpoint, Final, Intent
from proxyd.telemetry.segment import SpoolError, ensure_spool_dir, list_spool
from proxyd.telemetry.spool import SpoolIO, SpoolWriter
from proxyd.telemetry.writer import run

ROUNDS = 30
SEED = int(os.environ.get("PROXYD_KILL_SEED", "20"))


class FaultyIO(SpoolIO):
    """A disk that is full for some writes and fails some syncs."""

    __slots__ = ("_random",)

    def __init__(self, rng: random.Random) -> None:
        self._random = rng

    def write(self, fd: int, data: bytes) -> int:
        dice = self._random.random()
        if dice < 0.02:
            raise OSError(self._random.choice([errno.ENOSPC, errno.EIO]), "injected")
        if dice < 0.06 and len(data) > 1:
            return super().write(fd, data[: self._random.randrange(1, len(data))])
        return super().write(fd, data)

    def fdatasync(self, fd: int) -> None:
        if self._random.random() < 0.2:
            raise OSError(errno.EIO, "injected")


class FileLog:
    """Keeps what was logged for the failure report."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def info(self, event: str, /, **fields: Any) -> None:
        os.write(self._fd, f"{os.getpid()} {event} {fields}\n".encode())

    warning = error = info


class Meter:
    """A metric that nobody reads."""

    def add(self, n: int = 1) -> None: ...
    def set(self, n: int) -> None: ...
    def record(self, seconds: float) -> None: ...


class Meters:
    def counter(self, name: str, **labels: str) -> Meter:
        return Meter()

    gauge = counter

    def histogram(self, name: str) -> Meter:
        return Meter()


def fork(body: Callable[[], None], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        body()
        code = 0
    except BaseException:
        with log.open("a") as out:
            traceback.print_exc(file=out)
    finally:
        os._exit(code)


def write_records(state_dir: Path, slot: int, seed: int, report: int, log: Path) -> None:
    """A worker's life until it is killed: reports each record once the spool has accepted it."""
    rng = random.Random(seed)
    waiting: list[Callable[[], None]] = []
    arguments = slot, rng.getrandbits(32) | 1, rng.choice(["second", "row", "os"]), FileLog(log), waiting.append
    io, segment_bytes = FaultyIO(random.Random(seed + 1)), rng.choice([2_000, 20_000])
    while True:
        try:
            spool = SpoolWriter(ensure_spool_dir(state_dir), *arguments, io=io, segment_bytes=segment_bytes)
            break
        except SpoolError:
            continue  # the first segment met an injected fault; the master would start another worker
    live: dict[int, tuple[str, int, float]] = {}
    said: list[str] = []
    while True:
        for _ in range(rng.randrange(1, 12)):
            dice = rng.random()
            if dice < 0.4 or not live:
                txn = spool.new_txn()
                request_id = f"{seed}-{txn}"
                live[txn] = (request_id, 0, time.time())
                spool.intent(Intent(txn, request_id, slot, "t", 1, "up", live[txn][2], 10))
                said.append(f"I {request_id}\n")
                continue
            txn = rng.choice(list(live))
            request_id, count, created_at = live[txn]
            if dice < 0.7:
                count += rng.randrange(1, 300)
                live[txn] = (request_id, count, created_at)
                spool.checkpoint(Checkpoint(txn, 10, count))
                said.append(f"C {request_id} {count}\n")
            else:
                del live[txn]
                spool.final(
                    Final(txn, slot, 1, 10, count, created_at, "t", request_id, "completed", 0, 0, 0, "up", 1, 5, 9)
                )
                said.append(f"F {request_id} {count}\n")
        for flush in waiting:
            flush()
        waiting.clear()
        if rng.random() < 0.2:
            spool.tick()
        if spool.pending_records == 0:
            os.write(report, "".join(said).encode())
            said.clear()
        time.sleep(0.001)


def read_and_store(state_dir: Path, ready: int, log: Path) -> None:
    """The telemetry process as the master runs it, until TERM."""
    config = SimpleNamespace(
        server=SimpleNamespace(state_dir=state_dir),
        telemetry=SimpleNamespace(
            sink=f"sqlite:///{state_dir}/telemetry.db",
            linger=0.005,
            batch_rows=40,
            durability="os",
            retention=86400.0,
            spool_max=0,
        ),
    )

    async def life() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        os.write(ready, b"!")
        await run(config, None, Meters(), FileLog(log), stop)

    asyncio.run(life())


class Reports:
    """What the writers said was accepted."""

    def __init__(self) -> None:
        self.intents: set[str] = set()
        self.finals: dict[str, int] = {}
        self.checkpoints: dict[str, int] = {}
        self._pipes: dict[int, bytes] = {}

    def pipe(self) -> int:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, 1 << 20)
        self._pipes[reading] = b""
        return writing

    def drain(self) -> None:
        for fd in list(self._pipes):
            try:
                while data := os.read(fd, 1 << 20):
                    self._pipes[fd] += data
            except BlockingIOError:
                pass
            *lines, self._pipes[fd] = self._pipes[fd].split(b"\n")
            for line in lines:
                self._take(*line.decode().split())

    def _take(self, kind: str, request_id: str, count: str = "0") -> None:
        if kind == "I":
            self.intents.add(request_id)
        elif kind == "C":
            self.checkpoints[request_id] = int(count)
        else:
            self.finals[request_id] = int(count)

    def close(self) -> None:
        for fd in self._pipes:
            os.close(fd)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_every_accepted_transaction_has_exactly_one_row_whoever_is_killed_whenever(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    state, log = tmp_path / "state", tmp_path / "log"
    state.mkdir()
    reports = Reports()
    children: dict[str, int] = {}
    ready = os.pipe()
    lives = 0

    def start(name: str) -> None:
        nonlocal lives
        lives += 1
        if name == "telemetry":
            children[name] = fork(lambda: read_and_store(state, ready[1], log), log)
            return
        slot, seed, writing = int(name), SEED * 1000 + lives, reports.pipe()
        children[name] = fork(lambda: write_records(state, slot, seed, writing, log), log)
        os.close(writing)

    try:
        for name in ("0", "1", "telemetry"):
            start(name)
        for _ in range(ROUNDS):
            time.sleep(rng.uniform(0.01, 0.15))
            for name in rng.choice([["0"], ["1"], ["telemetry"], ["telemetry"], ["0", "telemetry"], ["0", "1"]]):
                kill(children.pop(name))
                reports.drain()
                start(name)
        for name in ("0", "1"):
            kill(children.pop(name))
        reports.drain()
        kill(children.pop("telemetry"))
        os.set_blocking(ready[0], False)
        with contextlib.suppress(BlockingIOError):
            os.read(ready[0], 1 << 16)
        os.set_blocking(ready[0], True)
        start("telemetry")
        os.read(ready[0], 1)
        os.kill(children["telemetry"], signal.SIGTERM)
        _, status = os.waitpid(children.pop("telemetry"), 0)
        assert status == 0, log.read_text()[-4000:]
    finally:
        for pid in children.values():
            kill(pid)
        reports.close()
        os.close(ready[0])
        os.close(ready[1])

    database = sqlite3.connect(state / "telemetry.db")
    rows = database.execute(
        "SELECT request_id, status, estimated, completion_tokens FROM sys_ai_transactions"
    ).fetchall()
    leftovers = database.execute("SELECT COUNT(*) FROM sys_ai_spool_open").fetchone()[0]
    database.close()
    found = {request_id: (status, estimated, count) for request_id, status, estimated, count in rows}
    doubled = [request_id for request_id, count in Counter(row[0] for row in rows).items() if count > 1]
    assert not doubled
    assert not reports.intents - found.keys()
    assert reports.finals == {
        request_id: count
        for request_id, (status, _, count) in found.items()
        if status == "completed" and request_id in reports.finals
    }
    for request_id in reports.intents - reports.finals.keys():
        status, estimated, count = found[request_id]
        assert count >= reports.checkpoints.get(request_id, 0)
        # Killed between its final's write and the report of it, a transaction is rightly completed.
        assert (status, estimated) in {("interrupted", 1), ("completed", 0)}
    assert len(reports.finals) > 100
    assert any(status == "interrupted" for status, _, _ in found.values())
    assert list_spool(state / "spool") == ({}, [])
    assert leftovers == 0
    assert "Traceback" not in log.read_text()


async def test_a_live_loop_stores_rows_soon_syncs_beside_the_loop_and_stops_without_waiting_for_ever(
    tmp_path: Path,
) -> None:
    loop, stop, synced, log = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event(), FileLog(tmp_path / "log")
    threads: set[int] = set()

    class WatchedIO(SpoolIO):
        def fdatasync(self, fd: int) -> None:
            super().fdatasync(fd)
            threads.add(threading.get_ident())
            loop.call_soon_threadsafe(synced.set)

    config = SimpleNamespace(
        server=SimpleNamespace(state_dir=tmp_path),
        telemetry=SimpleNamespace(
            sink=f"sqlite:///{tmp_path}/telemetry.db",
            linger=0.02,
            batch_rows=10,
            durability="second",
            retention=60.0,
            spool_max=0,
        ),
    )
    spool = SpoolWriter.on_loop(loop, ensure_spool_dir(tmp_path), 0, 7, "second", log, io=WatchedIO())
    process = asyncio.create_task(run(config, None, Meters(), log, stop, drain_s=0.1))
    try:
        async with asyncio.timeout(30):
            for _ in range(25):
                txn = spool.new_txn()
                spool.intent(Intent(txn, f"r{txn}", 1, "t", 1, "up", time.time(), 10))
                spool.final(Final(txn, 1, 1, 10, 5, time.time(), "t", f"r{txn}", "completed", 0, 0, 0, "up", 1, 5, 9))
            while stored_rows(tmp_path) < 25:
                await asyncio.sleep(0.01)
            await synced.wait()
            stop.set()
            await process  # the spool is still open: the drain's deadline ends it
    finally:
        process.cancel()
        spool.close()
    assert threads
    assert threading.get_ident() not in threads
    assert stored_rows(tmp_path) == 25


def stored_rows(state_dir: Path) -> int:
    try:
        reader = SqliteReader(state_dir / "telemetry.db")
    except StoreError:
        return 0
    try:
        return int(reader.fetch("SELECT COUNT(*) FROM sys_ai_transactions")[0][0])
    finally:
        reader.close()
