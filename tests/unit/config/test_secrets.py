"""Secrets: where they come from, who may read them, and that they are never printed."""

import errno
import json
import os
import pickle

import orjson
import pytest

from proxyd.config.load import parse
from proxyd.config.secrets import Secret, resolve, resolve_password
from tests.unit.config.texts import ENVIRON, MODEL, SECRET, UPSTREAM, valid

RSA = {"kty": "RSA", "n": "AQAB", "e": "AQAB"}
EC = {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"}


def with_auth(auth: str, upstream: str = UPSTREAM):
    config, findings = parse(f"[auth]\n{auth}\n" + upstream + MODEL, "F", {})
    assert config is not None, findings
    return config


def keep(path, value, mode=0o600):
    path.write_bytes(value)
    path.chmod(mode)
    return path


def errors(config, environ=ENVIRON):
    secrets, findings = resolve(config, environ)
    assert secrets is None
    return [finding for finding in findings if finding.severity == "error"]


def test_a_secret_prints_as_stars_everywhere():
    secret = Secret(b"hush")
    assert [str(secret), repr(secret), f"{secret}", f"{secret!r}", str([secret])] == ["***"] * 4 + ["[***]"]
    assert orjson.dumps({"a": secret}, default=str) == b'{"a":"***"}'
    assert secret.reveal() == b"hush"
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_secrets_print_as_stars_together(tmp_path):
    config = with_auth('secret_env = "JWT"', UPSTREAM + 'api_key_env = "KEY"\n')
    secrets, _ = resolve(config, ENVIRON)
    assert secrets is not None
    assert SECRET not in repr(secrets)
    assert "sk-test" not in repr(secrets)
    assert secrets.jwt == Secret(SECRET.encode())
    assert secrets.upstream_keys == {"a": (Secret(b"sk-test"),)}


def test_a_file_loses_its_line_end_and_nothing_else(tmp_path):
    for tail in (b"", b"\n", b"\r\n"):
        path = keep(tmp_path / "s", b" " + SECRET.encode() + b" \n" + tail)
        secrets, findings = resolve(with_auth(f'secret_file = "{path}"'), {})
        assert findings == []
        expected = b" " + SECRET.encode() + b" \n"
        assert secrets.jwt == Secret(expected if tail else expected[:-1])


def test_several_keys_are_kept_in_order(tmp_path):
    first, second = keep(tmp_path / "1", b"sk-1\n"), keep(tmp_path / "2", b"sk-2")
    config = with_auth('secret_env = "JWT"', UPSTREAM + f'api_key_file = ["{first}", "{second}"]\n')
    secrets, _ = resolve(config, ENVIRON)
    assert secrets.upstream_keys["a"] == (Secret(b"sk-1"), Secret(b"sk-2"))


def test_an_upstream_without_a_key_has_none():
    secrets, _ = resolve(with_auth('secret_env = "JWT"'), ENVIRON)
    assert secrets.upstream_keys == {}


def test_with_auth_off_no_secret_is_read():
    secrets, findings = resolve(with_auth('mode = "off"'), {})
    assert findings == []
    assert secrets.jwt is None


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o666, 0o602, 0o601])
def test_a_file_that_others_may_open_is_an_error(tmp_path, mode):
    path = keep(tmp_path / "s", SECRET.encode(), mode)
    found = errors(with_auth(f'secret_file = "{path}"'))
    assert [(finding.key, finding.line) for finding in found] == [("auth.secret_file", 2)]
    assert f"mode {mode:04o}" in found[0].message
    assert found[0].remedy == f"chmod 0600 {path}"


@pytest.mark.parametrize("mode", [0o640, 0o660])
def test_a_file_that_its_group_may_open_is_a_warning(tmp_path, mode):
    path = keep(tmp_path / "s", SECRET.encode(), mode)
    secrets, findings = resolve(with_auth(f'secret_file = "{path}"'), {})
    assert secrets is not None
    assert [(finding.severity, finding.key) for finding in findings] == [("warning", "auth.secret_file")]


