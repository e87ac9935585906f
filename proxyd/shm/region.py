"""The one shared mapping that the master makes before it forks, and where everything lies in it.

Owns the layout. Must not know what a metric means, nor signals, nor sockets. The memory cannot be found by name, needs
no clean-up, and dies with the last process that has it (shm/memory.py); any of them may die at any instruction.

    | header     | magic, version, seats, time of start, every number below  128 bytes
    | beats      | one line of 16 words per seat (shm/beats.py)              128 x seats
    | notices    | what the master tells of reloads (shm/notice.py)          64 + 2 x 8256
    | revocations| sequence word and a ring of entries (shm/revocations.py)  64 + 16384 x 1088
    | seat 0     | words: series count, window id | series | histograms      SLOT_BYTES
    | seat 1 ... | workers', then telemetry's, then the master's

A seat is a row here. A worker's slot, the number of its listeners, is another thing: while a reload lasts two
generations have a worker each in slot 0, and they have different seats.

Invariants: sizes never change after creation; each seat has one writing process at a time, and a successor takes over
its predecessor's block with every count in it. Pages nobody wrote cost no memory, so the bounds are wide.
"""

from __future__ import annotations

import mmap
import struct

from proxyd._shm import HISTOGRAM_BUCKETS, HISTOGRAM_HEAD, HISTOGRAM_WINDOWS, HISTOGRAM_WORDS, Words
from proxyd.shm.memory import Memory

MAGIC = 0x70726F7879640000  # "proxyd"
VERSION = 2  # of what the numbers below do not say: the meaning of words. Another: a program refuses the memory
HEADER_BYTES = 128
SEATS_MAX = 8_190  # as in the ledger: 512 workers have 4,098
BEAT_BYTES = 128  # two cache lines a seat: two workers' beats never share one
NOTICE_MAX = 8192
NOTICE_BYTES = 64 + 2 * (64 + NOTICE_MAX)
REVOCATION_ENTRIES = 16_384  # all that are in force: a successor learns them from here; 17 MB, taken as it fills
REVOCATION_ENTRY_BYTES = 1088  # a jti of 256 characters, four bytes each, and the entry's head
REVOCATION_BYTES = 64 + REVOCATION_ENTRIES * REVOCATION_ENTRY_BYTES

SERIES_MAX = 2048  # per seat; half would not hold 256 tenants in every labelled family, twice only costs address space
SERIES_BYTES = 256  # value word, kind and key length, key: names and labels up to 240 bytes together
HISTOGRAM_MAX = 16  # the contract names 5; 38 KB each once touched
SLOT_HEAD_BYTES = 64
HISTOGRAM_BYTES = HISTOGRAM_WORDS * 8
SLOT_BYTES = (SLOT_HEAD_BYTES + SERIES_MAX * SERIES_BYTES + HISTOGRAM_MAX * HISTOGRAM_BYTES + 4095) // 4096 * 4096

_HEADER = struct.Struct("=QIId12I")
_GEOMETRY = {
    "beat bytes": BEAT_BYTES,
    "notice bytes": NOTICE_MAX,
    "revocations": REVOCATION_ENTRIES,
    "revocation bytes": REVOCATION_ENTRY_BYTES,
    "series": SERIES_MAX,
    "series bytes": SERIES_BYTES,
    "histograms": HISTOGRAM_MAX,
    "histogram buckets": HISTOGRAM_BUCKETS,
    "histogram head words": HISTOGRAM_HEAD,
    "histogram windows": HISTOGRAM_WINDOWS,
    "histogram words": HISTOGRAM_WORDS,
    "seat bytes": SLOT_BYTES,
}

# Seats for workers: of generations that drain, too. Forty renewals in a row, each with long streams left, find room.
# A free one costs address space and two descriptors; with more than SEATS_MANY those count, so nodes of many workers
# have eight generations.
SEATS_LEAST = 128
SEATS_PER_WORKER = 42
SEATS_MANY = 512
SEATS_PER_WORKER_LEAST = 8
SEATS_MOST = 4096  # the most workers, eight times; half of what the region can have


