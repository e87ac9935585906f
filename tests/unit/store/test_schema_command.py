"""`proxyd schema` with SQLite: the text, what is created, what is left alone, and whose the file is."""

from __future__ import annotations

import os
import sqlite3
import stat
import tempfile
from pathlib import Path

import pytest

from proxyd.cli.main import main
from proxyd.store.queries import USER_TOTALS
from tests.unit.store.test_sqlite import NOW, put, query, row
from tests.unit.store.test_usage_command import CONFIG

EVERYTHING = [
    "created table sys_ai_transactions",
    "created table sys_ai_spool_offsets",
    "created table sys_ai_spool_open",
    "created index idx_sys_ai_user_window",
    "created index idx_sys_ai_created",
]
NOBODY = 65534


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "proxyd.toml"
    path.write_text(CONFIG.format(state=tmp_path))
    return path


def schema(config: Path, *arguments: str) -> int:
    return main(["-c", str(config), "schema", *arguments])


def test_the_text_makes_a_store_that_the_daemon_takes(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schema(config) == 0
    with sqlite3.connect(tmp_path / "telemetry.db") as database:
        database.executescript(capsys.readouterr().out)
    put(tmp_path / "telemetry.db", row())
    assert schema(config, "--apply") == 0
    assert capsys.readouterr().out == "nothing to create\n"


def test_printing_makes_nothing(tmp_path: Path, config: Path) -> None:
    assert schema(config) == 0
    assert not (tmp_path / "telemetry.db").exists()


def test_what_is_created_is_told_and_the_second_time_nothing(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "telemetry.db"
    before = os.umask(0)
    try:
        assert schema(config, "--apply") == 0
    finally:
        os.umask(before)
    assert capsys.readouterr().out.splitlines() == [f"created file {path} (mode 0600)", *EVERYTHING]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert query(path, "PRAGMA journal_mode") == [("wal",)]
    assert schema(config, "--apply") == 0
    assert capsys.readouterr().out == "nothing to create\n"
    put(path, row())
    assert len(query(path, "SELECT * FROM sys_ai_transactions")) == 1


def test_a_lost_index_is_made_again_and_rows_stay(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "telemetry.db"
    put(path, row())
    query(path, "DROP INDEX idx_sys_ai_user_window")
    assert schema(config, "--apply") == 0
    assert capsys.readouterr().out == "created index idx_sys_ai_user_window\n"
    plan = query(path, f"EXPLAIN QUERY PLAN {USER_TOTALS}", 42, "2023")
    assert "COVERING INDEX" in plan[0][3]
    assert query(path, "SELECT created_at FROM sys_ai_transactions") == [("2023-11-14 22:13:20",)]
    assert NOW == 1_700_000_000.0


def test_what_differs_is_named_and_not_altered(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "telemetry.db"
    put(path)
    for statement in (
        "DROP INDEX idx_sys_ai_created",
        "CREATE INDEX idx_sys_ai_created ON sys_ai_transactions (tenant, created_at)",
        "ALTER TABLE sys_ai_transactions ADD COLUMN note TEXT",
        "ALTER TABLE sys_ai_transactions DROP COLUMN attempts",
        "DROP TABLE sys_ai_spool_open",
        "CREATE TABLE sys_ai_spool_open (stream TEXT NOT NULL, txn INTEGER, intent BLOB NOT NULL, checkpoint BLOB)",
    ):
        query(path, statement)
    before = query(path, "SELECT sql FROM sqlite_master ORDER BY name")
    assert schema(config, "--apply") == 1
    captured = capsys.readouterr()
    assert captured.out == "nothing to create\n"
    assert captured.err.splitlines() == [
        f"proxyd schema: differs, and is not altered: {one}"
        for one in (
            "table sys_ai_transactions has no column attempts TINYINT NOT NULL",
            "table sys_ai_transactions has a column note that proxyd does not know",
            "column sys_ai_spool_open.stream is TEXT NOT NULL, not VARCHAR(64) NOT NULL (key 1)",
            "column sys_ai_spool_open.txn is INTEGER, not INTEGER NOT NULL (key 2)",
            "column sys_ai_spool_open.checkpoint is BLOB, not BLOB NOT NULL",
            "index idx_sys_ai_created is on (tenant, created_at), not on (created_at)",
        )
    ]
    assert query(path, "SELECT sql FROM sqlite_master ORDER BY name") == before


@pytest.mark.parametrize(
    "statement, words",
    [
        ("CREATE TABLE sys_ai_transactions (x)", "has a table sys_ai_transactions that proxyd did not make"),
        ("PRAGMA user_version = 7", "schema version 7, this proxyd knows 1"),
    ],
)
def test_a_store_that_is_not_ours_is_left_alone(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], statement: str, words: str
) -> None:
    query(tmp_path / "telemetry.db", statement)
    assert schema(config, "--apply") == 1
    assert words in capsys.readouterr().err
    assert len(query(tmp_path / "telemetry.db", "SELECT * FROM sqlite_master")) <= 1


@pytest.mark.parametrize(
    "what, words",
    [("nowhere/t.db", "no such directory"), ("proxyd.toml", "not a database"), ("folder", "is a directory")],
)
def test_a_place_that_cannot_hold_a_store_is_one_line(
    tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str], what: str, words: str
) -> None:
    (tmp_path / "folder").mkdir()
    config.write_text(config.read_text().replace("telemetry.db", what))
    assert schema(config, "--apply") == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("proxyd schema: ")
    assert words in line


def test_root_makes_the_file_as_the_owner_of_its_place(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As whoever runs the tests: root becomes another user for as long as it takes, anybody else stays what he is."""
    with tempfile.TemporaryDirectory() as place:  # not below tmp_path, which only its owner may enter
        config.write_text(config.read_text().replace(f"{config.parent}/telemetry.db", f"{place}/telemetry.db"))
        if os.geteuid() == 0:
            os.chown(place, NOBODY, NOBODY)
        before = (os.geteuid(), os.getegid(), os.getgroups())
        assert schema(config, "--apply") == 0
        assert (os.geteuid(), os.getegid(), os.getgroups()) == before
        made, folder = os.stat(f"{place}/telemetry.db"), os.stat(place)
        assert (made.st_uid, made.st_gid) == (folder.st_uid, folder.st_gid)
    assert capsys.readouterr().err == ""


def test_root_is_told_that_a_file_in_its_own_place_will_be_its_own(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schema(config, "--apply") == 0
    told = capsys.readouterr().err
    assert ("the file will be root's" in told) == (os.geteuid() == 0)


def test_without_a_file_it_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", f"{tmp_path}/none.toml", "schema"]) == 2
    assert "cannot read" in capsys.readouterr().err
