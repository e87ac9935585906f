"""Which web pages may use a session that a browser sends along by itself, and the CORS answers they get.

Owns: comparing Origin with the request's own host and `auth.allowed_origins`; preflights. Must not know: tokens,
routes, sockets.

Whose authority travels by itself (`Session.is_ambient`: the cookie, or auth.mode "off") is checked on every method
and on WebSocket upgrades:

    Origin present    own host or allowed: yes.   anything else, `null`, two of them, unreadable: 403
    Origin absent     Sec-Fetch-Site cross-site or same-site: 403.   same-origin, none, absent (curl, SDKs, old
    browsers): yes

A bearer token or API key is not checked: a foreign page cannot make a browser send one without a preflight, and has
to know it. CORS headers go to allowed origins only, whatever the credential, also on refusals, so that a page can
read the error.

Own host: Origin's host and port equal those of Host, with the port of Origin's scheme where Host names none. Behind
a proxy that ends TLS we see http where the page sees https, so the scheme is compared only where a trusted proxy
states it in X-Forwarded-Proto. X-Forwarded-Host is not read: proxies pass a client's own through unless told
otherwise. A proxy must hand Host on (nginx: `proxy_set_header Host $http_host`), or its site be listed in
`auth.allowed_origins`.

Sources: WHATWG Fetch (CORS protocol), RFC 6454 section 7 (Origin), W3C Fetch Metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from proxyd.access.cookies import Headers
from proxyd.errors import Refusal

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]{0,31})://(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_FIELD_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+)*")
# The SDKs ask for about twenty `x-stainless-*` names, 400 bytes together.
_MAX_FIELD_NAMES_BYTES = 4096
# Of a value that is quoted in the log: any real origin with room to spare.
_MAX_SHOWN = 200

ALLOW_METHODS = b"GET, POST, DELETE"
# What a page may read beside the safelisted headers. A wildcard does not count together with credentials.
EXPOSE_HEADERS = b"X-Proxyd-Request-Id, X-Request-Id, Retry-After, Retry-After-Ms, X-Should-Retry"
# Ten minutes, what Chromium took as its maximum for years: longer would outlive a changed allowed_origins, shorter
# doubles the requests.
MAX_AGE_S = 600

_VARY = (b"vary", b"Origin")
_VARY_PREFLIGHT = (b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers")


class Origin(NamedTuple):
    """A web origin in one spelling. port is None for schemes that have no default and named none."""

    scheme: str
    host: str
    port: int | None


class Verdict(NamedTuple):
    """Whether the request may go on, and the headers that every answer to it carries, refusals included."""

    allowed: bool
    cors_headers: list[tuple[bytes, bytes]]
    detail: str = ""
    """For the log, of one that may not."""

    def enforce(self) -> None:
        """Raises Refusal 403 unless the request may go on."""
        if not self.allowed:
            message = "This origin may not use the session of this site."
            raise Refusal(403, "origin_not_allowed", message, detail=self.detail)


def parse_origin(text: str) -> Origin | None:
    """An origin as browsers serialise it; None for `null`, a path, user info, or anything else that is not exactly
    one origin.
    """
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        return None
    scheme, host, port_text = match.groups()
    port = _DEFAULT_PORTS.get(scheme) if port_text is None else int(port_text)
    if port is not None and not 0 < port < 65536:
        return None
    return Origin(scheme, host, port)


def forwarded_scheme(headers: Headers, trusted: bool) -> str | None:
    """The scheme the client used, where a trusted peer states it; None where nobody we trust does."""
    if not trusted:
        return None
    values = [value for name, value in headers if name == b"x-forwarded-proto"]
    last = values[-1].rpartition(b",")[2].strip(b" \t").lower() if values else b""
    return last.decode() if last in (b"http", b"https") else None


def is_preflight(method: str, headers: Headers) -> bool:
    """True for a browser's question before a request: OPTIONS with Origin and Access-Control-Request-Method."""
    return method == "OPTIONS" and {b"origin", b"access-control-request-method"} <= {name for name, _ in headers}


