"""Liveness words: each process says that its loop turns; the master reads who has stopped.

Owns one cache line per slot. Must not know signals or what to do about a silent process.

    | beat_ms | pid | epoch | state | streams | restarts | born_ms | vacant |

Times are milliseconds of CLOCK_MONOTONIC, which all processes share. Invariants: a slot's process writes beat, state
and streams; the master writes the rest (and, before the fork or after the reaping, these too), so no word ever has
two writers at once.
"""

from __future__ import annotations

from enum import IntEnum

from proxyd.shm.region import BEAT_BYTES, Region

_BEAT, _PID, _EPOCH, _STATE, _STREAMS, _RESTARTS, _BORN, _VACANT = range(8)


class State(IntEnum):
    """What a process says of itself. `/readyz` and `status` show it."""

    GONE = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    FAILING = 4  # telemetry: the store refuses
    WAITING = 5  # telemetry: another process stores


class Beat:
    """One slot's line. Both sides use it; each keeps to its own words (see above)."""

    __slots__ = ("_first", "_words")

    def __init__(self, region: Region, slot: int) -> None:
        region.slot_offset(slot)  # refuses a slot that does not exist
        self._words = region.beat_words()
        self._first = slot * BEAT_BYTES // 8

    # the slot's own process
    def beat(self, monotonic_s: float) -> None:
        self._words.store(self._first + _BEAT, int(monotonic_s * 1000))

    def enter(self, state: State) -> None:
        self._words.store(self._first + _STATE, state)

    def set_streams(self, streams: int) -> None:
        self._words.store(self._first + _STREAMS, streams)

    # the master
    def birth(self, pid: int, epoch: int, monotonic_s: float) -> None:
        """Called with pid 0 before the fork and with the pid after it: the child may beat in between."""
        if not pid:
            self._words.store(self._first + _EPOCH, epoch)
            self._words.store(self._first + _STATE, State.STARTING)
            self._words.store(self._first + _STREAMS, 0)
            self._words.store(self._first + _BORN, int(monotonic_s * 1000))
            self._words.store(self._first + _BEAT, int(monotonic_s * 1000))
        self._words.store(self._first + _PID, pid)

    def death(self) -> None:
        for word in (_PID, _STATE, _STREAMS):
            self._words.store(self._first + word, 0)

    def count_restart(self) -> None:
        self._words.add(self._first + _RESTARTS, 1)

    def set_vacant(self, is_vacant: bool) -> None:
        """True while the slot's successor is kept waiting (a crash loop): others may accept for it."""
        self._words.store(self._first + _VACANT, is_vacant)

    # anybody
    @property
    def is_vacant(self) -> bool:
        return self._words.load(self._first + _VACANT) != 0

    def silent_s(self, monotonic_s: float) -> float:
        """Seconds since the last beat."""
        return monotonic_s - self._words.load(self._first + _BEAT) / 1000

    @property
    def state(self) -> State:
        return State(self._words.load(self._first + _STATE))

    @property
    def pid(self) -> int:
        return self._words.load(self._first + _PID)

    @property
    def epoch(self) -> int:
        return self._words.load(self._first + _EPOCH)

    @property
    def streams(self) -> int:
        return self._words.load(self._first + _STREAMS)

    @property
    def restarts(self) -> int:
        return self._words.load(self._first + _RESTARTS)

    def age_s(self, monotonic_s: float) -> float:
        return monotonic_s - self._words.load(self._first + _BORN) / 1000

    @property
    def last(self) -> int:
        """The last beat as written; another value is a newer beat."""
        return self._words.load(self._first + _BEAT)


class Standing:
    """This process's own state, for `/readyz`: written by worker/main.py, read by whoever answers."""

    __slots__ = ("has_master", "state")

    def __init__(self) -> None:
        self.state = State.STARTING
        self.has_master = True

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY
