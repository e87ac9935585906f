"""HTTP/1.x heads: one complete head in, its facts out, or a refusal.

Owns: what a request or response head may look like (RFC 9110, RFC 9112) and the framing it announces.
Must not know: sockets, time, routes, configuration; the caller finds the end of the head, we judge it.

The grammar is llhttp's (httptools). Around it stand our own checks for what llhttp tolerates and what two HTTP
implementations may read differently; there ambiguous means refused, never guessed:

    [CRLF] request-line CRLF *( field-line CRLF ) CRLF        every line end is CRLF, no fold, no control byte

Invariants: a RequestHead has at most one of `content_length` and `chunked`; exactly one valid Host on HTTP/1.1; header
names are lower-case tokens, values carry no control byte but TAB; `target` is printable ASCII.
After a HeadError the position in the byte stream is unknown: answer, then close.

Decisions where the RFCs leave room:
- What a target and a Host may be is decided in `target`; CONNECT and methods llhttp does not know are 501.
- Repeated Content-Length is refused in requests even when the values agree; in responses equal repeats are one.
- A transfer coding in front of chunked is 501 (RFC 9112 section 6.1); anything else that is not `chunked` is 400.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus

import httptools

from proxyd.wire.target import TargetError, is_host, split_target

Headers = list[tuple[bytes, bytes]]
Version = tuple[int, int]

MAX_HEADERS = 200
"""SDKs send about 20 and browsers 25. Half still fits both; twice doubles what a hostile head costs us in tuples."""

MAX_TARGET = 8 * 1024
"""RFC 9112 section 3 asks for at least 8,000 octets of request line; our longest route has 40."""


class HeadError(Exception):
    """A head we do not serve. `status` is what to answer (502 for an upstream's head); the connection must close."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(status, reason)
        self.status = status
        self.reason = reason


class BodyKind(StrEnum):
    """How the end of a response body is found (RFC 9112 section 6.3)."""

    NONE = "none"
    LENGTH = "length"
    CHUNKED = "chunked"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request head. `target` is as it came; `path`, undecoded, is what routes look at (`*`: the server itself)."""

    method: str
    target: bytes
    path: str
    query: bytes
    version: Version
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool
    expect_continue: bool
    upgrade: bool

    def get(self, name: bytes) -> bytes | None:
        """The first value of the lower-case `name`, or None."""
        for have, value in self.headers:
            if have == name:
                return value
        return None


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A response head. `keep_alive` is what the head says; a body of kind CLOSE ends the connection in any case."""

    status: int
    reason: bytes
    version: Version
    headers: Headers
    content_length: int | None
    chunked: bool
    keep_alive: bool

    def body_kind(self, request_method: str) -> BodyKind:
        """How this answer to `request_method` ends. 1xx, 204, 304 and answers to HEAD never have a body."""
        if self.status < 200 or self.status in (204, 304) or request_method == "HEAD":
            return BodyKind.NONE
        if self.chunked:
            return BodyKind.CHUNKED
        if self.content_length is not None:
            return BodyKind.LENGTH
        return BodyKind.CLOSE

    def get(self, name: bytes) -> bytes | None:
        """The first value of the lower-case `name`, or None."""
        for have, value in self.headers:
            if have == name:
                return value
        return None


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# Possessive quantifiers (Python 3.11): no backtracking, so a hostile head costs one pass.
_FIELD_LINES = rb"(?:" + _TOKEN + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n"
_REQUEST_SHAPE = re.compile(
    rb"(?:\r\n)?+(" + _TOKEN + rb"++) ([\x21-\x7e]++) HTTP/([0-9])\.([0-9])\r\n" + _FIELD_LINES
)
_RESPONSE_SHAPE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*+))?\r\n" + _FIELD_LINES)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CODINGS = re.compile(_TOKEN + rb"++(?:[ \t]*,[ \t]*" + _TOKEN + rb"++)*+", re.IGNORECASE)
_REPEATED_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)[ \t]*(?=\r\n)", re.IGNORECASE)
# What a CGI-minded neighbour may take for the field we act on (it maps `-` and `_` to one name).
_LOOK_ALIKES = frozenset((
    b"content-length", b"transfer-encoding", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host",
    b"x-real-ip", b"x-request-id", b"x-api-key", b"proxy-connection", b"proxy-authorization",
))
_NEVER_HOP_BY_HOP = frozenset((b"host", b"content-length", b"transfer-encoding"))
_REFUSED_STATUS = 502


def find_head_end(buf: bytes | bytearray, start: int = 0) -> int:
    """Index just past the blank line that ends the head, or -1.

    `start` is where the last search gave up (the length of `buf` then), so that slow heads cost linear time.
    A blank line made with bare LF ends the head as well: the parser then refuses it instead of waiting for more.
    """
    start = max(0, start - 2)
    end = buf.find(b"\n\r\n", start)
    bare = buf.find(b"\n\n", start, end if end >= 0 else len(buf))
    if bare >= 0:
        return bare + 2
    return end + 3 if end >= 0 else -1