class OriginPolicy:
    """The origins of one configuration. Entries of `allowed_origins` that are no origin (`*`, `null`, a path) match
    nothing.
    """

    __slots__ = ("_allowed",)

    def __init__(self, allowed_origins: Iterable[str]) -> None:
        self._allowed = frozenset(origin for origin in map(parse_origin, allowed_origins) if origin is not None)

    def decide(self, headers: Headers, *, cookie_used: bool, scheme: str | None = None) -> Verdict:
        """Judges a request. `cookie_used` is `Session.is_ambient`; `scheme` comes from `forwarded_scheme`. Reads
        headers only.
        """
        cors = self.cors_headers(headers)
        if not cookie_used:
            return Verdict(True, cors)
        values = _values(headers, b"origin")
        if values:
            origin = _origin_of(values)
            known = origin is not None and (origin in self._allowed or _is_own(origin, headers, scheme))
            return Verdict(known, cors, "" if known else _shown(headers))
        sites = [value.strip(b" \t").lower() for value in _values(headers, b"sec-fetch-site")]
        known = b"cross-site" not in sites and b"same-site" not in sites
        return Verdict(known, cors, "" if known else _shown(headers))

    def cors_headers(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """What lets an allowed origin read the answer; for others only Vary, and nothing at all where no origin is
        configured.
        """
        if not self._allowed:
            return []
        values = _values(headers, b"origin")
        if _origin_of(values) not in self._allowed:
            return [_VARY]
        return [
            (b"access-control-allow-origin", values[0].strip(b" \t")),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-expose-headers", EXPOSE_HEADERS),
            _VARY,
        ]

    def preflight(self, headers: Headers, *, scheme: str | None = None) -> list[tuple[bytes, bytes]]:
        """The headers of the 204 to a preflight. Raises Refusal 403 for an origin that is neither allowed nor our own.

        Any header an allowed page asks for is granted: SDKs in browsers send dozens of names that change with each
        release.
        """
        values = _values(headers, b"origin")
        origin = _origin_of(values)
        if origin is None or not (origin in self._allowed or _is_own(origin, headers, scheme)):
            raise Refusal(
                403,
                "origin_not_allowed",
                "This origin may not use this site.",
                headers=(("vary", "Origin"),),
                detail=_shown(headers),
            )
        answer = [
            (b"access-control-allow-origin", values[0].strip(b" \t")),
            (b"access-control-allow-credentials", b"true"),
            (b"access-control-allow-methods", ALLOW_METHODS),
            (b"access-control-max-age", b"%d" % MAX_AGE_S),
            _VARY_PREFLIGHT,
        ]
        asked = b", ".join(_values(headers, b"access-control-request-headers")).strip(b" \t")
        if len(asked) <= _MAX_FIELD_NAMES_BYTES and _FIELD_NAMES.fullmatch(asked) is not None:
            answer.append((b"access-control-allow-headers", asked))
        return answer


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for header, value in headers if header == name]


def _shown(headers: Headers) -> str:
    """What was compared, for the log: bounded and printable, whatever the client sent."""
    parts = []
    for name in (b"origin", b"sec-fetch-site", b"host"):
        for value in _values(headers, name)[:2]:
            text = "".join(chr(byte) if 0x21 <= byte <= 0x7E else "?" for byte in value[:_MAX_SHOWN])
            parts.append(f"{name.decode()}={text}")
    return " ".join(parts)


def _origin_of(values: list[bytes]) -> Origin | None:
    """The one origin a request names; None for none, two, or something else."""
    if len(values) != 1:
        return None
    return parse_origin(values[0].strip(b" \t").decode("latin-1"))


def _is_own(origin: Origin, headers: Headers, scheme: str | None) -> bool:
    """True when `origin` is where the request itself was sent to."""
    if origin.scheme not in _DEFAULT_PORTS or (scheme is not None and scheme != origin.scheme):
        return False
    hosts = _values(headers, b"host")
    if len(hosts) != 1:
        return False
    match = _HOST.fullmatch(hosts[0].strip(b" \t").decode("latin-1").lower())
    if match is None:
        return False
    host, port_text = match.groups()
    port = _DEFAULT_PORTS[origin.scheme] if port_text is None else int(port_text)
    return (host, port) == (origin.host, origin.port)
