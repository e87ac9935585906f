"""Says who is asking: from a request's headers to a Session, or a Refusal 401 or 403.

Owns: the order of the checks and the cache of verified tokens. Must not know: sockets, routes, origins, what a
session may spend.

    headers -> find_credential -> cache by SHA-256 -> split -> key by (alg, kid) -> claims -> times -> signature
                    | none: 401        | hit: times and revocation again                     last: it is what costs |

Cheap checks come before the signature, so that a flood of forged, stale or foreign tokens costs as little as may
be; none of them trusts what it read. python-jose gets the signature only: its own claim checks use the wall clock
of the machine and have leaked OverflowError and TypeError.

Invariants: only verified tokens are cached, so forged ones can push nothing out; expiry, nbf and revocation are
looked at on every use; what a withdrawn key verified is verified again; only Refusal leaves this file; no message
holds any part of a token.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

from proxyd.access.cookies import Headers, Via, find_credential
from proxyd.access.jwks import KeyMaterialError, KeyRing, RemoteKeys, VerifyKey, parse_jwks, secret_key
from proxyd.access.revocations import Revocations
from proxyd.access.tenants import DEFAULT_TENANT
from proxyd.access.token import MAX_TOKEN_BYTES, Claims, Parts, check_times, invalid, read_claims, split
from proxyd.clock import Clock
from proxyd.config.schema import Auth
from proxyd.config.secrets import Secrets
from proxyd.errors import Refusal

# Verified tokens remembered by each worker: about 10 MB when full. Half would verify again on a node with more than
# 5,000 users a minute per worker; twice buys nothing on most.
CACHE_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class Session:
    """Who is asking. Times are wall seconds; `quota_remaining` is None where the token sets no limit, `models` None
    where it allows any.
    """

    user_id: int
    tenant: str
    quota_remaining: int | None
    issued_at: float | None
    expires_at: float
    models: frozenset[str] | None
    jti: str | None
    via: Via
    not_before: float | None = None
    token_key: bytes = field(default=b"", repr=False)  # SHA-256 of the token; empty where there is none

    @property
    def is_ambient(self) -> bool:
        """True when a browser sends the authority along by itself (the cookie), or none is needed (mode "off"):
        then the page that asks matters, and its origin is checked."""
        return self.via is Via.COOKIE or self.via is Via.OFF


OFF_SESSION = Session(0, DEFAULT_TENANT, None, None, math.inf, None, None, Via.OFF)


class UnknownKey(Refusal):
    """The token names a key of `auth.jwks_url` that we do not have.

    `is_pending`: a fetch is under way; the worker may wait for its end, with a deadline, and authenticate once
    more. A caller that does not gives the refusal as it is. 403 where other keys are known, 503 while no key could
    be loaded at all: then nobody can be judged.
    """

    def __init__(self, *, is_loaded: bool, is_pending: bool) -> None:
        if is_loaded:
            super().__init__(403, "invalid_token", "The token's key is not known.", reason="key")
        else:
            super().__init__(
                503, "keys_unavailable", "The keys to check tokens with are not loaded yet.", retry_after_s=2
            )
        self.is_pending = is_pending


class _Verified(NamedTuple):
    session: Session
    key: VerifyKey


class Sessions:
    """Authenticates requests for one worker."""

    __slots__ = (
        "_audience", "_cache", "_cache_entries", "_clock", "_cookie", "_is_off", "_issuer", "_leeway_s", "_ring",
        "remote", "revocations",
    )  # fmt: skip

    def __init__(
        self,
        auth: Auth,
        secrets: Secrets,
        clock: Clock,
        *,
        revocations: Revocations | None = None,
        request_fetch: Callable[[], None] | None = None,
        cache_entries: int = CACHE_ENTRIES,
    ) -> None:
        """`request_fetch` is what `RemoteKeys` calls, needed with `auth.jwks_url` only. Raises KeyMaterialError
        when there is no usable key.
        """
        self._is_off = auth.mode == "off"
        self._cookie = auth.cookie.encode()
        self._issuer = auth.issuer
        self._audience = auth.audience
        self._leeway_s = auth.leeway
        self._clock = clock
        self._cache: OrderedDict[bytes, _Verified] = OrderedDict()
        self._cache_entries = cache_entries
        self.revocations = Revocations() if revocations is None else revocations
        self._ring = KeyRing()
        self.remote: RemoteKeys | None = None
        if self._is_off:
            return
        if auth.jwks_url:
            if request_fetch is None:
                raise KeyMaterialError("auth.jwks_url needs somebody who fetches it")
            self.remote = RemoteKeys(self._ring, auth.algorithms, clock, request_fetch)
        else:
            self._ring.replace(load_keys(auth, secrets)[0])

    def authenticate(self, headers: Headers) -> Session:
        """The session of a request with these headers (names lower-cased). Raises Refusal: 401 without a token, 403
        for a bad one.
        """
        if self._is_off:
            return OFF_SESSION
        credential = find_credential(headers, self._cookie)
        if credential is None:
            raise Refusal(
                401, "missing_token", "This needs a session token.", headers=(("www-authenticate", "Bearer"),)
            )
        return self.verify(credential.token, credential.via)

    def verify(self, token: bytes, via: Via) -> Session:
        """The session of one token. Raises Refusal 403."""
        if len(token) > MAX_TOKEN_BYTES:
            raise invalid("The token is too long.", reason="format")
        now = self._clock.wall()
        digest = sha256(token).digest()
        name = digest + via.encode()
        known = self._cache.get(name)
        if known is not None and self._ring.is_live(known.key):
            self._cache.move_to_end(name)
            session, key = known
            check_times(session.expires_at, session.not_before, session.issued_at, now, self._leeway_s)
        else:
            session, key = self._check(token, digest, via, now)
        if known is None or known.key is not key:
            self._remember(name, _Verified(session, key))
        if self.revocations.is_revoked(session):
            raise invalid("The session was revoked.", "token_revoked")
        return session

    def _check(self, token: bytes, digest: bytes, via: Via, now: float) -> _Verified:
        """Every check that a token passes once. Raises Refusal."""
        parts = split(token)
        key = self._key(parts)
        if len(parts.signature) != key.signature_bytes:
            raise invalid("The token's signature is wrong.", reason="signature")
        claims = read_claims(parts.payload, self._issuer, self._audience)
        check_times(claims.expires_at, claims.not_before, claims.issued_at, now, self._leeway_s)
        if not key.is_signature(parts.signing_input, parts.signature):
            raise invalid("The token's signature is wrong.", reason="signature")
        return _Verified(_session(claims, via, digest, now), key)

    def _key(self, parts: Parts) -> VerifyKey:
        key = self._ring.find(parts.alg, parts.kid)
        if key is not None:
            return key
        remote = self.remote
        if remote is not None and remote.accepts(parts.alg):
            is_pending = remote.on_unknown_key()
            raise UnknownKey(is_loaded=remote.is_loaded, is_pending=is_pending)
        if parts.alg not in self._ring.algorithms:
            raise invalid("The token's algorithm is not accepted.", reason="algorithm")
        raise invalid("The token's key is not known.", reason="key")

    def _remember(self, name: bytes, verified: _Verified) -> None:
        self._cache[name] = verified
        self._cache.move_to_end(name)
        if len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)


def load_keys(auth: Auth, secrets: Secrets) -> tuple[list[VerifyKey], list[str]]:
    """The keys of the configuration, each bound to one of `auth.algorithms`, and what is wrong with single ones.

    Raises KeyMaterialError when none is usable, or one is wrong by itself. `--check-config` calls it too.
    """
    keys: list[VerifyKey] = []
    problems: list[str] = []
    if secrets.jwt is not None and "HS256" in auth.algorithms:
        keys.append(secret_key(secrets.jwt.reveal()))
    if secrets.jwks is not None:
        public, problems = parse_jwks(secrets.jwks, auth.algorithms)
        keys.extend(public)
    if not keys:
        raise KeyMaterialError("no configured key fits auth.algorithms: HS256 needs a secret, RS256 and ES256 a JWKS")
    return keys, problems


def _session(claims: Claims, via: Via, digest: bytes, now: float) -> Session:
    """`now`: what an issuer's clock that is ahead of ours says is issued then, so that what is spent from then on is
    behind its beginning."""
    return Session(
        user_id=claims.user_id,
        tenant=claims.tenant,
        quota_remaining=claims.quota_remaining,
        issued_at=None if claims.issued_at is None else min(claims.issued_at, now),
        expires_at=claims.expires_at,
        models=claims.models,
        jti=claims.jti,
        via=via,
        not_before=claims.not_before,
        token_key=digest,
    )
