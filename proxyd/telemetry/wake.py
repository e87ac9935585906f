"""Sleep that ends early: at a stop, at a worker's question, when something is written to the spool.

Owns: the one sleep of the telemetry process and the kernel's watch (inotify) over the spool directory. Must not know:
what there is to do when awake.

While rows flow nobody needs to be told, the writer looks when a group is due. Only an idle writer lays a watch, good
for one event (IN_ONESHOT), so a worker's write costs nothing extra but for the first after an idle time. The order that
loses nothing: lay the watch, look at the spool once more, sleep.

Bounds: a sleep has a length. Without inotify (the user's 128 instances are taken) `watch` says False, and the caller
looks more often.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from pathlib import Path

__all__ = ["Sleeper"]

# <sys/inotify.h>
_IN_MODIFY, _IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x8, 0x80, 0x100
_IN_ONLYDIR, _IN_ONESHOT, _IN_IGNORED = 0x01000000, 0x80000000, 0x8000
_MASK = _IN_MODIFY | _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_ONLYDIR | _IN_ONESHOT
_EVENT = struct.Struct("=iIII")  # wd, mask, cookie, length of the name behind it
_EVENT_BYTES = _EVENT.size + 256  # at least one event with the longest name


class Sleeper:
    """One a process, used in the running loop. `close` it."""

    __slots__ = ("_directory", "_fd", "_is_awake", "_loop", "_sleep", "_stop", "_stop_task", "is_watching")

    def __init__(self, directory: Path, stop: asyncio.Event) -> None:
        self._directory, self._stop = directory, stop
        self._loop = asyncio.get_running_loop()
        self._sleep: asyncio.Future[None] | None = None
        self._is_awake = False
        self._stop_task = self._loop.create_task(self._wake_at_stop())
        # True from `watch` to the first event.
        self.is_watching = False
        self._fd = _inotify()
        if self._fd >= 0:
            self._loop.add_reader(self._fd, self._on_event)

    async def sleep(self, seconds: float) -> None:
        """Returns after `seconds`, or when woken since the last sleep ended."""
        if self._is_awake or seconds <= 0:
            self._is_awake = False
            await asyncio.sleep(0)
            return
        self._sleep = self._loop.create_future()
        timer = self._loop.call_later(seconds, self.wake)
        try:
            await self._sleep
        finally:
            timer.cancel()
            self._sleep, self._is_awake = None, False

    def wake(self) -> None:
        """Ends the sleep, or lets the next one not begin."""
        self._is_awake = True
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    def watch(self) -> bool:
        """From now on the next write to the spool wakes; False when the kernel does not tell. What was written before
        is to be looked for after this."""
        if not self.is_watching and self._fd >= 0:
            self.is_watching = _LIBC.inotify_add_watch(self._fd, os.fsencode(self._directory), _MASK) >= 0
        return self.is_watching

    def close(self) -> None:
        self._stop_task.cancel()
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
        self._fd, self.is_watching = -1, False

    async def _wake_at_stop(self) -> None:
        await self._stop.wait()
        self.wake()

    def _on_event(self) -> None:
        try:
            data = os.read(self._fd, 16 * _EVENT_BYTES)
        except BlockingIOError:
            return
        start = 0
        while start + _EVENT.size <= len(data):
            _, mask, _, length = _EVENT.unpack_from(data, start)
            start += _EVENT.size + length
            if not mask & _IN_IGNORED:
                # What ends the watch comes once more as IN_IGNORED, maybe after a new watch was laid.
                self.is_watching = False
        self.wake()


_LIBC = ctypes.CDLL(None, use_errno=True)


def _inotify() -> int:
    """A descriptor, or -1."""
    try:
        return int(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    except AttributeError:  # a C library without it
        return -1
