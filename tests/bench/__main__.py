"""All benchmarks, short by default: `make bench`, or `python -m tests.bench [NAME ...] [--full]`."""

from __future__ import annotations

import argparse
import sys

from tests.bench import fairness, gaps, group_commit, lag, memory, metrics_cost, outage, relay_cost, window_query
from tests.bench.tools import BenchError

SHORT = {
    "relay_cost": ["--rounds", "3", "--window", "5"],
    "memory": ["--streams", "5000", "--hold", "6"],
    "metrics_cost": ["--seconds", "5"],
    "gaps": ["--seconds", "5"],
    "fairness": ["--seconds", "6"],
    "group_commit": ["--seconds", "1", "--rounds", "1", "--rows", "60000", "--sync-us", "0,1000"],
    "lag": ["--seconds", "5"],
    "window_query": ["--rows", "1000000", "--queries", "2000", "--seconds", "4", "--cap", "60"],
    "outage": ["--seconds", "6", "--backlog", "100000"],
}
FULL = {
    "relay_cost": ["--rounds", "5"],
    "memory": ["--hold", "30"],
    "metrics_cost": [],
    "gaps": ["--seconds", "20"],
    "fairness": ["--seconds", "20"],
    "group_commit": ["--levers"],
    "lag": [],
    "window_query": [],
    "outage": ["--seconds", "60", "--rounds", "2"],
}
RUN = {
    "relay_cost": relay_cost.main,
    "memory": memory.main,
    "metrics_cost": metrics_cost.main,
    "gaps": gaps.main,
    "fairness": fairness.main,
    "group_commit": group_commit.main,
    "lag": lag.main,
    "window_query": window_query.main,
    "outage": outage.main,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUN)}; default: all")
    parser.add_argument("--full", action="store_true", help="longer windows and more rounds")
    options = parser.parse_args()
    unknown = set(options.names) - set(RUN)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}")
    for name in options.names or RUN:
        print(f"\n== {name}", flush=True)
        RUN[name]((FULL if options.full else SHORT)[name])
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
