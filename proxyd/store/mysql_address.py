"""Where a MySQL or MariaDB database is: a mysql:// URL taken apart.

Owns: the URL's meaning, and the name by which messages call the database. Must not know: drivers' connections.
Invariant: no error and no text of an address holds any part of a password.

  mysql://user:password@host:3306/database
  mysql://user@[2001:db8::1]/database?ssl_ca=/path/ca.pem      TLS, the server's certificate checked
  mysql:///database?unix_socket=/run/mysqld/mysqld.sock        as the user that runs proxyd
"""

from __future__ import annotations

import getpass
import ssl
from dataclasses import dataclass, field
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

from proxyd.config.secrets import Secret
from proxyd.store.schema import StoreError

DEFAULT_PORT = 3306
_HINT = 'write "mysql://user@host:3306/database" or "mysql:///database?unix_socket=/path"; special characters as %XX'


def _refuse(complaint: str) -> NoReturn:
    raise StoreError(f"telemetry.sink: {complaint}; {_HINT}")


@dataclass(frozen=True, slots=True)
class MysqlAddress:
    """One database. `host` is "" when `unix_socket` is used."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    unix_socket: str = ""
    ssl_ca: str = ""

    @classmethod
    def parse(cls, sink: str, password: Secret | None = None) -> MysqlAddress:
        """Raises StoreError. `password` is used when the URL holds none; both at once are refused."""
        if not sink.startswith("mysql://"):
            _refuse("not a mysql:// URL")
        if any(not "!" <= char <= "~" for char in sink):
            _refuse("holds a space, a control or a non-ASCII character")
        try:
            parts = urlsplit(sink)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            _refuse("its host or port cannot be read")
        if parts.fragment or parts.netloc.count("@") > 1:
            _refuse("holds @ or # where they mean something else")
        options = _options(parts.query)
        unix_socket = options.get("unix_socket", "")
        database = _plain("database", parts.path[1:])
        if not database or "/" in database or len(database) > 64:
            _refuse("names no database, more than one, or one of more than 64 characters")
        if bool(host) == bool(unix_socket):
            _refuse("names both a host and a unix_socket" if host else "names neither a host nor a unix_socket")
        if port == 0 or (port is not None and unix_socket):
            _refuse("port 0 cannot be connected to" if port == 0 else "names both a port and a unix_socket")
        user = _plain("user", parts.username or "")
        if host and not user:
            _refuse("names no user")
        secret = _plain("password", parts.password or "")
        if password is not None:
            if secret:
                _refuse("holds a password, and telemetry.password_file gives one too")
            secret = _decoded(password)
        return cls(
            host, port or DEFAULT_PORT, user or _own_name(), secret, database, unix_socket, options.get("ssl_ca", "")
        )

    def __str__(self) -> str:
        """For messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        place = self.unix_socket or f"{host}:{self.port}"
        return f"mysql {self.user}@{place}/{self.database}"

    def arguments(self) -> dict[str, Any]:
        """What PyMySQL and aiomysql both take; the database's name is not among it, for they call it differently.
        Raises StoreError when `ssl_ca` cannot be read."""
        chosen: dict[str, Any] = {
            "user": self.user, "password": self.password, "charset": "utf8mb4",
            "program_name": "proxyd", "ssl": self._context(),
        }  # fmt: skip
        if self.unix_socket:
            chosen["unix_socket"] = self.unix_socket
        else:
            chosen |= {"host": self.host, "port": self.port}
        return chosen

    def _context(self) -> ssl.SSLContext | None:
        if not self.ssl_ca:
            return None
        try:
            return ssl.create_default_context(cafile=self.ssl_ca)
        except (OSError, ssl.SSLError) as error:
            raise StoreError(f"{self}: ssl_ca={self.ssl_ca}: {error.strerror or error}") from error


def _options(query: str) -> dict[str, str]:
    """unix_socket and ssl_ca, each an absolute path and given once."""
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ("unix_socket", "ssl_ca"):
            _refuse("has an option other than unix_socket and ssl_ca")
        if name in found or not value.startswith("/") or "\0" in value:
            _refuse(f"its {name} is given twice or is not an absolute path")
        found[name] = value
    if len(found) == 2:
        _refuse("names both a unix_socket and an ssl_ca; a socket needs no TLS")
    return found


def _plain(part: str, text: str) -> str:
    """The part with its %XX resolved."""
    plain = unquote(text, errors="replace")
    if "\0" in plain or "\ufffd" in plain:
        _refuse(f"its {part} holds %00 or is not UTF-8")
    return plain


def _decoded(password: Secret) -> str:
    try:
        return password.reveal().decode()
    except UnicodeDecodeError:
        raise StoreError("telemetry.password_file: the password is not UTF-8") from None


def _own_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        _refuse("names no user, and the user that runs proxyd has no name")
