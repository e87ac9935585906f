"""Secrets: where they are read from, who else may read them, and a wrapper that does not print them.

Owns: the order systemd credential, file, environment; the checks of permissions and strength. Must not know: what the
secrets are used for. Reads files and nothing else of the host.
Invariants: no finding and no `repr` ever holds a secret's value; a secret is bytes as they stand in the file, minus the
line end that editors add.

Order for an option `*_file`: $CREDENTIALS_DIRECTORY/<file name of the option's path> (systemd LoadCredential=, which
protects it itself) unless it is blank, then the path. An option `*_env` names a variable.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.sink import is_mysql
from proxyd.errors import Finding

# HS256 wants a key as long as its hash: RFC 7518, section 3.2. Shorter ones are searched offline from a single token.
MIN_HMAC_BYTES = 32
# A secret is a line, a key set a page. Half: no sane file is refused either; twice: a wrong path (a log) is read whole.
MAX_SECRET_BYTES = 256 * 1024
_KEY_TYPE = {"RS256": "RSA", "ES256": "EC"}


class Secret:
    """Bytes that print as "***" wherever they land: logs, tracebacks, f-strings, JSON defaults."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The value, for the one place that needs it."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")


@dataclass(frozen=True, slots=True)
class Secrets:
    """Every secret of a configuration. Absent ones are None or missing, never empty."""

    jwt: Secret | None = None
    jwks: dict[str, Any] | None = None
    upstream_keys: dict[str, tuple[Secret, ...]] = field(default_factory=dict)
    telemetry_password: Secret | None = None


