"""Durations and sizes as people write them, to seconds and bytes.

Owns: the unit words. Must not know: which option a value belongs to.
Invariant: nothing without a unit is taken; a guess between seconds and milliseconds is an outage that waits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, isfinite
from typing import Any

DURATION_UNITS: dict[str, float] = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
SIZE_UNITS: dict[str, int] = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

# Units that are nearly ours; each is answered with the one that was meant.
_MEANT = {"sec": "s", "secs": "s", "min": "m", "mins": "m", "hr": "h", "day": "d", "days": "d"} | {
    "b": "B", "k": "KiB", "kb": "KiB", "kib": "KiB", "m": "MiB", "mb": "MiB", "mib": "MiB",
    "g": "GiB", "gb": "GiB", "gib": "GiB", "t": "TiB", "tb": "TiB", "tib": "TiB",
}  # fmt: skip

_MAX_NUMBER = 1e15
_NUMBER = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)[ ]?([A-Za-z]*)")


class UnitError(ValueError):
    """A value that is no duration or size: `message` says what it is, `remedy` what to write instead."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def parse_duration(value: Any, low: float = 0.0, high: float = inf) -> float:
    """Seconds out of "250ms", "10s", "2m", "24h" or "90d". The bounds choose what a number without a unit is told."""

    def readings(number: float) -> list[str]:
        meant = (("seconds", number), ("milliseconds", number / 1000))
        return [f'"{format_duration(one)}" if it is {unit}' for unit, one in meant if low <= one <= high]

    return _parse(value, DURATION_UNITS, "a duration", '"250ms", "10s", "2m", "24h" or "90d"', readings)


def parse_size(value: Any, low: int = 0, high: float = inf) -> int:
    """Bytes out of "512B", "64KiB", "8MiB" or "4GiB"; a fraction must come out as whole bytes. Bounds as above."""

    def readings(number: float) -> list[str]:
        meant = [(unit, number * size) for unit, size in SIZE_UNITS.items() if unit in ("B", "KiB", "MiB")]
        fitting = [(unit, int(one)) for unit, one in meant if low <= one <= high and one == int(one)]
        return [f'"{format_size(one)}" if it is {"bytes" if unit == "B" else unit}' for unit, one in fitting]

    size = _parse(value, SIZE_UNITS, "a size", '"512B", "64KiB", "8MiB" or "4GiB"', readings)
    if size != int(size):
        raise UnitError("not a whole number of bytes", "write it in a smaller unit")
    return int(size)


def _parse(value: Any, units: Any, noun: str, examples: str, readings: Callable[[float], list[str]]) -> float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnitError(f"must be {noun}", f"write it as a string such as {examples}")
    if not isinstance(value, str):
        raise UnitError(f"a bare number where {noun} is needed", _with_unit(value, examples, readings))
    match = _NUMBER.fullmatch(value)
    if match is None:
        raise UnitError(f"{_quoted(value)} is not {noun}", f"write {examples}")
    number, unit = match.groups()
    if not unit:
        raise UnitError(f"{_quoted(value)} has no unit", _with_unit(float(number), examples, readings))
    if unit not in units:
        meant = _MEANT.get(unit.lower())
        if meant in units:
            raise UnitError(f'unknown unit "{unit}"', f'write "{number}{meant}"')
        raise UnitError(f'unknown unit "{unit}"', f"the units are {', '.join(units)}")
    return float(number) * units[unit]


def _with_unit(number: float, examples: str, readings: Callable[[float], list[str]]) -> str:
    """What a number without a unit could have meant, as far as the option would take it."""
    told = readings(number) if isfinite(number) and number < _MAX_NUMBER else []
    return f"write it with its unit: {', '.join(told)}" if told else f"write it with its unit, such as {examples}"


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
