"""`proxyd spool`: what waits in the spool and what the store refused; `--retry` gives the latter to it once more.

Owns: the page, the JSON, the rename that re-queues. Must not know: how segments are read (telemetry/survey does).
Works beside a running daemon and without one, and takes no lock. Of the file it needs `server.state_dir`,
`telemetry.spool_max` and, for what is stored already, the sink. Exit codes: 0 told or re-queued, nothing to re-queue
included; 1 the directory or the configuration cannot be used; 2 the file cannot be read.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from proxyd.cli.output import fail, printable, put
from proxyd.cli.part import read_part, read_password, refuse_unreadable
from proxyd.cli.tables import size, span, table
from proxyd.clock import SYSTEM, Clock
from proxyd.config.load import Part
from proxyd.store.schema import Cursor, StoreError, StoreMissing, utc_text
from proxyd.store.sink import open_reader
from proxyd.telemetry.deadletter import LineCount, newest_first, parse_line
from proxyd.telemetry.recovery import sync_directory
from proxyd.telemetry.requeue import new_requeue_path
from proxyd.telemetry.segment import DEAD_LETTERS, spool_dir
from proxyd.telemetry.survey import Survey, survey

WHO = "proxyd spool"
# Of each list; how many there are beyond it is told.
SHOWN = 20
MAX_REASON = 200
_NEEDED = {"server": ("state_dir",), "telemetry": ("spool_max", "sink", "password_file")}


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ, clock: Clock = SYSTEM) -> int:
    """Prints on stdout; messages go to stderr."""
    part = read_part(WHO, args.config, _NEEDED, environ)
    if isinstance(part, int):
        return part
    state_dir = Path(part.config.server.state_dir)
    directory = spool_dir(state_dir)
    as_json = getattr(args, "json", False)
    try:
        if args.retry:
            return _retry(state_dir, directory, as_json)
        cursors, detail = _cursors(part, environ)
        document = _document(survey(state_dir, directory, cursors), directory, part.config.telemetry.spool_max, clock)
    except FileNotFoundError:
        return fail(WHO, 1, f"{directory}: there is no spool yet; proxyd makes it when it starts")
    except PermissionError as error:
        name = error.filename or directory
        return fail(WHO, 1, f"{name}: may not be read or changed by this user (uid {os.geteuid()}): {_REMEDY}")
    except OSError as error:
        return fail(WHO, 1, f"{error.filename or directory}: {error.strerror}")
    document["store_not_asked"] = detail
    return put(WHO, _text(document) if as_json else _page(document))


_REMEDY = "ask as root or as the daemon's user: sudo -u proxyd proxyd spool"


def _retry(state_dir: Path, directory: Path, as_json: bool) -> int:
    """A rename is whole or not there; the telemetry process finds the file by its name (telemetry/requeue.py)."""
    count = LineCount(directory / DEAD_LETTERS).count_all()
    path = new_requeue_path(directory)
    try:
        os.rename(directory / DEAD_LETTERS, path)
    except FileNotFoundError:
        if not directory.is_dir():
            raise
        document = {"requeued": None, "rows": 0}
        return put(WHO, _text(document) if as_json else "no dead letters: nothing to store again")
    sync_directory(directory)
    reader_pid = survey(state_dir, directory, None).reader_pid
    if as_json:
        return put(WHO, _text({"requeued": path.name, "rows": count, "reader_pid": reader_pid}))
    who = f"process {reader_pid} stores them" if reader_pid else "the next start of proxyd stores them"
    return put(WHO, f"{count} rows re-queued as {path.name}: {who}; what is refused again will be a dead letter again")


def _cursors(part: Part, environ: Mapping[str, str]) -> tuple[dict[str, Cursor] | None, str | None]:
    """What the store has of each stream; or None, and why it could not be asked."""
    sink = part.config.telemetry.sink
    password = read_password(WHO, part, environ)
    if isinstance(password, int):
        return None, "its password cannot be read"
    try:
        refuse_unreadable(WHO, sink)
        reader = open_reader(sink, password)
        try:
            found = reader.fetch("SELECT stream, segment, position, finished FROM sys_ai_spool_offsets")
        finally:
            reader.close()
    except StoreMissing:
        return {}, None
    except (StoreError, OSError) as error:
        return None, str(error)
    return {str(name): Cursor(str(name), int(one), int(two), bool(end)) for name, one, two, end in found}, None


def _document(found: Survey, directory: Path, spool_max: int, clock: Clock) -> dict[str, Any]:
    now = clock.wall()
    letters = [_letter(line) for line in newest_first(directory / DEAD_LETTERS, SHOWN)]
    count = LineCount(directory / DEAD_LETTERS).count_all()
    streams = sorted(found.streams, key=lambda one: one.bytes, reverse=True)
    counted = [one.rows for one in streams]
    return {
        "directory": str(directory),
        "reader_pid": found.reader_pid,
        "bytes": found.bytes,
        "spool_max": spool_max,
        "share": round(found.bytes / spool_max, 4) if spool_max else None,
        "rows": None if None in counted else sum(rows or 0 for rows in counted),
        "streams": [
            {
                "stream": one.stream,
                "slot": one.slot if one.slot >= 0 else None,
                "epoch": one.epoch,
                "state": one.state,
                "segments": one.segments,
                "bytes": one.bytes,
                "rows": one.rows,
                "open": one.open,
                "oldest_s": None if one.oldest is None else round(max(0.0, now - one.oldest), 1),
            }
            for one in streams[:SHOWN]
        ],
        "more_streams": max(0, len(streams) - SHOWN),
        "files": [{"file": odd.file, "kind": odd.kind, "bytes": odd.bytes} for odd in found.odd[:SHOWN]],
        "more_files": max(0, len(found.odd) - SHOWN),
        "dead_letters": {
            "rows": count,
            "bytes": found.dead_letter_bytes,
            "newest": letters,
            "more": max(0, count - len(letters)),
        },
    }


def _letter(line: bytes) -> dict[str, Any]:
    """One dead letter, as it is told."""
    try:
        letter = parse_line(line)
    except ValueError as error:
        return {"row": None, "reason": f"this line holds no row: {error}"[:MAX_REASON]}
    return {"row": letter.row._asdict(), "reason": letter.reason[:MAX_REASON]}


def _page(document: dict[str, Any]) -> str:
    rows = "rows were not counted" if document["rows"] is None else f"{document['rows']} rows wait"
    pid = document["reader_pid"]
    lines = [
        f"{document['directory']}",
        f"{size(document['bytes'])} of {size(document['spool_max'])} ({document['share'] or 0:.1%}), {rows};"
        f" {f'process {pid} stores them' if pid else 'no process stores them now'}",
    ]
    if document["store_not_asked"]:
        lines.append(f"the store cannot be asked, so rows that it has are counted too: {document['store_not_asked']}")
    if document["streams"]:
        cells = [
            [
                "dead letters" if one["slot"] is None else f"worker {one['slot']}",
                f"{one['epoch']:08x}" if one["epoch"] else "-",
                one["state"],
                *("-" if one[key] is None else str(one[key]) for key in ("segments", "bytes", "rows", "open")),
                "-" if one["oldest_s"] is None else span(one["oldest_s"]),
            ]
            for one in document["streams"]
        ]
        lines += ["", *table(["stream", "epoch", "state", "segments", "bytes", "rows", "open", "oldest"], cells)]
        lines += _more(document["more_streams"], "streams")
    if document["files"]:
        cells = [[printable(one["file"]), str(one["bytes"]), one["kind"]] for one in document["files"]]
        lines += [
            "",
            *table(["file that is not read", "bytes", "kind"], cells),
            *_more(document["more_files"], "files"),
        ]
    dead = document["dead_letters"]
    lines += ["", f"dead letters: {dead['rows'] or 'none'}"]
    for letter in dead["newest"]:
        row = letter["row"]
        if row is not None:
            names = f"{printable(row['tenant'])} {printable(row['request_id'])}"
            lines.append(f"  {utc_text(row['created_at'])} user {row['user_id']} {names}")
        lines.append(f"{'    ' if row is not None else '  '}{printable(letter['reason'])}")
    lines += _more(dead["more"], "in dead-letter.jsonl")
    if dead["rows"]:
        lines.append("`proxyd spool --retry` gives them to the store once more")
    return "\n".join(lines)


def _more(count: int, what: str) -> list[str]:
    return [f"  and {count} more {what}"] if count else []


def _text(document: object) -> str:
    return orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
