"""A real MariaDB server for tests: started, killed, frozen, started again, gone with the test process.

Owns: the server's folder, its options, its process. A data directory is made once in a test process and copied for
each server; the shared server of the fixture `mariadb` is healed before each test, so a test may kill or freeze it.
Invariants: nothing is fixed (no port, no path); every wait has a deadline; the server dies with the thread that
started it (PR_SET_PDEATHSIG, SIGKILL), so start servers in the main thread.

    def test_something(mariadb):                 # a fresh database; tests/daemon/conftest.py knows the fixture
        mariadb.query("CREATE TABLE t (a INT)")
        MysqlAddress.parse(mariadb.url(), None)
        mariadb.server.kill()

    with MariaDb(max_connections=3) as server:   # one of one's own
        server.create("db1")
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pymysql
import pytest

USER = "proxyd"
# Each character that an URL or SQL could trip over.
PASSWORD = "p@ss:w/rd?#%20'\"\\x"
START_S = 120.0  # a recovery after kill -9 on a busy machine
STOP_S = 60.0
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)
_names = itertools.count(1)
# Durable as in production, small as in a test. The server's own character set stays latin1 and its time zone is far
# from UTC: a client that relies on either is found out.
_OPTIONS: dict[str, Any] = {
    "innodb_flush_log_at_trx_commit": 1,
    "sync_binlog": 1,
    "innodb_buffer_pool_size": "64M",
    "innodb_log_file_size": "48M",
    "key_buffer_size": "1M",
    "aria_pagecache_buffer_size": "8M",
    "performance_schema": "OFF",
    "max_connections": 64,
    "default_time_zone": "-07:30",
}


def program(name: str) -> str:
    """The path of one of the server's programs; a plain failure when the package is missing."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert found, f"{name} is not installed; these tests need the Debian package mariadb-server (tests/install-deps)"
    return found


