"""Body framing: where a body ends, and the bytes in it (RFC 9112 sections 6 and 7).

Owns: Content-Length and chunked bodies of requests (strict), chunked bodies of responses (as lenient as a recipient
must be), writing chunks.
Must not know: heads, sockets, time, what the bytes mean.

    5;ext CRLF hello CRLF  0 CRLF  Trailer: x CRLF  CRLF | next request
    size line  data  end   last    dropped          end  | not consumed

Invariants: results do not depend on the cut; no byte past the end is consumed; at most one size line or trailer section
(_MAX_LINE, MAX_TRAILERS) is buffered; after a FramingError the position is unknown and every further feed raises it.
"""
from __future__ import annotations

import re
from enum import Enum

MAX_SIZE_DIGITS = 16
"""RFC 9112 section 7.1 wants large sizes met with care; 16 hex digits are 2**64, and none of ours is ever near."""

MAX_EXTENSION = 256
"""Nobody whose requests we serve sends extensions; signed-payload clients that do use about 90 bytes."""

MAX_EXTENSIONS_TOTAL = 16 * 1024
"""Per body: bounds the work that one-byte chunks with long extensions cause (CVE-2023-39326 in Go was this)."""

MAX_TRAILERS = 8 * 1024
"""Trailers are dropped; a server's longest are a few checksums and timings."""

LAST_CHUNK = b"0\r\n\r\n"

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_TRAILERS = re.compile(rb"(?:" + _TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n")
_REQUEST_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16}+)((?:;[\t\x20-\x7e]*+)?+)\r\n")
# A recipient must take the optional space before `;` and ignore what follows (RFC 9112 section 7.1.1).
_RESPONSE_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16}+)((?:[\t ]*+(?:;[\t\x20-\x7e\x80-\xff]*+)?+)?+)\r\n")
_MAX_LINE = MAX_SIZE_DIGITS + MAX_EXTENSION + 2
_MAX_SIZE = 2**63 - 1


class FramingError(Exception):
    """The body cannot be read on. `status`: 400 malformed, 413 too large; `payload`: what came before the fault."""

    def __init__(self, status: int, reason: str, payload: bytes = b"") -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason
        self.payload = payload


class _Phase(Enum):
    SIZE = "size line"
    DATA = "chunk data"
    DATA_END = "CRLF after the data"
    TRAILERS = "trailers"
    DONE = "done"
    BROKEN = "broken"


