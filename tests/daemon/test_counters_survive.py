"""Counters through the death of workers: what was counted stays counted, and what a dead one held is not held."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.daemon.harness import CHAT, DONE, FINISH, USAGE, Daemon, Script, Upstream, ask, chat_chunk, node, wait_for

Make = Callable[[Script], Upstream]
KILLS = 6


def totals(daemon: Daemon) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every counter and every histogram's buckets, counts and sums."""
    found = {}
    for family in text_string_to_metric_families(daemon.admin("/metrics")[1].decode()):
        if family.type in ("counter", "histogram"):
            for sample in family.samples:
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_no_total_ever_goes_down_while_workers_are_killed(upstream: Make, tmp_path: Path) -> None:
    house = upstream(lambda wire: wire.stream(chat_chunk(), FINISH, USAGE, DONE))
    with node(tmp_path, house, server="workers = 3") as daemon:
        token, answered, stop = daemon.token(), [0], threading.Event()

        def client() -> None:
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    answered[0] += ask(daemon, "/v1/chat/completions", CHAT, token=token).body().endswith(DONE)

        asking = threading.Thread(target=client)
        asking.start()
        try:
            before = totals(daemon)
            for kill in range(KILLS):
                asked = answered[0]
                wait_for(lambda asked=asked: answered[0] >= asked + 10)
                os.kill(daemon.child(f"worker {kill % 3}"), signal.SIGKILL)
                for _ in range(5):
                    try:
                        now = totals(daemon)
                    except (OSError, http.client.HTTPException):  # the worker that answered was the one
                        continue
                    lower = [(name, value) for name, value in before.items() if now.get(name, -1) < value]
                    assert not lower, [(*one, now.get(one[0])) for one in lower]
                    before = now
        finally:
            stop.set()
            asking.join(30)
        served = before["proxyd_requests_total", (("route", "/v1/chat/completions"), ("status", "200"))]
        assert served >= 10 * KILLS
        assert before["proxyd_upstream_connects_total", (("upstream", "openai"),)] >= 1
        # What dead workers held is nobody's; the restarts are counted.
        wait_for(lambda: daemon.metric("proxyd_worker_restarts_total") >= KILLS)
        wait_for(lambda: daemon.metric("proxyd_streams_active") == 0)
        wait_for(lambda: daemon.metric("proxyd_upstream_connections", state="busy") == 0)
        final = daemon.metric("proxyd_requests_total", status="200")
        assert final >= served
