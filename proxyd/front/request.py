"""From received bytes to one request at a time: head, body, and what is left for the next.

Owns: the input buffer of one connection and where in it the current request ends. Sans-io: no socket, no clock, no
deadline; the connection feeds it and asks. Must not know routes or replies.

    pending:  | head of request 1 | body 1 | head of request 2 | ...
              ^ take_head()        ^ take_body()               (both cut what they took from the front)

Invariants
- Nothing is parsed beyond the current request: take_head() is only called when the one before was answered.
- After a Refusal the position in the stream is unknown; the connection answers it and closes. Nothing more is parsed.
- Memory: an unfinished head holds at most `max_head` plus one read, a body at most `max_body` plus one read; an idle
  connection holds nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxyd.errors import Refusal
from proxyd.ids import is_request_id, new_request_id
from proxyd.wire.framing import BodyReader, FramingError
from proxyd.wire.head import HeadError, RequestHead, find_head_end, parse_request_head

__all__ = ["Request", "RequestReader", "choose_request_id"]

_CODES = {
    400: "bad_request",
    413: "body_too_large",
    414: "target_too_long",
    417: "expectation_failed",
    431: "head_too_large",
    501: "not_supported",
    505: "http_version_not_supported",
}

# Reasons of wire.head and wire.framing that have a shorter name; every other one is its own.
_WORDS = {"chunk": "bad_chunk", "trailers": "bad_trailers", "no Host": "missing_host"}
_NO_LETTERS = re.compile(r"[^a-z0-9]+")
_TLS_HANDSHAKE = 0x16

# The first byte of a method, as far as we know any. A TLS hello or another protocol on this port gets its 400 at once
# instead of a 408 after head_timeout. CR: an empty line before the request.
_FIRST_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz\r")


@dataclass(slots=True)
class Request:
    """One complete request. peer: who asks (address or "unix"); received_at: monotonic, when its head was complete."""

    head: RequestHead
    body: bytes
    request_id: str
    peer: str
    trusted: bool
    secure: bool
    received_at: float


def choose_request_id(head: RequestHead, is_trusted: bool) -> str:
    """The `X-Request-Id` of a trusted proxy where it sent a usable one, else a new id."""
    if is_trusted:
        given = head.get(b"x-request-id")
        if given is not None and is_request_id(given):
            return given.decode("ascii")
    return new_request_id()


def _refusal(status: int, reason: str, word: str = "") -> Refusal:
    code = _CODES.get(status, "bad_request")
    word = word or _word_of(reason)
    return Refusal(
        status,
        code,
        f"{reason[:1].upper()}{reason[1:]}.",
        close=True,
        reason="" if word.endswith(code) else word,
    )


def _word_of(reason: str) -> str:
    """The reason as one word of the access line's `cause`. What a parser added behind a colon is not in it."""
    for part, word in _WORDS.items():
        if part in reason:
            return word
    return "_".join(_NO_LETTERS.split(reason.partition(":")[0].lower()))[:48].strip("_")


class RequestReader:
    """The input side of one connection. One of: waiting for a head, reading a body, holding (a request is served)."""

    __slots__ = ("_body", "_framing", "_max_body", "_max_head", "_searched", "pending")

    def __init__(self, max_head: int, max_body: int) -> None:
        self._max_head = max_head
        self._max_body = max_body
        self.pending: bytes | bytearray = b""
        self._searched = 0
        self._framing: BodyReader | None = None
        self._body = bytearray()

    def feed(self, data: bytes) -> None:
        """Appends received bytes. Cost: none when nothing was pending, amortised linear else."""
        if not self.pending:
            self.pending = data
            return
        if not isinstance(self.pending, bytearray):
            self.pending = bytearray(self.pending)
        self.pending += data

    def is_full(self) -> bool:
        """Whether what waits behind the current request is as much as we hold for a client (`max_head`)."""
        return len(self.pending) >= self._max_head

    def take_head(self) -> RequestHead | None:
        """The next head, or None if it is not complete yet. Raises Refusal (400, 414, 417, 431, 501, 505)."""
        pending = self.pending
        if not pending:
            return None
        if pending[0] not in _FIRST_BYTES:
            word = "tls_hello" if pending[0] == _TLS_HANDSHAKE else "not_http"
            raise _refusal(400, "malformed request line", word)
        start = 0
        if pending[0] == 0x0D:
            # RFC 9112 section 2.2: one empty line before the request line is ignored. find_head_end() would take it
            # and a following empty one for a whole head.
            if len(pending) < 2:
                return None
            if pending[1] != 0x0A:
                raise _refusal(400, "bare CR or LF in the head")
            if len(pending) > 2 and pending[2] not in _FIRST_BYTES - {0x0D}:
                raise _refusal(400, "malformed request line")
            start = 2
        end = find_head_end(pending, max(start, self._searched))
        if end < 0:
            self._searched = len(pending)
            if len(pending) > self._max_head:
                raise _refusal(431, "request head too large")
            return None
        try:
            head = parse_request_head(bytes(pending[start:end]), self._max_head)
        except HeadError as error:
            raise _refusal(error.status, error.reason) from None
        self._consume(end)
        return head

    def begin_body(self, head: RequestHead) -> None:
        """Turns to the body that `head` announces. Raises Refusal 413 for one that is announced too large."""
        self._body = bytearray()
        try:
            self._framing = BodyReader(head.content_length, head.chunked, self._max_body)
        except FramingError as error:
            raise _refusal(error.status, error.reason) from None

    def has_begun_body(self) -> bool:
        """Whether any byte of the current body has come."""
        return bool(self._body) or bool(self.pending)

    def take_body(self) -> bytes | None:
        """The whole body, or None if it is not complete yet. Raises Refusal (400 bad chunk, 413)."""
        framing = self._framing
        if framing is None:
            return None
        if framing.done:
            whole = b""
        else:
            try:
                whole, consumed = framing.feed(bytes(self.pending))
            except FramingError as error:
                raise _refusal(error.status, error.reason) from None
            self._consume(consumed)
            if not framing.done:
                self._body += whole
                return None
        if self._body:
            self._body += whole
            whole = bytes(self._body)
        self._end_body()
        return whole

    def is_body_here(self) -> bool:
        """Whether the body of a refused request has come already; it is thrown away then, and the input in order."""
        try:
            return self.take_body() is not None
        except Refusal:
            return False

    def clear(self) -> None:
        """Forgets everything; nothing more will be read."""
        self.pending = b""
        self._searched = 0
        self._end_body()

    def _consume(self, count: int) -> None:
        pending = self.pending
        self.pending = b"" if count >= len(pending) else bytes(pending[count:])
        self._searched = 0

    def _end_body(self) -> None:
        self._framing = None
        self._body = bytearray()
