"""Takes a token apart under strict rules, before any library or key sees it.

Owns: the form of a token and of its claims. Must not know: keys, signatures, HTTP, the clock (times are passed in).

    header . payload . signature          three base64url parts: no padding, no whitespace, unused last bits zero
    {"alg":..}  {"exp":..,"sub":..}       strict UTF-8 JSON objects, no duplicate member at any depth

Invariants: nothing but Refusal 403 leaves this file, whatever the bytes; no message repeats any part of the token;
the cost of refusing is bounded by MAX_TOKEN_BYTES, because everything longer ends at its length.
Sources: RFC 7515 (JWS), RFC 7519 (JWT), RFC 4648 section 5, RFC 8725 (best practices).
"""

from __future__ import annotations

import json
import math
import re
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Never, TypeGuard

from proxyd.access.tenants import DEFAULT_TENANT, is_tenant
from proxyd.errors import Refusal

# Identity providers' tokens with many roles reach 4 KiB; the whole head is 32 KiB by default. Twice this is twice
# the price of every forged token.
MAX_TOKEN_BYTES = 8 * 1024
# Objects and arrays in one part, and with that its depth. The parser recurses once a level; a token of 10,000
# levels would exhaust Python's stack. A provider's claims have a few dozen; a JOSE header has one.
MAX_HEADER_CONTAINERS = 16
MAX_CLAIMS_CONTAINERS = 128
# Beyond 2**53 a JSON number is no longer exact for half of the world's parsers, and as a time it is no time.
MAX_TIME_S = 2**53
MAX_USER_ID = 2**64 - 1  # BIGINT UNSIGNED
MAX_QUOTA_TOKENS = 2**63 - 1
MAX_JTI_CHARS = 256
MAX_MODEL_CHARS = 256

_SHAPE = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
# The last character of a part of 4n+2 (4n+3) characters carries 4 (2) unused bits, which must be zero; else several
# spellings of one signature exist and a revoked or cached token could come back under another hash.
_LAST_OF_2 = frozenset(b"AQgw")
_LAST_OF_3 = frozenset(b"AEIMQUYcgkosw048")
_PADDING = (b"", b"", b"==", b"=")

# Header members that change what is signed, or say where to fetch a key. `x5t` is only a thumbprint and is ignored.
_REFUSED_MEMBERS = frozenset(("crit", "b64", "jku", "x5u", "jwk", "x5c", "zip", "enc", "cty"))
# RFC 8725 section 3.11: another `typ` is a token made for another purpose (logout+jwt, dpop+jwt, ...) with the same
# keys.
_ACCEPTED_TYPES = frozenset(("jwt", "at+jwt", "application/jwt", "application/at+jwt"))
# A key's name, never a path or a query: it is only ever looked up in a dictionary, and with a shared secret not
# even that.
_KID = re.compile(r"[A-Za-z0-9._~+/=:@-]{1,256}")
_USER = re.compile(r"0|[1-9][0-9]{0,19}")


def invalid(message: str, code: str = "invalid_token", *, reason: str = "") -> Refusal:
    """The 403 for a token that is no good. `message` must be ours: never a part of the token. `reason` is for the log:
    format, claims, algorithm, key, signature, issuer, audience or clock."""
    return Refusal(403, code, message, reason=reason)


