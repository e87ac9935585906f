"""Durations and sizes as people write them, to seconds and bytes.

Owns: the unit words. Must not know: which option a value belongs to.
Invariant: nothing without a unit is taken; a guess between seconds and milliseconds is an outage that waits.
"""

from __future__ import annotations

import re
from typing import Any

DURATION_UNITS: dict[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS: dict[str, int] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

# Units that are nearly ours; each is answered with the one that was meant.
_MEANT = {"sec": "s", "secs": "s", "min": "m", "mins": "m", "hr": "h", "day": "d", "days": "d"} | {
    "b": "B", "k": "KiB", "kb": "KiB", "kib": "KiB", "m": "MiB", "mb": "MiB", "mib": "MiB",
    "g": "GiB", "gb": "GiB", "gib": "GiB", "t": "TiB", "tb": "TiB", "tib": "TiB",
}  # fmt: skip

_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)[ ]?([A-Za-z]*)")


class UnitError(ValueError):
    """A value that is no duration or size: `message` says what it is, `remedy` what to write instead."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def parse_duration(value: Any) -> float:
    """Seconds out of "250ms", "10s", "2m", "24h" or "90d"."""
    return _parse(value, DURATION_UNITS, "a duration", '"250ms", "10s", "2m", "24h" or "90d"', "s")


def parse_size(value: Any) -> int:
    """Bytes out of "512B", "64KiB", "8MiB" or "4GiB"; a fraction must come out as whole bytes."""
    size = _parse(value, SIZE_UNITS, "a size", '"512B", "64KiB", "8MiB" or "4GiB"', "KiB")
    if size != int(size):
        raise UnitError("not a whole number of bytes", "write it in a smaller unit")
    return int(size)


def _parse(value: Any, units: Any, noun: str, examples: str, usual: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnitError(f"must be {noun}", f"write it as a string such as {examples}")
    if not isinstance(value, str):
        raise UnitError(f"a bare number where {noun} is needed", f'write the unit, for example "{value}{usual}"')
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise UnitError(f"{_quoted(value)} is not {noun}", f"write {examples}")
    number, unit = match.groups()
    if not unit:
        raise UnitError(f"{_quoted(value)} has no unit", f'write the unit, for example "{number}{usual}"')
    if unit not in units:
        meant = _MEANT.get(unit.lower())
        if meant in units:
            raise UnitError(f'unknown unit "{unit}"', f'write "{number}{meant}"')
        raise UnitError(f'unknown unit "{unit}"', f"the units are {', '.join(units)}")
    return float(number) * units[unit]


def _quoted(value: str) -> str:
    return f'"{value if len(value) <= 40 else value[:40] + "..."}"'


def format_duration(seconds: float) -> str:
    """The shortest exact spelling of a duration, as the configuration writes it."""
    for unit in ("d", "h", "m", "s"):
        if seconds >= DURATION_UNITS[unit] and seconds % DURATION_UNITS[unit] == 0:
            if unit == "d" and seconds < 2 * DURATION_UNITS["d"]:
                continue
            return f"{int(seconds / DURATION_UNITS[unit])}{unit}"
    return f"{round(seconds * 1000)}ms" if seconds else "0s"


def format_size(size: int) -> str:
    """The shortest exact spelling of a size, as the configuration writes it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size >= SIZE_UNITS[unit] and size % SIZE_UNITS[unit] == 0:
            return f"{size // SIZE_UNITS[unit]}{unit}"
    return f"{size}B"
