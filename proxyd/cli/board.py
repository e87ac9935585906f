"""The state of a node for people: the document of /status as lines, for `proxyd status` and `proxyd top`.

Owns: the words, their order, what is worth a colour. Must not know: where the document came from, what a terminal is.
What is wrong comes before what is usual: alerts, a failed reload, then processes, latencies, upstreams, rows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxyd.cli.grid import Block, Cell, Line, grid, note
from proxyd.cli.tables import size, span

__all__ = ["SILENT_S", "Now", "blocks", "short_count"]

# Beats come every 0.1 s; a process that is later than this is stuck or stopped, whatever state it said it is in.
SILENT_S = 1.0
# Of a long note or list of findings, where the lines are counted.
MOST_LINES = 2
MANY_WORKERS = 8

_STATES = {
    "ready": "good",
    "serving": "good",
    "closed": "good",
    "starting": "warn",
    "draining": "warn",
    "half_open": "warn",
    "waiting": "warn",
    "gone": "bad",
    "failing": "bad",
    "open": "bad",
}


@dataclass(frozen=True, slots=True)
class Now:
    """What happened between two looks of `top`, a second."""

    requests: float
    events: float
    bytes: float


def blocks(
    status: Mapping[str, Any], width: int | None, now: Now | None = None, *, is_brief: bool = False
) -> list[Block]:
    """Every part of the state. `is_brief`: long sentences end after a few lines."""
    most = MOST_LINES if is_brief else None
    return [
        Block(_node(status, width, now), 3),
        Block(_alerts(status, width), 3),
        Block(_reload(status, width, most), 3),
        Block(_generations(status, width), 3),
        Block(_processes(status, width, is_brief), 4),
        Block(_latencies(status["latency"], width), 4),
        Block(_upstreams(status["upstreams"], width), 2),
        Block(_troubles(status["upstreams"], width, most), 1),
        Block(_rows(status["telemetry"], width, most), 2),
        Block(_sockets(status, width), 0),
    ]


def _node(status: Mapping[str, Any], width: int | None, now: Now | None) -> list[Line]:
    requests, streams = status["requests"], status["streams"]
    state = str(status["state"])
    head: Line = (
        (f"proxyd {status['version']}: ", "head"),
        (state, _STATES.get(state, "")),
        (f", pid {status['pid']}, up {span(status['uptime_s'])}", ""),
    )
    answered, left, events = (
        short_count(count, width) for count in (requests["answered"], requests["client_aborts"], streams["events"])
    )
    rate = _rate(requests.get("per_s"), now.requests if now else None, "")
    lines = [head, *note(f"requests: {rate}{answered} answered, {left} clients left", width)]
    rate = _rate(streams.get("events_per_s"), now.events if now else None, " events")
    moved = now.bytes if now else streams.get("bytes_per_s")
    speed = "" if moved is None else f", {size(round(moved))}/s"
    so_far = "" if now else f"{events} events"  # two rates and a sum are too long for a line of 80
    text = f"streams: {streams['active']} active; {rate}{so_far}{speed}".replace("; ,", ",")
    return lines + note(text, width)


def _rate(minute: float | None, now: float | None, of: str) -> str:
    """`now` is of the time between two looks; the other of the last minute."""
    parts = [] if now is None else [f"{_per_s(now)}{of}/s now"]
    if minute is not None:
        parts.append(f"{_per_s(minute)}{'/s over a minute' if parts else f'{of}/s'}")
    return f"{', '.join(parts)}; " if parts else ""


def _per_s(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _alerts(status: Mapping[str, Any], width: int | None) -> list[Line]:
    lines: list[Line] = []
    for alert in status.get("alerts", []):
        if alert["active"]:
            value = "unknown" if alert["value"] is None else f"{alert['value']:g}{alert['unit']}"
            lines += note(f"ALERT: {alert['alert']} since {_instant(alert['since'])}, now {value}", width, "bad")
    return lines


def _reload(status: Mapping[str, Any], width: int | None, most: int | None) -> list[Line]:
    """How the last reload or upgrade ended; one that failed with its findings."""
    last = status.get("last_reload")
    if not last:
        return []
    when = _instant(last["at"]) if isinstance(last.get("at"), int | float) else "?"
    took = f", took {_duration(last['took_s'])}" if isinstance(last.get("took_s"), int | float) else ""
    how = "done" if last.get("ok") else "FAILED"
    if last.get("ok") and last.get("generation") is not None:
        took = f", generation {last['generation']}{took}"
    text = f"last {last.get('kind', 'reload')}: {how} at {when}{took}"
    detail = str(last.get("detail") or "")
    if detail:
        text += f": {detail}"
    lines = note(text, width, "" if last.get("ok") else "bad", most)
    findings = [str(finding) for finding in last.get("findings") or []]
    for finding in findings[:most]:
        lines += note(f"  {finding}", width, "warn", most)
    if most is not None and len(findings) > most:
        lines += note(f"  ... and {len(findings) - most} more findings; `proxyd status` has them", width, "dim")
    return lines


def _generations(status: Mapping[str, Any], width: int | None) -> list[Line]:
    """Nothing where the one generation simply serves."""
    found = status.get("generations", [])
    if len(found) < 2 and all(one["state"] == "serving" for one in found):
        return []
    lines: list[Line] = []
    for one in sorted(found, key=lambda one: (one["state"] != "draining", -one["generation"])):
        has = f"{_many(one['streams'], 'stream')}, {_many(one['workers'], 'worker')}"
        text = f"generation {one['generation']}: {one['state']} for {span(one['since_s'])}, {has}"
        if one["ends_in_s"] is not None:
            text += f", ends within {span(one['ends_in_s'])}"
        if one["version"] != status["version"]:
            text += f", version {one['version']}"
        lines += note(text, width, "" if one["state"] == "serving" else "warn")
    return lines


def _processes(status: Mapping[str, Any], width: int | None, is_brief: bool) -> list[Line]:
    workers = status["workers"]
    if is_brief:  # the end may be left out: whoever is not well comes first
        workers = sorted(workers, key=lambda worker: worker["state"] == "ready" and not _is_silent(worker))
    head = ["process", "generation", "pid", "state", "streams", "restarts", "up"]
    rows: list[list[Cell]] = [
        [f"worker {worker['slot']}", str(worker.get("generation") or "-"), *_process(worker)]
        for worker in workers
    ]
    telemetry: list[Cell] = ["telemetry", "-", *_process(status["telemetry"] | {"streams": "-"})]
    # Of many workers the end may be left out; that must not be telemetry.
    return grid(head, [telemetry, *rows] if len(rows) > MANY_WORKERS else [*rows, telemetry], width)


def _is_silent(process: Mapping[str, Any]) -> bool:
    return process["silent_s"] is not None and process["silent_s"] >= SILENT_S


def _process(process: Mapping[str, Any]) -> list[Cell]:
    up = "-" if process["age_s"] is None else span(process["age_s"])
    state = str(process["state"])
    style = _STATES.get(state, "")
    if _is_silent(process):
        state, style = f"{state}, silent {span(process['silent_s'])}", "bad"
    return [str(process["pid"] or "-"), (state, style), str(process["streams"]), str(process["restarts"]), up]


def _latencies(latency: Mapping[str, Any], width: int | None) -> list[Line]:
    rows: list[list[Cell]] = []
    names: list[str] = []
    for name, both in latency.items():
        minute = both["last_minute"]
        names = [key for key in minute if key.startswith("p")]
        if both["since_start"]["count"]:
            label = name.removeprefix("proxyd_").removesuffix("_seconds").replace("_", " ")
            count = short_count(minute["count"], width)
            rows.append([label, count, *(_duration(minute[key]) for key in names)])
    if not rows:
        return [(("no latencies yet", "dim"),)]
    return grid(["last minute", "count", *names], rows, width)


def _upstreams(upstreams: Mapping[str, Any], width: int | None) -> list[Line]:
    if not upstreams:
        return []
    rows: list[list[Cell]] = []
    for name, upstream in upstreams.items():
        found = upstream["connections"]  # a daemon of 0.1.0 that still runs has these alone
        pool = upstream.get("pool") or {"idle": found.get("idle", 0), "active": found.get("busy", 0)}
        reused = "-" if upstream["reuse_ratio"] is None else f"{upstream['reuse_ratio']:.1%}"
        counts = [short_count(count, width) for count in (upstream["connects"], sum(upstream["errors"].values()))]
        states = [str(pool.get(state, 0)) for state in ("idle", "active", "connecting")]
        breaker = str(upstream["breaker"])
        rows.append([name, (breaker, _STATES.get(breaker, "")), *states, counts[0], reused, counts[1]])
    head = ["upstream", "breaker", "idle", "active", "connecting", "connects", "reused", "errors"]
    return grid(head, rows, width)


def _troubles(upstreams: Mapping[str, Any], width: int | None, most: int | None) -> list[Line]:
    """What kinds an upstream's errors are of, and since when it fails; nothing for one without."""
    lines: list[Line] = []
    for name, upstream in upstreams.items():
        if upstream.get("failing_since"):
            when = _instant(upstream["failing_since"])
            lines += note(f"{name}: failing since {when}: {upstream['failing_kind']}", width, "bad", most and 1)
        if upstream["errors"]:
            kinds = [f"{kind} {count}" for kind, count in upstream["errors"].items()]
            lines += note(f"{name} errors: {', '.join(kinds)}", width, "", most and 1)
    return lines


