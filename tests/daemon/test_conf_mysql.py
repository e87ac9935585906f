"""conf/mysql as an operator uses it: a server takes the settings, a client runs the SQL, and the daemon lives on
exactly the rights that it is given."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pymysql
import pytest

from proxyd.store.apply import ddl
from proxyd.store.sink import make_store
from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    USAGE,
    Script,
    Upstream,
    ask,
    chat_chunk,
    node,
    wait_for,
)
from tests.daemon.mariadb import MariaDb, program
from tests.daemon.test_store_commands import ROW, ago

CONF = ROOT / "conf" / "mysql"
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def settings() -> dict[str, str]:
    """The file as the server's own parser reads it."""
    command = [program("my_print_defaults"), f"--defaults-file={CONF}/60-proxyd.cnf", "mysqld"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return dict(line.removeprefix("--").split("=", 1) for line in found.stdout.splitlines())


def as_shown(value: str) -> str:
    """1G as SHOW VARIABLES tells it."""
    match = re.fullmatch(r"([0-9]+)([KMG])", value)
    return str(int(match[1]) * UNITS[match[2]]) if match else value


def test_a_server_takes_every_setting() -> None:
    wanted = settings()
    assert len(wanted) > 8
    options: dict[str, Any] = dict(wanted)
    with MariaDb(**options) as server:
        found = dict(server.query("SHOW GLOBAL VARIABLES"))
        log = server.log()
    assert {name: found[name] for name in wanted} == {name: as_shown(value) for name, value in wanted.items()}
    assert not re.search(r"\[(Warning|ERROR)\].*(innodb|variable|option|deprecated)", log, re.IGNORECASE), log


def test_every_setting_says_what_it_risks() -> None:
    text = (CONF / "60-proxyd.cnf").read_text()
    paragraphs = [part for part in text.split("\n\n") if re.search(r"^[a-z_]+ = ", part, re.MULTILINE)]
    for paragraph in paragraphs:
        assert paragraph.startswith("#"), paragraph
        assert re.search(r"\brisk|\bharmful|\bShorter|\bmuch longer", paragraph, re.IGNORECASE), paragraph
    told = {name for part in paragraphs for name in re.findall(r"^([a-z_]+) = ", part, re.MULTILINE)}
    assert told == set(settings())


def test_the_file_of_tables_is_what_the_command_prints() -> None:
    assert (CONF / "schema.sql").read_text() == ddl("mysql://u@h/d") + "\n"


def readme_steps() -> list[list[str]]:
    """The client's calls of the README, as words."""
    lines = (ROOT / "README.md").read_text().splitlines()
    steps = [shlex.split(line) for line in lines if line.startswith("mariadb ")]
    assert len(steps) == 4
    return steps


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    """A server on which an administrator followed the README, but for a password in place of the system's own name."""
    with MariaDb() as server:
        for words in readme_steps():
            source = None
            if "<" in words:
                source = (ROOT / words[words.index("<") + 1]).read_text()
                words = words[: words.index("<")]
            words = [word.replace("IDENTIFIED VIA unix_socket", "IDENTIFIED BY 'pw'") for word in words]
            command = [program("mariadb"), "--no-defaults", "-u", "root", "-S", server.socket, *words[1:]]
            subprocess.run(command, input=source, text=True, check=True, timeout=60)
        yield server


def sink(server: MariaDb) -> str:
    return f"mysql://proxyd:pw@/proxyd?unix_socket={server.socket}"


def test_the_daemon_lives_on_these_rights(
    prepared: MariaDb, tmp_path: Path, upstream: Callable[[Script], Upstream]
) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("Hi"), FINISH, USAGE, DONE))
    with node(tmp_path, up, telemetry=f'sink = "{sink(prepared)}"', quota='tokens = 1000000\nrefresh = "1s"') as daemon:
        for _ in range(3):
            assert ask(daemon, "/v1/chat/completions", CHAT).status == 200

        def users() -> list[Any]:
            return prepared.query("SELECT user_id, status FROM sys_ai_transactions ORDER BY user_id", database="proxyd")

        wait_for(lambda: users() == [(7, "completed")] * 3, 60)
        assert len(prepared.query("SELECT * FROM sys_ai_spool_offsets", database="proxyd")) > 0
        daemon.close_clients()
        assert daemon.stop() == 0
        log = daemon.log()
    assert "denied" not in log
    assert "store_failed" not in log
    assert prepared.query("SELECT * FROM sys_ai_spool_open", database="proxyd") == []


def test_retention_lives_on_these_rights(prepared: MariaDb) -> None:
    """The daemon's own comes a minute after its start."""
    prepared.query(ROW, 42, 1, ago(40 * 86400), "acme", 0, database="proxyd")

    async def delete() -> int:
        store = make_store(sink(prepared), "row", node="0123456789abcdef")
        await store.open()
        try:
            return await store.delete_older(time.time(), 10)
        finally:
            await store.close()

    assert asyncio.run(delete()) == 1


def test_the_rights_are_no_more(prepared: MariaDb) -> None:
    connection = prepared.connect(user="proxyd", password="pw", database="proxyd")
    with connection.cursor() as cursor:
        for statement in (
            "UPDATE sys_ai_transactions SET user_id = 1",
            "ALTER TABLE sys_ai_transactions ADD COLUMN x INT",
            "DROP TABLE sys_ai_spool_open",
            "CREATE TABLE other (x INT)",
            "SELECT * FROM mysql.user",
        ):
            with pytest.raises(pymysql.Error) as refused:
                cursor.execute(statement)
            assert refused.value.args[0] in (1142, 1044), statement
    connection.close()
