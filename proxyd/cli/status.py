"""`proxyd status`: the running daemon's state, asked over its admin listener.

Owns the request and the page for people. Must not know what the numbers mean to the daemon. Of the file it needs
`server.admin` alone: the daemon that runs may have been started with another text. Exit codes: 0 shown,
1 the daemon does not answer or `server.admin` is wrong, 2 the file cannot be read.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import textwrap
import time
from collections.abc import Mapping
from typing import Any

import orjson

from proxyd.cli.output import fail, put
from proxyd.cli.part import read_part
from proxyd.cli.tables import size, span, table
from proxyd.config.values import Listen

WHO = "proxyd status"
TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# Beats come every 0.1 s; a process that is later than this is stuck or stopped, whatever state it said it is in.
SILENT_S = 1.0


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the state on stdout; messages go to stderr."""
    part = read_part(WHO, args.config, {"server": ("admin",)}, environ)
    if isinstance(part, int):
        return part
    admin = part.config.server.admin
    try:
        answer = fetch(admin)
    except (FileNotFoundError, ConnectionRefusedError):
        return fail(WHO, 1, f"not running: nothing listens on {admin.text}; is this the daemon's file? -c FILE")
    except PermissionError:
        return fail(WHO, 1, f"may not connect to {admin.text}: ask as root or as the daemon's user or group")
    except TimeoutError:
        return fail(WHO, 1, f"{admin.text} does not answer within {TIMEOUT_S:g} s: every worker is busy or stuck")
    except (OSError, http.client.HTTPException, ValueError) as error:
        return fail(WHO, 1, f"{admin.text} does not answer as proxyd does: {error}")
    as_json = getattr(args, "json", False)
    return put(WHO, orjson.dumps(answer, option=orjson.OPT_INDENT_2).decode() if as_json else page(answer))


def fetch(admin: Listen) -> dict[str, Any]:
    """The document of GET /status. Raises OSError, HTTPException, or ValueError for another answer."""
    connection: http.client.HTTPConnection
    if admin.kind == "unix":
        connection = _UnixConnection(admin.path)
    else:
        connection = http.client.HTTPConnection(admin.host, admin.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/status")
        response = connection.getresponse()
        body = response.read(MAX_ANSWER_BYTES)
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(f"status {response.status}")
    document = orjson.loads(body)
    if not isinstance(document, dict) or "workers" not in document:
        raise ValueError("not a status document")
    return document


def page(status: dict[str, Any]) -> str:
    """The state for people: the node, its processes, latencies, upstreams, telemetry."""
    requests, streams, telemetry = status["requests"], status["streams"], status["telemetry"]
    lines = [
        f"proxyd {status['version']}: {status['state']}, pid {status['pid']}, up {span(status['uptime_s'])}",
        f"requests: {requests['answered']} answered, {requests['client_aborts']} left by their client",
        f"streams: {streams['active']} active, {streams['events']} events relayed",
        "",
        *table(
            ["process", "pid", "state", "streams", "restarts", "up"],
            [[f"worker {worker['slot']}", *_process(worker)] for worker in status["workers"]]
            + [["telemetry", *_process(telemetry | {"streams": "-"})]],
        ),
        "",
        *_latencies(status["latency"]),
    ]
    if status["upstreams"]:
        rows = [
            [
                name,
                upstream["breaker"],
                " ".join(f"{state} {count}" for state, count in upstream["connections"].items()),
                "-" if upstream["reuse_ratio"] is None else f"{upstream['reuse_ratio']:.1%}",
                str(sum(upstream["errors"].values())),
            ]
            for name, upstream in status["upstreams"].items()
        ]
        lines += ["", *table(["upstream", "breaker", "connections", "reused", "errors"], rows)]
        for name, upstream in status["upstreams"].items():
            lines += _troubles(name, upstream)
    rows_text = ", ".join(f"{count} {state}" for state, count in telemetry["rows"].items()) or "none yet"
    lines += ["", f"rows: {rows_text}; {telemetry['spool_bytes']} bytes in the spool", *_spool(telemetry)]
    store = telemetry.get("store")
    if store:
        lines += textwrap.wrap(
            f"store failing since {_instant(store['failing_since'])}: {store['reason']}", 80, subsequent_indent="  "
        )
    if telemetry["state"] == "waiting":
        lines.append("telemetry waits: another process stores the rows of this state_dir")
    if status["sockets"]["time_wait"] is not None:
        lines.append(f"sockets of this host in TIME_WAIT: {status['sockets']['time_wait']}")
    return "\n".join(lines)


def _spool(telemetry: dict[str, Any]) -> list[str]:
    """Groups, lag, how full the folder is, and what the store refused."""
    lines = []
    if telemetry["groups"]:
        lag = ", ".join(f"{key} {_duration(value)}" for key, value in telemetry["lag"].items() if key.startswith("p"))
        lines += textwrap.wrap(
            f"groups: {telemetry['groups_per_s']:g} a second, {telemetry['group_rows']:g} rows each; lag {lag}", 80
        )
    if telemetry["spool_max"]:
        used = f"{size(telemetry['spool_used'])} of {size(telemetry['spool_max'])}"
        lines.append(f"spool folder: {used} ({telemetry['spool_share']:.1%})")
    if telemetry["dead_letters"]:
        lines.append(f"dead letters: {telemetry['dead_letters']}; `proxyd spool` lists them")
    if telemetry["requeue_bytes"]:
        lines.append(f"dead letters being stored again: {size(telemetry['requeue_bytes'])} are left")
    return lines


def _troubles(name: str, upstream: dict[str, Any]) -> list[str]:
    """What kinds an upstream's errors are of, and since when it fails; nothing for one without."""
    lines = []
    if upstream.get("failing_since"):
        lines.append(f"{name}: failing since {_instant(upstream['failing_since'])}: {upstream['failing_kind']}")
    if upstream["errors"]:
        kinds = [f"{kind} {count}" for kind, count in upstream["errors"].items()]
        lines += textwrap.wrap(f"{name} errors: {', '.join(kinds)}", 80, subsequent_indent="  ")
    return lines


def _instant(wall_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))


def _process(process: dict[str, Any]) -> list[str]:
    up = "-" if process["age_s"] is None else span(process["age_s"])
    state = process["state"]
    if process["silent_s"] is not None and process["silent_s"] >= SILENT_S:
        state += f", silent {span(process['silent_s'])}"
    return [str(process["pid"] or "-"), state, str(process["streams"]), str(process["restarts"]), up]


def _latencies(latency: dict[str, Any]) -> list[str]:
    rows, names = [], []
    for name, both in latency.items():
        minute = both["last_minute"]
        names = [key for key in minute if key.startswith("p")]
        if both["since_start"]["count"]:
            label = name.removeprefix("proxyd_").removesuffix("_seconds").replace("_", " ")
            rows.append([label, str(minute["count"]), *(_duration(minute[key]) for key in names)])
    return table(["last minute", "count", *names], rows) if rows else ["no latencies yet"]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
