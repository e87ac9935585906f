"""Open files: what the configuration needs, what the kernel allows, and the raise from soft to hard.

Owns RLIMIT_NOFILE. Must not know the configuration's shape: it is given numbers. `decide` is pure.
A stream takes two descriptors in its worker, the client's and the upstream's.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

HEADROOM = 1.3  # connections that open before old ones are closed; measured as the working margin in OPERATIONS
FIXED = 64  # listeners, spool segments, log, epoll, telemetry store, the standard three
COMFORTABLE_CLIENTS = 1024  # idle keep-alive clients a worker should hold besides its streams


@dataclass(frozen=True, slots=True)
class FileLimit:
    """`is_enough` False refuses the start; `problem` says what is wrong ("" when nothing is), `remedy` what to do."""

    needed: int
    wanted: int
    allowed: int
    is_enough: bool
    problem: str
    remedy: str


def decide(upstream_connections: int, allowed: int, seats: int = 0) -> FileLimit:
    """`upstream_connections`: the sum of `max_connections` a worker may open; `allowed`: its limit of open files.
    `seats`: of a node that is to start; its master has two sockets for each."""
    needed = max(int(2 * upstream_connections * HEADROOM), 2 * seats) + FIXED
    wanted = needed + COMFORTABLE_CLIENTS
    problem = remedy = ""
    if allowed < 2 * seats + FIXED:
        problem = f"open files: the limit of {allowed} is below the {needed} that the master needs"
        remedy = "raise LimitNOFILE (or ulimit -n)"
    elif allowed < needed:
        problem = (
            f"open files: the limit of {allowed} is below the {needed} that each worker needs for "
            f"{upstream_connections} upstream connections"
        )
        remedy = "raise LimitNOFILE (or ulimit -n), or lower max_connections"
    elif allowed < wanted:
        problem = f"open files: the limit of {allowed} leaves little beside the {needed} that streams may take"
        remedy = f"{wanted} would keep {COMFORTABLE_CLIENTS} idle clients as well"
    return FileLimit(needed, wanted, allowed, allowed >= needed, problem, remedy)


def allowed_open_files() -> int:
    """What `raise_open_files` can reach: the hard limit."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def raise_open_files() -> int:
    """Lifts the soft limit to the hard one, which needs no privilege, and returns what is now allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (ValueError, OSError):
            return soft if soft != resource.RLIM_INFINITY else 1 << 30
    return allowed_open_files()
