"""Talks to the service manager: readiness, watchdog, inherited sockets.

Owns the sd_notify(3) datagram and the LISTEN_FDS convention (sd_listen_fds(3)). Must not know what is served.
Without a manager (NOTIFY_SOCKET unset) every call does nothing, so nobody has to ask. Only the master notifies:
a forked worker that did would be refused by NotifyAccess=main, and one worker's trouble is not the service's.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping

LISTEN_FDS_START = 3  # fixed by sd_listen_fds(3)


class Notifier:
    """The way to the manager, read once from the environment, which is then cleaned for the children."""

    __slots__ = ("_address", "watchdog_s")

    def __init__(self, environ: MutableMapping[str, str], pid: int | None = None) -> None:
        self._address = environ.pop("NOTIFY_SOCKET", "")
        self.watchdog_s: float | None = None
        interval, owner = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if interval.isdigit() and int(interval) and owner in ("", str(os.getpid() if pid is None else pid)):
            # Half of it, as sd_watchdog_enabled(3) advises: one late ping is no restart.
            self.watchdog_s = int(interval) / 1e6 / 2

    def send(self, *lines: str) -> bool:
        """True if the manager was told. A manager that is gone or slow must not stop us: the datagram is dropped."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False
        return True

    def ready(self, status: str) -> None:
        self.send("READY=1", f"STATUS={status}", f"MAINPID={os.getpid()}")

    def stopping(self, status: str) -> None:
        self.send("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        self.send(f"STATUS={status}")

    def watchdog(self) -> None:
        self.send("WATCHDOG=1")


def take_listen_fds(environ: MutableMapping[str, str], pid: int | None = None) -> dict[str, list[int]]:
    """Inherited descriptors by name ("unknown" where the manager gave none), close-on-exec from now on. Empty if
    they are not meant for this process. The variables are removed, so that a child does not take them again."""
    owner, count, names = (environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if owner != str(os.getpid() if pid is None else pid) or not count.isdigit():
        return {}
    given = names.split(":") if names else []
    found: dict[str, list[int]] = {}
    for index in range(int(count)):
        fd = LISTEN_FDS_START + index
        os.set_inheritable(fd, False)
        found.setdefault(given[index] if index < len(given) and given[index] else "unknown", []).append(fd)
    return found
