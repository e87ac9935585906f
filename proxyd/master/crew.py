"""The children of a node: forks them, reaps them, replaces those that die, finds those that are stuck.

Owns every slot of every generation, the two shared children's included, and what a fork leaves to a child. Must not
know which generation serves, why one ends, nor signals to the master. It waits for nothing: the master's loop calls.

    spawn -> RUNNING -> reap -> BACKOFF -> act_on_due -> spawn       slots.py has the table
                 look: silent -> ABORTING -> act_on_due: SIGKILL
                 stop -> STOPPING -> reap -> GONE, or act_on_due: SIGKILL
"""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterable

from proxyd.host.child import EXIT_CANNOT_BOOT, Birth
from proxyd.host.sockets import Listeners
from proxyd.ids import new_epoch
from proxyd.log import Log
from proxyd.master import slots as judge
from proxyd.master.children import Child, Lifelines, spawn
from proxyd.master.signals import SignalPipe
from proxyd.master.slots import HAS_CHILD, Phase, Slot
from proxyd.master.spec import MasterSpec
from proxyd.shm.beats import Beat, State
from proxyd.shm.metrics import Metrics, clear_gauges

# After a TERM to the whole group telemetry may end just before the workers' exits are seen; it has stored all then.
LATE_WORKERS_S = 0.5


