"""Revoked sessions, told to every process of the node through a ring in shared memory.

Owns the ring. Must not know tokens, HTTP or how a stream is ended. One word of sequence, then entries:

    | sequence | lock | ... |   | n | at | until | kind, length | value |   at (n - 1) % 16384

`publish` may be called in any worker; a reader keeps its own cursor and asks `since(cursor)`, which is one load when
nothing is new. Invariants: an entry carries its own number, written last, so a reader never takes half an entry.
Two publishers take turns by the lock word, which holds the taker's pid. A successor reads the ring from its start,
so a revocation outlives the worker that received it. What outlives the node is store/revocations.py's business.
Bound: 16,384 entries; the next one replaces the oldest unless that is still in force: then `publish` refuses, because
dropping it would let a revoked token in again.
"""

from __future__ import annotations

import os
import struct
from enum import IntEnum
from typing import NamedTuple

from proxyd._shm import Words
from proxyd.shm.region import REVOCATION_ENTRIES, REVOCATION_ENTRY_BYTES, Region

_ENTRY = struct.Struct("=QddHHxxxx")
VALUE_MAX = REVOCATION_ENTRY_BYTES - _ENTRY.size


class Kind(IntEnum):
    USER = 1
    TENANT = 2
    JTI = 3


class Revocation(NamedTuple):
    """Whatever was issued to `value` by the instant `at` is refused; past `until` nobody asks any more (wall s)."""

    kind: Kind
    value: str
    at: float
    until: float


class RevocationFull(Exception):
    """No room: every entry is still in force."""


class RevocationRing:
    """One process's view of the ring. `cursor` starts at 0: a new process learns all that is still in force."""

    __slots__ = ("_memory", "_offset", "_words", "cursor")

    def __init__(self, region: Region) -> None:
        self._memory = region.memory
        self._offset = region.revocation_offset()
        self._words = Words(region.memory, self._offset, 2)
        self.cursor = 0

    def has_news(self) -> bool:
        """One atomic load: cheap enough for every authentication."""
        return self._words.load(0) != self.cursor

    def take(self) -> list[Revocation]:
        """What was published since the last call, oldest first."""
        newest = self._words.load(0)
        news = []
        for number in range(max(self.cursor, newest - REVOCATION_ENTRIES) + 1, newest + 1):
            entry = self._entry(number)
            if entry is not None:
                news.append(entry)
        self.cursor = newest
        return news

    def publish(self, entry: Revocation) -> int:
        """The entry's number. Errors: ValueError for a value over VALUE_MAX bytes, RevocationFull."""
        text = entry.value.encode()
        if not text or len(text) > VALUE_MAX:
            raise ValueError("value empty or too long")
        self._lock()
        try:
            number = self._words.load(0) + 1
            offset = self._at(number)
            taken, _, until, _, _ = _ENTRY.unpack_from(self._memory, offset)
            if taken and until > entry.at:
                raise RevocationFull
            word = Words(self._memory, offset, 1)
            word.store(0, 0)
            _ENTRY.pack_into(self._memory, offset, 0, entry.at, entry.until, entry.kind, len(text))
            self._memory[offset + _ENTRY.size : offset + _ENTRY.size + len(text)] = text
            word.store(0, number)
            self._words.store(0, number)
            return number
        finally:
            self._words.compare_swap(1, os.getpid(), 0)

    def _at(self, number: int) -> int:
        return self._offset + 64 + (number - 1) % REVOCATION_ENTRIES * REVOCATION_ENTRY_BYTES

    def _entry(self, number: int) -> Revocation | None:
        offset = self._at(number)
        word = Words(self._memory, offset, 1)
        if word.load(0) != number:
            return None
        _, at, until, kind, length = _ENTRY.unpack_from(self._memory, offset)
        value = self._memory[offset + _ENTRY.size : offset + _ENTRY.size + length]
        if word.load(0) != number:
            return None
        return Revocation(Kind(kind), value.decode("utf-8", "replace"), at, until)

    def _lock(self) -> None:
        """Spins for a few microseconds of another publisher; takes over from one that died with the lock."""
        mine = os.getpid()
        while not self._words.compare_swap(1, 0, mine):
            holder = self._words.load(1)
            if holder and not os.path.exists(f"/proc/{holder}"):
                self._words.compare_swap(1, holder, 0)
            else:
                os.sched_yield()
