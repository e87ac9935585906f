"""Metrics in shared memory: counts survive processes, percentiles are within 5 %, label floods are bounded."""

from __future__ import annotations

import math
import os
import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import _shm
from proxyd.shm import metrics as m
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import SERIES_BYTES, SERIES_MAX, SLOT_HEAD_BYTES, Region


def in_child(run) -> None:
    """Runs in a forked process that ends without Python's clean-up, as a killed worker would."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def exact_quantile(values: list[float], q: float) -> float:
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)]


def test_the_parent_reads_what_a_dead_child_counted() -> None:
    region = Region.create(3)

    def work() -> None:
        metrics = Metrics(region, 1)
        metrics.counter("requests", route="/v1", status="200").add(7)
        metrics.gauge("streams").add(-3)
        metrics.histogram("lag").record(0.5)

    in_child(work)
    snapshot = read(region, 0.0)
    assert snapshot.counters == {"requests": {(("route", "/v1"), ("status", "200")): 7}}
    assert snapshot.gauges == {"streams": {(): -3}}
    assert snapshot.histograms["lag"].count == 1


def test_slots_are_summed() -> None:
    region = Region.create(4)
    for slot in range(4):
        metrics = Metrics(region, slot)
        metrics.counter("a").add(slot)
        metrics.counter("a", kind="x").add()
        metrics.gauge("g").set(slot - 2)
        for _ in range(slot):
            metrics.histogram("h").record(1e-3)
    snapshot = read(region, 0.0)
    assert snapshot.counters["a"] == {(): 6, (("kind", "x"),): 4}
    assert snapshot.total("a") == 10
    assert snapshot.gauges["g"] == {(): -2}
    assert snapshot.histograms["h"].count == 6
    assert read(region, 0.0, slots=[3]).counters["a"][()] == 3


def test_a_successor_keeps_counters_and_histograms_and_zeroes_gauges() -> None:
    region = Region.create(1)
    for lives in range(1, 4):

        def life() -> None:
            metrics = Metrics(region, 0)
            metrics.counter("c", a="1").add(10)
            metrics.histogram("h").record(0.1)
            metrics.gauge("held").add(5)

        in_child(life)
        snapshot = read(region, 0.0)
        assert snapshot.counters["c"] == {(("a", "1"),): 10 * lives}
        assert snapshot.histograms["h"].count == lives
        assert snapshot.gauges["held"] == {(): 5}


def test_the_master_zeroes_the_gauges_of_a_slot_whose_process_is_gone() -> None:
    region = Region.create(1)
    in_child(lambda: Metrics(region, 0).gauge("held", tenant="t").set(9))
    m.clear_gauges(region, 0)
    assert read(region, 0.0).gauges["held"] == {(("tenant", "t"),): 0}


def test_the_same_series_is_one_cell_whatever_the_order_of_its_labels() -> None:
    metrics = Metrics(Region.create(1), 0)
    assert metrics.counter("c", a="1", b="2") is metrics.counter("c", b="2", a="1")


def test_a_flood_of_label_values_is_counted_as_other_and_other_names_keep_their_room() -> None:
    region = Region.create(1)
    metrics = Metrics(region, 0)
    for n in range(5000):
        metrics.counter("flood", tenant=f"t{n}").add()
    for name in range(20):
        for n in range(400):
            metrics.counter(f"name{name}", tenant=f"t{n}").add()
    metrics.counter("late").add(3)
    metrics.histogram("late_histogram").record(1.0)
    snapshot = read(region, 0.0)
    flood = snapshot.counters["flood"]
    assert sum(flood.values()) == 5000
    assert flood[(("tenant", "other"),)] == 5000 - m.SERIES_PER_NAME
    assert all(snapshot.total(f"name{name}") == 400 for name in range(20))
    assert snapshot.counters["late"] == {(): 3}
    assert snapshot.histograms["late_histogram"].count == 1
    assert len(metrics._handles) <= 2 * SERIES_MAX


def test_a_label_value_too_long_or_with_a_separator_is_still_counted() -> None:
    region = Region.create(1)
    metrics = Metrics(region, 0)
    metrics.counter("c", tenant="x" * 500).add(2)
    metrics.counter("c", tenant="a\0b").add(1)
    metrics.counter("c", tenant="\ud800").add(1)
    assert read(region, 0.0).counters["c"] == {
        (("tenant", "other"),): 2,
        (("tenant", "a?b"),): 1,
        (("tenant", "?"),): 1,
    }


@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2, 1.0, 60.0])
def test_percentiles_are_within_five_percent_of_an_exact_computation(spread: float) -> None:
    random.seed(7)
    values = [min(3600.0, max(1e-6, random.lognormvariate(math.log(spread), 1.5))) for _ in range(4000)]
    region = Region.create(2)
    writers = [Metrics(region, slot).histogram("h") for slot in range(2)]
    for n, value in enumerate(values):
        writers[n % 2].record(value)
    merged = read(region, 0.0).histograms["h"]
    for q in (0.01, 0.5, 0.9, 0.95, 0.99, 0.999, 1.0):
        assert merged.quantile_s(q) == pytest.approx(exact_quantile(values, q), rel=0.05)


@given(st.integers(min_value=1000, max_value=3_600_000_000_000))
def test_every_duration_from_a_microsecond_to_an_hour_lies_in_its_bucket(ns: int) -> None:
    index = _shm.bucket_index(ns)
    low, high = m.bucket_edge_ns(index), m.bucket_edge_ns(index + 1)
    assert low <= ns < high
    assert (high - low) / 2 <= 0.05 * low


def test_durations_out_of_range_fall_in_the_outer_buckets() -> None:
    region = Region.create(1)
    histogram = Metrics(region, 0).histogram("h")
    for value in (0.0, -5.0, math.nan, 1e5, math.inf, 1e300):
        histogram.record(value)
    buckets = read(region, 0.0).histograms["h"].buckets
    assert (buckets[0], buckets[-1], sum(buckets)) == (3, 3, 6)


def test_an_empty_histogram_has_no_percentile() -> None:
    assert m.Distribution().quantile_s(0.5) is None


def test_the_last_minute_forgets_and_the_whole_does_not() -> None:
    region = Region.create(1)
    metrics = Metrics(region, 0)
    histogram = metrics.histogram("h")
    for second in range(300):
        metrics.tick(1000.0 + second)
        histogram.record(0.001 if second < 200 else 0.1)
    now = read(region, 1299.0)
    assert now.histograms["h"].count == 300
    assert 60 <= now.last_minute["h"].count <= 70
    assert now.last_minute["h"].quantile_s(0.01) == pytest.approx(0.1, rel=0.05)
    assert now.histograms["h"].quantile_s(0.5) == pytest.approx(0.001, rel=0.05)
    assert read(region, 1299.0 + 75).last_minute["h"].count == 0


def test_a_window_of_an_older_lap_is_emptied_before_it_is_used_again() -> None:
    region = Region.create(1)
    metrics = Metrics(region, 0)
    histogram = metrics.histogram("h")
    for lap in range(5):
        metrics.tick(80.0 * lap)
        histogram.record(1.0)
        assert read(region, 80.0 * lap).last_minute["h"].count == 1


def test_the_layout_does_not_overlap() -> None:
    region = Region.create(3)
    assert region.slot_offset(1) - region.slot_offset(0) >= SLOT_HEAD_BYTES + SERIES_MAX * SERIES_BYTES
    with pytest.raises(IndexError):
        region.slot_offset(3)


def test_a_cell_outside_its_buffer_is_refused() -> None:
    buffer = bytearray(64)
    for offset in (-8, 60, 64, 1 << 60):
        with pytest.raises(ValueError):
            _shm.Counter(buffer, offset)
    with pytest.raises(ValueError):
        _shm.Histogram(buffer, 0, 0)
    with pytest.raises(ValueError):
        _shm.Counter(buffer, 4)
    words = _shm.Words(buffer, 0, 8)
    for index in (-1, 8):
        with pytest.raises(IndexError):
            words.load(index)


def test_memory_in_use_by_a_cell_cannot_be_unmapped() -> None:
    region = Region.create(1)
    counter = Metrics(region, 0).counter("c")
    with pytest.raises(BufferError):
        region.memory.close()
    counter.add()


def test_words_are_atomic_between_processes() -> None:
    region = Region.create(1)
    words = region.beat_words()
    children = []
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            for _ in range(20_000):
                words.add(0, 1)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    assert words.load(0) == 40_000
    assert words.sub(0, 40_000) == 0
    assert words.sub(0, 1) == 2**64 - 1
    assert words.compare_swap(0, 5, 6) is False
    assert words.swap(0, 5) == 2**64 - 1
    assert words.compare_swap(0, 5, 6) is True
    assert words.load(0) == 6


def test_what_is_added_between_two_readings_is_in_the_second_whoever_adds_it() -> None:
    region = Region.create(6)
    expected: dict[int, dict[str, int]] = {}
    rng = random.Random(5)
    for turn in range(40):
        seat, name = rng.randrange(5), f"name{rng.randrange(8)}"
        Metrics(region, seat).counter(name, turn=str(turn % 7)).add(turn)
        if turn % 5 == 0:
            Metrics(region, seat).histogram(name).record(0.001 * (turn + 1))
        of_seat = expected.setdefault(seat, {})
        of_seat[name] = of_seat.get(name, 0) + turn
        for seats in (None, [seat], [seat, 5], [1, 3]):
            chosen = range(6) if seats is None else seats
            names = {name for one in chosen for name in expected.get(one, {})}
            found = read(region, 0.0, seats)
            assert {name: found.total(name) for name in found.counters} == {
                name: sum(expected.get(one, {}).get(name, 0) for one in chosen) for name in names
            }
    assert sum(found.count for found in read(region, 0.0).histograms.values()) == 8
    assert read(region, 0.0, [5]) == m.Snapshot()


def test_states_that_do_not_add_up_show_the_highest_seat_also_below_zero() -> None:
    region = Region.create(3)
    for seat, value in enumerate((-7, -3, -5)):
        Metrics(region, seat).gauge("state", of="a").set(value)
    found = read(region, 0.0)
    assert (found.gauges, found.highest) == ({"state": {(("of", "a"),): -15}}, {"state": {(("of", "a"),): -3}})
    assert read(region, 0.0, [0]).highest == {"state": {(("of", "a"),): -7}}


def test_a_reading_in_a_forked_process_has_names_of_its_own() -> None:
    region = Region.create(2)
    Metrics(region, 0).counter("before").add()
    read(region, 0.0)
    in_child(lambda: Metrics(region, 1).counter("after").add(read(region, 0.0).total("before")))
    assert read(region, 0.0).counters == {"before": {(): 1}, "after": {(): 1}}


def test_sums_outside_their_buffers_are_refused() -> None:
    memory, indexes = bytearray(4 * 64), array("i", [0, 1])
    sums, tops = array("Q", [0, 0]), array("q", [0, 0])
    _shm.sum_series(memory, 128, 64, indexes, sums, tops)
    for offset, stride in ((192, 64), (256, 64), (-8, 64), (4, 64), (0, 4), (0, 1 << 62)):
        with pytest.raises(ValueError):
            _shm.sum_series(memory, offset, stride, indexes, sums, tops)
    with pytest.raises(IndexError):
        _shm.sum_series(memory, 0, 64, array("i", [0, 2]), sums, tops)
    with pytest.raises(BufferError):
        _shm.sum_series(memory, 0, 64, indexes, bytes(16), tops)
    block = bytearray(8 * _shm.HISTOGRAM_WORDS)
    into = array("Q", bytes(8 * (2 + _shm.HISTOGRAM_BUCKETS)))
    _shm.merge_histogram(block, 0, 0, 1, into, into)
    for offset in (-8, 4, 8, 1 << 60):
        with pytest.raises(ValueError):
            _shm.merge_histogram(block, offset, 0, 1, into, into)
    with pytest.raises(ValueError):
        _shm.merge_histogram(block, 0, 0, 1, into[1:], into)
