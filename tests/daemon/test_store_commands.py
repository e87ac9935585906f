"""`proxyd schema` and `proxyd usage` against a real MariaDB: what an operator sees, also when it is away or says no."""

from __future__ import annotations

import getpass
import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import pytest

from proxyd.store.queries import USER_TOTALS, WINDOW_SUM
from tests.daemon.harness import ROOT, config_text, model_text, upstream_text
from tests.daemon.mariadb import PASSWORD, USER, Database, program

MODELS = upstream_text("http://127.0.0.1:9/v1") + model_text("m", 1, '["openai"]')
NOTHING = "nothing to create\n"
ROW = (
    "INSERT INTO sys_ai_transactions (user_id, model_id, prompt_tokens, completion_tokens, created_at, tenant,"
    " request_id, status, estimated, cached_tokens, reasoning_tokens, upstream, attempts, ttft_ms, duration_ms)"
    " VALUES (%s, %s, 10, 20, %s, %s, 'r', 'completed', %s, 0, 0, 'openai', 1, 3, 4)"
)


class Operator:
    """Types commands with one file."""

    def __init__(self, folder: Path, sink: str, password: str | None = None) -> None:
        self.file = folder / "proxyd.toml"
        telemetry = f'sink = "{sink}"\n'
        if password is not None:
            secret = folder / "mysql.password"
            secret.write_text(password + "\n")
            secret.chmod(0o600)
            telemetry += f'password_file = "{secret}"\n'
        self.file.write_text(config_text(folder, 0, MODELS, telemetry=telemetry))

    def types(self, *arguments: str, code: int = 0) -> tuple[str, str]:
        """(stdout, stderr); no password may be in either."""
        command = [sys.executable, "-m", "proxyd", "-c", str(self.file), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
        assert done.returncode == code, (done.stdout, done.stderr)
        for secret in (PASSWORD, quote(PASSWORD, safe="")):
            assert secret not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout, done.stderr


def ago(seconds: float) -> datetime:
    return datetime.fromtimestamp(datetime.now(UTC).timestamp() - seconds, UTC).replace(microsecond=0, tzinfo=None)


def insert(mariadb: Database, rows: Sequence[tuple[int, int, float, str, int]]) -> None:
    """(user, model, seconds ago, tenant, estimated)"""
    for user, model, age, tenant, estimated in rows:
        mariadb.query(ROW, user, model, ago(age), tenant, estimated)


def test_the_printed_schema_runs_as_it_stands_and_apply_finds_nothing_to_do(mariadb: Database, tmp_path: Path) -> None:
    operator = Operator(tmp_path, mariadb.url())
    text, _ = operator.types("schema")
    assert mariadb.query("SHOW TABLES") == []
    client = [program("mariadb"), "--no-defaults", "-u", "root", "-S", mariadb.server.socket, mariadb.name]
    subprocess.run(client, input=text, text=True, check=True, timeout=60)
    assert len(mariadb.query("SHOW TABLES")) == 3
    assert operator.types("schema", "--apply") == (NOTHING, "")


def test_apply_creates_what_is_missing_tells_it_and_does_it_once(mariadb: Database, tmp_path: Path) -> None:
    operator = Operator(tmp_path, mariadb.url(with_password=False), mariadb.password)
    tables = ["sys_ai_transactions", "sys_ai_spool_offsets", "sys_ai_spool_open"]
    assert operator.types("schema", "--apply")[0].splitlines() == [f"created table {name}" for name in tables]
    assert operator.types("schema", "--apply")[0] == NOTHING
    mariadb.query("DROP TABLE sys_ai_spool_open")
    mariadb.query("DROP INDEX idx_sys_ai_user_window ON sys_ai_transactions")
    insert(mariadb, [(42, 1, 5, "acme", 0)])
    created = operator.types("schema", "--apply")[0].splitlines()
    assert sorted(created) == ["created index idx_sys_ai_user_window", "created table sys_ai_spool_open"]
    assert mariadb.query("SELECT COUNT(*) FROM sys_ai_transactions") == [(1,)]


def test_what_differs_is_named_and_not_altered(mariadb: Database, tmp_path: Path) -> None:
    operator = Operator(tmp_path, mariadb.url())
    operator.types("schema", "--apply")
    mariadb.query("ALTER TABLE sys_ai_transactions MODIFY tenant VARCHAR(10) NOT NULL")
    out, err = operator.types("schema", "--apply", code=1)
    assert out == NOTHING
    assert "differs, and is not altered: column tenant of sys_ai_transactions is varchar(10)" in err
    assert mariadb.query("SHOW COLUMNS FROM sys_ai_transactions LIKE 'tenant'")[0][1] == "varchar(10)"


def test_usage_of_a_user_a_tenant_a_model_and_since_a_time(mariadb: Database, tmp_path: Path) -> None:
    operator = Operator(tmp_path, mariadb.url())
    operator.types("schema", "--apply")
    insert(
        mariadb,
        [
            (42, 1, 60, "acme", 0),
            (42, 9, 7200, "acme", 1),
            (42, 1, 90000, "acme", 0),
            (7, 1, 60, "ACME", 0),
            (7, 1, 60, "acme", 0),
        ],
    )
    table, _ = operator.types("usage", "--user", "42")
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["user", "42", "2", "20", "40", "60", "50.0%"]
    assert ["model", "m", "(id", "1)", "1", "10", "20", "30", "0.0%"] in lines

    def told(*arguments: str) -> tuple[int, int]:
        document = json.loads(operator.types("usage", *arguments, "--json")[0])
        return document["transactions"], document["total_tokens"]

    assert told("--user", "42", "--window", "1h") == (1, 30)
    assert told("--user", "42", "--since", ago(100000).isoformat()) == (3, 90)
    assert told("--user", "42", "--since", f"{ago(3600).isoformat()}+00:00") == (1, 30)
    assert told("--tenant", "acme") == (3, 90)
    assert told("--tenant", "ACME") == (1, 30)
    assert told("--model", "m", "--user", "42") == (1, 30)
    assert told("--user", "999") == (0, 0)
    by_tenant = json.loads(operator.types("usage", "--model", "m", "--json")[0])["by_tenant"]
    assert {name: part["transactions"] for name, part in by_tenant.items()} == {"acme": 2, "ACME": 1}


def test_a_users_totals_read_the_index_alone(mariadb: Database, tmp_path: Path) -> None:
    Operator(tmp_path, mariadb.url()).types("schema", "--apply")
    insert(mariadb, [(user, 1, 60, "acme", 0) for user in (1, 2, 3, 42)])
    for sql in (WINDOW_SUM, USER_TOTALS):
        (plan,) = mariadb.query(f"EXPLAIN {sql.replace('?', '%s')}", 42, ago(86400))
        assert plan[5] == "idx_sys_ai_user_window", plan
        assert "Using index" in plan[9].split("; "), plan


def test_over_the_socket_without_a_user_it_is_the_system_s_own(mariadb: Database, tmp_path: Path) -> None:
    me = getpass.getuser()
    verb = "ALTER USER" if me == "root" else "CREATE USER IF NOT EXISTS"
    mariadb.query(f"{verb} `{me}`@localhost IDENTIFIED VIA unix_socket")
    mariadb.query(f"GRANT ALL ON `{mariadb.name}`.* TO `{me}`@localhost")
    operator = Operator(tmp_path, f"mysql:///{mariadb.name}?unix_socket={mariadb.server.socket}")
    assert "created table sys_ai_transactions" in operator.types("schema", "--apply")[0]
    assert operator.types("usage", "--user", "1")[0] == "no rows for user 1 in 24h\n"


def test_errors_are_one_line_with_a_remedy_and_without_the_password(mariadb: Database, tmp_path: Path) -> None:
    def says(sink: str, *arguments: str, password: str | None = None) -> str:
        err = Operator(tmp_path, sink, password).types(*arguments, code=1)[1]
        (line,) = err.splitlines()
        assert line.startswith(f"proxyd {arguments[0]}: ")
        return line

    usage = ("usage", "--user", "1")
    assert "`proxyd schema --apply`" in says(mariadb.url(), *usage)
    good = mariadb.url(with_password=False)
    for arguments in (usage, ("schema", "--apply")):
        wrong = says(good, *arguments, password="not-the-password")
        assert "Access denied" in wrong
        assert "password_file" in wrong
        assert "not-the-password" not in wrong
    assert "Unknown database" in says(mariadb.server.url("nowhere"), "schema", "--apply")
    mariadb.query("CREATE OR REPLACE USER reader@'%' IDENTIFIED BY 'r'")
    denied = says(good.replace(f"{USER}@", "reader@"), "schema", "--apply", password="r")
    assert "reader" in denied
    port = mariadb.server.port
    mariadb.server.stop()
    away = says(good, *usage, password=mariadb.password)
    assert f"127.0.0.1:{port}" in away
    assert "is the server running" in away


def test_a_database_that_does_not_answer_is_given_up(mariadb: Database, tmp_path: Path) -> None:
    operator = Operator(tmp_path, mariadb.url())
    mariadb.server.freeze()
    err = operator.types("usage", "--user", "1", code=1)[1]
    assert f"127.0.0.1:{mariadb.server.port}" in err


@pytest.mark.parametrize("command", [["usage", "--user", "1"], ["schema", "--apply"]])
def test_a_password_file_that_cannot_be_read_is_told(mariadb: Database, tmp_path: Path, command: list[str]) -> None:
    operator = Operator(tmp_path, mariadb.url(with_password=False), mariadb.password)
    (tmp_path / "mysql.password").chmod(0o644)
    assert "telemetry.password_file" in operator.types(*command, code=1)[1]
    (tmp_path / "mysql.password").unlink()
    assert "No such file" in operator.types(*command, code=1)[1]
