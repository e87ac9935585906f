"""Keys: which are taken, what each may verify, and when a remote set is fetched again."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from proxyd.access.cookies import Via
from proxyd.access.jwks import (
    COOL_DOWN_S,
    FETCH_DEADLINE_S,
    MAX_AGE_S,
    KeyMaterialError,
    KeyRing,
    parse_jwks,
    secret_key,
)
from proxyd.access.session import Sessions, UnknownKey
from proxyd.clock import FakeClock
from proxyd.config.secrets import Secret, Secrets
from proxyd.errors import Refusal
from tests.unit.access.keys import (
    NOW,
    auth_for,
    b64,
    clock_at_now,
    ec_jwk,
    ec_key,
    number,
    rsa_jwk,
    rsa_key,
    secrets_for,
    token,
)

BOTH = ("RS256", "ES256")


def keys_of(*entries: Any, algorithms: tuple[str, ...] = BOTH) -> list[tuple[str, str | None]]:
    return [(key.alg, key.kid) for key in parse_jwks({"keys": list(entries)}, algorithms)[0]]


def test_each_key_gets_the_one_algorithm_of_its_kind() -> None:
    assert keys_of(rsa_jwk(rsa_key(), "r"), ec_jwk(ec_key(), "e")) == [("RS256", "r"), ("ES256", "e")]


@pytest.mark.parametrize(
    "entry, reason",
    [
        ({"kty": "oct", "k": b64(b"x" * 32), "kid": "s"}, "symmetric"),
        ({"kty": "OKP", "crv": "Ed25519", "x": "AAAA"}, "neither RSA nor EC"),
        ({}, "neither RSA nor EC"),
        ("key", "not an object"),
        (None, "not an object"),
        ({"kty": "RSA"}, "n is not base64url"),
        ({"kty": "RSA", "n": 1, "e": "AQAB"}, "n is not base64url"),
        ({"kty": "RSA", "n": "A" * 100_000, "e": "AQAB"}, "n is not base64url"),
        ({"kty": "RSA", "n": number(2**2047 + 1), "e": number(1)}, "exponent"),
        ({"kty": "RSA", "n": number(2**2047 + 1), "e": number(4)}, "exponent"),
        ({"kty": "RSA", "n": number(2**1023 + 1), "e": "AQAB"}, "2048"),
        ({"kty": "EC", "crv": "P-256", "x": number(5), "y": number(5)}, "make no key"),
        ({"kty": "EC", "crv": "P-256", "x": "AAAA"}, "y is not base64url"),
        ({"kty": "EC", "crv": "P-256", "x": "A A", "y": "AAAA"}, "x is not base64url"),
        (lambda: ec_jwk(ec_key("x", "P-384")), "P-256"),
        (lambda: ec_jwk(ec_key("x", "P-384"), crv="P-256"), "not base64url"),
        (lambda: ec_jwk(ec_key(), crv="P-521"), "P-256"),
        (lambda: rsa_jwk(rsa_key(), alg="HS256"), "alg is not RS256"),
        (lambda: rsa_jwk(rsa_key(), alg="RS512"), "alg is not RS256"),
        (lambda: ec_jwk(ec_key(), alg="RS256"), "alg is not ES256"),
        (lambda: rsa_jwk(rsa_key(), use="enc"), "use"),
        (lambda: rsa_jwk(rsa_key(), key_ops=["sign"]), "key_ops"),
        (lambda: rsa_jwk(rsa_key(), key_ops="verify"), "key_ops"),
        (lambda: rsa_jwk(rsa_key(), kid=""), "kid"),
        (lambda: rsa_jwk(rsa_key(), kid=5), "kid"),  # type: ignore[arg-type]
        (lambda: rsa_jwk(rsa_key(), kid="../k"), "kid"),
    ],
)  # fmt: skip
def test_a_key_that_cannot_be_used_is_named_and_left_out(entry: Any, reason: str) -> None:
    entry = entry() if callable(entry) else entry
    keys, problems = parse_jwks({"keys": [entry, ec_jwk(ec_key(), "good")]}, BOTH)
    assert [key.kid for key in keys] == ["good"]
    assert len(problems) == 1
    assert reason in problems[0]


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[]", b"null", b'{"keys":{}}', b'{"keys":[]}', b'{"keys":[1]}', b"[" * 100_000, b" " * 300_000, {},
    {"keys": [{}] * 65}],
    ids=lambda document: repr(document)[:20],
)  # fmt: skip
def test_a_document_without_a_usable_key_is_refused(document: Any) -> None:
    with pytest.raises(KeyMaterialError):
        parse_jwks(document, BOTH)


def test_a_key_set_with_one_name_twice_is_refused_as_a_whole() -> None:
    with pytest.raises(KeyMaterialError, match="same kid"):
        parse_jwks({"keys": [ec_jwk(ec_key(), "a"), ec_jwk(ec_key("other"), "a")]}, BOTH)
    assert keys_of(ec_jwk(ec_key(), "a"), rsa_jwk(rsa_key(), "a")) == [("ES256", "a"), ("RS256", "a")]


def test_keys_of_algorithms_that_are_not_configured_are_left_out() -> None:
    assert keys_of(rsa_jwk(rsa_key(), "r"), ec_jwk(ec_key(), "e"), algorithms=("ES256", "HS256")) == [("ES256", "e")]


def test_private_members_of_a_key_are_not_looked_at() -> None:
    keys, _ = parse_jwks({"keys": [ec_jwk(ec_key(), d="AAAA")]}, BOTH)
    assert keys[0].key.is_public()


def test_a_key_is_found_by_algorithm_and_kid() -> None:
    keys, _ = parse_jwks({"keys": [ec_jwk(ec_key(), "a"), ec_jwk(ec_key("b"), "b"), rsa_jwk(rsa_key(), "a")]}, BOTH)
    ring = KeyRing(keys)
    assert [ring.find("ES256", "a"), ring.find("ES256", "b"), ring.find("RS256", "a")] == keys
    assert ring.find("ES256", "c") is None
    assert ring.find("HS256", "a") is None
    assert ring.find("ES256", None) is None, "two could be meant"
    assert ring.find("RS256", None) is keys[2], "only one can be meant"


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 31])
def test_a_short_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(KeyMaterialError, match="32"):
        secret_key(secret)


@pytest.mark.parametrize(
    "secret", [b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"ssh-rsa " + b"A" * 64]
)
def test_a_public_key_is_no_secret(secret: bytes) -> None:
    with pytest.raises(KeyMaterialError, match="JWKS"):
        secret_key(secret)


def test_a_secret_that_reads_as_json_is_taken_as_its_bytes() -> None:
    secret = b'{"keys": [], "kty": "oct", "k": "AAAAAAAAAAAAAAAA"}'
    sessions = Sessions(auth_for(), Secrets(jwt=Secret(secret)), clock_at_now())
    assert sessions.verify(token(key=secret), Via.BEARER)


def test_no_usable_key_at_all_is_an_error_at_start() -> None:
    for alg, secrets in (("HS256", Secrets()), ("RS256", secrets_for("ES256")), ("RS256", secrets_for("HS256"))):
        with pytest.raises(KeyMaterialError):
            Sessions(auth_for(alg), secrets, clock_at_now())


# -- remote keys


@cache
def signed_once(kid: str, key: str) -> bytes:
    """The same bytes on every call: an ECDSA signature made anew is another token, which nobody remembers."""
    return token("ES256", header={"kid": kid}, key=ec_key(key))


class Issuer:
    """A JWKS endpoint that we play: it counts fetches and answers when told to."""

    def __init__(self) -> None:
        self.fetches = 0
        self.clock = FakeClock(wall=float(NOW))
        auth = auth_for("ES256", jwks_file="", jwks_url="https://issuer.example/jwks.json")
        self.sessions = Sessions(auth, Secrets(), self.clock, request_fetch=self.fetch)
        assert self.sessions.remote is not None
        self.remote = self.sessions.remote

    def fetch(self) -> None:
        self.fetches += 1

    def answer(self, *entries: dict[str, Any]) -> list[str]:
        return self.remote.on_document(json.dumps({"keys": entries}).encode())

    def ask(self, kid: str, key: str) -> Any:
        return self.sessions.verify(signed_once(kid, key), Via.BEARER)

    def refusal(self, kid: str, key: str = "first") -> Refusal:
        with pytest.raises(Refusal) as refused:
            self.ask(kid, key)
        return refused.value


def test_before_the_first_keys_a_token_is_a_503_worth_waiting_for() -> None:
    issuer = Issuer()
    refusal = issuer.refusal("k1")
    assert isinstance(refusal, UnknownKey)
    assert (refusal.status, refusal.is_pending, issuer.fetches) == (503, True, 1)
    assert any(name == "retry-after" for name, _ in refusal.headers)
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    assert issuer.ask("k1", "first").user_id == 42


def test_a_tick_loads_the_keys_before_anybody_asks_and_again_when_they_are_old() -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.remote.tick()
    assert issuer.fetches == 1
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    issuer.clock.advance(MAX_AGE_S - 1)
    issuer.remote.tick()
    assert issuer.fetches == 1
    issuer.clock.advance(1)
    issuer.remote.tick()
    assert issuer.fetches == 2


def test_an_unknown_kid_begins_one_fetch_per_cool_down_however_many_ask() -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    for number_ in range(100):
        refusal = issuer.refusal(f"invented-{number_}")
        assert (refusal.status, issuer.fetches) == (403, 1)
    issuer.clock.advance(COOL_DOWN_S)
    pending = [issuer.refusal(f"invented-{number_}") for number_ in range(100)]
    assert issuer.fetches == 2
    assert all(isinstance(refusal, UnknownKey) and refusal.is_pending and refusal.status == 403 for refusal in pending)
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    last = issuer.refusal("invented")
    assert isinstance(last, UnknownKey)
    assert not last.is_pending
    assert issuer.fetches == 2


def test_a_rotated_key_is_fetched_and_the_withdrawn_one_verifies_nothing_more() -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    assert issuer.ask("k1", "first")
    issuer.clock.advance(COOL_DOWN_S)
    assert issuer.refusal("k2", "second").status == 403
    issuer.answer(ec_jwk(ec_key("second"), "k2"))
    assert issuer.ask("k2", "second")
    assert issuer.refusal("k1", "first").status == 403, "also where the token was remembered"


def test_a_key_replaced_under_its_own_name_verifies_again_what_was_remembered() -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    assert issuer.ask("k1", "first")
    issuer.answer(ec_jwk(ec_key("second"), "k1"))
    assert issuer.refusal("k1", "first").status == 403
    assert issuer.ask("k1", "second")


@pytest.mark.parametrize("document", [b"", b"<html>", b'{"keys":[]}', b'{"keys":[{"kty":"oct"}]}'])
def test_a_failed_fetch_keeps_the_keys_that_were(document: bytes) -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.answer(ec_jwk(ec_key("first"), "k1"))
    issuer.clock.advance(MAX_AGE_S)
    issuer.remote.tick()
    assert issuer.remote.on_document(document)
    assert issuer.remote.last_error
    assert issuer.ask("k1", "first").user_id == 42
    issuer.clock.advance(COOL_DOWN_S)
    issuer.remote.tick()
    assert issuer.fetches == 3


def test_a_fetch_that_never_ends_is_given_up() -> None:
    issuer = Issuer()
    issuer.remote.tick()
    issuer.clock.advance(max(FETCH_DEADLINE_S, COOL_DOWN_S))
    issuer.remote.tick()
    assert issuer.fetches == 2
    assert "in time" in issuer.remote.last_error


def test_no_token_of_another_algorithm_makes_us_fetch() -> None:
    issuer = Issuer()
    for alg in ("HS256", "RS256"):
        with pytest.raises(Refusal) as refused:
            issuer.sessions.verify(token(alg), Via.BEARER)
        assert refused.value.status == 403
    assert issuer.fetches == 0
