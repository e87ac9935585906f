"""What is due on a stream, decided from times alone.

Owns: the order of the streaming timeouts, heartbeats and checkpoints. Pure: times are passed in. Must not know sockets.

    idle_timeout          nothing came from the upstream, while we were willing to read
    slow_client_timeout   the client took nothing of what waits for it
    total_timeout         the whole exchange
    heartbeat             the client was sent nothing; a comment line, only at an event boundary
    checkpoint            once a second, so that a killed worker loses at most a second of counts

Units: seconds on the monotonic clock. A timeout of 0 is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["CHECKPOINT_S", "Due", "Limits", "Times", "decide_due"]

# Half writes twice the records for half a second of counts in an accident; twice doubles what an accident loses.
CHECKPOINT_S = 1.0


class Due(Enum):
    """What to do now."""

    NOTHING = "nothing"
    HEARTBEAT = "heartbeat"
    IDLE = "idle"
    SLOW_CLIENT = "slow_client"
    TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Limits:
    """The timeouts of one upstream and of `[stream]`, shared by its streams."""

    idle_s: float
    total_s: float
    slow_client_s: float
    heartbeat_s: float


@dataclass(slots=True)
class Times:
    """When what last happened. `paused`: the upstream is not read because the client does not read."""

    started: float
    last_read: float
    last_write: float
    pending: int
    paused: bool
    draining_only: bool


def decide_due(limits: Limits, times: Times, now: float) -> tuple[Due, float]:
    """The most urgent thing that is due, and when to look again at the latest."""
    next_look = now + CHECKPOINT_S
    if limits.total_s and not times.draining_only:
        if now - times.started >= limits.total_s:
            return Due.TOTAL, next_look
        next_look = min(next_look, times.started + limits.total_s)
    if times.pending and limits.slow_client_s:
        if now - times.last_write >= limits.slow_client_s:
            return Due.SLOW_CLIENT, next_look
        next_look = min(next_look, times.last_write + limits.slow_client_s)
    if times.draining_only:
        return Due.NOTHING, next_look
    if not times.paused and limits.idle_s:
        if now - times.last_read >= limits.idle_s:
            return Due.IDLE, next_look
        next_look = min(next_look, times.last_read + limits.idle_s)
    if limits.heartbeat_s and not times.pending:
        silent_since = times.last_write
        if now - silent_since >= limits.heartbeat_s:
            return Due.HEARTBEAT, min(next_look, now + limits.heartbeat_s)
        next_look = min(next_look, silent_since + limits.heartbeat_s)
    return Due.NOTHING, next_look