@functools.cache
def _template() -> Path:
    """An empty data directory with our user in it, made once in this process and removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="mariadb-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = folder / "data"
    made = subprocess.run(
        [
            program("mariadb-install-db"), "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=normal", f"--innodb-log-file-size={_OPTIONS['innodb_log_file_size']}",
        ],
        capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert made.returncode == 0, f"mariadb-install-db failed: {made.stdout[-2000:]}{made.stderr[-2000:]}"
    return data


class MariaDb:
    """One server. `options`: system variables, in place of or beside those above."""

    def __init__(self, **options: Any) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="mariadb-"))
        self.socket = str(self.folder / "sock")
        self.port = 0
        self.log_file = self.folder / "server.log"
        self._options = {**_OPTIONS, **options}
        self._process: subprocess.Popen[bytes] | None = None
        self._is_frozen = False
        shutil.copytree(_template(), self.folder / "data")

    def __enter__(self) -> MariaDb:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- its life ------------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, wait: bool = True) -> None:
        """Starts, recovers, and answers; on the port of the last time, if there was one."""
        assert not self.is_running, "the server runs already"
        for attempt in range(5):
            if not self.port or attempt:
                self.port = _free_port()
            self._spawn()
            if not wait or self._wait_ready():
                return
        raise AssertionError(f"no port could be bound: {self.log()[-2000:]}")

    def _spawn(self) -> None:
        def die_with_the_test() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        parent = os.getpid()
        init = self.folder / "init.sql"
        name, password = USER, PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
        init.write_text(
            f"CREATE USER IF NOT EXISTS '{name}'@'%' IDENTIFIED BY '{password}';"
            f" GRANT ALL ON *.* TO '{name}'@'%' WITH GRANT OPTION;\n".replace("; ", ";\n"),
            encoding="utf-8",
        )
        options = [f"--{name.replace('_', '-')}={value}" for name, value in self._options.items()]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program("mariadbd"), "--no-defaults", "--user=root", f"--datadir={self.folder / 'data'}",
                    f"--socket={self.socket}", f"--port={self.port}", "--bind-address=127.0.0.1",
                    f"--pid-file={self.folder / 'pid'}", f"--tmpdir={self.folder}", "--skip-name-resolve",
                    f"--init-file={init}", *options,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder, start_new_session=True,
                preexec_fn=die_with_the_test,
            )  # fmt: skip
        self._is_frozen = False

    def _wait_ready(self) -> bool:
        """True when it answers over TCP; False when it could not bind its port."""
        until = time.monotonic() + START_S
        while True:
            if not self.is_running:
                log = self.log()
                if "Bind on TCP/IP port" in log[-4000:] or "Can't start server" in log[-4000:]:
                    return False
                raise AssertionError(f"mariadbd ended with {self._process and self._process.returncode}: {log[-3000:]}")
            with contextlib.suppress(pymysql.Error):
                self.connect(host="127.0.0.1", port=self.port, user=USER, password=PASSWORD).close()
                return True
            assert time.monotonic() < until, f"mariadbd does not answer after {START_S} s: {self.log()[-3000:]}"
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends it properly. Nothing when it does not run."""
        self.thaw()
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, frozen or not; returns when it is gone."""
        self._end(signal.SIGKILL)

    def _end(self, signum: int) -> None:
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signum)
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_S)
                raise AssertionError(f"mariadbd did not stop within {STOP_S} s") from None
        self._is_frozen = False

    def restart(self) -> None:
        self.stop()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: connections stay, the kernel accepts new ones, nobody answers."""
        os.kill(self.pid, signal.SIGSTOP)
        self._is_frozen = True

    def thaw(self) -> None:
        if self._is_frozen and self.is_running:
            os.kill(self.pid, signal.SIGCONT)
        self._is_frozen = False

    def heal(self) -> None:
        """Runs and answers, whatever was done to it."""
        self.thaw()
        if not self.is_running:
            self.start()

    def close(self) -> None:
        """Kills it and removes its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- what it is asked ----------------------------------------------------------------------------------------------

    def url(self, database: str, *, with_password: bool = True, port: int | None = None) -> str:
        """mysql://user:password@host:port/database; `port`: of a proxy before it."""
        password = f":{quote(PASSWORD, safe='')}" if with_password else ""
        return f"mysql://{USER}{password}@127.0.0.1:{port or self.port}/{quote(database, safe='')}"

    def url_socket(self, database: str, *, with_password: bool = True) -> str:
        password = f":{quote(PASSWORD, safe='')}" if with_password else ""
        return f"mysql://{USER}{password}@/{quote(database, safe='')}?unix_socket={quote(self.socket)}"

    def connect(self, **arguments: Any) -> pymysql.Connection[Any]:
        """As root, over the socket; `arguments` as pymysql has them."""
        chosen = {
            "user": "root", "autocommit": True, "charset": "utf8mb4", "connect_timeout": 10, "read_timeout": 120,
            "init_command": "SET time_zone = '+00:00'", **arguments,
        }  # fmt: skip
        if "host" not in chosen:
            chosen["unix_socket"] = self.socket
        return pymysql.connect(**chosen)

    def query(self, sql: str, *params: Any, database: str | None = None) -> list[tuple[Any, ...]]:
        """Runs one statement on a connection of its own, in UTC."""
        connection = self.connect(database=database)
        try:
            with connection.cursor() as cursor:
                cursor.execute(sql, params or None)
                return list(cursor.fetchall())
        finally:
            connection.close()

    def create(self, name: str | None = None) -> Database:
        """A new, empty database, in the server's own character set."""
        name = name or f"test_{os.getpid()}_{next(_names)}"
        self.query(f"CREATE DATABASE `{name}`")
        return Database(self, name)

    def log(self) -> str:
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""


@dataclass(frozen=True)
class Database:
    """One database of a server: what the fixture `mariadb` gives."""

    server: MariaDb
    name: str
    password = PASSWORD
    user = USER

    def url(self, *, with_password: bool = True, port: int | None = None) -> str:
        return self.server.url(self.name, with_password=with_password, port=port)

    def url_socket(self, *, with_password: bool = True) -> str:
        return self.server.url_socket(self.name, with_password=with_password)

    def query(self, sql: str, *params: Any) -> list[tuple[Any, ...]]:
        return self.server.query(sql, *params, database=self.name)

    def connect(self, **arguments: Any) -> pymysql.Connection[Any]:
        return self.server.connect(**{"database": self.name, **arguments})

    def drop(self) -> None:
        self.server.query(f"DROP DATABASE IF EXISTS `{self.name}`")


@functools.cache
def shared_server() -> MariaDb:
    """The one server of this test process, started on first use, gone at its end."""
    server = MariaDb()
    atexit.register(server.close)
    server.start()
    return server


@pytest.fixture
def mariadb() -> Iterator[Database]:
    """A fresh database on the shared server."""
    server = shared_server()
    server.heal()
    database = server.create()
    yield database
    server.heal()
    # A session that a test left behind, of a killed process for one, may hold locks that DROP would wait for.
    for (thread,) in server.query("SELECT id FROM information_schema.processlist WHERE db = %s", database.name):
        with contextlib.suppress(pymysql.Error):
            server.query(f"KILL {thread}")
    database.drop()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