def _rows(telemetry: Mapping[str, Any], width: int | None, most: int | None) -> list[Line]:
    """Rows, groups, lag, how full the folder is, and what the store refused."""
    rows = ", ".join(f"{count} {state}" for state, count in telemetry["rows"].items()) or "none yet"
    lines = note(f"rows: {rows}; {telemetry['spool_bytes']} bytes in the spool", width)
    if telemetry["groups"]:
        lag = ", ".join(f"{key} {_duration(value)}" for key, value in telemetry["lag"].items() if key.startswith("p"))
        lines += note(
            f"groups: {telemetry['groups_per_s']:g} a second, {telemetry['group_rows']:g} rows each; lag {lag}",
            width,
            "",
            most,
        )
    if telemetry["spool_max"]:
        used = f"{size(telemetry['spool_used'])} of {size(telemetry['spool_max'])}"
        style = "bad" if telemetry["spool_share"] >= 0.8 else ""
        lines += note(f"spool folder: {used} ({telemetry['spool_share']:.1%})", width, style)
    if telemetry["dead_letters"]:
        lines += note(f"dead letters: {telemetry['dead_letters']}; `proxyd spool` lists them", width, "warn")
    if telemetry["requeue_bytes"]:
        lines += note(f"dead letters being stored again: {size(telemetry['requeue_bytes'])} are left", width)
    store = telemetry.get("store")
    if store:
        since = _instant(store["failing_since"])
        lines = [*note(f"store failing since {since}: {store['reason']}", width, "bad", most), *lines]
    if telemetry["state"] == "waiting":
        lines += note("telemetry waits: another process stores the rows of this state_dir", width, "warn")
    return lines


def _sockets(status: Mapping[str, Any], width: int | None) -> list[Line]:
    count = status["sockets"]["time_wait"]
    return [] if count is None else note(f"sockets of this host in TIME_WAIT: {count}", width)


def short_count(count: int, width: int | None) -> str:
    """A count; on a terminal one of a million and more in three digits."""
    if width is None or count < 1_000_000:
        return str(count)
    value = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5 or unit == "T":
            return f"{value:.3g}{unit}"
        value /= 1000
    return str(count)


def _many(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _instant(wall_s: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s or 0))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
