"""Alerts: when one is raised and cleared, what each quantity is, and what follows from a look."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from proxyd.config.conditions import LATENCIES, QUANTITIES, Kind, parse
from proxyd.shm.metrics import Metrics, Snapshot, read
from proxyd.shm.region import Region
from proxyd.telemetry.alerts import CLEAR_AFTER_S, Alerts, Change, State
from proxyd.telemetry.quantities import STEPS, Meter, Window
from proxyd.telemetry.watch import TELL_AGAIN_S, VALUE_PARTS, Watch

DEPTH = "queue_depth > 800"


class Stage:
    """One condition, looked at once a second."""

    def __init__(self, text: str = DEPTH) -> None:
        self.alerts = Alerts([parse(text)])
        self.text = text
        self.now = 1000.0

    def see(self, *values: float | None) -> list[Change]:
        found = []
        for value in values:
            found += self.alerts.decide({self.text: value}, self.now)
            self.now += 1.0
        return found


def test_one_look_is_no_alert_and_two_in_a_row_are() -> None:
    stage = Stage()
    assert stage.see(900, 0, 900) == []
    (change,) = stage.see(901)
    assert (change.state, change.value, change.condition.text) == (State.RAISED, 901, DEPTH)
    assert stage.see(902, 903) == []
    assert stage.alerts.is_raised(DEPTH)


def test_an_alert_is_cleared_when_it_was_false_for_ten_seconds() -> None:
    stage = Stage()
    stage.see(900, 900)
    assert stage.see(*[0] * int(CLEAR_AFTER_S)) == []
    (change,) = stage.see(0)
    assert (change.state, change.value, change.lasted_s) == (State.QUIET, 0, CLEAR_AFTER_S + 1)
    assert not stage.alerts.is_raised(DEPTH)
    assert stage.see(0) == []


def test_what_swings_about_its_threshold_stays_raised() -> None:
    stage = Stage()
    stage.see(900, 900)
    assert stage.see(*[700, 700, 900] * 20) == []
    assert stage.alerts.is_raised(DEPTH)


def test_what_nobody_knows_raises_nothing_and_clears_in_the_end() -> None:
    stage = Stage()
    assert stage.see(None, None, None) == []
    stage.see(900, 900)
    assert [change.state for change in stage.see(*[None] * 12)] == [State.QUIET]


def test_conditions_are_decided_each_for_itself() -> None:
    low, high = parse("streams_active > 1"), parse("streams_active > 5")
    alerts = Alerts([low, high])
    for now in (0.0, 1.0):
        changes = alerts.decide({low.text: 3.0, high.text: 3.0}, now)
    assert [change.condition for change in changes] == [low]


# --- windows -------------------------------------------------------------------------------------------------------


def test_a_window_counts_what_came_in_its_length() -> None:
    window = Window(60.0)
    for second in range(200):
        gained = window.gained(1000.0 + second, second * 10)
    assert gained == 600
    for second in range(200, 259):
        gained = window.gained(1000.0 + second, 1990)
    assert gained == 10
    assert window.gained(1259.0, 1990) == 0


def test_a_young_window_is_not_extrapolated_but_its_rate_is_over_its_age() -> None:
    window = Window(60.0)
    assert window.gained(0.0, 500) == 0  # what was before the first look is nobody's
    assert window.gained(2.0, 520) == 20
    assert window.per_second(4.0, 540) == 10


def test_a_window_keeps_as_many_samples_as_it_has_steps() -> None:
    window = Window(3600.0)
    for second in range(8000):
        gained = window.gained(float(second), second)
        assert len(window._samples) <= STEPS * 2 + 1
    assert gained == pytest.approx(3600, abs=60)


# --- quantities ----------------------------------------------------------------------------------------------------


def measured(region: Region, *texts: str, meter: Meter | None = None, now: float = 1000.0) -> dict[str, float | None]:
    meter = meter or Meter([parse(text) for text in texts], lambda: 42)
    return meter.measure(read(region, now), now)


def test_the_latency_is_what_the_node_adds_and_not_the_model() -> None:
    region = Region.create(4)
    metrics = Metrics(region, 0)
    metrics.tick(1000.0)
    metrics.histogram("proxyd_time_to_first_event_seconds").record(30.0)
    metrics.histogram("proxyd_relay_lag_seconds").record(0.001)
    for _ in range(101):
        metrics.histogram("proxyd_loop_lag_seconds").record(0.300)
    metrics.histogram("proxyd_telemetry_lag_seconds").record(9.0)
    found = measured(region, "p99_latency > 200ms", "p99_relay_lag > 1ms", "p50_time_to_first_event > 1s")
    assert found["p99_latency > 200ms"] == pytest.approx(300, rel=0.05)
    assert found["p99_relay_lag > 1ms"] == pytest.approx(1, rel=0.05)
    assert found["p50_time_to_first_event > 1s"] == pytest.approx(30, rel=0.05)


def test_a_few_late_pulses_of_a_node_that_has_just_started_are_no_latency() -> None:
    region = Region.create(4)
    metrics = Metrics(region, 0)
    metrics.tick(1000.0)
    metrics.histogram("proxyd_relay_lag_seconds").record(0.001)
    for _ in range(30):
        metrics.histogram("proxyd_loop_lag_seconds").record(0.300)
    found = measured(region, "p99_latency > 200ms", "p99_loop_lag > 200ms")
    assert found["p99_latency > 200ms"] == pytest.approx(1, rel=0.05)
    assert found["p99_loop_lag > 200ms"] == pytest.approx(300, rel=0.05)


def test_a_latency_of_which_nothing_was_measured_in_the_last_minute_is_unknown() -> None:
    region = Region.create(4)
    metrics = Metrics(region, 0)
    metrics.tick(100.0)
    metrics.histogram("proxyd_relay_lag_seconds").record(5.0)
    assert measured(region, "p99_latency > 200ms") == {"p99_latency > 200ms": None}


def test_levels_are_summed_over_the_node_and_states_are_the_worst() -> None:
    region = Region.create(4)
    for seat, state in ((0, 2), (1, 0)):
        metrics = Metrics(region, seat)
        metrics.gauge("proxyd_streams_active", tenant=f"t{seat}").set(3)
        metrics.gauge("proxyd_upstream_connections", upstream="a", state="busy").set(5)
        metrics.gauge("proxyd_breaker_state", upstream="a").set(state)
    texts = ("streams_active > 1", "upstream_connections > 1", "breaker_state >= 2", "queue_depth > 800")
    found = measured(region, *texts, "sockets_time_wait > 1")
    assert list(found.values()) == [6, 10, 2, 0, 42]


def test_the_spool_is_bytes_or_a_share_of_its_bound() -> None:
    region = Region.create(4)
    share, size = "telemetry_spool_bytes > 80%", "telemetry_spool_bytes > 100"
    assert measured(region, share, size) == {share: None, size: 0}
    metrics = Metrics(region, 2)
    metrics.gauge("_telemetry_spool_used").set(900)
    metrics.gauge("_telemetry_spool_max").set(1000)
    metrics.gauge("proxyd_telemetry_spool_bytes").set(700)
    assert measured(region, share, size) == {share: 90, size: 700}


def test_what_is_counted_is_counted_from_the_first_look() -> None:
    region = Region.create(4)
    metrics = Metrics(region, 0)
    texts = ("requests > 1/min", "requests > 1/s", "tokens > 1/min", "upstream_reuse_ratio < 50%")
    meter = Meter([parse(text) for text in texts], lambda: None)
    metrics.counter("proxyd_requests_total", route="/a", status="200").add(1000)
    assert measured(region, meter=meter, now=1000.0) == dict(zip(texts, (0, 0, 0, None), strict=True))
    metrics.counter("proxyd_requests_total", route="/a", status="200").add(100)
    metrics.counter("proxyd_requests_total", route="/b", status="500").add(20)
    for kind, count in (("prompt", 10), ("completion", 5), ("cached", 8), ("reasoning", 4)):
        metrics.counter("proxyd_tokens_total", kind=kind, model="m").add(count)
    metrics.counter("_upstream_acquires", upstream="a").add(4)
    metrics.counter("_upstream_reuses", upstream="a").add(1)
    assert measured(region, meter=meter, now=1001.0) == dict(zip(texts, (120, 2, 15, 25), strict=True))


def test_every_quantity_can_be_measured_on_a_node_without_a_request() -> None:
    units = {Kind.LEVEL: "1", Kind.RATIO: "1", Kind.BYTES: "1", Kind.COUNT: "1/min", Kind.TIME: "1s"}
    texts = [f"{name} > {units[kind]}" for name, kind in QUANTITIES.items()]
    texts += [f"p95_{name} > 1s" for name in LATENCIES]
    found = measured(Region.create(4), *texts)
    assert len(found) == len(texts)
    assert not any(value and parse(text).holds(value) for text, value in found.items() if "time_wait" not in text)


# --- the look ------------------------------------------------------------------------------------------------------


class Told:
    """A log and a clock."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []
        self.now = 1000.0

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append((level, event, fields))

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_800_000_000.0 + self.now

    def events(self) -> list[tuple[str, str]]:
        return [(level, event) for level, event, _ in self.lines]


