"""Keys and tokens for the tests of access: made once, by hand, so that a test can make any token wrong in one way."""

from __future__ import annotations

import base64
import json
from functools import cache
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jose import jwk

from proxyd.access.session import Sessions
from proxyd.clock import FakeClock
from proxyd.config.schema import Auth
from proxyd.config.secrets import Secret, Secrets

NOW = 1_800_000_000
SECRET = b"correct-horse-battery-staple-0123456789"
ALGORITHMS = ("HS256", "RS256", "ES256")


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int, length: int | None = None) -> str:
    return b64(value.to_bytes(length or (value.bit_length() + 7) // 8))


@cache
def rsa_key(name: str = "first", bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, bits)


@cache
def ec_key(name: str = "first", curve: str = "P-256") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key({"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1()}[curve])


def rsa_jwk(key: rsa.RSAPrivateKey, kid: str | None = "k1", **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    made = {"kty": "RSA", "n": number(public.n), "e": number(public.e), "kid": kid, **more}
    return {name: value for name, value in made.items() if value is not None}


def ec_jwk(key: ec.EllipticCurvePrivateKey, kid: str | None = "k1", **more: Any) -> dict[str, Any]:
    public = key.public_key().public_numbers()
    length = (key.curve.key_size + 7) // 8
    crv = {256: "P-256", 384: "P-384"}[key.curve.key_size]
    made = {"kty": "EC", "crv": crv, "x": number(public.x, length), "y": number(public.y, length), "kid": kid, **more}
    return {name: value for name, value in made.items() if value is not None}


def private(alg: str) -> Any:
    return {"HS256": SECRET, "RS256": rsa_key(), "ES256": ec_key()}[alg]


def jwks_for(alg: str) -> dict[str, Any]:
    return {"keys": [rsa_jwk(rsa_key()) if alg == "RS256" else ec_jwk(ec_key())]}


def sign(signing_input: bytes, alg: str, key: Any = None) -> bytes:
    return bytes(jwk.construct(private(alg) if key is None else key, alg).sign(signing_input))


def assemble(header: bytes, payload: bytes, alg: str, key: Any = None) -> bytes:
    """A token of exactly these header and payload bytes, signed truly."""
    signing_input = f"{b64(header)}.{b64(payload)}".encode()
    return signing_input + b"." + b64(sign(signing_input, alg, key)).encode()


def header_for(alg: str, /, **more: Any) -> dict[str, Any]:
    return {"alg": alg, "typ": "JWT", **({} if alg == "HS256" else {"kid": "k1"}), **more}


def claims(**more: Any) -> dict[str, Any]:
    made = {"sub": "42", "exp": NOW + 3600, "iat": NOW, **more}
    return {name: value for name, value in made.items() if value is not ...}


def token(alg: str = "HS256", *, header: dict[str, Any] | None = None, key: Any = None, **more: Any) -> bytes:
    head = header_for(alg, **(header or {}))
    return assemble(json.dumps(head).encode(), json.dumps(claims(**more)).encode(), alg, key)


def auth_for(alg: str = "HS256", **more: Any) -> Auth:
    source = {} if alg == "HS256" else {"jwks_file": "/etc/proxyd/jwks.json"}
    return Auth.model_validate({"algorithms": [alg], **source, **more})


def secrets_for(alg: str = "HS256") -> Secrets:
    if alg == "HS256":
        return Secrets(jwt=Secret(SECRET), jwks=None, upstream_keys={}, telemetry_password=None)
    return Secrets(jwt=None, jwks=jwks_for(alg), upstream_keys={}, telemetry_password=None)


def clock_at_now() -> FakeClock:
    return FakeClock(wall=float(NOW))


def sessions_for(alg: str = "HS256", clock: FakeClock | None = None, **more: Any) -> Sessions:
    return Sessions(auth_for(alg, **more), secrets_for(alg), clock or clock_at_now())
