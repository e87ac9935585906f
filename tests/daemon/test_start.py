"""What stands in the way of a start, or of the store, and what the daemon does about it."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import CHAT, DONE, FINISH, USAGE, Script, Upstream, ask, chat_chunk, node, wait_for
from tests.daemon.test_listeners import refusing, start_once

Make = Callable[[Script], Upstream]


@pytest.mark.parametrize(
    ("state_dir", "says"),
    [("/proc/missing", "does not exist"), ("{folder}/file", "is not a directory"), ("/proc", "must be writable")],
)
def test_a_state_directory_that_cannot_be_used_is_one_line_with_a_remedy(
    tmp_path: Path, state_dir: str, says: str
) -> None:
    (tmp_path / "file").touch()
    where = state_dir.format(folder=tmp_path)
    found = start_once(refusing(tmp_path, server=f'state_dir = "{where}"\nworkers = 2'))
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    lines = found.stderr.splitlines()
    assert all(line.startswith("proxyd: ") for line in lines), lines
    line = [line for line in lines if says in line][-1]  # before it, perhaps, the warning of the check
    assert "state_dir" in line


def test_missing_directories_of_its_own_are_made_private(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    places = f'state_dir = "{tmp_path}/deep/state"\nruntime_dir = "{tmp_path}/run"'
    with node(tmp_path, up, server=places) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("deep/state", "run")] == [0o700, 0o750]


def test_a_worker_that_cannot_boot_again_leaves_the_others_serving(upstream: Make, tmp_path: Path) -> None:
    """The state directory goes while the daemon runs: what is open serves on, a successor cannot boot."""
    import os
    import signal

    up = upstream(lambda wire: wire.stream(DONE))
    state, aside = tmp_path / "state", tmp_path / "aside"
    state.mkdir()
    with node(tmp_path, up, server=f'workers = 2\nstate_dir = "{state}"') as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        daemon.wait_rows(1)
        state.rename(aside)
        os.kill(daemon.child("worker 0"), signal.SIGKILL)
        wait_for(lambda: '"cannot_boot"' in daemon.log())
        for _ in range(10):  # the vacant slot's share of the port is taken by the other worker
            assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        aside.rename(state)
        wait_for(
            lambda: (
                [worker["state"] for worker in json.loads(daemon.admin("/status")[1])["workers"]] == ["ready", "ready"]
            ),
            30,
        )
        rows = daemon.wait_rows(11, 30)
        assert {row["status"] for row in rows} == {"completed"}


def test_while_the_store_is_locked_requests_go_on_and_their_rows_come_later(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
        daemon.wait_rows(1)
        with contextlib.closing(sqlite3.connect(tmp_path / "telemetry.db", isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            for _ in range(50):
                assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
            assert daemon.get("/readyz")[0] == 200
            assert db.execute("SELECT COUNT(*) FROM sys_ai_transactions").fetchone() == (1,)
            wait_for(lambda: daemon.metric("proxyd_telemetry_spool_bytes") > 0)
            db.execute("ROLLBACK")
        rows = daemon.wait_rows(51, 40)
        assert {(row["status"], row["prompt_tokens"], row["completion_tokens"]) for row in rows} == {
            ("completed", 11, 5)
        }


def test_a_store_that_is_still_locked_at_the_end_gets_its_rows_with_the_next_start(
    upstream: Make, tmp_path: Path
) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
        daemon.wait_rows(1)
        with contextlib.closing(sqlite3.connect(tmp_path / "telemetry.db", isolation_level=None)) as db:
            db.execute("BEGIN EXCLUSIVE")
            for _ in range(5):
                assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
            assert daemon.stop(seconds=40) == 0
            db.execute("ROLLBACK")
        daemon.start()
        rows = daemon.wait_rows(6, 20)
        assert len({row["request_id"] for row in rows}) == 6


def test_a_store_that_vanishes_is_made_anew_and_what_is_unsaid_is_said_there(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        daemon.wait_rows(1)
        daemon.stop()
        for path in tmp_path.glob("telemetry.db*"):
            path.unlink()
        daemon.start()
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        daemon.wait_rows(1)


def test_a_store_that_is_no_database_stops_nobody_from_being_served(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    store = tmp_path / "telemetry.db"
    store.write_bytes(b"this is not a database, it is a shopping list" * 100)
    with node(tmp_path, up) as daemon:
        for _ in range(3):
            assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        wait_for(lambda: "telemetry" in daemon.log() and "database" in daemon.log())
        assert daemon.get("/readyz")[0] == 200
        assert daemon.stop(seconds=40) == 0
        shutil.move(store, tmp_path / "aside")
        daemon.start()
        daemon.wait_rows(3, 20)
