"""The node's metrics in Prometheus' text format, out of a snapshot of shared memory.

Owns the table of public names: kind, help and labels; names that are not in it stay inside (`_upstream_acquires`).
Must not know slots or how a cell is written. The text itself is prometheus_client's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from proxyd.shm.metrics import Distribution, Labels, Snapshot, bucket_edge_ns

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Family:
    """One public metric. `highest`: a state of each worker, of which the node has the worst."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    highest: bool = False


# Names, kinds and labels are the contract's (section 8), with some of our own; a test compares. Of tasks there are none
# in this version: their two are here, and empty, so that a board or a rule that names them is a valid one.
FAMILIES: dict[str, Family] = {
    "proxyd_requests_total": Family("counter", "Answered requests.", ("route", "status")),
    "proxyd_streams_active": Family("gauge", "Admitted requests for a stream that are not over.", ("tenant",)),
    "proxyd_events_relayed_total": Family("counter", "Events relayed to clients."),
    "proxyd_bytes_relayed_total": Family("counter", "Bytes of streams relayed to clients."),
    "proxyd_time_to_first_event_seconds": Family("histogram", "Request complete to the first event of its answer."),
    "proxyd_relay_lag_seconds": Family("histogram", "Event read from the upstream to its write to the client."),
    "proxyd_task_ack_seconds": Family("histogram", "A task's request to its 202; this version has no tasks."),
    "proxyd_queue_depth": Family("gauge", "Tasks that wait; this version has no tasks.", ("tenant",)),
    "proxyd_backpressure_events_total": Family("counter", "Times an upstream was not read for a client.", ("kind",)),
    "proxyd_client_aborts_total": Family("counter", "Clients that left before their answer's end."),
    "proxyd_upstream_connections": Family("gauge", "Connections to an upstream.", ("upstream", "state")),
    "proxyd_upstream_connects_total": Family("counter", "Connections made to an upstream.", ("upstream",)),
    "proxyd_upstream_reuse_ratio": Family("gauge", "Exchanges that found a pooled connection, of all.", ("upstream",)),
    "proxyd_upstream_errors_total": Family("counter", "Failed attempts on an upstream.", ("upstream", "kind")),
    "proxyd_upstream_keepalive_refused_total": Family(
        "counter", "Whole answers after which the upstream closes the connection.", ("upstream",)
    ),
    "proxyd_egress_ports_used": Family("gauge", "Local ports taken towards the busiest address.", ("upstream",)),
    "proxyd_egress_ports_limit": Family(
        "gauge", "Local ports there are towards one address, all sources.", ("upstream",), highest=True
    ),
    "proxyd_egress_ports_out_total": Family("counter", "Dials that found no local port and waited.", ("upstream",)),
    "proxyd_breaker_state": Family(
        "gauge", "0 closed, 1 half open, 2 open; the worst of the workers.", ("upstream",), highest=True
    ),
    "proxyd_tokens_total": Family("counter", "Tokens booked.", ("kind", "model")),
    "proxyd_quota_decisions_total": Family("counter", "Decisions about a quota, by what was known.", ("basis",)),
    "proxyd_telemetry_rows_total": Family("counter", "Rows by what became of them.", ("state",)),
    "proxyd_telemetry_lag_seconds": Family("histogram", "A transaction's end to its row in the store."),
    "proxyd_telemetry_spool_bytes": Family("gauge", "Bytes that wait in the spool."),
    "proxyd_telemetry_spool_used_ratio": Family("gauge", "The spool's folder, as a share of telemetry.spool_max."),
    "proxyd_telemetry_store_failing": Family("gauge", "1 while the store takes no rows."),
    "proxyd_alert_active": Family("gauge", "1 while a condition of monitoring.alert_on is an alert.", ("alert",)),
    "proxyd_worker_restarts_total": Family("counter", "Workers that died and were replaced."),
    "proxyd_last_reload_successful": Family("gauge", "0 when the last reload or upgrade failed.", ("kind",)),
    "proxyd_loop_lag_seconds": Family("histogram", "How late an event loop was for a timer."),
    "proxyd_sockets_time_wait": Family("gauge", "TCP sockets of this host in TIME_WAIT."),
}

# Powers of two from 8 us to 69 s: edges of our own buckets, so the counts under them are exact.
_LE_OCTAVES = range(13, 37)


