"""Accepts clients on the slot's listeners in bounded batches.

Owns: the readiness of the listeners in this worker, and what happens when descriptors run out. Must not know: HTTP,
what becomes of an accepted socket. The listeners themselves are the master's: nothing here closes or re-listens them
(`loop.create_server(sock=...)` would call listen() again with its own backlog).

Options: those of the listener (TCP_NODELAY, keep-alive, TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT; `host.sockets`) are
inherited by what it accepts. Not inherited: O_NONBLOCK, and the send buffer of a Unix socket.

Invariants: at most BATCH accepts a readiness, so a connect storm does not hold the loop; out of descriptors the worker
goes on serving, says so once, and looks again every PAUSE_S. A worker that leaves may take what waits, REST at most.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Sequence

from proxyd.ids import new_request_id
from proxyd.log import Log

__all__ = ["BATCH", "PAUSE_S", "Acceptor"]

# 32 accepts take about 0.3 ms. Half is lost in a storm, twice delays every running stream by another 0.3 ms.
BATCH = 32
# Long enough that a worker without descriptors does not spin, short against a client's connect timeout.
PAUSE_S = 0.1
# More than a backlog holds (4,096, somaxconn at most): who connects all the while must not keep a leaving worker.
REST = 65_536
# How long "out of descriptors" is said after the last time: an attempt comes every PAUSE_S.
STARVED_S = 1.0
# TCP_NOTSENT_LOWAT does not exist on Unix sockets: this is what a stalled nginx worker may cost per stream there. The
# kernel doubles it for its own overhead.
UNIX_SEND_BUFFER_BYTES = 64 * 1024

_OUT_OF_DESCRIPTORS = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_TRY_LATER = frozenset((errno.EAGAIN, errno.EWOULDBLOCK))

_SHED = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nx-proxyd-request-id: %b\r\nx-request-id: %b\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


class Acceptor:
    """Accepting on a few listeners. States: running (readers registered), paused, closed."""

    __slots__ = (
        "_listeners", "_log", "_loop", "_on_accept", "_reserve", "_resume_handle", "_running", "_starved",
        "_starved_at",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: Sequence[socket.socket],
        on_accept: Callable[[socket.socket, object], None],
        log: Log,
    ) -> None:
        """`on_accept(sock, address)` owns the socket it is given. Starts paused; `resume()` begins."""
        self._loop = loop
        self._listeners = tuple(listeners)
        self._on_accept = on_accept
        self._log = log
        self._running = False
        self._starved = False
        self._starved_at = -STARVED_S
        self._resume_handle: asyncio.TimerHandle | None = None
        self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for listener in self._listeners:
            listener.setblocking(False)

    def resume(self) -> None:
        """Accepts from now on."""
        self._cancel_resume()
        if self._running:
            return
        self._running = True
        for listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._on_readable, listener)

    def pause(self) -> None:
        """Accepts no more; who connects waits in the backlog, for our successor or until the master closes it."""
        self._cancel_resume()
        if not self._running:
            return
        self._running = False
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())

    def close(self) -> None:
        """Pauses for good and gives the reserve descriptor back. The listeners stay open."""
        self.pause()
        if self._reserve >= 0:
            os.close(self._reserve)
            self._reserve = -1

    def accept_rest(self) -> None:
        """Takes who waits in the backlogs now: closing a listener would reset them."""
        for listener in self._listeners:
            for _ in range(REST):
                try:
                    sock, address = listener.accept()
                except ConnectionAbortedError:
                    continue
                except OSError:
                    break
                self._give(sock, address)

    @property
    def is_starved(self) -> bool:
        """Whether an accept failed for want of descriptors within the last STARVED_S."""
        return self._starved and self._loop.time() - self._starved_at < STARVED_S

    def _cancel_resume(self) -> None:
        if self._resume_handle is not None:
            self._resume_handle.cancel()
            self._resume_handle = None

    def _on_readable(self, listener: socket.socket) -> None:
        for _ in range(BATCH):
            if not self._running:
                return
            try:
                sock, address = listener.accept()
            except OSError as error:
                if error.errno in _TRY_LATER:
                    return
                if error.errno in _OUT_OF_DESCRIPTORS:
                    self._on_starved(listener, error)
                    return
                # The connection died in the backlog (ECONNABORTED, or a network error of its own: accept(2)).
                continue
            self._starved = False
            self._give(sock, address)

    def _give(self, sock: socket.socket, address: object) -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BUFFER_BYTES)
        self._on_accept(sock, address)

    def _on_starved(self, listener: socket.socket, error: OSError) -> None:
        self._starved_at = self._loop.time()
        if not self._starved:
            self._starved = True
            self._log.error("accept_starved", error=error.strerror, retry_ms=int(PAUSE_S * 1000))
        self._shed_one(listener)
        self.pause()
        self._resume_handle = self._loop.call_later(PAUSE_S, self.resume)

    def _shed_one(self, listener: socket.socket) -> None:
        """Tells one waiting TCP client that we are full, with the descriptor kept for it, instead of letting it hang.
        Its request is not read: the id is a new one, and the log has it with the peer.

        Not on a Unix listener: another worker that has descriptors accepts there too.
        """
        if self._reserve < 0 or listener.family == socket.AF_UNIX:
            return
        os.close(self._reserve)
        self._reserve = -1
        try:
            sock, address = listener.accept()
            with sock:
                sock.setblocking(False)
                request_id = new_request_id()
                sock.send(_SHED % (request_id.encode(), request_id.encode()))
                sock.shutdown(socket.SHUT_WR)
                self._log.warning("connection_shed", request_id=request_id, peer=address[0])
        except OSError:
            # Nobody waits any more, or the descriptor went to somebody else meanwhile.
            pass
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # Taken by another thread or process (ENFILE): without a reserve clients wait in the backlog.
            pass
