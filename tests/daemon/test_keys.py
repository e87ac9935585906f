"""`auth.jwks_url` with a real issuer on loopback: keys at start, an unknown key, an outage."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jose import jwt

from tests.daemon.harness import CHAT, DONE, Reply, Script, Upstream, Wire, node, request_bytes

Make = Callable[[Script], Upstream]


class Issuer:
    """One EC key by its kid."""

    def __init__(self, kid: str) -> None:
        self.kid = kid
        self.key = ec.generate_private_key(ec.SECP256R1())

    @property
    def jwk(self) -> dict[str, str]:
        numbers = self.key.public_key().public_numbers()
        x, y = (base64.urlsafe_b64encode(n.to_bytes(32, "big")).rstrip(b"=").decode() for n in (numbers.x, numbers.y))
        return {"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": self.kid, "x": x, "y": y}

    def token(self) -> str:
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        claims = {"sub": "7", "exp": int(time.time()) + 600}
        return str(jwt.encode(claims, pem, "ES256", headers={"kid": self.kid}))


def test_keys_are_fetched_at_start_once_and_kept_through_an_outage(upstream: Make, tmp_path: Path) -> None:
    old, new, stranger = Issuer("old"), Issuer("new"), Issuer("stranger")
    published = [old.jwk]

    def serve_keys(wire: Wire) -> bool | None:
        if not published:
            return False
        wire.json({"keys": published})
        return None

    issuer = upstream(serve_keys)
    model = upstream(lambda wire: wire.stream(DONE))
    auth = f'algorithms = ["ES256"]\njwks_url = "{issuer.url}/keys"'
    with node(tmp_path, model, auth=auth) as daemon:

        def status(token: str) -> int:
            sock = daemon.connect()
            sock.sendall(request_bytes("/v1/chat/completions", CHAT, token))
            reply = Reply(sock)
            reply.body()
            return reply.status

        assert status(old.token()) == 200
        fetched = len(issuer.requests)
        assert status(old.token()) == 200
        assert len(issuer.requests) == fetched
        assert status(stranger.token()) == 403
        published.clear()
        assert status(old.token()) == 200
        assert status(new.token()) == 403
