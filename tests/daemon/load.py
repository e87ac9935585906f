"""Load that counts every end: tests/bench/newcomers.c against a node, and tests/bench/scripted.c behind it.

Owns: gcc's command line, the tools' processes, their reports in Python's words. Must not know: what is done to the node
meanwhile. Both tools end with this process, after LIFETIME_S at the latest, and at close(); each wait has a deadline.
All of it runs with a nice value, for the node under test shares its cores.
"""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parents[1] / "bench"
LIFETIME_S = 1200
PATIENCE_S = 60.0
NICE = 2


@functools.cache
def _compiled(name: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        made = f"{folder}/{name}"
        argv = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o", made, str(SOURCES / f"{name}.c")]
        subprocess.run(argv, check=True, timeout=120)
        return Path(made).read_bytes()


def build(folder: Path) -> None:
    """Puts the tools there; compiled once in a process."""
    for name in ("scripted", "newcomers"):
        (folder / name).write_bytes(_compiled(name))
        (folder / name).chmod(0o755)


class Tool:
    """One process of ours; `lines` are what it printed and nobody has asked for yet."""

    def __init__(self, *argv: str) -> None:
        self.process = subprocess.Popen(
            ["nice", "-n", str(NICE), *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def line(self, seconds: float) -> str | None:
        """The next line; None if there is none within `seconds`. Raises RuntimeError once the tool has ended."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        if line is None:
            raise RuntimeError(f"{self.process.args!r} ended")
        return line

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


@dataclass(frozen=True)
class Failure:
    """One request or stream that did not end well. Times are monotonic seconds; `port` is the client's (0: Unix)."""

    via: str
    kind: str
    is_stream: bool
    port: int
    asked: float
    ended: float
    uses: int
    bytes: int
    detail: str

    def __str__(self) -> str:
        what = "stream" if self.is_stream else "request"
        kept = f" on a kept connection ({self.uses} before)" if self.uses else ""
        after = f"after {self.ended - self.asked:.2f} s, {self.bytes} B"
        return f"{self.via}: {what} {self.kind}{kept} {after}: {self.detail}"


class Newcomers:
    """A running load. `via` names it in reports."""

    def __init__(self, folder: Path, target: str | int, token: str, via: str = "tcp", **options: float) -> None:
        self.via = via
        self.failures: list[Failure] = []
        self.slow: list[tuple[float, ...]] = []  # of slow ones: when asked, connected, first byte, end
        told = "".join(f" {name}={value:g}" for name, value in options.items())  # a blank first: see newcomers.c
        self._tool = Tool(str(folder / "newcomers"), str(target), token, str(LIFETIME_S), told)
        self._words: list[str] = []

    def go(self) -> None:
        self._tool.tell("go")

    def stop(self) -> None:
        self._tool.tell("stop")

    def leave(self) -> None:
        """Closes the long streams that are open."""
        self._tool.tell("leave")

    def wait(self, word: str, seconds: float = PATIENCE_S) -> str:
        """The first line that begins with `word`; the failures before it are kept."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            line = self._tool.line(left)
            if line is None:
                break
            if line.startswith(word):
                return line
            self._note(line)
        raise TimeoutError(f"newcomers {self.via}: no {word!r} within {seconds:g} s; {self.failures[:5]}")

    def _note(self, line: str) -> None:
        if line.startswith("fail "):
            _, kind, who, port, asked, ended, uses, size, *rest = line.split(" ", 8)
            failure = Failure(
                self.via, kind, who == "stream", int(port), int(asked) / 1e9, int(ended) / 1e9,
                int(uses), int(size), rest[0] if rest else "",
            )  # fmt: skip
            self.failures.append(failure)
        elif line.startswith("slow "):
            self.slow.append(tuple(int(word) / 1e9 for word in line.split()[2:6]))

    def report(self) -> dict[str, Any]:
        self._tool.tell("report")
        found: dict[str, Any] = json.loads(self.wait("report ").removeprefix("report "))
        return found | {"via": self.via}

    def close(self) -> None:
        self._tool.close()


def total(reports: list[dict[str, Any]], who: str) -> dict[str, Any]:
    """Several loads' counts of `requests` or `streams`, added."""
    sums: dict[str, Any] = {"begun": 0, "whole": 0, "open": 0, "failed": {}, "statuses": {}}
    for report in reports:
        part = report[who]
        for key in ("begun", "whole", "open"):
            sums[key] += part[key]
        for key in ("failed", "statuses"):
            for name, count in part[key].items():
                sums[key][name] = sums[key].get(name, 0) + count
    return sums


class Scripted:
    """The provider behind the node."""

    def __init__(self, folder: Path) -> None:
        self._tool = Tool(str(folder / "scripted"), str(LIFETIME_S))
        words = (self._tool.line(10) or "").split()
        assert words[:1] == ["port"], words
        self.port = int(words[1])
        self.url = f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._tool.close()


@contextlib.contextmanager
def loads(*made: Newcomers) -> Iterator[tuple[Newcomers, ...]]:
    try:
        yield made
    finally:
        for one in made:
            one.close()


def end_on_term() -> None:
    """For a main(): a TERM ends it in order, with all that it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """False for one that has ended and waits to be reaped, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