class _BadJson(ValueError):
    """JSON that a lenient parser would have taken."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A well-formed token whose signature nobody has looked at yet."""

    alg: str
    kid: str | None
    payload: bytes
    signing_input: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims we read, each of its right type. Times are seconds since the Unix epoch."""

    user_id: int
    tenant: str
    expires_at: float
    not_before: float | None
    issued_at: float | None
    quota_remaining: int | None
    models: frozenset[str] | None
    jti: str | None


def split(token: bytes) -> Parts:
    """Takes `token` apart and checks its header. Raises Refusal 403."""
    if len(token) > MAX_TOKEN_BYTES:
        raise invalid("The token is too long.", reason="format")
    shape = _SHAPE.fullmatch(token)
    if shape is None:
        raise invalid("The token is not three base64url parts.", reason="format")
    header_part, payload_part, signature_part = shape.groups()
    header = _object(_decode(header_part), MAX_HEADER_CONTAINERS)
    alg = header.get("alg")
    if not isinstance(alg, str):
        raise invalid("The token's header names no algorithm.", reason="algorithm")
    if not _REFUSED_MEMBERS.isdisjoint(header):
        raise invalid("The token's header has a member that is not accepted here.", reason="format")
    typ = header.get("typ", "JWT")
    if not isinstance(typ, str) or typ.lower() not in _ACCEPTED_TYPES:
        raise invalid("The token is of another type.", reason="format")
    kid = header.get("kid")
    if "kid" in header:
        if not is_kid(kid):
            raise invalid("The token's key name is not one.", reason="format")
    return Parts(alg, kid, _decode(payload_part), token[: shape.end(2)], _decode(signature_part))


def is_kid(value: object) -> TypeGuard[str]:
    """True for what may name a key: 1..256 characters of base64 and URL alphabets, no absolute path, no `..`."""
    return (
        isinstance(value, str) and _KID.fullmatch(value) is not None and not value.startswith("/") and ".." not in value
    )


def read_claims(payload: bytes, issuer: str, audience: str) -> Claims:
    """Reads and type-checks the claims; an empty `issuer` or `audience` is not compared. Raises Refusal 403.

    `exp` must be a JSON integer: 1e9, 1.5 and true are all refused. `sub` is an unsigned 64-bit number, as a JSON
    integer or in decimal digits without leading zeros, so that one user has one spelling. null is never taken for
    an absent claim: an issuer that meant "no quota left" and one that meant "no limit" would look the same.
    """
    claims = _object(payload, MAX_CLAIMS_CONTAINERS)
    expires_at = claims.get("exp")
    if type(expires_at) is not int or not 0 < expires_at <= MAX_TIME_S:
        raise invalid("The token's exp is missing or not a time.", reason="claims")
    user_id = _user_id(claims.get("sub"))
    tenant = claims.get("tenant", DEFAULT_TENANT)
    if not is_tenant(tenant):
        raise invalid("The token's tenant is not a tenant's name.", reason="claims")
    not_before = _optional(claims, "nbf", _is_time)
    issued_at = _optional(claims, "iat", _is_time)
    quota_remaining = _optional(claims, "quota_remaining", _is_quota)
    models = _optional(claims, "models", _is_models)
    jti = _optional(claims, "jti", _is_jti)
    _check_parties(claims, issuer, audience)
    return Claims(
        user_id=user_id,
        tenant=tenant,
        expires_at=float(expires_at),
        not_before=None if not_before is None else float(not_before),
        issued_at=None if issued_at is None else float(issued_at),
        quota_remaining=quota_remaining,
        models=None if models is None else frozenset(models),
        jti=jti,
    )


def check_times(
    expires_at: float, not_before: float | None, issued_at: float | None, now: float, leeway_s: float
) -> None:
    """Raises Refusal 403 unless the token is in force at `now` (wall clock), give or take the leeway."""
    if now >= expires_at + leeway_s:
        raise invalid("The token has expired.", "token_expired")
    if not_before is not None and now < not_before - leeway_s:
        raise invalid("The token is not valid yet.", reason="clock")
    if issued_at is not None and now < issued_at - leeway_s:
        raise invalid("The token was issued in the future.", reason="clock")


def _decode(part: bytes) -> bytes:
    """The bytes behind one base64url part whose alphabet was checked. Raises Refusal 403 unless it is the only
    spelling.
    """
    rest = len(part) % 4
    if rest == 1 or (rest == 2 and part[-1] not in _LAST_OF_2) or (rest == 3 and part[-1] not in _LAST_OF_3):
        raise invalid("The token is not canonical base64url.", reason="format")
    return urlsafe_b64decode(part + _PADDING[rest])


def _object(data: bytes, max_containers: int) -> dict[str, Any]:
    """The JSON object in `data`. Raises Refusal 403 for anything else, duplicates and NaN included."""
    # Brackets inside strings count too: an upper bound of the depth is all that is needed, at the price of two byte
    # counts.
    if data.count(b"{") + data.count(b"[") > max_containers:
        raise invalid("The token is nested too deeply.", reason="format")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise invalid("A part of the token is not a plain JSON object.", reason="format") from None
    if not isinstance(value, dict):
        raise invalid("A part of the token is not a plain JSON object.", reason="format")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _BadJson("duplicate member")
    return members


def _no_constant(name: str) -> Never:
    raise _BadJson(name)


def _user_id(sub: object) -> int:
    if type(sub) is int and 0 <= sub <= MAX_USER_ID:
        return sub
    if isinstance(sub, str) and _USER.fullmatch(sub) is not None:
        user_id = int(sub)
        if user_id <= MAX_USER_ID:
            return user_id
    raise invalid("The token's sub is missing or not a user's number.", reason="claims")


def _optional(claims: dict[str, Any], name: str, is_right: Callable[[Any], bool]) -> Any:
    """The claim `name`, None when absent. Raises Refusal 403 when it is there and wrong. `name` is one of ours."""
    if name not in claims:
        return None
    value = claims[name]
    if not is_right(value):
        raise invalid(f"The token's {name} is of the wrong type.", reason="claims")
    return value


def _is_time(value: Any) -> bool:
    """RFC 7519 section 2, NumericDate: fractions are allowed, and issuers do write `iat` from a float clock."""
    if type(value) is int:
        return 0 <= value <= MAX_TIME_S
    return type(value) is float and math.isfinite(value) and 0 <= value <= MAX_TIME_S


def _is_quota(value: Any) -> bool:
    return type(value) is int and -MAX_QUOTA_TOKENS <= value <= MAX_QUOTA_TOKENS


def _is_models(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and 0 < len(name) <= MAX_MODEL_CHARS for name in value)


def _is_jti(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_JTI_CHARS and value.isprintable()


def _check_parties(claims: dict[str, Any], issuer: str, audience: str) -> None:
    """`iss` and `aud` have the right type wherever they are there, and the right value where one is configured."""
    iss = claims.get("iss", "")
    if not isinstance(iss, str) or (issuer and iss != issuer):
        raise invalid("The token is from another issuer.", reason="issuer")
    aud = claims.get("aud", [])
    audiences = [aud] if isinstance(aud, str) else aud
    if not isinstance(audiences, list) or not all(isinstance(name, str) for name in audiences):
        raise invalid("The token's aud is of the wrong type.", reason="claims")
    if audience and audience not in audiences:
        raise invalid("The token is for another audience.", reason="audience")
