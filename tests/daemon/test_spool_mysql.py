"""Rows that a MariaDB refuses: listed, and stored once by a retry; a spool that drains after the server was away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    USAGE,
    Daemon,
    Script,
    Upstream,
    ask,
    chat_chunk,
    node,
    wait_for,
)
from tests.daemon.mariadb import PASSWORD, Database

Make = Callable[[Script], Upstream]
PATH = "/v1/chat/completions"


def run(daemon: Daemon, *arguments: str) -> str:
    command = [sys.executable, "-m", "proxyd", "-c", str(daemon.config), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=daemon.environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(mariadb: Database) -> Counter[str]:
    return Counter(name for (name,) in mariadb.query("SELECT request_id FROM sys_ai_transactions"))


def test_a_refused_row_is_stored_by_a_retry_once_though_telemetry_and_server_are_killed(
    upstream: Make, tmp_path: Path, mariadb: Database
) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    (tmp_path / "password").write_text(PASSWORD)
    (tmp_path / "password").chmod(0o600)
    sink = f'sink = "{mariadb.url(with_password=False)}"\npassword_file = "{tmp_path}/password"'
    with node(tmp_path, up, telemetry=sink) as daemon:
        run(daemon, "schema", "--apply")
        assert DONE in ask(daemon, PATH, CHAT, X_Request_Id="first").body()
        wait_for(lambda: rows(mariadb) == Counter(["first"]), 30)
        mariadb.query("ALTER TABLE sys_ai_transactions MODIFY request_id VARCHAR(6) NOT NULL")
        for name in ("second-and-long", "third", "fourth-and-long"):
            assert DONE in ask(daemon, PATH, CHAT, X_Request_Id=name).body()
        wait_for(lambda: rows(mariadb) == Counter(["first", "third"]), 30)
        dead = wait_for(lambda: json.loads(run(daemon, "spool", "--json"))["dead_letters"])
        wait_for(lambda: json.loads(run(daemon, "spool", "--json"))["dead_letters"]["rows"] == 2, 30)
        dead = json.loads(run(daemon, "spool", "--json"))
        assert dead["store_not_asked"] is None
        assert "Data too long" in dead["dead_letters"]["newest"][0]["reason"]
        mariadb.query("ALTER TABLE sys_ai_transactions MODIFY request_id VARCHAR(64) NOT NULL")
        assert "2 rows re-queued" in run(daemon, "spool", "--retry")
        os.kill(daemon.child("telemetry"), signal.SIGKILL)
        mariadb.server.kill()
        assert DONE in ask(daemon, PATH, CHAT, X_Request_Id="meanwhile").body()
        told = json.loads(run(daemon, "spool", "--json"))
        assert told["store_not_asked"]
        mariadb.server.start()
        names = ["first", "second-and-long", "third", "fourth-and-long", "meanwhile"]
        wait_for(lambda: rows(mariadb) == Counter(names), 60, 0.1)
        wait_for(lambda: not [name for name in os.listdir(tmp_path / "spool") if "requeue" in name], 30)
        assert mariadb.query("SELECT COUNT(*) FROM sys_ai_spool_offsets WHERE stream LIKE 'requeue%%'") == [(0,)]
