"""The keys that tokens are checked with, each bound to one algorithm.

Owns: turning the configured secret or a JWKS document into keys; which key a token's (alg, kid) selects; when a
remote JWKS is fetched again. Must not know: tokens' claims, sockets (the worker fetches and hands the bytes in).

Invariants
- A key verifies under the one algorithm it was made for: the shared secret HS256, an RSA key RS256, a P-256 key
  ES256. A token's header chooses among these bindings and can make no new one. That is what closes RS/ES-to-HS
  confusion in every encoding of the public key, which python-jose 3.5.0 alone does not.
- Symmetric keys in a JWKS are refused: a document that is fetched or published must not hold a secret.
- A document with one bad key loses that key; a document without one usable key, or with one name twice, is refused as a
  whole and the keys from before stay.

    remote keys:  IDLE --unknown kid, or older than MAX_AGE_S--> FETCHING --document, failure or deadline--> IDLE
                  never more than one fetch begun per COOL_DOWN_S, so a flood of invented kids costs the issuer nothing

Sources: RFC 7517 (JWK), RFC 7518 (JWA) sections 3.3, 3.4, 6.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import orjson
from jose import jwk
from jose.exceptions import JOSEError

from proxyd.access.token import is_kid
from proxyd.clock import Clock

SUPPORTED_ALGORITHMS = frozenset(("HS256", "RS256", "ES256"))

# RFC 7518 section 3.2: a key of the hash's size or more.
MIN_SECRET_BYTES = 32
# RFC 7518 section 3.3. Above 8192 bits one verification costs milliseconds.
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192
# Providers publish two to ten keys; each costs a few hundred bytes here.
MAX_KEYS = 64
MAX_DOCUMENT_BYTES = 256 * 1024

# How long an unknown kid is answered from what we have. Half: a flood of invented kids asks the issuer twice as
# often. Twice: a key in use at once after its publication is refused for a minute.
COOL_DOWN_S = 30.0
# A fetch that nobody reported the end of counts as failed after this, or it would block every later one.
FETCH_DEADLINE_S = 30.0
# A key that the issuer withdrew stops working at the latest then.
MAX_AGE_S = 600.0

_P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")


class KeyMaterialError(ValueError):
    """A secret or key set that cannot be used. The message never holds key material."""


@dataclass(frozen=True, slots=True, eq=False)
class VerifyKey:
    """One key and its one algorithm. Compared by identity: a reloaded key is another key."""

    alg: str
    kid: str | None
    signature_bytes: int
    key: Any  # jose.backends.base.Key, built for `alg`

    def is_signature(self, signing_input: bytes, signature: bytes) -> bool:
        """True when `signature` is this key's over `signing_input`. Never raises.

        The length and, for ES256, the range of r and s are looked at first: most forgeries end here without a curve
        operation.
        """
        if len(signature) != self.signature_bytes:
            return False
        if self.alg == "ES256":
            r, s = int.from_bytes(signature[:32]), int.from_bytes(signature[32:])
            if not (0 < r < _P256_ORDER and 0 < s < _P256_ORDER):
                return False
        try:
            return self.key.verify(signing_input, signature) is True
        except Exception:  # noqa: BLE001  the library has leaked TypeError and OverflowError; a forgery is never a 500
            return False


class KeyRing:
    """The keys in force. One secret for HS256, any number of named public keys for the others."""

    __slots__ = ("_by_name", "_keys", "_only", "_secret", "algorithms")

    def __init__(self, keys: Iterable[VerifyKey] = ()) -> None:
        self.replace(keys)

    def replace(self, keys: Iterable[VerifyKey]) -> None:
        """Puts these keys in the place of all others. Raises KeyMaterialError, and changes nothing, when two share
        a name.
        """
        kept = tuple(keys)
        by_name: dict[tuple[str, str], VerifyKey] = {}
        only: dict[str, VerifyKey | None] = {}
        for key in kept:
            only[key.alg] = None if key.alg in only else key
            if key.kid is not None:
                if (key.alg, key.kid) in by_name:
                    raise KeyMaterialError("two keys have the same kid")
                by_name[key.alg, key.kid] = key
        self._keys = frozenset(kept)
        self._by_name = by_name
        self._only = only
        self._secret = only.get("HS256")
        self.algorithms = frozenset(only)

    def find(self, alg: str, kid: str | None) -> VerifyKey | None:
        """The key for a token with this header. The secret has no name, so its kid is not compared. A token without
        a kid gets a public key only where there is no other of that algorithm: we do not try keys in turn."""
        if alg == "HS256":
            return self._secret
        if kid is None:
            return self._only.get(alg)
        return self._by_name.get((alg, kid))

    def is_live(self, key: VerifyKey) -> bool:
        """False once the key was replaced: what it had verified must be verified again."""
        return key in self._keys


def secret_key(secret: bytes) -> VerifyKey:
    """The HS256 key of a shared secret. Raises KeyMaterialError for a short one, and for a public key used as a
    secret.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyMaterialError(f"the HS256 secret is shorter than {MIN_SECRET_BYTES} bytes")
    try:
        return VerifyKey("HS256", None, 32, jwk.construct(secret, "HS256"))
    except JOSEError:
        raise KeyMaterialError("an RSA or EC key is no HS256 secret; give public keys in a JWKS") from None


