"""A TCP proxy before MariaDB that cuts connections where it hurts.

Owns: a listener on a free port, two threads a connection, the frames of MySQL's protocol (3 bytes length, 1 byte
sequence number, payload; a client's payload begins with its command, 3 for a query). Must not know: what the client is.

    with CutProxy(server.port) as proxy:
        proxy.cut_after_commit()     # the next COMMIT is answered by the server, and the answer never arrives
        proxy.cut_before_commit()    # the next COMMIT never reaches the server
        proxy.strand_at_commit()     # the next COMMIT is held back, the client is cut off, and the server goes on
                                     # believing in the connection until `release()`, which sends COMMIT after all
        proxy.at_commit(server.freeze)  # called with the next COMMIT in hand, which then goes on
        proxy.cut_at_random(0.01)    # each packet of either side: cut before, within or after it
        proxy.cut_all()              # now
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

_QUERY = 3


class CutProxy:
    """`commits`: COMMITs answered by the server; `cuts`: connections cut on purpose."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._pairs: set[_Pair] = set()
        self._stranded: list[tuple[_Pair, bytes]] = []
        self._after = self._before = self._strand = self._acts = 0
        self._act: Callable[[], object] = bool
        self._probability = 0.0
        self._random = random.Random(0)
        self._is_open = True
        self.commits = self.cuts = self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CutProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut_after_commit(self, times: int = 1) -> None:
        self._after = times

    def cut_before_commit(self, times: int = 1) -> None:
        self._before = times

    def strand_at_commit(self, times: int = 1) -> None:
        self._strand = times

    def at_commit(self, act: Callable[[], object], times: int = 1) -> None:
        self._act, self._acts = act, times

    def cut_at_random(self, probability: float, seed: int = 0) -> None:
        """0.0 ends it."""
        self._random = random.Random(seed)
        self._probability = probability

    @property
    def stranded(self) -> int:
        """Connections that only the server still believes in."""
        return len(self._stranded)

    def release(self) -> None:
        """The held COMMITs of stranded connections arrive at the server at last; then these connections end."""
        stranded, self._stranded = self._stranded, []
        for pair, packet in stranded:
            with contextlib.suppress(OSError):
                pair.server.sendall(packet)
                pair.server.shutdown(socket.SHUT_WR)
            pair.is_stranded = False  # whoever reads from the server closes at its end
            if pair.has_server_ended:
                pair.close()

    def cut_all(self) -> None:
        for pair in list(self._pairs):
            self._cut(pair)

    def close(self) -> None:
        self._is_open = False
        self._listener.close()
        self.cut_all()
        for pair, _ in self._stranded:
            pair.close()

    # -- decisions, under the lock -------------------------------------------------------------------------------------

    def _take(self, name: str) -> bool:
        with self._lock:
            left = getattr(self, name)
            if left:
                setattr(self, name, left - 1)
            return bool(left)

    def _cut(self, pair: _Pair) -> None:
        with self._lock:
            if pair in self._pairs:
                self._pairs.discard(pair)
                self.cuts += 1
        pair.close()

    def _is_unlucky(self, pair: _Pair, packet: bytes, onward: socket.socket) -> bool:
        """Cuts with the chosen probability, after some first part of the packet, or all of it, went on."""
        with self._lock:
            if not self._probability or self._random.random() >= self._probability:
                return False
            part = self._random.choice((0, self._random.randrange(len(packet)), len(packet)))
        with contextlib.suppress(OSError):
            onward.sendall(packet[:part])
        self._cut(pair)
        return True

    # -- the two directions --------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while self._is_open:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target, 10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            for sock in (client, server):  # each packet goes on by itself, and waits for no acknowledgement
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(client, server)
            self.connections += 1
            with self._lock:
                self._pairs.add(pair)
            threading.Thread(target=self._pump, args=(pair, self._from_client), daemon=True).start()
            threading.Thread(target=self._pump, args=(pair, self._from_server), daemon=True).start()

    def _pump(self, pair: _Pair, direction: Any) -> None:
        with contextlib.suppress(OSError):
            while direction(pair):
                pass
        pair.has_server_ended |= direction == self._from_server
        if not pair.is_stranded:
            with self._lock:
                self._pairs.discard(pair)
            pair.close()

    def _from_client(self, pair: _Pair) -> bool:
        packet = _packet(pair.client)
        if packet is None:
            return False
        is_commit = packet[4:5] == bytes([_QUERY]) and packet[5:].strip().upper().endswith(b"COMMIT")
        if is_commit and self._take("_before"):
            self._cut(pair)
            return False
        if is_commit and self._take("_strand"):
            pair.is_stranded = True
            with self._lock:
                self._pairs.discard(pair)
                self.cuts += 1
            self._stranded.append((pair, packet))
            _end(pair.client)
            return False
        if is_commit and self._take("_acts"):
            self._act()
        pair.is_committing = is_commit
        if self._is_unlucky(pair, packet, pair.server):
            return False
        pair.server.sendall(packet)
        return True

    def _from_server(self, pair: _Pair) -> bool:
        packet = _packet(pair.server)
        if packet is None:
            return False
        if pair.is_committing:
            pair.is_committing = False
            self.commits += 1
            if self._take("_after"):
                self._cut(pair)
                return False
        if pair.is_stranded:
            return True
        if self._is_unlucky(pair, packet, pair.client):
            return False
        pair.client.sendall(packet)
        return True


class _Pair:
    """A client and the server's side of it."""

    __slots__ = ("client", "has_server_ended", "is_committing", "is_stranded", "server")

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.is_committing = self.is_stranded = self.has_server_ended = False

    def close(self) -> None:
        _end(self.client)
        _end(self.server)


def _end(sock: socket.socket) -> None:
    """Closes for good, also what another thread waits on."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _packet(sock: socket.socket) -> bytes | None:
    """One packet with its header; None at the end."""
    head = _exactly(sock, 4)
    if head is None:
        return None
    body = _exactly(sock, int.from_bytes(head[:3], "little"))
    return None if body is None else head + body


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
