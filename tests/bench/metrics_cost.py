"""What a scrape of /metrics costs the worker that answers it, while streams run: its loop held, its CPU.

    python -m tests.bench.metrics_cost [--streams 2000] [--workers 8] [--tenants 64] [--seconds 10] [--per-s 5]

A node with so many workers, every one of which has had every tenant, each route and each status, relays the streams.
Then two windows, without and with scrapes:
- held: the steps of a scrape between which the loop has its turn (the reading of shared memory, then each family of the
  text), done here on the node's own memory, in CPU time: the longest one is what a stream waits for. Budget: 5 ms.
- CPU a scrape: what all workers used more in the window with scrapes.
- loop lag: the node's own histogram of both windows. Where cores are shared it tells of the neighbours as well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxyd.shm.metrics import Distribution, Snapshot, read
from proxyd.shm.region import Region
from proxyd.web.exposition import render_parts
from tests.bench.measure import Cpu, host, table
from tests.bench.tools import BenchError, Client, Rig, rig
from tests.daemon.harness import CHAT, Daemon, Reply, config_text, free_port, model_text, request_bytes, upstream_text

BUDGET_MS = 5.0
ROUNDS = 200


@dataclass(frozen=True)
class Held:
    """Milliseconds of CPU of one step, over ROUNDS scrapes."""

    name: str
    median: float
    p99: float
    longest: float


def memory_of(pid: int) -> Region:
    """The node's shared memory, mapped here, too: the master's memfd whose layout is a region's."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(OSError, ValueError):
            if "memfd:" not in os.readlink(path):
                continue
            return Region.adopt(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    raise BenchError("the master has no region of this layout")


def steps_of(region: Region) -> tuple[Snapshot, list[tuple[str, float]]]:
    """One scrape's steps and their CPU in milliseconds."""
    took: list[tuple[str, float]] = []

    def timed(name: str, do: Callable[[], Any]) -> Any:
        began = time.thread_time()
        done = do()
        took.append((name, (time.thread_time() - began) * 1e3))
        return done

    snapshot: Snapshot = timed("reading", lambda: read(region, time.monotonic()))
    parts = render_parts(snapshot, 0)
    while (part := timed("", lambda: next(parts, None))) is not None:
        took[-1] = (part.split(b" ", 3)[2].decode(), took[-1][1])
    return snapshot, took[:-1]


def held(region: Region) -> list[Held]:
    """Each step of ROUNDS scrapes."""
    seen: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, ms in steps_of(region)[1]:
            seen.setdefault(name, []).append(ms)
        time.sleep(0.005)  # the node has its core back
    return [
        Held(name, sorted(took)[len(took) // 2], sorted(took)[int(len(took) * 0.99)], max(took))
        for name, took in seen.items()
    ]


def touch_all(daemon: Daemon, workers: int, tenants: int) -> None:
    """Every worker serves every tenant, some routes and statuses: connections until each has had its share."""
    bodies = [("/v1/chat/completions", b"{"), ("/v1/messages", b"{"), ("/v1/embeddings", b"{")]
    for tenant in range(tenants):
        token = daemon.token(1000 + tenant, tenant=f"tenant-{tenant}")
        for _ in range(workers):
            sock = daemon.connect()
            for path, body in bodies:
                sock.sendall(request_bytes(path, body, token))
                Reply(sock).body()
            sock.sendall(request_bytes("/v1/chat/completions", {**CHAT, "bench": "0"}, token, Connection="close"))
            with contextlib.suppress(OSError):
                Reply(sock)
            sock.close()


def lag_between(before: Distribution, after: Distribution) -> Distribution:
    buckets = [new - old for new, old in zip(after.buckets, before.buckets, strict=True)]
    return Distribution(after.count - before.count, after.sum_ns - before.sum_ns, buckets)


@dataclass(frozen=True)
class Window:
    """Seconds of load: CPU of all workers in milliseconds, and how late their loops were."""

    seconds: float
    cpu_ms: float
    lag: Distribution
    scrapes: int
    answer_bytes: int


def window(daemon: Daemon, region: Region, workers: list[int], seconds: float, per_s: float) -> Window:
    name = "proxyd_loop_lag_seconds"
    before = read(region, time.monotonic()).histograms[name]
    cpus = {pid: Cpu.of(pid) for pid in workers}
    began = time.monotonic()
    scrapes = size = 0
    while (left := began + seconds - time.monotonic()) > 0:
        if per_s:
            size = len(daemon.admin("/metrics")[1])
            scrapes += 1
        time.sleep(min(left, 1 / per_s if per_s else left))
    used = sum(Cpu.of(pid).since(cpu).total for pid, cpu in cpus.items()) / 1e3
    took = time.monotonic() - began
    return Window(took, used, lag_between(before, read(region, time.monotonic()).histograms[name]), scrapes, size)


def measure(made: Rig, options: argparse.Namespace) -> None:
    _, upstream = made.start_listener("upstream", core=made.cores.load)
    with tempfile.TemporaryDirectory(prefix="proxyd-metrics-") as name:
        folder, port = Path(name), free_port()
        upstreams = upstream_text(f"http://127.0.0.1:{upstream}/v1") + model_text("*", 1, '["openai"]')
        server = f'workers = {options.workers}\ndrain_timeout = "1s"'
        daemon = Daemon(folder, config_text(folder, port, upstreams, server=server, log='access = "off"'))
        daemon.port = port
        clients: list[Client] = []
        try:
            daemon.start()
            assert daemon.process is not None
            workers = [daemon.child(f"worker {slot}") for slot in range(options.workers)]
            region = memory_of(daemon.process.pid)
            touch_all(daemon, options.workers, options.tenants)
            each = options.streams // 8
            for tenant in range(8):
                group = f"n={each} rate={options.rate:g} bytes=250"
                token = daemon.token(1000 + tenant, tenant=f"tenant-{tenant}")
                clients.append(Client(made, port, token, [group], opens_per_s=400))
                if clients[-1].wait_ready() < each:
                    raise BenchError(f"streams failed; {clients[-1].started.tail()}")
            quiet = window(daemon, region, workers, options.seconds, 0)
            scraped = window(daemon, region, workers, options.seconds, options.per_s)
            print_all(options, quiet, scraped, held(region), len(steps_of(region)[0].gauges["proxyd_streams_active"]))
        finally:
            for client in clients:
                client.quit()
            daemon.close_clients()
            daemon.kill()


def print_all(options: argparse.Namespace, quiet: Window, scraped: Window, steps: list[Held], tenants: int) -> None:
    load = f"{options.streams} streams x {options.rate:g} events/s, {options.workers} workers, {tenants} tenants"
    print(f"\n{load}; an answer of {scraped.answer_bytes:,} bytes in {len(steps) - 1} parts")
    steps.sort(key=lambda step: -step.median)
    rows = [[step.name, f"{step.median:.2f}", f"{step.p99:.2f}", f"{step.longest:.2f}"] for step in steps[:5]]
    print(table(["the loop is held by, CPU ms", "median", "p99", "longest"], rows))
    worst = max(step.p99 for step in steps)
    whole = sum(step.median for step in steps)
    verdict = "within" if worst < BUDGET_MS else "OVER"
    print(f"longest step, p99: {worst:.2f} ms ({verdict} the budget of {BUDGET_MS:g} ms); all steps {whole:.2f} ms")
    rate = quiet.cpu_ms / quiet.seconds
    extra = (scraped.cpu_ms - rate * scraped.seconds) / max(1, scraped.scrapes)
    print(f"CPU of all workers: {rate:.0f} ms/s without; with {options.per_s:g} scrapes/s {extra:.1f} ms more for each")
    rows = []
    for name, one in (("without", quiet), ("with scrapes", scraped)):
        values = [one.lag.quantile_s(q) or 0.0 for q in (0.5, 0.99, 0.999)]
        rows.append([name, *(f"{value * 1e3:.2f}" for value in values), f"{one.lag.count:,}"])
    print(table(["loop lag of all workers, ms", "p50", "p99", "p99.9", "samples"], rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="metrics_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=2, help="events a second and stream")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--tenants", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10, help="of each window")
    parser.add_argument("--per-s", type=float, default=5, help="scrapes a second")
    options = parser.parse_args(argv)
    with rig() as made:
        print(f"host: {host()}", flush=True)
        measure(made, options)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
