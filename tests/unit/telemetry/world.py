"""A spool directory, a disk that fails on command, and a telemetry process that runs until everything is drained."""

from __future__ import annotations

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from proxyd.clock import FakeClock
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.record import Checkpoint, Final, Intent, encode_final, encode_intent
from proxyd.telemetry.segment import ensure_spool_dir
from proxyd.telemetry.spool import SpoolWriter
from proxyd.telemetry.spoolio import SpoolIO
from proxyd.telemetry.writer import Settings, Writer, run


class Disk(SpoolIO):
    """The real disk, but for the next failures: an errno, or how many bytes a write takes. Counts what it does."""

    def __init__(self) -> None:
        self.writes: list[int] = []
        self.syncs: list[int] = []
        self.room: int | None = None  # bytes that can still be reserved; None: without end
        self.reserved: list[tuple[int, int]] = []
        self.written: list[int] = []
        self.synced: list[int] = []
        self.failed_files: list[int] = []

    def write(self, fd: int, data: bytes) -> int:
        if self.writes:
            fault = self.writes.pop(0)
            if fault < 0:
                raise OSError(-fault, os.strerror(-fault))
            data = data[:fault]
        self.written.append(len(data))
        return super().write(fd, data)

    def reserve(self, fd: int, start: int, length: int) -> None:
        if self.room is not None and length > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().reserve(fd, start, length)
        self.reserved.append((start, length))

    def create(self, path: Path) -> int:
        if self.room is not None and self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().create(path)

    def fdatasync(self, fd: int) -> None:
        assert os.fstat(fd).st_ino not in self.failed_files, "a failed sync was retried on its file"
        if self.syncs and self.syncs.pop(0):
            self.failed_files.append(os.fstat(fd).st_ino)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.synced.append(fd)


class LogBook:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, /, **fields: Any) -> None:
        self.events.append((event, fields))

    warning = error = info

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]


class Meter:
    def __init__(self) -> None:
        self.value = 0
        self.records: list[float] = []

    def add(self, n: int = 1) -> None:
        self.value += n

    def set(self, n: int) -> None:
        self.value = n

    def record(self, seconds: float) -> None:
        self.records.append(seconds)


class Meters:
    def __init__(self) -> None:
        self.series: dict[str, Meter] = {}

    def counter(self, name: str, **labels: str) -> Meter:
        return self.series.setdefault(name + "".join(f":{value}" for value in labels.values()), Meter())

    gauge = counter

    def histogram(self, name: str) -> Meter:
        return self.counter(name)


class World:
    """One node: its state_dir, and what was logged and counted."""

    def __init__(self, tmp_path: Path) -> None:
        self.state_dir = tmp_path
        self.spool = ensure_spool_dir(tmp_path)
        self.log = LogBook()
        self.metrics = Meters()
        self.clock = FakeClock()
        self.batch_rows = 100
        self._turns: list[Callable[[], None]] = []
        self._writers: list[SpoolWriter] = []

    @property
    def database(self) -> Path:
        return self.state_dir / "telemetry.db"

    def writer(
        self, durability: str = "second", disk: Disk | None = None, *, epoch: int = 77, **options: Any
    ) -> SpoolWriter:
        options = {"io": disk or Disk(), "clock": self.clock, **options}
        spool = SpoolWriter(self.spool, 3, epoch, durability, self.log, self._turns.append, **options)
        self._writers.append(spool)
        self._last = spool
        return spool

    def turn(self) -> None:
        """Ends a loop turn: what call_soon was given runs."""
        turns, self._turns[:] = list(self._turns), []
        for callback in turns:
            callback()

    def die(self, spool: SpoolWriter) -> None:
        """What kill -9 does to a spool: its descriptor is closed, nothing else happens."""
        os.close(spool._fd)
        self._writers.remove(spool)

    def drain(self, drain_s: float = 5.0) -> None:
        """A telemetry process that was told to stop before it began: stores all that dead writers left."""
        config = SimpleNamespace(
            server=SimpleNamespace(state_dir=self.state_dir),
            telemetry=SimpleNamespace(
                sink=f"sqlite:///{self.database}",
                linger=0.0,
                batch_rows=self.batch_rows,
                durability="os",
                retention=0.0,
                spool_max=0,
            ),
        )

        async def life() -> None:
            stop = asyncio.Event()
            stop.set()
            await run(config, None, self.metrics, self.log, stop, drain_s=drain_s)

        asyncio.run(life())

    def gather_once(self) -> None:
        """A telemetry process that stores what live and dead writers have written and is killed when it is idle."""

        async def life() -> None:
            settings = Settings(0.0, self.batch_rows, 0.0)
            store = SqliteStore(self.database, "os")
            writer = Writer(self.spool, store, settings, self.metrics, self.log, asyncio.Event())
            assert await writer.recover()
            idle_steps = 0
            while idle_steps < 2:
                idle_steps = idle_steps + 1 if await writer.step() else 0
            await store.close()

        asyncio.run(life())

    def intent_frame(self, txn: int) -> bytes:
        return encode_intent(intent(txn), self._last._seed)

    def final_frame(self, txn: int) -> bytes:
        return encode_final(final(txn), self._last._seed, self.clock.wall())

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(request_id, status, completion_tokens, estimated) in the order of storing."""
        return self.query(
            "SELECT request_id, status, completion_tokens, estimated FROM sys_ai_transactions ORDER BY transaction_id"
        )

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        database = sqlite3.connect(self.database)
        try:
            return database.execute(sql).fetchall()
        finally:
            database.commit()
            database.close()

    def refuse_user(self, user_id: int) -> None:
        """The database, which is there already, takes no row of this user's from now on."""
        self.query(
            "CREATE TRIGGER poison BEFORE INSERT ON sys_ai_transactions"
            f" WHEN printf('%u', NEW.user_id) = '{user_id}' BEGIN SELECT RAISE(ABORT, 'no such row'); END"
        )

    def files(self) -> list[str]:
        return sorted(path.name for path in self.spool.iterdir())

    def close(self) -> None:
        for spool in self._writers:
            spool.close()


def intent(txn: int, request_id: str = "", **fields: Any) -> Intent:
    return Intent(txn, request_id or f"r{txn}", 42, "acme", 1, "openai", 1_700_000_000.5, 9)._replace(**fields)


def checkpoint(txn: int, completion: int) -> Checkpoint:
    return Checkpoint(txn, 10, completion, duration_ms=1500)


def final(txn: int, request_id: str = "", **fields: Any) -> Final:
    record = Final(
        txn, 42, 1, 10, 20, 1_700_000_000.5, "acme", request_id or f"r{txn}", "completed", 0, 1, 2, "openai", 1, 3, 4
    )
    return record._replace(**fields)
