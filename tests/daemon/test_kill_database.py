"""The kill rounds with the rows in MariaDB: processes, server and connections are struck in turn."""

from __future__ import annotations

import os
from pathlib import Path

from tests.daemon.kill_rounds import run

ROUNDS = 21  # each kind of blow at least once


def test_blows_at_processes_database_and_its_connections_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("PROXYD_KILL_SEED", "12"))
    counted = run(tmp_path, ROUNDS, seed, kind="mariadb")
    assert counted["finished"] > 30 * ROUNDS / 2
    assert counted["master_starts"] == 3
