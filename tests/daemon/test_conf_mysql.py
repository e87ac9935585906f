"""conf/mysql as an operator uses it: a server takes the settings, a client runs the SQL, and the daemon lives on
exactly the rights that it is given."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from tests.daemon.harness import ROOT
from tests.daemon.mariadb import MariaDb, program

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
    assert not re.search(r"\[(Warning|ERROR)\].*(innodb|variable|option)", log, re.IGNORECASE), log


def test_every_setting_says_what_it_risks() -> None:
    text = (CONF / "60-proxyd.cnf").read_text()
    paragraphs = [part for part in text.split("\n\n") if re.search(r"^[a-z_]+ = ", part, re.MULTILINE)]
    for paragraph in paragraphs:
        assert paragraph.startswith("#"), paragraph
        assert re.search(r"\brisk|\bharmful|\bShorter|\bmuch longer", paragraph, re.IGNORECASE), paragraph
    told = {name for part in paragraphs for name in re.findall(r"^([a-z_]+) = ", part, re.MULTILINE)}
    assert told == set(settings())
