"""The master: starts every child, replaces those that die, brings in the next generation, ends them in order.

Owns the node's phases and what a signal leads to. Must not know HTTP, upstreams, stores or what a worker builds.
One loop: poll(2) over the signal pipe, the children's pidfds and their news; at most one second later it looks at
beats and due times. It has no event loop, no thread and no sleep, so there is nothing in it to get stuck.

    STARTING -> SERVING -> DRAINING -> CLOSING -> ENDED
                workers    workers     telemetry and the
                serve      finish      rest finish
    TERM or INT while DRAINING or CLOSING, and QUIT at any time: every child is killed -> ENDED
    HUP, USR2 while SERVING: reload.py; an execve keeps the phase

If the master dies by kill -9, workers see their lifeline end, stop accepting, finish briefly and go; telemetry and
the rest go after the last worker. A new master finds the ports free then, and Unix paths at once (host/sockets.py).
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable
from enum import Enum

from setproctitle import setproctitle

from proxyd.host.child import EXIT_CANNOT_BOOT
from proxyd.host.sockets import Listeners
from proxyd.ids import new_epoch
from proxyd.log import Log
from proxyd.master import slots as judge
from proxyd.master import succession, upgrade
from proxyd.master.children import Lifelines
from proxyd.master.crew import Crew
from proxyd.master.inquiry import Inquiry
from proxyd.master.reload import Renewer
from proxyd.master.roster import KILL_AFTER_DRAIN_S, OTHERS_TIMEOUT_S, Roster
from proxyd.master.signals import SignalPipe, held
from proxyd.master.slots import Phase, Slot
from proxyd.master.spec import MasterSpec
from proxyd.shm.beats import Beat, State

STORED_PREFIX = "listen-"  # how host/sockets.py names what it stores; a socket unit's names are its own
CHECK_S = 1.0  # beats, titles and the watchdog; ten times faster than the shortest thing it judges


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


class Master:
    """Run once: `Master(spec, log).run()` returns the process's exit code."""

    def __init__(self, spec: MasterSpec, log: Log) -> None:
        self._spec = spec
        self._beat = Beat(spec.region, spec.region.master)
        self._phase = NodePhase.STARTING
        self._exit_code = 0
        self._checked_at = self._pinged_at = 0.0
        self._title = ""
        self._has_store = False  # the service manager keeps what it is given
        handed = spec.handed
        self._pipe = SignalPipe()
        self._crew = Crew(
            spec,
            log,
            self._pipe,
            Lifelines(handed.lifelines if handed else ()),
            handed.news if handed else os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
        )
        self._roster = Roster(spec, self._crew)
        self._renewer = Renewer(
            spec, self._crew, self._roster, self._ask, self._make_program_check, self._replace, self._store_listeners
        )

    @property
    def _log(self) -> Log:
        return self._crew.log

    def run(self) -> int:
        # Workers share the pages of everything imported so far as long as no collection writes into its objects.
        gc.disable()
        gc.freeze()
        self._set_title("master")
        self._checked_at = self._pinged_at = time.monotonic()
        try:
            if self._spec.handed is None:
                self._start()
            else:
                self._go_on(self._spec.handed)
            self._loop()
        finally:
            self._renewer.end()
            self._crew.kill_all()
            self._close()
        return self._exit_code

    def _start(self) -> None:
        now = time.monotonic()
        self._beat.birth(0, new_epoch(), now, -1)
        self._beat.birth(os.getpid(), 0, 0.0)
        self._store_listeners(self._spec.first.listeners, None)
        for name in set(self._spec.stored) - set(self._spec.first.listeners.named()):
            if name.startswith(STORED_PREFIX):
                self._spec.notifier.fd_remove(name)  # of an address that is not in the file any more
        self._roster.start(now)
        self._renewer.publish()

    def _go_on(self, handed: succession.Handed) -> None:
        """In the image that an upgrade put in place: everybody works, and belongs to the generation before ours."""
        self._phase = NodePhase.SERVING
        self._crew.keeps_listeners = self._has_store = handed.keeps_listeners
        succession.adopt(handed, self._spec, self._crew, self._roster, self._renewer)
        self._log.info("adopted", pid=os.getpid(), version=self._spec.version, before=handed.version,
                       children=len(self._crew.slots))  # fmt: skip
        for number in handed.signals:
            self._on_signal(signal.Signals(number))

    # --- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while self._phase is not NodePhase.ENDED:
            self._log.flush()
            soonest = [self._checked_at + CHECK_S]
            if self._phase is NodePhase.SERVING and (deadline := self._renewer.deadline()) is not None:
                soonest.append(deadline)
            readable = self._crew.wait(min(soonest))
            if self._pipe.fd in readable:
                for number in self._pipe.take():
                    self._on_signal(number)
            if self._crew.news_fd in readable:
                os.eventfd_read(self._crew.news_fd)
                self._crew.read_states()
            self._crew.reap(readable)
            now = time.monotonic()
            if now - self._checked_at >= CHECK_S:
                self._check(now)
            self._crew.act_on_due(now)
            if self._phase is NodePhase.SERVING:
                self._renewer.turn(readable, now)
            gone = self._roster.tidy(time.monotonic())
            for one in gone:
                self._log.info("generation_gone", generation=one.number, version=one.version)
            if gone:
                self._renewer.publish()
            self._maybe_advance()

    def _on_signal(self, number: signal.Signals) -> None:
        is_stopping = self._phase not in (NodePhase.STARTING, NodePhase.SERVING)
        if number is signal.SIGQUIT or (number in (signal.SIGTERM, signal.SIGINT) and is_stopping):
            self._log.warning("exit_at_once", signal=number.name)
            self._move(NodePhase.ENDED)
        elif number in (signal.SIGTERM, signal.SIGINT):
            self._log.info("draining", signal=number.name, timeout_s=self._roster.serving.spec.drain_timeout_s)
            self._drain()
        elif number is signal.SIGUSR1:
            self._log.reopen()
            told = self._crew.send_all(number)
            self._log.info("logs_reopened", signal=number.name, processes=told + 1)
        elif is_stopping:
            self._log.info("signal_ignored", signal=number.name, detail="the node is ending")
        elif number is signal.SIGHUP:
            self._renewer.want_reload()
        else:
            self._renewer.want_upgrade()

    def _check(self, now: float) -> None:
        """Once a second: silence, the watchdog, the title."""
        self._crew.look(now, now - self._checked_at, CHECK_S)
        self._checked_at = now
        watchdog_s = self._spec.notifier.watchdog_s
        if watchdog_s is not None and now - self._pinged_at >= watchdog_s - CHECK_S:
            self._pinged_at = now
            self._spec.notifier.watchdog()
        alive = sum(slot.is_ready and slot.child is not None for slot in self._roster.workers)
        streams = self._crew.count_streams()
        self._set_title(f"master ({self._phase.value}, {alive} workers, {streams} streams)")
        if self._phase is not NodePhase.STARTING:
            self._spec.notifier.figures(f"{alive} workers, {streams} streams")

    # --- the next generation -------------------------------------------------------------------------------------

    def _ask(self, name: str, body: Callable[[], int]) -> Inquiry:
        return Inquiry(self._crew, self._pipe, name, body, self._spec.check_timeout_s)

    def _make_program_check(self) -> Callable[[], int]:
        renewal = self._spec.renewal
        assert renewal is not None
        handed = self._collect(())
        return upgrade.check_program(renewal.program, handed.document(), handed.node["memory"])

    def _replace(self) -> str:
        """Returns only when it failed, and why."""
        renewal = self._spec.renewal
        assert renewal is not None
        with held():
            signals = tuple(int(number) for number in self._pipe.take())
            handed = self._collect(signals)
            self._log.flush()
            self._spec.notifier.watchdog()  # the next image has the whole WatchdogSec= until it is loaded
            why = upgrade.replace(renewal.program, self._spec.notifier.environ_for_exec(), handed)
        for number in signals:
            self._on_signal(signal.Signals(number))
        return why

    def _collect(self, signals: tuple[int, ...]) -> succession.Handed:
        return succession.collect(self._spec, self._crew, self._roster, self._renewer, signals)

    def _store_listeners(self, new: Listeners, old: Listeners | None) -> None:
        """What the service manager keeps for us over a restart."""
        notifier = self._spec.notifier
        before = old.named() if old is not None else {}
        wanted = new.named()
        for name, fds in before.items():
            if wanted.get(name) != fds:
                notifier.fd_remove(name)
        had = before if self._crew.keeps_listeners else {}
        kept = [had.get(name) == fds or notifier.fd_store(name, fds) for name, fds in wanted.items()]
        if old is None:
            self._has_store = notifier.has_store()  # behind them, so it has seen them all by then
        self._crew.keeps_listeners = bool(kept) and all(kept) and self._has_store
        if self._crew.keeps_listeners:
            new.keep_stored()

    # --- the end -------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        serving = self._roster.serving
        self._renewer.cancel()
        self._move(NodePhase.DRAINING)
        self._crew.is_stopping = True
        self._spec.notifier.stopping("draining")
        for listeners in self._crew.listeners_in_use():
            # The workers tell newcomers to come back while they drain. One that is done accepts what waits and closes
            # its own; the kernel gives the next ones to the others, and refuses them when there is none.
            listeners.close_public()
        self._crew.stop(self._roster.workers, serving.spec.drain_timeout_s + KILL_AFTER_DRAIN_S)

    def _maybe_advance(self) -> None:
        """Moves the node on when its children did. Looked at in every turn: a node is also ready when the last worker
        that was starting has died."""
        workers = self._roster.workers
        if self._phase is NodePhase.STARTING and judge.has_started(workers):
            self._roster.promote(self._roster.serving, time.monotonic())
            self._move(NodePhase.SERVING)
            self._log.info("ready", pid=os.getpid(), workers=len(workers))
            self._spec.notifier.ready("serving")
            self._spec.on_ready()
            self._renewer.publish()
        if self._phase is NodePhase.STARTING and judge.can_nobody_boot(workers):
            self._log.error("cannot_start", detail="no worker can boot; the lines above say why")
            self._exit_code = EXIT_CANNOT_BOOT
            self._drain()
        if self._phase is NodePhase.DRAINING and self._are_gone(workers) and self._roster.next_telemetry is None:
            self._move(NodePhase.CLOSING)
            self._crew.stop(self._roster.others, OTHERS_TIMEOUT_S)
        if self._phase is NodePhase.CLOSING and self._are_gone(self._roster.others):
            self._log.info("stopped", pid=os.getpid())
            self._move(NodePhase.ENDED)

    def _are_gone(self, slots: list[Slot]) -> bool:
        return all(slot.phase is Phase.GONE for slot in slots)

    def _close(self) -> None:
        for listeners in self._crew.listeners_in_use():
            listeners.unlink()
            listeners.close()
        self._crew.lifelines.close()
        os.close(self._crew.news_fd)
        self._pipe.close()
        self._log.end()

    def _move(self, phase: NodePhase) -> None:
        if phase not in _NODE_EDGES[self._phase]:
            raise RuntimeError(f"no way from {self._phase.value} to {phase.value}")
        self._phase = phase
        self._beat.enter(_STATES[phase])

    def _set_title(self, title: str) -> None:
        if title != self._title:
            self._title = title
            setproctitle(f"proxyd: {title}")
