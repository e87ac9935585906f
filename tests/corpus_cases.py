"""The wire corpus for tests: loads the cases, and cuts their bytes in every way a network may.

Owns: what a case is and which cuts there are (tests/corpus/README.md). Must not know: who parses them.
"""
from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).parent / "corpus"

TWO_WAY_LIMIT = 6 * 1024
"""Every two-way cut costs the square of the body; beyond this the other cuts must do."""

RANDOM_CUTS = 20
RANDOM_WAYS = 7
SEED = 20261120

_MULTI_BYTE = re.compile(rb"[\xc2-\xf4][\x80-\xbf]+")
_BOUNDARY = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))+")


@dataclass(frozen=True)
class Case:
    """One body and what must be understood of it."""

    path: str
    body: bytes
    expected: dict[str, Any]

    @property
    def folder(self) -> str:
        return self.path.partition("/")[0]

    @property
    def is_event_stream(self) -> bool:
        """By media type, as a client decides; an encoded body is none until it is decoded."""
        media_type = self.expected["content_type"].partition(";")[0].strip().lower()
        return media_type == "text/event-stream" and not self.expected.get("content_encoding")


@cache
def load_cases(*folders: str) -> tuple[Case, ...]:
    """All cases in `folders` (none named: in all), in the index's order."""
    index = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))
    cases = []
    for entry in index:
        file = CORPUS / entry["path"]
        if folders and entry["path"].partition("/")[0] not in folders:
            continue
        expected = json.loads(file.with_suffix(".expected.json").read_text(encoding="utf-8"))
        cases.append(Case(entry["path"], file.read_bytes(), expected))
    return tuple(cases)


def event_stream_cases(*folders: str) -> tuple[Case, ...]:
    return tuple(case for case in load_cases(*folders) if case.is_event_stream)


def cuts(body: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """(label, pieces) for every cut of `body`; the pieces joined are the body."""
    yield "whole", [body]
    yield "byte by byte", [body[i:i + 1] for i in range(len(body))]
    yield "after each CR", cut_at(body, [i + 1 for i, byte in enumerate(body) if byte == 0x0D])
    yield "after each LF", cut_at(body, [i + 1 for i, byte in enumerate(body) if byte == 0x0A])
    inside = [at for found in _MULTI_BYTE.finditer(body) for at in range(found.start() + 1, found.end())]
    if inside:
        yield "inside each character", cut_at(body, inside)
        if len(body) > TWO_WAY_LIMIT:
            for at in inside:
                yield f"inside the character at {at}", [body[:at], body[at:]]
    if len(body) <= TWO_WAY_LIMIT:
        for at in range(1, len(body)):
            yield f"cut at {at}", [body[:at], body[at:]]
    chance = random.Random(SEED)
    if len(body) >= RANDOM_WAYS:
        for number in range(RANDOM_CUTS):
            points = sorted(chance.sample(range(1, len(body)), RANDOM_WAYS - 1))
            yield f"random cut {number} at {points}", cut_at(body, points)


def few_cuts(body: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """The cuts without the two-way ones, for tests whose parse is dear."""
    for label, pieces in cuts(body):
        if not label.startswith("cut at "):
            yield label, pieces


def cut_at(body: bytes, points: list[int]) -> list[bytes]:
    """`body` in pieces that start at 0 and at each of the ascending `points`."""
    edges = [0, *points, len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


def truncations(body: bytes) -> Iterator[bytes]:
    """`body` ended early after each of its blank lines; the whole body is not among them."""
    for boundary in _BOUNDARY.finditer(body):
        if boundary.end() < len(body):
            yield body[:boundary.end()]
