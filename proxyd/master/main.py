"""The master: starts every child, replaces those that die, ends them in order.

Owns the listeners, the region and the children. Must not know HTTP, upstreams, stores or what a worker builds.
One loop: poll(2) over the signal pipe, the children's pidfds and their news; at most one second later it looks at
beats and due times. It has no event loop, no thread and no sleep, so there is nothing in it to get stuck.

    STARTING -> SERVING -> DRAINING -> CLOSING -> ENDED
                workers    workers     telemetry and the
                serve      finish      rest finish
    TERM or INT while DRAINING or CLOSING, and QUIT at any time: every child is killed -> ENDED

If the master dies by kill -9, workers see their lifeline end, stop accepting, finish briefly and go; telemetry and
the rest go after the last worker. A new master finds the ports free then, and Unix paths at once (host/sockets.py).
"""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from setproctitle import setproctitle

from proxyd.host.child import EXIT_CANNOT_BOOT, Birth, ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.host.systemd import Notifier
from proxyd.ids import new_epoch
from proxyd.log import Log
from proxyd.master import slots as judge
from proxyd.master.children import Child, Lifelines, spawn
from proxyd.master.signals import SignalPipe
from proxyd.master.slots import HAS_CHILD, Phase, Slot
from proxyd.shm.beats import Beat, State
from proxyd.shm.metrics import Metrics, clear_gauges
from proxyd.shm.region import Region

CHECK_S = 1.0  # beats, titles and the watchdog; ten times faster than the shortest thing it judges
KILL_AFTER_DRAIN_S = 5.0  # what a worker has to end its streams and settle after its own drain_timeout
# After a TERM to the whole group telemetry may end just before the workers' exits are seen; it has stored all then.
LATE_WORKERS_S = 0.5
OTHERS_TIMEOUT_S = 10.0  # telemetry's last groups; what it does not store waits in the spool


class NodePhase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    CLOSING = "closing"
    ENDED = "ended"


_NODE_EDGES: dict[NodePhase, frozenset[NodePhase]] = {
    NodePhase.STARTING: frozenset({NodePhase.SERVING, NodePhase.DRAINING, NodePhase.ENDED}),
    NodePhase.SERVING: frozenset({NodePhase.DRAINING, NodePhase.ENDED}),
    NodePhase.DRAINING: frozenset({NodePhase.CLOSING, NodePhase.ENDED}),
    NodePhase.CLOSING: frozenset({NodePhase.ENDED}),
    NodePhase.ENDED: frozenset(),
}
# What `status` shows of the node.
_STATES: dict[NodePhase, State] = {
    NodePhase.STARTING: State.STARTING,
    NodePhase.SERVING: State.READY,
    NodePhase.DRAINING: State.DRAINING,
    NodePhase.CLOSING: State.DRAINING,
    NodePhase.ENDED: State.GONE,
}


@dataclass(frozen=True, slots=True)
class MasterSpec:
    """Everything a master needs, made by the command line. `region` has a slot per worker, one per other child with
    beats, and one for the master, in this order. `on_worker_gone`: a slot whose worker is reaped, not yet replaced."""

    region: Region
    listeners: Listeners
    workers: int
    run_worker: Callable[[Birth], int]
    telemetry: ChildSpec | None
    extra_children: tuple[ChildSpec, ...] = ()
    drain_timeout_s: float = 120.0
    beat_timeout_s: float = judge.BEAT_TIMEOUT_S
    telemetry_timeout_s: float = 60.0  # a commit on a slow disk may hold its loop; killing it then helps nobody
    notifier: Notifier = field(default_factory=lambda: Notifier({}))
    on_ready: Callable[[], None] = lambda: None
    on_worker_gone: Callable[[int], None] = lambda slot: None


