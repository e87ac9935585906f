"""What the proxy adds in time: a 25 ms cadence through nginx and proxyd, and the first event of a stream.

    python -m tests.bench.gaps [--seconds 10] [--streams 1,50]

Paths: straight to the upstream, through nginx, through proxyd, and through nginx in front of proxyd (a deployed node).
Added gap: how much longer than at the upstream the time between two events is at the client; 0 when it is not longer.
Budgets: p95 of the added gap under 5 ms through nginx and proxyd, on a quiet machine; a first event within 50 ms.
Every event carries the upstream's monotonic time, so the same machine's clock measures both ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from tests.bench.measure import host, table
from tests.bench.targets import start_nginx, start_proxyd
from tests.bench.tools import BenchError, Client, Rig, rig

CADENCE_S = 0.025
BUDGET_P95_US = 5000
BUDGET_FIRST_US = 50_000


def cadence(made: Rig, port: int, token: str, streams: int, seconds: float) -> dict[str, Any]:
    """The report of `streams` streams of one event every 25 ms."""
    client = Client(made, port, token, [f"n={streams} rate={1 / CADENCE_S:g} bytes=250"], opens_per_s=200)
    try:
        if client.wait_ready() < streams:
            raise BenchError(f"streams failed; {client.started.tail()}")
        time.sleep(0.5)
        client.mark()
        time.sleep(seconds)
        return client.report()[0]
    finally:
        client.quit()


def first_events(made: Rig, port: int, token: str, streams: int) -> dict[str, Any]:
    """The report of short streams (three events), opened one after the other at 100 a second."""
    client = Client(made, port, token, [f"n={streams} rate=40 bytes=250 events=3"], opens_per_s=100)
    try:
        if client.wait_ready() < streams:
            raise BenchError(f"streams failed; {client.started.tail()}")
        return client.report()[0]
    finally:
        client.quit()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gaps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="measured per path and stream count")
    parser.add_argument("--streams", default="1,50", help="stream counts")
    parser.add_argument("--firsts", type=int, default=300, help="short streams for the first event")
    options = parser.parse_args(argv)
    with rig() as made:
        print(f"host: {host()}", flush=True)
        _, upstream_port = made.start_listener("upstream", core=made.cores.load)
        proxyd = start_proxyd(made, upstream_port)
        paths = {
            "direct": (upstream_port, "none"),
            "nginx": (start_nginx(made, upstream_port).port, "none"),
            "proxyd": (proxyd.port, proxyd.token),
            "nginx+proxyd": (start_nginx(made, proxyd.port, on_load_core=True).port, proxyd.token),
        }
        verdicts = []
        for streams in (int(text) for text in options.streams.split(",")):
            rows = []
            for name, (port, token) in paths.items():
                report = cadence(made, port, token, streams, options.seconds)
                added, gap, lag = report["added"], report["gap"], report["lag"]
                late = [f"{added[key] / 1e3:.2f}" for key in ("p50_us", "p95_us", "p99_us", "max_us")]
                more = [f"{value / 1e3:.2f}" for value in (gap["p99_us"], lag["p50_us"], lag["p99_us"])]
                rows.append([name, f"{report['events']:,}", *late, *more])
                if name == "nginx+proxyd":
                    p95 = added["p95_us"]
                    word = "within" if p95 <= BUDGET_P95_US else "OVER"
                    verdicts.append(f"{streams} streams: added gap p95 {p95 / 1e3:.2f} ms ({word} the budget of 5)")
            print(f"\n25 ms cadence, {streams} streams, {options.seconds:g} s a path, milliseconds")
            heads = ["path", "events", "added p50", "p95", "p99", "max", "gap p99", "lag p50", "lag p99"]
            print(table(heads, rows), flush=True)
        rows = []
        for name, (port, token) in paths.items():
            report = first_events(made, port, token, options.firsts)
            first, head = report["first"], report["head"]
            rows.append([
                name, f"{first['count']:,}", *(f"{first[key] / 1e3:.2f}" for key in ("p50_us", "p99_us", "max_us")),
                *(f"{head[key] / 1e3:.2f}" for key in ("p50_us", "p99_us", "max_us")),
            ])  # fmt: skip
            if name == "proxyd":
                word = "within" if first["max_us"] <= BUDGET_FIRST_US else "OVER"
                late_ms = first["max_us"] / 1e3
                verdicts.append(f"first event at most {late_ms:.2f} ms after the upstream's ({word} the budget of 50)")
        print("\nfirst event: client's time - upstream's; head: from the request to the answer's head; milliseconds")
        print(table(["path", "streams", "first p50", "p99", "max", "head p50", "p99", "max"], rows))
        print("\n".join(verdicts))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
