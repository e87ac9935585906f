"""What kind of body an answer is, and its bytes without gzip or deflate, for a copy that is only read.

Owns: `media_kind`, `Inflater`. Must not know: what the body says. The relayed bytes are never these.
Bounds: one `feed` gives at most 64 KiB (ask again while `more`), a body at most `max_total` bytes; beyond it, or on
damaged input, `failed` is set and nothing more comes out: the usage is then unknown, the relay goes on.
"""

from __future__ import annotations

import zlib
from enum import Enum

# What one call may inflate: 9,000 of the shortest events, 10 ms of reading.
_CALL_BYTES = 64 * 1024
# What one body may inflate to: 200,000 tokens as events. Twice it buys a bomb as much CPU again.
_TOTAL_BYTES = 64 * 1024 * 1024


class Media(Enum):
    """How an answer's body is read."""

    SSE = "sse"
    JSON = "json"
    NDJSON = "ndjson"
    OPAQUE = "opaque"


SSE, JSON, NDJSON, OPAQUE = Media.SSE, Media.JSON, Media.NDJSON, Media.OPAQUE

_LINES = frozenset(("application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"))


def media_kind(content_type: str | None, *, streaming: bool = False) -> Media:
    """Choose the parser by the media type alone: case and parameters mean nothing, a trailing `;` is fine.

    An answer without a type to a request that asked for a stream is taken for one, as every SDK does.
    """
    essence = (content_type or "").split(";", 1)[0].strip(" \t").lower()
    if essence == "text/event-stream" or (not essence and streaming):
        return SSE
    if essence == "application/json" or (essence.startswith("application/") and essence.endswith("+json")):
        return JSON
    return NDJSON if essence in _LINES else OPAQUE


def is_identity(content_encoding: str | None) -> bool:
    """Whether the body is not encoded at all."""
    return (content_encoding or "").strip().lower() in ("", "identity")


def inflater(content_encoding: str | None) -> Inflater | None:
    """A decoder for gzip, x-gzip or deflate; None for every other coding (br, zstd, stacked ones): usage unknown
    then."""
    coding = (content_encoding or "").strip().lower()
    return Inflater(coding) if coding in ("gzip", "x-gzip", "deflate") else None


class Inflater:
    """Incremental: `out = f.feed(data)`, then `f.feed(b"")` while `f.more`. Several gzip members in a row are one
    body."""

    __slots__ = ("_gzip", "_pending", "_started", "_z", "done", "failed", "max_total", "total")

    def __init__(self, coding: str, max_total: int = _TOTAL_BYTES) -> None:
        self._gzip = coding != "deflate"
        self._z = zlib.decompressobj(31 if self._gzip else 15)
        self._pending = b""
        self._started = False
        self.max_total = max_total
        self.total = 0
        self.failed = False
        self.done = False

    @property
    def more(self) -> bool:
        """Whether input is waiting that `feed(b"")` would decode."""
        return bool(self._pending) and not self.failed and not self.done

    def feed(self, data: bytes) -> bytes:
        """Decode what can be decoded now, at most 64 KiB of it; never raises."""
        if self.failed or self.done:
            return b""
        data = self._pending + data
        if not data:
            return b""
        try:
            out = self._z.decompress(data, _CALL_BYTES)
        except zlib.error:
            out = self._raw(data)
        self._started = True
        self._pending = self._z.unconsumed_tail
        if self._z.eof:
            self._next_member()
        self.total += len(out)
        if self.total > self.max_total:
            self.failed, self._pending = True, b""
            return b""
        return out

    def _raw(self, data: bytes) -> bytes:
        """`deflate` means a zlib stream (RFC 9110, 8.4.1.2), but some servers send it without the two header bytes."""
        if not self._gzip and not self._started:
            self._z = zlib.decompressobj(-15)
            try:
                return self._z.decompress(data, _CALL_BYTES)
            except zlib.error:
                pass
        self.failed = True
        return b""

    def _next_member(self) -> None:
        rest = self._z.unused_data
        if self._gzip and rest[:1] == b"\x1f":
            self._z = zlib.decompressobj(31)
            self._pending = rest
        elif not self._gzip or rest.strip(b"\0"):
            self.done = True
        else:
            # zero padding, or nothing yet: another member may follow in the next read
            self._z = zlib.decompressobj(31)
            self._pending = b""
