"""A machine on which everything is as it should be, and how to change it: for findings that need no machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from proxyd.host.kernel import SETTINGS
from proxyd.host.look import ALLOWED, AVAILABLE, TCP_MEM, Host

GOOD = Host(
    is_visible=True,
    settings={
        **{setting.name: setting.wanted for setting in SETTINGS},
        AVAILABLE: "reno cubic bbr",
        ALLOWED: "reno cubic bbr",
        TCP_MEM: "190000 250000 380000",
    },
    ram_bytes=8 << 30,
    open_files=131072,
)


def changed(settings: dict[str, str] | None = None, **more: Any) -> Host:
    """The good machine with other settings."""
    return replace(GOOD, settings={**GOOD.settings, **(settings or {})}, **more)


def without(*names: str, **more: Any) -> Host:
    """The good machine on which some settings do not exist."""
    return replace(GOOD, settings={name: value for name, value in GOOD.settings.items() if name not in names}, **more)
