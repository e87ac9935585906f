"""What the commands say: answers on stdout, one line a fault on stderr, each behind the command's name.

Owns: the end of an output that nobody takes; which characters reach a terminal. Must not know: commands.
Invariant: no text makes `put` raise, whatever it holds and whatever stdout's encoding is.
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
        print(_encodable(text, getattr(sys.stdout, "encoding", None) or "utf-8"), flush=True)
    except BrokenPipeError:
        _give_up_stdout()
        return 1
    except OSError as error:
        _give_up_stdout()
        return fail(who, 1, f"cannot write to stdout: {error.strerror}")
    return 0


def printable(text: str) -> str:
    """A value out of a store, a file or an argument, as a terminal may have it: what is no character to be seen
    (control and escape characters, line ends, bytes that were no UTF-8) as \\xNN, \\uNNNN or \\UNNNNNNNN."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that was no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if char.isprintable():
        return char
    return f"\\x{code:02x}" if code <= 0xFF else char.encode("ascii", "backslashreplace").decode()


def _encodable(text: str, encoding: str) -> str:
    """What the encoding lacks as \\uNNNN, which JSON reads, too."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(char if _is_in(char, encoding) else _escaped(char) for char in text)
    return text


def _is_in(char: str, encoding: str) -> bool:
    try:
        char.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


def fail(who: str, code: int, message: str) -> int:
    """Says what went wrong, with `who` before every line of it; returns the exit code."""
    if sys.stderr is None:  # closed by the caller; print() would take stdout instead
        return code
    with contextlib.suppress(OSError):
        for line in message.splitlines():
            print(f"{who}: {printable(line)}", file=sys.stderr)
    return code


def fail_all(who: str, code: int, findings: Iterable[Finding]) -> int:
    """The same for the errors among some findings."""
    return fail(who, code, "\n".join(finding.text() for finding in findings if finding.severity == "error"))


def _give_up_stdout() -> None:
    """Else the interpreter writes the rest when it ends, and complains about it in its own words."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
