"""From the living master to what it hands over, and from that to the living master of the next image.

Owns both directions of handover.Handed. Must not know execve or JSON. Whatever is found of a child is what the kernel
says: one that died over the execve is a zombie of ours, and its pidfd is readable at the first turn.
"""

from __future__ import annotations

import dataclasses
import os
import time

from proxyd.host.child import ChildSpec
from proxyd.master.crew import Crew
from proxyd.master.generations import Generation, Stage
from proxyd.master.handover import GenerationState, Handed, HandoverError, SlotState
from proxyd.master.reload import Kind, Renewer
from proxyd.master.roster import Roster
from proxyd.master.slots import Phase, Slot
from proxyd.master.spec import MasterSpec

__all__ = ["Handed", "adopt", "collect", "verify"]


def collect(spec: MasterSpec, crew: Crew, roster: Roster, renewer: Renewer, signals: tuple[int, ...]) -> Handed:
    assert spec.renewal is not None
    listeners = roster.serving.spec.listeners
    node = spec.renewal.hand_over(roster.serving.spec.log)
    lifelines = crew.lifelines.fds()
    return Handed(
        pid=os.getpid(),
        version=spec.version,
        lifelines=lifelines,
        news=crew.news_fd,
        last_number=roster.last_number,
        generations=tuple(_generation(one) for one in roster.generations),
        telemetry=None if roster.telemetry is None else _slot(roster.telemetry),
        telemetry_succeeds=roster.next_telemetry is not None,
        renewals=renewer.begun,
        began_at=renewer.began_at,
        wanted=tuple(kind.value for kind in renewer.wanted),
        last=renewer.last,
        keeps_listeners=crew.keeps_listeners,
        signals=signals,
        listeners=listeners.to_state(),
        node=node,
        fds=(*lifelines, crew.news_fd, *listeners.fds(), *node["fds"]),
    )


def _generation(one: Generation) -> GenerationState:
    slots = tuple(_slot(slot) for slot in one.slots)
    return GenerationState(
        one.number, one.stage.value, one.version, one.since, one.ends_at, one.spec.drain_timeout_s, slots
    )


def _slot(slot: Slot) -> SlotState:
    return SlotState(
        number=slot.number,
        seat=slot.seat,
        phase=slot.phase.value,
        pid=0 if slot.child is None else slot.child.pid,
        born_at=slot.born_at,
        due_at=slot.due_at,
        failures=slot.failures,
        exit_code=slot.exit_code,
        is_ready=slot.is_ready,
        was_ready=slot.was_ready,
    )


def verify(handed: Handed) -> None:
    """What `adopt` will make of the words. Raises ValueError for one that this program does not know."""
    slots = [slot for one in handed.generations for slot in one.slots]
    for slot in [*slots, *([handed.telemetry] if handed.telemetry is not None else [])]:
        Phase(slot.phase)
    stages = [Stage(one.stage) for one in handed.generations]
    if stages.count(Stage.SERVING) != 1:
        raise HandoverError(f"{stages.count(Stage.SERVING)} generations serve")
    for word in handed.wanted:
        Kind(word)


def adopt(handed: Handed, spec: MasterSpec, crew: Crew, roster: Roster, renewer: Renewer) -> None:
    """Fills an empty roster. Raises HandoverError for what the check before the upgrade should have found."""
    for state in handed.generations:
        stage = Stage(state.stage)
        slots = [_adopt_slot(one, state.number, spec, crew) for one in state.slots]
        own = dataclasses.replace(spec.first, drain_timeout_s=state.drain_timeout_s, workers=len(slots))
        generation = Generation(state.number, own, slots, state.version, state.since)
        generation.stage, generation.ends_at = stage, state.ends_at
        roster.generations.append(generation)
        for slot in slots:
            if slot.phase is not Phase.GONE:
                try:
                    roster.seats.hold(slot.seat, state.number)
                except ValueError as error:
                    raise HandoverError(str(error)) from error
    if not any(one.stage is Stage.SERVING for one in roster.generations):
        raise HandoverError("no generation serves")
    roster.last_number = handed.last_number
    if handed.telemetry is not None and spec.first.telemetry is not None:
        slot = _adopt_slot(handed.telemetry, handed.last_number, spec, crew)
        roster.telemetry = slot
        if handed.telemetry_succeeds:
            roster.next_telemetry = spec.first.telemetry
    wanted = {Kind(one) for one in handed.wanted}
    renewer.resume(Kind.UPGRADE, handed.renewals, handed.began_at, wanted, handed.last)


def _adopt_slot(state: SlotState, generation: int, spec: MasterSpec, crew: Crew) -> Slot:
    child = ChildSpec(f"worker {state.number}", spec.first.run_worker)
    slot = Slot(
        state.number,
        child if state.number >= 0 or spec.first.telemetry is None else spec.first.telemetry,
        seat=state.seat,
        generation=generation,
        listeners=spec.first.listeners if state.number >= 0 else None,
    )
    slot.born_at, slot.failures, slot.exit_code = state.born_at, state.failures, state.exit_code
    slot.is_ready, slot.was_ready = state.is_ready, state.was_ready
    slot.phase, slot.due_at = Phase(state.phase), state.due_at
    crew.slots.append(slot)
    if state.pid:
        try:
            crew.adopt(slot, state.pid)
        except OSError:  # nobody of that name: what a death leads to, without a body to reap
            slot.phase = Phase.GONE if slot.phase is Phase.STOPPING else Phase.BACKOFF
            slot.due_at = None if slot.phase is Phase.GONE else time.monotonic()
    return slot