def watch_of(told: Any, *texts: str) -> tuple[Watch, Metrics, Region]:
    region = Region.create(4)
    own = Metrics(region, 2)
    return Watch(texts, lambda now: read(region, now), own, told, told), Metrics(region, 0), region


def gauges(region: Region, name: str) -> dict[str, int]:
    return {dict(labels)["alert"]: value for labels, value in read(region, 1000.0).gauges.get(name, {}).items()}


def test_an_alert_is_an_event_and_a_gauge_and_so_is_its_end() -> None:
    told = Told()
    text = "streams_active > 5"
    watch, metrics, region = watch_of(told, text)
    streams = metrics.gauge("proxyd_streams_active", tenant="a")
    streams.set(9)
    for _ in range(2):
        watch.look()
        told.now += 1
    assert told.lines == [("warning", "alert_raised", {"alert": text, "value": 9.0})]
    assert gauges(region, "proxyd_alert_active") == {text: 1}
    assert gauges(region, "_alert_since") == {text: 1_800_001_001}
    assert gauges(region, "_alert_value") == {text: 9 * VALUE_PARTS}
    streams.set(1)
    for _ in range(12):
        watch.look()
        told.now += 1
    assert told.lines[1:] == [("info", "alert_cleared", {"alert": text, "value": 1.0, "lasted_s": 11.0})]
    assert gauges(region, "proxyd_alert_active") == gauges(region, "_alert_since") == {text: 0}


