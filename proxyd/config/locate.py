"""Where each key of a TOML text stands: key path to line number.

Owns: a lexical walk over text that `tomllib` has already accepted, because tomllib tells no positions. Must not know:
the schema. It decodes no values: tomllib is the parser, this counts lines beside it (a test compares the paths).
Invariant: on text that tomllib accepts it ends, never raises, and finds exactly the key paths of the document.

Paths are tuples: ("upstream", 0, "url") is `url` in the first `[[upstream]]`; elements of arrays have paths, too.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from typing import Any

KeyPath = tuple[str | int, ...]
Lines = dict[KeyPath, int]

_SPACE = re.compile(r"[ \t]*")
_GAP = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
# Longest first: a triple quote also starts with a single one.
_STRING = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*"{3,5}' r"|'''(?:[^']|'(?!''))*'{3,5}" r'|"(?:[^"\\\n]|\\.)*"' r"|'[^'\n]*'", re.DOTALL
)
_ATOM = re.compile(r"[^,\]}#\n]*")


def locate(text: str) -> Lines:
    """The line, from 1, of every key path in `text`, which tomllib must have accepted."""
    return _Walk(text).document()


class _Walk:
    """One pass over the text; `at` is the offset of what comes next."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.starts = [match.end() for match in re.finditer(r"\n", text)]
        self.lines: Lines = {}
        self.tables_in: dict[KeyPath, int] = {}  # arrays of tables: how many elements so far

    def document(self) -> Lines:
        table: KeyPath = ()
        self.skip(_GAP)
        while self.at < len(self.text):
            if self.peek() == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip(_GAP)
        return self.lines

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip(self, what: re.Pattern[str]) -> str:
        match = what.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match[0]

    def note(self, path: KeyPath, offset: int) -> None:
        """Remembers the first place of a path, and of those that enclose it."""
        line = bisect.bisect_right(self.starts, offset) + 1
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def key(self) -> tuple[str, ...]:
        """A dotted key, up to `=` or `]`."""
        parts: list[str] = []
        while True:
            self.skip(_SPACE)
            raw = self.skip(_STRING) if self.peek() in ('"', "'") else self.skip(_BARE_KEY)
            decoded: Any = tomllib.loads(f"k = {raw}")["k"] if raw[:1] in ('"', "'") else raw
            parts.append(decoded)
            self.skip(_SPACE)
            if self.peek() != ".":
                return tuple(parts)
            self.at += 1

    def header(self) -> KeyPath:
        """[table] or [[array of tables]]; returns the path that the following pairs belong to."""
        offset = self.at
        is_array = self.text.startswith("[[", self.at)
        self.at += 2 if is_array else 1
        key = self.key()
        self.at += 2 if is_array else 1
        path: KeyPath = ()
        for part in key[:-1]:
            path = self.inside((*path, part))
        path = (*path, key[-1])
        if is_array:
            count = self.tables_in.get(path, 0)
            self.tables_in[path] = count + 1
            path = (*path, count)
        self.note(path, offset)
        return path

    def inside(self, path: KeyPath) -> KeyPath:
        """`path`, or its last element so far if it is an array of tables."""
        count = self.tables_in.get(path, 0)
        return (*path, count - 1) if count else path

    def pair(self, table: KeyPath) -> None:
        """key = value."""
        offset = self.at
        path = (*table, *self.key())
        self.note(path, offset)
        self.at += 1  # the equals sign
        self.value(path)

    def value(self, path: KeyPath) -> None:
        self.skip(_SPACE)
        first = self.peek()
        if first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        elif first in ('"', "'"):
            self.skip(_STRING)
        else:
            self.skip(_ATOM)

    def array(self, path: KeyPath) -> None:
        self.at += 1
        index = 0
        while True:
            self.skip(_GAP)
            if self.peek() in ("]", ""):
                self.at += 1
                return
            if self.peek() == ",":
                self.at += 1
                continue
            self.note((*path, index), self.at)
            self.value((*path, index))
            index += 1

    def inline_table(self, path: KeyPath) -> None:
        self.at += 1
        while True:
            self.skip(_GAP)
            if self.peek() in ("}", ""):
                self.at += 1
                return
            if self.peek() == ",":
                self.at += 1
                continue
            self.pair(path)
