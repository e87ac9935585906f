"""Binding one address: TCP ports that several sockets share, and Unix paths of the living and of the dead.

Owns socket options and who may bind. Must not know which worker has which socket, HTTP, configuration or processes.

    TCP address    SO_REUSEPORT listeners, one a slot: the kernel spreads clients over them.
    Unix path      one listener. It is bound under a temporary name and renamed over the path, so there is no instant
                   without a socket and a stale file needs no unlinking.

Who may bind: SO_REUSEPORT would let a second daemon of the same user steal half of the connections in silence, so
each address is first tried without it. A Unix path that answers is refused while the process that listens there
lives; orphans of a killed master may still accept on it, and are recognised by SO_PEERCRED naming a dead process.
Errors: ListenError (EADDRINUSE, EACCES, EADDRNOTAVAIL ...) names the address; nothing stays open then.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from typing import Protocol

USER_TIMEOUT_MS = 30_000  # unacknowledged data or a zero window; half cuts phones in tunnels, twice doubles orphans
NOTSENT_LOWAT_BYTES = 16_384  # a client that stops reading is seen at 16 KB, not at 5 MB; half costs system calls
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3
UNIX_MODE = 0o660  # the reverse proxy joins our group; nobody else on the machine passes for a trusted proxy


class ListenError(OSError):
    """An address that cannot be had. `address` is as the configuration writes it; `strerror` tells the whole."""

    def __init__(self, code: int | None, address: str, why: str) -> None:
        super().__init__(code, f"cannot listen on {address}: {why}")
        self.address = address


class Address(Protocol):
    """What is read of a configured listen address (config.schema.Listen has these)."""

    @property
    def kind(self) -> str: ...
    @property
    def host(self) -> str | None: ...
    @property
    def port(self) -> int | None: ...
    @property
    def path(self) -> str | None: ...


def bind_tcp(host: str, port: int, count: int, backlog: int, *, is_ours: bool = False) -> list[socket.socket]:
    """`count` listeners that share one address and port. Port 0: they share the one the kernel chose. `is_ours`: this
    process listens on the port already, so nobody else can and it is not tried whether somebody does."""
    family, address = resolve(host, port)
    made: list[socket.socket] = []
    try:
        if not is_ours:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                _prepare(probe, family)
                probe.bind(address)
        for _ in range(count):
            listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            made.append(listener)
            _prepare(listener, family)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            set_client_options(listener)
            listener.bind(address)
            address = listener.getsockname()
        # Listening only when all are bound: else the first would take, and lose, connections on a failed start.
        for listener in made:
            listener.listen(backlog)
    except OSError as error:
        for listener in made:
            listener.close()
        raise ListenError(error.errno, text(host, port), os.strerror(error.errno or 0)) from error
    return made


def text(host: str, port: int) -> str:
    """As the configuration writes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def set_client_options(sock: socket.socket) -> None:
    """Options of a TCP client socket. Set on the listener: Linux copies every one of them to what it accepts, so
    accepting costs no system call for them (a test compares both)."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def _prepare(sock: socket.socket, family: int) -> None:
    # Else the TIME_WAIT of a previous life keeps the port for a minute.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        # [::]:3000 and 0.0.0.0:3000 are two addresses in the file; neither may take the other's port.
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)


def resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    """Family and address. Only numeric addresses and names of the local files; the first answer is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ListenError(errno.EADDRNOTAVAIL, text(host, port), error.strerror or "not an address") from error
    family, _, _, _, address = found[0]
    return family, address  # type: ignore[return-value]


class UnixListener:
    """One listening Unix socket and the path that leads to it. `inode` is the path's; 0: it is not ours to remove."""

    __slots__ = ("inode", "path", "sock")

    def __init__(self, path: str, backlog: int, mode: int = UNIX_MODE) -> None:
        refuse_live(path)
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        temporary = f"{path}.{os.getpid()}"
        try:
            try:
                os.unlink(temporary)
            except FileNotFoundError:
                pass
            self.sock.bind(temporary)
            try:
                os.chmod(temporary, mode)  # before listening: nobody connects under a wider mask
                self.sock.listen(backlog)
                self.inode = os.stat(temporary).st_ino
                os.rename(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
        except OSError as error:
            self.sock.close()
            raise ListenError(error.errno, f"unix:{path}", error.strerror or str(error)) from error

    @classmethod
    def of(cls, sock: socket.socket, path: str, inode: int) -> UnixListener:
        """One that listens already."""
        listener = cls.__new__(cls)
        listener.sock, listener.path, listener.inode = sock, path, inode
        return listener

    def unlink(self) -> None:
        """Removes the path if it still leads here; a successor's stays."""
        try:
            if self.inode and os.lstat(self.path).st_ino == self.inode:
                os.unlink(self.path)
        except OSError:
            pass


def refuse_live(path: str) -> None:
    """Raises OSError if the path is no socket, or if a living process listens there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(errno.EEXIST, f"unix:{path}", "the path is there and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            raise ListenError(errno.EADDRINUSE, f"unix:{path}", "in use, its backlog is full") from None
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    # The pid that called listen(): the master of whoever accepts there. 0 is a process outside our pid namespace.
    pid = struct.unpack("3i", credentials)[0]
    if pid == 0 or os.path.exists(f"/proc/{pid}"):
        raise ListenError(errno.EADDRINUSE, f"unix:{path}", f"in use by process {pid}")