def count_seats(workers: int) -> int:
    """How many workers of all generations together there may be, of a node that starts with so many."""
    many = min(SEATS_PER_WORKER * workers, SEATS_MANY)
    return min(max(SEATS_LEAST, many, SEATS_PER_WORKER_LEAST * workers), SEATS_MOST)


class Region:
    """The mapping. `slots`: its seats. Workers have the first ones, then telemetry has one, then the master."""

    __slots__ = ("_memory", "kept", "memory", "slots", "started_at")

    def __init__(self, memory: Memory, slots: int, started_at: float) -> None:
        self._memory = memory
        self.memory: mmap.mmap = memory.map
        self.kept: object = None  # what this process's readers want to find again; see metrics.read
        self.slots = slots
        self.started_at = started_at

    @classmethod
    def create(cls, slots: int, started_at: float = 0.0) -> Region:
        """A zeroed mapping with `slots` seats. `started_at` is the wall clock, for the uptime. Raises OSError."""
        if not 1 <= slots <= SEATS_MAX:
            raise ValueError(f"slots out of range: {slots}")
        memory = Memory.create("proxyd-region", _size(slots))
        _HEADER.pack_into(memory.map, 0, MAGIC, VERSION, slots, started_at, *_GEOMETRY.values())
        return cls(memory, slots, started_at)

    @classmethod
    def adopt(cls, fd: int) -> Region:
        """The mapping that an earlier image of this process made; owns `fd` from then on. Raises ValueError, with what
        differs, when its layout is another; `fd` is then still the caller's."""
        memory = Memory.adopt(fd)
        try:
            slots, started_at = _check(memory.map)
        except ValueError:
            memory.disown()
            raise
        return cls(memory, slots, started_at)

    @property
    def fd(self) -> int:
        """For `adopt` in the image after execve, once it is inheritable. Stays this object's."""
        return self._memory.fd

    @property
    def telemetry(self) -> int:
        """The seat of the telemetry process."""
        return self.slots - 2

    @property
    def master(self) -> int:
        """The master's seat."""
        return self.slots - 1

    def beat_words(self) -> Words:
        return Words(self.memory, HEADER_BYTES, self.slots * BEAT_BYTES // 8)

    def notice_offset(self) -> int:
        return HEADER_BYTES + self.slots * BEAT_BYTES

    def revocation_offset(self) -> int:
        return self.notice_offset() + NOTICE_BYTES

    def slot_offset(self, slot: int) -> int:
        """Where the seat's block begins. Raises IndexError for a seat that does not exist."""
        if not 0 <= slot < self.slots:
            raise IndexError(f"no seat {slot}")
        return _first_block(self.slots) + slot * SLOT_BYTES


def _first_block(slots: int) -> int:
    return (HEADER_BYTES + slots * BEAT_BYTES + NOTICE_BYTES + REVOCATION_BYTES + 4095) // 4096 * 4096


def _size(slots: int) -> int:
    return _first_block(slots) + slots * SLOT_BYTES


def _check(memory: mmap.mmap) -> tuple[int, float]:
    """Seats and time of start of a mapping with this layout. Raises ValueError."""
    if len(memory) < HEADER_BYTES:
        raise ValueError(f"shared memory: {len(memory)} bytes hold no header of proxyd's; restart the service instead")
    magic, version, slots, started_at, *numbers = _HEADER.unpack_from(memory, 0)
    if magic != MAGIC:
        raise ValueError("shared memory: the header is not proxyd's; restart the service instead")
    differences = [] if version == VERSION else [f"version {version}, this program's is {VERSION}"]
    if version == VERSION:
        differences += [
            f"{name} {there}, this program's are {here}"
            for (name, here), there in zip(_GEOMETRY.items(), numbers, strict=True)
            if there != here
        ]
        if not differences and not (1 <= slots <= SEATS_MAX and len(memory) == _size(slots)):
            differences.append(f"{len(memory)} bytes for {slots} seats")
    if differences:
        raise ValueError(f"shared memory has another layout ({'; '.join(differences)}); restart the service instead")
    return slots, started_at
