"""Listeners: made once in the master or inherited by it, and from it by the workers.

Owns which sockets a node listens on and which of them each slot accepts on. Must not know how an address is bound
(host/binding.py), HTTP, configuration or processes.

    TCP address    one listener per slot. It belongs to the slot, not to the worker: the master keeps it open, so what
                   waits in a dead worker's backlog is accepted by its successor.
    Unix path      one listener that all workers accept on.
    given          k sockets that the service manager or an earlier image bound, for N slots: slot i has socket j for
                   j % N == i; with fewer sockets than slots it has socket i % k, like a Unix path's.

A reload makes a second object (`renewed`) that has the same sockets for what stays. After it one of both is released:
the old one, or after a failed reload the new one. The rule for k and N holds there too: nobody's backlog is lost when
slots go, and it is served by those that remain.
Errors: ListenError (EADDRINUSE, EACCES, EADDRNOTAVAIL ...) names the address; nothing that was made stays open then.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from proxyd.host.binding import (
    KEEPALIVE_IDLE_S,
    KEEPALIVE_INTERVAL_S,
    KEEPALIVE_PROBES,
    NOTSENT_LOWAT_BYTES,
    USER_TIMEOUT_MS,
    Address,
    ListenError,
    UnixListener,
    bind_tcp,
    refuse_live,
    resolve,
    set_client_options,
    text,
)
from proxyd.host.given import take

__all__ = [
    "KEEPALIVE_IDLE_S", "KEEPALIVE_INTERVAL_S", "KEEPALIVE_PROBES", "NOTSENT_LOWAT_BYTES", "SOCKSTAT",
    "USER_TIMEOUT_MS", "Address", "ListenError", "Listeners", "UnixListener", "bind_tcp", "count_time_wait",
    "refuse_live", "set_client_options",
]  # fmt: skip

ADMIN_BACKLOG = 128
_ANYWHERE = ("0.0.0.0", "::")  # noqa: S104  they are looked for, not bound


@dataclass(slots=True)
class _Bound:
    """One address and its sockets. Compared by identity: two objects may share sockets, not what they are."""

    host: str
    port: int
    path: str
    socks: list[socket.socket]
    unix: UnixListener | None = None
    is_given: bool = False  # bound by somebody else: perhaps without SO_REUSEPORT, so no further one is bound beside it

    @property
    def text(self) -> str:
        return f"unix:{self.path}" if self.path else text(self.host, self.port)

    @property
    def told(self) -> str:
        """The text with the port that the kernel chose for port 0."""
        return self.text if self.path else text(self.host, _port(self))


class Listeners:
    """All listening sockets of the node, as the master holds them.

    `public[slot]` are a worker's own; `admin` are shared by all. A forked child inherits all of them. `given`: sockets
    that listen already, matched by their own address; what matches none is closed.
    """

    __slots__ = ("_admin", "_backlog", "_bound", "_is_stored", "_slots", "admin", "public")

    def __init__(
        self,
        listen: Sequence[Address],
        admin: Sequence[Address],
        slots: int,
        backlog: int,
        given: Iterable[socket.socket] = (),
    ) -> None:
        self._slots, self._backlog, self._is_stored = slots, backlog, False
        self._bound: list[_Bound] = []
        self._admin: list[_Bound] = []
        offered = list(given)
        try:
            for address in listen:
                self._bound.append(_given(address, offered, backlog) or _bind(address, slots, backlog))
            for address in admin:
                self._admin.append(_given(address, offered, ADMIN_BACKLOG) or _bind(address, 1, ADMIN_BACKLOG))
        except OSError:
            self._spread()
            self.unlink()
            self.close()
            raise
        finally:
            used = {sock for one in (*self._bound, *self._admin) for sock in one.socks}
            for sock in offered:
                if sock not in used:
                    sock.close()
        self._spread()

    def renewed(self, listen: Sequence[Address], slots: int, backlog: int) -> Listeners:
        """What a reload to these addresses, slots and backlog listens on; the admin listeners stay. This object is as
        it was, except that what both have is listened to with the new backlog; `release` of the new one undoes it."""
        new = Listeners.__new__(Listeners)
        new._slots, new._backlog, new._is_stored = slots, backlog, self._is_stored
        new._bound, new._admin = [], self._admin
        try:
            for address in listen:
                old = self._find(address)
                if old is None:
                    new._bound.append(_bind(address, slots, backlog, is_ours=self._overlaps(address)))
                    continue
                words = address.host or "", address.port or 0, address.path or ""
                kept = _Bound(*words, list(old.socks), old.unix, old.is_given)
                new._bound.append(kept)
                if not old.path and not old.is_given and len(old.socks) < slots:
                    kept.socks += bind_tcp(kept.host, _port(old), slots - len(old.socks), backlog, is_ours=True)
            if backlog != self._backlog:
                _listen_again(self._shared(new), backlog)
        except OSError:
            new._spread()
            new.release(self)
            raise
        new._spread()
        return new

    def release(self, keep: Listeners | None) -> None:
        """In the master: closes what `keep` does not have, and removes its Unix paths."""
        kept = set() if keep is None else {sock for one in keep._bound for sock in one.socks}
        if keep is not None:
            kept |= set(keep.admin)
            if keep._backlog != self._backlog:
                _listen_again(self._shared(keep), keep._backlog)
        for one in (*self._bound, *self._admin):
            if one.unix is not None and one.unix.sock not in kept:
                one.unix.unlink()
            for sock in one.socks:
                if sock not in kept:
                    sock.close()

    def _shared(self, other: Listeners) -> list[socket.socket]:
        theirs = {sock for one in other._bound for sock in one.socks}
        return [sock for one in self._bound for sock in one.socks if sock in theirs]

    def _find(self, address: Address) -> _Bound | None:
        """What listens there already: under the same words, or under others for the same address."""
        for one in self._bound:
            if (one.host, one.port, one.path) == (address.host or "", address.port or 0, address.path or ""):
                return one
        if address.kind != "unix" and address.port:
            family, name = resolve(address.host or "", address.port)
            for one in self._bound:
                if not one.path and one.socks[0].family == family and one.socks[0].getsockname()[:2] == name[:2]:
                    return one
        return None

    def _overlaps(self, address: Address) -> bool:
        """True if one of ours has the port at all interfaces, or is to have it at all while ours has it at one: then
        it cannot be tried whether somebody else has it, and nobody can."""
        if address.kind == "unix":
            return False
        hosts = {one.socks[0].getsockname()[0] for one in self._bound if not one.path and _port(one) == address.port}
        return bool(hosts) and (address.host in _ANYWHERE or not hosts.isdisjoint(_ANYWHERE))

    def _spread(self) -> None:
        """Who accepts on what; a socket that two addresses share is there once."""
        self.public: list[list[socket.socket]] = [[] for _ in range(self._slots)]
        for one in self._bound:
            count = len(one.socks)
            for slot, own in enumerate(self.public):
                mine = one.socks[slot :: self._slots] or [one.socks[slot % count]]
                own += [sock for sock in mine if sock not in own]
        self.admin: list[socket.socket] = [sock for one in self._admin for sock in one.socks]

    def of_slot(self, slot: int) -> list[socket.socket]:
        """What the slot's worker accepts on. It has the others' too, to stand in for a slot that cannot come back."""
        return self.public[slot]

    def tcp_of_slot(self, slot: int) -> list[socket.socket]:
        """The slot's own, without the shared Unix listeners."""
        return [sock for sock in self.public[slot] if sock.family != socket.AF_UNIX]

    def addresses(self) -> list[str]:
        """Where clients come in, as the configuration writes it, with the port that the kernel chose for port 0."""
        return [one.told for one in self._bound]

    def fds(self) -> list[int]:
        """All descriptors, each once: to be inheritable before execve."""
        return sorted({sock.fileno() for one in (*self._bound, *self._admin) for sock in one.socks})

    def named(self) -> dict[str, list[int]]:
        """The public listeners' descriptors by a name each address has for good: for the manager's descriptor store,
        whose names have neither colons nor more than 255 characters."""
        found: dict[str, list[int]] = {}
        for one in self._bound:
            words = re.sub(r"[^A-Za-z0-9._-]+", "_", one.told)[:100]
            fds = found.setdefault(f"listen-{words}-{zlib.crc32(one.told.encode()):08x}", [])
            fds += [sock.fileno() for sock in one.socks]
        return found

    def keep_stored(self) -> None:
        """The service manager holds them: from now on the end of this process removes no public path."""
        self._is_stored = True

    # --- across execve ---------------------------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """What `from_state` makes this of again, in plain JSON."""
        return {
            "slots": self._slots,
            "backlog": self._backlog,
            "stored": self._is_stored,
            "public": [_state(one) for one in self._bound],
            "admin": [_state(one) for one in self._admin],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Listeners:
        """In the image after execve: the same listeners, closed by the next one. Raises ValueError when a descriptor is
        no listening socket or the state is no such state; the descriptors are the caller's then."""
        new = cls.__new__(cls)
        made: dict[int, socket.socket] = {}
        try:
            new._slots, new._backlog = int(state["slots"]), int(state["backlog"])
            new._is_stored = bool(state["stored"])
            if new._slots < 1:
                raise ValueError(f"{new._slots} slots")
            new._bound = [_restore(one, made) for one in state["public"]]
            new._admin = [_restore(one, made) for one in state["admin"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            for sock in made.values():
                sock.detach()
            raise ValueError(f"listeners cannot be taken over: {type(error).__name__}: {error}") from error
        for sock in made.values():
            sock.set_inheritable(False)
            sock.setblocking(False)
        new._spread()
        return new

    # --- the end -------------------------------------------------------------------------------------------------

    def close_public(self, but: int | None = None) -> None:
        """In a process that accepts no more; `but`: or on no other slot's. A listener ends, and the kernel refuses
        newcomers, when the master and every worker closed it; the paths are the master's to remove."""
        kept = self.of_slot(but) if but is not None else []
        for one in self._bound:
            for sock in one.socks:
                if sock not in kept:
                    sock.close()

    def unlink_public(self) -> None:
        """In the master, at its end: nobody finds the Unix listeners any more. Not if they are kept for a
        successor."""
        for one in self._bound:
            if one.unix is not None and not self._is_stored:
                one.unix.unlink()

    def close(self) -> None:
        """Closes everything. In the master `unlink` comes first."""
        self.close_public()
        for one in self._admin:
            for sock in one.socks:
                sock.close()

    def unlink(self) -> None:
        """In the master, at its end."""
        self.unlink_public()
        for one in self._admin:
            if one.unix is not None:
                one.unix.unlink()


def _given(address: Address, offered: list[socket.socket], backlog: int) -> _Bound | None:
    found = take(address, offered, backlog)
    if found is None:
        return None
    if isinstance(found, UnixListener):
        return _Bound("", 0, found.path, [found.sock], found, is_given=True)
    return _Bound(address.host or "", address.port or 0, "", found, is_given=True)


def _port(one: _Bound) -> int:
    return int(one.socks[0].getsockname()[1])


def _bind(address: Address, count: int, backlog: int, *, is_ours: bool = False) -> _Bound:
    if address.kind == "unix":
        listener = UnixListener(address.path or "", backlog)
        return _Bound("", 0, listener.path, [listener.sock], listener)
    host, port = address.host or "", address.port or 0
    return _Bound(host, port, "", bind_tcp(host, port, count, backlog, is_ours=is_ours))


def _listen_again(socks: Iterable[socket.socket], backlog: int) -> None:
    """Another backlog for sockets that listen: what waits there stays."""
    for sock in socks:
        sock.listen(backlog)


# --- state -------------------------------------------------------------------------------------------------------


def _state(one: _Bound) -> dict[str, Any]:
    return {
        "host": one.host,
        "port": one.port,
        "path": one.path,
        "fds": [sock.fileno() for sock in one.socks],
        "inode": one.unix.inode if one.unix is not None else 0,
        "given": one.is_given,
    }


def _restore(state: dict[str, Any], made: dict[int, socket.socket]) -> _Bound:
    """`made`: sockets by descriptor, which two addresses may share."""
    socks = []
    for fd in state["fds"]:
        if fd not in made:
            made[fd] = socket.socket(fileno=fd)
        if not made[fd].getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"descriptor {fd} does not listen")
        socks.append(made[fd])
    if not socks:
        raise ValueError("an address without descriptors")
    path = str(state["path"])
    unix = UnixListener.of(socks[0], path, int(state["inode"])) if path else None
    return _Bound(str(state["host"]), int(state["port"]), path, socks, unix, bool(state["given"]))


# Not /proc/net, which is not there where only processes are visible (ProcSubset=pid of the shipped unit).
SOCKSTAT = "/proc/self/net/sockstat"


def count_time_wait(path: str = SOCKSTAT) -> int | None:
    """Sockets of this network namespace in TIME_WAIT (proc(5)); None where the kernel does not tell."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                words = line.split()
                if words[:1] == ["TCP:"] and "tw" in words:
                    return int(words[words.index("tw") + 1])
    except (OSError, ValueError, IndexError):
        pass
    return None
