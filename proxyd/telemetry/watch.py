"""The node's watchman: once a second it looks at the whole node's metrics, says what is an alert, and how fast it goes.

Owns: the look, and what follows from it: the events `alert_raised` and `alert_cleared`, `proxyd_alert_active`, and what
status tells of alerts and of rates. Must not know: the writer, beside which it runs in the telemetry process because
that one is alone on the node; when an alert is one (alerts.py), what a quantity is (quantities.py).

Invariants: a look that fails ends nothing, neither the writer nor the next look. Cost: one metrics.read a second.

A new telemetry process (after a death, a reload) takes over what was raised: that is in counters, which survive, unlike
gauges. `_alert_raised` and `_alert_ended` count; `_alert_raised_at` grows to the wall time of the last one. What is
counted over a minute begins at its first look.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from proxyd.clock import Clock
from proxyd.config.conditions import parse
from proxyd.shm.metrics import Labels, Snapshot
from proxyd.telemetry.alerts import Alerts, Change, State
from proxyd.telemetry.quantities import Meter, Window

__all__ = ["LOOK_S", "NO_VALUE", "RATES", "VALUE_PARTS", "Watch", "watching"]

LOOK_S = 1.0
# A gauge is a whole number: values and rates are told in these parts.
VALUE_PARTS = 1_000_000
NO_VALUE = -1
# After a look that failed the next failures are told this often.
TELL_AGAIN_S = 60.0
# What status tells as a rate of the last minute: the name there, and the counter.
RATES = {
    "requests": "proxyd_requests_total",
    "events": "proxyd_events_relayed_total",
    "bytes": "proxyd_bytes_relayed_total",
}


class Gauges(Protocol):
    """What we need of shm.metrics.Metrics."""

    def counter(self, name: str, **labels: str) -> Any: ...
    def gauge(self, name: str, **labels: str) -> Any: ...


class EventLog(Protocol):
    """What we need of log.Log."""

    def info(self, event: str, /, **fields: Any) -> None: ...
    def warning(self, event: str, /, **fields: Any) -> None: ...
    def error(self, event: str, /, **fields: Any) -> None: ...


class Watch:
    """One a telemetry process. `look` is called once a second."""

    __slots__ = ("_alerts", "_clock", "_failed_at_s", "_gauges", "_has_begun", "_log", "_meter", "_rates", "_read")

    def __init__(
        self,
        alert_on: Sequence[str],
        read: Callable[[float], Snapshot],
        gauges: Gauges,
        log: EventLog,
        clock: Clock,
        time_wait: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`read` gives the node's snapshot at a monotonic time. Raises ConditionError for what is no condition."""
        conditions = [parse(text) for text in alert_on]
        self._alerts = Alerts(conditions)
        self._meter = Meter(conditions, time_wait)
        self._rates = {name: Window(60.0) for name in RATES}
        self._read, self._gauges, self._log, self._clock = read, gauges, log, clock
        self._failed_at_s: float | None = None
        self._has_begun = False

    def _begin(self, snapshot: Snapshot, now_s: float) -> None:
        """Lists what is watched, with what the process before us had raised: still watched, or no more in the file."""
        listed = {condition.text for condition in self._alerts.conditions}
        for text in listed:
            self._gauges.gauge("_alert_listed", alert=text).set(1)
            self._gauges.gauge("proxyd_alert_active", alert=text).set(0)
        wall_s = self._clock.wall()
        counters = snapshot.counters
        ended = _by_alert(counters, "_alert_ended")
        raised_at = _by_alert(counters, "_alert_raised_at")
        for text, times in _by_alert(counters, "_alert_raised").items():
            if times <= ended.get(text, 0):
                continue
            since_s = min(float(raised_at.get(text, 0)), wall_s)
            if text in listed:
                self._alerts.inherit(text, now_s - (wall_s - since_s))
                self._gauges.gauge("_alert_since", alert=text).set(int(since_s))
                self._gauges.gauge("proxyd_alert_active", alert=text).set(1)
            else:
                self._gauges.counter("_alert_ended", alert=text).add(times - ended.get(text, 0))
                detail = "no longer in monitoring.alert_on"
                self._log.info("alert_cleared", alert=text, lasted_s=round(wall_s - since_s, 1), detail=detail)

    def look(self) -> None:
        """Never raises."""
        now_s = self._clock.monotonic()
        try:
            self._look(now_s)
        except Exception as error:  # noqa: BLE001  the writer lives in this process
            if self._failed_at_s is None or now_s - self._failed_at_s >= TELL_AGAIN_S:
                self._failed_at_s = now_s
                self._log.error("alerts_not_evaluated", detail=f"{type(error).__name__}: {error}")

    def _look(self, now_s: float) -> None:
        snapshot = self._read(now_s)
        if not self._has_begun:
            self._begin(snapshot, now_s)
            self._has_begun = True
        for name, window in self._rates.items():
            rate = window.per_second(now_s, snapshot.total(RATES[name]))
            self._gauges.gauge("_rate", of=name).set(round(rate * VALUE_PARTS))
        values = self._meter.measure(snapshot, now_s)
        for text, value in values.items():
            parts = NO_VALUE if value is None else min(round(value * VALUE_PARTS), 2**62)
            self._gauges.gauge("_alert_value", alert=text).set(parts)
        for change in self._alerts.decide(values, now_s):
            self._tell(change)

    def _tell(self, change: Change) -> None:
        text = change.condition.text
        is_raised = change.state is State.RAISED
        self._gauges.gauge("_alert_since", alert=text).set(int(self._clock.wall()) if is_raised else 0)
        self._gauges.gauge("proxyd_alert_active", alert=text).set(int(is_raised))
        value = None if change.value is None else round(change.value, 3)
        self._gauges.counter("_alert_raised" if is_raised else "_alert_ended", alert=text).add(1)
        if is_raised:
            at = self._gauges.counter("_alert_raised_at", alert=text)
            at.add(max(0, int(self._clock.wall()) - at.value))
            self._log.warning("alert_raised", alert=text, value=value)
        else:
            self._log.info("alert_cleared", alert=text, value=value, lasted_s=round(change.lasted_s, 1))


def _by_alert(counters: dict[str, dict[Labels, int]], name: str) -> dict[str, int]:
    return {dict(labels).get("alert", ""): value for labels, value in counters.get(name, {}).items()}


@contextlib.contextmanager
def watching(watch: Watch, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """Lets it look each second, from now to the end of the block."""
    handle: asyncio.TimerHandle | None = None

    def run() -> None:
        nonlocal handle
        watch.look()
        handle = loop.call_later(LOOK_S, run)

    run()
    try:
        yield
    finally:
        if handle is not None:
            handle.cancel()
