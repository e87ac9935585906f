"""`proxyd top`: the running daemon's state again and again: a screen on a terminal, one page a look on a pipe.

Owns: the loop, what happened between two looks, what is shown while nobody answers. Must not know: the words
(board.py), the terminal (screen.py). A daemon that restarts is waited for; one that was never there is a failure on a
pipe, as nobody may be looking. Exit codes: 0 ended by q, Ctrl-C or --count, 1 the daemon does not answer (at the first
look on a pipe, at the last with --count) or stdout takes no more, 2 the file cannot be read.

Bounds: an answer takes at most TIMEOUT_S and 16 MiB (status.py); one look at a time, so a slow daemon is asked less.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxyd.cli.board import Now, blocks
from proxyd.cli.grid import Block, Line, clip, cut, fit, note, plain
from proxyd.cli.output import fail, put
from proxyd.cli.status import fetch, find_admin, is_terminal, why_not
from proxyd.cli.tables import span
from proxyd.config.values import Listen

__all__ = ["View", "run"]

WHO = "proxyd top"
# Shorter than the default of a status: keys are read between two looks.
TIMEOUT_S = 2.0
# However slow the answers are: keys are looked at, and the daemon has time for others.
LEAST_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class _Look:
    """One answer and when it was asked for."""

    at_s: float
    status: dict[str, Any]


class View:
    """What the last looks gave. `ask`: the document of /status, or an exception."""

    __slots__ = ("_ask", "_before", "_failed_since_s", "_last", "_place", "why")

    def __init__(self, ask: Callable[[], dict[str, Any]], place: Listen) -> None:
        self._ask, self._place = ask, place
        self._before: _Look | None = None
        self._last: _Look | None = None
        self._failed_since_s = 0.0
        self.why = ""  # nobody answers; "" while somebody does

    def look(self, now_s: float) -> bool:
        """Asks once; whether there was an answer."""
        try:
            status = self._ask()
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not self.why:
                self._failed_since_s = now_s
            self.why = why_not(self._place, error)
            return False
        self.why = ""
        self._before, self._last = self._last, _Look(now_s, status)
        return True

    def now(self) -> Now | None:
        """What happened between the last two looks at one daemon."""
        last, before = self._last, self._before
        if last is None or before is None or last.at_s <= before.at_s:
            return None
        if any(last.status.get(key) != before.status.get(key) for key in ("pid", "version")):
            return None
        seconds = last.at_s - before.at_s
        counts = [
            (look.status["requests"]["answered"], look.status["streams"]["events"], look.status["streams"]["bytes"])
            for look in (before, last)
        ]
        gained = [(new - old) / seconds for old, new in zip(*counts, strict=True)]
        return None if min(gained) < 0 else Now(*gained)

    def blocks(self, width: int | None, now_s: float) -> list[Block]:
        """The last answer, under why there is no newer one."""
        found: list[Block] = []
        if self.why:
            text = f"waiting for {self._place.text} ({span(now_s - self._failed_since_s)}): {self.why}"
            found.append(Block(note(text, width, "bad"), 3))
            if self._last is not None and width is not None:
                age = span(now_s - self._last.at_s)
                found.append(Block([((f"what follows is {age} old", "dim"),)], 1))
        if self._last is not None and (width is not None or not self.why):
            found += blocks(self._last.status, width, self.now(), is_brief=width is not None)
        return found


def frame(view: View, width: int, height: int, now_s: float, wall_s: float, interval_s: float) -> list[Line]:
    """A screenful: the last line says what keys do."""
    clock = time.strftime("%H:%M:%S UTC", time.gmtime(wall_s))
    keys = cut(f"q quits  {clock}  every {interval_s:g} s", width)
    lines = [clip(line, width) for line in fit(view.blocks(width, now_s), max(1, height - 1))]
    lines += [()] * (height - 1 - len(lines))
    return [*lines, ((keys, "dim"),)]


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Shows until told to end."""
    try:
        admin = find_admin(WHO, args.config, environ)
        if isinstance(admin, int):
            return admin
        view = View(lambda: fetch(admin, TIMEOUT_S), admin)
        on = _on_terminal if is_terminal(environ) else _on_pipe
        return on(view, args.interval, args.count)
    except KeyboardInterrupt:
        return 0


def _on_terminal(view: View, interval_s: float, count: int | None) -> int:
    from proxyd.cli.screen import Quit, Screen  # here, for a pipe needs none of it

    looks, ended_by = 0, 0
    try:
        with Screen() as screen:
            while True:
                asked_at = time.monotonic()
                view.look(asked_at)
                looks += 1
                next_at = max(asked_at + interval_s, time.monotonic() + LEAST_WAIT_S)
                while (now := time.monotonic()) < next_at:
                    screen.draw(frame(view, screen.width, screen.height, now, time.time(), interval_s))
                    if looks == count:
                        raise Quit
                    screen.wait(next_at - now)
    except Quit as quit_:
        ended_by = quit_.signum
    except OSError as error:  # the terminal is gone
        return fail(WHO, 1, f"cannot write to the terminal: {error.strerror}")
    if ended_by:
        # As it would have ended without us, now that the terminal is as it was.
        signal.signal(ended_by, signal.SIG_DFL)
        os.kill(os.getpid(), ended_by)
    return _code(view, count)


def _on_pipe(view: View, interval_s: float, count: int | None) -> int:
    """A page a look, an empty line between two."""
    looks = 0
    while True:
        asked_at = time.monotonic()
        if not view.look(asked_at) and not looks:
            return fail(WHO, 1, view.why)
        looks += 1
        lines = [plain(line) for line in fit(view.blocks(None, time.monotonic()), None)]
        stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        code = put(WHO, "\n".join([*([""] if looks > 1 else []), f"at {stamp}", *lines]))
        if code:
            return code
        if looks == count:
            return _code(view, count)
        time.sleep(max(0.0, asked_at + interval_s - time.monotonic()))


def _code(view: View, count: int | None) -> int:
    """A script that asked for some looks wants to know that the last had no answer."""
    return 1 if count is not None and view.why else 0
