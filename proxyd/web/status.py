"""The document of GET /status: what a person or a script wants to know of the node.

Owns its shape. Must not know HTTP or how cells are written. Everything comes out of shared memory, so any worker
gives the same answer, and a dead worker's counts are in it. Rates and alerts are as new as the telemetry process's
last look (telemetry/watch.py), so a second old at most; where that process is not there, rates are null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyd import __version__
from proxyd.config.conditions import ConditionError, parse
from proxyd.shm.beats import Beat
from proxyd.shm.metrics import LAST_MINUTE_WINDOWS, WINDOW_S, Distribution, Labels, Snapshot, read
from proxyd.shm.region import Region
from proxyd.telemetry.watch import NO_VALUE, VALUE_PARTS
from proxyd.web.exposition import FAMILIES, reuse_ratios
from proxyd.web.generations import generations, last_reload, process, worker_seats

_BREAKER = {0: "closed", 1: "half_open", 2: "open"}
# An upstream's pool, by the metric's states: a connection that is busy is an active one.
_POOL = {"idle": "idle", "busy": "active", "connecting": "connecting"}
# In the histogram of groups a row counts as a microsecond (telemetry/tally.py).
_NS_PER_ROW = 1000


def build_status(
    region: Region,
    snapshot: Snapshot,
    *,
    monotonic_s: float,
    percentiles: Sequence[float],
    time_wait: int | None,
    notice: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain values only, ready for JSON. Times in seconds. `notice`: the master's, of reloads and generations."""
    master = Beat(region, region.master)
    seats = worker_seats(region, notice)
    rates = _rates(snapshot) if Beat(region, region.telemetry).pid else {}
    return {
        "version": __version__,
        "pid": master.pid,
        "state": master.state.name.lower(),
        "uptime_s": round(master.age_s(monotonic_s), 1),
        "workers": [_worker(region, seat, monotonic_s) for seat in seats],
        "generations": generations(region, seats, notice, monotonic_s),
        "last_reload": last_reload(notice),
        "renewal": (notice or {}).get("renewal"),
        "alerts": _alerts(snapshot),
        "requests": {
            "answered": snapshot.total("proxyd_requests_total"),
            "per_s": rates.get("requests"),
            "by_status": _by(snapshot.counters, "proxyd_requests_total", "status"),
            "client_aborts": snapshot.total("proxyd_client_aborts_total"),
        },
        "streams": {
            "active": sum(snapshot.gauges.get("proxyd_streams_active", {}).values()),
            "by_tenant": _by(snapshot.gauges, "proxyd_streams_active", "tenant"),
            "events": snapshot.total("proxyd_events_relayed_total"),
            "events_per_s": rates.get("events"),
            "bytes": snapshot.total("proxyd_bytes_relayed_total"),
            "bytes_per_s": rates.get("bytes"),
            "backpressure": _by(snapshot.counters, "proxyd_backpressure_events_total", "kind"),
        },
        "latency": {
            name: {
                "last_minute": _latency(snapshot.last_minute.get(name), percentiles),
                "since_start": _latency(snapshot.histograms.get(name), percentiles),
            }
            for name, family in FAMILIES.items()
            if family.kind == "histogram"
        },
        "tokens": _by(snapshot.counters, "proxyd_tokens_total", "kind"),
        "upstreams": _upstreams(snapshot, _failing(region, seats, snapshot, monotonic_s)),
        "telemetry": process(region, region.telemetry, monotonic_s)
        | {
            "rows": _by(snapshot.counters, "proxyd_telemetry_rows_total", "state"),
            "store": store_trouble(snapshot.gauges),
        }
        | _spool(snapshot)
        | _groups(snapshot, monotonic_s, master.age_s(monotonic_s), percentiles),
        "spool": _spool_alone(snapshot),
        "sockets": {"time_wait": time_wait},
    }


def _worker(region: Region, seat: int, monotonic_s: float) -> dict[str, Any]:
    beat = Beat(region, seat)
    return process(region, seat, monotonic_s) | {"slot": beat.slot, "seat": seat, "generation": beat.generation}


def _rates(snapshot: Snapshot) -> dict[str, float]:
    """Per second, over the last minute."""
    found = snapshot.gauges.get("_rate", {})
    return {dict(labels)["of"]: round(value / VALUE_PARTS, 3) for labels, value in found.items()}