def parse_jwks(document: bytes | Mapping[str, Any], algorithms: Iterable[str]) -> tuple[list[VerifyKey], list[str]]:
    """The usable keys of a JWKS, and why each of the others is not. Raises KeyMaterialError when it is none, or
    none is usable.
    """
    allowed = SUPPORTED_ALGORITHMS.intersection(algorithms)
    if isinstance(document, bytes):
        if len(document) > MAX_DOCUMENT_BYTES:
            raise KeyMaterialError("the JWKS is too long")
        try:
            document = orjson.loads(document)
        except orjson.JSONDecodeError:
            raise KeyMaterialError("the JWKS is not JSON") from None
    entries = document.get("keys") if isinstance(document, Mapping) else None
    if not isinstance(entries, list):
        raise KeyMaterialError('the JWKS is not an object with a list "keys"')
    if len(entries) > MAX_KEYS:
        raise KeyMaterialError(f"the JWKS has more than {MAX_KEYS} keys")
    keys: list[VerifyKey] = []
    problems: list[str] = []
    names: set[tuple[str, str]] = set()
    for index, entry in enumerate(entries):
        try:
            key = _public_key(entry, allowed)
        except KeyMaterialError as error:
            problems.append(f"key {index}: {error}")
            continue
        if key.kid is not None:
            if (key.alg, key.kid) in names:
                raise KeyMaterialError("the JWKS has two keys with the same kid")
            names.add((key.alg, key.kid))
        keys.append(key)
    if not keys:
        raise KeyMaterialError("; ".join(["the JWKS has no key that can be used", *problems[:4]]))
    return keys, problems


def _public_key(entry: object, allowed: frozenset[str]) -> VerifyKey:
    """One JWK as a key. Only its public members are looked at. Raises KeyMaterialError."""
    if not isinstance(entry, Mapping):
        raise KeyMaterialError("not an object")
    kty = entry.get("kty")
    if kty == "RSA":
        alg, material, signature_bytes = "RS256", *_rsa(entry)
    elif kty == "EC":
        alg, material, signature_bytes = "ES256", *_p256(entry)
    elif kty == "oct":
        raise KeyMaterialError("a symmetric key does not belong in a JWKS; use auth.secret_file")
    else:
        raise KeyMaterialError("kty is neither RSA nor EC")
    if entry.get("alg", alg) != alg:
        raise KeyMaterialError(f"its alg is not {alg}")
    if alg not in allowed:
        raise KeyMaterialError(f"{alg} is not among auth.algorithms")
    if entry.get("use", "sig") != "sig":
        raise KeyMaterialError("its use is not sig")
    operations = entry.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        raise KeyMaterialError("its key_ops do not allow verify")
    kid = entry.get("kid")
    if kid is not None and not is_kid(kid):
        raise KeyMaterialError("its kid is not a name that a token may carry")
    try:
        return VerifyKey(alg, kid, signature_bytes, jwk.construct(material, alg))
    except (JOSEError, ValueError, TypeError):
        raise KeyMaterialError("its numbers make no key") from None


