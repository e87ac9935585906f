"""Memory of open streams: PSS of proxyd's worker with 5,000 of them over what it has idle, nginx's worker beside it.

    python -m tests.bench.memory --streams 5000 [--rate 0.2] [--hold 10] [--prompt BYTES]

Idle is the worker as it is ready, before its first request; "warm" is the same worker after 100 streams came and went
(modules loaded, arenas made). The figure is the strict one: (open - idle) / streams. Budget: 8 KB a stream.
Socket buffers belong to the kernel and are not in PSS; an idle loopback stream has next to none.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.bench.measure import host, pss_kb, table
from tests.bench.targets import Target, start_nginx, start_proxyd
from tests.bench.tools import BenchError, Client, Rig, option, rig

BUDGET_KB = 8.0


def hold_streams(made: Rig, target: Target, group: str, hold_s: float) -> tuple[int, int]:
    """PSS in kB with all streams open: once the last has had an event, and the largest of the next hold_s seconds."""
    client = Client(made, target.port, target.token, [group])
    count = int(option(group, "n", 1))
    try:
        if client.wait_ready() < count:
            raise BenchError(f"{target.name}: streams failed; {client.started.tail()}")
        at_first = most = pss_kb(target.pid)
        until = time.monotonic() + hold_s
        while time.monotonic() < until:
            time.sleep(0.5)
            most = max(most, pss_kb(target.pid))
        return at_first, most
    finally:
        client.quit()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=0.2, help="events a second and stream")
    parser.add_argument("--hold", type=float, default=10, help="seconds the streams stay open")
    parser.add_argument("--prompt", type=int, default=0, help="bytes of text more in every request, at most 60,000")
    options = parser.parse_args(argv)
    group = f"n={options.streams} rate={options.rate} prompt={options.prompt}"
    rows = []
    with rig() as made:
        print(f"host: {host()}", flush=True)
        _, upstream_port = made.start_listener("upstream", core=made.cores.load)
        for starter in (start_nginx, start_proxyd):
            target = starter(made, upstream_port)
            time.sleep(1)
            idle = pss_kb(target.pid)
            hold_streams(made, target, "n=100 rate=20", 1)
            time.sleep(2)
            warm = pss_kb(target.pid)
            at_first, most = hold_streams(made, target, group, options.hold)
            time.sleep(5)
            after = pss_kb(target.pid)
            target.started.stop()
            each, each_warm = (most - idle) / options.streams, (most - warm) / options.streams
            sizes = [f"{kb:,}" for kb in (idle, warm, at_first, most, after)]
            rows.append([target.name, *sizes, f"{each:.2f}", f"{each_warm:.2f}"])
    print(f"\nPSS of the worker in kB, {options.streams} streams open for {options.hold:g} s")
    print(table(["proxy", "idle", "warm", "all open", "most", "closed", "kB/stream", "over warm"], rows))
    verdict = "within" if float(rows[-1][6]) <= BUDGET_KB else "OVER"
    print(f"proxyd: {rows[-1][6]} kB a stream ({verdict} the budget of {BUDGET_KB:g})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
