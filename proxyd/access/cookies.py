"""Finds the one token that a request carries, or refuses a request that carries more than one.

Owns: the three places a token may be in (session cookie, `Authorization: Bearer`, `x-api-key`) and what two of them
mean together. Must not know: what a token looks like inside, keys, origins.

Rules
- Cookies: every Cookie header; split on `;`, first `=`, trim space and tab, no unquoting, exact name.
  `http.cookies` is never used: one malformed pair makes it return nothing, and a 64 KB quoted cookie costs it seconds.
- Two different values of the session cookie are refused, an empty one beside a full one too: one of them was planted.
- A session cookie that is only ever empty is what a logged-out browser sends: no token.
- `Authorization` of another scheme (Basic, Digest, none) is not a bearer token and is ignored: a proxy in front may
  use it.
- Tokens in two places must be equal. Then the request counts as cookie-authenticated, the stricter reading: its
  origin is checked.

Cost: linear in the headers' length.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from proxyd.errors import Refusal

Headers = Sequence[tuple[bytes, bytes]]

# A browser keeps about 4 KiB a cookie and sends a few dozen; twice this still splits in about a millisecond, half would
# refuse large but honest cookie jars behind a raised http.max_head.
MAX_COOKIE_BYTES = 64 * 1024


class Via(StrEnum):
    """Where the token came from."""

    COOKIE = "cookie"
    BEARER = "bearer"
    API_KEY = "api_key"
    OFF = "off"  # auth.mode = "off": there is no token


class Credential(NamedTuple):
    """A token as it was sent, unchecked."""

    token: bytes
    via: Via


def find_cookie(headers: Headers, name: bytes) -> bytes | None:
    """The value of the cookie `name`; None when there is none. Raises Refusal 403 for two different values."""
    found: bytes | None = None
    total_bytes = 0
    for header, value in headers:
        if header != b"cookie":
            continue
        total_bytes += len(value)
        if total_bytes > MAX_COOKIE_BYTES:
            raise Refusal(
                403, "invalid_token", "The Cookie header is too long to be searched for a session.", reason="format"
            )
        if name not in value:
            continue
        for pair in value.split(b";"):
            key, equals, content = pair.partition(b"=")
            if not equals or key.strip(b" \t") != name:
                continue
            content = content.strip(b" \t")
            if found is not None and found != content:
                raise Refusal(403, "ambiguous_token", "The session cookie was sent twice, with different values.")
            found = content
    return found


def find_credential(headers: Headers, cookie_name: bytes) -> Credential | None:
    """The request's token; None when it has none. Raises Refusal 403 when it has different ones."""
    bearer = api_key = None
    for header, value in headers:
        if header == b"authorization":
            value = value.strip(b" \t")
            # Compared before the value is cut up: what a megabyte of another scheme means is not our question.
            if value[:6].lower() == b"bearer" and value[6:7] in (b"", b" ", b"\t"):
                bearer = _only(bearer, value[6:].lstrip(b" \t"))
        elif header == b"x-api-key":
            api_key = _only(api_key, value.strip(b" \t"))
    cookie = find_cookie(headers, cookie_name)
    found: Credential | None = None
    for token, via in ((cookie, Via.COOKIE), (bearer, Via.BEARER), (api_key, Via.API_KEY)):
        if not token:
            continue
        if found is None:
            found = Credential(token, via)
        elif found.token != token:
            raise Refusal(403, "ambiguous_token", "The request carries different tokens in different places.")
    return found


def _only(known: bytes | None, value: bytes) -> bytes:
    """The one value of a header that may be repeated only with the same value."""
    if known is not None and known != value:
        raise Refusal(403, "ambiguous_token", "The request carries the same token header twice, with different values.")
    return value
