"""monitoring.alert_on: what a condition says, and what is none."""

from __future__ import annotations

import pytest

from proxyd.config.conditions import LATENCIES, MAX_TEXT, QUANTITIES, ConditionError, Kind, parse


def test_a_condition_is_read_as_it_is_written() -> None:
    found = parse("p99_latency > 200ms")
    assert (found.kind, found.quantity, found.operator, found.threshold) == (Kind.TIME, "latency", ">", 200)
    assert (found.unit, found.quantile) == ("ms", 0.99)
    found = parse("backpressure_events>=100/min")
    assert (found.kind, found.quantity, found.operator, found.threshold) == (
        Kind.COUNT,
        "backpressure_events",
        ">=",
        100,
    )
    assert (found.unit, found.quantile) == ("/min", None)


@pytest.mark.parametrize(("name", "quantile"), [("p50", 0.5), ("p05", 0.05), ("p999", 0.999), ("p9999", 0.9999)])
def test_a_percentile_is_what_follows_the_point(name: str, quantile: float) -> None:
    assert parse(f"{name}_relay_lag > 1s").quantile == quantile


def test_a_time_without_a_percentile_is_its_p99() -> None:
    assert (parse("loop_lag > 1s").quantity, parse("loop_lag > 1s").quantile) == ("loop_lag", 0.99)


@pytest.mark.parametrize(
    ("text", "measured", "shown"),
    [
        ("p99_latency > 200ms", 0.25, 250),
        ("p99_latency > 2m", 90.0, 1.5),
        ("requests > 1/s", 120.0, 2),
        ("requests > 1/min", 120.0, 120),
        ("requests > 1", 120.0, 120),
        ("requests > 1/h", 120.0, 120),
        ("upstream_reuse_ratio < 80%", 0.5, 50),
        ("upstream_reuse_ratio < 0.8", 0.5, 0.5),
        ("telemetry_spool_bytes > 1000", 7.0, 7),
    ],
)
def test_a_value_is_told_as_the_condition_is_written(text: str, measured: float, shown: float) -> None:
    assert parse(text).in_unit(measured) == pytest.approx(shown)


def test_a_rate_of_an_hour_is_counted_over_an_hour_and_the_others_over_a_minute() -> None:
    spans = [parse(f"worker_restarts > 3{unit}").window_s for unit in ("/h", "/min", "/s", "")]
    assert spans == [3600, 60, 60, 60]


@pytest.mark.parametrize(
    ("operator", "below", "at", "above"),
    [(">", False, False, True), (">=", False, True, True), ("<", True, False, False), ("<=", True, True, False)],
)
def test_a_condition_holds_by_its_operator(operator: str, below: bool, at: bool, above: bool) -> None:
    condition = parse(f"queue_depth {operator} 5")
    assert [condition.holds(value) for value in (4.0, 5.0, 6.0)] == [below, at, above]
    assert not condition.holds(None)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not a condition"),
        ("queue_depth > ten", "is not a condition"),
        ("queue_depth > " + "1" * MAX_TEXT, "longer than"),
        ("queue_dept > 1", 'no quantity "queue_dept"'),
        ("p99_latency > 1", "needs a unit"),
        ("p99_latency > 1%", "needs a unit"),
        ("loop_lag > 1/min", "needs a unit"),
        ("p100_latency > 1s", "no percentile"),
        ("requests > 5ms", "ms is no unit"),
        ("requests > 5%", "% is no unit"),
        ("queue_depth > 5/min", "has no rate"),
        ("queue_depth > 5%", "has no unit %"),
        ("telemetry_spool_bytes > 5s", "has no unit s"),
        ("upstream_reuse_ratio < 5h", "has no unit h"),
    ],
)
def test_what_is_no_condition_says_why_and_what_to_write(text: str, part: str) -> None:
    with pytest.raises(ConditionError) as caught:
        parse(text)
    assert part in caught.value.message
    assert caught.value.remedy


def test_every_quantity_has_a_condition_that_is_one() -> None:
    units = {Kind.LEVEL: "1", Kind.RATIO: "50%", Kind.BYTES: "80%", Kind.COUNT: "1/min", Kind.TIME: "1s"}
    for name, kind in QUANTITIES.items():
        assert parse(f"{name} > {units[kind]}").quantity == name
    for name in LATENCIES:
        assert parse(f"p95_{name} > 1s").quantity == name
