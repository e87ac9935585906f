"""Who works on the node: the generations of workers, the telemetry process, the rest.

Owns the succession: a generation is begun, promoted over the serving one, or discarded; telemetry is never there
twice. Must not know why a generation is wanted, nor the node's phases. Asks the crew to act.

    begin -> STARTING -- promote --> SERVING           the one before it: RETIRING, its listeners and seats come back
                 '------ discard --> RETIRING or GONE  what it accepted is finished

Telemetry of the generation before gets TERM, and its successor starts when it is gone: two would fight for the lock
of the spool. Bound: OTHERS_TIMEOUT_S, then SIGKILL; rows wait in the spool meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from proxyd.host.child import ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.master.crew import Crew
from proxyd.master.generations import Generation, Seats, Stage
from proxyd.master.slots import Phase, Slot
from proxyd.master.spec import GenerationSpec, MasterSpec
from proxyd.shm.beats import Beat

KILL_AFTER_DRAIN_S = 5.0  # what a worker has to end its streams and settle after its own drain_timeout
# Behind the deadline of a generation that retires: it ends the rest over 2 s, waits 2 s for who takes nothing, closes.
KILL_AFTER_RETIRE_S = 10.0
OTHERS_TIMEOUT_S = 10.0  # telemetry's last groups; what it does not store waits in the spool


class Roster:
    """`serving` is the generation that newcomers belong to; from the node's start to its end there is one."""

    def __init__(self, spec: MasterSpec, crew: Crew) -> None:
        self._spec = spec
        self._crew = crew
        self.seats = Seats(spec.region.telemetry)
        self.generations: list[Generation] = []
        self.last_number = 0
        self.telemetry: Slot | None = None
        self.next_telemetry: ChildSpec | None = None  # once `telemetry` is gone
        # Extra children have no seat: they are not part of the product's node.
        self.extras = [Slot(-1, child) for child in spec.extra_children]
        crew.listeners_in_use = self._listeners_in_use

    @property
    def serving(self) -> Generation:
        return next(one for one in self.generations if one.stage in (Stage.SERVING, Stage.STARTING))

    @property
    def workers(self) -> list[Slot]:
        return [slot for one in self.generations for slot in one.slots]

    @property
    def others(self) -> list[Slot]:
        return [*([self.telemetry] if self.telemetry is not None else []), *self.extras]

    def _listeners_in_use(self) -> Iterator[Listeners]:
        return (one.spec.listeners for one in self.generations if one.stage in (Stage.SERVING, Stage.STARTING))

    # --- births --------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """The node's first children."""
        self.begin(self._spec.first, now, is_first=True)
        if self._spec.first.telemetry is not None:
            self.telemetry = self._make_telemetry(self._spec.first.telemetry)
        for slot in self.others:
            self._crew.slots.append(slot)
            self._crew.spawn(slot)

    def begin(self, spec: GenerationSpec, now: float, *, is_first: bool = False) -> Generation:
        """Forks a generation. Raises NoSeats, and nothing was done."""
        number = self.last_number + 1
        seats = self.seats.take(spec.workers, number)
        self.last_number = number
        slots = [
            Slot(
                n,
                ChildSpec(f"worker {n}", spec.run_worker),
                seat=seat,
                generation=number,
                listeners=spec.listeners,
                is_replaced=is_first,
            )
            for n, seat in enumerate(seats)
        ]
        generation = Generation(number, spec, slots, self._spec.version, now)
        self.generations.append(generation)
        self._crew.slots += slots
        for slot in slots:
            self._crew.spawn(slot)
        return generation

    def _make_telemetry(self, spec: ChildSpec) -> Slot:
        return Slot(-1, spec, seat=self._spec.region.telemetry, generation=self.last_number)

    # --- succession ----------------------------------------------------------------------------------------------

    def promote(self, new: Generation, now: float) -> None:
        """`new` is READY: the one that served makes room for it."""
        old = next((one for one in self.generations if one.stage is Stage.SERVING), None)
        new.move(Stage.SERVING, now)
        for slot in new.slots:
            slot.is_replaced = True
        if old is not None:
            self._retire(old, now)
            old.spec.listeners.release(new.spec.listeners)
            if new.spec.telemetry is not None and self.telemetry is not None:
                self._succeed(self.telemetry, new.spec.telemetry)

    def discard(self, new: Generation, now: float) -> None:
        """`new` could not start. Its workers that already accept finish what they have, in the time it would have
        had; the others are killed. The serving generation notices nothing."""
        serving = next(one for one in self.generations if one.stage is Stage.SERVING)
        self._crew.kill(slot for slot in new.slots if not slot.is_ready)
        self._retire(new, now)
        new.spec.listeners.release(serving.spec.listeners)

    def _retire(self, one: Generation, now: float) -> None:
        one.move(Stage.RETIRING, now)
        one.ends_at = now + one.spec.drain_timeout_s
        stay = [slot for slot in one.slots if slot.phase not in (Phase.STOPPING, Phase.GONE)]
        self._crew.retire(stay, one.ends_at, KILL_AFTER_RETIRE_S)

    def _succeed(self, telemetry: Slot, spec: ChildSpec) -> None:
        if telemetry.child is None and telemetry.phase is not Phase.GONE:
            telemetry.spec = spec
            return
        self.next_telemetry = spec
        if telemetry.phase is not Phase.STOPPING:
            self._crew.stop([telemetry], OTHERS_TIMEOUT_S)

    def tidy(self, now: float) -> list[Generation]:
        """After each turn: seats come back, a successor takes telemetry's place. Returns the generations that are
        gone since the last call."""
        gone: list[Generation] = []
        for one in self.generations:
            for slot in one.slots:
                if slot.phase is Phase.GONE and self.seats.give(slot.seat, one.number):
                    Beat(self._spec.region, slot.seat).set_vacant(False)
            if one.stage is Stage.RETIRING and one.is_over:
                one.move(Stage.GONE, now)
                gone.append(one)
        if gone:
            self.generations = [one for one in self.generations if one.stage is not Stage.GONE]
            self._crew.drop_gone()
        if self.next_telemetry is not None and (self.telemetry is None or self.telemetry.phase is Phase.GONE):
            self.telemetry = self._make_telemetry(self.next_telemetry)
            self.next_telemetry = None
            self._crew.drop_gone()
            self._crew.slots.append(self.telemetry)
            self._crew.spawn(self.telemetry)
        return gone

    # --- words ---------------------------------------------------------------------------------------------------

    def tell(self) -> list[dict[str, Any]]:
        """For the notice: `since` and `ends` are monotonic. The oldest ones that drain come together as one when
        there are many, for the notice has a bound."""
        return [
            {
                "generation": one.number,
                "state": one.stage.value,
                "since": round(one.since, 3),
                "ends": None if one.ends_at is None else round(one.ends_at, 3),
                "workers": len(one.slots),
                "version": one.version,
            }
            for one in self.generations[-GENERATIONS_TOLD:]
        ]


GENERATIONS_TOLD = 24  # some 100 bytes each, of the 8 KiB of a notice; older ones are still in the beats