class Crew:
    """`slots` are all that exist; the master adds and drops. `listeners_in_use`: every set that the master holds."""

    def __init__(self, spec: MasterSpec, log: Log, pipe: SignalPipe, lifelines: Lifelines, news_fd: int) -> None:
        self._spec = spec
        self._region = spec.region
        self.log = log
        self.lifelines = lifelines
        self.news_fd = news_fd
        self.slots: list[Slot] = []
        self.is_stopping = False  # the node: telemetry may end before it is told to
        self.keeps_listeners = False
        self.listeners_in_use: Callable[[], Iterable[Listeners]] = lambda: ()
        self._pipe = pipe
        self._life = Beat(self._region, self._region.master)
        self._restarts = Metrics(self._region, self._region.master).counter("proxyd_worker_restarts_total")
        self._private: set[int] = set()  # watched, and nothing of a child's
        self._poll = select.poll()
        self._poll.register(pipe.fd, select.POLLIN)
        self._poll.register(news_fd, select.POLLIN)

    # --- waiting -------------------------------------------------------------------------------------------------

    def watch(self, fd: int) -> None:
        """Until `unwatch`. No child keeps it."""
        self._private.add(fd)
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._private.discard(fd)
        self._poll.unregister(fd)

    def wait(self, until: float) -> set[int]:
        """Descriptors that are readable; waits until then at most (monotonic)."""
        due = [slot.due_at for slot in self.slots if slot.due_at is not None]
        # Rounded up: poll(2) must not return a millisecond early and spin.
        timeout_ms = max(0, int((min([until, *due]) - time.monotonic()) * 1000) + 1)
        return {fd for fd, _ in self._poll.poll(timeout_ms)}

    # --- births --------------------------------------------------------------------------------------------------

    def spawn(self, slot: Slot) -> None:
        now = time.monotonic()
        epoch = new_epoch(self._life.epoch)
        beat = Beat(self._region, slot.seat) if slot.has_beats else None
        if beat is not None:
            beat.birth(0, epoch, now, slot.number, slot.generation)
            slot.beat_seen, slot.beat_at = beat.last, now

        def make_birth() -> Birth:
            lifeline = self.leave_to_child(slot.listeners, is_worker=slot.is_worker)
            place = slot.number, slot.seat, slot.generation
            return Birth(*place, epoch, lifeline, self.news_fd, self.keeps_listeners)

        self.log.flush()  # what waits in the buffer is not the child's to write again
        try:
            child = spawn(slot.spec, make_birth, self._pipe)
        except OSError as error:
            slot.failures, delay = judge.decide_delay(0.0, slot.failures, EXIT_CANNOT_BOOT)
            slot.move(*((Phase.BACKOFF, now + delay) if slot.is_replaced else (Phase.GONE, None)))
            slot.end = f"cannot fork: {os.strerror(error.errno or 0)}"
            self.log.error("fork_failed", child=slot.spec.name, detail=os.strerror(error.errno or 0), retry_s=delay)
            return
        slot.child = child
        slot.born_at = now
        slot.is_ready = False
        slot.move(Phase.RUNNING)
        if beat is not None:
            beat.birth(child.pid, epoch, now)
        self.watch(child.pidfd)
        self.log.debug("child_started", child=slot.spec.name, pid=child.pid)

    def adopt(self, slot: Slot, pid: int) -> None:
        """A child of ours that an earlier image of this program forked; a dead one is reaped at the next turn. Raises
        OSError when there is no such process."""
        slot.child = Child(pid)
        beat = Beat(self._region, slot.seat)
        slot.beat_seen, slot.beat_at = beat.last, time.monotonic()
        self.watch(slot.child.pidfd)

    def leave_to_child(self, kept: Listeners | None, *, is_worker: bool) -> int:
        """In a forked process: nothing of the master's stays open there. Returns the lifeline to watch."""
        for fd in self._private:
            os.close(fd)
        mine = set() if kept is None else _sockets(kept)
        for listeners in self.listeners_in_use():
            for sock in _sockets(listeners) - mine:
                sock.close()
        return self.lifelines.keep(is_worker)

    # --- deaths --------------------------------------------------------------------------------------------------

    def reap(self, readable: set[int]) -> None:
        for slot in self.slots:
            if slot.child is not None and slot.child.pidfd in readable:
                self._maybe_reap(slot, slot.child)

    def _maybe_reap(self, slot: Slot, child: Child) -> None:
        pidfd = child.pidfd
        code = child.reap()
        if code is None:
            return
        self.unwatch(pidfd)
        slot.child = None
        slot.exit_code = code
        slot.end = tell(code)
        now = time.monotonic()
        has_waited = False
        if slot.has_beats:
            beat = Beat(self._region, slot.seat)
            has_waited = beat.state is State.WAITING
            beat.death()
            clear_gauges(self._region, slot.seat)
        if slot.is_worker:
            self._spec.on_worker_gone(slot.seat)
        if self.is_stopping and code == 0 and not slot.is_worker and slot.phase is not Phase.STOPPING:
            # A TERM to the whole group reached it before ours.
            self.log.info("child_ended", child=slot.spec.name, pid=child.pid, how=slot.end)
            if has_waited:
                slot.move(Phase.STOPPING)
                slot.move(Phase.GONE)
            else:
                slot.move(Phase.BACKOFF, now + LATE_WORKERS_S)  # workers that are not done then have rows for it
        elif slot.phase is Phase.STOPPING:
            slot.move(Phase.GONE)
            if code:
                self.log.warning("child_ended", child=slot.spec.name, pid=child.pid, how=slot.end)
        else:
            self._note_death(slot, child.pid, now)

    def _note_death(self, slot: Slot, pid: int, now: float) -> None:
        """It was not asked to end."""
        age_s = now - slot.born_at
        delay: float | None = None
        if slot.is_replaced:
            slot.failures, delay = judge.decide_delay(age_s, slot.failures, slot.exit_code, has_served=slot.is_ready)
            slot.move(Phase.BACKOFF, now + delay)
            if delay and slot.has_beats:
                Beat(self._region, slot.seat).set_vacant(True)
        else:
            slot.move(Phase.GONE)
        self.log.error(
            "child_died",
            child=slot.spec.name,
            pid=pid,
            how=slot.end,
            age_s=round(age_s, 1),
            successor_in_s=delay,
        )

    # --- life ----------------------------------------------------------------------------------------------------

    def read_states(self) -> None:
        for slot in self.slots:
            if slot.has_beats and slot.child is not None and not slot.is_ready:
                beat = Beat(self._region, slot.seat)
                slot.is_ready = beat.state is State.READY
                slot.was_ready = slot.was_ready or slot.is_ready
                if slot.is_ready:
                    beat.set_vacant(False)

    def look(self, now: float, gap_s: float, expected_s: float) -> None:
        """Once a second: who is silent. `gap_s`: since the last look, which should have been `expected_s`."""
        judge.forgive_pause(self.slots, gap_s, expected_s)
        for slot in self.slots:
            if slot.phase in (Phase.RUNNING, Phase.STOPPING) and slot.has_beats and slot.child is not None:
                beat = Beat(self._region, slot.seat).last
                timeout = self._spec.beat_timeout_s if slot.is_worker else self._spec.telemetry_timeout_s
                if judge.is_silent(slot, now, beat, timeout, max(timeout, judge.BOOT_TIMEOUT_S)):
                    self.log.error("child_silent", child=slot.spec.name, pid=slot.child.pid, timeout_s=timeout)
                    self.log.flush()  # before the child's traceback goes to the same place
                    slot.child.send(signal.SIGABRT)
                    if slot.phase is Phase.STOPPING:
                        slot.due_at = now + judge.ABORT_GRACE_S
                    else:
                        slot.move(Phase.ABORTING, now + judge.ABORT_GRACE_S)

    def act_on_due(self, now: float) -> None:
        for slot in self.slots:
            if slot.due_at is None or now < slot.due_at:
                continue
            if slot.phase is Phase.BACKOFF:
                slot.due_at = None
                if slot.has_beats:
                    Beat(self._region, slot.seat).count_restart()
                if slot.is_worker:
                    self._restarts.add()
                self.spawn(slot)
            elif slot.child is not None:
                slot.due_at = None
                self.log.error("child_killed", child=slot.spec.name, pid=slot.child.pid, phase=slot.phase.value)
                slot.child.send(signal.SIGKILL)

    def count_streams(self) -> int:
        return sum(Beat(self._region, slot.seat).streams for slot in self.slots if slot.is_worker)

    def send_all(self, number: signal.Signals) -> int:
        """How many were told."""
        told = [slot.child for slot in self.slots if slot.child is not None]
        for child in told:
            child.send(number)
        return len(told)

    # --- ends ----------------------------------------------------------------------------------------------------

    def stop(self, slots: Iterable[Slot], limit_s: float) -> None:
        """TERM now, SIGKILL after `limit_s`. One that was to end sooner still does."""
        now = time.monotonic()
        for slot in slots:
            if slot.child is None:
                if slot.phase is not Phase.GONE:
                    slot.move(Phase.GONE)
            elif slot.phase is Phase.STOPPING:
                slot.child.send(signal.SIGTERM)
                slot.due_at = now + limit_s if slot.due_at is None else min(slot.due_at, now + limit_s)
            else:
                is_stuck = slot.phase is Phase.ABORTING  # it would not hear a TERM
                slot.child.send(signal.SIGTERM)
                slot.move(Phase.STOPPING, now + (judge.ABORT_GRACE_S if is_stuck else limit_s))

    def retire(self, slots: Iterable[Slot], deadline: float, grace_s: float) -> None:
        """Orders workers to make room for another generation: until `deadline` (monotonic), SIGKILL `grace_s` later."""
        now = time.monotonic()
        for slot in slots:
            if slot.child is None:
                if slot.phase is not Phase.GONE:
                    slot.move(Phase.GONE)
                continue
            is_stuck = slot.phase is Phase.ABORTING
            Beat(self._region, slot.seat).retire(deadline)
            slot.move(Phase.STOPPING, now + judge.ABORT_GRACE_S if is_stuck else deadline + grace_s)

    def kill(self, slots: Iterable[Slot]) -> None:
        """At once. The loop reaps them."""
        for slot in slots:
            if slot.child is not None:
                slot.child.send(signal.SIGKILL)
                if slot.phase is not Phase.STOPPING:
                    slot.move(Phase.STOPPING)
            elif slot.phase is not Phase.GONE:
                slot.move(Phase.GONE)

    def drop_gone(self) -> None:
        self.slots = [slot for slot in self.slots if slot.phase is not Phase.GONE]

    def kill_all(self) -> None:
        """Leaves no process behind, however the loop was left."""
        alive: list[Child] = [slot.child for slot in self.slots if slot.phase in HAS_CHILD and slot.child is not None]
        for child in alive:
            child.send(signal.SIGKILL)
        for child in alive:
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            os.close(child.pidfd)


def _sockets(listeners: Listeners) -> set[socket.socket]:
    return {*listeners.admin, *(sock for own in listeners.public for sock in own)}


def tell(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
