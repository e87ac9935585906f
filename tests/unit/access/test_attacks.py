"""Every attack of the list against every kind of key: 403, no other exception, bounded cost."""

from __future__ import annotations

import hashlib
import hmac
import random
import time
from base64 import urlsafe_b64decode
from typing import Any

import pytest

from proxyd.access.cookies import Via
from proxyd.errors import Refusal
from tests.unit.access.attacks import ATTACKS, dump, loose_last_character
from tests.unit.access.keys import ALGORITHMS, SECRET, b64, claims, clock_at_now, header_for, sessions_for, token


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_a_403_that_repeats_nothing_of_the_token(name: str, alg: str) -> None:
    sessions = sessions_for(alg)
    attack = ATTACKS[name](alg)
    if name == f"alg {alg}, signed with a key of that kind":
        assert sessions.verify(token(alg), Via.BEARER), "the same token with the right key passes"

    with pytest.raises(Refusal) as refused:
        sessions.verify(attack, Via.BEARER)

    assert refused.value.status == 403
    message = refused.value.message.encode()
    assert all(attack[at : at + 8] not in message for at in range(min(len(attack), 4096) - 8))


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_an_attack_is_the_same_403_through_each_header(name: str, alg: str) -> None:
    attack = ATTACKS[name](alg)
    if attack.strip(b" \t") != attack or b";" in attack or b"=" in attack[:1]:
        attack = b"x" + attack.replace(b";", b"")
    for headers in (
        [(b"authorization", b"Bearer " + attack)],
        [(b"x-api-key", attack)],
        [(b"cookie", b"ai_session_jwt=" + attack)],
    ):
        with pytest.raises(Refusal) as refused:
            sessions_for(alg).authenticate(headers)
        assert refused.value.status == 403


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_the_unchanged_token_behind_the_attacks_passes(alg: str) -> None:
    assert sessions_for(alg).verify(token(alg), Via.BEARER).user_id == 42


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_signatures_have_one_spelling_only(alg: str) -> None:
    good = token(alg)
    with pytest.raises(Refusal) as refused:
        sessions_for(alg).verify(loose_last_character(good, 2), Via.BEARER)
    assert refused.value.status == 403


@pytest.mark.parametrize("alg", ALGORITHMS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"aud": ...}, {"aud": "other"}, {"aud": []}, {"aud": ["other"]}, {"aud": ""}, {"aud": "site "},
        {"aud": "SITE"}, {"aud": "sit"}, {"aud": ["sit", "e"]},
        {"aud": None}, {"aud": {"site": 1}}, {"aud": [["site"]]}, {"aud": ["site", 1]},
        {"iss": ...}, {"iss": "other"}, {"iss": ""}, {"iss": ["issuer"]}, {"iss": "issuer/"}, {"iss": "ISSUER"},
        {"iss": None}, {"iss": {}},
    ],
    ids=repr,
)  # fmt: skip
def test_another_audience_or_issuer_is_a_403(alg: str, wrong: dict[str, Any]) -> None:
    sessions = sessions_for(alg, issuer="issuer", audience="site")
    assert sessions.verify(token(alg, iss="issuer", aud="site"), Via.BEARER)
    assert sessions.verify(token(alg, iss="issuer", aud=["x", "site"]), Via.BEARER)

    with pytest.raises(Refusal) as refused:
        sessions.verify(token(alg, **{"iss": "issuer", "aud": "site", **wrong}), Via.BEARER)

    assert refused.value.status == 403


def test_the_longest_attacks_cost_milliseconds_at_most() -> None:
    sessions = sessions_for("HS256")
    longest = sorted((ATTACKS[name]("HS256") for name in ATTACKS), key=len)[-12:]
    begun = time.thread_time()
    for attack in longest:
        for headers in ([(b"authorization", b"Bearer " + attack)], [(b"cookie", b"ai_session_jwt=" + attack)]):
            with pytest.raises(Refusal):
                sessions.authenticate(headers)
    # 24 refusals, about 20 ms here, raising included; a parser that recursed, backtracked or copied would take seconds
    assert time.thread_time() - begun < 2.0


def test_a_forged_token_is_never_remembered() -> None:
    sessions = sessions_for("HS256", clock_at_now())
    for name in ATTACKS:
        with pytest.raises(Refusal):
            sessions.verify(ATTACKS[name]("HS256"), Via.BEARER)
    assert len(sessions._cache) == 0


@pytest.mark.parametrize("alg", ALGORITHMS)
def test_any_bytes_at_all_raise_nothing_but_a_refusal(alg: str) -> None:
    """Good tokens with a few bytes of header, claims or form changed at random; seeded, so that a failure repeats."""
    dice = random.Random(7)
    sessions = sessions_for(alg)
    good = token(alg, tenant="acme", quota_remaining=5, models=["m"], jti="j", nbf=1, aud="a", iss="i")
    parts = [urlsafe_b64decode(part + b"==") for part in good.split(b".")]
    for _ in range(1500):
        mutated = [bytearray(part) for part in parts]
        for _ in range(dice.randint(1, 3)):
            part = dice.choice(mutated[:2])
            at = dice.randrange(len(part))
            part[at : at + dice.randint(0, 2)] = dice.choice(
                [b'"', b"{", b"[", b"]", b"}", b",", b"0", b"e", b"\xff", b"\\u"]
            )
        forged = b".".join(b64(bytes(part)).encode() for part in mutated)
        if dice.random() < 0.2:
            forged = (
                forged[: dice.randrange(len(forged))]
                + bytes([dice.randrange(256)])
                + forged[dice.randrange(len(forged)) :]
            )
        if forged == good:
            continue  # a byte replaced by itself
        with pytest.raises(Refusal) as refused:
            sessions.verify(forged, Via.BEARER)
        assert refused.value.status == 403


def test_hmac_by_hand_is_what_the_library_signs() -> None:
    signing_input = f"{b64(dump(header_for('HS256')))}.{b64(dump(claims()))}".encode()
    by_hand = signing_input + b"." + b64(hmac.digest(SECRET, signing_input, hashlib.sha256)).encode()
    assert sessions_for("HS256").verify(by_hand, Via.BEARER).user_id == 42
