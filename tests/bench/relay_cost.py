"""CPU per relayed event: proxyd's worker, nginx and a bare C relay beside each other, in interleaved rounds.

    python -m tests.bench.relay_cost --rounds 3 --streams 2000 [--rate 20] [--window 10] [--perf FILE] [--strace]

Each round opens all streams, lets them settle, and measures a steady window. The figure is the CPU time of the one
process that relays; what proxyd's other processes use in the window is printed apart. Budget: proxyd at most 1.15 times
nginx.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.bench.measure import Cpu, host, median_cpu, table
from tests.bench.targets import Target, start_nginx, start_proxyd, start_relay
from tests.bench.tools import BenchError, Client, Rig, rig

BUDGET = 1.15
# At half a core nothing waits for 20 ms unless somebody else had the cores; events then come in heaps, and cost less.
DISTURBED_US = 20_000


@dataclass(frozen=True)
class Round:
    """One target in one round: per event, microseconds."""

    cpu: Cpu
    beside: dict[str, float]
    events_per_s: float
    busy: float
    lag: dict[str, float]


def run_round(made: Rig, target: Target, options: argparse.Namespace, tool: list[str] | None = None) -> Round:
    """Ramp, settle, window, close. `tool` runs for the length of the window (and then spoils its CPU figures)."""
    group = f"n={options.streams} rate={options.rate} bytes={options.bytes}"
    client = Client(made, target.port, target.token, [group])
    try:
        ready = client.wait_ready()
        if ready < options.streams:
            raise BenchError(f"{target.name}: {options.streams - ready} streams failed; {client.started.tail()}")
        time.sleep(options.settle)
        client.mark()
        began = time.monotonic()
        before = Cpu.of(target.pid)
        beside = {name: Cpu.of(pid) for name, pid in target.beside.items()}
        if tool:
            subprocess.run(tool, timeout=options.window + 60, check=False)
        else:
            time.sleep(options.window)
        report: dict[str, Any] = client.report()[0]
        used = Cpu.of(target.pid).since(before)
        seconds = time.monotonic() - began
        events = int(report["events"])
        if report["ended"] or not events:
            raise BenchError(f"{target.name}: {report['ended']} streams ended early, {events} events")
        others = {name: (Cpu.of(target.beside[name]).total - cpu.total) / events for name, cpu in beside.items()}
        return Round(used.per(events), others, events / seconds, used.total / 1e6 / seconds, report["lag"])
    finally:
        client.quit()
        time.sleep(options.rest)


def print_rounds(results: dict[str, list[Round]], options: argparse.Namespace) -> None:
    rows = []
    for name, rounds in results.items():
        cpu = median_cpu([one.cpu for one in rounds])
        spread = [one.cpu.total for one in rounds]
        middle = sorted(rounds, key=lambda one: one.cpu.total)[len(rounds) // 2]
        split = [f"{value:.2f}" for value in (cpu.total, cpu.user, cpu.system)]
        lags = [f"{middle.lag[key]:.0f}" for key in ("p50_us", "p99_us")]
        between = f"{min(spread):.2f}-{max(spread):.2f}"
        rows.append([name, *split, between, f"{middle.events_per_s:,.0f}", f"{middle.busy:.0%}", *lags])
    heads = ["relay", "us/event", "user", "system", "min-max", "events/s", "core", "lag p50 us", "lag p99 us"]
    load = f"{options.streams} streams x {options.rate:g} events/s of {options.bytes} bytes"
    print(f"\n{load}, medians of {options.rounds} rounds")
    print(table(heads, rows))
    if "proxyd" in results:
        apart: dict[str, list[float]] = {}
        for one in results["proxyd"]:
            for name, value in one.beside.items():
                apart.setdefault(name, []).append(value)
        text = ", ".join(f"{name} {sorted(values)[len(values) // 2]:.3f}" for name, values in apart.items())
        print(f"beside the worker, on the load core, us/event: {text}")
    if "proxyd" in results and "nginx" in results:
        ours, theirs = (median_cpu([one.cpu for one in results[name]]) for name in ("proxyd", "nginx"))
        pairs = sorted(a.cpu.total / b.cpu.total for a, b in zip(results["proxyd"], results["nginx"], strict=True))
        ratio = ours.total / theirs.total
        verdict = "within" if ratio <= BUDGET else "OVER"
        each = " ".join(f"{pair:.3f}" for pair in pairs)
        user = ours.user / max(theirs.user, 0.01)
        print(f"proxyd / nginx: {ratio:.3f} ({verdict} the budget of {BUDGET}); user {user:.2f}; by round {each}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="relay_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=20, help="events a second and stream")
    parser.add_argument("--bytes", type=int, default=250, help="of one event")
    parser.add_argument("--window", type=float, default=10, help="seconds measured")
    parser.add_argument("--settle", type=float, default=1.5, help="seconds between the last first event and the window")
    parser.add_argument("--rest", type=float, default=1.0, help="seconds after each round")
    parser.add_argument("--only", default="c,nginx,proxyd", help="which, in this order")
    parser.add_argument("--perf", metavar="FILE", help="after the rounds, record proxyd's worker for one window")
    parser.add_argument("--strace", action="store_true", help="after the rounds, count its system calls for one window")
    options = parser.parse_args(argv)
    starters: dict[str, Callable[[Rig, int], Target]] = {"c": start_relay, "nginx": start_nginx, "proxyd": start_proxyd}
    with rig() as made:
        print(f"host: {host()}; proxy on core {made.cores.proxy}, load on core {made.cores.load}", flush=True)
        _, upstream_port = made.start_listener("upstream", core=made.cores.load)
        targets = [starters[name](made, upstream_port) for name in options.only.split(",")]
        results: dict[str, list[Round]] = {target.name: [] for target in targets}
        for number in range(options.rounds):
            for target in targets:
                one = run_round(made, target, options)
                results[target.name].append(one)
                split = f"(user {one.cpu.user:.2f}, system {one.cpu.system:.2f})"
                seen = f"{one.events_per_s:,.0f} events/s, lag p99 {one.lag['p99_us']:.0f} us"
                if one.lag["p99_us"] > DISTURBED_US:
                    seen += " (disturbed)"
                print(f"round {number + 1} {target.name:7} {one.cpu.total:6.2f} us/event {split}, {seen}", flush=True)
        print_rounds(results, options)
        for target in targets:
            if target.name != "proxyd":
                continue
            if options.perf:
                watch = ["perf", "record", "-q", "-g", "-F", "4999", "-o", options.perf, "-p", str(target.pid)]
                run_round(made, target, options, [*watch, "--", "sleep", str(options.window)])
                print(f"perf: perf report -i {options.perf} --no-children")
            if options.strace:
                count = ["timeout", "-s", "INT", str(options.window), "strace", "-c", "-f", "-p", str(target.pid)]
                one = run_round(made, target, options, count)
                print(f"strace: {one.events_per_s * options.window:,.0f} events in the window")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
