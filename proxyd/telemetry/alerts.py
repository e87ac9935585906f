"""When a condition of `monitoring.alert_on` is an alert: decisions only, one look after the other.

Owns the hysteresis. Must not know: where values come from, clocks, logs, metrics.

            true RAISE_AFTER looks in a row
    QUIET ----------------------------------> RAISED
      ^                                          |
      '------ false for CLEAR_AFTER_S -----------'

A value that nobody knows is false: nothing was measured, so nothing is too slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from proxyd.config.conditions import Condition

__all__ = ["CLEAR_AFTER_S", "RAISE_AFTER", "Alerts", "Change", "State"]

# One look may meet a single hiccup; three would tell of a full queue a second later than need be.
RAISE_AFTER = 2
# What swings about its threshold would be raised and cleared each few seconds; twice keeps showing what is over.
CLEAR_AFTER_S = 10.0


class State(Enum):
    QUIET = "quiet"
    RAISED = "raised"


@dataclass(frozen=True, slots=True)
class Change:
    """An alert was raised or cleared at this look. lasted_s: how long a cleared one was raised."""

    condition: Condition
    state: State
    value: float | None
    lasted_s: float = 0.0


class _Alert:
    """One condition's standing: how many looks in a row it held, since when it does not, since when it is raised."""

    __slots__ = ("false_since_s", "held", "raised_at_s", "state")

    def __init__(self) -> None:
        self.state = State.QUIET
        self.held = 0
        self.false_since_s: float | None = None
        self.raised_at_s = 0.0


class Alerts:
    """All conditions of a configuration."""

    __slots__ = ("_alerts", "conditions")

    def __init__(self, conditions: Sequence[Condition]) -> None:
        self.conditions = tuple(conditions)
        self._alerts = {condition.text: _Alert() for condition in self.conditions}

    def decide(self, values: Mapping[str, float | None], now_s: float) -> list[Change]:
        """What changes with these values (by the condition's text, in its unit) at this time; in the file's order."""
        changes = []
        for condition in self.conditions:
            value = values.get(condition.text)
            change = _decide(self._alerts[condition.text], condition, value, now_s)
            if change is not None:
                changes.append(change)
        return changes

    def inherit(self, text: str, raised_at_s: float) -> None:
        """One that was raised before this object was made."""
        alert = self._alerts[text]
        alert.state, alert.raised_at_s = State.RAISED, raised_at_s

    def is_raised(self, text: str) -> bool:
        return self._alerts[text].state is State.RAISED


def _decide(alert: _Alert, condition: Condition, value: float | None, now_s: float) -> Change | None:
    if condition.holds(value):
        alert.held, alert.false_since_s = alert.held + 1, None
        if alert.state is State.QUIET and alert.held >= RAISE_AFTER:
            alert.state, alert.raised_at_s = State.RAISED, now_s
            return Change(condition, State.RAISED, value)
        return None
    alert.held = 0
    if alert.state is State.QUIET:
        return None
    if alert.false_since_s is None:
        alert.false_since_s = now_s
    if now_s - alert.false_since_s < CLEAR_AFTER_S:
        return None
    alert.state, alert.false_since_s = State.QUIET, None
    return Change(condition, State.QUIET, value, now_s - alert.raised_at_s)
