"""A child that looks at something for the master and says what it found: the check before a reload or an upgrade.

Owns its process, two pipes and its time. Must not know what it looks at. The master never waits for it: the loop polls
its pidfd and what it writes. It may crash, hang or write without end: after its time it is killed, and of what it
says the first FINDINGS_BYTES of stdout (lines for people) and the last ERRORS_BYTES of stderr (why it broke) are kept.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from proxyd.host.child import Birth, ChildSpec
from proxyd.master.children import Child, spawn
from proxyd.master.crew import Crew, tell
from proxyd.master.signals import SignalPipe

FINDINGS_BYTES = 16 * 1024
ERRORS_BYTES = 4 * 1024
LINES_MAX = 50
ORPHAN_S = 5


@dataclass(frozen=True, slots=True)
class Answer:
    """`code`: the exit code, or minus the signal; None when it was killed for its time. `errors`: of its stderr."""

    code: int | None
    findings: list[str]
    errors: list[str]

    @property
    def end(self) -> str:
        return "it did not end in time and was killed" if self.code is None else tell(self.code)


class Inquiry:
    """One child. `body` runs in it with both pipes as its stdout and stderr; its result is the exit code."""

    def __init__(self, crew: Crew, pipe: SignalPipe, name: str, body: Callable[[], int], timeout_s: float) -> None:
        """Raises OSError when the kernel gives no process or pipe; nothing is left then."""
        self._crew = crew
        self._found = self._broke = b""
        self._fds: list[int] = []
        self.deadline = time.monotonic() + timeout_s
        self._is_late = False
        out, broken = os.pipe2(os.O_CLOEXEC), (-1, -1)
        try:
            broken = os.pipe2(os.O_CLOEXEC)

            def run(birth: Birth) -> int:
                # Nobody would end it if the master died meanwhile. The alarm's default, and itself, survive an execve.
                signal.alarm(int(timeout_s) + ORPHAN_S)
                for number, (_, end) in ((1, out), (2, broken)):
                    os.dup2(end, number)
                return body()

            def make_birth() -> Birth:
                return Birth(-1, -1, 0, 0, crew.leave_to_child(None, is_worker=False), crew.news_fd)

            self._child: Child | None = spawn(ChildSpec(name, run), make_birth, pipe)
        except OSError:
            for fd in (*out, *broken):
                if fd >= 0:
                    os.close(fd)
            raise
        for read_end, write_end in (out, broken):
            os.close(write_end)
            os.set_blocking(read_end, False)
            self._fds.append(read_end)
            crew.watch(read_end)
        self._stdout = out[0]
        crew.watch(self._child.pidfd)

    def look(self, readable: set[int], now: float) -> Answer | None:
        """Reads what came; the answer once the child has ended."""
        assert self._child is not None
        for fd in [fd for fd in self._fds if fd in readable]:
            self._read(fd)
        if now >= self.deadline and not self._is_late:
            self._is_late = True
            self._child.send(signal.SIGKILL)
        pidfd = self._child.pidfd
        if pidfd not in readable:
            return None
        code = self._child.reap()
        if code is None:
            return None
        self._crew.unwatch(pidfd)
        self._child = None
        for fd in list(self._fds):
            self._read(fd)
        self._close()
        return Answer(None if self._is_late else code, _lines(self._found), _lines(self._broke)[-LINES_MAX:])

    def end(self) -> None:
        """Nobody wants to know any more. SIGKILL ends it within the call's wait."""
        if self._child is not None:
            self._crew.unwatch(self._child.pidfd)
            self._child.send(signal.SIGKILL)
            os.waitid(os.P_PIDFD, self._child.pidfd, os.WEXITED)
            os.close(self._child.pidfd)
            self._child = None
        self._close()

    def _read(self, fd: int) -> None:
        """All that is there, at most a pipe's worth in a turn: a child that writes without end waits for the loop."""
        try:
            data = os.read(fd, 64 * 1024)
        except BlockingIOError:
            return
        if not data:
            self._drop(fd)
        elif fd == self._stdout:
            self._found = (self._found + data)[:FINDINGS_BYTES]
        else:
            self._broke = (self._broke + data)[-ERRORS_BYTES:]

    def _drop(self, fd: int) -> None:
        self._crew.unwatch(fd)
        self._fds.remove(fd)
        os.close(fd)

    def _close(self) -> None:
        for fd in list(self._fds):
            self._drop(fd)


def _lines(data: bytes) -> list[str]:
    """Lines that a terminal and a JSON document can take."""
    text = data.decode("utf-8", "replace")
    lines = ["".join(char if char.isprintable() else " " for char in line).rstrip() for line in text.splitlines()]
    return [line for line in lines if line][: LINES_MAX * 4]