def test_a_systemd_credential_goes_before_the_file_and_keeps_its_own_mode(tmp_path):
    keep(tmp_path / "jwt.secret", b"credential" + SECRET.encode(), 0o444)
    config = with_auth('secret_file = "/etc/proxyd/jwt.secret"')
    secrets, findings = resolve(config, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert findings == []
    assert secrets.jwt == Secret(b"credential" + SECRET.encode())


def test_without_a_credential_of_its_name_the_file_is_read(tmp_path):
    path = keep(tmp_path / "s", SECRET.encode())
    (tmp_path / "credentials").mkdir()
    secrets, _ = resolve(with_auth(f'secret_file = "{path}"'), {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")})
    assert secrets.jwt == Secret(SECRET.encode())


@pytest.mark.parametrize("blank", [b"", b"\n"])
def test_a_blank_credential_stands_for_a_file_that_systemd_did_not_find(tmp_path, blank):
    (tmp_path / "credentials").mkdir()
    keep(tmp_path / "credentials" / "s", blank)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    config = with_auth(f'secret_file = "{tmp_path}/s"')
    (found,) = errors(config, environ)
    assert f"cannot read {tmp_path}/s: No such file" in found.message
    keep(tmp_path / "s", SECRET.encode())
    assert resolve(config, environ)[0].jwt == Secret(SECRET.encode())


def test_a_file_whose_credential_is_blank_and_that_is_roots_was_empty_when_systemd_read_it(tmp_path, monkeypatch):
    (tmp_path / "credentials").mkdir()
    keep(tmp_path / "credentials" / "s", b"\n")
    monkeypatch.setattr(os, "open", _refuse)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    (blank,) = errors(with_auth('secret_file = "/etc/proxyd/s"'), environ)
    assert "the credential s, it was missing or empty" in blank.remedy
    assert "restart" in blank.remedy
    (unnamed,) = errors(with_auth('secret_file = "/etc/proxyd/other"'), environ)
    assert "LoadCredential=other:/etc/proxyd/other" in unnamed.remedy


def test_a_credential_of_one_letter_is_not_blank(tmp_path):
    keep(tmp_path / "key", b"k")
    config = with_auth('secret_env = "JWT"', UPSTREAM + 'api_key_file = "/etc/proxyd/key"\n')
    secrets, _ = resolve(config, {"CREDENTIALS_DIRECTORY": str(tmp_path), "JWT": SECRET})
    assert secrets.upstream_keys == {"a": (Secret(b"k"),)}


def _refuse(path, *_):
    raise PermissionError(errno.EACCES, "Permission denied", path)


def test_one_credential_does_not_stand_for_two_files(tmp_path):
    keep(tmp_path / "key", SECRET.encode())
    config = with_auth('secret_file = "/a/key"', UPSTREAM + 'api_key_file = "/b/key"\n')
    found = errors(config, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert [finding.key for finding in found] == ["upstream[0].api_key_file"]
    assert "different names" in found[0].remedy


@pytest.mark.parametrize("length, is_enough", [(31, False), (32, True)])
def test_a_short_secret_is_an_error(length, is_enough):
    secrets, findings = resolve(with_auth('secret_env = "JWT"'), {"JWT": "x" * length})
    assert (secrets is not None) == is_enough
    assert all("x" * 31 not in finding.text() for finding in findings)


def test_an_unset_or_empty_variable_is_an_error():
    for environ in ({}, {"JWT": ""}):
        assert "JWT is not set" in errors(with_auth('secret_env = "JWT"'), environ)[0].message


def test_what_is_no_readable_file_is_an_error(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir()
    keep(tmp_path / "empty", b"\n")
    keep(tmp_path / "large", b"x" * (256 * 1024 + 1))
    reasons = {
        "fifo": "not a regular file",
        "directory": "",
        "empty": "is empty",
        "large": "larger",
        "none": "No such file",
    }
    for name, reason in reasons.items():
        found = errors(with_auth(f'secret_file = "{tmp_path / name}"'))
        assert len(found) == 1
        assert reason in found[0].message


@pytest.mark.parametrize("value", [b"sk a", b"sk\nx-evil: 1", b"sk\r", b"sk\xff", b"\x00"])
def test_a_key_that_would_break_a_header_is_an_error(tmp_path, value):
    path = keep(tmp_path / "k", value)
    found = errors(with_auth('secret_env = "JWT"', UPSTREAM + f'api_key_file = "{path}"\n'))
    assert [finding.key for finding in found] == ["upstream[0].api_key_file"]
    assert "sk" not in found[0].message


def test_every_secret_is_looked_at_even_when_the_first_is_bad(tmp_path):
    config = with_auth('secret_file = "/none/1"', UPSTREAM + 'api_key_file = ["/none/2", "/none/3"]\n')
    assert [finding.message.split(":")[0] for finding in errors(config)] == [
        f"cannot read /none/{i}" for i in (1, 2, 3)
    ]


def test_a_key_set_may_be_public(tmp_path):
    path = keep(tmp_path / "jwks", json.dumps({"keys": [RSA, EC]}).encode(), 0o644)
    secrets, findings = resolve(with_auth(f'algorithms = ["RS256", "ES256"]\njwks_file = "{path}"'), {})
    assert findings == []
    assert secrets.jwks == {"keys": [RSA, EC]}
    assert secrets.jwt is None


@pytest.mark.parametrize(
    "document, reason",
    [
        ("{", "not JSON"),
        ("[]", "holds no keys"),
        ('{"keys": []}', "holds no keys"),
        ('{"keys": [3]}', "holds no keys"),
        (json.dumps({"keys": [EC]}), "no key for RS256"),
        (json.dumps({"keys": [RSA | {"d": "AA"}]}), "private"),
        (json.dumps({"keys": [RSA, {"kty": "oct", "k": "AA"}]}), "private"),
    ],
)
def test_a_key_set_that_cannot_serve_is_an_error(tmp_path, document, reason):
    path = keep(tmp_path / "jwks", document.encode())
    found = errors(with_auth(f'algorithms = ["RS256"]\njwks_file = "{path}"'))
    assert reason in found[0].message


def test_a_password_is_read_for_the_store(tmp_path):
    path = keep(tmp_path / "p", b"pw \n")
    for how in (resolve, resolve_password):
        secrets, findings = how(with_password(path), {})
        assert findings == []
        assert secrets.telemetry_password == Secret(b"pw ")


def with_password(path, sink="mysql://u@h/d"):
    text = f'[telemetry]\nsink = "{sink}"\npassword_file = "{path}"\n'
    return valid('[auth]\nmode = "off"\n' + UPSTREAM + MODEL + text)


def test_a_password_comes_as_a_credential_of_systemd(tmp_path):
    (tmp_path / "credentials").mkdir()
    keep(tmp_path / "credentials" / "mysql.password", b"from systemd")
    config = with_password("/nonexistent/mysql.password")
    secrets, findings = resolve_password(config, {"CREDENTIALS_DIRECTORY": f"{tmp_path}/credentials"})
    assert findings == []
    assert secrets.telemetry_password == Secret(b"from systemd")


def test_a_password_that_every_user_may_read_is_an_error_and_one_for_the_group_a_warning(tmp_path):
    path = keep(tmp_path / "p", b"hush", 0o644)
    (found,) = errors(with_password(path))
    assert (found.key, found.remedy) == ("telemetry.password_file", f"chmod 0600 {path}")
    path.chmod(0o640)
    secrets, (warning,) = resolve(with_password(path), {})
    assert (secrets.telemetry_password, warning.severity) == (Secret(b"hush"), "warning")


@pytest.mark.parametrize("value", [b"", b"\n", b"one\ntwo\n", b"a\0b", b"two\xff"])
def test_a_password_is_one_line_of_text(tmp_path, value):
    (found,) = errors(with_password(keep(tmp_path / "p", value)))
    assert "two" not in found.text()


def test_no_password_is_read_for_a_store_that_has_none(tmp_path):
    secrets, findings = resolve(with_password(tmp_path / "missing", "sqlite:////x.db"), {})
    assert (secrets.telemetry_password, findings) == (None, [])
