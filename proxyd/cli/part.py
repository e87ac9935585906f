"""The part of the configuration that a command needs, out of a file that may have errors elsewhere.

Owns: what the commands say about the file, its secrets and the store's file. Must not know: what they do with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from proxyd.cli.output import fail, fail_all
from proxyd.config.load import Part, load_part
from proxyd.config.secrets import Secret, resolve_password
from proxyd.config.sink import is_mysql
from proxyd.errors import ConfigError
from proxyd.store.schema import StoreError
from proxyd.store.sink import sqlite_path

# What a command needs that opens the store.
SINK = {"telemetry": ("sink", "password_file")}


def read_part(who: str, path: str, wanted: Mapping[str, tuple[str, ...]], environ: Mapping[str, str]) -> Part | int:
    """The wanted options of the file, or the exit code after saying on stderr why there are none."""
    try:
        part = load_part(path, wanted, environ)
    except OSError as error:
        return fail(who, 2, f"cannot read {path}: {error.strerror}; name the daemon's file: -c FILE")
    except ConfigError as error:
        return fail_all(who, 1, error.findings)
    if part.errors_elsewhere:
        count = f"{part.errors_elsewhere} error{'s' if part.errors_elsewhere > 1 else ''}"
        fail(who, 0, f"warning: {path} has {count} elsewhere; proxyd --check-config tells")
    return part


def read_password(who: str, part: Part, environ: Mapping[str, str]) -> Secret | int | None:
    """The database's password, None where there is none; the exit code after saying why it cannot be read."""
    secrets, findings = resolve_password(part.config, environ)
    if secrets is None:
        return fail_all(who, 1, findings)
    return secrets.telemetry_password


def refuse_unreadable(who: str, sink: str) -> None:
    """Raises StoreError, in words that help, for a store that is another user's: SQLite would say "unable to open"."""
    if is_mysql(sink):
        return
    path = sqlite_path(sink)
    try:
        path.stat()
        if os.access(path, os.R_OK):
            return
    except PermissionError:
        pass
    except OSError:
        return
    raise StoreError(
        f"{path}: may not be read by this user (uid {os.geteuid()}): ask as root or as the daemon's user:"
        f" sudo -u proxyd {who} ..."
    )
