"""Neighbours: what 2,000 steady streams feel of one that bursts and of one at 50 MB/s.

    python -m tests.bench.fairness [--streams 2000] [--seconds 10] [--only nginx,proxyd]

Scenes, each with the steady streams running: quiet; beside one stream that gets 2,000 events at once every 2 s; beside
one stream of 50 MB/s. Budget (SAFETY, "Bounds per client"): the steady streams' p99 gap at most 1.5 times the quiet
one, and none over 100 ms. The loud stream has a client process of its own, yet the upstream and both clients share one
core: nginx beside proxyd shows how much of a difference is the rig's.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.bench.measure import Cpu, host, table
from tests.bench.targets import Target, start_nginx, start_proxyd
from tests.bench.tools import BenchError, Client, Rig, rig

LOUD = {
    "quiet": "",
    "burst": "n=1 rate=0.5 burst=2000 bytes=250",
    "bulk": "n=1 rate=763 burst=16 bytes=4096",  # 50 MB/s in events of 4 KB
}
BUDGET = 1.5
BUDGET_MAX_US = 100_000


def scene(made: Rig, target: Target, steady: Client, loud: str, seconds: float) -> tuple[dict[str, Any], float, float]:
    """The steady streams' report beside `loud`, the loud stream's MB/s, and the proxy's share of its core."""
    beside = Client(made, target.port, target.token, [loud]) if loud else None
    try:
        if beside is not None and beside.wait_ready() < 1:
            raise BenchError(f"{target.name}: the loud stream failed; {beside.started.tail()}")
        time.sleep(1)
        steady.mark()
        if beside is not None:
            beside.mark()
        before, began = Cpu.of(target.pid), time.monotonic()
        time.sleep(seconds)
        report = steady.report()[0]
        took = time.monotonic() - began
        busy = Cpu.of(target.pid).since(before).total / 1e6 / took
        mb_per_s = beside.report()[0]["bytes"] / 1e6 / took if beside is not None else 0.0
        return report, mb_per_s, busy
    finally:
        if beside is not None:
            beside.quit()
            time.sleep(1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fairness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=20, help="events a second and steady stream")
    parser.add_argument("--seconds", type=float, default=10, help="measured per scene")
    parser.add_argument("--only", default="nginx,proxyd")
    options = parser.parse_args(argv)
    starters: dict[str, Callable[[Rig, int], Target]] = {"nginx": start_nginx, "proxyd": start_proxyd}
    verdicts = []
    rows = []
    with rig() as made:
        print(f"host: {host()}", flush=True)
        _, upstream_port = made.start_listener("upstream", core=made.cores.load)
        for proxy in options.only.split(","):
            target = starters[proxy](made, upstream_port)
            steady = Client(made, target.port, target.token, [f"n={options.streams} rate={options.rate} bytes=250"])
            if steady.wait_ready() < options.streams:
                raise BenchError(f"{proxy}: streams failed; {steady.started.tail()}")
            quiet = 0.0
            for name, loud in LOUD.items():
                report, mb_per_s, busy = scene(made, target, steady, loud, options.seconds)
                gap, lag = report["gap"], report["lag"]
                quiet = quiet or gap["p99_us"]
                ratio = gap["p99_us"] / quiet
                spread = [f"{gap[key] / 1e3:.1f}" for key in ("p50_us", "p99_us", "p999_us", "max_us")]
                late = [f"{lag[key] / 1e3:.1f}" for key in ("p99_us", "max_us")]
                more = [f"{ratio:.2f}", *late, f"{mb_per_s:.1f}", f"{busy:.0%}"]
                rows.append([proxy, name, f"{report['events']:,}", *spread, *more])
                if proxy == "proxyd" and loud:
                    word = "within" if ratio <= BUDGET and gap["max_us"] <= BUDGET_MAX_US else "OVER"
                    verdicts.append(
                        f"proxyd beside {name}: p99 gap {ratio:.2f} times the quiet one, longest "
                        f"{gap['max_us'] / 1e3:.0f} ms ({word} the budget of {BUDGET} times and 100 ms)"
                    )
            steady.quit()
            target.started.stop()
    print(f"\n{options.streams} steady streams x {options.rate:g} events/s: gaps between their events, and lag, in ms")
    gaps = ["gap p50", "p99", "p99.9", "max", "p99/quiet"]
    print(table(["proxy", "beside", "events", *gaps, "lag p99", "lag max", "loud MB/s", "core"], rows))
    print("\n".join(verdicts))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
