"""Spool records and their bytes.

Owns: the three kinds of record and the frame around them. Must not know: files, clocks, who writes or reads.
Invariants: `decode(encode(r))` gives `r` with every number clamped to its column and every string cut to 64 characters;
no frame is longer than `MAX_FRAME_BYTES`; a frame of another stream, or a torn one, fails its checksum.

  0       2      3        11                     11+length   15+length
  | length | type |   id   |  payload ........... |  checksum  |      little-endian, no padding
  length  u16, of the payload alone          id  u64, the transaction, unique within its stream (slot, epoch, nonce)
  payload fixed part, then the string lengths (u8 each), then the strings in UTF-8
  checksum u32, CRC-32 over everything before it, seeded with the stream's seed (see segment.py), so that a block of an
          older file that the file system left behind is not taken for a record

Why zlib's CRC-32 and not CRC-32C: both detect every burst up to 32 bits and miss a torn tail with probability 2**-32;
at our lengths (under 400 bytes) CRC-32 detects any 4 flipped bits, CRC-32C any 5. That difference is not worth a native
dependency: zlib is in the standard library, 0.1 us for 100 bytes. Source: P. Koopman, "32-Bit CRCs for Internet
Applications" (2002), table 1.
Cost: encode_final 1.3 us. A final with a request id of 32 characters takes 99 bytes and the names of its tenant and
upstream.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32


class Kind(IntEnum):
    """The type byte. A kind that this version does not know is skipped if its checksum holds."""

    INTENT = 1
    CHECKPOINT = 2
    FINAL = 3


# The contract's words for how a transaction ended; the index is the byte on disk, so only ever append.
STATUSES: tuple[str, ...] = ("completed", "client_aborted", "upstream_error", "timeout", "interrupted")
_ESTIMATED = 0x80
_STATUS_CODES = {status: code for code, status in enumerate(STATUSES)}


def ending_of(status: str, estimated: bool) -> int:
    """The `ending` byte of a checkpoint: a status and whether the counts are ours."""
    return (_STATUS_CODES[status] + 1) | (_ESTIMATED if estimated else 0)


def read_ending(ending: int) -> tuple[str, int] | None:
    """(status, estimated) of an `ending` byte; None for 0 and for one that this version does not know."""
    code = (ending & ~_ESTIMATED) - 1
    return (STATUSES[code], 1 if ending & _ESTIMATED else 0) if 0 <= code < len(STATUSES) else None


class Intent(NamedTuple):
    """Written before the upstream is contacted. `txn` is from SpoolWriter.new_txn(), `created_at` epoch seconds."""

    txn: int
    request_id: str
    user_id: int
    tenant: str
    model_id: int
    upstream: str
    created_at: float
    prompt_estimate: int


class Checkpoint(NamedTuple):
    """Counts so far. An empty `upstream` means the intent's.

    `ending`: 0, or what `ending_of` gives: the answer's last bytes are about to leave, and with them the transaction
    has ended so. What is recovered from such a checkpoint is that end, and no interruption.
    """

    txn: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    attempts: int = 1
    ttft_ms: int = 0
    duration_ms: int = 0
    upstream: str = ""
    ending: int = 0


class Final(NamedTuple):
    """The end of a transaction: all columns of `sys_ai_transactions`.

    `created_at` must be the intent's. `accepted_at` (seconds since the epoch) is set by the spool when it takes the
    record.
    """

    txn: int
    user_id: int
    model_id: int
    prompt_tokens: int
    completion_tokens: int
    created_at: float
    tenant: str
    request_id: str
    status: str
    estimated: int
    cached_tokens: int
    reasoning_tokens: int
    upstream: str
    attempts: int
    ttft_ms: int
    duration_ms: int
    accepted_at: float = 0.0


class Frame(NamedTuple):
    """One whole record as found: its kind byte, transaction, payload, and where the next record starts."""

    kind: int
    txn: int
    payload: bytes
    end: int


_HEAD = struct.Struct("<HBQ")
_CRC = struct.Struct("<I")
_INTENT = struct.Struct("<HBQQHIdBBB")
_CHECKPOINT = struct.Struct("<HBQIIIIBIIBB")
_FINAL = struct.Struct("<HBQQHIIIIdfBBBIIBBB")
_INTENT_PAYLOAD = struct.Struct("<QHIdBBB")
_CHECKPOINT_PAYLOAD = struct.Struct("<IIIIBIIBB")
_FINAL_PAYLOAD = struct.Struct("<QHIIIIdfBBBIIBBB")

HEAD_BYTES = _HEAD.size
_OVERHEAD = _HEAD.size + _CRC.size
# Three strings of at most 255 bytes and the fixed part stay under it. A length above it is damage, not a record.
MAX_FRAME_BYTES = 1024
_U8, _U16, _U32, _U64 = 0xFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_MAX_CHARACTERS = 64  # of the VARCHAR(64) columns


def encode_intent(record: Intent, seed: int) -> bytes:
    """The record's frame."""
    tenant, request_id, upstream = _text(record.tenant), _text(record.request_id), _text(record.upstream)
    lengths = len(tenant), len(request_id), len(upstream)
    length = _INTENT_PAYLOAD.size + sum(lengths)
    fields = (record.user_id, record.model_id, record.prompt_estimate, record.created_at)
    try:
        fixed = _INTENT.pack(length, Kind.INTENT, record.txn, *fields, *lengths)
    except struct.error:
        user_id, model_id, prompt = (
            _clamp(record.user_id, _U64),
            _clamp(record.model_id, _U16),
            _clamp(record.prompt_estimate, _U32),
        )
        fixed = _INTENT.pack(length, Kind.INTENT, record.txn, user_id, model_id, prompt, record.created_at, *lengths)
    frame = fixed + tenant + request_id + upstream
    return frame + _CRC.pack(crc32(frame, seed))


def encode_checkpoint(record: Checkpoint, seed: int) -> bytes:
    """The record's frame."""
    txn, prompt, completion, cached, reasoning, attempts, ttft_ms, duration_ms, name, ending = record
    upstream = _text(name)
    length = _CHECKPOINT_PAYLOAD.size + len(upstream)
    counts = (prompt, completion, cached, reasoning, attempts, ttft_ms, duration_ms, ending)
    try:
        fixed = _CHECKPOINT.pack(length, Kind.CHECKPOINT, txn, *counts, len(upstream))
    except struct.error:
        limits = (_U32, _U32, _U32, _U32, _U8, _U32, _U32, _U8)
        fixed = _CHECKPOINT.pack(length, Kind.CHECKPOINT, txn, *map(_clamp, counts, limits), len(upstream))
    frame = fixed + upstream
    return frame + _CRC.pack(crc32(frame, seed))


def encode_final(record: Final, seed: int, accepted_at: float) -> bytes:
    """The record's frame. `accepted_at` travels as a 32-bit float of seconds after `created_at` (a day: to 8 ms)."""
    (txn, user_id, model_id, prompt, completion, created_at, tenant_name, id_text, status, estimated, cached, reasoning,
     upstream_name, attempts, ttft_ms, duration_ms, _) = record  # fmt: skip
    tenant, request_id, upstream = _text(tenant_name), _text(id_text), _text(upstream_name)
    lengths = len(tenant), len(request_id), len(upstream)
    length = _FINAL_PAYLOAD.size + sum(lengths)
    counts = (user_id, model_id, prompt, completion, cached, reasoning)
    ending = (_STATUS_CODES[status], 1 if estimated else 0, attempts, ttft_ms, duration_ms)
    waited = accepted_at - created_at
    try:
        fixed = _FINAL.pack(length, Kind.FINAL, txn, *counts, created_at, waited, *ending, *lengths)
    except struct.error:
        clamped = tuple(map(_clamp, counts, (_U64, _U16, _U32, _U32, _U32, _U32)))
        ended = tuple(map(_clamp, ending, (_U8, _U8, _U8, _U32, _U32)))
        fixed = _FINAL.pack(length, Kind.FINAL, txn, *clamped, created_at, waited, *ended, *lengths)
    frame = fixed + tenant + request_id + upstream
    return frame + _CRC.pack(crc32(frame, seed))


