"""Whether the loop has been late for so long that the worker is overloaded.

Owns the judgement, from how late each pulse was. Must not know loops or requests; the time is passed in.

    pulses    . . . x  x  x  x  x  x  . . . . . . .       x: more than LATE_S after it was due    .: in time
                    |<--- streak --->|
    unready            >= UNREADY_AFTER_S ............ until CALM_S of pulses in time
    refusing                 >= REFUSE_AFTER_S .. until CALM_REFUSE_S of them

Invariant: a streak ends with one pulse in time, and one late pulse is none. So a process that was stopped and goes on
(SIGSTOP, a suspended machine), however often, serves what waited.
"""

from __future__ import annotations

__all__ = ["CALM_REFUSE_S", "CALM_S", "LATE_S", "REFUSE_AFTER_S", "TIMELY_S", "UNREADY_AFTER_S", "LagWatch"]

# Ten pulses. Half is what a machine does that is busy with something else, twice is past many clients' patience.
LATE_S = 1.0
# What is less late than this is in time; what lies between neither makes a streak nor ends one.
TIMELY_S = 0.25
# A balancer that asks every second or two then sends its requests elsewhere.
UNREADY_AFTER_S = 2.0
# It had its time to do so. From then on new requests are refused, or those who are served would wait for all others.
REFUSE_AFTER_S = 5.0
# Less, and the answer to "is it ready" changes with each request that was refused.
CALM_S = 2.0
# Five pulses. A loop that is in time has room, and the next request must not pay for those before it.
CALM_REFUSE_S = 0.5
# Late pulses that make an episode. With two, a process that is stopped twice in a row would be overloaded.
LEAST_PULSES = 3


class LagWatch:
    """Fed with each pulse."""

    __slots__ = ("_calm_since", "_late", "_since", "is_overloaded", "is_refusing", "lag_s")

    def __init__(self) -> None:
        self._since = 0.0
        self._late = 0
        self._calm_since: float | None = None
        self.is_overloaded = False
        self.is_refusing = False
        self.lag_s = 0.0
        """How late the last late pulse was."""

    def see(self, lag_s: float, now: float) -> None:
        """A pulse came `lag_s` after it was due."""
        if lag_s > LATE_S:
            self.lag_s = lag_s
            self._calm_since = None
            if not self._late:
                self._since = now
            self._late += 1
            if self._late >= LEAST_PULSES:
                self.is_overloaded |= now - self._since >= UNREADY_AFTER_S
                self.is_refusing |= now - self._since >= REFUSE_AFTER_S
        elif lag_s > TIMELY_S:
            self._calm_since = None
        else:
            self._late = 0
            if self._calm_since is None:
                self._calm_since = now
            self.is_refusing &= now - self._calm_since < CALM_REFUSE_S
            self.is_overloaded &= now - self._calm_since < CALM_S
