"""The lock of the one process that may read a spool.

Owns: telemetry.lock in the state directory, and what is said while another process holds it. Must not know: stores.
Invariant: the number in the file is the holder's pid, but for the instant between its lock and its write.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from proxyd.clock import Clock
from proxyd.shm.beats import State
from proxyd.telemetry.spoolio import SpoolLog

__all__ = ["LOCK_NAME", "only_one"]

LOCK_NAME = "telemetry.lock"
LOOK_S = 0.05
# A predecessor that ends in an orderly way is gone by the second line; one that serves is no predecessor, and its
# operator reads of it again after a minute, two, ... an hour.
TELL_AGAIN_S = 60.0
TELL_AGAIN_MAX_S = 3600.0


@asynccontextmanager
async def only_one(
    path: Path, stop: asyncio.Event, log: SpoolLog, clock: Clock, enter: Callable[[State], None]
) -> AsyncIterator[bool]:
    """Holds the lock; yields False when told to stop before it was free. `enter`: what status shows of this process."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        began = tell_at = clock.monotonic()
        gap_s = TELL_AGAIN_S
        has_waited = False
        while not _take(fd):
            now = clock.monotonic()
            if now >= tell_at:
                log.warning(
                    "telemetry_waits_for_predecessor",
                    file=str(path),
                    holder_pid=_holder(fd),
                    waited_s=round(now - began, 1),
                    detail="another proxyd stores the rows of this state_dir; ours wait in the spool",
                    remedy="stop that daemon, or give each its own server.state_dir, unless it is on its way out",
                )
                if has_waited:
                    gap_s = min(gap_s * 2, TELL_AGAIN_MAX_S)
                tell_at = now + gap_s
                has_waited = True
                enter(State.WAITING)
            if stop.is_set():
                yield False
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_S)
        with contextlib.suppress(OSError):  # a full disk: the pid is a courtesy
            os.ftruncate(fd, 0)
            os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        if has_waited:
            log.info("telemetry_took_over", waited_s=round(clock.monotonic() - began, 1))
            enter(State.READY)
        yield True
    finally:
        os.close(fd)


def _take(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(fd: int) -> int | None:
    """The pid that the holder wrote; None when it has written none."""
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None
