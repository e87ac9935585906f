"""The systemd unit: the traps that cost a service its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxyd.host.child import EXIT_CANNOT_BOOT

UNIT = (Path(__file__).resolve().parents[3] / "systemd" / "proxyd.service").read_text()
SETTINGS = [
    tuple(part.strip() for part in line.split("=", 1))
    for line in UNIT.splitlines()
    if "=" in line and not line.startswith("#")
]


def test_no_value_has_a_comment_in_it() -> None:
    assert not [value for _, value in SETTINGS if "#" in value or ";" in value]


def test_every_line_is_a_section_a_comment_or_a_setting() -> None:
    kinds = [line for line in UNIT.splitlines() if line and line[0] not in "#[" and "=" not in line]
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
    ],
)
def test_the_unit_says(name: str, value: str) -> None:
    assert (name, value) in SETTINGS


def test_the_denied_calls_come_after_the_allowed_ones() -> None:
    filters = [value for name, value in SETTINGS if name == "SystemCallFilter"]
    assert filters == ["@system-service", "~@privileged @resources"]
