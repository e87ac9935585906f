"""Whether the loop has been late for so long that the worker is overloaded.

Owns the judgement, from how late each pulse was. Must not know loops or requests; the time is passed in.

    late pulses   x  x     x  x                      x: more than LATE_S after it was due
                  |<- late for ->|<- CALM_S ->|      an episode is over when no pulse was late for CALM_S

Invariant: one pulse is never an episode, however late. A process that was stopped and goes on (SIGSTOP, a suspended
machine) has one late pulse and then serves what waited.
"""

from __future__ import annotations

__all__ = ["CALM_S", "LATE_S", "REFUSE_AFTER_S", "UNREADY_AFTER_S", "LagWatch"]

# Ten pulses. Half is what a machine does that is busy with something else, twice is past many clients' patience.
LATE_S = 1.0
# A balancer that asks every second or two then sends its requests elsewhere.
UNREADY_AFTER_S = 2.0
# It had its time to do so. From then on new requests are refused, or those who are served would wait for all others.
REFUSE_AFTER_S = 5.0
# Less, and the answer to "is it ready" changes with each request that was refused.
CALM_S = 2.0


class LagWatch:
    """Fed with each pulse."""

    __slots__ = ("_last", "_since", "lag_s")

    def __init__(self) -> None:
        self._since: float | None = None
        self._last = 0.0
        self.lag_s = 0.0
        """How late the last late pulse was."""

    def see(self, lag_s: float, now: float) -> None:
        """A pulse came `lag_s` after it was due."""
        if lag_s > LATE_S:
            self._last, self.lag_s = now, lag_s
            if self._since is None:
                self._since = now
        elif now - self._last >= CALM_S:
            self._since = None

    @property
    def late_for_s(self) -> float:
        """From the first late pulse of the episode to the last; 0 without one."""
        return self._last - self._since if self._since is not None else 0.0

    @property
    def is_overloaded(self) -> bool:
        return self.late_for_s >= UNREADY_AFTER_S

    @property
    def is_refusing(self) -> bool:
        return self.late_for_s >= REFUSE_AFTER_S
