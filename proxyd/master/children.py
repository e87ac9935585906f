"""Forking, and what is known of a child afterwards: a pidfd.

Owns fork, kill and reap of one child. Must not know slots, beats or why. A pidfd names one process for good, so no
signal ever goes to a stranger that got the number; it becomes readable when the child ends, so no SIGCHLD is needed.

    master --lifeline of workers--> every worker     end of file: the master is gone
    master + workers --lifeline of the others--> telemetry, extra children     end of file: all of those are gone
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from setproctitle import setproctitle

from proxyd.host.child import Birth, ChildSpec
from proxyd.master.signals import SignalPipe, held

EXIT_CRASHED = 70  # EX_SOFTWARE: an exception left `run`


class Lifelines:
    """The two pipes of the picture. The master keeps all four ends."""

    __slots__ = ("_master_read", "_master_write", "_workers_read", "_workers_write")

    def __init__(self, fds: Sequence[int] = ()) -> None:
        """`fds`: those of an earlier image of this program, as `fds()` told them."""
        if not fds:
            fds = (*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC), *os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        self._master_read, self._master_write, self._workers_read, self._workers_write = fds

    def fds(self) -> tuple[int, int, int, int]:
        return self._master_read, self._master_write, self._workers_read, self._workers_write

    def keep(self, is_worker: bool) -> int:
        """In a child: closes the ends that would keep a dead process's line alive; returns the one to watch."""
        os.close(self._master_write)
        if is_worker:
            os.close(self._workers_read)  # but holds the write end until it dies
            return self._master_read
        os.close(self._master_read)
        os.close(self._workers_write)
        return self._workers_read

    def close(self) -> None:
        for fd in self.fds():
            os.close(fd)


class Child:
    """A process that was forked and not yet reaped."""

    __slots__ = ("pid", "pidfd")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def send(self, number: signal.Signals) -> None:
        """A child that has just died takes no signal and raises none."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except ProcessLookupError:
            pass

    def reap(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it lives. Afterwards the child is no more."""
        result = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return None
        os.close(self.pidfd)
        return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def spawn(spec: ChildSpec, make_birth: Callable[[], Birth], pipe: SignalPipe) -> Child:
    """Forks; in the child runs `spec` and never returns. `make_birth` runs there first, to close what is the
    master's. Errors: OSError when the kernel refuses (no memory, no pids): nothing was made."""
    with held():
        pid = os.fork()
        if pid == 0:
            _live(spec, make_birth, pipe)
        return Child(pid)


def _live(spec: ChildSpec, make_birth: Callable[[], Birth], pipe: SignalPipe) -> NoReturn:
    code = EXIT_CRASHED
    try:
        pipe.leave_to_child()
        setproctitle(f"proxyd: {spec.name}")
        birth = make_birth()
        gc.enable()
        faulthandler.enable()  # SIGABRT of a stuck child leaves a traceback on stderr
        # Before its loop has a handler, TERM would kill telemetry with rows to store: it waits for worker/main.py.
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM} if birth.seat >= 0 else set())
        code = spec.run(birth)
    except BaseException:  # noqa: BLE001  the process ends here, and says why
        traceback.print_exc()
    finally:
        # Not sys.exit: the master's exit handlers and buffers must not run twice.
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