class Master:
    """Run once: `Master(spec, log).run()` returns the process's exit code."""

    def __init__(self, spec: MasterSpec, log: Log) -> None:
        self._spec = spec
        self._log = log
        self._region = spec.region
        self._slots = [
            Slot(n, ChildSpec(f"worker {n}", spec.run_worker), is_worker=True, has_beats=True)
            for n in range(spec.workers)
        ]
        if spec.telemetry is not None:
            self._slots.append(Slot(spec.workers, spec.telemetry, is_worker=False, has_beats=True))
        self._slots += [Slot(-1, child, is_worker=False, has_beats=False) for child in spec.extra_children]
        self._metrics = Metrics(self._region, self._region.master)
        self._restarts = self._metrics.counter("proxyd_worker_restarts_total")
        self._beat = Beat(self._region, self._region.master)
        self._phase = NodePhase.STARTING
        self._exit_code = 0
        self._deadline = 0.0
        self._checked_at = self._pinged_at = 0.0
        self._title = ""

    def run(self) -> int:
        self._pipe = SignalPipe()
        self._lifelines = Lifelines()
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._pipe.fd, select.POLLIN)
        self._poll.register(self._news, select.POLLIN)
        # Workers share the pages of everything imported so far as long as no collection writes into its objects.
        gc.disable()
        gc.freeze()
        self._set_title("master")
        self._beat.birth(0, new_epoch(), time.monotonic(), -1)
        self._beat.birth(os.getpid(), 0, 0.0)
        self._checked_at = self._pinged_at = time.monotonic()
        try:
            self._loop()
        finally:
            self._kill_all()
            self._spec.listeners.unlink()
            self._spec.listeners.close()
            self._lifelines.close()
            os.close(self._news)
            self._pipe.close()
            self._log.flush()
        return self._exit_code

    # --- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        for slot in self._slots:
            self._spawn(slot)
        while self._phase is not NodePhase.ENDED:
            self._log.flush()
            ready = {fd for fd, _ in self._poll.poll(self._timeout_ms(time.monotonic()))}
            if self._pipe.fd in ready:
                for number in self._pipe.take():
                    self._on_signal(number)
            if self._news in ready:
                os.eventfd_read(self._news)
                self._read_states()
            for slot in self._slots:
                if slot.child is not None and slot.child.pidfd in ready:
                    self._maybe_reap(slot)
            now = time.monotonic()
            if now - self._checked_at >= CHECK_S:
                self._check(now)
            self._act_on_due(now)
            self._maybe_advance()

    def _timeout_ms(self, now: float) -> int:
        due = [slot.due_at for slot in self._slots if slot.due_at is not None]
        soonest = min([self._checked_at + CHECK_S, *due])
        # Rounded up: poll(2) must not return a millisecond early and spin.
        return max(0, int((soonest - now) * 1000) + 1)

    def _on_signal(self, number: signal.Signals) -> None:
        is_stopping = self._phase not in (NodePhase.STARTING, NodePhase.SERVING)
        if number is signal.SIGQUIT or (number in (signal.SIGTERM, signal.SIGINT) and is_stopping):
            self._log.warning("exit_at_once", signal=number.name)
            self._move(NodePhase.ENDED)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._log.info("draining", signal=number.name, timeout_s=self._spec.drain_timeout_s)
            self._drain()
        elif number is signal.SIGUSR1:
            self._log.reopen()
            told = [slot.child for slot in self._slots if slot.child is not None]
            for child in told:
                child.send(number)
            self._log.info("logs_reopened", signal=number.name, processes=len(told) + 1)
        else:
            verb = "reload" if number is signal.SIGHUP else "upgrade"
            self._log.warning(f"{verb}_unavailable", detail=f"this version cannot {verb}; restart the service instead")

    # --- children ------------------------------------------------------------------------------------------------

    def _spawn(self, slot: Slot) -> None:
        now = time.monotonic()
        epoch = new_epoch(self._beat.epoch)
        beat = Beat(self._region, slot.number) if slot.has_beats else None
        if beat is not None:
            beat.birth(0, epoch, now, slot.number if slot.is_worker else -1, 1)
            slot.beat_seen, slot.beat_at = beat.last, now

        def make_birth() -> Birth:
            return self._leave_to_child(slot, epoch)

        self._log.flush()  # what waits in the buffer is not the child's to write again
        try:
            child = spawn(slot.spec, make_birth, self._pipe)
        except OSError as error:
            slot.failures, delay = judge.decide_delay(0.0, slot.failures, EXIT_CANNOT_BOOT)
            slot.move(Phase.BACKOFF, now + delay)
            self._log.error("fork_failed", child=slot.spec.name, detail=os.strerror(error.errno or 0), retry_s=delay)
            return
        slot.child = child
        slot.born_at = now
        slot.is_ready = False
        slot.move(Phase.RUNNING)
        if beat is not None:
            beat.birth(child.pid, epoch, now)
        self._poll.register(child.pidfd, select.POLLIN)
        self._log.debug("child_started", child=slot.spec.name, pid=child.pid)

    def _leave_to_child(self, slot: Slot, epoch: int) -> Birth:
        """In the forked process: nothing of the master's stays open there."""
        for sibling in self._slots:
            if sibling.child is not None:
                os.close(sibling.child.pidfd)
        if not slot.is_worker:
            self._spec.listeners.close()
        place, lifeline = (slot.number if slot.is_worker else -1), self._lifelines.keep(slot.is_worker)
        return Birth(place, slot.number, 1, epoch, lifeline, self._news)

    def _maybe_reap(self, slot: Slot) -> None:
        child = slot.child
        if child is None:
            return
        pidfd = child.pidfd
        code = child.reap()
        if code is None:
            return
        self._poll.unregister(pidfd)
        slot.child = None
        slot.exit_code = code
        now = time.monotonic()
        age_s = now - slot.born_at
        has_waited = False
        if slot.has_beats:
            beat = Beat(self._region, slot.number)
            has_waited = beat.state is State.WAITING
            beat.death()
            clear_gauges(self._region, slot.number)
        if slot.is_worker:
            self._spec.on_worker_gone(slot.number)
        if self._is_draining and code == 0 and not slot.is_worker and slot.phase is not Phase.STOPPING:
            # A TERM to the whole group reached it before ours.
            self._log.info("child_ended", child=slot.spec.name, pid=child.pid, how=_tell(code))
            if has_waited:
                slot.move(Phase.STOPPING)
                slot.move(Phase.GONE)
            else:
                slot.move(Phase.BACKOFF, now + LATE_WORKERS_S)  # workers that are not done then have rows for it
            return
        if slot.phase is Phase.STOPPING:
            slot.move(Phase.GONE)
            if code:
                self._log.warning("child_ended", child=slot.spec.name, pid=child.pid, how=_tell(code))
            return
        slot.failures, delay = judge.decide_delay(age_s, slot.failures, code, has_served=slot.is_ready)
        slot.move(Phase.BACKOFF, now + delay)
        if delay and slot.has_beats:
            Beat(self._region, slot.number).set_vacant(True)
        self._log.error(
            "child_died",
            child=slot.spec.name,
            pid=child.pid,
            how=_tell(code),
            age_s=round(age_s, 1),
            successor_in_s=delay,
        )
        if self._phase is NodePhase.STARTING and judge.can_nobody_boot(self._slots):
            self._log.error("cannot_start", detail="no worker can boot; the lines above say why")
            self._exit_code = EXIT_CANNOT_BOOT
            self._drain()

    @property
    def _is_draining(self) -> bool:
        return self._phase in (NodePhase.DRAINING, NodePhase.CLOSING)

    def _read_states(self) -> None:
        for slot in self._slots:
            if slot.has_beats and slot.child is not None and not slot.is_ready:
                beat = Beat(self._region, slot.number)
                slot.is_ready = beat.state is State.READY
                slot.was_ready = slot.was_ready or slot.is_ready
                if slot.is_ready:
                    beat.set_vacant(False)

    # --- time ----------------------------------------------------------------------------------------------------

    def _check(self, now: float) -> None:
        """Once a second: silence, the watchdog, the title."""
        judge.forgive_pause(self._slots, now - self._checked_at, CHECK_S)
        self._checked_at = now
        for slot in self._slots:
            if slot.phase in (Phase.RUNNING, Phase.STOPPING) and slot.has_beats and slot.child is not None:
                beat = Beat(self._region, slot.number).last
                timeout = self._spec.beat_timeout_s if slot.is_worker else self._spec.telemetry_timeout_s
                if judge.is_silent(slot, now, beat, timeout, max(timeout, judge.BOOT_TIMEOUT_S)):
                    self._log.error("child_silent", child=slot.spec.name, pid=slot.child.pid, timeout_s=timeout)
                    self._log.flush()  # before the child's traceback goes to the same place
                    slot.child.send(signal.SIGABRT)
                    if slot.phase is Phase.STOPPING:
                        slot.due_at = now + judge.ABORT_GRACE_S
                    else:
                        slot.move(Phase.ABORTING, now + judge.ABORT_GRACE_S)
        watchdog_s = self._spec.notifier.watchdog_s
        if watchdog_s is not None and now - self._pinged_at >= watchdog_s - CHECK_S:
            self._pinged_at = now
            self._spec.notifier.watchdog()
        streams = sum(Beat(self._region, slot.number).streams for slot in self._slots if slot.is_worker)
        alive = sum(slot.is_worker and slot.is_ready and slot.child is not None for slot in self._slots)
        self._set_title(f"master ({self._phase.value}, {alive} workers, {streams} streams)")

    def _act_on_due(self, now: float) -> None:
        for slot in self._slots:
            if slot.due_at is None or now < slot.due_at:
                continue
            if slot.phase is Phase.BACKOFF:
                slot.due_at = None
                if slot.has_beats:
                    Beat(self._region, slot.number).count_restart()
                if slot.is_worker:
                    self._restarts.add()
                self._spawn(slot)
            elif slot.child is not None:
                slot.due_at = None
                self._log.error("child_killed", child=slot.spec.name, pid=slot.child.pid, phase=slot.phase.value)
                slot.child.send(signal.SIGKILL)

    # --- the end -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        self._move(NodePhase.DRAINING)
        self._spec.notifier.stopping("draining")
        # The workers accept what waits, then close theirs; the kernel refuses newcomers from then on.
        self._spec.listeners.unlink_public()
        self._spec.listeners.close_public()
        limit = self._spec.drain_timeout_s + KILL_AFTER_DRAIN_S
        self._stop([slot for slot in self._slots if slot.is_worker], limit)

    def _stop(self, slots: list[Slot], limit_s: float) -> None:
        now = time.monotonic()
        for slot in slots:
            if slot.child is not None:
                is_stuck = slot.phase is Phase.ABORTING  # it would not hear a TERM
                slot.child.send(signal.SIGTERM)
                slot.move(Phase.STOPPING, now + (judge.ABORT_GRACE_S if is_stuck else limit_s))
            elif slot.phase is not Phase.GONE:
                slot.move(Phase.GONE)

    def _maybe_advance(self) -> None:
        """Moves the node on when its children did. Looked at in every turn: a node is also ready when the last worker
        that was starting has died."""
        if self._phase is NodePhase.STARTING and judge.has_started(self._slots):
            self._move(NodePhase.SERVING)
            self._log.info("ready", pid=os.getpid(), workers=self._spec.workers)
            self._spec.notifier.ready("serving")
            self._spec.on_ready()
        if self._phase is NodePhase.DRAINING and self._are_gone(self._slots[: self._spec.workers]):
            self._move(NodePhase.CLOSING)
            self._stop(self._slots[self._spec.workers :], OTHERS_TIMEOUT_S)
        if self._phase is NodePhase.CLOSING and self._are_gone(self._slots):
            self._log.info("stopped", pid=os.getpid())
            self._move(NodePhase.ENDED)

    def _are_gone(self, slots: list[Slot]) -> bool:
        return all(slot.phase is Phase.GONE for slot in slots)

    def _kill_all(self) -> None:
        """Leaves no process behind, however the loop was left."""
        alive: list[Child] = [slot.child for slot in self._slots if slot.phase in HAS_CHILD and slot.child is not None]
        for child in alive:
            child.send(signal.SIGKILL)
        for child in alive:
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
            os.close(child.pidfd)

    def _move(self, phase: NodePhase) -> None:
        if phase not in _NODE_EDGES[self._phase]:
            raise RuntimeError(f"no way from {self._phase.value} to {phase.value}")
        self._phase = phase
        self._beat.enter(_STATES[phase])

    def _set_title(self, title: str) -> None:
        if title != self._title:
            self._title = title
            setproctitle(f"proxyd: {title}")


def _tell(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"
