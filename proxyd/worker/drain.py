"""Ends a worker without cutting anybody who can be finished.

Owns the order: refuse newcomers, let what runs finish, end the rest one by one, leave the listeners; and the report of
it. Must not know what a stream is: it sees counts. Bounds: the window's end, then ABORT_S for the last error events to
leave.

    TERM     |---- all may finish ----|---- ended, longest-running first ----|  drain_timeout
             begun                    half of it                             the last
    retire   |---------- all may finish, drain_timeout ----------|-- ended --|  RETIRE_SPREAD_S

Ended all in one instant, a thousand clients would come back in one.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from proxyd.clock import Clock

__all__ = [
    "ABORT_S", "RETIRE_SPREAD_S", "Drainable", "Tale", "Window", "decide_keep", "drain", "retire", "window_of_retire",
    "window_of_term",
]  # fmt: skip

ABORT_S = 2.0  # to write the ending of each stream; a client that takes nothing is cut after it
LOOK_S = 0.02  # how late the end may be noticed; a drain has seconds
RETIRE_SPREAD_S = 2.0  # past the deadline of a generation: its time was long already, and the next one serves
SHORT_S = 1.0  # a drain_timeout below it is for letting go, not for spreading


@dataclass(frozen=True, slots=True)
class Window:
    """When requests are ended (monotonic seconds): none before `begin`, the last at `end`."""

    begin: float
    end: float


def window_of_term(began: float, deadline: float, retire_by: float | None = None) -> Window:
    """The second half of a drain that began at `began`; nothing but its end where it is short. `retire_by`: of a worker
    that was retiring, for whom the master waits no longer than it would have then."""
    if retire_by is not None:
        deadline = max(began, min(deadline, retire_by + RETIRE_SPREAD_S))
    timeout_s = deadline - began
    return Window(deadline if timeout_s < SHORT_S else began + timeout_s / 2, deadline)


def window_of_retire(deadline: float) -> Window:
    """Behind the deadline: before it nobody is cut for a reload."""
    return Window(deadline, deadline + RETIRE_SPREAD_S)


def decide_keep(running: int, window: Window, now: float) -> int:
    """How many of the `running` there were at the window's begin may go on at `now`. One alone goes at the end."""
    if now < window.begin:
        return running
    if now >= window.end:
        return 0
    return math.ceil(running * (window.end - now) / (window.end - window.begin))


class Drainable(Protocol):
    """What a worker's services offer to whoever ends them."""

    @property
    def busy(self) -> int:
        """Requests, streams and their connections that are not finished."""
        ...

    @property
    def held(self) -> int:
        """All that keeps a retiring worker: what is busy, and idle connections that nobody has taken yet."""
        ...

    @property
    def running(self) -> int:
        """Admitted requests that are not over."""
        ...

    @property
    def finished(self) -> int:
        """Admitted requests that came to their own end, since the worker's start."""
        ...

    @property
    def handed_over(self) -> int:
        """Idle client connections given to the next generation."""
        ...

    @property
    def ended(self) -> int:
        """Requests that interrupt() ended."""
        ...

    @property
    def named(self) -> list[dict[str, Any]]:
        """The first of those: request id, route, tenant, upstream, seconds."""
        ...

    def retire(self) -> None:
        """Accepts no more and gives idle connections away; serves what comes on the others."""
        ...

    @property
    def awaited(self) -> int:
        """What keeps the listeners open beside what is running here: other workers' streams, where no kernel would
        pass newcomers on to them."""
        ...

    @property
    def is_orphan(self) -> bool:
        """The master is gone: its successor wants the addresses."""
        ...

    def refuse(self) -> None:
        """From now on newcomers are answered with 503, and so is a request on a connection that was open."""
        ...

    def stop_accepting(self) -> None:
        """Takes what already waits in the backlog, closes the listeners and every idle client connection."""
        ...

    def interrupt(self, keep: int) -> int:
        """Ends requests until `keep` go on, those that run longest first: streams with their error event, the others
        with 503. How many were ended."""
        ...

    async def close(self) -> None: ...


class Tale:
    """What was there when the end began, for the report."""

    __slots__ = ("_began", "_finished", "_services", "running")

    def __init__(self, services: Drainable, now: float) -> None:
        self._services, self._began, self._finished = services, now, services.finished
        self.running = services.running

    def report(self, why: str, now: float) -> dict[str, Any]:
        """The fields of `drain_report`. What is still running took no ending: it is closed without one."""
        services = self._services
        return {
            "why": why,
            "running": self.running,
            "finished": services.finished - self._finished,
            "ended": services.ended,
            "dropped": services.running,
            "handed_over": services.handed_over,
            "took_s": round(now - self._began, 1),
            "left": services.named,
        }


async def retire(
    services: Drainable, clock: Clock, deadline: Callable[[], float], is_stopped: Callable[[], bool]
) -> None:
    """Serves on until nothing is left, the deadline has passed, or the worker is asked to stop."""
    services.retire()
    while services.held and not is_stopped() and clock.monotonic() < deadline():  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)


def _is_done(services: Drainable, is_late: bool) -> bool:
    return not services.running and (is_late or not services.awaited)


async def drain(services: Drainable, clock: Clock, window: Callable[[], Window]) -> None:
    """Returns when nothing is busy, or ABORT_S after the window. It may come nearer meanwhile: the master may die
    while we drain. While requests run newcomers hear that the node leaves; the last of them are answered, too."""
    services.refuse()
    at_begin: int | None = None
    has_left = False
    # Looked at, not waited for: the counts belong to rooms that must not know that a drain exists.
    while True:
        now, current = clock.monotonic(), window()
        if not has_left and (services.is_orphan or _is_done(services, now >= current.end)):
            has_left = True
            services.stop_accepting()
        if has_left and not services.busy:
            return
        if now >= current.end + ABORT_S:
            return
        if now >= current.begin:
            if at_begin is None:
                at_begin = services.running
            services.interrupt(decide_keep(at_begin, current, now))
        await asyncio.sleep(LOOK_S)
