"""One coarse timer wheel: thousands of deadlines for the price of one timer.

Owns: which object is looked at in which tick. Must not know: the loop, the clock (the time is passed in), what a
deadline means. Front and relay each arm their own objects on the worker's one wheel.

    now ->  | 41 | 42 | 43 | 44 | ...      a bucket is a set of objects, a tick is `granularity_s` wide
              |    {a, c}   {b}

Invariants
- An object is in one bucket at most (`obj.parked`, NOT_PARKED when in none), so a closed connection is not kept
  alive by a deadline it no longer has.
- Nothing fires early; it fires at most two ticks late.
- Moving a deadline *later* costs an attribute write: the object stays where it is and is parked again when that
  bucket comes due (a keep-alive connection re-arms 75 s ahead with every request; it is touched once in 75 s).
"""

from __future__ import annotations

from typing import Protocol

__all__ = ["GRANULARITY_S", "NEVER", "NOT_PARKED", "Timed", "Wheel"]

# 100 ms: the shortest deadline in the configuration is about a second. At 50 ms an idle worker wakes 20 times a second
# for nothing; at 200 ms a one-second timeout is off by 40 %.
GRANULARITY_S = 0.1

NEVER = float("inf")
NOT_PARKED = -1


class Timed(Protocol):
    """What can be armed. Both attributes belong to the wheel: start with NEVER and NOT_PARKED, then only read."""

    deadline: float
    parked: int

    def on_deadline(self, now: float) -> None:
        """The deadline has passed; it is disarmed already and may be armed again from here."""


class Wheel:
    """Deadlines on the monotonic clock. The owner calls `tick(now)` about every `granularity_s` seconds."""

    __slots__ = ("_buckets", "_cursor", "_granularity_s")

    def __init__(self, now: float, granularity_s: float = GRANULARITY_S) -> None:
        self._granularity_s = granularity_s
        self._buckets: dict[int, set[Timed]] = {}
        self._cursor = int(now / granularity_s)

    def __len__(self) -> int:
        """How many objects are parked. Cost: one pass over the buckets; for tests and status."""
        return sum(len(bucket) for bucket in self._buckets.values())

    def add(self, obj: Timed, deadline: float) -> None:
        """Arms `obj`, or moves its deadline. Cost: an attribute write when it moves later, else two set operations."""
        obj.deadline = deadline
        if deadline == NEVER:
            return
        # The bucket after the one the deadline falls in: its whole span lies behind the deadline when it comes due.
        index = max(int(deadline / self._granularity_s), self._cursor) + 1
        if obj.parked != NOT_PARKED and obj.parked <= index:
            return
        self._unpark(obj)
        self._park(obj, index)

    def cancel(self, obj: Timed) -> None:
        """Forgets `obj` at once. For an object that goes on living, `add(obj, NEVER)` is cheaper."""
        obj.deadline = NEVER
        self._unpark(obj)

    def tick(self, now: float) -> int:
        """Fires what is due and parks again what moved; returns how many fired. Callbacks may arm and cancel."""
        due = int(now / self._granularity_s)
        fired = 0
        while self._cursor < due:
            self._cursor += 1
            bucket = self._buckets.pop(self._cursor, None)
            if bucket is None:
                continue
            # One at a time out of the set: firing one object may cancel another of the same bucket.
            while bucket:
                obj = bucket.pop()
                obj.parked = NOT_PARKED
                deadline = obj.deadline
                if deadline == NEVER:
                    continue
                if deadline > now:
                    self._park(obj, max(int(deadline / self._granularity_s), self._cursor) + 1)
                    continue
                obj.deadline = NEVER
                fired += 1
                self._firing(obj, now, bucket)
        return fired

    def _firing(self, obj: Timed, now: float, rest: set[Timed]) -> None:
        # The rest of the bucket stays reachable for cancel() while this object's callback runs.
        if rest:
            self._buckets[self._cursor] = rest
        try:
            obj.on_deadline(now)
        finally:
            self._buckets.pop(self._cursor, None)

    def _park(self, obj: Timed, index: int) -> None:
        obj.parked = index
        bucket = self._buckets.get(index)
        if bucket is None:
            self._buckets[index] = {obj}
        else:
            bucket.add(obj)

    def _unpark(self, obj: Timed) -> None:
        if obj.parked == NOT_PARKED:
            return
        bucket = self._buckets.get(obj.parked)
        obj.parked = NOT_PARKED
        if bucket is not None:
            bucket.discard(obj)
