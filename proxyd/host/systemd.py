"""Talks to the service manager: readiness, watchdog, kept and inherited sockets.

Owns the sd_notify(3) datagram, the descriptor store (sd_pid_notify_with_fds(3)) and the LISTEN_FDS convention
(sd_listen_fds(3)). Must not know what is served. Without a manager (NOTIFY_SOCKET unset) every call does nothing and
returns False, so nobody has to ask. Only the master notifies: a forked worker that did would be refused by
NotifyAccess=main, and one worker's trouble is not the service's.
Invariants: a manager that is slow or gone holds nobody up: a line is dropped at once, descriptors after STORE_WAIT_MS a
message. The variables are taken from the environment, so that children know nothing of the manager; an image that
follows by execve is the same process to the manager and gets them back (`environ_for_exec`).
"""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import MutableMapping, Sequence

LISTEN_FDS_START = 3  # fixed by sd_listen_fds(3)
MAX_NAME_BYTES = 255  # of a stored descriptor, sd_pid_notify_with_fds(3)
# The kernel's SCM_MAX_FD: one message more and sendmsg(2) fails with EINVAL. Half would only be twice the messages.
FDS_A_MESSAGE = 253
# For the manager to make room in its queue, a message. Ten times as much and a hung manager delays a start by seconds;
# a tenth, and a busy one loses listeners that a restart would have kept.
STORE_WAIT_MS = 200
BARRIER_WAIT_MS = 1000  # it reads its queue in order; a machine that starts keeps it waiting. Once, at a start
PROBE_NAME = "proxyd-probe"
_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The way to the manager, read once from the environment, which is then cleaned for the children."""

    __slots__ = ("_address", "_said", "_shown", "_taken", "watchdog_s")

    def __init__(self, environ: MutableMapping[str, str], pid: int | None = None) -> None:
        self._taken = {name: environ.pop(name) for name in _OURS if name in environ}
        address = self._taken.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._said = self._shown = ""
        self.watchdog_s: float | None = None
        interval, owner = self._taken.get("WATCHDOG_USEC", ""), self._taken.get("WATCHDOG_PID", "")
        if interval.isdigit() and int(interval) and owner in ("", str(os.getpid() if pid is None else pid)):
            # Half of it, as sd_watchdog_enabled(3) advises: one late ping is no restart.
            self.watchdog_s = int(interval) / 1e6 / 2

    @property
    def is_managed(self) -> bool:
        """Whether there is a manager to speak to."""
        return bool(self._address)

    def environ_for_exec(self) -> dict[str, str]:
        """What was taken from the environment: for the image that follows in this process by execve(2), and for no
        child, whose pid the manager does not know."""
        return dict(self._taken)

    def send(self, *lines: str) -> bool:
        """True if the manager was told. A manager that is gone or slow must not stop us: the datagram is dropped."""
        return self._send(lines, (), 0)

    def ready(self, status: str) -> None:
        self._said, self._shown = status, ""
        self.send("READY=1", _status(status), f"MAINPID={os.getpid()}")

    def reloading(self, status: str) -> None:
        """A reload or an upgrade has begun. `ready` must follow, also when it was refused: systemd shows "reloading"
        until then. The time is for Type=notify-reload (253 and later); older ones pass over it."""
        self._said, self._shown = status, ""
        self.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", _status(status))

    def stopping(self, status: str) -> None:
        self._said, self._shown = status, ""
        self.send("STOPPING=1", _status(status))

    def figures(self, text: str) -> None:
        """Live figures for `systemctl status`, behind the last words of the others; nothing is sent while they stay."""
        line = _status(f"{self._said} ({text})" if self._said else text)
        if line != self._shown and self.send(line):
            self._shown = line

    def watchdog(self) -> None:
        self.send("WATCHDOG=1")

    # --- the descriptor store ------------------------------------------------------------------------------------

    def fd_store(self, name: str, fds: Sequence[int]) -> bool:
        """Leaves duplicates of `fds` with the manager (FileDescriptorStoreMax=), who gives them to the next start of
        the unit under `name` (`take_listen_fds`). One that it has already is not kept twice. FDPOLL=0: it does not
        watch them for a hang-up, which would drop them silently. True if all were sent; that the store had room for
        them the manager tells nobody."""
        _check_name(name)
        lines = ("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0")
        parts = [fds[start : start + FDS_A_MESSAGE] for start in range(0, len(fds), FDS_A_MESSAGE)]
        return bool(parts) and all(self._send(lines, part, STORE_WAIT_MS) for part in parts)

    def has_store(self) -> bool:
        """Whether the manager keeps descriptors at all, which it tells nobody (FileDescriptorStoreMax=0 is a unit's
        default): the end of a pipe is stored, and when the manager has seen that (BARRIER=1, systemd 246 and later) the
        other end knows whether it lives. False, too, if it is not seen within BARRIER_WAIT_MS."""
        if not self.is_managed:
            return False
        lives, stored = os.pipe2(os.O_CLOEXEC)
        seen, barrier = os.pipe2(os.O_CLOEXEC)
        try:
            self._send(("FDSTORE=1", f"FDNAME={PROBE_NAME}", "FDPOLL=0"), (stored,), STORE_WAIT_MS)
            self._send(("BARRIER=1",), (barrier,), STORE_WAIT_MS)
            os.close(stored)
            os.close(barrier)
            return _has_hung_up(seen, BARRIER_WAIT_MS) and not _has_hung_up(lives, 0)
        finally:
            self.fd_remove(PROBE_NAME)
            os.close(lives)
            os.close(seen)

    def fd_remove(self, name: str) -> bool:
        """The manager closes its duplicates of that name."""
        _check_name(name)
        return self._send(("FDSTOREREMOVE=1", f"FDNAME={name}"), (), STORE_WAIT_MS)

    def _send(self, lines: Sequence[str], fds: Sequence[int], wait_ms: int) -> bool:
        if not self._address:
            return False
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        data = "\n".join(lines).encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
                sock.connect(self._address)  # without it poll(2) knows nothing of the receiver's queue
                try:
                    sock.sendmsg([data], ancillary)
                except BlockingIOError:
                    if not wait_ms:
                        return False
                    poll = select.poll()
                    poll.register(sock, select.POLLOUT)
                    poll.poll(wait_ms)
                    sock.sendmsg([data], ancillary)
        except OSError:
            return False
        return True


def _has_hung_up(fd: int, wait_ms: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(wait_ms))


def _status(text: str) -> str:
    """A line of its own: a line end in it would begin another variable."""
    return "STATUS=" + " ".join(text.split())


def _check_name(name: str) -> None:
    """Raises ValueError: the manager would take another name, or the next start another list of names."""
    if not name or len(name) > MAX_NAME_BYTES or ":" in name or not (name.isascii() and name.isprintable()):
        wanted = "1 to 255 printable ASCII characters without ':'"
        raise ValueError(f"a stored descriptor cannot be called {name!r}: {wanted}")


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
