"""The terminal: styled lines on it, a screen of its own for `top`, and its keys.

Owns: how a style looks, the terminal's modes and that they are put back. Must not know: what is shown. Colours are the
terminal's own sixteen, so that they fit its background; NO_COLOR is obeyed (rich does).

Invariant: `Screen` leaves the terminal as it found it, however the block ends: an error, Ctrl-C, TERM, HUP, Ctrl-Z.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from proxyd.cli.grid import Line
from proxyd.cli.output import fail

__all__ = ["LOOKS", "Quit", "Screen", "show", "text_of"]

LOOKS = {"": "", "head": "bold", "dim": "dim", "good": "green", "warn": "yellow", "bad": "bold red"}
_KEYS_THAT_QUIT = frozenset(b"qQ\x03\x04\x1b")  # q, Ctrl-C, Ctrl-D; ESC alone


class Quit(Exception):
    """Somebody wants the end: a key, or a signal, whose number is `signum`."""

    def __init__(self, signum: int = 0) -> None:
        super().__init__(signum)
        self.signum = signum


def text_of(lines: Sequence[Line]) -> Text:
    """For rich. Never wrapped or justified: grid.py has seen to the width."""
    text = Text(no_wrap=True, overflow="crop", end="")
    for number, line in enumerate(lines):
        if number:
            text.append("\n")
        for piece, style in line:
            text.append(piece, LOOKS[style])
    return text


def show(who: str, lines_for: Callable[[int], Sequence[Line]]) -> int:
    """Prints lines made for the terminal's width; the exit code."""
    console = Console(highlight=False, markup=False, emoji=False)
    try:
        console.print(text_of(lines_for(console.width)), soft_wrap=True)
    except OSError as error:
        return fail(who, 1, f"cannot write to stdout: {error.strerror}")
    return 0


class Screen:
    """The whole terminal, from entering to leaving the block. Raises Quit in `wait`."""

    def __init__(self, stdin: TextIO | None = None, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, markup=False, emoji=False)
        stdin = sys.stdin if stdin is None else stdin
        self._keys = stdin.fileno() if stdin is not None and stdin.isatty() else None
        self._modes: list[Any] | None = None
        self._live: Live | None = None
        self._handlers: dict[int, Any] = {}
        self._wakes: tuple[int, int] | None = None
        self._old_wakeup = -1

    @property
    def width(self) -> int:
        return self._console.width

    @property
    def height(self) -> int:
        return self._console.height

    def __enter__(self) -> Screen:
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakes = (reading, writing)
        self._old_wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTSTP, signal.SIGWINCH):
            self._handlers[signum] = signal.signal(signum, _only_wake)
        try:
            self._take()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._give_back()
        finally:
            signal.set_wakeup_fd(self._old_wakeup)
            for signum, handler in self._handlers.items():
                signal.signal(signum, handler)
            for fd in self._wakes or ():
                os.close(fd)
            self._wakes = None

    def draw(self, lines: Sequence[Line]) -> None:
        assert self._live is not None
        self._live.update(text_of(lines), refresh=True)

    def wait(self, seconds: float) -> None:
        """Until the next look is due, or at once when the terminal has another size. Raises Quit."""
        assert self._wakes is not None
        until = time.monotonic() + seconds
        sources = [self._wakes[0], *([] if self._keys is None else [self._keys])]
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select(sources, [], [], left)
            if self._wakes[0] in ready and self._obey(os.read(self._wakes[0], 64)):
                return
            if self._keys is not None and self._keys in ready:
                pressed = os.read(self._keys, 64)
                # Arrow keys begin with ESC, too, but do not end there.
                if not pressed or (pressed[0] in _KEYS_THAT_QUIT and (pressed[0] != 0x1B or len(pressed) == 1)):
                    raise Quit

    def _obey(self, signals: bytes) -> bool:
        """What signals mean; True when the screen is to be drawn anew."""
        for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            if signum in signals:
                raise Quit(0 if signum == signal.SIGINT else signum)
        if signal.SIGTSTP in signals:
            self._give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._take()
            return True
        return signal.SIGWINCH in signals

    def _take(self) -> None:
        if self._keys is not None:
            self._modes = termios.tcgetattr(self._keys)
            tty.setcbreak(self._keys)
        # No thread of rich's: it draws when told. A frame that is too tall is cut, not scrolled.
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            vertical_overflow="crop",
        )
        self._live.start()

    def _give_back(self) -> None:
        live, self._live = self._live, None
        modes, self._modes = self._modes, None
        try:
            if live is not None:
                live.stop()
        finally:
            if self._keys is not None and modes is not None:
                termios.tcsetattr(self._keys, termios.TCSADRAIN, modes)


def _only_wake(signum: int, frame: FrameType | None) -> None:
    """The byte in the wake-up pipe says it all."""
