"""What a quantity of `monitoring.alert_on` is, out of the node's snapshot.

Owns: the meaning of each name (docs/monitoring.md tells it to people), sliding windows over counters. Must not know:
thresholds, clocks, who is told. Counters in shared memory know no time, so what happened in the last minute is the
difference of two looks; a window that is younger than its length counts from its first look and is not extrapolated,
or the first request of a node would be 60 a minute.

Bounds: a window keeps STEPS + 2 samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

from proxyd.config.conditions import Condition, Kind
from proxyd.shm.metrics import Distribution, Snapshot

__all__ = ["STEPS", "Meter", "Window"]

# A window moves by a 60th of its length: each second for a minute, each minute for an hour.
STEPS = 60

# What the node itself adds to an answer. Not the time to the first event: that is the model's, and the founding
# article's p99 is the one that a node keeps low "even when downstream AI services degrade".
_LOOP_LAG = "proxyd_loop_lag_seconds"
_OWN_LATENCY = ("proxyd_relay_lag_seconds", _LOOP_LAG, "proxyd_task_ack_seconds")
_HISTOGRAMS: Mapping[str, tuple[str, ...]] = {
    "latency": _OWN_LATENCY,
    "relay_lag": ("proxyd_relay_lag_seconds",),
    "time_to_first_event": ("proxyd_time_to_first_event_seconds",),
    "task_ack": ("proxyd_task_ack_seconds",),
    "loop_lag": ("proxyd_loop_lag_seconds",),
    "telemetry_lag": ("proxyd_telemetry_lag_seconds",),
}
_COUNTERS: Mapping[str, str] = {
    "backpressure_events": "proxyd_backpressure_events_total",
    "requests": "proxyd_requests_total",
    "client_aborts": "proxyd_client_aborts_total",
    "upstream_errors": "proxyd_upstream_errors_total",
    "worker_restarts": "proxyd_worker_restarts_total",
}
_LEVELS: Mapping[str, str] = {
    "queue_depth": "proxyd_queue_depth",
    "streams_active": "proxyd_streams_active",
    "upstream_connections": "proxyd_upstream_connections",
    "telemetry_spool_bytes": "proxyd_telemetry_spool_bytes",
}
# Cached and reasoning tokens are within these.
_TOKEN_KINDS = ("prompt", "completion")


class Window:
    """How much a counter grew in the last `span_s` seconds."""

    __slots__ = ("_samples", "_span_s", "_step_s")

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._step_s = span_s / STEPS
        self._samples: deque[tuple[float, int]] = deque()  # (time, total), oldest first

    def gained(self, now_s: float, total: int) -> int:
        """Takes the total of now; what came since the oldest sample that is not older than need be."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= now_s - self._span_s:
            samples.popleft()
        # A look is a little early or late; half a step of slack, or every second one would be passed over.
        if not samples or now_s - samples[-1][0] >= self._step_s / 2:
            samples.append((now_s, total))
            if len(samples) > 2 * STEPS:
                samples.popleft()
        return max(0, total - samples[0][1])

    def per_second(self, now_s: float, total: int) -> float:
        """The same as a rate: over the window's length, or its age while it is younger."""
        gained = self.gained(now_s, total)
        return gained / max(now_s - self._samples[0][0], 1.0)


class Meter:
    """Measures conditions, each look. `time_wait`: asked only where a condition wants it."""

    __slots__ = ("_conditions", "_reused", "_time_wait", "_windows")

    def __init__(self, conditions: Sequence[Condition], time_wait: Callable[[], int | None]) -> None:
        self._conditions = tuple(conditions)
        self._time_wait = time_wait
        counted = [condition for condition in conditions if condition.kind is Kind.COUNT]
        self._windows = {condition.text: Window(condition.window_s) for condition in counted}
        self._reused = {name: Window(60.0) for name in ("_upstream_acquires", "_upstream_reuses")}

    def measure(self, snapshot: Snapshot, now_s: float) -> dict[str, float | None]:
        """Each condition's value in its own unit, None where there is nothing to measure."""
        found: dict[str, float | None] = {}
        for condition in self._conditions:
            value = self._value(condition, snapshot, now_s)
            found[condition.text] = None if value is None else condition.in_unit(value)
        return found

    def _value(self, condition: Condition, snapshot: Snapshot, now_s: float) -> float | None:
        """In seconds, as a share of 1, as a count in the window, or as it is."""
        name = condition.quantity
        if condition.kind is Kind.TIME:
            assert condition.quantile is not None
            found = snapshot.last_minute
            if name == "latency" and not _is_telling(found.get(_LOOP_LAG), condition.quantile):
                found = {key: one for key, one in found.items() if key != _LOOP_LAG}
            return _slowest(found, _HISTOGRAMS[name], condition.quantile)
        if condition.kind is Kind.COUNT:
            total = _tokens(snapshot) if name == "tokens" else snapshot.total(_COUNTERS[name])
            return float(self._windows[condition.text].gained(now_s, total))
        if name == "upstream_reuse_ratio":
            return self._reuse_ratio(snapshot, now_s)
        if name == "breaker_state":
            return float(max(snapshot.highest.get("proxyd_breaker_state", {}).values(), default=0))
        if name == "sockets_time_wait":
            return self._time_wait()
        if condition.is_share:
            return _spool_share(snapshot)
        return float(_gauge(snapshot, _LEVELS[name]))

    def _reuse_ratio(self, snapshot: Snapshot, now_s: float) -> float | None:
        """Of the last minute's exchanges, those that found a pooled connection."""
        asked, reused = (window.gained(now_s, snapshot.total(name)) for name, window in self._reused.items())
        return reused / asked if asked else None


def _is_telling(found: Distribution | None, quantile: float) -> bool:
    """Whether the percentile is not just the largest sample: of a node that has started the one pulse that was late."""
    return found is not None and sum(found.buckets) * (1 - quantile) >= 1


def _slowest(found: Mapping[str, Distribution], names: Sequence[str], quantile: float) -> float | None:
    """The largest of these histograms' percentiles."""
    values = [found[name].quantile_s(quantile) for name in names if name in found]
    return max((value for value in values if value is not None), default=None)


def _tokens(snapshot: Snapshot) -> int:
    series = snapshot.counters.get("proxyd_tokens_total", {})
    return sum(value for labels, value in series.items() if dict(labels).get("kind") in _TOKEN_KINDS)


def _spool_share(snapshot: Snapshot) -> float | None:
    """Of all that may lie in the spool's folder."""
    bound = _gauge(snapshot, "_telemetry_spool_max")
    return _gauge(snapshot, "_telemetry_spool_used") / bound if bound else None


def _gauge(snapshot: Snapshot, name: str) -> int:
    return sum(snapshot.gauges.get(name, {}).values())
