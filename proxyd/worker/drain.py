"""Ends a worker without cutting anybody who can be finished.

Owns the order: accept no more, let what runs finish until the deadline, end the rest properly, close. Must not know
what a stream is: it sees a count. Bound: the deadline, then ABORT_S for the error events to leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from proxyd.clock import Clock

ABORT_S = 2.0  # to write the ending of each stream; a client that takes nothing is cut after it
LOOK_S = 0.02  # how late the end may be noticed; a drain has seconds


class Drainable(Protocol):
    """What a worker's services offer to whoever ends them."""

    @property
    def busy(self) -> int:
        """Requests and streams that are not finished."""
        ...

    def stop_accepting(self) -> None:
        """Takes what already waits in the backlog, closes the listeners and every idle client connection; a request
        that still arrives gets 503 and its connection closes."""
        ...

    def abort(self) -> None:
        """Ends what remains now: streams with their error event, requests with 503."""
        ...

    async def close(self) -> None: ...


async def drain(services: Drainable, clock: Clock, deadline: Callable[[], float]) -> int:
    """Returns how many had to be ended before they were finished. `deadline` (monotonic) may come nearer meanwhile:
    the master may die while we drain."""
    services.stop_accepting()
    await _wait_idle(services, clock, deadline)
    left = services.busy
    if left:
        services.abort()
        end = clock.monotonic() + ABORT_S
        await _wait_idle(services, clock, lambda: end)
    return left


async def _wait_idle(services: Drainable, clock: Clock, deadline: Callable[[], float]) -> None:
    # Looked at, not waited for: the count belongs to rooms that must not know that a drain exists.
    while services.busy and clock.monotonic() < deadline():  # noqa: ASYNC110
        await asyncio.sleep(LOOK_S)
