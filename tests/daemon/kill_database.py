"""The database side of the kill rounds: where the rows are, and what is done to whoever holds them.

Owns: the store of a trial (SQLite, or a MariaDB server of its own behind a proxy that cuts connections), the strikes
against it, the reading of its rows. Must not know: the node's processes, clients. MariaDB is durable at each commit
here, as in production, so a row that was once committed is there after any kill.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pymysql

from tests.daemon.harness import Daemon
from tests.daemon.mariadb import Database, MariaDb
from tests.daemon.mysql_cut import CutProxy

# Longer than a store's patience with one statement is tried by the unit tests; here a freeze only has to hold a commit.
FREEZE_S = (0.2, 3.0)


class Store(Protocol):
    """Where a trial's rows go."""

    strikes: tuple[str, ...]
    """What may be done to it, by name; of each dozen rounds these are added once each."""

    def telemetry(self) -> dict[str, str]:
        """The sections that the configuration gets."""
        ...

    def prepare(self, config: Path) -> None: ...
    def strike(self, what: str) -> None: ...
    def heal(self) -> None: ...
    def rows(self, daemon: Daemon) -> list[dict[str, Any]]: ...


class SqliteFile:
    """The node's own file: nothing is done to it but what kills its writer."""

    strikes: tuple[str, ...] = ()

    def telemetry(self) -> dict[str, str]:
        return {}

    def prepare(self, config: Path) -> None:
        pass

    def strike(self, what: str) -> None:
        raise AssertionError(what)

    def heal(self) -> None:
        pass

    def rows(self, daemon: Daemon) -> list[dict[str, Any]]:
        return daemon.rows()


class Server:
    """A MariaDB server behind a CutProxy."""

    strikes = ("kill_db", "freeze_db", "restart_db", "cut_after_commit", "cut_before_commit", "cut_at_random", "strand")

    def __init__(self, server: MariaDb, proxy: CutProxy, database: Database, rng: random.Random) -> None:
        self._server, self._proxy, self._database, self._rng = server, proxy, database, rng

    def telemetry(self) -> dict[str, str]:
        # TOML's single quotes: the test's password holds what double ones would escape, and is percent-encoded anyway.
        return {"telemetry": f"sink = '{self._database.url(port=self._proxy.port)}'\n"}

    def prepare(self, config: Path) -> None:
        command = [sys.executable, "-m", "proxyd", "schema", "--apply", "-c", str(config)]
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert made.returncode == 0, made.stderr

    def strike(self, what: str) -> None:
        server, proxy = self._server, self._proxy
        if what == "kill_db":
            server.kill()
            time.sleep(self._rng.random())
            server.start()
        elif what == "freeze_db":
            server.freeze()
            time.sleep(self._rng.uniform(*FREEZE_S))
            server.thaw()
        elif what == "restart_db":
            server.restart()
        elif what == "cut_after_commit":
            proxy.cut_after_commit(self._rng.randrange(1, 4))
        elif what == "cut_before_commit":
            proxy.cut_before_commit(self._rng.randrange(1, 4))
        elif what == "cut_at_random":
            proxy.cut_at_random(0.05, self._rng.randrange(1 << 30))
            time.sleep(0.5)
            proxy.cut_at_random(0.0)
        elif what == "strand":
            # A COMMIT that arrives when its sender has long given up and connected anew.
            proxy.strand_at_commit()
            time.sleep(self._rng.uniform(0.2, 2.0))
            proxy.release()
        else:
            raise AssertionError(what)

    def heal(self) -> None:
        self._proxy.cut_at_random(0.0)
        self._proxy.strand_at_commit(0)
        self._proxy.release()
        self._server.heal()

    def rows(self, daemon: Daemon) -> list[dict[str, Any]]:
        connection = self._database.connect(cursorclass=pymysql.cursors.DictCursor)
        with contextlib.closing(connection), connection.cursor() as cursor:
            cursor.execute("SELECT * FROM sys_ai_transactions ORDER BY transaction_id")
            return list(cursor.fetchall())


@contextlib.contextmanager
def open_store(kind: str, rng: random.Random) -> Iterator[Store]:
    """`kind`: sqlite or mariadb."""
    if kind == "sqlite":
        yield SqliteFile()
        return
    with MariaDb() as server, CutProxy(server.port) as proxy:
        yield Server(server, proxy, server.create(), rng)
