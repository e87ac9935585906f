"""Workers by seat, generations, the last reload, alerts and rates in the document of /status."""

from __future__ import annotations

from typing import Any

from proxyd import __version__
from proxyd.shm.beats import Beat, State
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region
from proxyd.telemetry.watch import NO_VALUE, VALUE_PARTS, Watch
from proxyd.web.exposition import render
from proxyd.web.status import build_status

NOW = 1000.0


class Node:
    """A region with eight seats for workers, and what the master writes into it."""

    def __init__(self) -> None:
        self.region = Region.create(10)
        self.notice: dict[str, Any] | None = None
        self.pids = 100

    def boot(self, seat: int, slot: int, generation: int, *, streams: int = 0, age_s: float = 5.0) -> Beat:
        self.pids += 1
        beat = Beat(self.region, seat)
        for pid in (0, self.pids):
            beat.birth(pid, 7, NOW - age_s, slot, generation)
        beat.enter(State.READY)
        beat.set_streams(streams)
        beat.beat(NOW)
        return beat

    def status(self) -> dict[str, Any]:
        snapshot = read(self.region, NOW)
        return build_status(
            self.region, snapshot, monotonic_s=NOW, percentiles=[0.99], time_wait=0, notice=self.notice
        )


def test_workers_are_the_seats_with_a_process_the_newest_generation_first() -> None:
    node = Node()
    node.boot(0, 0, 1)
    node.boot(1, 1, 1)
    node.boot(5, 1, 2)
    node.boot(2, 0, 2)
    told = [(one["slot"], one["seat"], one["generation"]) for one in node.status()["workers"]]
    assert told == [(0, 2, 2), (1, 5, 2), (0, 0, 1), (1, 1, 1)]


def test_a_dead_worker_of_the_serving_generation_is_shown_and_those_of_a_retired_one_are_not() -> None:
    node = Node()
    for seat, slot, generation in ((0, 0, 1), (1, 1, 1), (2, 0, 2), (3, 1, 2)):
        node.boot(seat, slot, generation)
    for seat in (0, 1, 3):
        Beat(node.region, seat).death()
    told = [(one["slot"], one["seat"], one["pid"], one["state"]) for one in node.status()["workers"]]
    assert told == [(0, 2, 103, "ready"), (1, 3, None, "gone")]
    Beat(node.region, 2).death()
    assert [one["seat"] for one in node.status()["workers"]] == [2, 3]


def test_a_generation_that_could_not_boot_leaves_no_worker_behind_when_the_master_says_who_serves() -> None:
    node = Node()
    node.boot(0, 0, 1)
    node.boot(1, 0, 2)
    Beat(node.region, 1).death()
    node.notice = {"generations": [{"generation": 1, "state": "serving", "since": NOW - 50}]}
    assert [one["seat"] for one in node.status()["workers"]] == [0]


def test_a_draining_generation_tells_its_streams_and_how_long_it_may_take() -> None:
    node = Node()
    node.boot(0, 0, 1, streams=9, age_s=500).retire(NOW + 88)
    node.boot(1, 1, 1, streams=3, age_s=500).retire(NOW + 88)
    node.boot(2, 0, 2, streams=1, age_s=32)
    serving, draining = node.status()["generations"]
    assert serving == {
        "generation": 2,
        "state": "serving",
        "since_s": 32.0,
        "ends_in_s": None,
        "workers": 1,
        "streams": 1,
        "version": __version__,
    }
    assert (draining["generation"], draining["state"]) == (1, "draining")
    assert (draining["workers"], draining["streams"], draining["ends_in_s"]) == (2, 12, 88.0)


def test_what_the_master_notes_of_a_generation_is_told() -> None:
    node = Node()
    node.boot(0, 0, 1, age_s=500).retire(NOW + 88)
    node.boot(1, 0, 2, age_s=33)
    node.notice = {
        "generations": [
            {"generation": 1, "state": "draining", "since": NOW - 12, "version": "0.0.9"},
            {"generation": 2, "state": "serving", "since": NOW - 30, "version": "0.1.0"},
        ],
        "last_reload": {"kind": "reload", "ok": False, "at": 1.0, "took_s": 0.1, "detail": "no", "findings": ["f"]},
    }
    document = node.status()
    told = [(one["generation"], one["since_s"], one["version"]) for one in document["generations"]]
    assert told == [(2, 30.0, "0.1.0"), (1, 12.0, "0.0.9")]
    assert document["last_reload"] == node.notice["last_reload"]


