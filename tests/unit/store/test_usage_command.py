"""`proxyd usage`: the table, the JSON, and what it says when there is nothing to read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from proxyd.cli.usage import add_arguments, run
from proxyd.clock import FakeClock
from tests.unit.store.test_sqlite import NOW, put, row

CONFIG = """
[server]
listen = ["127.0.0.1:0"]
state_dir = "{state}"
[auth]
mode = "off"
[telemetry]
sink = "sqlite:///{state}/telemetry.db"
[[upstream]]
name = "a"
dialect = "openai"
url = "http://127.0.0.1:9/v1"
[[model]]
name = "m"
id = 1
upstreams = ["a"]
"""


def command(tmp_path: Path, *arguments: str) -> int:
    config = tmp_path / "proxyd.toml"
    config.write_text(CONFIG.format(state=tmp_path))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["-c", str(config), *arguments])
    return run(args, {}, FakeClock(wall=NOW + 10))


def test_the_table_shows_totals_and_their_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row(), row(status="interrupted", estimated=1, completion_tokens=50))
    assert command(tmp_path, "--user", "42") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["transactions", "prompt", "completion", "total", "estimated"]
    assert lines[1] == ["user", "42", "2", "20", "70", "90", "66.7%"]
    assert ["status", "interrupted", "1", "10", "50", "60", "100.0%"] in lines


def test_the_window_bounds_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row(), row(created_at=NOW - 100))
    assert command(tmp_path, "--user", "42", "--window", "1m", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["transactions"], document["total_tokens"], document["window_s"]) == (1, 30, 60.0)
    assert document["by_status"]["completed"]["transactions"] == 1


def test_a_user_without_rows_is_told_in_words_and_in_json_as_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "telemetry.db", row())
    assert command(tmp_path, "--user", "999") == 0
    assert capsys.readouterr().out == "no rows for user 999 in 24h\n"
    assert command(tmp_path, "--user", "999", "--json") == 0
    assert json.loads(capsys.readouterr().out)["transactions"] == 0


def test_models_have_the_names_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row(model_id=1), row(model_id=7))
    assert command(tmp_path, "--user", "42") == 0
    page = capsys.readouterr().out
    assert "\nmodel m (id 1) " in page
    assert "\nmodel 7 " in page
    assert command(tmp_path, "--user", "42", "--json") == 0
    by_model = json.loads(capsys.readouterr().out)["by_model"]
    assert {key: value["name"] for key, value in by_model.items()} == {"1": "m", "7": None}


def test_a_store_of_another_user_is_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "telemetry.db", row())
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert command(tmp_path, "--user", "42") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"proxyd usage: {tmp_path}/telemetry.db: may not be read by this user (uid ")
    assert "as root or as the daemon's user" in line


def test_no_store_yet_is_an_error_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(tmp_path, "--user", "1") == 1
    assert "no telemetry store there yet" in capsys.readouterr().err


def test_an_unreadable_configuration_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["-c", str(tmp_path / "none.toml"), "--user", "1"]), {}) == 2
    assert "cannot read" in capsys.readouterr().err
