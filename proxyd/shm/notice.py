"""What the master tells all processes of itself in words: the last reload's result and the generations there are.

Owns two buffers in the region, used in turn. Must not know what the words mean.

    | n | ... 64 bytes | length, crc32, ... 64 bytes | JSON | length, crc32, ... | JSON |    notice n is in buffer n % 2

Invariants: the master alone writes; a notice is whole before n names it, and its buffer is not touched again before
the next one was published. So a reader that finds n unchanged behind it has read no half, and a master that died in
the middle of writing leaves the notice before. Bound: NOTICE_MAX bytes; what is longer is shortened.
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import orjson

from proxyd._shm import Words
from proxyd.shm.region import NOTICE_MAX, Region

_HEAD = struct.Struct("=II")
_HEAD_BYTES = 64
_TRIES = 64  # each lost to two notices written meanwhile; the master writes a few in a second
_SHORTER = ((2000, 64), (400, 16), (100, 8), (40, 2))  # characters of a text, elements of a list


class Notices:
    """`put` in the master, `get` anywhere."""

    __slots__ = ("_memory", "_offset", "_words")

    def __init__(self, region: Region) -> None:
        self._memory = region.memory
        self._offset = region.notice_offset()
        self._words = Words(region.memory, self._offset, 1)

    def put(self, notice: dict[str, Any]) -> None:
        """Replaces the notice. One that is too long has its longest parts shortened; `ValueError` if nothing helps."""
        text = _fit(notice)
        number = self._words.load(0) + 1
        offset = self._at(number)
        _HEAD.pack_into(self._memory, offset, len(text), zlib.crc32(text))
        self._memory[offset + _HEAD_BYTES : offset + _HEAD_BYTES + len(text)] = text
        self._words.store(0, number)

    def get(self) -> dict[str, Any] | None:
        """The last notice; None when there is none yet, or it changes faster than it can be read."""
        for _ in range(_TRIES):
            number = self._words.load(0)
            if not number:
                return None
            offset = self._at(number)
            length, checksum = _HEAD.unpack_from(self._memory, offset)
            text = self._memory[offset + _HEAD_BYTES : offset + _HEAD_BYTES + min(length, NOTICE_MAX)]
            if self._words.load(0) == number and zlib.crc32(text) == checksum:
                notice = orjson.loads(text)
                return notice if isinstance(notice, dict) else None
            os.sched_yield()
        return None

    def _at(self, number: int) -> int:
        return self._offset + 64 + number % 2 * (_HEAD_BYTES + NOTICE_MAX)


def _fit(notice: dict[str, Any]) -> bytes:
    text = orjson.dumps(notice)
    for characters, elements in _SHORTER:
        if len(text) <= NOTICE_MAX:
            break
        text = orjson.dumps(_shorten(notice, characters, elements))
    if len(text) > NOTICE_MAX:
        raise ValueError(f"a notice of {len(text)} bytes; {NOTICE_MAX} fit")
    return text


def _shorten(value: Any, characters: int, elements: int) -> Any:
    """The value with less in it. A list of texts says how many are not shown."""
    if isinstance(value, str):
        return value if len(value) <= characters else value[: characters - 1] + "…"
    if isinstance(value, dict):
        return {name: _shorten(part, characters, elements) for name, part in value.items()}
    if isinstance(value, list | tuple):
        short = [_shorten(part, characters, elements) for part in value[:elements]]
        more = len(value) - elements
        return [*short, f"and {more} more"] if more > 0 and isinstance(value[0], str) else short
    return value
