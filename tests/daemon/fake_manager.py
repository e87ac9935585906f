"""The part of a service manager that a restart needs: notifications, the descriptor store, starting with what is kept.

Owns: a NOTIFY_SOCKET, the descriptors that came with FDSTORE=1, one main process at a time. As systemd does it (252):
a message counts only if the main process sent it (NotifyAccess=main); a name may hold many descriptors; one whose file
has hung up or failed is dropped from the store, unless it came with FDPOLL=0; a successor gets them as 3, 4, ... with
LISTEN_FDS, LISTEN_FDNAMES and LISTEN_PID. Must not know what the descriptors are. `load_rounds` puts a load beside it
and counts.
`python -m tests.daemon.fake_manager --restarts 5 --rate 1000`
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.harness import ROOT, Daemon, config_text, free_port, model_text, upstream_text, wait_for
from tests.daemon.load import Failure, Newcomers, Scripted, build, end_on_term, total

STORE_MAX = 512
FIRST_FD = 3  # sd_listen_fds(3)
HIGH_FD = 200  # where the shell finds them: above all that it moves them to


class Manager:
    """Starts and restarts `argv`. Use as a context."""

    def __init__(self, folder: Path, argv: Sequence[str], environ: dict[str, str], log: Path) -> None:
        self._argv, self._environ, self._log = list(argv), environ, log
        self._path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._path)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._lock = threading.Lock()
        self.store: list[tuple[str, int]] = []
        self._unwatched: set[int] = set()
        self.messages: list[str] = []
        self.strangers = 0  # messages that the main process did not send
        self.given: list[str] = []  # the names that the last one was started with
        self.process: subprocess.Popen[bytes] | None = None
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *given: object) -> None:
        if self.process is not None:
            for pid in [self.process.pid, *self._children()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait(20)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for _, fd in self.store:
            os.close(fd)

    def _children(self) -> list[int]:
        assert self.process is not None
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return [int(word) for word in text.split()]
        return []

    # --- notifications ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        room = socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(12)
        while True:
            try:
                data, control, _, _ = self._socket.recvmsg(65536, room)
            except OSError:
                return
            if not data:
                return
            self._take(data.decode(), control)

    def _take(self, text: str, control: list[tuple[int, int, bytes]]) -> None:
        fds, sender = array.array("i"), 0
        for level, kind, value in control:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(value[: len(value) - len(value) % fds.itemsize])
            elif (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                sender = struct.unpack("3i", value[:12])[0]
        lines = dict(line.partition("=")[::2] for line in text.splitlines())
        with self._lock:
            self.messages.append(text)
            if self.process is None or sender != self.process.pid:
                self.strangers += 1
                for fd in fds:
                    os.close(fd)
                return
            name = lines.get("FDNAME", "stored")
            if lines.get("FDSTOREREMOVE") == "1":
                for kept in [one for one in self.store if one[0] == name]:
                    self.store.remove(kept)
                    os.close(kept[1])
            for fd in fds:
                if lines.get("FDSTORE") == "1" and len(self.store) < STORE_MAX and not self._has(fd):
                    kept_fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, HIGH_FD)
                    self.store.append((name, kept_fd))
                    (self._unwatched.discard if lines.get("FDPOLL") != "0" else self._unwatched.add)(kept_fd)
                os.close(fd)

    def _has(self, fd: int) -> bool:
        """A descriptor of a file that is kept already is not kept twice."""
        node = os.fstat(fd).st_ino, os.fstat(fd).st_dev
        return any((os.fstat(kept).st_ino, os.fstat(kept).st_dev) == node for _, kept in self.store)

    def _drop_dead(self) -> None:
        poll = select.poll()
        for _, fd in self.store:
            if fd not in self._unwatched:
                poll.register(fd, 0)
        dead = {fd for fd, what in poll.poll(0) if what & (select.POLLHUP | select.POLLERR)}
        for kept in [one for one in self.store if one[1] in dead]:
            self.store.remove(kept)
            os.close(kept[1])

    def names(self) -> Counter[str]:
        with self._lock:
            return Counter(name for name, _ in self.store)

    # --- the main process ------------------------------------------------------------------------------------------

    def start(self, seconds: float = 30.0) -> float:
        """Starts it with all that is kept; returns how long it took until READY=1."""
        began = time.monotonic()
        with self._lock:
            self._drop_dead()
            kept = list(self.store)
            self.given = [name for name, _ in kept]
            moves = "".join(f" {FIRST_FD + number}<&{fd} {fd}<&-" for number, (_, fd) in enumerate(kept))
            shell = f"export LISTEN_PID=$$; exec \"$@\"{moves}"
            environ = {**self._environ, "NOTIFY_SOCKET": self._path}
            if kept:
                environ |= {"LISTEN_FDS": str(len(kept)), "LISTEN_FDNAMES": ":".join(self.given)}
            assert FIRST_FD + len(kept) <= HIGH_FD
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    ["bash", "-c", shell, "bash", *self._argv],
                    stdout=log, stderr=log, cwd=ROOT, env=environ, pass_fds=[fd for _, fd in kept],
                )  # fmt: skip
            self.messages.clear()
        wait_for(self._is_ready, seconds, every=0.005)
        return time.monotonic() - began

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log.read_text(errors="replace")[-3000:]
        with self._lock:
            return any("READY=1" in message.splitlines() for message in self.messages)

    def stop(self, seconds: float = 60.0) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@dataclass
class Outcome:
    reports: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    away_s: list[float] = field(default_factory=list)  # from TERM to READY
    kept: Counter[str] = field(default_factory=Counter)
    ended_with_node: int = 0


@contextlib.contextmanager
def managed(folder: Path, url: str, workers: int, drain_timeout_s: float) -> Iterator[tuple[Manager, Daemon]]:
    port = free_port()
    server = f"""listen = ["127.0.0.1:{port}", "unix:{folder}/p.sock"]
