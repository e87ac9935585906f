"""Columns and lengths of time, for people.

Owns: nothing. Must not know: what is told.
"""

from __future__ import annotations

from proxyd.cli.output import printable


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Columns of numbers are set to the right, so that their size can be seen. Every cell is made printable."""
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = range(len(head))
    widths = [max(len(row[column]) for row in [head, *rows]) for column in columns]
    sides = ["<" if any(row[column][:1].isalpha() for row in rows) else ">" for column in columns]
    return [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]


def span(seconds: float) -> str:
    """The two largest units of a length of time."""
    parts: list[str] = []
    rest = int(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s")):
        count, rest = divmod(rest, size)
        if count or parts or unit == "s":
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2])


def size(count: int) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    value, units = float(count), ("B", "KiB", "MiB", "GiB", "TiB")
    for unit in units[:-1]:
        if value < 1024:
            return f"{value:.3g} {unit}" if unit != "B" else f"{count} B"
        value /= 1024
    return f"{value:.3g} {units[-1]}"
