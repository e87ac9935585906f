"""Spool segments on disk: names, headers, and what else may lie in the directory.

Owns: file names, the segment header, the spool directory's place. Must not know: records, who writes or reads.

A stream is the life of one writing process: (slot, epoch, nonce); the epochs of one node's life go together (ids.py).
It is a row of segments, numbered from 1 without gaps, of which only the newest is written. Names:
  003-89abcdef-0123456789abcdef-000001.spool   slot, epoch, nonce, sequence: a segment
  .new-<segment name>                          a segment being made; it becomes one by rename, complete and locked
  <segment name>.damaged                       a consumed segment whose end is garbage, more than one torn write leaves
  dead-letter.jsonl                            rows that the store refused for what they hold
  requeue-<16 hex>.jsonl                       such rows on their way to the store once more (requeue.py)
  requeue-<16 hex>.jsonl.bad                   lines of one that are no rows
  requeue-<16 hex>.jsonl.skipped               rows of one that seem to be stored

Header (56 bytes, little-endian): magic 8 | version u16 | slot u16 | epoch u32 | nonce u64 | sequence u32 | pid u32 |
  created f64 | carried_from u64 | carried_bytes u32 | CRC-32 u32

Carried bytes: the segment's records may begin with a copy of the end of its predecessor (what was not known to be on
disk there): bytes [carried_from, carried_from + carried_bytes) of segment n are bytes [56, 56 + carried_bytes) of
segment n + 1. Whoever consumed segment n up to position P goes on in n + 1 at `entry(P)`, and so consumes no record
twice.

The lock: a writer holds flock(LOCK_EX) on its newest segment from before the name is visible until it closes or dies,
and makes segment n + 1 visible before it closes n. So "n's lock is free, and then there is no n + 1" proves that the
writer is gone.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

MAGIC = b"pxspool\n"
VERSION = 1
_HEADER = struct.Struct("<8sHHIQIIdQI")
_CRC = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CRC.size
NEW_PREFIX = ".new-"
DAMAGED_SUFFIX = ".damaged"
DEAD_LETTERS = "dead-letter.jsonl"
REQUEUE_SUFFIX, BAD_SUFFIX, SKIPPED_SUFFIX = ".jsonl", ".bad", ".skipped"
_NAME = re.compile(r"(\d{3,5}-[0-9a-f]{8}-[0-9a-f]{16})-(\d{6,10})\.spool")
_REQUEUE = re.compile(r"(requeue-[0-9a-f]{16})\.jsonl")
_REQUEUE_BAD = re.compile(r"requeue-[0-9a-f]{16}\.jsonl\.(bad|skipped)")


class SpoolError(Exception):
    """The spool cannot be used as configured. The message names the directory and what to do."""


class Header(NamedTuple):
    """What a segment says of itself."""

    slot: int
    epoch: int
    nonce: int
    sequence: int
    pid: int
    created: float
    carried_from: int
    carried_bytes: int

    @property
    def seed(self) -> int:
        """What the checksums of this stream's records start from."""
        return (self.nonce ^ self.nonce >> 32 ^ self.epoch) & 0xFFFFFFFF

    @property
    def stream(self) -> str:
        return stream_name(self.slot, self.epoch, self.nonce)

    def entry(self, position: int | None) -> int:
        """Where to begin here, having consumed the segment before up to `position` (None: not at all)."""
        if position is None:
            return HEADER_BYTES
        return HEADER_BYTES + min(max(position - self.carried_from, 0), self.carried_bytes)


def spool_dir(state_dir: str | Path) -> Path:
    """Where the segments of the daemon with this state_dir are."""
    return Path(state_dir) / "spool"


def ensure_spool_dir(state_dir: str | Path) -> Path:
    """Makes the spool directory (mode 0700) in an existing state_dir. Raises SpoolError with the remedy."""
    state, spool = Path(state_dir), spool_dir(state_dir)
    if not state.is_dir():
        raise SpoolError(
            f"server.state_dir {state} {'is not a directory' if state.exists() else 'does not exist'}:"
            f" create it (install -d -m 0700 -o <the user of proxyd> {state}) or name another"
        )
    try:
        spool.mkdir(mode=0o700, exist_ok=True)
        # One that is there already may be another user's, or on a file system that went read-only.
        if not os.access(spool, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        raise SpoolError(
            f"{spool}: {error.strerror}; server.state_dir must be writable for the user that runs proxyd"
        ) from error
    return spool


def stream_name(slot: int, epoch: int, nonce: int) -> str:
    return f"{slot:03d}-{epoch:08x}-{nonce:016x}"


def epoch_of(stream: str) -> int:
    """The epoch in a stream's name."""
    return int(stream.split("-")[1], 16)


def segment_name(stream: str, sequence: int) -> str:
    return f"{stream}-{sequence:06d}.spool"


def parse_name(name: str) -> tuple[str, int] | None:
    """(stream, sequence) of a segment's file name; None for any other file."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1], int(match[2]))


def is_ours(name: str) -> bool:
    """True for the files that are no segments and yet belong in the directory."""
    return (
        name.startswith(NEW_PREFIX)
        or name.endswith(DAMAGED_SUFFIX)
        or name == DEAD_LETTERS
        or _REQUEUE.fullmatch(name) is not None
        or _REQUEUE_BAD.fullmatch(name) is not None
    )


def build_header(header: Header) -> bytes:
    data = _HEADER.pack(MAGIC, VERSION, *header)
    return data + _CRC.pack(crc32(data))


def parse_header(data: bytes) -> Header | None:
    """The header at the start of a segment; None when it is short, foreign, damaged or of a version we do not know."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        return None
    if crc32(data[: _HEADER.size]) != _CRC.unpack_from(data, _HEADER.size)[0]:
        return None
    _, version, *fields = _HEADER.unpack_from(data)
    return Header(*fields) if version == VERSION else None


class Listing(NamedTuple):
    """What lies in the directory: the segments of each stream, ascending; the names of files that are not ours at all;
    the streams that are files of dead letters to be stored again."""

    streams: dict[str, list[int]]
    foreign: list[str]
    requeues: list[str]


def list_files(directory: Path) -> Listing:
    """Raises OSError."""
    streams: dict[str, list[int]] = {}
    foreign: list[str] = []
    requeues: list[str] = []
    for name in os.listdir(directory):
        parsed = parse_name(name)
        if parsed is not None:
            streams.setdefault(parsed[0], []).append(parsed[1])
            continue
        requeue = _REQUEUE.fullmatch(name)
        if requeue is not None:
            requeues.append(requeue[1])
        elif not is_ours(name):
            foreign.append(name)
    for sequences in streams.values():
        sequences.sort()
    requeues.sort()
    return Listing(streams, foreign, requeues)


def list_spool(directory: Path) -> tuple[dict[str, list[int]], list[str]]:
    """The segments of each stream, ascending, and the names of files that are not ours at all."""
    found = list_files(directory)
    return found.streams, found.foreign


def directory_bytes(directory: Path) -> int:
    """Bytes of all segments in the spool directory; 0 when it cannot be read."""
    return _sum(directory, lambda name: parse_name(name) is not None)


def folder_bytes(directory: Path) -> int:
    """Bytes that count against telemetry.spool_max: segments, dead letters and what was set aside."""
    return _sum(directory, lambda name: parse_name(name) is not None or is_ours(name))


def _sum(directory: Path, is_counted: Callable[[str], bool]) -> int:
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_counted(entry.name):
                    try:
                        total += entry.stat().st_size
                    except FileNotFoundError:
                        continue
    except OSError:
        return total
    return total