class _Chunks:
    """The chunked decoder under both faces: one phase per grammar element.

    SIZE -> DATA -> DATA_END -> SIZE ... -> TRAILERS -> DONE; any -> BROKEN.
    """

    __slots__ = ("_buffer", "_extensions", "_left", "_limit", "_size_line", "_total", "error", "phase")

    def __init__(self, size_line: re.Pattern[bytes], limit: int | None) -> None:
        self._size_line = size_line
        self._limit = limit
        self._total = 0
        self._extensions = 0
        self._left = 0
        self._buffer = bytearray()
        self.phase = _Phase.SIZE
        self.error: FramingError | None = None

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """(payload, bytes consumed). Raises FramingError, now and on every later call."""
        if self.error is not None:
            raise FramingError(self.error.status, self.error.reason)
        parts: list[bytes] = []
        at = 0
        try:
            while at < len(data) and self.phase is not _Phase.DONE:
                if self.phase is _Phase.DATA:
                    part = data[at:at + self._left]
                    parts.append(part)
                    at += len(part)
                    self._left -= len(part)
                    if self._left == 0:
                        self.phase = _Phase.DATA_END
                elif self.phase is _Phase.DATA_END:
                    at = self._take_data_end(data, at)
                elif self.phase is _Phase.SIZE:
                    at = self._take_size(data, at)
                else:
                    at = self._take_trailers(data, at)
        except FramingError as error:
            self.phase = _Phase.BROKEN
            error.payload = b"".join(parts)
            self.error = error
            raise
        return b"".join(parts), at

    def _take_data_end(self, data: bytes, at: int) -> int:
        self._buffer.append(data[at])
        if not b"\r\n".startswith(self._buffer):
            raise FramingError(400, "chunk data is not followed by CRLF")
        if len(self._buffer) == 2:
            self._buffer.clear()
            self.phase = _Phase.SIZE
        return at + 1

    def _take_size(self, data: bytes, at: int) -> int:
        end = data.find(b"\n", at)
        stop = len(data) if end < 0 else end + 1
        # A body of one-byte feeds may not grow the line past its bound either.
        self._buffer += data[at:min(stop, at + _MAX_LINE + 1)]
        if len(self._buffer) > _MAX_LINE:
            raise FramingError(400, "chunk size line too long")
        if end < 0:
            return stop
        line = self._size_line.fullmatch(self._buffer)
        if line is None:
            raise FramingError(400, "malformed chunk size line")
        size = int(line[1], 16)
        self._extensions += len(line[2])
        self._buffer.clear()
        if size > _MAX_SIZE or self._extensions > MAX_EXTENSIONS_TOTAL:
            raise FramingError(400, "chunk size or extensions out of bounds")
        self._total += size
        if self._limit is not None and self._total > self._limit:
            raise FramingError(413, "body too large")
        self._left = size
        self.phase = _Phase.DATA if size else _Phase.TRAILERS
        return stop

    def _take_trailers(self, data: bytes, at: int) -> int:
        """Through the blank line; each line is checked when it ends."""
        end = data.find(b"\n", at)
        stop = len(data) if end < 0 else end + 1
        self._buffer += data[at:min(stop, at + MAX_TRAILERS + 1)]
        if len(self._buffer) > MAX_TRAILERS:
            raise FramingError(400, "trailers too long")
        if end < 0:
            return stop
        if self._buffer == b"\r\n" or self._buffer.endswith(b"\n\r\n"):
            if _TRAILERS.fullmatch(self._buffer) is None:
                raise FramingError(400, "malformed trailers")
            self._buffer.clear()
            self.phase = _Phase.DONE
        elif not self._buffer.endswith(b"\r\n"):
            raise FramingError(400, "bare LF in trailers")
        return stop


class BodyReader:
    """Reads a request body: none, Content-Length or chunked. More than `max_body` bytes raise FramingError(413).

    A Content-Length over the bound raises in the constructor, before a byte was read.
    Chunked is strict: hex digits only, CRLF only, extensions short and ignored, trailers checked and dropped.
    """

    __slots__ = ("_chunks", "_left")

    def __init__(self, content_length: int | None, chunked: bool, max_body: int) -> None:
        self._chunks = _Chunks(_REQUEST_SIZE, max_body) if chunked else None
        self._left = content_length or 0
        if self._left > max_body:
            raise FramingError(413, "body too large")

    @property
    def done(self) -> bool:
        """Has the whole body been read? True at once when there is none."""
        if self._chunks is not None:
            return self._chunks.phase is _Phase.DONE
        return self._left == 0

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """(payload, consumed): what follows `consumed` belongs to the next request."""
        if self._chunks is not None:
            return self._chunks.feed(data)
        part = data[:self._left]
        self._left -= len(part)
        return part, len(part)


class Dechunker:
    """Takes the chunked framing off a response body; twin of the compiled unframer. `leftover`: bytes after its end."""

    __slots__ = ("_chunks", "leftover")

    def __init__(self) -> None:
        self._chunks = _Chunks(_RESPONSE_SIZE, None)
        self.leftover = b""

    @property
    def done(self) -> bool:
        """Was the last chunk with its trailers seen? An end of input before that is a broken body."""
        return self._chunks.phase is _Phase.DONE

    @property
    def error(self) -> FramingError | None:
        """Why the body cannot be read on, if it cannot."""
        return self._chunks.error

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`. FramingError carries what came before the fault in `payload`."""
        payload, consumed = self._chunks.feed(data)
        if consumed < len(data):
            self.leftover += data[consumed:]
        return payload


def encode_chunk(payload: bytes) -> bytes:
    """`payload` as one chunk; empty stays empty, because a chunk of size zero would end the body."""
    if not payload:
        return b""
    return b"%x\r\n%b\r\n" % (len(payload), payload)