def test_a_look_that_fails_is_told_once_a_minute_and_the_next_one_looks() -> None:
    told = Told()
    fails: Iterator[bool] = iter([True] * 70 + [False] * 2)
    region = Region.create(4)
    Metrics(region, 0).gauge("proxyd_streams_active", tenant="a").set(9)

    def snapshot(now: float) -> Snapshot:
        if next(fails):
            raise OSError("no memory")
        return read(region, now)

    watch = Watch(["streams_active > 5"], snapshot, Metrics(region, 2), told, told)  # type: ignore[arg-type]
    for _ in range(72):
        watch.look()
        told.now += 1
    assert told.events() == [("error", "alerts_not_evaluated")] * 2 + [("warning", "alert_raised")]
    assert told.lines[0][2] == {"detail": "OSError: no memory"}
    assert TELL_AGAIN_S == 60


def test_a_new_process_takes_over_what_was_raised() -> None:
    told = Told()
    kept, dropped = "streams_active > 5", "streams_active > 6"
    watch, metrics, region = watch_of(told, kept, dropped)
    metrics.gauge("proxyd_streams_active", tenant="a").set(9)
    for _ in range(2):
        watch.look()
        told.now += 1
    assert told.events() == [("warning", "alert_raised")] * 2
    told.lines.clear()
    told.now += 30
    reborn = Watch([kept], lambda now: read(region, now), Metrics(region, 2), told, told)  # type: ignore[arg-type]
    assert gauges(region, "proxyd_alert_active") == {kept: 0, dropped: 0}  # as the death of a process leaves them
    reborn.look()
    assert gauges(region, "proxyd_alert_active") == {kept: 1, dropped: 0}
    assert gauges(region, "_alert_since")[kept] == 1_800_001_001
    detail = "no longer in monitoring.alert_on"
    assert told.lines == [("info", "alert_cleared", {"alert": dropped, "lasted_s": 31.0, "detail": detail})]
    metrics.gauge("proxyd_streams_active", tenant="a").set(0)
    for _ in range(12):
        told.now += 1
        reborn.look()
    assert told.lines[1:] == [("info", "alert_cleared", {"alert": kept, "value": 0.0, "lasted_s": 42.0})]
    third = Watch([kept], lambda now: read(region, now), Metrics(region, 2), told, told)  # type: ignore[arg-type]
    third.look()
    assert gauges(region, "proxyd_alert_active")[kept] == 0
    assert len(told.lines) == 2


def test_rates_are_told_without_any_condition() -> None:
    told = Told()
    watch, metrics, region = watch_of(told)
    watch.look()
    metrics.counter("proxyd_events_relayed_total").add(50)
    metrics.counter("proxyd_requests_total", route="/a", status="200").add(5)
    told.now += 10
    watch.look()
    rates = {dict(labels)["of"]: value / VALUE_PARTS for labels, value in read(region, 0.0).gauges["_rate"].items()}
    assert rates == {"requests": 0.5, "events": 5.0, "bytes": 0.0}