def resolve(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[Secrets | None, list[Finding]]:
    """Reads them all; None when any finding is an error. All findings at once."""
    reader = _Reader(config, environ)
    secrets = Secrets(
        jwt=reader.hmac_secret(),
        jwks=reader.key_set(),
        upstream_keys=reader.upstream_keys(),
        telemetry_password=reader.password(),
    )
    failed = any(finding.severity == "error" for finding in reader.findings)
    return (None if failed else secrets), reader.findings


def resolve_hmac(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[Secrets | None, list[Finding]]:
    """The secret of session tokens alone: no other file is opened."""
    reader = _Reader(config, environ)
    secrets = Secrets(jwt=reader.hmac_secret())
    failed = any(finding.severity == "error" for finding in reader.findings)
    return (None if failed else secrets), reader.findings


def resolve_password(config: Config, environ: Mapping[str, str] = os.environ) -> tuple[Secrets | None, list[Finding]]:
    """The database's password alone: no other file is opened."""
    reader = _Reader(config, environ)
    secrets = Secrets(telemetry_password=reader.password())
    failed = any(finding.severity == "error" for finding in reader.findings)
    return (None if failed else secrets), reader.findings


class _Reader:
    """Collects findings while it reads."""

    def __init__(self, config: Config, environ: Mapping[str, str]) -> None:
        self.config = config
        self.environ = environ
        self.findings: list[Finding] = []
        self.credentials: dict[str, str] = {}  # credential name -> the path it stands for
        self.blank: set[str] = set()  # names of credentials with nothing in them

    def find(self, severity: Literal["error", "warning"], key: KeyPath, message: str, remedy: str) -> None:
        line, name = self.config.line_of(*key), self.config.name_of(*key)
        finding = Finding(severity, self.config.file, line, key_text(key), message, remedy, name)
        if finding not in self.findings:
            self.findings.append(finding)

    def error(self, key: KeyPath, message: str, remedy: str) -> None:
        self.find("error", key, message, remedy)

    def hmac_secret(self) -> Secret | None:
        auth = self.config.auth
        if auth.mode == "off" or not all(name.startswith("HS") for name in auth.algorithms):
            return None
        key: KeyPath = ("auth", "secret_env") if auth.secret_env else ("auth", "secret_file")
        value = self.variable(key, auth.secret_env) if auth.secret_env else self.file(key, auth.secret_file)
        if value is None:
            return None
        if len(value) < MIN_HMAC_BYTES:
            self.error(
                key,
                f"the secret has {len(value)} bytes, at least {MIN_HMAC_BYTES} are needed",
                "make one: openssl rand -base64 48",
            )
            return None
        return Secret(value)

    def key_set(self) -> dict[str, Any] | None:
        auth = self.config.auth
        if auth.mode == "off" or not auth.jwks_file or any(name.startswith("HS") for name in auth.algorithms):
            return None
        key: KeyPath = ("auth", "jwks_file")
        data = self.file(key, auth.jwks_file, is_public=True)
        if data is None:
            return None
        remedy = 'it must be a JWK set with public keys: {"keys": [{"kty": "RSA", "n": ..., "e": ...}]}'
        try:
            document = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.error(key, f"{auth.jwks_file} is not JSON", remedy)
            return None
        keys = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(keys, list) or not keys or not all(isinstance(one, dict) for one in keys):
            self.error(key, f"{auth.jwks_file} holds no keys", remedy)
            return None
        if any("d" in one or "k" in one for one in keys):
            self.error(key, f"{auth.jwks_file} holds a private or symmetric key", "publish only the public members")
            return None
        for algorithm in auth.algorithms:
            if not any(one.get("kty") == _KEY_TYPE[algorithm] for one in keys):
                self.error(key, f"{auth.jwks_file} holds no key for {algorithm}", "add one, or drop the algorithm")
                return None
        return {"keys": keys}

    def upstream_keys(self) -> dict[str, tuple[Secret, ...]]:
        found: dict[str, tuple[Secret, ...]] = {}
        for index, upstream in enumerate(self.config.upstream):
            values: list[Secret] = []
            by_file: KeyPath = ("upstream", index, "api_key_file")
            by_env: KeyPath = ("upstream", index, "api_key_env")
            for path in upstream.api_key_file:
                self.keep_api_key(by_file, self.file(by_file, path), values)
            for name in upstream.api_key_env:
                self.keep_api_key(by_env, self.variable(by_env, name), values)
            if values:
                found[upstream.name] = tuple(values)
        return found

    def keep_api_key(self, key: KeyPath, value: bytes | None, into: list[Secret]) -> None:
        if value is None:
            return
        # It becomes a header value: anything but visible ASCII would be another header, or none (RFC 9110, 5.5).
        if not all(0x21 <= byte <= 0x7E for byte in value):
            self.error(key, "the key holds a space, a line end or a non-ASCII byte", "one key a file, on one line")
            return
        into.append(Secret(value))

    def password(self) -> Secret | None:
        telemetry = self.config.telemetry
        if not telemetry.password_file or not is_mysql(telemetry.sink):
            return None
        key: KeyPath = ("telemetry", "password_file")
        value = self.file(key, telemetry.password_file)
        if value is None:
            return None
        if b"\n" in value or b"\0" in value:
            message = f"{telemetry.password_file} holds more than one line, or a NUL"
            self.error(key, message, "one password, on one line")
            return None
        try:
            value.decode()
        except UnicodeDecodeError:
            self.error(key, f"{telemetry.password_file} is not UTF-8", "save it as UTF-8")
            return None
        return Secret(value)

    def variable(self, key: KeyPath, name: str) -> bytes | None:
        value = self.environ.get(name, "")
        if not value:
            self.error(key, f"the environment variable {name} is not set", f"set {name}, or name a file instead")
            return None
        return os.fsencode(value)

    def file(self, key: KeyPath, path: str, *, is_public: bool = False) -> bytes | None:
        """The bytes of a secret file without the line end; None with a finding when there are none to be had."""
        if not path:
            return None
        credential = self.credential(key, path)
        source = credential or path
        try:
            # O_NONBLOCK: a FIFO at this path must not hold the start for ever.
            fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            remedy = {
                errno.ENOENT: "create it, or correct the path",
                errno.EACCES: self.how_to_be_let_in(path),
            }.get(error.errno or 0, "correct the path")
            self.error(key, f"cannot read {source}: {error.strerror}", remedy)
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                self.error(key, f"{source} is not a regular file", "name the file that holds the secret")
                return None
            if credential is None and not is_public and not self.is_private(key, source, status):
                return None
            data = os.read(fd, MAX_SECRET_BYTES + 1)
        except OSError as error:
            self.error(key, f"cannot read {source}: {error.strerror}", "check the file system")
            return None
        finally:
            os.close(fd)
        if len(data) > MAX_SECRET_BYTES:
            self.error(key, f"{source} is larger than {MAX_SECRET_BYTES} bytes", "name the file that holds the secret")
            return None
        data = data.removesuffix(b"\r\n" if data.endswith(b"\r\n") else b"\n")
        if not data:
            self.error(key, f"{source} is empty", "write the secret into it")
            return None
        return data

    def how_to_be_let_in(self, path: str) -> str:
        name = os.path.basename(path)
        if name in self.blank:
            return f"when systemd read it for the credential {name}, it was missing or empty: correct it, then restart"
        if self.environ.get("CREDENTIALS_DIRECTORY"):
            line = f"LoadCredential={name}:{path}"
            return f"the unit needs the line {line}, and a restart: systemd reads credentials at the start"
        return f"ask as root, or as the user whose it is (this is uid {os.geteuid()}), or correct its owner"

    def credential(self, key: KeyPath, path: str) -> str | None:
        """The systemd credential that stands for `path`, if the service manager passed one."""
        directory = self.environ.get("CREDENTIALS_DIRECTORY", "")
        name = os.path.basename(path)
        candidate = os.path.join(directory, name)
        if not directory or not name:
            return None
        try:
            # A line end alone is what the unit's SetCredential= puts in the place of a file that is missing.
            size = os.stat(candidate).st_size
            if size == 0 or (size == 1 and _first_byte(candidate) == b"\n"):
                self.blank.add(name)
                return None
        except OSError:
            return None
        taken = self.credentials.setdefault(name, path)
        if taken != path:
            self.error(key, f"the credential {name} would stand for {taken} as well", "give the files different names")
        return candidate

    def is_private(self, key: KeyPath, path: str, status: os.stat_result) -> bool:
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o007:
            self.error(key, f"{path} is open to every user (mode {mode:04o})", f"chmod 0600 {path}")
            return False
        if mode & 0o070:
            self.find("warning", key, f"{path} is open to its group (mode {mode:04o})", f"chmod 0600 {path}")
        if status.st_uid not in (0, os.geteuid()):
            self.find("warning", key, f"{path} belongs to another user (uid {status.st_uid})", f"chown root {path}")
        return True


def _first_byte(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(1)


def key_text(path: KeyPath) -> str:
    """("upstream", 0, "url") as upstream[0].url."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
