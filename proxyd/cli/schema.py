"""`proxyd schema`: the tables of the telemetry store as SQL; with `--apply` created where they are missing.

Owns: what is printed, as which user an SQLite file is made, the exit codes. Must not know: SQL (store/apply does).
Of the file it needs `telemetry.sink` and its password; the daemon need not run, and may.
Exit codes: 0 printed, or everything is there now; 1 something differs or the store cannot be used; 2 the file cannot be
read or the arguments are not understood.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Mapping

from proxyd.cli.output import fail, put
from proxyd.cli.part import SINK, read_part, read_password
from proxyd.config.sink import is_mysql
from proxyd.store.apply import apply, ddl
from proxyd.store.schema import StoreError
from proxyd.store.sink import sqlite_path

WHO = "proxyd schema"


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints or applies; returns the exit code."""
    part = read_part(WHO, args.config, SINK, environ)
    if isinstance(part, int):
        return part
    sink = part.config.telemetry.sink
    if not args.apply:
        return put(WHO, ddl(sink))
    password = read_password(WHO, part, environ)
    if isinstance(password, int):
        return password
    try:
        with _as_owner(sink):
            applied = apply(sink, password)
    except (StoreError, OSError) as error:
        return fail(WHO, 1, str(error))
    lines = [f"created {one}" for one in applied.created] or ["nothing to create"]
    code = put(WHO, "\n".join(lines))
    for one in applied.differing:
        code = fail(WHO, 1, f"differs, and is not altered: {one}")
    return code


@contextlib.contextmanager
def _as_owner(sink: str) -> Iterator[None]:
    """As root, an SQLite file is made by the owner of its place, who is the daemon's user: a file of root's would keep
    the daemon from writing, and nothing in that place can lead root elsewhere."""
    path = None if is_mysql(sink) or os.geteuid() != 0 else sqlite_path(sink)
    place = path if path is None or path.is_file() else path.parent
    if place is None or not place.exists():
        yield
        return
    status = place.stat()
    if status.st_uid == 0:
        if place != path:
            fail(WHO, 0, f"warning: the file will be root's, as {place} is; another user's daemon could not write it")
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(status.st_gid)
    os.seteuid(status.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(os.getgid())
        os.setgroups(groups)
