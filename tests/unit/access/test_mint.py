"""Minting: a token of ours is accepted by ourselves, and the command prints nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from proxyd.access.cookies import Via
from proxyd.access.mint import MintError, mint
from proxyd.access.session import Sessions
from proxyd.cli.main import main
from proxyd.clock import SYSTEM
from proxyd.config.secrets import Secret, Secrets
from tests.unit.access.keys import NOW, SECRET, auth_for, clock_at_now, secrets_for, sessions_for


def test_a_minted_token_is_accepted_with_all_it_says() -> None:
    clock = clock_at_now()
    auth = auth_for(issuer="https://site.example", audience="proxyd")
    made = mint(auth, secrets_for(), 7, "acme", 500, 60.0, clock=clock, models=["m"])
    session = Sessions(auth, secrets_for(), clock).verify(made.encode(), Via.BEARER)
    assert (session.user_id, session.tenant, session.quota_remaining, session.models) == (
        7,
        "acme",
        500,
        frozenset({"m"}),
    )
    assert (session.issued_at, session.expires_at) == (float(NOW), float(NOW + 60))
    assert session.jti is not None
    assert len(session.jti) == 32


def test_every_token_has_its_own_id_and_no_quota_unless_one_is_given() -> None:
    clock = clock_at_now()
    made = [mint(auth_for(), secrets_for(), 7, "default", None, 60, clock=clock).encode() for _ in range(2)]
    sessions = [sessions_for(clock=clock).verify(token, Via.BEARER) for token in made]
    assert sessions[0].jti != sessions[1].jti
    assert sessions[0].quota_remaining is None


@pytest.mark.parametrize(
    "change, why",
    [
        ({"alg": "RS256"}, "JWKS"), ({"user": -1}, "user"), ({"user": 2**64}, "user"), ({"tenant": ""}, "tenant"),
        ({"tenant": "a b"}, "tenant"),
        ({"quota": 2**70}, "quota"), ({"ttl": 0}, "lifetime"), ({"ttl": -5}, "lifetime"), ({"ttl": math.inf},
        "lifetime"), ({"ttl": math.nan}, "lifetime"),
        ({"secret": b"short"}, "32"),
    ],
    ids=repr,
)  # fmt: skip
def test_what_would_be_refused_is_not_minted(change: dict[str, Any], why: str) -> None:
    asked: dict[str, Any] = {"alg": "HS256", "user": 7, "tenant": "default", "quota": 5, "ttl": 60.0, **change}
    secrets = Secrets(jwt=Secret(asked["secret"])) if "secret" in asked else secrets_for(asked["alg"])
    with pytest.raises(MintError, match=why):
        mint(auth_for(asked["alg"]), secrets, asked["user"], asked["tenant"], asked["quota"], asked["ttl"])


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    secret = tmp_path / "jwt.secret"
    secret.write_bytes(SECRET + b"\n")
    secret.chmod(0o600)
    key = tmp_path / "key"
    key.write_text("sk-test\n")
    key.chmod(0o600)
    file = tmp_path / "proxyd.toml"
    file.write_text(
        f'[auth]\nsecret_file = "{secret}"\n'
        f'[[upstream]]\nname = "u"\ndialect = "openai"\nurl = "http://127.0.0.1:9/v1"\napi_key_file = "{key}"\n'
        '[[model]]\nname = "m"\nid = 1\nupstreams = ["u"]\n'
    )
    return file


def test_the_command_prints_the_token_alone(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["token", "-c", str(config_file), "--user", "7", "--tenant", "acme", "--quota", "100", "--ttl", "2m"])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert printed.out.endswith("\n")
    session = Sessions(auth_for(), secrets_for(), SYSTEM).verify(printed.out.strip().encode(), Via.BEARER)
    assert (session.user_id, session.tenant, session.quota_remaining) == (7, "acme", 100)
    assert session.issued_at is not None
    assert session.expires_at - session.issued_at == 120


def test_the_command_says_what_is_wrong_without_a_secret(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = config_file.parent / "missing.toml"
    assert main(["token", "-c", str(missing), "--user", "7"]) == 2
    assert str(missing) in capsys.readouterr().err
    assert main(["token", "-c", str(config_file), "--user", "7", "--tenant", "a b"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert SECRET.decode() not in printed.err
    (config_file.parent / "jwt.secret").write_bytes(b"short")
    assert main(["token", "-c", str(config_file), "--user", "7"]) == 1
    printed = capsys.readouterr()
    assert "secret" in printed.err
    assert "short\n" not in printed.err


@pytest.mark.parametrize(
    "arguments",
    [[], ["--user", "x"], ["--user", "1", "--ttl", "60"], ["--user", "1", "--quota", "many"], ["--user", "-1"]],
)
def test_arguments_that_are_not_understood_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["token", *arguments])
    assert ended.value.code == 2