workers = {workers}
drain_timeout = "{drain_timeout_s:g}s"
"""
    upstream = upstream_text(url + "/v1", more="max_connections = 4096\n") + model_text("*", 1, '["openai"]')
    daemon = Daemon(folder, config_text(folder, port, upstream, server=server))
    daemon.port = port
    argv = [sys.executable, "-m", "proxyd", "-c", str(daemon.config)]
    with Manager(folder, argv, daemon.environ, daemon.log_path) as manager:
        manager.start()
        yield manager, daemon


def load_rounds(
    folder: Path, restarts: int, rate: float, streams: int = 50, *, workers: int = 2, drain_timeout_s: float = 2.0
) -> Outcome:
    """Restarts under load, over TCP and a Unix socket. No new connection may be refused, reset or left without a whole
    answer: what waits while nobody is there is the successor's. A request on a connection of before may be told 503, or
    find it closed; streams may be ended by the drain."""
    outcome = Outcome()
    build(folder)
    provider = Scripted(folder)
    with contextlib.ExitStack() as ends:
        ends.callback(provider.close)
        manager, daemon = ends.enter_context(managed(folder, provider.url, workers, drain_timeout_s))
        made = []
        for via, target in (("tcp", daemon.port), ("unix", f"{folder}/p.sock")):
            options = {"kept": 0.2, "pool": 50, "stream_rate": 10, "min": 10, "max": 30, "wait": 60}
            shares = {"rate": rate / 2, "streams": streams // 2}
            made.append(Newcomers(folder, target, daemon.token(), via, **shares, **options))
            ends.callback(made[-1].close)
        for load in made:
            load.wait("ready")
            load.go()
        for _ in range(restarts):
            time.sleep(1)
            outcome.kept = manager.names()
            began = time.monotonic()
            code = manager.stop()
            if code:
                outcome.faults.append(f"exit code {code}")
            manager.start()
            outcome.away_s.append(time.monotonic() - began)
        time.sleep(1)
        for load in made:
            load.stop()
            load.wait("stopped", 90)
        outcome.reports = [load.report() for load in made]
        outcome.failures = [failure for load in made for failure in load.failures]
        if manager.strangers:
            outcome.faults.append(f"{manager.strangers} messages to the manager were not the main process's")
        if manager.stop() or "Traceback" in daemon.log():
            outcome.faults.append("it did not end well: " + daemon.log()[-2000:])
    for failure in outcome.failures:
        is_drained = failure.is_stream and failure.kind == "error_event" and "draining" in failure.detail
        if is_drained or (failure.uses and failure.kind in ("status", "empty", "reset")):
            outcome.ended_with_node += 1
        else:
            outcome.faults.append(str(failure))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.daemon.fake_manager")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--rate", type=float, default=1000)
    parser.add_argument("--streams", type=int, default=100)
    given = parser.parse_args()
    end_on_term()
    with tempfile.TemporaryDirectory(prefix="manager-") as folder:
        outcome = load_rounds(Path(folder), given.restarts, given.rate, given.streams)
    print(f"kept: {dict(outcome.kept)}; from TERM to READY: {', '.join(f'{away:.2f}' for away in outcome.away_s)} s")
    print("requests", total(outcome.reports, "requests"))
    print("streams", total(outcome.reports, "streams"))
    kinds = Counter((f.kind, "stream" if f.is_stream else "kept" if f.uses else "new") for f in outcome.failures)
    print(f"failures {dict(kinds)}; ended with the node, as they may: {outcome.ended_with_node}")
    print(f"faults: {len(outcome.faults)}", *outcome.faults[:30], sep="\n  ")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
