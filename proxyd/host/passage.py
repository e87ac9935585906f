"""Client connections on their way from one process of the node to another.

Owns a pair of SOCK_SEQPACKET sockets and the one message that goes over it. Must not know HTTP, nor which connections.

    retiring workers  o give ---- version byte + one descriptor (SCM_RIGHTS) ---- take o  serving workers

The master makes it and keeps both ends, and all workers have them: what lies in the passage outlives its giver and its
taker, and the image after execve finds it there. Each message goes to exactly one of those that take.

Invariants: nothing here waits. `give` sends a copy; after True the caller closes its own. What is no message of ours is
dropped, its descriptors closed. A process without a free descriptor takes nothing: the kernel would throw away what it
cannot hand over (MSG_CTRUNC), and a client would be reset for it. So `take` keeps one descriptor in reserve, gives it
up for the connection, and answers None until it has another.
Bound: what the kernel queues for SNDBUF_BYTES, and RLIMIT_NOFILE descriptors in flight (unix(7)); then `give` is False.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

SNDBUF_BYTES = 4 << 20  # 10,900 connections; the kernel grants net.core.wmem_max of it, 278 connections by default
_VERSION = b"\x01"
_CONTROL_BYTES = socket.CMSG_SPACE(4 * 16)  # more descriptors than ours in a message: received, to be closed
_BAD_AT_ONCE = 16  # messages of nobody's that one call passes over; more cost the loop of the taker its turn
_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)


class Passage:
    """Both ends, in each process a copy."""

    __slots__ = ("_give", "_reserve", "_take")

    def __init__(self, give: socket.socket, take: socket.socket) -> None:
        self._give, self._take = give, take
        self._reserve = -1  # made by the first `take`: a reserve from before a fork would be each child's to keep

    @classmethod
    def create(cls) -> Passage:
        """Raises OSError when the kernel has no sockets."""
        give, take = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        give.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SNDBUF_BYTES)
        give.setblocking(False)
        take.setblocking(False)
        return cls(give, take)

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> Passage:
        """The passage that an earlier image of this process made, with what lies in it; owns both descriptors from then
        on. Raises ValueError or OSError for other descriptors; they stay the caller's."""
        if len(fds) != 2:
            raise ValueError(f"a passage has two ends, not {len(fds)}")
        ends: list[socket.socket] = []
        try:
            for fd in fds:
                ends.append(socket.socket(fileno=fd))
                if (ends[-1].family, ends[-1].type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                    raise ValueError(f"descriptor {fd} is no end of a passage")
        except (OSError, ValueError):
            for end in ends:
                end.detach()
            raise
        for end in ends:
            end.set_inheritable(False)
            end.setblocking(False)
        return cls(*ends)

    def fds(self) -> list[int]:
        """For `adopt` in the image after execve, once they are inheritable. They stay this object's."""
        return [self._give.fileno(), self._take.fileno()]

    @property
    def take_fd(self) -> int:
        """Readable when something lies there; watched by those that take."""
        return self._take.fileno()

    def give(self, sock: socket.socket) -> bool:
        """Sends a copy of the socket. False: it is full, or too many are on their way; nothing was sent, try later.
        After True the caller closes its own without a shutdown: the connection lives in the passage."""
        try:
            socket.send_fds(self._give, [_VERSION], [sock.fileno()])
        except OSError:  # EAGAIN, ETOOMANYREFS, ENOBUFS, ENOMEM; EBADF of a socket that is closed already
            return False
        return True

    def take(self) -> socket.socket | None:
        """The next connection, non-blocking and closed by execve; None when there is none, another process was faster,
        or no descriptor is free (then it still lies there)."""
        for _ in range(_BAD_AT_ONCE):
            if not self._has_reserve():
                return None
            os.close(self._reserve)
            self._reserve = -1
            try:
                data, ancillary, _, _ = self._take.recvmsg(16, _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return None
            received = _descriptors(ancillary)
            if data == _VERSION and len(received) == 1:
                sock = _connection(received[0])
                if sock is not None:
                    return sock
                continue
            for fd in received:
                os.close(fd)
            if not data and not received:  # the end of a passage whose givers are all gone
                return None
        return None

    def close(self) -> None:
        self._give.close()
        self._take.close()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def _has_reserve(self) -> bool:
        if self._reserve < 0:
            try:
                self._reserve = os.dup(self._take.fileno())
            except OSError:
                return False
        return True


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) // fds.itemsize * fds.itemsize])
    return list(fds)


def _connection(fd: int) -> socket.socket | None:
    """The socket of a received descriptor; None, and it is closed, when it is no stream socket."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM:
        sock.close()
        return None
    sock.setblocking(False)
    return sock
