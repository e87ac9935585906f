"""The pulse of a process: a timer on the very loop that serves.

Owns the liveness beat, the loop's lag, the tick once a second and the process title. Must not know what is served.
If traffic holds the loop, the pulse is late by as much: that is `proxyd_loop_lag_seconds`; if it is held for
seconds, the master sees no beat. Log lines wait for one pulse at most, so they are written in groups.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from setproctitle import setproctitle

from proxyd.clock import Clock
from proxyd.log import Log
from proxyd.shm.beats import Beat
from proxyd.shm.metrics import Metrics

PULSE_S = 0.1  # half costs wake-ups of an idle node, twice lets log lines and revocations wait noticeably
PULSES_A_TICK = 10


class Pulse:
    """Started in a running loop. `on_pulse` runs each 0.1 s, `on_tick` once a second; `figures` is the title's tail.

    An exception in either is the process's own bug: it is logged, and the next pulse comes all the same."""

    __slots__ = (
        "_beat", "_clock", "_due", "_figures", "_handle", "_lag", "_log", "_loop", "_metrics", "_name", "_on_pulse",
        "_on_tick", "_pulses", "_title",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
        beat: Beat,
        metrics: Metrics,
        log: Log,
        name: str,
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._beat = beat
        self._metrics = metrics
        self._lag = metrics.histogram("proxyd_loop_lag_seconds")
        self._log = log
        self._name = name
        self._on_pulse: Callable[[], None] = lambda: None
        self._on_tick: Callable[[], None] = lambda: None
        self._figures: Callable[[], str] = lambda: ""
        self._title = ""
        self._pulses = 0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        now = self._clock.monotonic()
        self._metrics.tick(now)
        self._beat.beat(now)
        self._due = now + PULSE_S
        self._handle = self._loop.call_later(PULSE_S, self._run)

    def serve(self, on_pulse: Callable[[], None], on_tick: Callable[[], None], figures: Callable[[], str]) -> None:
        """What to call from now on: the services exist only after the first beats."""
        self._on_pulse, self._on_tick, self._figures = on_pulse, on_tick, figures

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self) -> None:
        now = self._clock.monotonic()
        self._lag.record(now - self._due)
        self._beat.beat(now)
        self._pulses += 1
        try:
            self._on_pulse()
            if self._pulses % PULSES_A_TICK == 0:
                self._metrics.tick(now)
                self._on_tick()
                self._set_title()
        except Exception as error:  # noqa: BLE001  one service's bug must not stop the heart of the others
            self._log.error("tick_failed", detail=repr(error))
        self._log.flush()
        self._due = self._clock.monotonic() + PULSE_S
        self._handle = self._loop.call_later(PULSE_S, self._run)

    def _set_title(self) -> None:
        figures = self._figures()
        title = f"proxyd: {self._name} ({figures})" if figures else f"proxyd: {self._name}"
        if title != self._title:
            self._title = title
            setproctitle(title)
