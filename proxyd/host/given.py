"""Sockets that listened before this daemon did: of a socket unit, or of the service manager's descriptor store.

Owns which of them is whose: each is matched by its own address, whatever name it came under. Must not know slots, nor
where the sockets come from. Invariants: a socket that is taken listens with our backlog and our clients' options, does
not block, and is closed by nobody here.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
from collections.abc import Iterable

from proxyd.host.binding import Address, ListenError, UnixListener, resolve, set_client_options, text


def take(address: Address, offered: list[socket.socket], backlog: int) -> list[socket.socket] | UnixListener | None:
    """The given sockets of an address, listening as ours do; None when there are none. Raises ListenError for such as
    cannot be listened on."""
    if address.kind == "unix":
        return _take_unix(address.path or "", offered, backlog)
    if not address.port:
        return None
    host, port = address.host or "", address.port
    family, name = resolve(host, port)
    socks = [sock for sock in offered if sock.family == family and sock.getsockname()[:2] == name[:2]]
    if not socks and name[0] == "0.0.0.0":  # noqa: S104  what the file says
        # systemd's ListenStream=3000 is [::]:3000 for both families, and then nobody else may bind the IPv4 port.
        socks = [sock for sock in offered if _is_for_both(sock, port)]
    if not socks:
        return None
    _check(socks, text(host, port))
    for sock in socks:
        set_client_options(sock)
        sock.listen(backlog)
    return socks


def _take_unix(path: str, offered: list[socket.socket], backlog: int) -> UnixListener | None:
    """Ours of an earlier life were bound as PATH.PID and renamed; the manager's under the path, which stays its own.
    One that no path leads to any more is not taken: nobody could connect to it."""
    pattern = re.compile(re.escape(path) + r"\.[0-9]+")
    for sock in offered:
        name = sock.getsockname() if sock.family == socket.AF_UNIX else ""
        is_ours = isinstance(name, str) and pattern.fullmatch(name) is not None
        if name != path and not is_ours:
            continue
        try:
            found = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISSOCK(found.st_mode):
            _check([sock], f"unix:{path}")
            sock.listen(backlog)  # also makes this process the one that SO_PEERCRED names
            return UnixListener.of(sock, path, found.st_ino if is_ours else 0)
    return None


def _is_for_both(sock: socket.socket, port: int) -> bool:
    return (
        sock.family == socket.AF_INET6
        and sock.getsockname()[:2] == ("::", port)
        and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    )


def _check(socks: Iterable[socket.socket], address: str) -> None:
    for sock in socks:
        if sock.type != socket.SOCK_STREAM:
            raise ListenError(errno.EPROTOTYPE, address, "the inherited socket is no stream socket (ListenStream=)")
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(errno.EINVAL, address, "the inherited socket does not listen (Accept=no is needed)")
        sock.setblocking(False)
