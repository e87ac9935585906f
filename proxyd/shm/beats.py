"""Liveness words: each process says that its loop turns; the master reads who has stopped.

Owns one line per seat. Must not know signals or what to do about a silent process.

    | beat_ms | pid | epoch | state | streams | restarts | born_ms | vacant |
    | generation | slot | retire_by_ms | 5 words of room                    |

Times are milliseconds of CLOCK_MONOTONIC, which all processes share and an execve does not set back. Invariants: a
seat's process writes beat, state and streams; the master writes the rest (and, before the fork or after the reaping,
these too), so no word ever has two writers at once.
"""

from __future__ import annotations

from enum import IntEnum

from proxyd.shm.region import BEAT_BYTES, Region

_BEAT, _PID, _EPOCH, _STATE, _STREAMS, _RESTARTS, _BORN, _VACANT, _GENERATION, _SLOT, _RETIRE = range(11)
_WORD = 1 << 64


class State(IntEnum):
    """What a process says of itself. `/readyz` and `status` show it."""

    GONE = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    FAILING = 4  # telemetry: the store refuses
    WAITING = 5  # telemetry: another process stores


class Beat:
    """One seat's line. Both sides use it; each keeps to its own words (see above)."""

    __slots__ = ("_first", "_words")

    def __init__(self, region: Region, seat: int) -> None:
        region.slot_offset(seat)  # refuses a seat that does not exist
        self._words = region.beat_words()
        self._first = seat * BEAT_BYTES // 8

    # the seat's own process
    def beat(self, monotonic_s: float) -> None:
        self._words.store(self._first + _BEAT, int(monotonic_s * 1000))

    def enter(self, state: State) -> None:
        self._words.store(self._first + _STATE, state)

    def set_streams(self, streams: int) -> None:
        self._words.store(self._first + _STREAMS, streams)

    # the master
    def birth(self, pid: int, epoch: int, monotonic_s: float, slot: int = 0, generation: int = 0) -> None:
        """Called with pid 0 before the fork and with the pid after it: the child may beat in between, and only the
        first call writes more than the pid. An order of the seat's former process is void."""
        if not pid:
            self._words.store(self._first + _RETIRE, 0)
            self._words.store(self._first + _SLOT, slot % _WORD)
            self._words.store(self._first + _GENERATION, generation)
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

    def retire(self, deadline_monotonic_s: float) -> None:
        """Orders the seat's process to make room for the next generation until then. The last call counts."""
        self._words.store(self._first + _RETIRE, max(1, int(deadline_monotonic_s * 1000)))

    def set_vacant(self, is_vacant: bool) -> None:
        """True while the slot's successor is kept waiting (a crash loop): others may accept for it."""
        self._words.store(self._first + _VACANT, is_vacant)

    # anybody
    @property
    def retire_by_s(self) -> float | None:
        """Monotonic seconds; None: serve on. The seat's process looks at it in each pulse."""
        deadline = self._words.load(self._first + _RETIRE)
        return deadline / 1000 if deadline else None

    @property
    def generation(self) -> int:
        """Of the process that is or was last in this seat; 0 when there never was one."""
        return self._words.load(self._first + _GENERATION)

    @property
    def slot(self) -> int:
        """That of the process's listeners; -1 for one without."""
        slot = self._words.load(self._first + _SLOT)
        return slot - _WORD if slot >> 63 else slot

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
