"""Makes session tokens with the configured secret.

Owns: the claims of a token of ours. Must not know: files, arguments, HTTP. HS256 only: with a JWKS we hold public
keys, and who has the private ones mints.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from secrets import token_hex
from typing import Any

from jose import jws

from proxyd.access.jwks import KeyMaterialError, secret_key
from proxyd.access.tenants import is_tenant
from proxyd.access.token import MAX_QUOTA_TOKENS, MAX_USER_ID
from proxyd.clock import SYSTEM, Clock
from proxyd.config.schema import Auth
from proxyd.config.secrets import Secrets


class MintError(ValueError):
    """No such token can be made here; the message says why, for the operator."""


def mint(
    auth: Auth,
    secrets: Secrets,
    user: int,
    tenant: str,
    quota: int | None,
    ttl: float,
    *,
    clock: Clock = SYSTEM,
    models: Iterable[str] | None = None,
) -> str:
    """A token for `user`, valid for `ttl` seconds from now; `quota` None sets no limit. Raises MintError."""
    if secrets.jwt is None:
        raise MintError("there is no shared secret: tokens for a JWKS are minted by whoever holds its private keys")
    if "HS256" not in auth.algorithms:
        raise MintError("HS256 is not among auth.algorithms, so a token made with the secret would be refused")
    if not 0 <= user <= MAX_USER_ID:
        raise MintError("the user is not a number of 0 to 2**64-1")
    if not is_tenant(tenant):
        raise MintError("the tenant is not 1 to 64 letters, digits, '.', '_', '-' beginning with a letter or digit")
    if quota is not None and abs(quota) > MAX_QUOTA_TOKENS:
        raise MintError("the quota does not fit 64 bits")
    if not (math.isfinite(ttl) and ttl >= 1):
        raise MintError("the lifetime is shorter than a second")
    issued_at = int(clock.wall())
    claims: dict[str, Any] = {
        "sub": str(user),
        "tenant": tenant,
        "iat": issued_at,
        "exp": issued_at + math.ceil(ttl),
        "jti": token_hex(16),
    }
    if quota is not None:
        claims["quota_remaining"] = quota
    if models is not None:
        claims["models"] = list(models)
    if auth.issuer:
        claims["iss"] = auth.issuer
    if auth.audience:
        claims["aud"] = auth.audience
    try:
        key = secret_key(secrets.jwt.reveal())
    except KeyMaterialError as error:
        raise MintError(str(error)) from None
    return str(jws.sign(claims, key.key, algorithm="HS256"))
