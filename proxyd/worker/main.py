"""A worker's and the telemetry process's life: boot after the fork, serve, drain, end.

Owns the loop, the signals and the order of these phases in a child. Must not know what the services are made of:
`services.py` builds them, and tests bring their own. Returns an exit code; the process ends there (master/children).

    boot --error--> 78
      |
    READY --TERM--> drain(drain_timeout) -------------------> close --> 0
      |--master gone--> drain(ORPHAN_S) ---------------------'
      '--order in the beat--> retire(until its deadline) --> drain

May die at any instruction: counters are in the region, rows in the spool, the listener is the master's.
"""

from __future__ import annotations

import asyncio
import math
import signal
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import uvloop

from proxyd.clock import SYSTEM, Clock
from proxyd.host.child import EXIT_CANNOT_BOOT, Birth
from proxyd.log import Log
from proxyd.shm.beats import Beat, Standing, State
from proxyd.shm.metrics import Metrics
from proxyd.shm.region import Region
from proxyd.worker.beat import Pulse
from proxyd.worker.drain import Drainable, Tale, drain, retire, window_of_retire, window_of_term

ORPHAN_S = 10.0  # without a master nobody replaces or counts us; the service manager will end us anyway
BOOT_S = 25.0  # less than the master's patience: the reason is in the log, not a SIGABRT


@dataclass(frozen=True, slots=True)
class Context:
    """What a child's services are built from, besides the configuration that their factory holds."""

    birth: Birth
    loop: asyncio.AbstractEventLoop
    region: Region
    metrics: Metrics
    log: Log
    clock: Clock
    standing: Standing


class Services(Drainable, Protocol):
    """What a worker serves. `busy` and the ending are in drain.Drainable."""

    @property
    def streams(self) -> int:
        """Admitted requests that asked for a stream and are not over: for the title and status, as the metric
        proxyd_streams_active counts them."""
        ...

    async def start(self) -> None:
        """Begins to accept. An exception here, or in the factory, means: this worker cannot boot."""
        ...

    def pulse(self) -> None:
        """Each 0.1 s."""
        ...

    def tick(self) -> None:
        """Once a second."""
        ...


class _Stop:
    """The wish that the process ends, and until when (monotonic) it may take; the nearest deadline wins. `event` is
    also set by the order to retire, without a deadline of its own here."""

    __slots__ = ("_clock", "deadline", "event", "on_ask")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.on_ask: Callable[[], None] = lambda: None
        self.event = asyncio.Event()
        self.deadline = math.inf

    def ask(self, timeout_s: float) -> None:
        self.deadline = min(self.deadline, self._clock.monotonic() + timeout_s)
        self.event.set()
        self.on_ask()

    @property
    def is_asked(self) -> bool:
        return self.deadline < math.inf


def run_worker(
    birth: Birth,
    region: Region,
    log: Log,
    drain_timeout_s: float,
    build: Callable[[Context], Awaitable[Services]],
    clock: Clock = SYSTEM,
) -> int:
    """The body of a worker process. `build` makes the services in the running loop."""
    name = f"worker {birth.slot}"
    log = log.child(name)

    async def life(context: Context, pulse: Pulse, stop: _Stop) -> int:
        try:
            async with asyncio.timeout(BOOT_S):
                services = await build(context)
                await services.start()
        except Exception as error:  # noqa: BLE001  the process ends here
            log.error("cannot_boot", detail=f"{type(error).__name__}: {error}")
            log.debug("cannot_boot_traceback", detail=_traceback(error))
            return EXIT_CANNOT_BOOT
        beat = Beat(region, birth.seat)

        def on_pulse() -> None:
            beat.set_streams(services.streams)
            services.pulse()
            if beat.retire_by_s is not None:
                stop.event.set()

        def figures() -> str:
            return f"{services.streams} streams" + (", draining" if stop.event.is_set() else "")

        pulse.serve(on_pulse, services.tick, figures)
        _enter(context, State.READY)
        await stop.event.wait()
        await _end(context, services, beat, stop)
        await services.close()
        return 0

    return _run(birth, region, log, clock, name, life, drain_timeout_s)


async def _end(context: Context, services: Services, beat: Beat, stop: _Stop) -> None:
    """Retires, if that is what was ordered, and drains; tells of it in one line."""
    clock = context.clock
    tale = Tale(services, clock.monotonic())
    why = "retired"
    end = window_of_retire(clock.monotonic())
    if not stop.is_asked:
        # The node is as ready as before: `standing`, which answers for it, stays.
        beat.enter(State.DRAINING)
        context.birth.tell()
        context.log.info("retiring", streams=services.streams)
        await retire(services, clock, lambda: beat.retire_by_s or 0.0, lambda: stop.is_asked)
        end = window_of_retire(clock.monotonic())
    if stop.is_asked:
        why = "stopped" if context.standing.has_master else "orphaned"
        _enter(context, State.DRAINING)
        began = clock.monotonic()
        await drain(services, clock, lambda: window_of_term(began, stop.deadline, beat.retire_by_s))
    else:
        await drain(services, clock, lambda: end)
    report = tale.report(why, clock.monotonic())
    if report["ended"] or report["dropped"]:
        context.log.warning("drain_report", **report)
    else:
        context.log.info("drain_report", **report)


def run_telemetry(
    birth: Birth,
    region: Region,
    log: Log,
    serve: Callable[[Context, asyncio.Event], Awaitable[None]],
    clock: Clock = SYSTEM,
) -> int:
    """The body of the telemetry process: `serve` returns after the event is set and all is stored or spooled."""
    log = log.child("telemetry")

    async def life(context: Context, pulse: Pulse, stop: _Stop) -> int:
        beat = Beat(region, birth.seat)

        def leave() -> None:
            # Nobody shall wait for an answer of one that ends: on a reload its successor comes only after it.
            if beat.state is State.READY:
                beat.enter(State.DRAINING)

        stop.on_ask = leave
        _enter(context, State.READY)
        await serve(context, stop.event)
        return 0

    return _run(birth, region, log, clock, "telemetry", life, 0.0)


def _run(
    birth: Birth,
    region: Region,
    log: Log,
    clock: Clock,
    name: str,
    life: Callable[[Context, Pulse, _Stop], Awaitable[int]],
    term_timeout_s: float,
) -> int:
    """Common to both: the loop, the signals, the lifeline and the pulse."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        context = Context(birth, loop, region, Metrics(region, birth.seat), log, clock, Standing())
        pulse = Pulse(loop, clock, Beat(region, birth.seat), context.metrics, log, name)
        pulse.start()
        stop = _Stop(clock)
        loop.add_signal_handler(signal.SIGTERM, stop.ask, term_timeout_s)
        loop.add_signal_handler(signal.SIGUSR1, log.reopen)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # blocked since the fork: master/children.py

        def on_lifeline() -> None:
            # Nobody writes to this pipe, so readable means its end: the other side is gone.
            loop.remove_reader(birth.lifeline_fd)
            log.warning("orphaned", detail="the master is gone")
            context.standing.has_master = False
            stop.ask(min(term_timeout_s, ORPHAN_S))

        loop.add_reader(birth.lifeline_fd, on_lifeline)
        try:
            return await life(context, pulse, stop)
        finally:
            pulse.stop()
            log.end()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def _enter(context: Context, state: State) -> None:
    context.standing.state = state
    Beat(context.region, context.birth.seat).enter(state)
    context.birth.tell()


def _traceback(error: Exception) -> str:
    return "".join(traceback.format_exception(error))[-4000:]