def _alerts(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Every condition that is watched, alerts first; `value`, `threshold` and `unit` as the condition is written."""
    since = _by(snapshot.gauges, "_alert_since", "alert")
    values = _by(snapshot.gauges, "_alert_value", "alert")
    active = _by(snapshot.gauges, "proxyd_alert_active", "alert")
    found = []
    for text, is_listed in _by(snapshot.gauges, "_alert_listed", "alert").items():
        value = values.get(text, NO_VALUE)
        try:
            condition = parse(text) if is_listed else None
        except ConditionError:  # the 257th text of a life is "other"
            condition = None
        if condition is not None:
            found.append(
                {
                    "alert": text,
                    "active": bool(active.get(text)),
                    "since": since.get(text) or None,
                    "value": None if value == NO_VALUE else round(value / VALUE_PARTS, 3),
                    "threshold": condition.threshold,
                    "unit": condition.unit,
                }
            )
    return sorted(found, key=lambda alert: not alert["active"])


def _spool_alone(snapshot: Snapshot) -> dict[str, Any]:
    """The same as in `telemetry`, for those who ask for the spool alone."""
    spool = _spool(snapshot)
    return {name.removeprefix("spool_"): value for name, value in spool.items()}


def _spool(snapshot: Snapshot) -> dict[str, Any]:
    """`spool_used` is all of the folder that counts against `spool_max`; `spool_bytes` the part that is not stored."""
    used, bound = _gauge(snapshot, "_telemetry_spool_used"), _gauge(snapshot, "_telemetry_spool_max")
    return {
        "spool_bytes": _gauge(snapshot, "proxyd_telemetry_spool_bytes"),
        "spool_used": used,
        "spool_max": bound,
        "spool_share": round(used / bound, 4) if bound else None,
        "dead_letters": _gauge(snapshot, "_telemetry_dead_letters"),
        "requeue_bytes": _gauge(snapshot, "_telemetry_requeue_bytes"),
    }


def _groups(snapshot: Snapshot, monotonic_s: float, age_s: float, percentiles: Sequence[float]) -> dict[str, Any]:
    """Commits with rows since the start; how many a second, their mean size and how late their rows are, in the last
    minute (the size: since the start, where there was none)."""
    name = "_telemetry_group_rows"
    minute, whole = (found.get(name) or Distribution() for found in (snapshot.last_minute, snapshot.histograms))
    seconds = min(LAST_MINUTE_WINDOWS * WINDOW_S + monotonic_s % WINDOW_S, max(age_s, 1.0))
    return {
        "groups": whole.count,
        "groups_per_s": round(minute.count / seconds, 2),
        "group_rows": _rows_a_group(minute if minute.count else whole),
        "lag": _latency(snapshot.last_minute.get("proxyd_telemetry_lag_seconds"), percentiles),
    }


def _rows_a_group(found: Distribution) -> float | None:
    return round(found.sum_ns / _NS_PER_ROW / found.count, 1) if found.count else None


def _gauge(snapshot: Snapshot, name: str) -> int:
    return sum(snapshot.gauges.get(name, {}).values())


def _latency(found: Distribution | None, percentiles: Sequence[float]) -> dict[str, float | int | None]:
    found = found or Distribution()
    values: dict[str, float | int | None] = {f"p{q * 100:g}": found.quantile_s(q) for q in percentiles}
    return {"count": sum(found.buckets), "mean": found.sum_ns / 1e9 / found.count if found.count else None} | values


def _by(series: dict[str, dict[Labels, int]], name: str, label: str) -> dict[str, int]:
    """Sums of a metric by one of its labels."""
    found: dict[str, int] = {}
    for labels, value in series.get(name, {}).items():
        key = dict(labels).get(label, "")
        found[key] = found.get(key, 0) + value
    return dict(sorted(found.items()))


def store_trouble(gauges: dict[str, dict[Labels, int]]) -> dict[str, Any] | None:
    """Why rows are not stored, and since when (wall seconds); None while they are."""
    for labels, since in gauges.get("_store_failing_since", {}).items():
        if since:
            return {"failing_since": since, "reason": dict(labels).get("reason", "")}
    return None


def _failing(
    region: Region, seats: Sequence[int], snapshot: Snapshot, monotonic_s: float
) -> dict[str, tuple[int, str]]:
    """Of upstreams that fail: since when (wall seconds), and how. A worker that nobody has asked since another got an
    answer knows nothing newer."""
    if not any(snapshot.gauges.get("_failing_since", {}).values()):
        return {}  # nearly always; a look at each seat costs more than all the rest
    answered = snapshot.highest.get("_answered_at", {})
    found: dict[str, tuple[int, str]] = {}
    for seat in seats:
        for labels, since in read(region, monotonic_s, [seat]).gauges.get("_failing_since", {}).items():
            given = dict(labels)
            name = given["upstream"]
            if since and since >= answered.get((("upstream", name),), 0):
                found[name] = min(found.get(name, (since, given["kind"])), (since, given["kind"]))
    return found


def _upstreams(snapshot: Snapshot, failing: dict[str, tuple[int, str]]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}

    def entry(labels: Labels) -> tuple[dict[str, Any], dict[str, str]]:
        given = dict(labels)
        empty: dict[str, Any] = {
            "breaker": "closed",
            "connections": {},
            "pool": dict.fromkeys(_POOL.values(), 0),
            "connects": 0,
            "reuse_ratio": None,
            "errors": {},
            "failing_since": None,
            "failing_kind": None,
        }
        return found.setdefault(given.get("upstream", ""), empty), given

    for labels, value in snapshot.gauges.get("proxyd_upstream_connections", {}).items():
        upstream, given = entry(labels)
        state = given.get("state", "")
        upstream["connections"][state] = value
        upstream["pool"][_POOL.get(state, state)] = value
    for labels, value in snapshot.counters.get("proxyd_upstream_connects_total", {}).items():
        entry(labels)[0]["connects"] = value
    for labels, ratio in reuse_ratios(snapshot).items():
        entry(labels)[0]["reuse_ratio"] = round(ratio, 4)
    for labels, value in snapshot.counters.get("proxyd_upstream_errors_total", {}).items():
        upstream, given = entry(labels)
        upstream["errors"][given.get("kind", "")] = value
    for labels, value in snapshot.highest.get("proxyd_breaker_state", {}).items():
        entry(labels)[0]["breaker"] = _BREAKER.get(value, str(value))
    for name, (since, kind) in failing.items():
        upstream = entry((("upstream", name),))[0]
        upstream["failing_since"], upstream["failing_kind"] = since, kind
        if upstream["breaker"] == _BREAKER[0]:
            upstream["breaker"] = "failing"  # closed, for nobody else could be asked
    return dict(sorted(found.items()))
