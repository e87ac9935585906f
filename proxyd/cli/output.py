"""What the commands say: answers on stdout, one line a fault on stderr, each behind the command's name.

Owns: the end of an output that nobody takes. Must not know: commands.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable

from proxyd.errors import Finding


def put(who: str, text: str) -> int:
    """Prints an answer as a whole; 0, or 1 when stdout does not take it. A reader that has left (`| head`) is told
    nothing: it has what it wanted."""
    try:
        if sys.stdout is None:
            return fail(who, 1, "stdout is closed, nothing was printed")
        print(text, flush=True)
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except OSError as error:
        _give_up_stdout()
        return fail(who, 1, f"cannot write to stdout: {error.strerror}")
    return 0


def fail(who: str, code: int, message: str) -> int:
    """Says what went wrong, with `who` before every line of it; returns the exit code."""
    if sys.stderr is None:  # closed by the caller; print() would take stdout instead
        return code
    with contextlib.suppress(OSError):
        for line in message.splitlines():
            print(f"{who}: {line}", file=sys.stderr)
    return code


def fail_all(who: str, code: int, findings: Iterable[Finding]) -> int:
    """The same for the errors among some findings."""
    return fail(who, code, "\n".join(finding.text() for finding in findings if finding.severity == "error"))


def _give_up_stdout() -> None:
    """Else the interpreter writes the rest when it ends, and complains about it in its own words."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
