"""The text of /metrics and the document of /status, from cells that were written as processes write them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxyd.cli.status import page
from proxyd.shm.beats import Beat, State
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.web.exposition import FAMILIES, render
from proxyd.web.status import build_status

# CONTRACT section 8; of what this version has not yet there is the family and no sample.
LATER = {"proxyd_task_ack_seconds", "proxyd_queue_depth"}


def samples(region: Region, time_wait: int | None = 3) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = render(read(region, 1000.0), time_wait).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def busy_region() -> Region:
    """Two workers, telemetry, the master."""
    region = Region.create(4)
    for slot in range(2):
        metrics = Metrics(region, slot)
        metrics.tick(1000.0)
        metrics.counter("proxyd_requests_total", route="/v1/models", status="200").add(5)
        metrics.gauge("proxyd_streams_active", tenant="acme").add(slot + 1)
        metrics.counter("_upstream_acquires", upstream="up").add(10)
        metrics.counter("_upstream_reuses", upstream="up").add(slot * 10)
        metrics.gauge("proxyd_breaker_state", upstream="up").set(2 if slot else 0)
        metrics.gauge("proxyd_upstream_connections", upstream="up", state="idle").set(3)
        metrics.histogram("proxyd_relay_lag_seconds").record(0.002)
        for pid in (0, 100 + slot):
            Beat(region, slot).birth(pid, 7, 990.0, slot, 1)
    return region


def test_the_node_is_summed_over_its_workers() -> None:
    found = samples(busy_region())
    assert found["proxyd_requests_total", (("route", "/v1/models"), ("status", "200"))] == 10
    assert found["proxyd_streams_active", (("tenant", "acme"),)] == 3
    assert found["proxyd_upstream_connections", (("state", "idle"), ("upstream", "up"))] == 6


def test_the_reuse_ratio_is_a_quotient_of_sums() -> None:
    assert samples(busy_region())["proxyd_upstream_reuse_ratio", (("upstream", "up"),)] == 0.5


def test_a_breaker_shows_its_worst_worker_and_not_a_sum() -> None:
    assert samples(busy_region())["proxyd_breaker_state", (("upstream", "up"),)] == 2


def test_inner_names_stay_inside() -> None:
    assert not any(name.startswith("_") for name, _ in samples(busy_region()))


def test_histogram_buckets_grow_and_end_in_the_count() -> None:
    found = samples(busy_region())
    name = "proxyd_relay_lag_seconds_bucket"
    buckets = [(dict(labels)["le"], value) for (one, labels), value in found.items() if one == name]
    values = [value for _, value in sorted(buckets, key=lambda pair: float(pair[0]))]
    assert values == sorted(values)
    assert values[-1] == 2 == found["proxyd_relay_lag_seconds_count", ()]
    below = max(value for le, value in buckets if float(le) < 0.002)
    above = min(value for le, value in buckets if float(le) > 0.0021)
    assert (below, above) == (0, 2)


def test_what_was_never_counted_is_zero_and_what_is_unknown_is_absent() -> None:
    found = samples(Region.create(3), time_wait=None)
    assert found["proxyd_events_relayed_total", ()] == 0
    assert not any(name == "proxyd_sockets_time_wait" for name, _ in found)


def test_every_metric_that_the_code_names_is_public_and_in_the_table() -> None:
    root = Path(__file__).resolve().parents[3] / "proxyd"
    asked = re.compile(r"\.(?:counter|gauge|histogram)\(\s*\"(\w+)\"")
    named = {name for path in root.rglob("*.py") for name in asked.findall(path.read_text())}
    assert {name for name in named if not name.startswith("_")} <= set(FAMILIES)
    computed = {
        "proxyd_upstream_reuse_ratio",
        "proxyd_sockets_time_wait",
        "proxyd_telemetry_spool_used_ratio",
        "proxyd_telemetry_store_failing",
        "proxyd_last_reload_successful",
    }
    assert set(FAMILIES) - computed - LATER <= named, "in the table, counted by nobody"
    assert not LATER & named


def test_what_others_know_is_derived() -> None:
    region = Region.create(4)
    text = render(read(region, 1000.0), None).decode()
    assert "proxyd_telemetry_store_failing 0.0" in text
    assert "proxyd_telemetry_spool_used_ratio 0.0" in text
    assert "proxyd_last_reload_successful{" not in text
    metrics = Metrics(region, 2)
    metrics.gauge("_telemetry_spool_used").set(250)
    metrics.gauge("_telemetry_spool_max").set(1000)
    metrics.gauge("_store_failing_since", reason="gone").set(1_800_000_000)
    text = render(read(region, 1000.0), None, {"kind": "upgrade", "ok": False}).decode()
    assert "proxyd_telemetry_store_failing 1.0" in text
    assert "proxyd_telemetry_spool_used_ratio 0.25" in text
    assert 'proxyd_last_reload_successful{kind="upgrade"} 0.0' in text
    assert 'kind="reload"} 1.0' in render(read(region, 1000.0), None, {"kind": "reload", "ok": True}).decode()


def status(region: Region, percentiles: Sequence[float] = (0.5, 0.999)) -> dict:
    return build_status(region, read(region, 1000.0), monotonic_s=1000.0, percentiles=percentiles, time_wait=4)


def test_status_tells_processes_latencies_and_upstreams() -> None:
    region = busy_region()
    master = Beat(region, 3)
    master.birth(0, 1, 400.0)
    master.birth(99, 1, 400.0)
    master.enter(State.READY)
    Beat(region, 1).count_restart()
    document = status(region)
    assert (document["pid"], document["state"], document["uptime_s"]) == (99, "ready", 600.0)
    assert [worker["pid"] for worker in document["workers"]] == [100, 101]
    assert [worker["restarts"] for worker in document["workers"]] == [0, 1]
    lag = document["latency"]["proxyd_relay_lag_seconds"]
    assert lag["last_minute"]["count"] == lag["since_start"]["count"] == 2
    assert lag["last_minute"]["p50"] == pytest.approx(0.002, rel=0.05)
    assert "p99.9" in lag["since_start"]
    assert document["upstreams"]["up"] == {
        "breaker": "open",
        "connections": {"idle": 6},
        "pool": {"idle": 6, "active": 0, "connecting": 0},
        "connects": 0,
        "reuse_ratio": 0.5,
        "errors": {},
        "failing_since": None,
        "failing_kind": None,
    }
    assert document["sockets"] == {"time_wait": 4}


def test_an_upstream_that_fails_and_has_no_other_beside_it_does_not_read_as_healthy() -> None:
    region = Region.create(4)
    for slot, since in ((0, 1_000_100), (1, 1_000_050)):
        for pid in (0, 100 + slot):
            Beat(region, slot).birth(pid, 7, 990.0, slot, 1)
        metrics = Metrics(region, slot)
        metrics.gauge("proxyd_breaker_state", upstream="up").set(0)
        metrics.gauge("_failing_since", upstream="up", kind="refused").set(since)
        metrics.counter("proxyd_upstream_errors_total", upstream="up", kind="refused").add(30)
    told = status(region)["upstreams"]["up"]
    assert (told["breaker"], told["failing_since"], told["failing_kind"]) == ("failing", 1_000_050, "refused")
    assert "up: failing since 1970-01-12 13:47:30 UTC: refused" in page(status(region))
    assert "up errors: refused 60" in page(status(region))
    Metrics(region, 1).gauge("_answered_at", upstream="up").set(1_000_060)
    assert status(region)["upstreams"]["up"]["failing_since"] == 1_000_100
    Metrics(region, 1).gauge("_answered_at", upstream="up").set(1_000_101)
    assert status(region)["upstreams"]["up"]["breaker"] == "closed"


def test_the_page_for_people_names_every_process_and_survives_an_idle_node() -> None:
    busy, idle = page(status(busy_region())), page(status(Region.create(4)))
    assert "worker 1" in busy
    assert "relay lag" in busy
    assert "no latencies yet" in idle


def test_the_page_fits_80_columns_with_large_numbers_and_sets_them_to_the_right() -> None:
    region = busy_region()
    metrics = Metrics(region, 0)
    metrics.counter("proxyd_requests_total", route="/v1/models", status="200").add(10**10)
    metrics.counter("proxyd_client_aborts_total").add(10**9)
    metrics.counter("proxyd_events_relayed_total").add(10**13)
    metrics.gauge("proxyd_upstream_connections", upstream="up", state="busy").set(16_000)
    metrics.gauge("proxyd_upstream_connections", upstream="up", state="connecting").set(4_000)
    for name in ("proxyd_time_to_first_event_seconds", "proxyd_telemetry_lag_seconds", "proxyd_loop_lag_seconds"):
        metrics.histogram(name).record(0.0012345)
    for slot, streams in ((0, 30_000), (1, 7)):
        Beat(region, slot).enter(State.READY)
        Beat(region, slot).set_streams(streams)
    lines = page(status(region, [0.5, 0.95, 0.99, 0.999])).splitlines()
    assert max(map(len, lines)) <= 80, lines
    rows = [line for line in lines if line.startswith(("process", "worker"))]
    ends = [line.index(word) + len(word) for line, word in zip(rows, ("streams", "30000", " 7"), strict=True)]
    assert len(set(ends)) == 1, rows


def test_the_page_tells_a_process_that_says_ready_and_does_not_beat() -> None:
    region = busy_region()
    for slot in range(2):
        Beat(region, slot).enter(State.READY)
    Beat(region, 1).beat(1000.0)
    text = page(status(region))
    assert text.count("ready, silent 1") == 1


def test_status_tells_groups_lag_dead_letters_and_how_full_the_spool_is() -> None:
    region = busy_region()
    Beat(region, 3).birth(99, 1, 900.0)
    metrics = Metrics(region, 2)
    metrics.tick(1000.0)
    for rows in (1, 199, 250):
        metrics.histogram("_telemetry_group_rows").record(rows * 1e-6)
    metrics.histogram("proxyd_telemetry_lag_seconds").record(0.02)
    metrics.gauge("proxyd_telemetry_spool_bytes").set(5000)
    metrics.gauge("_telemetry_spool_used").set(2**20)
    metrics.gauge("_telemetry_spool_max").set(2**22)
    metrics.gauge("_telemetry_dead_letters").set(3)
    metrics.gauge("_telemetry_requeue_bytes").set(2048)
    told = status(region)["telemetry"]
    assert (told["groups"], told["groups_per_s"], told["group_rows"]) == (3, 0.05, 150.0)  # in 60 s, at 1000.0
    assert (told["spool_bytes"], told["spool_used"], told["spool_max"], told["spool_share"]) == (
        5000,
        2**20,
        2**22,
        0.25,
    )
    assert (told["dead_letters"], told["requeue_bytes"]) == (3, 2048)
    assert told["lag"]["p50"] == pytest.approx(0.02, rel=0.05)
    text = page(status(region))
    assert "groups: 0.05 a second, 150 rows each; lag p50 20" in text
    assert "spool folder: 1 MiB of 4 MiB (25.0%)" in text
    assert "dead letters: 3; `proxyd spool` lists them" in text
    assert "stored again: 2 KiB are left" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_size_of_a_group_is_that_since_the_start_when_none_was_committed_in_the_last_minute() -> None:
    region = busy_region()
    metrics = Metrics(region, 2)
    metrics.tick(100.0)
    metrics.histogram("_telemetry_group_rows").record(7e-6)
    told = status(region)["telemetry"]
    assert (told["groups"], told["groups_per_s"], told["group_rows"]) == (1, 0.0, 7.0)
    assert status(Region.create(4))["telemetry"]["group_rows"] is None
