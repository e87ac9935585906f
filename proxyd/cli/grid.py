"""Lines of styled text for a terminal of some width, or for a pipe that has none.

Owns: wrapping, columns, what is left out where there is no room. Must not know: what is told, nor how a style looks.
A line is a row of (text, style) pieces; styles are the words in STYLES. Invariant: with a width no line is longer, and
what was cut ends in an ellipsis; without one (a pipe) nothing is cut or wrapped.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from proxyd.cli.output import printable

__all__ = ["STYLES", "Block", "Cell", "Line", "clip", "cut", "fit", "grid", "note", "plain"]

STYLES = ("", "head", "dim", "good", "warn", "bad")
ELLIPSIS = "…"
GAP = 2
# What stays of a first column that has to give way: less tells nothing.
LEAST_NAME = 10

Piece = tuple[str, str]
Line = tuple[Piece, ...]
Cell = str | Piece


@dataclass(slots=True)
class Block:
    """Lines that belong together. keep: how many of them must be shown where the height does not do."""

    lines: list[Line]
    keep: int


def plain(line: Line) -> str:
    return "".join(text for text, _ in line).rstrip()


def cut(text: str, width: int | None) -> str:
    if width is None or len(text) <= width:
        return text
    return text[: max(0, width - 1)] + ELLIPSIS


def clip(line: Line, width: int) -> Line:
    """A line of pieces, not longer than that."""
    pieces: list[Piece] = []
    for text, style in line:
        pieces.append((cut(text, width), style))
        width -= len(text)
        if width <= 0:
            break
    return tuple(pieces)


def note(text: str, width: int | None, style: str = "", most: int | None = None) -> list[Line]:
    """A sentence, wrapped; of at most `most` lines the last ends in an ellipsis."""
    text = printable(text)
    if width is None:
        return [((text, style),)]
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], cut(lines[most - 1] + ELLIPSIS, width)]
    return [((line, style),) for line in lines]


def grid(head: Sequence[str], rows: Sequence[Sequence[Cell]], width: int | None) -> list[Line]:
    """Columns; those of numbers are set to the right, so that their size can be seen. Where they do not fit, the first
    column is cut, and then columns are left out from the right."""
    table = [[_cell(cell) for cell in row] for row in rows]
    sides = [any(row[at][0][:1].isalpha() for row in table) for at in range(len(head))]
    widths = [max(len(title), *(len(row[at][0]) for row in table)) for at, title in enumerate(head)] if table else []
    widths = widths or [len(title) for title in head]
    count = len(head)
    if width is not None:
        while _total(widths[:count]) > width:
            over = _total(widths[:count]) - width
            if widths[0] - over >= min(widths[0], LEAST_NAME) or count == 1:
                widths[0] = max(1, widths[0] - over)
            else:
                count -= 1
    titles = [(title, "head") for title in head]
    return [_row(row[:count], widths, sides) for row in [titles, *table]]


def _cell(cell: Cell) -> Piece:
    text, style = (cell, "") if isinstance(cell, str) else cell
    return printable(text), style


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _row(row: Sequence[Piece], widths: Sequence[int], sides: Sequence[bool]) -> Line:
    pieces: list[Piece] = []
    last = len(row) - 1
    for at, (text, style) in enumerate(row):
        text = cut(text, widths[at])
        padding = " " * (widths[at] - len(text))
        if at:
            pieces.append((" " * GAP, ""))
        if not sides[at]:
            pieces.append((padding, ""))
        pieces.append((text, style))
        if sides[at] and at < last:
            pieces.append((padding, ""))
    return tuple(piece for piece in pieces if piece[0])


def fit(blocks: Iterable[Block], height: int | None) -> list[Line]:
    """The blocks with a blank line between two. Where the height does not do, blank lines go first, then the ends of
    the blocks that have most to spare; each says how much it lacks."""
    shown = [block for block in blocks if block.lines]
    room = [len(block.lines) for block in shown]
    has_blanks = height is None or sum(room) + len(shown) - 1 <= height
    while height is not None and sum(room) > height:
        at = max(range(len(shown)), key=lambda one: room[one] - shown[one].keep)
        if room[at] <= shown[at].keep:
            break  # no room for that either: the end is cut off below
        room[at] -= 1
    lines: list[Line] = []
    for block, count in zip(shown, room, strict=True):
        if has_blanks and lines:
            lines.append(())
        missing = len(block.lines) - count
        if not missing or count < 2:  # a line that only says what it lacks would say nothing
            lines += block.lines[:count]
        else:
            lines += [*block.lines[: count - 1], ((f"... and {missing + 1} more", "dim"),)]
    return lines if height is None else lines[:height]
