"""`proxyd usage`: the table, the JSON, and what it says when there is nothing to read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from proxyd.cli.main import _parser, main
from proxyd.cli.usage import run
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
    args = _parser().parse_args(["-c", str(config), "usage", *arguments], argparse.Namespace(config=None))
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
    assert main(["-c", str(tmp_path / "none.toml"), "usage", "--user", "1"]) == 2
    assert "cannot read" in capsys.readouterr().err


def lines(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_tenant_and_a_model_are_summed_over_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row(), row(user=7), row(user=7, tenant="other"), row(user=7, model_id=9))
    assert command(tmp_path, "--tenant", "acme") == 0
    assert lines(capsys)[1] == ["tenant", "acme", "3", "30", "60", "90", "0.0%"]
    assert command(tmp_path, "--model", "m") == 0
    assert lines(capsys)[1] == ["model", "m", "(id", "1)", "3", "30", "60", "90", "0.0%"]
    assert command(tmp_path, "--model", "9") == 0
    assert lines(capsys)[1] == ["model", "9", "1", "10", "20", "30", "0.0%"]
    assert command(tmp_path, "--user", "7", "--tenant", "acme", "--model", "1") == 0
    assert lines(capsys)[1][:8] == ["user", "7,", "tenant", "acme,", "model", "m", "(id", "1)"]
    assert command(tmp_path, "--tenant", "ACME") == 0
    assert capsys.readouterr().out == "no rows for tenant ACME in 24h\n"


def test_json_tells_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row(), row(user=7))
    assert command(tmp_path, "--tenant", "acme", "--model", "m", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    asked = {key: document[key] for key in ("user_id", "tenant", "model_id", "since", "window_s")}
    since = "2023-11-13T22:13:30Z"
    assert asked == {"user_id": None, "tenant": "acme", "model_id": 1, "since": since, "window_s": 86400.0}
    assert document["transactions"] == 2


def test_a_model_that_the_file_does_not_have_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row())
    for name in ("gpt", "70000", "-1"):
        assert command(tmp_path, f"--model={name}") == 2
        assert f"the file has no model '{name}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "since, found",
    [
        ("2023-11-14T22:13:20", 1),
        ("2023-11-14 22:13:20Z", 1),
        ("2023-11-14T23:13:20+01:00", 1),
        ("2023-11-14T23:13:20", 0),
        ("2023-11-14", 2),
        ("1969-01-01", 2),
    ],
)
def test_since_is_utc_unless_it_says_another_offset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], since: str, found: int
) -> None:
    put(tmp_path / "telemetry.db", row(), row(created_at=NOW - 3600))
    assert command(tmp_path, "--user", "42", "--since", since, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["transactions"], document["window_s"]) == (found, None)
    if not found:
        assert command(tmp_path, "--user", "42", "--since", since) == 0
        assert capsys.readouterr().out == "no rows for user 42 since 2023-11-14 23:13:20 UTC\n"


def test_a_window_longer_than_time_is_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "telemetry.db", row())
    assert command(tmp_path, "--user", "42", "--window", "99999999d") == 0
    assert lines(capsys)[1][:3] == ["user", "42", "1"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "needs --user ID, --tenant T or --model M"),
        (["--user", "1", "--since", "2026-01-01", "--window", "1h"], "not allowed with"),
        (["--user", "1", "--since", "yesterday"], "write 2026-01-31"),
        (["--user", "1", "--window", "1"], "unit"),
    ],
)
def test_arguments_that_are_not_understood_are_exit_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["usage", *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_a_tenant_of_bytes_that_are_no_text_and_one_with_escapes_are_told_harmlessly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "telemetry.db", row(tenant="a\x1b[2Jb"))
    assert command(tmp_path, "--tenant", "a\udcff") == 0
    assert capsys.readouterr().out == "no rows for tenant a\\xff in 24h\n"
    assert command(tmp_path, "--tenant", "a\udcff", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tenant"] == "a\\udcff"
    assert command(tmp_path, "--user", "42") == 0
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "tenant a\\x1b[2Jb" in page


def test_a_user_whom_sqlite_holds_as_a_negative_number_has_a_bill(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "telemetry.db", row(user=2**63), row(user=2**63 - 1), row(user=0))
    assert command(tmp_path, "--user", "9223372036854775808", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["user_id"], document["transactions"], document["total_tokens"]) == (2**63, 1, 30)