def test_a_notice_of_nothing_or_of_another_shape_spoils_no_status() -> None:
    node = Node()
    node.boot(0, 0, 1)
    for notice in (None, {}, {"generations": 3, "last_reload": "x"}, {"generations": [None, {"generation": "1"}]}):
        node.notice = notice
        document = node.status()
        assert [one["state"] for one in document["generations"]] == ["serving"]
        assert document["last_reload"] is None


def test_a_generation_on_its_way_and_one_that_ends_with_the_node_are_told_from_the_beats() -> None:
    node = Node()
    node.boot(0, 0, 1).enter(State.STARTING)
    assert node.status()["generations"][0]["state"] == "starting"
    Beat(node.region, 0).enter(State.DRAINING)
    assert node.status()["generations"][0]["state"] == "draining"


class Silent:
    """A log that is not looked at, and a clock that stands."""

    now = NOW

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: None

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1_800_000_000.0


def test_alerts_come_first_and_in_the_words_of_the_file() -> None:
    node = Node()
    own = Metrics(node.region, node.region.telemetry)
    worker = Metrics(node.region, 3)
    worker.gauge("proxyd_streams_active", tenant="a").set(9)
    clock = Silent()
    texts = ["p99_latency > 200ms", "streams_active > 5", "requests > 100/min"]
    watch = Watch(texts, lambda now: read(node.region, now), own, clock, clock)  # type: ignore[arg-type]
    watch.look()
    told = node.status()["alerts"]
    assert [(one["alert"], one["active"], one["value"]) for one in told] == [
        ("p99_latency > 200ms", False, None),
        ("requests > 100/min", False, 0.0),
        ("streams_active > 5", False, 9.0),
    ]
    watch.look()
    first, *rest = node.status()["alerts"]
    assert first == {
        "alert": "streams_active > 5",
        "active": True,
        "since": 1_800_000_000,
        "value": 9.0,
        "threshold": 5.0,
        "unit": "",
    }
    assert [(one["alert"], one["value"], one["unit"]) for one in rest] == [
        ("p99_latency > 200ms", None, "ms"),
        ("requests > 100/min", 0.0, "/min"),
    ]
    text = render(read(node.region, NOW), None).decode()
    assert 'proxyd_alert_active{alert="streams_active > 5"} 1.0' in text
    assert 'proxyd_alert_active{alert="requests > 100/min"} 0.0' in text
    # Another telemetry process, with another file, in the same seat.
    own = Metrics(node.region, node.region.telemetry)
    Watch(["tokens > 1"], lambda now: read(node.region, now), own, clock, clock).look()  # type: ignore[arg-type]
    assert [one["alert"] for one in node.status()["alerts"]] == ["tokens > 1"]
    assert (NO_VALUE, VALUE_PARTS) == (-1, 10**6)


def test_rates_are_those_of_the_last_look_and_null_without_the_telemetry_process() -> None:
    node = Node()
    own = Metrics(node.region, node.region.telemetry)
    clock = Silent()
    watch = Watch([], lambda now: read(node.region, now), own, clock, clock)  # type: ignore[arg-type]
    events = Metrics(node.region, 3).counter("proxyd_events_relayed_total")
    watch.look()
    events.add(30)
    clock.now += 4.0
    watch.look()
    assert node.status()["streams"]["events_per_s"] is None
    node.boot(node.region.telemetry, -1, 1)
    document = node.status()
    assert (document["streams"]["events_per_s"], document["requests"]["per_s"]) == (7.5, 0.0)


def test_what_seats_far_apart_count_is_one_node_and_survives_their_deaths() -> None:
    node = Node()
    for seat, generation in ((0, 1), (7, 2)):
        node.boot(seat, 0, generation)
        Metrics(node.region, seat).counter("proxyd_requests_total", route="/a", status="200").add(5)
    Metrics(node.region, 7).gauge("_failing_since", upstream="up", kind="refused").set(99)
    assert node.status()["requests"]["answered"] == 10
    assert node.status()["upstreams"]["up"]["failing_since"] == 99
    Beat(node.region, 0).death()
    assert node.status()["requests"]["answered"] == 10


def test_the_spool_has_a_member_of_its_own() -> None:
    node = Node()
    metrics = Metrics(node.region, node.region.telemetry)
    metrics.gauge("_telemetry_spool_used").set(25)
    metrics.gauge("_telemetry_spool_max").set(100)
    metrics.gauge("proxyd_telemetry_spool_bytes").set(7)
    spool = {"bytes": 7, "used": 25, "max": 100, "share": 0.25, "dead_letters": 0, "requeue_bytes": 0}
    assert node.status()["spool"] == spool
