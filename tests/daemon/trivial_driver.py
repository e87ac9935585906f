"""Drives one trivial node (trivial_node.py) as a user and a service manager would: signals, log lines, connections."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0  # how long something may take before the test fails; nothing here waits for it to pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def eventually(check: Callable[[], Any], what: str | Callable[[], str]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        value = check()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"never came: {what if isinstance(what, str) else what()}")


class Node:
    """One trivial node, in a session of its own, so that whatever it leaves behind can be found."""

    def __init__(self, environ: dict[str, str] | None = None, **options: Any) -> None:
        self.port = options.setdefault("port", free_port())
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/daemon/trivial_node.py"), json.dumps(options)],
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            start_new_session=True,
        )
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stderr, selectors.EVENT_READ)
        self._rest = b""
        self._clients: list[Client] = []
        self.lines: list[dict[str, Any]] = []
        self.text = ""

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_event(self, event: str, **fields: Any) -> dict[str, Any]:
        """The first log line of this kind that was not asked for before."""

        def find() -> dict[str, Any] | None:
            for index, line in enumerate(self.lines):
                if line.get("event") == event and fields.items() <= line.items():
                    return self.lines.pop(index)
            self._read()
            return None

        found: dict[str, Any] = eventually(find, lambda: f"{event} {fields}; seen:\n{self.text}")
        return found

    def _read(self) -> None:
        assert self.process.stderr is not None
        if self._selector.select(0.02):
            data = self.process.stderr.read() or b""
            self.text += data.decode()
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                with contextlib.suppress(ValueError):
                    self.lines.append(json.loads(line))

    def wait_exit(self) -> int:
        def gone() -> bool:
            self._read()
            return self.process.poll() is not None

        eventually(gone, lambda: f"the master's end; seen:\n{self.text}")
        self._read()
        return self.process.returncode

    def connect(self) -> Client:
        client = Client(socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S))
        self._clients.append(client)
        return client

    def connect_to(self, slot: int) -> Client:
        """A greeted client of that worker: the kernel spreads connections over the listeners of a port."""

        def attempt() -> Client | None:
            client = self.connect()
            client.greet()
            if client.slot == slot:
                return client
            client.close()
            return None

        found: Client = eventually(attempt, f"a connection to worker {slot}")
        return found

    def family(self) -> dict[int, str]:
        """Living processes of the node's session: pid to title."""
        found = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    rest = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2]
                    fields = rest.split()
                    if int(fields[3]) == self.process.pid and fields[0] != "Z":
                        found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().rstrip("\0 ")
        return found

    def end(self) -> None:
        for client in self._clients:
            client.close()
        for pid in [self.process.pid, *self.family()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stderr is not None
        self._selector.close()
        self.process.stderr.close()


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")
        self.slot = self.pid = -1

    def greet(self) -> None:
        words = self.line().split()
        self.slot, self.pid = int(words[1]), int(words[2])

    def line(self) -> bytes:
        return self.file.readline()

    def ask(self, word: bytes) -> bytes:
        self.sock.sendall(word + b"\n")
        return self.line().strip()

    def close(self) -> None:
        self.file.close()
        self.sock.close()
