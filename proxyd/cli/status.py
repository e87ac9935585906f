"""`proxyd status`: the running daemon's state, asked over its admin listener.

Owns the request and its failures. Must not know what the numbers mean; the words for people are board.py's. Of the
file it needs `server.admin` alone: the daemon that runs may have been started with another text. Exit codes: 0 shown,
1 the daemon does not answer or `server.admin` is wrong, 2 the file cannot be read.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

import orjson

from proxyd.cli.board import blocks
from proxyd.cli.grid import fit, plain
from proxyd.cli.output import fail, put
from proxyd.cli.part import read_part
from proxyd.config.values import Listen

WHO = "proxyd status"
TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path, self._timeout_s = path, timeout_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self._timeout_s)
        self.sock.connect(self._path)


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the state on stdout; messages go to stderr."""
    admin = find_admin(WHO, args.config, environ)
    if isinstance(admin, int):
        return admin
    try:
        answer = fetch(admin)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return fail(WHO, 1, why_not(admin, error))
    if getattr(args, "json", False):
        return put(WHO, orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode())
    if is_terminal(environ):
        from proxyd.cli.screen import show  # here, for a pipe needs none of it

        return show(WHO, lambda width: fit(blocks(answer, width), None))
    return put(WHO, page(answer))


def find_admin(who: str, path: str, environ: Mapping[str, str]) -> Listen | int:
    """Where the daemon of this file answers; the exit code after saying why nobody knows."""
    part = read_part(who, path, {"server": ("admin",)}, environ)
    return part if isinstance(part, int) else part.config.server.admin


def is_terminal(environ: Mapping[str, str]) -> bool:
    """True when stdout shows colours and can be written anew."""
    return sys.stdout is not None and sys.stdout.isatty() and environ.get("TERM", "dumb") != "dumb"


def why_not(admin: Listen, error: Exception) -> str:
    """Why there is no answer, and what to do."""
    if isinstance(error, FileNotFoundError | ConnectionRefusedError):
        return f"not running: nothing listens on {admin.text}; is this the daemon's file? -c FILE"
    if isinstance(error, PermissionError):
        return f"may not connect to {admin.text}: ask as root or as the daemon's user or group"
    if isinstance(error, TimeoutError):
        return f"{admin.text} does not answer in time: every worker is busy or stuck"
    return f"{admin.text} does not answer as proxyd does: {error}"


def fetch(admin: Listen, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """The document of GET /status. Raises OSError, HTTPException, or ValueError for another answer."""
    connection: http.client.HTTPConnection
    if admin.kind == "unix":
        connection = _UnixConnection(admin.path, timeout_s)
    else:
        connection = http.client.HTTPConnection(admin.host, admin.port, timeout=timeout_s)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = _read_all(response, time.monotonic() + timeout_s)
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    document = orjson.loads(body)
    if not isinstance(document, dict) or "workers" not in document:
        raise ValueError("not a status document")
    return document


def page(status: dict[str, Any], width: int | None = None) -> str:
    """The state for people, as text. Without a width, as for a pipe, lines are as long as they are."""
    return "\n".join(plain(line) for line in fit(blocks(status, width), None))


def _read_all(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body, within the bound and the time: one that comes byte by byte keeps nobody for longer."""
    parts: list[bytes] = []
    length = 0
    while part := response.read1(65536):
        parts.append(part)
        length += len(part)
        if length > MAX_ANSWER_BYTES:
            raise ValueError(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)
