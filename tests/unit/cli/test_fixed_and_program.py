"""What only a restart changes, told without secrets; and which program an upgrade starts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from proxyd.cli.fixed import differences, fixed_options
from proxyd.cli.renewal import find_program, refusals
from proxyd.config.load import parse
from proxyd.config.schema import Config

BASE = """
[auth]
secret_env = "S"
[server]
{server}
[telemetry]
{telemetry}
[limits]
{limits}
[[upstream]]
name = "a"
url = "https://a.example/v1"
max_connections = 10
[[model]]
name = "*"
id = 1
upstreams = ["a"]
"""


def config(server: str = "", telemetry: str = "", limits: str = "") -> Config:
    text = BASE.format(server=server, telemetry=telemetry, limits=limits)
    found, findings = parse(text, "f.toml", {"S": "x" * 40})
    assert found is not None, findings
    return found


def test_the_same_configuration_has_no_differences() -> None:
    assert differences(fixed_options(config()), config()) == []


def test_what_is_fixed_goes_through_json() -> None:
    fixed = json.loads(json.dumps(fixed_options(config())))
    assert differences(fixed, config()) == []
    assert set(fixed) == {"server.admin", "server.state_dir", "server.runtime_dir", "telemetry.sink"}


def test_a_changed_option_is_named_with_both_values_and_its_line() -> None:
    told = differences(fixed_options(config()), config(server='state_dir = "/srv/other"'))
    assert len(told) == 1
    assert "f.toml:5 server.state_dir: was /var/lib/proxyd at the start, is /srv/other now" in told[0]


def test_what_a_reload_may_change_is_no_difference() -> None:
    more = 'workers = 3\nlisten = ["127.0.0.1:9"]\nbacklog = 7\ndrain_timeout = "1s"'
    assert differences(fixed_options(config()), config(server=more, limits="concurrent_streams = 5")) == []


def test_a_password_is_never_shown_and_its_change_is_seen() -> None:
    one = config(telemetry='sink = "mysql://u:secret1@db.example/p"')
    other = config(telemetry='sink = "mysql://u:secret2@db.example/p"')
    told = differences(fixed_options(one), other)
    assert len(told) == 1
    assert "another password" in told[0]
    assert "u:***@db.example" in told[0]
    assert "secret" not in told[0] + json.dumps(fixed_options(one))


def test_an_option_that_the_old_program_did_not_know_is_passed_over() -> None:
    fixed = fixed_options(config())
    del fixed["telemetry.sink"]
    assert differences(fixed, config(telemetry='sink = "sqlite:////x/y.db"')) == []


def test_more_streams_than_there_is_room_for_are_refused() -> None:
    fixed = fixed_options(config())
    assert refusals(config(limits="concurrent_streams = 1024"), fixed, 1024) == []
    (told,) = refusals(config(limits="concurrent_streams = 2000"), fixed, 1024)
    assert "2000 is more than the 1024" in told


def test_a_script_is_started_by_its_own_path_and_links_are_kept(tmp_path: Path) -> None:
    real = tmp_path / "v1"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    link = tmp_path / "proxyd"
    link.symlink_to(real)
    orig = ["/usr/bin/python3", str(link), "-c", "f"]
    found = find_program(orig[1:], orig, "/usr/bin/python3", "/", {})
    assert (found.path, found.argv) == (str(link), (str(link), "-c", "f"))


def test_a_relative_path_is_made_absolute_by_where_it_was_started(tmp_path: Path) -> None:
    (tmp_path / "proxyd").write_text("#!/bin/sh\n")
    (tmp_path / "proxyd").chmod(0o755)
    found = find_program(["./proxyd"], ["python", "./proxyd"], "/usr/bin/python3", str(tmp_path), {"A": "b"})
    assert os.path.samefile(found.path, tmp_path / "proxyd")
    assert os.path.isabs(found.path)
    assert found.environ == {"A": "b"}


def test_a_module_is_started_by_the_interpreter_with_all_of_its_options() -> None:
    orig = ["python", "-X", "dev", "-m", "proxyd", "-c", "f"]
    found = find_program(["/x/proxyd/__main__.py", "-c", "f"], orig, "/opt/py/bin/python", "/", {})
    assert found.path == "/opt/py/bin/python"
    assert found.argv == ("/opt/py/bin/python", "-X", "dev", "-m", "proxyd", "-c", "f")