def reuse_ratios(snapshot: Snapshot) -> dict[Labels, float]:
    """Per upstream: a quotient over the whole node, so the parts are summed first."""
    acquires = snapshot.counters.get("_upstream_acquires", {})
    reuses = snapshot.counters.get("_upstream_reuses", {})
    return {labels: reuses.get(labels, 0) / count for labels, count in acquires.items() if count}


def render(snapshot: Snapshot, time_wait: int | None, last_reload: Mapping[str, Any] | None = None) -> bytes:
    """The text of GET /metrics. `last_reload`: the master's word on it, None before the first."""
    return b"".join(render_parts(snapshot, time_wait, last_reload))


def render_parts(
    snapshot: Snapshot, time_wait: int | None, last_reload: Mapping[str, Any] | None = None
) -> Iterator[bytes]:
    """The same, a family at a time: with 256 tenants each takes up to 2 ms, which is all a loop may be held for."""
    for metric in _families(snapshot, time_wait, last_reload):
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_One(metric))
        yield generate_latest(registry)


class _One(Collector):
    """What prometheus_client asks: made for one family of one scrape."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return [self._metric]

    def describe(self) -> Iterable[Metric]:
        return []


def _derived(
    snapshot: Snapshot, time_wait: int | None, last_reload: Mapping[str, Any] | None
) -> dict[str, dict[Labels, float]]:
    """What is no cell of its own: quotients, and what others know. Nothing where it is not known."""
    used, bound = (sum(snapshot.gauges.get(f"_telemetry_spool_{name}", {}).values()) for name in ("used", "max"))
    failing = any(snapshot.gauges.get("_store_failing_since", {}).values())
    derived: dict[str, dict[Labels, float]] = {
        "proxyd_upstream_reuse_ratio": reuse_ratios(snapshot),
        "proxyd_telemetry_spool_used_ratio": {(): round(used / bound, 6) if bound else 0},
        "proxyd_telemetry_store_failing": {(): failing},
        "proxyd_last_reload_successful": {},
    }
    if last_reload is not None:
        kind = str(last_reload.get("kind", "reload"))
        derived["proxyd_last_reload_successful"] = {(("kind", kind),): bool(last_reload.get("ok"))}
    if time_wait is not None:
        derived["proxyd_sockets_time_wait"] = {(): time_wait}
    return derived


def _families(snapshot: Snapshot, time_wait: int | None, last_reload: Mapping[str, Any] | None) -> Iterable[Metric]:
    derived = _derived(snapshot, time_wait, last_reload)
    for name, family in FAMILIES.items():
        if family.kind == "histogram":
            yield _histogram(name, family, snapshot.histograms.get(name, Distribution()))
            continue
        found: dict[Labels, float] = {}
        if name in derived:
            found = derived[name]
        elif family.kind == "counter":
            found = {**snapshot.counters.get(name, {})}
        else:
            found = {**(snapshot.highest if family.highest else snapshot.gauges).get(name, {})}
        if not found and not family.labels and name != "proxyd_sockets_time_wait":
            found = {(): 0}
        metric: Metric
        if family.kind == "counter":
            metric = counter = CounterMetricFamily(name, family.help, labels=family.labels)
            for labels, value in found.items():
                counter.add_metric(_values(family, labels), value)
        else:
            metric = gauge = GaugeMetricFamily(name, family.help, labels=family.labels)
            for labels, value in found.items():
                gauge.add_metric(_values(family, labels), value)
        yield metric


def _values(family: Family, labels: Labels) -> list[str]:
    """The values in the order of the table; cells keep them sorted by name."""
    given = dict(labels)
    return [given.get(label, "") for label in family.labels]


def _histogram(name: str, family: Family, found: Distribution) -> Metric:
    metric = HistogramMetricFamily(name, family.help, labels=())
    buckets: list[tuple[str, float]] = []
    total = index = 0
    for octave in _LE_OCTAVES:
        edge_ns = 1 << octave
        while bucket_edge_ns(index + 1) <= edge_ns:
            total += found.buckets[index]
            index += 1
        buckets.append((repr(edge_ns / 1e9), total))
    # +Inf is what the buckets hold, not `count`: a writer may stand between its two additions.
    buckets.append(("+Inf", sum(found.buckets)))
    metric.add_metric([], buckets, sum_value=found.sum_ns / 1e9)
    return metric
