"""Generations of workers, and the seats in shared memory that they sit in: pure, given the time.

Owns the states of a generation and who holds which seat. Must not know processes, sockets or files: the master asks,
acts, and moves the generation. A generation is the workers that one start, reload or upgrade made, counted from 1.

    STARTING -> SERVING -> RETIRING -> GONE       replaced by the next one
    STARTING -------------> RETIRING -> GONE      could not start; workers that were READY finish what they accepted
    STARTING -> GONE, SERVING -> GONE             nobody of it lives

Invariants: at most one generation is STARTING and at most one SERVING; a seat is held by one slot of one generation
from its first fork until its last child is reaped; GONE absorbs and holds no seat.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum

from proxyd.master.slots import HAS_CHILD, Phase, Slot
from proxyd.master.spec import GenerationSpec


class Stage(Enum):
    """The values are what `status` shows."""

    STARTING = "starting"
    SERVING = "serving"
    RETIRING = "draining"
    GONE = "gone"


EDGES: dict[Stage, frozenset[Stage]] = {
    Stage.STARTING: frozenset({Stage.SERVING, Stage.RETIRING, Stage.GONE}),
    Stage.SERVING: frozenset({Stage.RETIRING, Stage.GONE}),
    Stage.RETIRING: frozenset({Stage.GONE}),
    Stage.GONE: frozenset(),
}


class Generation:
    """Some workers. `since`, `ends_at`: monotonic; `ends_at` is set while it retires, and None without a bound."""

    __slots__ = ("ends_at", "number", "since", "slots", "spec", "stage", "version")

    def __init__(self, number: int, spec: GenerationSpec, slots: list[Slot], version: str, now: float) -> None:
        self.number = number
        self.spec = spec
        self.slots = slots
        self.version = version
        self.stage = Stage.STARTING
        self.since = now
        self.ends_at: float | None = None

    def move(self, stage: Stage, now: float) -> None:
        """Raises RuntimeError for an edge that is not in the table: that is a bug of the master."""
        if stage not in EDGES[self.stage]:
            raise RuntimeError(f"generation {self.number}: no way from {self.stage.value} to {stage.value}")
        self.stage = stage
        self.since = now

    @property
    def is_ready(self) -> bool:
        """Every worker serves."""
        return all(slot.is_ready and slot.phase is Phase.RUNNING for slot in self.slots)

    @property
    def is_over(self) -> bool:
        return all(slot.phase is Phase.GONE for slot in self.slots)

    @property
    def alive(self) -> int:
        return sum(slot.phase in HAS_CHILD for slot in self.slots)

    def find_failed(self) -> Slot | None:
        """Of a generation that starts in a reload: a worker that is not there any more."""
        return next((slot for slot in self.slots if slot.phase is Phase.GONE), None)


class NoSeats(Exception):
    """Not enough free seats. `holders`: how many each generation has."""

    def __init__(self, wanted: int, free: int, holders: dict[int, int]) -> None:
        super().__init__(f"{wanted} seats wanted, {free} free")
        self.wanted, self.free, self.holders = wanted, free, holders


class Seats:
    """The workers' rows of shared memory. The lowest free ones are taken first, so that few are ever touched."""

    __slots__ = ("_holder", "count")

    def __init__(self, count: int) -> None:
        self.count = count
        self._holder: dict[int, int] = {}

    def take(self, wanted: int, generation: int) -> list[int]:
        """`wanted` seats, held by `generation` from now on. Raises NoSeats, and none is taken."""
        free = [seat for seat in range(self.count) if seat not in self._holder]
        if len(free) < wanted:
            raise NoSeats(wanted, len(free), dict(sorted(Counter(self._holder.values()).items())))
        taken = free[:wanted]
        for seat in taken:
            self._holder[seat] = generation
        return taken

    def hold(self, seat: int, generation: int) -> None:
        """One that is taken already, as a predecessor of this program tells. Raises ValueError."""
        if not 0 <= seat < self.count:
            raise ValueError(f"no seat {seat}: there are {self.count}")
        if self._holder.setdefault(seat, generation) != generation:
            raise ValueError(f"seat {seat} is held twice, by generations {self._holder[seat]} and {generation}")

    def give(self, seat: int, generation: int) -> bool:
        """Free again; False if it is not that generation's any more."""
        if self._holder.get(seat) != generation:
            return False
        del self._holder[seat]
        return True


def tell_no_seats(error: NoSeats, seats: int, generations: list[Generation], now: float) -> str:
    """Who holds the seats, and until when."""
    if error.wanted * 2 > seats:  # one generation drains while the next one serves
        return f"{error.wanted} workers do not fit twice into the {seats} places there are: systemctl restart proxyd"
    by_number = {one.number: one for one in generations}
    parts = []
    for number, count in error.holders.items():
        one = by_number.get(number)
        until = "" if one is None or one.ends_at is None else f", {max(0.0, one.ends_at - now):.0f} s more at most"
        stage = "" if one is None else f" {one.stage.value}"
        parts.append(f"generation {number}{stage} ({count} workers{until})")
    return (
        f"{error.wanted} workers need a place in shared memory and {error.free} are free; held by "
        f"{', '.join(parts)}; wait for those that drain, or lower server.drain_timeout"
    )
