"""The systemd unit: the traps that cost a service its start."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from proxyd.host.child import EXIT_CANNOT_BOOT

ROOT = Path(__file__).resolve().parents[3]
TEXTS = {path.name: path.read_text() for path in sorted((ROOT / "systemd").glob("proxyd.s*[te]"))}
UNIT = TEXTS["proxyd.service"]


def settings(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return [(name.strip(), value.strip()) for name, value in (line.split("=", 1) for line in lines)]


SETTINGS = settings(UNIT)


@pytest.mark.parametrize("name", ["proxyd.service", "proxyd.socket"])
def test_no_value_has_a_comment_in_it(name: str) -> None:
    assert not [value for _, value in settings(TEXTS[name]) if "#" in value or ";" in value]


@pytest.mark.parametrize("name", ["proxyd.service", "proxyd.socket"])
def test_every_line_is_a_section_a_comment_or_a_setting(name: str) -> None:
    kinds = [line for line in TEXTS[name].splitlines() if line and line[0] not in "#[" and "=" not in line]
    assert kinds == []


@pytest.mark.parametrize(
    "name, value",
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("KillMode", "mixed"),
        ("OOMPolicy", "continue"),
        ("RestartPreventExitStatus", str(EXIT_CANNOT_BOOT)),
        ("ProcSubset", "pid"),
        ("UMask", "0077"),
        ("RuntimeDirectoryPreserve", "restart"),
        ("ExecStartPre", "+-/usr/bin/proxyd --check-config -c /etc/proxyd/proxyd.toml"),
        ("ExecReload", "/usr/bin/proxyd reload -c /etc/proxyd/proxyd.toml"),
    ],
)
def test_the_unit_says(name: str, value: str) -> None:
    assert (name, value) in SETTINGS


def test_the_denied_calls_come_after_the_allowed_ones() -> None:
    filters = [value for name, value in SETTINGS if name == "SystemCallFilter"]
    assert filters == ["@system-service", "~@privileged @resources"]


@pytest.mark.parametrize("unknown", ["notify-reload", "FileDescriptorStorePreserve", "RestartSteps"])
def test_nothing_is_used_that_systemd_252_does_not_know(unknown: str) -> None:
    assert not [line for pair in SETTINGS for line in pair if unknown in line]


def test_each_credential_has_a_stand_in_so_that_a_missing_file_does_not_fail_the_start_unheard() -> None:
    loaded = [value.split(":")[0] for name, value in SETTINGS if name == "LoadCredential"]
    stand_ins = [value for name, value in SETTINGS if name == "SetCredential"]
    assert stand_ins == [f"{name}:\\n" for name in loaded]
    assert {"jwt.secret", "openai.key"} <= set(loaded)


def test_the_store_has_room_for_more_listeners_than_any_machine_has_cores() -> None:
    (room,) = [int(value) for name, value in SETTINGS if name == "FileDescriptorStoreMax"]
    assert room >= 1024


def test_the_socket_unit_listens_where_the_shipped_configuration_does() -> None:
    listen = tomllib.loads((ROOT / "conf/proxyd.toml").read_text())["server"]["listen"]
    assert [value for name, value in settings(TEXTS["proxyd.socket"]) if name == "ListenStream"] == listen


def test_logrotate_has_the_file_opened_anew_by_the_master_alone() -> None:
    text = (ROOT / "conf/logrotate.d/proxyd").read_text()
    assert "systemctl kill -s USR1 --kill-whom=main proxyd.service" in text
    assert text.count("{") == text.count("}") == 1


def test_everything_that_tmpfiles_makes_for_the_daemon_is_what_the_unit_makes_too() -> None:
    rules = [line.split() for line in (ROOT / "conf/tmpfiles.d/proxyd.conf").read_text().splitlines() if line[0] != "#"]
    made = {path: mode for kind, path, mode, owner, *_ in rules if kind == "d" and owner == "proxyd"}
    places = {"State": "/var/lib", "Logs": "/var/log", "Runtime": "/run"}
    wanted = {}
    for kind, place in places.items():
        named = dict(SETTINGS)
        wanted[f"{place}/{named[f'{kind}Directory']}"] = named[f"{kind}DirectoryMode"]
    assert made == wanted
