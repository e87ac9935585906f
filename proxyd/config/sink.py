"""The shape of `telemetry.sink`: which URLs name a database, told without ever repeating one.

Owns: what a sink may look like and whether it holds a password. Must not know: databases (store/sink.py and
store/mysql_address.py take the URL apart for use), other options.
Invariant: no message holds any part of the value but its scheme: a password with an unescaped character may stand
anywhere in it.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from proxyd.config.values import refuse

_SQLITE = 'write "sqlite:////var/lib/proxyd/telemetry.db" (four slashes before an absolute path)'
_MYSQL = 'write "mysql://user@host:3306/database" or "mysql:///database?unix_socket=/run/mysqld/mysqld.sock"'
_ESCAPE = "write these characters of a user or password as %XX: @ is %40, : %3A, / %2F, ? %3F, # %23, % %25"


def sink_url(value: Any) -> str:
    """Where telemetry rows go: an SQLite file or a MySQL database."""
    if not isinstance(value, str):
        refuse("must be a URL in a string", _SQLITE)
    if value.startswith("mysql:"):
        _check_mysql(value)
    elif not value.startswith("sqlite:///") or not value.removeprefix("sqlite:///") or "\0" in value:
        refuse("is not a sink that this version knows (its value is not shown)", f"{_SQLITE}, or a mysql:// URL")
    return value


def is_mysql(sink: str) -> bool:
    """True when the sink is a MySQL or MariaDB database."""
    return sink.startswith("mysql:")


def has_password(sink: str) -> bool:
    """True when a sink of good shape holds a password itself."""
    return is_mysql(sink) and bool(urlsplit(sink).password)


def ca_file(sink: str) -> str:
    """The certificates that a sink of good shape wants its server's to be checked with, or ""."""
    return dict(parse_qsl(urlsplit(sink).query)).get("ssl_ca", "") if is_mysql(sink) else ""


def _check_options(query: str, *, has_host: bool) -> None:
    """A host, with ssl_ca or without, or a unix_socket."""
    options = parse_qsl(query, keep_blank_values=True)
    names = [name for name, _ in options]
    if query and names not in (["unix_socket"], ["ssl_ca"]):
        refuse("has another option than unix_socket or ssl_ca, one of them and once (not shown)", _MYSQL)
    if "unix_socket" in names and has_host:
        refuse("names a host and a unix_socket", "keep one of them")
    if "unix_socket" not in names and not has_host:
        refuse("names neither a host nor a unix_socket", _MYSQL)
    if options and not options[0][1].startswith("/"):
        refuse(f"the path of its {names[0]} is not absolute", _MYSQL)


def _check_mysql(value: str) -> None:
    """Refuses what is no mysql:// URL; says which part is at fault and never what stands there."""
    if re.search(r"[^!-~]", value):
        refuse("holds a space, a control or a non-ASCII character (not shown)", "write such characters as %XX")
    if not value.startswith("mysql://"):
        refuse("is not a mysql:// URL (its value is not shown)", _MYSQL)
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        refuse("its host or port cannot be read (not shown)", f"{_MYSQL}; {_ESCAPE}")
    if "#" in value or parts.netloc.count("@") > 1 or re.search(r"%(?![0-9A-Fa-f]{2})", value):
        refuse("holds #, @ or % where they mean something else (not shown)", _ESCAPE)
    if port == 0:
        refuse("port 0 cannot be connected to", _MYSQL)
    if any(char in unquote(value, errors="replace") for char in ("\0", "\ufffd")):
        refuse("holds %00, or an %XX that is not UTF-8 (not shown)", _ESCAPE)
    database = unquote(parts.path[1:])
    if not database or "/" in database or "@" in value[len("mysql://") + len(parts.netloc) :]:
        refuse("names no database, or more than one (not shown)", f"{_MYSQL}; {_ESCAPE}")
    if len(database) > 64:
        refuse("names a database of more than 64 characters", _MYSQL)
    _check_options(parts.query, has_host=bool(host) or port is not None)
    if host and not parts.username:
        refuse("names no user", _MYSQL)
