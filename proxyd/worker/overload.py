"""Whether the loop has been late for so long that the worker is overloaded.

Owns the judgement, from how late each pulse was. Must not know loops or requests; the time is passed in.

    pulses    . . . x  x  x  x  x  x  . . . . . . .      x: later than `late_s`    .: in time, less than `timely_s`
                    |<--- streak --->|
    episode                 >= after_s ........... until calm_s of pulses in time

Two kinds of episode: unready, so that a balancer sends its requests elsewhere; refusing, for what comes all the same.

Invariant: a streak ends with one pulse in time, and LEAST_PULSES late ones make it. So a process that was stopped and
goes on (SIGSTOP, a suspended machine), however often, serves what waited.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REFUSING", "UNREADY", "Episode", "LagWatch", "Rule"]

# With two, a process that is stopped twice in a row would be overloaded.
LEAST_PULSES = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """When an episode begins and ends. A pulse between `timely_s` and `late_s` neither makes a streak nor ends one."""

    late_s: float
    timely_s: float
    after_s: float
    calm_s: float


# A second is ten pulses. Half is what a machine does that is busy with something else, twice is past the patience of
# who types. A balancer asks every second or two; calmer sooner, and the answer changes with each burst.
UNREADY = Rule(late_s=1.0, timely_s=0.25, after_s=2.0, calm_s=2.0)
# Answers of a model take seconds anyway: a loop that is two seconds late still serves, and a 503 would not. Past three,
# for ten seconds, each one more makes all others wait until their clients leave; the balancer had its time.
REFUSING = Rule(late_s=3.0, timely_s=1.0, after_s=10.0, calm_s=0.5)


class Episode:
    """One rule, fed with each pulse."""

    __slots__ = ("_calm_since", "_late", "_rule", "_since", "is_on")

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._late = 0
        self._since = 0.0
        self._calm_since: float | None = None
        self.is_on = False

    def see(self, lag_s: float, now: float) -> None:
        rule = self._rule
        if lag_s > rule.timely_s:
            self._calm_since = None
            if lag_s > rule.late_s:
                if not self._late:
                    self._since = now
                self._late += 1
                self.is_on |= self._late >= LEAST_PULSES and now - self._since >= rule.after_s
            return
        self._late = 0
        if self._calm_since is None:
            self._calm_since = now
        self.is_on &= now - self._calm_since < rule.calm_s


class LagWatch:
    """Both episodes of a worker."""

    __slots__ = ("_refusing", "_unready", "lag_s")

    def __init__(self) -> None:
        self._unready, self._refusing = Episode(UNREADY), Episode(REFUSING)
        self.lag_s = 0.0
        """How late the last late pulse was."""

    def see(self, lag_s: float, now: float) -> None:
        """A pulse came `lag_s` after it was due."""
        if lag_s > UNREADY.late_s:
            self.lag_s = lag_s
        self._unready.see(lag_s, now)
        self._refusing.see(lag_s, now)

    @property
    def is_overloaded(self) -> bool:
        return self._unready.is_on

    @property
    def is_refusing(self) -> bool:
        return self._refusing.is_on
