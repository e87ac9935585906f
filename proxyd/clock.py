"""Two clocks behind one object, so that whoever decides about time can be tested without waiting.

Owns: reading time. Must not know: timers, loops, formats.
Invariants: `monotonic` is for durations and deadlines and never goes back; `wall` is for rows, log lines and tokens.
"""

from __future__ import annotations

import time


class Clock:
    """The machine's clocks, both in seconds."""

    __slots__ = ()

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; only differences mean something."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        return time.time()


class FakeClock(Clock):
    """A clock that stands still until a test moves it."""

    __slots__ = ("_monotonic", "_wall")

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._monotonic = monotonic
        self._wall = wall

    def monotonic(self) -> float:
        return self._monotonic

    def wall(self) -> float:
        return self._wall

    def advance(self, seconds: float) -> None:
        """Moves both clocks forward."""
        if seconds < 0:
            raise ValueError("time goes forward only; use step_wall() for a corrected wall clock")
        self._monotonic += seconds
        self._wall += seconds

    def step_wall(self, seconds: float) -> None:
        """Corrects the wall clock alone, either way, as NTP does."""
        self._wall += seconds


SYSTEM = Clock()
