"""Signals as bytes in a pipe.

Owns the dispositions of the master and what a forked child starts with. Must not know what a signal leads to.
Python's wakeup descriptor writes the signal's number from the C handler; the Python handler does nothing. Nothing
else ever runs at a random instruction. Bound: a full pipe drops a byte, and 64 KiB of unread signals say it all.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HANDLED = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2},
)
# Ctrl-C and Ctrl-\ reach the whole foreground group and a closed terminal all of it; what they mean is the master's
# to decide. USR1 is ignored until a child that has a log file asks for it: its default would be death.
IGNORED_BY_CHILDREN = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def _noted(signum: int, frame: FrameType | None) -> None:
    """The byte is in the pipe already."""


class SignalPipe:
    """`fd` is readable when signals came; `take` says which."""

    __slots__ = ("_write_fd", "fd")

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in HANDLED:
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        # Blocked over an execve (upgrade.py): what came meanwhile is delivered here.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)

    def take(self) -> list[signal.Signals]:
        try:
            data = os.read(self.fd, 4096)
        except BlockingIOError:
            return []
        return [signal.Signals(number) for number in data if number in HANDLED]

    def close(self) -> None:
        """Back to the defaults; of this process only."""
        signal.set_wakeup_fd(-1)
        for number in HANDLED:
            signal.signal(number, signal.SIG_DFL)
        os.close(self.fd)
        os.close(self._write_fd)

    def leave_to_child(self) -> None:
        """In a forked child: its own signals no longer write into the master's pipe."""
        self.close()
        for number in IGNORED_BY_CHILDREN:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def held() -> Iterator[None]:
    """Holds signals back around a fork: else one that hits the newborn child is told to the master as its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
