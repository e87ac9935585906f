"""The one shared mapping that the master makes before it forks, and where everything lies in it.

Owns the layout. Must not know what a metric means, nor signals, nor sockets. An anonymous shared mapping cannot be
found by name, needs no clean-up, and dies with the last process that has it; any of them may die at any instruction.

    | header     | magic, version, slots, time of start                        64 bytes
    | beats      | one line of 8 words per slot (shm/beats.py)                 64 x slots
    | revocations| sequence word and a ring of entries (shm/revocations.py)    64 + 256 x 1024
    | slot 0     | words: series count, window id | series | histograms        SLOT_BYTES
    | slot 1 ... | workers 0..N-1, then telemetry, then the master

Invariants: sizes never change after creation; each slot block has one writing process at a time, and a successor
takes over its predecessor's block with every count in it. Pages nobody wrote cost no memory, so the bounds are wide.
"""

from __future__ import annotations

import mmap
import struct

from proxyd._shm import HISTOGRAM_WORDS, Words

MAGIC = 0x70726F7879643031  # "proxyd01": a reader of another layout must refuse it
HEADER_BYTES = 64
BEAT_BYTES = 64  # one cache line a slot: two workers' beats never share one
REVOCATION_ENTRIES = 16_384  # all that are in force: a successor learns them from here; 17 MB, taken as it fills
REVOCATION_ENTRY_BYTES = 1088  # a jti of 256 characters, four bytes each, and the entry's head
REVOCATION_BYTES = 64 + REVOCATION_ENTRIES * REVOCATION_ENTRY_BYTES

SERIES_MAX = 2048  # per slot; half would not hold 256 tenants in every labelled family, twice only costs address space
SERIES_BYTES = 256  # value word, kind and key length, key: names and labels up to 240 bytes together
HISTOGRAM_MAX = 16  # the contract names 5; 38 KB each once touched
SLOT_HEAD_BYTES = 64
HISTOGRAM_BYTES = HISTOGRAM_WORDS * 8
SLOT_BYTES = (SLOT_HEAD_BYTES + SERIES_MAX * SERIES_BYTES + HISTOGRAM_MAX * HISTOGRAM_BYTES + 4095) // 4096 * 4096


class Region:
    """The mapping. `workers` is N: slots 0..N-1, then telemetry, then the master."""

    __slots__ = ("memory", "slots", "started_at")

    def __init__(self, memory: mmap.mmap, slots: int, started_at: float) -> None:
        self.memory = memory
        self.slots = slots
        self.started_at = started_at

    @classmethod
    def create(cls, slots: int, started_at: float = 0.0) -> Region:
        """A zeroed mapping for `slots` processes. `started_at` is the wall clock, for the uptime."""
        if not 1 <= slots <= 4096:
            raise ValueError(f"slots out of range: {slots}")
        size = HEADER_BYTES + slots * BEAT_BYTES + REVOCATION_BYTES
        size = (size + 4095) // 4096 * 4096 + slots * SLOT_BYTES
        memory = mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        struct.pack_into("=QIId", memory, 0, MAGIC, 1, slots, started_at)
        return cls(memory, slots, started_at)

    def beat_words(self) -> Words:
        return Words(self.memory, HEADER_BYTES, self.slots * BEAT_BYTES // 8)

    def revocation_offset(self) -> int:
        return HEADER_BYTES + self.slots * BEAT_BYTES

    def slot_offset(self, slot: int) -> int:
        """Where the slot's block begins. Raises IndexError for a slot that does not exist."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"no slot {slot}")
        first = (HEADER_BYTES + self.slots * BEAT_BYTES + REVOCATION_BYTES + 4095) // 4096 * 4096
        return first + slot * SLOT_BYTES
