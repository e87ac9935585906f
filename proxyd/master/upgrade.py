"""Puts another image of the program in the master's place: execve, with pid, children, listeners and memory kept.

Owns the check of the new program, in a child, and the replacement itself. Must not know what the state means.

    signals are blocked --> those in the pipe are taken along --> descriptors made inheritable --> execve
       ^                                                                                             |
       '---- the mask survives it: a signal waits in the kernel until the new image has its pipe ----'

If execve itself fails everything is as before. Children that die meanwhile are zombies of ours: their pids name them
until they are reaped, in whichever image.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterable
from typing import Any

from proxyd.master import handover
from proxyd.master.signals import HANDLED, IGNORED_BY_CHILDREN
from proxyd.master.spec import Program

CHECK_OPTION = "--check-upgrade"
NICE = 5  # a second of a core for the imports, which workers that serve should not miss; the new image is not nice
EXIT_NO_PROGRAM = 127  # as a shell says it


def check_program(program: Program, document: dict[str, Any], memory: Iterable[int]) -> Callable[[], int]:
    """What a child does: becomes the new program, which looks at the file and at the state that it would take over."""

    def body() -> int:
        for number in (*HANDLED, *IGNORED_BY_CHILDREN):
            signal.signal(number, signal.SIG_DFL)  # what is ignored would stay so
        state_fd = handover.write(document)
        for fd in (state_fd, *memory):
            os.set_inheritable(fd, True)
        with contextlib.suppress(OSError):
            os.nice(NICE)
        try:
            environ = program.environ | {handover.ENV: str(state_fd)}
            os.execve(program.path, [*program.argv, CHECK_OPTION], environ)  # noqa: S606  that is the point
        except OSError as error:
            os.write(2, f"{program.path}: {error.strerror}".encode("utf-8", "replace"))
        return EXIT_NO_PROGRAM

    return body


def replace(program: Program, environ: dict[str, str], handed: handover.Handed) -> str:
    """Does not return when it worked; else says why not, and nothing is changed. Signals are blocked by the caller."""
    state_fd = -1
    try:
        state_fd = handover.write(handed.document())
        for fd in (state_fd, *handed.fds):
            os.set_inheritable(fd, True)
        wanted = program.environ | environ | {handover.ENV: str(state_fd)}
        os.execve(program.path, program.argv, wanted)  # noqa: S606  that is the point
    except OSError as error:
        why = f"{program.path} cannot be executed: {error.strerror}"
    for fd in handed.fds:
        os.set_inheritable(fd, False)
    if state_fd >= 0:
        os.close(state_fd)
    return why
