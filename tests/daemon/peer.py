"""An upstream that does exactly what it is told on a raw connection: any bytes, any cut, any end.

Owns: accepting, reading requests, remembering connections. Unlike harness.Upstream a script gets the connection as soon
as it is accepted, so it can misbehave before a request was read. Must not know what a test wants to see.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable

LINGER_ZERO = b"\1\0\0\0\0\0\0\0"


class Line:
    """One accepted connection. `gone` is set when the script ended or the other side closed."""

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number
        self.gone = threading.Event()
        self.data = b""
        self.head = b""
        self.body = b""

    def read_head(self) -> bool:
        """The next request's head into `head`; False at the end of the connection."""
        while b"\r\n\r\n" not in self.data:
            more = self.sock.recv(65536)
            if not more:
                return False
            self.data += more
        self.head, _, self.data = self.data.partition(b"\r\n\r\n")
        return True

    def read_body(self) -> bool:
        length = 0
        for line in self.head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        parts = [self.data]
        have = len(self.data)
        while have < length:
            more = self.sock.recv(1 << 20)
            if not more:
                return False
            parts.append(more)
            have += len(more)
        whole = b"".join(parts)
        self.body, self.data = whole[:length], whole[length:]
        return True

    def read_request(self) -> bool:
        return self.read_head() and self.read_body()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(data), data))

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
        self.sock.close()

    def end(self) -> None:
        """Both directions, from whatever thread; a script that waits on the connection goes on."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def wait_end(self, seconds: float = 15.0) -> bool:
        """Reads nothing; True when the other side closed or reset within `seconds`."""
        poller = select.poll()
        poller.register(self.sock, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return bool(poller.poll(seconds * 1000))


Play = Callable[[Line], object]


class Peer:
    """A listener whose every connection runs `play`, in a thread of its own; what `play` raises ends the connection."""

    def __init__(self, play: Play, *, receive_buffer: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.play = play
        self._tls = tls
        self.lines: list[Line] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        if receive_buffer:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.port = int(self._listener.getsockname()[1])
        self._stopping = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._stopping = True
        # A close alone would leave a blocked accept() waiting, and the port listening.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in list(self.lines):
            line.end()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line = Line(sock, len(self.lines) + 1)
            self.lines.append(line)
            threading.Thread(target=self._run, args=(line,), daemon=True).start()

    def _run(self, line: Line) -> None:
        try:
            if self._tls is not None:
                line.sock = self._tls.wrap_socket(line.sock, server_side=True)
            self.play(line)
        except (OSError, ValueError):
            pass
        finally:
            line.sock.close()
            line.gone.set()


def trickle(sock: socket.socket, pieces: list[bytes], gap: float = 0.0) -> None:
    """Each piece in a write of its own; `gap` seconds between them."""
    for piece in pieces:
        sock.sendall(piece)
        if gap:
            time.sleep(gap)
