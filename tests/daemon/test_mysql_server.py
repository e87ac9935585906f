"""The tests' own tools: the server and the cutting proxy do what other tests rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pymysql
import pytest

from tests.daemon.harness import ROOT, wait_for
from tests.daemon.mariadb import Database
from tests.daemon.mysql_cut import CutProxy

_STARTS_A_SERVER = """
import time
from tests.daemon.mariadb import MariaDb
server = MariaDb()
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


def _through(proxy: CutProxy, mariadb: Database) -> pymysql.Connection[object]:
    return mariadb.connect(host="127.0.0.1", port=proxy.port, user=mariadb.user, password=mariadb.password)


def _insert_and_commit(connection: pymysql.Connection[object]) -> None:
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        cursor.execute("INSERT INTO t VALUES (1)")
        cursor.execute("COMMIT")


def test_the_server_keeps_committed_rows_through_a_kill(mariadb: Database) -> None:
    mariadb.query("CREATE TABLE t (a INT) ENGINE=InnoDB")
    mariadb.query("INSERT INTO t VALUES (1)")
    mariadb.server.kill()
    assert not mariadb.server.is_running
    mariadb.server.start()
    assert mariadb.query("SELECT a FROM t") == [(1,)]


def test_each_test_has_a_database_of_its_own(mariadb: Database) -> None:
    assert mariadb.query("SHOW TABLES") == []


def test_a_frozen_server_takes_connections_and_answers_nobody(mariadb: Database) -> None:
    mariadb.server.freeze()
    with pytest.raises(pymysql.Error):
        mariadb.connect(host="127.0.0.1", port=mariadb.server.port, user="x", password="x", read_timeout=1)
    mariadb.server.thaw()
    assert mariadb.query("SELECT 1") == [(1,)]


def test_a_server_dies_with_a_killed_test_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _STARTS_A_SERVER],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as tester:  # fmt: skip
        assert tester.stdout is not None
        pid = int(tester.stdout.readline())
        tester.send_signal(signal.SIGKILL)
    wait_for(lambda: _is_gone(pid), 30)


def test_the_proxy_cuts_after_the_server_committed(mariadb: Database) -> None:
    mariadb.query("CREATE TABLE t (a INT) ENGINE=InnoDB")
    with CutProxy(mariadb.server.port) as proxy:
        connection = _through(proxy, mariadb)
        proxy.cut_after_commit()
        with pytest.raises(pymysql.Error):
            _insert_and_commit(connection)
        assert (proxy.commits, proxy.cuts) == (1, 1)
        assert mariadb.query("SELECT a FROM t") == [(1,)]


def test_the_proxy_cuts_before_the_server_heard_of_it(mariadb: Database) -> None:
    mariadb.query("CREATE TABLE t (a INT) ENGINE=InnoDB")
    with CutProxy(mariadb.server.port) as proxy:
        connection = _through(proxy, mariadb)
        proxy.cut_before_commit()
        with pytest.raises(pymysql.Error):
            _insert_and_commit(connection)
        assert mariadb.query("SELECT a FROM t") == []


def test_a_stranded_commit_arrives_late(mariadb: Database) -> None:
    mariadb.query("CREATE TABLE t (a INT) ENGINE=InnoDB")
    with CutProxy(mariadb.server.port) as proxy:
        connection = _through(proxy, mariadb)
        proxy.strand_at_commit()
        with pytest.raises(pymysql.Error):
            _insert_and_commit(connection)
        assert proxy.stranded == 1
        assert mariadb.query("SELECT a FROM t") == []
        proxy.release()
        wait_for(lambda: mariadb.query("SELECT a FROM t") == [(1,)])


def test_random_cuts_come_and_end(mariadb: Database) -> None:
    with CutProxy(mariadb.server.port) as proxy:
        proxy.cut_at_random(0.2, seed=1)
        failed = 0
        for _ in range(20):
            try:
                connection = _through(proxy, mariadb)
                with connection.cursor() as cursor:
                    for _ in range(5):
                        cursor.execute("SELECT 1")
                connection.close()
            except pymysql.Error:
                failed += 1
        assert failed == proxy.cuts > 0
        proxy.cut_at_random(0.0)
        _through(proxy, mariadb).close()


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True