class _Fields:
    """What llhttp calls back with; one per head."""

    __slots__ = ("complete", "headers")

    def __init__(self) -> None:
        self.headers: Headers = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_request_head(data: bytes, max_head: int = 32 * 1024) -> RequestHead:
    """The facts of one complete request head (`data` ends with its blank line). Raises HeadError.

    431 too large or too many fields, 414 target too long, 505 version, 501 method or transfer coding, 417 expectation,
    400 everything else. Cost: about 10 us for an SDK's head of 15 fields.
    """
    if len(data) > max_head:
        raise HeadError(431, "request head too large")
    if data.count(b"\n") > MAX_HEADERS + 3:
        raise HeadError(431, "too many header fields")
    shape = _REQUEST_SHAPE.fullmatch(data)
    if shape is None:
        raise HeadError(400, _explain_request(data))
    method_bytes, target, major, minor = shape.groups()
    if major != b"1" or minor not in b"01":
        raise HeadError(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    if len(target) > MAX_TARGET:
        raise HeadError(414, "request target too long")
    if method_bytes == b"CONNECT":
        raise HeadError(501, "CONNECT is not offered")
    version = (1, 0) if minor == b"0" else (1, 1)

    fields = _Fields()
    try:
        httptools.HttpRequestParser(fields).feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserInvalidMethodError:
        raise HeadError(501, "unknown method") from None
    except httptools.HttpParserError as error:
        raise HeadError(400, f"malformed head: {error}") from None
    headers = fields.headers
    if len(headers) > MAX_HEADERS:
        raise HeadError(431, "too many header fields")
    if not fields.complete or len(headers) != data.count(b"\n", shape.end(4)) - 2:
        raise HeadError(400, "malformed head")

    host: bytes | None = None
    content_length: int | None = None
    chunked = expect = offers_upgrade = False
    connection: list[bytes] = []
    for name, value in headers:
        if name == b"host":
            if host is not None:
                raise HeadError(400, "more than one Host")
            host = value
        elif name == b"content-length":
            if content_length is not None:
                raise HeadError(400, "more than one Content-Length")
            if _LENGTH.fullmatch(value) is None:
                raise HeadError(400, "invalid Content-Length")
            content_length = int(value)
        elif name == b"transfer-encoding":
            if chunked:
                raise HeadError(400, "more than one Transfer-Encoding")
            _check_coding(value, version)
            chunked = True
        elif name == b"connection":
            connection += _options(value)
        elif name == b"upgrade":
            offers_upgrade = True
        elif name == b"expect":
            if version == (1, 1):
                if value.lower() != b"100-continue":
                    raise HeadError(417, "unknown expectation")
                expect = True
        elif b"_" in name and name.replace(b"_", b"-") in _LOOK_ALIKES:
            raise HeadError(400, "a field name with an underscore imitates another field")
    if chunked and content_length is not None:
        raise HeadError(400, "both Content-Length and Transfer-Encoding")
    if host is None:
        if version == (1, 1):
            raise HeadError(400, "no Host")
    elif not is_host(host):
        raise HeadError(400, "invalid Host")
    keep_alive = version == (1, 1)
    if connection:
        if not _NEVER_HOP_BY_HOP.isdisjoint(connection):
            raise HeadError(400, "Connection names a field that is not hop-by-hop")
        keep_alive = _keeps_alive(connection, version)
    method = method_bytes.decode("ascii")
    try:
        path, query = split_target(method, target, host)
    except TargetError as error:
        raise HeadError(400, str(error)) from None
    return RequestHead(
        method, target, path, query, version, headers, content_length, chunked, keep_alive,
        expect and (chunked or bool(content_length)),
        offers_upgrade and b"upgrade" in connection and version == (1, 1),
    )


def parse_response_head(data: bytes) -> ResponseHead:
    """The facts of one complete response head. Raises HeadError with status 502.

    Tolerates what servers send (no reason phrase, bytes above 0x7f, equal Content-Length fields) and refuses what could
    move the end of the body. 1xx are heads like any other; a 101 does not keep the connection.
    """
    shape = _RESPONSE_SHAPE.fullmatch(data)
    if shape is None:
        raise HeadError(_REFUSED_STATUS, "malformed response head")
    if data.count(b"\n") > MAX_HEADERS + 2:
        raise HeadError(_REFUSED_STATUS, "too many response header fields")
    data = _merge_equal_lengths(data)
    fields = _Fields()
    try:
        httptools.HttpResponseParser(fields).feed_data(data)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError as error:
        raise HeadError(_REFUSED_STATUS, f"malformed response head: {error}") from None
    if not fields.complete or len(fields.headers) != data.count(b"\n") - 2:
        raise HeadError(_REFUSED_STATUS, "malformed response head")
    version = (1, 1) if shape[1] == b"1" else (1, 0)
    status = int(shape[2])
    content_length: int | None = None
    chunked = False
    connection: list[bytes] = []
    for name, value in fields.headers:
        if name == b"content-length":
            if content_length is not None or _LENGTH.fullmatch(value) is None:
                raise HeadError(_REFUSED_STATUS, "invalid Content-Length")
            content_length = int(value)
        elif name == b"transfer-encoding":
            if chunked or value.lower() != b"chunked" or version == (1, 0):
                raise HeadError(_REFUSED_STATUS, "unsupported Transfer-Encoding")
            chunked = True
        elif name == b"connection":
            connection += _options(value)
    if chunked and content_length is not None:
        raise HeadError(_REFUSED_STATUS, "both Content-Length and Transfer-Encoding")
    keep_alive = _keeps_alive(connection, version)
    if status == 101 or (status in (204, 205) and (chunked or content_length)):
        # These announce what must not be there: whether bytes follow is a guess, so nothing may be read after them.
        keep_alive = False
    return ResponseHead(status, shape[3] or b"", version, fields.headers, content_length, chunked, keep_alive)


def named_by_connection(headers: Headers) -> set[bytes]:
    """The lower-case names that the Connection fields list: hop by hop, whatever they are (RFC 9110 section 7.6.1)."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(option.strip(b" \t") for option in value.lower().split(b","))
    return named


def build_request_head(method: str, target: bytes, headers: Headers) -> bytes:
    """The bytes of a request head. ValueError when a part could not be one (say, a CR or LF in a value)."""
    return _assemble(b"%b %b HTTP/1.1\r\n" % (method.encode("ascii"), target), headers, _REQUEST_SHAPE)


def build_response_head(status: int, headers: Headers) -> bytes:
    """The bytes of an HTTP/1.1 response head; an unregistered status has no phrase. ValueError as above."""
    line = _STATUS_LINES.get(status)
    return _assemble(line or b"HTTP/1.1 %d \r\n" % status, headers, _RESPONSE_SHAPE)


_STATUS_LINES = {
    int(status): b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode("ascii")) for status in HTTPStatus
}


def _assemble(line: bytes, headers: Headers, shape: re.Pattern[bytes]) -> bytes:
    parts = [line]
    parts += [b"%b: %b\r\n" % field for field in headers]
    parts.append(b"\r\n")
    head = b"".join(parts)
    # The count catches a value that brings a whole well-formed line of its own.
    if shape.fullmatch(head) is None or head.count(b"\n") != len(headers) + 2:
        raise ValueError("a head part has bytes that do not belong there")
    return head


def _options(value: bytes) -> list[bytes]:
    return [option.strip(b" \t") for option in value.lower().split(b",")]


def _keeps_alive(connection: list[bytes], version: Version) -> bool:
    if b"close" in connection:
        return False
    return version == (1, 1) or b"keep-alive" in connection


def _check_coding(value: bytes, version: Version) -> None:
    lowered = value.lower()
    if version == (1, 0):
        raise HeadError(400, "Transfer-Encoding in an HTTP/1.0 request")
    if lowered == b"chunked":
        return
    codings = _options(lowered) if _CODINGS.fullmatch(lowered) else []
    if len(codings) > 1 and codings[-1] == b"chunked" and codings.count(b"chunked") == 1:
        raise HeadError(501, "unsupported transfer coding")
    raise HeadError(400, "Transfer-Encoding is not chunked")


def _explain_request(data: bytes) -> str:
    """Why `data` has not the shape of a head, for the answer and the log; only runs for refused heads."""
    if b"\r" in data.replace(b"\r\n", b"") or b"\n" in data.replace(b"\r\n", b""):
        return "bare CR or LF in the head"
    if b"\r\n " in data or b"\r\n\t" in data:
        return "folded header line"
    line = data.removeprefix(b"\r\n").partition(b"\r\n")[0]
    if re.fullmatch(_TOKEN + rb"+ [\x21-\x7e]+ HTTP/[0-9]\.[0-9]", line) is None:
        return "malformed request line"
    return "malformed header field"


def _merge_equal_lengths(data: bytes) -> bytes:
    """`data` with equal repeats of Content-Length made one (RFC 9112 section 6.3); others are left to be refused."""
    found = _REPEATED_LENGTH.findall(data)
    if len(found) < 2 or len(set(found)) != 1:
        return data
    kept = False

    def keep_first(match: re.Match[bytes]) -> bytes:
        nonlocal kept
        if kept:
            return b""
        kept = True
        return match[0]

    return _REPEATED_LENGTH.sub(keep_first, data)
