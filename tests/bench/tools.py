"""The load tools: compiled from the C files beside this one into a temporary folder, started, asked, ended.

Owns: gcc's command line, the cores everything is pinned to, every process a benchmark starts (no other), the folder.
Invariants: each tool ends with this process (PR_SET_PDEATHSIG), after LIFETIME_S at the latest, and at the end of the
`with`, Ctrl-C included; every wait here has a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# The longest benchmark takes minutes. Half of this could end a slow machine's; a tool that outlives it is an orphan.
LIFETIME_S = 900
PR_SET_PDEATHSIG = 1
# Nice value of everything started here, tools and proxies alike; below 0 (root) where others share the machine's cores.
PRIORITY = int(os.environ.get("PROXYD_BENCH_NICE", "0"))
_libc = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """The rig does not work here; the message says which part."""


def wait_for(what: Callable[[], Any], seconds: float, name: str) -> Any:
    """The first true value of what(); BenchError after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        if time.monotonic() > until:
            raise BenchError(f"{name}: not within {seconds:g} s")
        time.sleep(0.02)


@dataclass(frozen=True)
class Cores:
    """The proxy under test has `proxy` for itself; the load tools and every helper process share `load`."""

    proxy: int
    load: int

    @classmethod
    def choose(cls) -> Cores:
        usable = sorted(os.sched_getaffinity(0))
        if len(usable) < 2:
            raise BenchError("two cores are needed: one for the proxy, one for the load")
        return cls(usable[0], usable[1])


class Started:
    """One process of ours and the place its stderr goes."""

    def __init__(self, argv: list[str], core: int, log: Path, *, pipes: bool = False, **environ: str) -> None:
        def prepare() -> None:
            _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            os.sched_setaffinity(0, {core})
            if PRIORITY:
                os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
                with contextlib.suppress(OSError):  # sched(7): with autogrouping only the session's nice value counts
                    Path("/proc/self/autogroup").write_text(str(PRIORITY))

        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else errors,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environ},
                start_new_session=True,
                preexec_fn=prepare,
            )
        self.pid = self.process.pid
        self._name = Path(argv[0]).name
        self._unread = b""

    def line(self, seconds: float) -> str:
        """The next line of stdout (of a process with pipes)."""
        until = time.monotonic() + seconds
        stdout = self.process.stdout
        assert stdout is not None
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                raise BenchError(f"{self._name}: no answer within {seconds:g} s; {self.tail()}")
            data = os.read(stdout.fileno(), 65536)
            if not data:
                raise BenchError(f"{self._name} ended; {self.tail()}")
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def tell(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")
        self.process.stdin.flush()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1500:].strip()

    def children(self) -> list[int]:
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def stop(self, seconds: float = 15.0) -> None:
        """TERM, then KILL for it and the children it had. Idempotent."""
        if self.process.poll() is not None:
            return
        family = self.children()
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in [*family, self.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(5)


class Client:
    """The load of one round. `groups` as client.c reads them."""

    def __init__(self, rig: Rig, port: int, token: str, groups: list[str], opens_per_s: float = 1000) -> None:
        self._streams = sum(int(option(group, "n", 1)) for group in groups)
        self._pace = opens_per_s
        argv = [str(rig.folder / "client"), str(port), token, str(opens_per_s), str(LIFETIME_S), *groups]
        self.started = rig.start(argv, rig.cores.load, pipes=True)

    def wait_ready(self) -> int:
        """Waits until every stream has had its first event; how many did."""
        words = self.started.line(self._streams / self._pace + 60).split()
        if words[0] != "ready":
            raise BenchError(f"client said {words}")
        return int(words[1])

    def mark(self) -> None:
        self.started.tell("mark")

    def report(self) -> list[dict[str, Any]]:
        """What was measured since mark(), per group."""
        self.started.tell("report")
        groups: list[dict[str, Any]] = json.loads(self.started.line(30))["groups"]
        return groups

    def quit(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.started.tell("quit")
        self.started.stop()


class Rig:
    """The tools, compiled, and everything that was started with them."""

    def __init__(self, folder: Path, cores: Cores) -> None:
        self.folder = folder
        self.cores = cores
        self._started: list[Started] = []
        for name in ("upstream", "client", "relay"):
            argv = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(folder / name), str(HERE / f"{name}.c")]
            made = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
            if made.returncode:
                raise BenchError(f"gcc: {made.stderr}")

    def start(self, argv: list[str], core: int, *, pipes: bool = False, **environ: str) -> Started:
        log = self.folder / f"{len(self._started)}-{Path(argv[0]).name}.log"
        started = Started(argv, core, log, pipes=pipes, **environ)
        self._started.append(started)
        return started

    def start_listener(self, name: str, *argv: str, core: int) -> tuple[Started, int]:
        """upstream or relay, and the port it chose."""
        started = self.start([str(self.folder / name), *argv, str(LIFETIME_S)], core, pipes=True)
        return started, int(started.line(10).split()[1])

    def stop(self) -> None:
        for started in reversed(self._started):
            started.stop()


def option(group: str, key: str, otherwise: float) -> float:
    """The number behind `key=` in a group, read as the C tools do."""
    for word in group.split():
        name, _, value = word.partition("=")
        if name == key:
            return float(value)
    return otherwise


@contextlib.contextmanager
def rig() -> Iterator[Rig]:
    """A folder with the compiled tools; everything started with it ends with the block."""
    for tool in ("gcc", "nginx"):
        if shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin") is None:
            raise BenchError(f"{tool} is not installed")
    folder = Path(tempfile.mkdtemp(prefix="proxyd-bench-"))
    made: Rig | None = None
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        made = Rig(folder, Cores.choose())
        yield made
    finally:
        if made is not None:
            made.stop()
        shutil.rmtree(folder, ignore_errors=True)
