"""From a request's headers to a session: what is accepted, remembered, and looked at again on each use."""

from __future__ import annotations

import json
import math

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from jose import jwt

from proxyd.access.cookies import Via
from proxyd.access.jwks import VerifyKey
from proxyd.access.session import OFF_SESSION, Sessions
from proxyd.access.token import MAX_CLAIMS_CONTAINERS, MAX_HEADER_CONTAINERS
from proxyd.config.schema import Auth
from proxyd.config.secrets import Secrets
from proxyd.errors import Refusal
from tests.unit.access.keys import (
    ALGORITHMS,
    NOW,
    SECRET,
    assemble,
    auth_for,
    claims,
    clock_at_now,
    private,
    secrets_for,
    sessions_for,
    token,
)


def bearer(value: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + value)]


def refusal_of(sessions: Sessions, value: bytes) -> Refusal:
    with pytest.raises(Refusal) as refused:
        sessions.authenticate(bearer(value))
    return refused.value


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_every_claim_reaches_the_session(alg: str) -> None:
    made = token(
        alg, sub="18446744073709551615", tenant="acme", quota_remaining=500, models=["a", "b"], jti="j-1", nbf=NOW
    )
    session = sessions_for(alg).authenticate(bearer(made))
    assert (session.user_id, session.tenant, session.quota_remaining) == (2**64 - 1, "acme", 500)
    assert (session.issued_at, session.not_before, session.expires_at) == (float(NOW), float(NOW), float(NOW + 3600))
    assert (session.models, session.jti, session.via) == (frozenset({"a", "b"}), "j-1", Via.BEARER)
    assert len(session.token_key) == 32


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_a_token_with_exp_and_sub_alone_is_enough(alg: str) -> None:
    session = sessions_for(alg).authenticate(bearer(token(alg, iat=...)))
    assert (session.tenant, session.quota_remaining, session.models, session.jti) == ("default", None, None, None)
    assert session.issued_at is None


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_tokens_of_python_jose_are_accepted(alg: str) -> None:
    headers = None if alg == "HS256" else {"kid": "k1"}
    made = jwt.encode(claims(), _pem_or_secret(alg), algorithm=alg, headers=headers)
    assert sessions_for(alg).authenticate(bearer(made.encode())).user_id == 42


def _pem_or_secret(alg: str) -> bytes:
    if alg == "HS256":
        return SECRET
    pem: bytes = private(alg).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem


@pytest.mark.parametrize(
    "more",
    [
        {"sub": 42}, {"sub": "0"}, {"sub": 0}, {"sub": 2**64 - 1}, {"iat": NOW + 0.5}, {"iat": NOW + 5},
        {"nbf": NOW + 5}, {"exp": NOW - 4},
        {"exp": 2**53}, {"aud": "anything"}, {"aud": ["a", "b"]}, {"iss": "anyone"}, {"quota_remaining": 0},
        {"quota_remaining": -5},
        {"models": []}, {"tenant": "A.b_c-9"}, {"tenant": "a" * 64}, {"unknown": {"deep": [[[{"a": None}]]]}},
        {"jti": "ünïcode"},
    ],
    ids=repr,
)  # fmt: skip
def test_what_an_honest_issuer_may_write_is_accepted(more: dict[str, object]) -> None:
    assert sessions_for().authenticate(bearer(token(**more)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "header", [{"typ": "at+jwt"}, {"typ": "jwt"}, {"kid": "any"}, {"x5t": "abc"}, {"nonce": "n"}], ids=repr
)
def test_harmless_header_members_are_ignored(header: dict[str, object]) -> None:
    assert sessions_for().authenticate(bearer(token(header=header)))


@pytest.mark.parametrize("part, most", [("header", MAX_HEADER_CONTAINERS), ("claims", MAX_CLAIMS_CONTAINERS)])
def test_nesting_is_accepted_to_its_limit_and_no_further(part: str, most: int) -> None:
    def nested(levels: int) -> bytes:
        deep: object = 1
        for _ in range(levels - 1):  # the part itself is one
            deep = [deep]
        return token(header={"x": deep}) if part == "header" else token(x=deep)

    assert sessions_for().authenticate(bearer(nested(most)))
    refusal = refusal_of(sessions_for(), nested(most + 1))
    assert (refusal.status, refusal.code) == (403, "invalid_token")


def test_json_white_space_inside_the_parts_is_json() -> None:
    made = assemble(b' { "alg" : "HS256" } ', b"\n" + json.dumps(claims(), indent=2).encode() + b"\n", "HS256")
    assert sessions_for().authenticate(bearer(made))


def test_no_token_is_a_401_that_names_the_scheme() -> None:
    with pytest.raises(Refusal) as refused:
        sessions_for().authenticate([(b"host", b"x"), (b"authorization", b"Basic dXNlcjpwYXNz")])
    assert (refused.value.status, refused.value.code) == (401, "missing_token")
    assert ("www-authenticate", "Bearer") in refused.value.headers


def test_the_cookie_of_the_configuration_is_the_one_that_counts() -> None:
    sessions = sessions_for(cookie="sid")
    assert sessions.authenticate([(b"cookie", b"ai_session_jwt=x; sid=" + token())]).via is Via.COOKIE


@pytest.mark.parametrize(
    "via, ambient", [(Via.COOKIE, True), (Via.OFF, True), (Via.BEARER, False), (Via.API_KEY, False)]
)
def test_authority_that_a_browser_sends_by_itself_is_ambient(via: Via, ambient: bool) -> None:
    session = OFF_SESSION if via is Via.OFF else sessions_for().verify(token(), via)
    assert session.is_ambient is ambient


def test_mode_off_serves_user_0_whatever_is_sent() -> None:
    sessions = Sessions(Auth.model_validate({"mode": "off"}), Secrets(), clock_at_now())
    for headers in ([], bearer(b"garbage"), [(b"cookie", b"ai_session_jwt=a; ai_session_jwt=b")]):
        session = sessions.authenticate(headers)
        assert (session.user_id, session.tenant, session.via) == (0, "default", Via.OFF)
        assert (session.quota_remaining, session.expires_at) == (None, math.inf)


def test_a_remembered_token_still_expires() -> None:
    clock = clock_at_now()
    sessions, made = sessions_for(clock=clock), token(exp=NOW + 60)
    assert sessions.authenticate(bearer(made))
    clock.advance(64.5)
    assert sessions.authenticate(bearer(made)), "within the leeway"
    clock.advance(0.5)
    assert refusal_of(sessions, made).code == "token_expired"


def test_a_remembered_token_waits_for_its_nbf_when_the_clock_is_set_back() -> None:
    clock = clock_at_now()
    sessions, made = sessions_for(clock=clock), token(nbf=NOW)
    assert sessions.authenticate(bearer(made))
    clock.step_wall(-60)
    assert refusal_of(sessions, made).status == 403


@pytest.mark.parametrize("kind, value", [("user", 42), ("user", "42"), ("tenant", "acme"), ("jti", "j-1")])
def test_a_remembered_token_ends_when_it_is_revoked(kind: str, value: int | str) -> None:
    clock = clock_at_now()
    sessions, made = sessions_for(clock=clock), token(tenant="acme", jti="j-1")
    assert sessions.authenticate(bearer(made))
    sessions.revocations.revoke(kind, value, clock.wall())
    for _ in range(2):
        assert refusal_of(sessions, made).code == "token_revoked"


def test_a_token_issued_after_the_revocation_passes() -> None:
    clock = clock_at_now()
    sessions = sessions_for(clock=clock)
    sessions.revocations.revoke("user", 42, clock.wall())
    clock.advance(1)
    assert refusal_of(sessions, token()).code == "token_revoked"
    assert sessions.authenticate(bearer(token(iat=NOW + 1)))


def test_a_verified_token_is_remembered_per_place_it_came_from() -> None:
    sessions, made = sessions_for(), token()
    first = sessions.verify(made, Via.COOKIE)
    assert sessions.verify(made, Via.COOKIE) is first
    assert sessions.verify(made, Via.BEARER).via is Via.BEARER
    assert sessions.verify(made, Via.COOKIE).via is Via.COOKIE


def test_the_memory_of_tokens_is_bounded_and_forgets_the_least_used() -> None:
    sessions = Sessions(auth_for(), secrets_for(), clock_at_now(), cache_entries=3)
    kept, others = token(sub="1"), [token(sub=str(user)) for user in range(2, 6)]
    first = sessions.verify(kept, Via.BEARER)
    for other in others:
        sessions.verify(other, Via.BEARER)
        assert sessions.verify(kept, Via.BEARER) is first
    assert len(sessions._cache) == 3


def test_the_session_prints_no_part_of_its_token() -> None:
    made = token()
    session = sessions_for().verify(made, Via.BEARER)
    assert session.token_key.hex()[:8] not in repr(session)
    assert made.decode()[-12:] not in repr(session)


def test_a_flood_of_forged_tokens_costs_no_signature_where_a_cheap_check_tells() -> None:
    checked: list[bytes] = []

    class CountingKey:
        def verify(self, signing_input: bytes, signature: bytes) -> bool:
            checked.append(signing_input)
            return False

    sessions = sessions_for("ES256")
    sessions._ring.replace([VerifyKey("ES256", "k1", 64, CountingKey())])
    good = token("ES256")
    cheap = [
        token("ES256", exp=NOW - 60),
        token("HS256"),
        token("ES256", header={"kid": "other"}),
        token("ES256", aud=1),
        good.rpartition(b".")[0] + b".AAAA",
        good.rpartition(b".")[0] + b"." + b"A" * 86,
        good + b"=",
    ]
    for forged in cheap:
        assert refusal_of(sessions, forged).status == 403
    assert checked == []
    assert refusal_of(sessions, good).status == 403
    assert len(checked) == 1


def test_a_library_that_raises_is_a_403() -> None:
    class RaisingKey:
        def verify(self, signing_input: bytes, signature: bytes) -> bool:
            raise OverflowError("cannot convert float infinity to integer")

    sessions = sessions_for("ES256")
    sessions._ring.replace([VerifyKey("ES256", "k1", 64, RaisingKey())])
    assert refusal_of(sessions, token("ES256")).status == 403


def test_a_token_of_a_clock_that_is_ahead_begins_when_it_is_first_verified() -> None:
    clock = clock_at_now()
    sessions = sessions_for("HS256", clock=clock)
    made = token("HS256", iat=NOW + 4)
    for _ in range(3):
        assert sessions.authenticate(bearer(made)).issued_at == float(NOW)
        clock.advance(2)
    assert sessions.authenticate(bearer(token("HS256", iat=NOW - 4))).issued_at == NOW - 4
