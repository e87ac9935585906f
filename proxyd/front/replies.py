"""The bytes of an answer: our own complete replies, and the heads of relayed answers.

Owns: which headers travel from an upstream to a client, and the ones every answer of ours carries. Pure: the date and
the ids are passed in. Must not know sockets, routes or who is asking.

Invariants
- Every answer carries `X-Proxyd-Request-Id` exactly once, and it is ours whatever the upstream sent.
- `X-Request-Id` is the upstream's on a relayed answer that brought one, else ours.
- A stream carries `Cache-Control` with no-cache and `X-Accel-Buffering: no` exactly once.
- Hop-by-hop fields (RFC 9110 section 7.6.1) end here, and so does what an upstream says about *its* site: see SITE.
- An answer has a Date: the upstream's where it gave one, else ours.
- There is one framing: chunked, a length, or the end of the connection; never two.
"""

from __future__ import annotations

from collections.abc import Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import Literal

from proxyd.errors import Refusal
from proxyd.wire.head import Headers, Version, named_by_connection

__all__ = ["CONTINUE", "Framing", "http_date", "json_headers", "refusal_headers", "relay_head", "reply_bytes"]

Framing = int | Literal["chunked", "close", "none"]

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

HOP_BY_HOP = frozenset((
    b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authentication-info",
    b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length",
))

# What a provider says about its own site must not be said in the name of the operator's:
# - its edge's cookies (Cloudflare's __cf_bm on api.openai.com) would be set on the operator's domain;
# - alt-svc and strict-transport-security would send browsers to ports and schemes the operator does not serve;
# - access-control-* is decided by our own origin rules (`auth.allowed_origins`); vLLM and Ollama answer `*`.
SITE = frozenset((
    b"set-cookie", b"set-cookie2", b"alt-svc", b"strict-transport-security", b"public-key-pins", b"nel", b"report-to",
    b"clear-site-data", b"reporting-endpoints",
))
CORS_PREFIX = b"access-control-"
OURS = frozenset((b"x-proxyd-request-id", b"x-accel-buffering"))

_REASONS = {int(status): status.phrase.encode("ascii") for status in HTTPStatus}
_REASONS |= {413: b"Content Too Large", 422: b"Unprocessable Content"}


def http_date(wall_s: float) -> bytes:
    """The `Date` value of a wall-clock time (RFC 9110 section 5.6.7)."""
    return formatdate(wall_s, usegmt=True).encode("ascii")


def json_headers() -> Headers:
    """Headers of a JSON answer of ours."""
    return [(b"content-type", b"application/json")]


def refusal_headers(refusal: Refusal, anthropic_id: str | None = None) -> Headers:
    """Headers of an error of ours. `anthropic_id`: the request's id, again under the name Anthropic's SDKs read."""
    extra = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in refusal.headers]
    if anthropic_id is not None:
        extra.append((b"request-id", anthropic_id.encode("ascii")))
    return json_headers() + extra


def reply_bytes(
    status: int,
    headers: Headers,
    body: bytes,
    *,
    request_id: str,
    version: Version,
    keep_alive: bool,
    date: bytes = b"",
    head_only: bool = False,
) -> bytes:
    """One complete answer. `headers` bring neither framing, connection nor ids (such fields in them are dropped).

    `date` is added unless `headers`, an upstream's perhaps, have one: a Date is single (RFC 9110 section 6.6.1).
    """
    ours = request_id.encode("ascii")
    lines = [_status_line(status, b"")]
    upstream_id = False
    is_dated = not date
    for name, value in headers:
        lowered = name.lower()
        if lowered in HOP_BY_HOP or lowered in OURS:
            continue
        upstream_id = upstream_id or lowered == b"x-request-id"
        is_dated = is_dated or lowered == b"date"
        lines.append(b"%b: %b\r\n" % (name, value))
    lines.append(b"x-proxyd-request-id: %b\r\n" % ours)
    if not upstream_id:
        lines.append(b"x-request-id: %b\r\n" % ours)
    if not is_dated:
        lines.append(b"date: %b\r\n" % date)
    _add_framing(lines, "none" if status in (204, 304) or status < 200 else len(body))
    _add_connection(lines, version, keep_alive)
    lines.append(b"\r\n")
    if body and not head_only and status not in (204, 304):
        lines.append(body)
    return b"".join(lines)


def relay_head(
    status: int,
    reason: bytes,
    upstream_headers: Headers,
    *,
    request_id: str,
    version: Version,
    framing: Framing,
    keep_alive: bool,
    is_stream: bool,
    date: bytes = b"",
    extra: Iterable[tuple[bytes, bytes]] = (),
) -> bytes:
    """The head of a relayed answer.

    `upstream_headers` have lower-case names; what may travel travels in its order with its value untouched
    (rate limits, retry-after*, content-type, content-encoding, request ids). `date` is added where the upstream gave
    none: a recipient with a clock has to (RFC 9110 section 6.6.1). `extra` (CORS, say) replaces fields of the same
    name, except `vary`, which adds up. "close" or "chunked" is the caller's choice by `version`; with "close"
    the connection cannot be kept, whatever `keep_alive` says.
    """
    added = [(name.lower(), value) for name, value in extra]
    replaced = {name for name, _ in added if name != b"vary"}
    dropped = named_by_connection(upstream_headers)
    lines = [_status_line(status, reason)]
    has_request_id = has_no_cache = False
    is_dated = not date
    for name, value in upstream_headers:
        if name in HOP_BY_HOP or name in SITE or name in OURS or name in dropped or name in replaced:
            continue
        if name.startswith(CORS_PREFIX):
            continue
        if name == b"x-request-id":
            if has_request_id:
                continue
            has_request_id = True
        elif is_stream and name == b"cache-control":
            if has_no_cache or b"no-cache" not in value.lower():
                continue
            has_no_cache = True
        is_dated = is_dated or name == b"date"
        lines.append(b"%b: %b\r\n" % (name, value))
    for name, value in added:
        lines.append(b"%b: %b\r\n" % (name, value))
    ours = request_id.encode("ascii")
    if not has_request_id and b"x-request-id" not in replaced:
        lines.append(b"x-request-id: %b\r\n" % ours)
    lines.append(b"x-proxyd-request-id: %b\r\n" % ours)
    if not is_dated:
        lines.append(b"date: %b\r\n" % date)
    if is_stream:
        if not has_no_cache and b"cache-control" not in replaced:
            lines.append(b"cache-control: no-cache\r\n")
        lines.append(b"x-accel-buffering: no\r\n")
    _add_framing(lines, framing)
    _add_connection(lines, version, keep_alive and framing != "close")
    lines.append(b"\r\n")
    return b"".join(lines)


def _status_line(status: int, reason: bytes) -> bytes:
    # Always 1.1: RFC 9110 section 6.2 has a server answer with its own version, 1.0 clients understand it.
    return b"HTTP/1.1 %d %b\r\n" % (status, reason or _REASONS.get(status, b""))


def _add_framing(lines: list[bytes], framing: Framing) -> None:
    if isinstance(framing, int):
        lines.append(b"content-length: %d\r\n" % framing)
    elif framing == "chunked":
        lines.append(b"transfer-encoding: chunked\r\n")


def _add_connection(lines: list[bytes], version: Version, keep_alive: bool) -> None:
    if not keep_alive:
        lines.append(b"connection: close\r\n")
    elif version == (1, 0):
        lines.append(b"connection: keep-alive\r\n")
