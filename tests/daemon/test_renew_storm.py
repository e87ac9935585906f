"""Signals that come at the wrong moment: many at once, one within the work of another, the end within a renewal."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import wait_for
from tests.daemon.installed import InstalledDaemon
from tests.daemon.load import children_of, is_alive
from tests.daemon.renew_rounds import Plan, make_config, served_models, stage

PLAN = Plan(
    streams=10, rate=150, ways=("tcp", "unix"), drain_timeout_s=20, stream_events=(10, 30), stream_rate=10, workers=2
)


@contextlib.contextmanager
def quiet_node(folder: Path) -> Iterator[InstalledDaemon]:
    """A node without load, for what is about its processes only."""
    with stage(folder, Plan(streams=0, rate=0, ways=("tcp",), drain_timeout_s=2)) as (daemon, _, _, _):
        yield daemon


def is_settled(daemon: InstalledDaemon) -> bool:
    return all(one["state"] == "serving" for one in daemon.status()["generations"])


def test_many_signals_at_once_lose_nothing_and_the_last_file_is_the_one_that_serves(tmp_path: Path) -> None:
    with stage(tmp_path, PLAN) as (daemon, provider, loads, _):
        assert daemon.process is not None
        for load in loads:
            load.go()
        for number in range(1, 9):
            daemon.config.write_text(make_config(tmp_path, daemon.port, provider.url, PLAN, number))
            if number == 4:
                daemon.installed.install("9.6.0")
            daemon.process.send_signal(signal.SIGUSR2 if number in (4, 6) else signal.SIGHUP)
            time.sleep(0.08)
        wait_for(lambda: "turn-8" in served_models(daemon), 60, every=0.1)
        wait_for(lambda: is_settled(daemon), 60, every=0.1)
        wait_for(lambda: daemon.status()["version"] == "9.6.0", 60, every=0.1)
        wait_for(lambda: is_settled(daemon), 60, every=0.1)
        for load in loads:
            load.stop()
            load.wait("stopped")
        assert [str(failure) for load in loads for failure in load.failures] == []
        assert sum(load.report()["requests"]["whole"] for load in loads) > 100
        assert daemon.unanswered == []
        wait_for(lambda: len(children_of(daemon.process.pid)) == 3, 30)  # type: ignore[union-attr]
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(
    ("number", "after_s"), [(signal.SIGHUP, 0.0), (signal.SIGHUP, 0.1), (signal.SIGUSR2, 0.1), (signal.SIGUSR2, 0.8)]
)
def test_a_term_within_a_renewal_ends_the_node_and_all_its_children(
    tmp_path: Path, number: signal.Signals, after_s: float
) -> None:
    with quiet_node(tmp_path) as daemon:
        assert daemon.process is not None
        children = set(children_of(daemon.process.pid))
        daemon.process.send_signal(number)
        until = time.monotonic() + after_s
        while time.monotonic() < until:
            children |= set(children_of(daemon.process.pid))
            time.sleep(0.005)
        assert daemon.stop() == 0, daemon.log()
        wait_for(lambda: not any(is_alive(pid) for pid in children), 10)


def kill_master(daemon: InstalledDaemon) -> None:
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()


@pytest.mark.parametrize("when", ["during", "after"])
def test_no_child_outlives_a_master_that_is_killed_within_or_after_an_upgrade(tmp_path: Path, when: str) -> None:
    with quiet_node(tmp_path) as daemon:
        assert daemon.process is not None
        children = set(children_of(daemon.process.pid))
        if when == "after":
            daemon.installed.install("9.1.0")
            assert daemon.renew("upgrade").ok
        else:
            daemon.process.send_signal(signal.SIGUSR2)
            time.sleep(0.4)
        children |= set(children_of(daemon.process.pid))
        kill_master(daemon)
        wait_for(lambda: not any(is_alive(pid) for pid in children), 30)


