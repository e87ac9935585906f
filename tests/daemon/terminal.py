"""Commands of the program beside a running daemon: on pipes, and on a terminal of their own."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios

from tests.daemon.harness import ROOT, Daemon, wait_for


def command(daemon: Daemon, *words: str) -> list[str]:
    return [sys.executable, "-m", "proxyd", "-c", str(daemon.config), *words]


def run(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(daemon, *words), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


class Terminal:
    """`proxyd top`, or another command, on a terminal of 80 columns and 24 rows."""

    def __init__(self, daemon: Daemon, *words: str, **environ: str) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.modes = termios.tcgetattr(self.slave)
        kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        self.process = subprocess.Popen(
            command(daemon, *(words or ("top", "--interval", "100ms"))),
            cwd=ROOT,
            env={**kept, "TERM": "xterm-256color", **environ},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # Ctrl-C is a signal to who has the terminal
        )
        self.out = b""

    def read(self) -> str:
        while select.select([self.master], [], [], 0)[0]:
            self.out += os.read(self.master, 65536)
        return self.out.decode()

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in self.read(), 20)

    def frames(self) -> list[list[str]]:
        """What was drawn, without the codes: each frame begins at the top left."""
        plain = re.sub(r"\x1b\[[0-9;]*m", "", self.read())
        frames = re.split(r"\x1b\[H", plain)[1:]
        return [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", one).split("\r\n") for one in frames]

    def ends(self) -> int:
        wait_for(lambda: self.read() is not None and self.process.poll() is not None, 20)
        self.read()
        return self.process.returncode

    def is_as_before(self) -> bool:
        """Modes, the cursor, and the screen that was there."""
        return (
            termios.tcgetattr(self.slave) == self.modes
            and self.out.rindex(b"\x1b[?25h") > self.out.rindex(b"\x1b[?25l")
            and self.out.rindex(b"\x1b[?1049l") > self.out.rindex(b"\x1b[?1049h")
        )

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)
