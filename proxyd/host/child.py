"""What the master tells a child at its birth, and the little that a child tells the master.

Owns the seam between the rooms `master` and `worker`, which do not import each other. Must not know either.

    lifeline   read end of a pipe nobody writes to: end of file means that whoever held the other end is gone
    news       eventfd: the child says "my state changed", so that the master need not poll for it
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

EXIT_CANNOT_BOOT = 78  # EX_CONFIG of sysexits.h: tried, and trying again at once would not help


@dataclass(frozen=True, slots=True)
class Birth:
    """Handed to `ChildSpec.run` in the forked process.

    slot         whose listeners a worker has, 0 to N-1; -1 for telemetry and the rest
    seat         its row in shared memory; -1 for one that has none
    generation   which start, reload or upgrade it belongs to, from 1
    keeps_listeners   the service manager keeps the listeners when all processes have ended: who waits in the backlogs
                 is the successor's
    """

    slot: int
    seat: int
    generation: int
    epoch: int
    lifeline_fd: int
    news_fd: int
    keeps_listeners: bool = False

    def tell(self) -> None:
        """Wakes the master. Never blocks: the counter of an eventfd holds more tellings than a life has."""
        try:
            os.eventfd_write(self.news_fd, 1)
        except OSError:
            pass


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """A kind of child. `run` is called in the forked process and returns its exit code; it owns everything there:
    its loop, its signals (TERM must end it) and its descriptors."""

    name: str
    run: Callable[[Birth], int]
