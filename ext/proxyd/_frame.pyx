# cython: language_level=3
"""Takes the framing off an answer's body, in place (RFC 9112 sections 6 and 7).

Owns: where a body ends and which of its bytes are payload.  Must not know: heads, sockets, what the bytes mean.
Twin and oracle: ``proxyd/wire/framing.py`` (Dechunker).

    5;ext CRLF hello CRLF 0 CRLF Trailer: x CRLF CRLF      payload pieces are moved together: hello...

Invariants: the result does not depend on the cut; nothing is allocated; a payload that lies in one piece is not moved;
after broken framing every further take() fails.
"""
from libc.string cimport memmove
from libc.stdint cimport uint64_t

BODY_LENGTH = 0
BODY_CHUNKED = 1
BODY_CLOSE = 2

cdef enum:
    # states; WHOLE and BAD are in the .pxd
    SIZE = 0
    SPACE = 1           # between the size and a semicolon
    EXTENSION = 2
    SIZE_LF = 3
    DATA = 4
    DATA_CR = 5
    DATA_LF = 6
    TRAILER = 7         # at the start of a trailer line
    TRAILER_NAME = 8
    TRAILER_VALUE = 9
    TRAILER_LF = 11
    END_LF = 12
    # bounds as in the twin: what comes beyond is not from any server that means well
    MAX_LINE = 256
    MAX_EXTENSIONS = 16384
    MAX_TRAILERS = 8192


cdef inline bint is_token(unsigned char byte) noexcept nogil:
    if c'a' <= (byte | 0x20) <= c'z' or c'0' <= byte <= c'9':
        return True
    return (byte == c'!' or byte == c'#' or byte == c'$' or byte == c'%' or byte == c'&' or byte == c"'" or byte == c'*'
            or byte == c'+' or byte == c'-' or byte == c'.' or byte == c'^' or byte == c'_' or byte == c'`'
            or byte == c'|' or byte == c'~')


cdef inline bint is_text(unsigned char byte) noexcept nogil:
    return byte == c'\t' or (byte >= 0x20 and byte != 0x7f)


cdef class Unframer:
    """kind BODY_LENGTH with `length` bytes, BODY_CHUNKED, or BODY_CLOSE. Extensions and trailers are dropped.

    `leftover` counts bytes behind the end: with any, the connection must not be used again.
    """

    def __init__(self, int kind, uint64_t length=0):
        self.kind = kind
        self.left = length if kind == LENGTH else 0
        self.state = WHOLE if kind == LENGTH and length == 0 else SIZE

    @property
    def done(self):
        return self.state == WHOLE

    def feed(self, bytes data not None):
        """The payload within `data`; raises ValueError when the framing is broken. For bodies that are not streamed."""
        cdef bytearray copy = bytearray(data)
        cdef unsigned char* out = NULL
        cdef unsigned char* base = copy
        cdef Py_ssize_t size = self.take(base, len(data), &out)
        if size < 0 or self.state == BAD:
            raise ValueError("bad chunked framing")
        return out[:size]

    cdef Py_ssize_t take(self, unsigned char* text, Py_ssize_t size, unsigned char** out) noexcept nogil:
        """Payload length, its start in `out` (inside text); -1 on broken framing. Payload before a fault comes with state BAD."""
        cdef Py_ssize_t at = 0, piece, total = 0
        cdef unsigned char* payload = text
        out[0] = text
        if self.kind == CLOSE:
            return size
        if self.kind == LENGTH:
            if <uint64_t> size >= self.left:
                self.leftover += size - <Py_ssize_t> self.left
                size = <Py_ssize_t> self.left
                self.state = WHOLE
            self.left -= <uint64_t> size
            return size
        while at < size:
            if self.state == DATA:
                piece = size - at
                if <uint64_t> piece > self.left:
                    piece = <Py_ssize_t> self.left
                if total == 0:
                    payload = text + at
                elif payload + total != text + at:
                    memmove(payload + total, text + at, piece)
                total += piece
                self.left -= <uint64_t> piece
                at += piece
                if self.left == 0:
                    self.state = DATA_CR
            elif self.state == WHOLE:
                self.leftover += size - at
                break
            else:
                self.state = self.step(text[at])
                at += 1
                if self.state == BAD:
                    # what came before the fault is payload all the same: the cut must not decide
                    if total == 0:
                        return -1
                    break
        out[0] = payload
        return total

    cdef int step(self, unsigned char byte) noexcept nogil:
        """One byte that is not data: the next state."""
        cdef int digit = -1
        cdef int state = self.state
        if state == SIZE:
            if c'0' <= byte <= c'9':
                digit = byte - c'0'
            elif c'a' <= (byte | 0x20) <= c'f':
                digit = (byte | 0x20) - c'a' + 10
            if digit >= 0:
                self.digits += 1
                if self.digits > 16 or self.left >> 59:
                    return BAD
                self.left = self.left * 16 + <uint64_t> digit
                return SIZE
            if self.digits == 0:
                return BAD
            self.line = 0
            state = SPACE
        if state == SPACE or state == EXTENSION:
            if byte == c'\r':
                return SIZE_LF
            self.line += 1
            self.extensions += 1
            if self.line > MAX_LINE or self.extensions > MAX_EXTENSIONS or not is_text(byte):
                return BAD
            if state == EXTENSION or byte == c';':
                return EXTENSION
            return SPACE if byte == c' ' or byte == c'\t' else BAD
        if state == SIZE_LF:
            self.digits = 0
            self.line = 0
            if byte != c'\n':
                return BAD
            return DATA if self.left else TRAILER
        if state == DATA_CR:
            return DATA_LF if byte == c'\r' else BAD
        if state == DATA_LF:
            return SIZE if byte == c'\n' else BAD
        if state == TRAILER and byte == c'\r':
            return END_LF
        if state == END_LF:
            return WHOLE if byte == c'\n' else BAD
        if state == TRAILER_LF:
            return TRAILER if byte == c'\n' else BAD
        if state == TRAILER or state == TRAILER_NAME or state == TRAILER_VALUE:
            self.line += 1
            if self.line > MAX_TRAILERS:
                return BAD
            if state == TRAILER_VALUE:
                if byte == c'\r':
                    return TRAILER_LF
                return TRAILER_VALUE if is_text(byte) else BAD
            if byte == c':' and state == TRAILER_NAME:
                return TRAILER_VALUE
            return TRAILER_NAME if is_token(byte) else BAD
        return BAD
