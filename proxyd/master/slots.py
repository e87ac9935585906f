"""A place for one child, and the decisions about it: pure, given the time.

Owns the states of a slot, the back-off of crash loops and the judgement of silence. Must not know processes, signals
or files: the master asks, acts, and moves the slot.

    VACANT -> RUNNING -> BACKOFF -> RUNNING ...          died, and comes back
              RUNNING -> ABORTING -> BACKOFF             silent: SIGABRT, then SIGKILL
              RUNNING -> STOPPING -> GONE                asked to end: the node stops, or the next generation serves
              RUNNING, ABORTING -> GONE                  died before its generation served: nobody comes after it
    VACANT, BACKOFF, ABORTING -> STOPPING or GONE        while the node stops

Invariants: a slot has a child exactly in RUNNING, ABORTING and STOPPING; GONE absorbs.
"""

from __future__ import annotations

from enum import Enum

from proxyd.host.child import EXIT_CANNOT_BOOT, ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.master.children import Child

YOUNG_S = 2.0  # a child that died younger was in a crash loop; half misses slow boots, twice slows real recoveries
# One that did serve was young only below this: a worker that is killed every two seconds is 1.9 s old each time, and
# somebody waits for its successor. Half: one that dies of what its first second brings is forked twice a second.
YOUNG_SERVED_S = 1.0
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 10.0  # twice: an operator who repaired the cause waits too long; half: a fork bomb of log lines
BACKOFF_SERVED_MAX_S = 0.5  # of one that did serve: somebody may wait for it, and a boot costs 20 ms of a core
CANNOT_BOOT_S = 1.0  # the first delay of one that said so itself
BEAT_TIMEOUT_S = 10.0  # the pulse is 0.1 s, so this is no busy loop but a stuck one
BOOT_TIMEOUT_S = 30.0
ABORT_GRACE_S = 2.0  # to write a traceback
PAUSED_S = 3.0  # the master itself did not run for so long: the machine was stopped, nobody is to blame


class Phase(Enum):
    VACANT = "vacant"
    RUNNING = "running"
    ABORTING = "aborting"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    GONE = "gone"


EDGES: dict[Phase, frozenset[Phase]] = {
    Phase.VACANT: frozenset({Phase.RUNNING, Phase.BACKOFF, Phase.GONE}),
    Phase.RUNNING: frozenset({Phase.BACKOFF, Phase.ABORTING, Phase.STOPPING, Phase.GONE}),
    Phase.ABORTING: frozenset({Phase.BACKOFF, Phase.STOPPING, Phase.GONE}),
    Phase.BACKOFF: frozenset({Phase.RUNNING, Phase.BACKOFF, Phase.GONE}),
    Phase.STOPPING: frozenset({Phase.GONE}),
    Phase.GONE: frozenset(),
}
HAS_CHILD = frozenset({Phase.RUNNING, Phase.ABORTING, Phase.STOPPING})


class Slot:
    """One place. `due_at` is when the phase asks for the next action (None: when something happens).

    `number`: of a worker in its generation, -1 for others. `seat`: its row of shared memory, -1 for one without.
    `listeners`: what its children may accept on; None closes all. `is_replaced`: a child that dies has a successor."""

    __slots__ = (
        "beat_at", "beat_seen", "born_at", "child", "due_at", "end", "exit_code", "failures", "generation", "is_ready",
        "is_replaced", "listeners", "number", "phase", "seat", "spec", "was_ready",
    )  # fmt: skip

    def __init__(
        self,
        number: int,
        spec: ChildSpec,
        *,
        seat: int = -1,
        generation: int = 0,
        listeners: Listeners | None = None,
        is_replaced: bool = True,
    ) -> None:
        self.number = number
        self.spec = spec
        self.seat = seat
        self.generation = generation
        self.listeners = listeners
        self.is_replaced = is_replaced
        self.phase = Phase.VACANT
        self.child: Child | None = None
        self.born_at = 0.0
        self.due_at: float | None = None
        self.failures = 0
        self.exit_code: int | None = None
        self.end = ""  # of the last child, in words
        self.is_ready = False  # the child that lives now
        self.was_ready = False  # any child of this slot
        self.beat_seen = 0
        self.beat_at = 0.0

    @property
    def is_worker(self) -> bool:
        return self.number >= 0

    @property
    def has_beats(self) -> bool:
        return self.seat >= 0

    def move(self, phase: Phase, due_at: float | None = None) -> None:
        """Raises RuntimeError for an edge that is not in the table: that is a bug of the master."""
        if phase not in EDGES[self.phase]:
            raise RuntimeError(f"slot {self.spec.name}: no way from {self.phase.value} to {phase.value}")
        self.phase = phase
        self.due_at = due_at


def decide_delay(age_s: float, failures: int, exit_code: int | None, *, has_served: bool = False) -> tuple[int, float]:
    """Failures in a row, and seconds until the successor. One sudden death is answered at once: it serves somebody's
    waiting connections; a second one, young, waits, and twice as long each time."""
    if age_s >= (YOUNG_SERVED_S if has_served else YOUNG_S) and exit_code != EXIT_CANNOT_BOOT:
        return 0, 0.0
    failures += 1
    if exit_code == EXIT_CANNOT_BOOT:
        return failures, min(BACKOFF_MAX_S, CANNOT_BOOT_S * 2.0 ** min(failures - 1, 10))
    if failures == 1:
        return failures, 0.0
    longest_s = BACKOFF_SERVED_MAX_S if has_served else BACKOFF_MAX_S
    return failures, min(longest_s, BACKOFF_FIRST_S * 2.0 ** min(failures - 2, 10))


def is_silent(slot: Slot, now: float, beat: int, timeout_s: float, boot_timeout_s: float) -> bool:
    """True if the slot's child has not beaten for its timeout, as the master saw it. Notes a new beat."""
    if beat != slot.beat_seen:
        slot.beat_seen, slot.beat_at = beat, now
    return now - slot.beat_at > (timeout_s if slot.is_ready else boot_timeout_s)


def forgive_pause(slots: list[Slot], gap_s: float, expected_s: float) -> None:
    """After a pause of the whole machine the master may wake first: that time counts for nobody's silence."""
    if gap_s - expected_s > PAUSED_S:
        for slot in slots:
            slot.beat_at += gap_s


def can_nobody_boot(slots: list[Slot]) -> bool:
    """True if each worker has said that it cannot boot and none ever served."""
    workers = [slot for slot in slots if slot.is_worker]
    return all(
        slot.phase is Phase.BACKOFF and slot.exit_code == EXIT_CANNOT_BOOT and not slot.was_ready for slot in workers
    )


def has_started(slots: list[Slot]) -> bool:
    """True once a worker serves and no other is still in its first start."""
    workers = [slot for slot in slots if slot.is_worker]
    return any(slot.was_ready for slot in workers) and all(
        slot.was_ready or slot.exit_code is not None for slot in workers
    )
