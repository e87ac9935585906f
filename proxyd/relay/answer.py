"""What an upstream answered, and the decisions its head leads to.

Owns: pure choices between an upstream's head and the client: how to read the body, which headers travel, which error
becomes which status. Must not know sockets, tasks, the spool.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from proxyd._frame import BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH
from proxyd.dialects.media import JSON, SSE, Media, is_identity, media_kind
from proxyd.errors import Refusal, UpstreamError, UpstreamErrorKind
from proxyd.front.replies import CORS_PREFIX, HOP_BY_HOP, OURS, SITE
from proxyd.relay.states import Cause
from proxyd.wire.head import BodyKind, Headers, ResponseHead, named_by_connection

__all__ = ["Answer", "Way", "cause_of", "decide_way", "fails_over", "refusal_of", "relayable", "site_headers"]

# Answers after which another upstream may be asked: none of them is a generation, all of them are about that upstream.
# 500 may come from the middle of a generation; 429 is about our key, and its retry-after is for the client.
_FAIL_OVER = frozenset((502, 503, 504, 529))

_BODY_KINDS = {BodyKind.LENGTH: BODY_LENGTH, BodyKind.CHUNKED: BODY_CHUNKED, BodyKind.CLOSE: BODY_CLOSE}

# Checksums of a body that we may shorten (the hidden usage event).
_CHECKSUMS = frozenset((b"etag", b"digest", b"content-digest", b"repr-digest", b"content-md5"))
# What the site's own route hands on of an upstream's headers beside our own.
_SITE_ROUTE = frozenset((b"x-request-id", b"request-id", b"retry-after", b"retry-after-ms", b"x-should-retry"))
_SITE_ROUTE_PREFIXES = (b"x-ratelimit-", b"anthropic-ratelimit-")


class Way(Enum):
    """How an answer reaches the client."""

    EVENTS = "events"  # an event stream, split as it goes by
    BODY = "body"  # anything else: relayed as it is, a copy is read
    COLLECT = "collect"  # read wholly first: its content decides what the client gets
    UNREADABLE = "unreadable"  # the site's route cannot make events of it


@dataclass(frozen=True, slots=True)
class Answer:
    """An upstream's head with what was read behind it."""

    head: ResponseHead
    initial: bytes

    @property
    def content_type(self) -> str:
        return (self.head.get(b"content-type") or b"").decode("latin-1")

    @property
    def coding(self) -> str | None:
        value = self.head.get(b"content-encoding")
        return None if value is None else value.decode("latin-1")

    @property
    def body_kind(self) -> int | None:
        """A BODY_* of the compiled relay, or None where there is no body."""
        return _BODY_KINDS.get(self.head.body_kind("POST"))

    def media(self, *, streaming: bool) -> Media:
        """How the body is read. Only a 200 is an event stream (WHATWG HTML 9.2.2), whatever its type says."""
        media = media_kind(self.content_type or None, streaming=streaming)
        if media is SSE and self.head.status != 200:
            return Media.OPAQUE
        return media


def decide_way(answer: Answer, *, asks_stream: bool, translate: bool, injected: bool) -> Way:
    """The way of an answer with a body."""
    status = answer.head.status
    media = answer.media(streaming=asks_stream)
    if translate:
        if status != 200:
            return Way.COLLECT
        if media is SSE and is_identity(answer.coding):
            return Way.EVENTS
        return Way.COLLECT if media in (JSON, SSE) else Way.UNREADABLE
    if injected and status in (400, 422):
        return Way.COLLECT
    return Way.EVENTS if media is SSE and is_identity(answer.coding) else Way.BODY


def fails_over(status: int) -> bool:
    """Whether another upstream may be asked after this answer."""
    return status in _FAIL_OVER


def relayable(headers: Headers, *, shortened: bool) -> Headers:
    """An upstream's headers for an answer that is sent as a whole, or whose body may lose an event."""
    named = named_by_connection(headers)
    return [
        pair
        for pair in headers
        if pair[0] not in HOP_BY_HOP
        and pair[0] not in named
        and pair[0] not in SITE
        and pair[0] not in OURS
        and not pair[0].startswith(CORS_PREFIX)
        and not (shortened and pair[0] in _CHECKSUMS)
    ]


def site_headers(headers: Headers) -> Headers:
    """What the site's own route hands on."""
    return [
        pair for pair in headers if pair[0] in _SITE_ROUTE or any(pair[0].startswith(p) for p in _SITE_ROUTE_PREFIXES)
    ]


_Kind = UpstreamErrorKind
_REFUSALS: dict[UpstreamErrorKind, tuple[int, str, Cause, str]] = {
    _Kind.RESOLVE: (502, "upstream_unreachable", Cause.UPSTREAM_UNREACHABLE, "Its name could not be resolved."),
    _Kind.REFUSED: (502, "upstream_unreachable", Cause.UPSTREAM_UNREACHABLE, "It refused the connection."),
    _Kind.UNREACHABLE: (502, "upstream_unreachable", Cause.UPSTREAM_UNREACHABLE, "It could not be reached."),
    _Kind.TLS: (502, "upstream_tls", Cause.UPSTREAM_TLS, "No secure connection to it."),
    _Kind.RESET: (502, "upstream_reset", Cause.UPSTREAM_BROKEN, "It closed the connection."),
    _Kind.EOF_BEFORE_HEAD: (502, "upstream_reset", Cause.UPSTREAM_BROKEN, "It closed without an answer."),
    _Kind.BAD_HEAD: (502, "upstream_bad_answer", Cause.UPSTREAM_BROKEN, "Its answer could not be read."),
    _Kind.BROKEN_BODY: (502, "upstream_broken", Cause.UPSTREAM_BROKEN, "Its answer broke off."),
    _Kind.CONNECT_TIMEOUT: (504, "upstream_timeout", Cause.CONNECT_TIMEOUT, "Connecting to it took too long."),
    _Kind.FIRST_BYTE_TIMEOUT: (504, "upstream_timeout", Cause.FIRST_BYTE_TIMEOUT, "It did not answer in time."),
    _Kind.IDLE_TIMEOUT: (504, "upstream_timeout", Cause.IDLE_TIMEOUT, "It stopped answering."),
    _Kind.TOTAL_TIMEOUT: (504, "upstream_timeout", Cause.TOTAL_TIMEOUT, "The answer took longer than is allowed."),
    _Kind.POOL_FULL: (503, "upstream_busy", Cause.UPSTREAM_UNREACHABLE, "All connections to it are busy."),
    _Kind.POOL_TIMEOUT: (503, "upstream_busy", Cause.CONNECT_TIMEOUT, "All connections to it are busy."),
    _Kind.NO_PORTS: (503, "upstream_no_ports", Cause.UPSTREAM_UNREACHABLE, "No local port is free to reach it."),
    _Kind.NO_UPSTREAM: (503, "no_upstream", Cause.UPSTREAM_UNREACHABLE, "None is available for this model."),
}


def refusal_of(error: UpstreamError) -> Refusal:
    """What the client is told of an upstream that gave no answer. Never the upstream's address or name."""
    status, code, _, reason = _REFUSALS[error.kind]
    return Refusal(status, code, f"The upstream failed. {reason}", retry_after_s=1 if status == 503 else None)


def cause_of(error: UpstreamError) -> Cause:
    """Its cause in row and log."""
    return _REFUSALS[error.kind][2]
