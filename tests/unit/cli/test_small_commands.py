"""token, usage and status: which part of the file they need, and who does not take their output."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pymysql
import pytest
from pymysql.constants import ER
from pymysql.err import ProgrammingError

from proxyd.cli.main import main

SECRET = "0123456789abcdef0123456789abcdef"
# Everything is wrong but [auth], server.admin and telemetry.sink.
TEXT = """[server]
listen = ["nonsense"]
admin = "unix:{root}/admin.sock"
workers = -1
[auth]
secret_file = "{root}/jwt.secret"
[telemetry]
sink = "sqlite:///{root}/t.db"
linger = 4
[tasks]
[[upstream]]
name = "a"
url = "gopher://nowhere"
api_key_file = "/nonexistent/key"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "jwt.secret").write_text(SECRET)
    (tmp_path / "jwt.secret").chmod(0o600)
    (tmp_path / "proxyd.toml").write_text(TEXT.format(root=tmp_path))
    return tmp_path / "proxyd.toml"


def said(capsys: pytest.CaptureFixture[str]) -> tuple[list[str], list[str]]:
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def test_a_token_needs_nothing_of_the_file_but_auth(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-c", str(file), "token", "--user", "7"]) == 0
    (token,), (warning,) = said(capsys)
    assert token.count(".") == 2
    assert warning.startswith(f"proxyd token: warning: {file} has ")
    assert "--check-config" in warning


def test_a_token_opens_no_key_of_an_upstream(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = TEXT.replace("nonsense", "127.0.0.1:0").replace("gopher:", "https:").replace("workers = -1\n", "")
    good = good.replace("linger = 4\n", "").replace("[tasks]\n", "")
    file.write_text(good.format(root=file.parent) + '[[model]]\nname = "m"\nid = 1\nupstreams = ["a"]\n')
    assert main(["-c", str(file), "token", "--user", "7"]) == 0
    assert said(capsys)[1] == []


def test_a_fault_of_the_part_itself_refuses(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = file.read_text()
    file.write_text(text.replace("[auth]", "[auth]\nleeway = 5"))
    assert main(["-c", str(file), "token", "--user", "7"]) == 1
    (line,) = said(capsys)[1]
    assert line.startswith(f"proxyd token: error {file}:6 auth.leeway: ")
    file.write_text(text.replace("unix:", "unix!"))
    assert main(["-c", str(file), "status"]) == 1
    assert "server.admin" in said(capsys)[1][0]
    file.write_text(text.replace("sqlite:", "oracle:"))
    assert main(["-c", str(file), "usage", "--user", "7"]) == 1
    assert "telemetry.sink" in said(capsys)[1][0]


def test_status_and_usage_come_as_far_as_the_daemon_and_the_store(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-c", str(file), "status"]) == 1
    lines = said(capsys)[1]
    assert f"not running: nothing listens on unix:{file.parent}/admin.sock" in lines[-1]
    assert main(["-c", str(file), "usage", "--user", "7"]) == 1
    more = said(capsys)[1]
    assert "no telemetry store there yet; proxyd makes it when it starts" in more[-1]
    assert all(line.startswith(("proxyd status: ", "proxyd usage: ")) for line in lines + more)


def test_usage_says_of_a_strangers_table_what_apply_says(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(file.parent / "t.db")) as database:
        database.execute("CREATE TABLE sys_ai_transactions (a)")
    ends = []
    for command in (["usage", "--user", "7"], ["schema", "--apply"]):
        assert main(["-c", str(file), *command]) == 1
        ends.append(said(capsys)[1][-1].split(": ", 1)[1])
    assert ends[0] == ends[1]
    assert "has a table sys_ai_transactions that proxyd did not make; name another file" in ends[0]


@pytest.mark.parametrize("missing", [ER.NO_SUCH_TABLE, ER.BAD_DB_ERROR])
def test_usage_promises_no_tables_in_a_mysql_database(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    def connect(**_: object) -> None:
        raise ProgrammingError(missing, "not there")

    monkeypatch.setattr(pymysql, "connect", connect)
    file.write_text(re.sub("sink = .*", 'sink = "mysql://u@h/d"', file.read_text()))
    assert main(["-c", str(file), "usage", "--user", "7"]) == 1
    last = said(capsys)[1][-1]
    assert "when it starts" not in last
    assert last.count("--apply") <= 1


@pytest.mark.parametrize("command", [["status"], ["token", "--user", "1"], ["usage", "--user", "1"]])
def test_without_a_file_the_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main(["-c", f"{tmp_path}/none.toml", *command]) == 2
    (line,) = said(capsys)[1]
    assert line.startswith(f"proxyd {command[0]}: cannot read {tmp_path}/none.toml: No such file")
    assert line.endswith("-c FILE")


def test_a_number_that_is_too_large_is_told_the_largest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["token", "--user", "99999999999999999999999"])
    assert "up to 2^64-1" in capsys.readouterr().err


def run(file: Path, shell: str) -> subprocess.CompletedProcess[str]:
    script = f'"{sys.executable}" -m proxyd -c "{file}" {shell}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)


def test_a_reader_that_left_is_told_nothing(file: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        for command in (["token", "--user", "7"], ["--check-config"], ["--version"]):
            argv = [sys.executable, "-m", "proxyd", "-c", str(file), *command]
            found = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
            assert found.returncode == 1
            assert [line for line in found.stderr.splitlines() if "warning" not in line] == []
    finally:
        os.close(writing)


def test_a_full_disk_is_one_line(file: Path) -> None:
    found = run(file, "token --user 7 > /dev/full")
    assert found.returncode == 1
    assert found.stderr.splitlines()[1:] == ["proxyd token: cannot write to stdout: No space left on device"]


def test_without_a_stderr_stdout_holds_the_token_alone(file: Path) -> None:
    found = run(file, "token --user 7 2>&-")
    assert found.returncode == 0
    (token,) = found.stdout.splitlines()
    assert token.count(".") == 2


def test_without_a_stdout_a_token_is_a_failure(file: Path) -> None:
    found = run(file, "token --user 7 >&-")
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "proxyd token: stdout is closed, nothing was printed"
