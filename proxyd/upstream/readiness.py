"""Waiting for one descriptor, once at a time, with a deadline.

Owns: the loop's reader and writer for a descriptor, for as long as one `wait` lasts. Must not know: what the bytes
mean. Invariant: outside `wait` nothing is registered on the descriptor, whatever way it ended (ready, timeout,
cancelled, `interrupt`). The relay, which takes over readiness after the head, relies on it. At most one `wait` at a
time.

Why not `loop.sock_recv` and friends: TLS needs to wait for the other direction than the call suggests, a send has to
see an early answer, and both must hold for `ssl.SSLSocket`, which the loop's own socket calls refuse.
"""

from __future__ import annotations

import asyncio
import select
from enum import IntFlag


class Ready(IntFlag):
    """Which directions are ready; 0 is a timeout."""

    NEITHER = 0
    READ = 1
    WRITE = 2


class Readiness:
    """The waiting side of one descriptor."""

    __slots__ = ("_fd", "_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self._future: asyncio.Future[Ready] | None = None

    async def wait(self, wanted: Ready, timeout_s: float) -> Ready:
        """The first direction of `wanted` that is ready, or NEITHER after `timeout_s`."""
        assert self._future is None, "one wait at a time on a descriptor"
        if timeout_s <= 0:
            return _look(self._fd, wanted)
        future = self._future = self._loop.create_future()
        timer = self._loop.call_later(timeout_s, self._on_late, wanted)
        try:
            if wanted & Ready.READ:
                self._loop.add_reader(self._fd, self._settle, Ready.READ)
            if wanted & Ready.WRITE:
                self._loop.add_writer(self._fd, self._settle, Ready.WRITE)
            return await future
        finally:
            timer.cancel()
            if self._future is future:
                self._detach()

    def interrupt(self, error: Exception) -> None:
        """Ends a wait at once with `error`. Called before the descriptor is closed under it: a closed descriptor that
        the loop still watches may be another connection's by the next turn."""
        future = self._future
        if future is None:
            return
        self._detach()
        if not future.done():
            future.set_exception(error)

    def _on_late(self, wanted: Ready) -> None:
        # A loop that was held runs its timers before it looks at descriptors: what came in time must not count as late.
        self._settle(_look(self._fd, wanted))

    def _settle(self, ready: Ready) -> None:
        future = self._future
        if future is not None and not future.done():
            future.set_result(ready)

    def _detach(self) -> None:
        self._future = None
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)


def _look(fd: int, wanted: Ready) -> Ready:
    """What is ready at this instant. An error counts as ready: the call that follows says which."""
    poll = select.poll()
    poll.register(fd, (select.POLLIN if wanted & Ready.READ else 0) | (select.POLLOUT if wanted & Ready.WRITE else 0))
    for _, events in poll.poll(0):
        if wanted & Ready.READ and events & (select.POLLIN | select.POLLHUP | select.POLLERR):
            return Ready.READ
        if wanted & Ready.WRITE:
            return Ready.WRITE
    return Ready.NEITHER
