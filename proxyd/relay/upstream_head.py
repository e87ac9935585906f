"""The request head that goes upstream.

Owns: which of a client's headers travel, and what we set ourselves. Pure. Must not know sockets or pools.

Invariants
- The client's token never travels: authorization, x-api-key and cookie end here; the upstream's own key replaces them.
  A credential in the query is none of ours (no token is read from there), yet some clients put one there, too: it ends
  here as well.
- What tells the provider about the site's visitors ends here too: forwarding headers, origin, referer.
- `Accept-Encoding: identity`, so that the answer can be accounted without inflating it.
- Everything else, known or not, travels untouched and in order (`anthropic-beta`, `x-stainless-*`, ...).
"""

from __future__ import annotations

import re

from proxyd.wire.head import Headers, build_request_head, named_by_connection

__all__ = ["query_without_credentials", "request_head"]

_STAYS = frozenset((
    # hop by hop, and framing: ours
    b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    b"content-length", b"host", b"http2-settings",
    # credentials
    b"authorization", b"proxy-authorization", b"x-api-key", b"cookie", b"cookie2", b"api-key", b"x-goog-api-key",
    # who and where the visitor is
    b"forwarded", b"via", b"x-real-ip", b"origin", b"referer", b"true-client-ip", b"cf-connecting-ip", b"dnt",
    b"upgrade-insecure-requests",
    # set below
    b"accept-encoding", b"x-request-id", b"x-proxyd-request-id",
))  # fmt: skip
# Parameters that are credentials by their name, or by the form of a JWT in their value, of which percent-encoding may
# change the dots.
_CREDENTIAL = re.compile(
    rb"(?:(?:x[-_])?api[-_]?key|key|token|access[-_]token|auth|authorization)=.*|[^=]*=eyJ[A-Za-z0-9_-]+(?:\.|%2e).*",
    re.IGNORECASE | re.DOTALL,
)
_STAYS_PREFIX = (b"x-forwarded-", b"sec-", b"access-control-")


def request_head(
    target: bytes,
    host: bytes,
    auth: Headers,
    client_headers: Headers,
    body_length: int,
    *,
    request_id: str,
    dialect: str,
    translate: bool,
) -> bytes:
    """The head for one POST. `translate`: we built the body for the site's route, so little of the client's fits."""
    named = named_by_connection(client_headers)
    headers: Headers = [(b"host", host), *auth]
    if translate:
        headers += [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
        headers += [pair for pair in client_headers if pair[0] == b"user-agent"]
        if dialect == "anthropic":
            headers.append((b"anthropic-version", b"2023-06-01"))
    else:
        for name, value in client_headers:
            if name not in _STAYS and name not in named and not name.startswith(_STAYS_PREFIX):
                headers.append((name, value))
    headers += [
        (b"accept-encoding", b"identity"),
        (b"x-request-id", request_id.encode("ascii")),
        (b"content-length", b"%d" % body_length),
    ]
    return build_request_head("POST", target, headers)


def query_without_credentials(query: bytes) -> bytes:
    """The query as it travels: the parameters that are no credentials, untouched and in order."""
    return b"&".join(part for part in query.split(b"&") if _CREDENTIAL.fullmatch(part) is None)
