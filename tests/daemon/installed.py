"""A daemon that runs from a copy of the package, so that what is installed can be replaced, and broken, under it.

Owns: the copy, its version number, the ways to break it and to mend it again; asking for a reload or an upgrade by
signal and waiting for the noted result. Must not know: the load. Files are replaced by rename with a time of their
own, as pip does, so that no cached bytecode of the one before is taken for theirs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.harness import ROOT, Daemon, wait_for

RESULT_S = 90.0  # the check of a new program may take 30 s before it is refused, and the machine is shared


class Installed:
    """The copied package."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "installed"
        shutil.copytree(ROOT / "proxyd", self.path / "proxyd", symlinks=True)
        self._time = time.time()
        self.version = ""

    def put(self, name: str, text: str) -> None:
        """Replaces a file of the package."""
        target = self.path / "proxyd" / name
        new = target.with_name(target.name + ".new")
        new.write_text(text)
        self._time += 2.0  # bytecode is matched by whole seconds
        os.utime(new, (self._time, self._time))
        new.replace(target)

    def get(self, name: str) -> str:
        return (self.path / "proxyd" / name).read_text()

    def install(self, version: str) -> None:
        """As if another version were installed."""
        text, count = re.subn(r'__version__ = "[^"]*"', f'__version__ = "{version}"', self.get("__init__.py"))
        assert count == 1
        self.put("__init__.py", text)
        self.version = version


def _in_file(name: str, more: str) -> Callable[[Installed], Callable[[], None]]:
    """Breaks by lines at the end of a file."""

    def do(installed: Installed) -> Callable[[], None]:
        whole = installed.get(name)
        installed.put(name, whole + more)
        return lambda: installed.put(name, whole)

    return do


def _without_compiled(installed: Installed) -> Callable[[], None]:
    file = next((installed.path / "proxyd").glob("_frame.*.so"))
    away = file.with_suffix(".away")
    file.rename(away)
    return lambda: (away.rename(file), None)[1]


NEVER_READY = """

async def _never(*given, **more):
    raise RuntimeError("this version cannot boot")

for _found in [v for v in list(globals().values()) if isinstance(v, type) and v.__module__ == __name__]:
    if hasattr(_found, "start") and hasattr(_found, "stop_accepting"):
        _found.start = _never
"""

# Each: what it does to the package; returns the way back. "hang" takes the whole time that a check has.
PROGRAMS: dict[str, Callable[[Installed], Callable[[], None]]] = {
    "syntax": _in_file("relay/answer.py", "\ndef (:\n"),
    "missing": _without_compiled,
    "exit": _in_file("worker/main.py", "\nimport sys\nsys.exit(1)\n"),
    "no_boot": _in_file("worker/services.py", NEVER_READY),
    "hang": _in_file("wire/head.py", "\nimport time\ntime.sleep(600)\n"),
}
# Each: the configuration's text, made bad.
FILES: dict[str, Callable[[str], str]] = {
    "file_key": lambda text: text + "\n[nonsense]\nkey = 1\n",
    "file_syntax": lambda text: text + "\n[[[\n",
    "file_upstream": lambda text: re.sub(r"(?m)^upstreams = .*$", 'upstreams = ["nobody"]', text),
}


@contextlib.contextmanager
def broken(daemon: InstalledDaemon, how: str) -> Iterator[None]:
    """What is installed is broken within the block: a file of the package, or the configuration."""
    if how in FILES:
        good = daemon.config.read_text()
        daemon.config.write_text(FILES[how](good))
        try:
            yield
        finally:
            daemon.config.write_text(good)
        return
    mend = PROGRAMS[how](daemon.installed)
    try:
        yield
    finally:
        mend()


@dataclass
class Renewal:
    """One reload or upgrade: when it was asked for, when its result was noted (monotonic), and the result."""

    kind: str
    how: str
    asked: float
    noted: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return bool(self.result.get("ok"))

    def __str__(self) -> str:
        told = {name: self.result.get(name) for name in ("ok", "generation", "took_s")}
        detail = "" if self.ok else f" {self.result.get('detail')!r} {str(self.result.get('findings'))[:200]}"
        return f"{self.kind:7} {self.how or 'good':13} in {self.noted - self.asked:5.2f} s: {told}{detail}"


class InstalledDaemon(Daemon):
    """The daemon of the copied package."""

    def __init__(self, folder: Path, config: str, environ: dict[str, str] | None = None) -> None:
        super().__init__(folder, config, environ)
        self.installed = Installed(folder)
        self.environ["PYTHONPATH"] = str(self.installed.path)
        self.unanswered: list[str] = []  # of the admin socket
        self.command = [sys.executable, "-m", "proxyd", "-c", str(self.config)]

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log, stderr=log, cwd=self.installed.path, env=self.environ,
            )  # fmt: skip
        wait_for(self._is_ready, 30)

    def status(self) -> dict[str, Any]:
        """GET /status; an admin socket that does not answer is noted, and asked again."""
        for _ in range(50):
            try:
                found: dict[str, Any] = json.loads(self.admin("/status")[1])
                return found
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.unanswered.append(f"{type(error).__name__}: {error}")
                time.sleep(0.1)
        raise AssertionError(f"/status never answered: {self.unanswered[-3:]}")

    def renew(self, kind: str, how: str = "", seconds: float = RESULT_S) -> Renewal:
        """Asks for a reload or an upgrade and waits until its result is noted."""
        assert self.process is not None
        before = self.status().get("last_reload") or {}
        renewal = Renewal(kind, how, time.monotonic())
        self.process.send_signal(signal.SIGHUP if kind == "reload" else signal.SIGUSR2)

        def noted() -> bool:
            found = self.status().get("last_reload") or {}
            if found.get("at") == before.get("at"):
                return False
            renewal.result = found
            return True

        wait_for(noted, seconds, every=0.05)
        renewal.noted = time.monotonic()
        return renewal

    def worker_pids(self) -> set[int]:
        """Of the generation that serves, as /status tells it."""
        found = self.status()
        serving = {one["generation"] for one in found["generations"] if one["state"] == "serving"}
        return {one["pid"] for one in found["workers"] if one["pid"] and one["generation"] in serving}

    def draining(self) -> list[dict[str, Any]]:
        return [one for one in self.status().get("generations", []) if one["state"] == "draining"]
