"""Request targets and host names: which forms are served, and the path and query in them.

Owns: RFC 9112 section 3.2 (request target) and RFC 9110 section 7.2 (Host), as strict as an origin can be.
Must not know: methods other than OPTIONS, routes, the rest of the head.
Invariants: a path is ASCII, starts with `/` (or is `*`), has only complete percent escapes and is returned undecoded.

Decisions where the RFCs leave room:
- absolute-form is accepted with http or https only, without userinfo, and only when its authority equals Host (RFC 9112
  section 3.2.2 lets the target win; two different names are an attack or a bug, so they are refused).
- asterisk-form belongs to OPTIONS alone; authority-form to CONNECT, which is not offered.
- In a query every printable byte passes that browsers leave unescaped; `#`, `"`, `<` and `>` do not.
"""
from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv6Address

MAX_HOST = 255
"""A DNS name is at most 253 octets."""

_PATH = re.compile(rb"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%[0-9A-Fa-f]{2})*+")
_QUERY = re.compile(rb"[\x21\x23-\x3b\x3d\x3f-\x7e]*+")
_ABSOLUTE = re.compile(rb"([A-Za-z][A-Za-z0-9+.\-]*+)://([^/?]*+)(.*+)")
_HOST = re.compile(rb"(?:\[([0-9A-Fa-f:.]{2,45}+)\]|[A-Za-z0-9._~\-]++)(?::([0-9]{0,5}+))?")


class TargetError(Exception):
    """A target or host that we do not serve; the text says why, without repeating the peer's bytes."""


def is_host(value: bytes) -> bool:
    """Is `value` a host[:port] that an http URI may name? No userinfo, no lists, no percent-encoding, no IPvFuture."""
    match = _HOST.fullmatch(value)
    if match is None or len(value) > MAX_HOST:
        return False
    literal, port = match.groups()
    if port and int(port) > 65535:
        return False
    if literal is None:
        return True
    try:
        IPv6Address(literal.decode("ascii"))
    except AddressValueError:
        return False
    return True


def split_target(method: str, target: bytes, host: bytes | None) -> tuple[str, bytes]:
    """(path, query) of origin-form, absolute-form or asterisk-form."""
    if target == b"*":
        if method != "OPTIONS":
            raise TargetError("asterisk-form is for OPTIONS")
        return "*", b""
    if target[:1] != b"/":
        absolute = _ABSOLUTE.fullmatch(target)
        if absolute is None or absolute[1].lower() not in (b"http", b"https") or not is_host(absolute[2]):
            raise TargetError("invalid request target")
        if host is not None and absolute[2].lower() != host.lower():
            raise TargetError("the request target and Host name different servers")
        if not absolute[3] and method == "OPTIONS":
            return "*", b""
        target = absolute[3]
        if target[:1] != b"/":
            target = b"/" + target
    path, _, query = target.partition(b"?")
    if _PATH.fullmatch(path) is None or _QUERY.fullmatch(query) is None or b"#" in query:
        raise TargetError("invalid request target")
    return path.decode("ascii"), query