def find_frame(data: bytes, start: int, seed: int) -> Frame | None:
    """The whole record at `start`, or None when it is cut, torn or none; the caller knows whether more may come."""
    available = len(data) - start
    if available < _OVERHEAD:
        return None
    length, kind, txn = _HEAD.unpack_from(data, start)
    if available < length + _OVERHEAD or length > MAX_FRAME_BYTES - _OVERHEAD:
        return None
    body = start + HEAD_BYTES
    if crc32(data[start : body + length], seed) != _CRC.unpack_from(data, body + length)[0]:
        return None
    return Frame(kind, txn, data[body : body + length], body + length + _CRC.size)


def decode_intent(txn: int, payload: bytes) -> Intent:
    """The record in an INTENT frame's payload. Raises ValueError when the payload is not one."""
    try:
        user_id, model_id, prompt, created_at, *lengths = _INTENT_PAYLOAD.unpack_from(payload)
    except struct.error as error:
        raise ValueError(str(error)) from error
    tenant, request_id, upstream = _strings(payload, _INTENT_PAYLOAD.size, lengths)
    return Intent(txn, request_id, user_id, tenant, model_id, upstream, created_at, prompt)


def decode_checkpoint(txn: int, payload: bytes) -> Checkpoint:
    """The record in a CHECKPOINT frame's payload. Raises ValueError when the payload is not one."""
    try:
        *counts, ending, length = _CHECKPOINT_PAYLOAD.unpack_from(payload)
    except struct.error as error:
        raise ValueError(str(error)) from error
    (upstream,) = _strings(payload, _CHECKPOINT_PAYLOAD.size, [length])
    prompt, completion, cached, reasoning, attempts, ttft_ms, duration_ms = counts
    return Checkpoint(txn, prompt, completion, cached, reasoning, attempts, ttft_ms, duration_ms, upstream, ending)


def decode_final(txn: int, payload: bytes) -> Final:
    """The record in a FINAL frame's payload. Raises ValueError when the payload is not one."""
    try:
        (user_id, model_id, prompt, completion, cached, reasoning, created_at, waited, status, estimated, attempts,
        ttft_ms,
         duration_ms, *lengths) = _FINAL_PAYLOAD.unpack_from(payload)  # fmt: skip
    except struct.error as error:
        raise ValueError(str(error)) from error
    if status >= len(STATUSES):
        raise ValueError(f"unknown status {status}")
    tenant, request_id, upstream = _strings(payload, _FINAL_PAYLOAD.size, lengths)
    return Final(
        txn, user_id, model_id, prompt, completion, created_at, tenant, request_id, STATUSES[status], estimated, cached,
        reasoning, upstream, attempts, ttft_ms, duration_ms, created_at + waited,
    )  # fmt: skip


def _strings(payload: bytes, start: int, lengths: list[int]) -> list[str]:
    found = []
    for length in lengths:
        found.append(payload[start : start + length].decode("utf-8"))
        start += length
    if start != len(payload):
        raise ValueError("string lengths do not fill the payload")
    return found


def _text(value: str) -> bytes:
    """At most 64 characters and 255 bytes of UTF-8; what UTF-8 cannot hold (a lone surrogate from JSON) becomes `?`."""
    data = value.encode("utf-8", "replace")
    if len(data) <= _MAX_CHARACTERS:
        return data
    data = value[:_MAX_CHARACTERS].encode("utf-8", "replace")
    return data if len(data) <= _U8 else data[: _U8 - 3]  # only 64 four-byte characters reach 256: cut the last one off


def _clamp(value: int, limit: int) -> int:
    return min(max(int(value), 0), limit)