def _rsa(entry: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    modulus, exponent = _number(entry, "n", MAX_RSA_BITS), _number(entry, "e", 64)
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS:
        raise KeyMaterialError(f"an RSA key must have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits")
    if exponent < 3 or exponent % 2 == 0:
        raise KeyMaterialError("its exponent is not one")
    return {"kty": "RSA", "n": entry["n"], "e": entry["e"]}, (modulus.bit_length() + 7) // 8


def _p256(entry: Mapping[str, Any]) -> tuple[dict[str, str], int]:
    if entry.get("crv") != "P-256":
        raise KeyMaterialError("an EC key must be on P-256")
    _number(entry, "x", 256)
    _number(entry, "y", 256)
    return {"kty": "EC", "crv": "P-256", "x": entry["x"], "y": entry["y"]}, 64


def _number(entry: Mapping[str, Any], name: str, max_bits: int) -> int:
    """A base64url unsigned number. Bounded before it is decoded, so that a hostile document costs nothing."""
    text = entry.get(name)
    if (
        not isinstance(text, str)
        or len(text) > max_bits // 6 + 8
        or _BASE64URL.fullmatch(text) is None
        or len(text) % 4 == 1
    ):
        raise KeyMaterialError(f"its {name} is not base64url")
    return int.from_bytes(urlsafe_b64decode(text + "=" * (-len(text) % 4)))


class Fetch(Enum):
    """What a remote key set is doing."""

    IDLE = auto()
    FETCHING = auto()


class RemoteKeys:
    """When to fetch `auth.jwks_url`, and what to do with the answer.

    `request_fetch` starts a fetch and returns at once; the worker then calls `on_document` or `on_failure`. It must
    bound the answer to MAX_DOCUMENT_BYTES, follow no redirect to another host, and take the URL from the
    configuration only. Keys stay in force when a fetch fails: an issuer's outage must not become ours.
    """

    __slots__ = ("_algorithms", "_begun_at", "_clock", "_loaded_at", "_request_fetch", "_ring", "_state", "last_error")

    def __init__(
        self, ring: KeyRing, algorithms: Iterable[str], clock: Clock, request_fetch: Callable[[], None]
    ) -> None:
        self._ring = ring
        self._algorithms = frozenset(algorithms) - {"HS256"}
        self._clock = clock
        self._request_fetch = request_fetch
        self._state = Fetch.IDLE
        self._begun_at: float | None = None
        self._loaded_at: float | None = None
        self.last_error = ""

    @property
    def is_loaded(self) -> bool:
        """True once a document was taken."""
        return self._loaded_at is not None

    @property
    def age_s(self) -> float | None:
        """Seconds since a document was last taken."""
        return None if self._loaded_at is None else self._clock.monotonic() - self._loaded_at

    def accepts(self, alg: str) -> bool:
        """True for an algorithm that a key of this set could have: no other is worth a fetch."""
        return alg in self._algorithms

    def tick(self) -> None:
        """Called about once a second: fetches when nothing is loaded, or what is loaded is old."""
        age_s = self.age_s
        if age_s is None or age_s >= MAX_AGE_S:
            self._maybe_fetch()

    def on_unknown_key(self) -> bool:
        """A token names a key that we do not have. True when a fetch is under way whose end may change that."""
        self._maybe_fetch()
        return self._state is Fetch.FETCHING

    def on_document(self, document: bytes) -> list[str]:
        """Takes a fetched document; returns what is wrong with single keys. A useless document is a failure: see
        `last_error`.
        """
        try:
            keys, problems = parse_jwks(document, self._algorithms)
            self._ring.replace(keys)
        except KeyMaterialError as error:
            self.on_failure(str(error))
            return [str(error)]
        self._state = Fetch.IDLE
        self._loaded_at = self._clock.monotonic()
        self.last_error = ""
        return problems

    def on_failure(self, reason: str) -> None:
        """The fetch failed: the keys from before stay, the next try waits for the cool-down."""
        self._state = Fetch.IDLE
        self.last_error = reason

    def _maybe_fetch(self) -> None:
        now = self._clock.monotonic()
        since = None if self._begun_at is None else now - self._begun_at
        if self._state is Fetch.FETCHING and since is not None and since >= FETCH_DEADLINE_S:
            self.on_failure("the fetch did not end in time")
        if self._state is Fetch.FETCHING or (since is not None and since < COOL_DOWN_S):
            return
        self._begun_at = now
        self._state = Fetch.FETCHING
        self._request_fetch()
