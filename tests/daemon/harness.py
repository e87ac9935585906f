"""The real daemon, a scripted upstream, and a raw client, for tests that drive processes.

Owns: starting `python -m proxyd -c FILE` on free ports in a temporary folder and ending it; an upstream in threads
that answers by script and remembers what it saw; reading rows, metrics, status. Nothing is fixed: no port, no path.
Kept in one file, long because all process tests share it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECRET = "test-secret-of-at-least-32-bytes-000"
KEY = "sk-upstream-key-that-must-never-travel-down"


def wait_for(what: Callable[[], Any], seconds: float = 10.0, every: float = 0.01) -> Any:
    """The first true value of what(), asked again and again; fails with AssertionError after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < until, f"still not true after {seconds} s: {what}"
        time.sleep(every)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


# -- the upstream ------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One request as the upstream got it, and what became of its connection."""

    connection: int
    head: bytes
    body: bytes
    at: float = field(default_factory=time.monotonic)
    closed_at: float | None = None

    @property
    def path(self) -> str:
        return self.head.split(b" ", 2)[1].decode()

    def header(self, name: str) -> str | None:
        for line in self.head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name.encode().lower():
                return value.strip().decode()
        return None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """What a script writes with: one connection of the upstream."""

    def __init__(self, sock: socket.socket, seen: Seen) -> None:
        self.sock = sock
        self.seen = seen

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def chunk(self, data: bytes) -> None:
        self.sock.sendall(b"%x\r\n%b\r\n" % (len(data), data))

    def head(self, status: int = 200, content_type: str = "text/event-stream", **more: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def stream(self, *pieces: bytes, gap: float = 0.0, end: bool = True) -> None:
        """A chunked 200 event stream of these pieces, each a chunk of its own."""
        self.head(transfer_encoding="chunked")
        for piece in pieces:
            self.chunk(piece)
            if gap:
                time.sleep(gap)
        if end:
            self.send(b"0\r\n\r\n")

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.head(status, "application/json", content_length=str(len(body)), **headers)
        self.send(body)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def wait_closed(self, seconds: float = 10.0) -> float:
        """Waits until the peer closes; the monotonic time of it."""
        self.sock.settimeout(seconds)
        with contextlib.suppress(ConnectionError):
            while self.sock.recv(65536):
                pass
        self.seen.closed_at = time.monotonic()
        return self.seen.closed_at


Script = Callable[[Wire], Any]


class Upstream:
    """An HTTP/1.1 server in threads. `script` answers each request; it may be replaced while the server runs.

    A script that returns leaves the connection open for the next request; one that returns False closes it.
    """

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Seen] = []
        self.connections = 0
        self.open = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = int(self._listener.getsockname()[1])
        self._stopping = False
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone leaves the port open while accept() waits
        self._listener.close()
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._stopping:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.connections += 1
                self.open += 1
                self._sockets.add(sock)
                number = self.connections
            threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        seen: Seen | None = None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            data = b""
            while True:
                while b"\r\n\r\n" not in data:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                head, _, data = data.partition(b"\r\n\r\n")
                length = 0
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                while len(data) < length:
                    more = sock.recv(65536)
                    if not more:
                        return
                    data += more
                seen = Seen(number, head, data[:length])
                data = data[length:]
                with self._lock:
                    self.requests.append(seen)
                if self.script(Wire(sock, seen)) is False:
                    return
        except OSError:
            pass
        finally:
            if seen is not None and seen.closed_at is None:
                seen.closed_at = time.monotonic()
            sock.close()
            with self._lock:
                self.open -= 1
                self._sockets.discard(sock)


# -- the daemon --------------------------------------------------------------------------------------------------------


class Daemon:
    """`python -m proxyd` with a configuration made for the test."""

    def __init__(self, folder: Path, config: str, environ: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.config = folder / "proxyd.toml"
        self.config.write_text(config)
        self.log_path = folder / "log.txt"
        self.environ = {**os.environ, "UPSTREAM_KEY": KEY, "PYTHONUNBUFFERED": "1", **(environ or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "proxyd", "-c", str(self.config)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=self.environ,
            )
        wait_for(self._is_ready, 30)

    def _is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("/readyz")[0] == 200
        return False

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 20.0) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """For tests that failed: nothing may stay."""
        if self.process is None:
            return
        for pid in [self.process.pid, *self.children()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def children(self) -> list[int]:
        assert self.process is not None
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def child(self, title: str, seconds: float = 20.0) -> int:
        """The pid of the child whose process title begins with `proxyd: title`; a young one has none for a moment."""
        until = time.monotonic() + seconds
        while True:
            for pid in self.children():
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"proxyd: " + title.encode()):
                        return pid
            assert time.monotonic() < until, f"no child {title!r}"
            time.sleep(0.01)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def access_log(self) -> list[dict[str, Any]]:
        """The request lines of the log."""
        lines = []
        for line in self.log().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if "route" in entry:
                    lines.append(entry)
        return lines

    def token(self, user: int = 7, **claims: Any) -> str:
        from jose import jwt

        now = int(time.time())
        return str(jwt.encode({"sub": str(user), "exp": now + 3600, "iat": now, **claims}, SECRET, "HS256"))

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets.append(sock)
        return sock

    def close_clients(self) -> None:
        """Closes every socket that connect() made."""
        while self._sockets:
            self._sockets.pop().close()

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def admin(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes]:
        """Asks the admin socket."""
        connection = http.client.HTTPConnection("localhost", timeout=10)
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(10)
        sock.connect(str(self.folder / "admin.sock"))
        connection.sock = sock
        try:
            connection.request(method, path, body=body, headers={"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that carry these labels."""
        from prometheus_client.parser import text_string_to_metric_families

        total = 0.0
        for family in text_string_to_metric_families(self.admin("/metrics")[1].decode()):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def rows(self) -> list[dict[str, Any]]:
        """All rows of sys_ai_transactions, oldest first."""
        path = self.folder / "telemetry.db"
        if not path.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as db:
            db.row_factory = sqlite3.Row
            with contextlib.suppress(sqlite3.OperationalError):
                return [dict(row) for row in db.execute("SELECT * FROM sys_ai_transactions ORDER BY transaction_id")]
        return []

    def wait_rows(self, count: int, seconds: float = 15.0) -> list[dict[str, Any]]:
        """The rows, once there are `count`; more than that is a failure at once."""
        wait_for(lambda: len(self.rows()) >= count, seconds)
        time.sleep(0.15)
        rows = self.rows()
        assert len(rows) == count, rows
        return rows


def config_text(folder: Path, port: int, upstreams: str, **changes: str) -> str:
    """A complete configuration; `changes` are lines per section, for example stream='heartbeat = "1s"'; they go before
    the defaults of the test."""
    (folder / "jwt.secret").write_text(SECRET)
    (folder / "jwt.secret").chmod(0o600)
    sections = {
        "server": f'''listen = ["127.0.0.1:{port}"]
admin = "unix:{folder}/admin.sock"
state_dir = "{folder}"
runtime_dir = "{folder}"
drain_timeout = "5s"
''',
        "auth": f'secret_file = "{folder}/jwt.secret"\n',
        "telemetry": f'sink = "sqlite:///{folder}/telemetry.db"\nlinger = "10ms"\n',
        "log": "",
    }
    if "server" not in changes or "workers" not in changes["server"]:
        sections["server"] += "workers = 1\n"
    if any(word in changes.get("auth", "") for word in ("jwks_", "secret_", "mode")):
        sections["auth"] = ""
    for name, text in changes.items():
        set_anew = {line.partition("=")[0].strip() for line in text.splitlines()}
        kept = [line for line in sections.get(name, "").splitlines() if line.partition("=")[0].strip() not in set_anew]
        sections[name] = "\n".join([*kept, text, ""])
    return "\n".join(f"[{name}]\n{text}" for name, text in sections.items()) + "\n" + upstreams


def upstream_text(url: str, *, name: str = "openai", dialect: str = "openai", more: str = "") -> str:
    return f'''
[[upstream]]
name = "{name}"
dialect = "{dialect}"
url = "{url}"
api_key_env = "UPSTREAM_KEY"
{more}
'''


def model_text(name: str, number: int, upstreams: str, more: str = "") -> str:
    return f'''
[[model]]
name = "{name}"
id = {number}
upstreams = {upstreams}
{more}
'''


@contextlib.contextmanager
def node(
    folder: Path,
    *upstreams: Upstream,
    anthropic: Upstream | None = None,
    more: str = "",
    models: str = "",
    **changes: str,
) -> Iterator[Daemon]:
    """A running daemon: any model name goes to the OpenAI-dialect upstreams in order, "claude" to the Anthropic one."""
    port = free_port()
    text = ""
    names = []
    for index, upstream in enumerate(upstreams):
        name = "openai" if index == 0 else f"openai{index + 1}"
        names.append(name)
        text += upstream_text(upstream.url + "/v1", name=name, more=more)
    if anthropic is not None:
        text += upstream_text(anthropic.url, name="anthropic", dialect="anthropic", more=more)
        text += model_text("claude", 2, '["anthropic"]')
    text += models or model_text("*", 1, json.dumps(names) if names else '["anthropic"]')
    daemon = Daemon(folder, config_text(folder, port, text, **changes))
    daemon.port = port
    try:
        daemon.start()
        yield daemon
        daemon.close_clients()
        code = daemon.stop()
        assert code == 0, daemon.log()[-3000:]
        assert "Traceback" not in daemon.log(), daemon.log()[-5000:]
    finally:
        daemon.close_clients()
        daemon.kill()


# -- the client --------------------------------------------------------------------------------------------------------


class Reply:
    """An answer read from a raw socket: head parsed, body de-framed as it comes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._data = b""
        while b"\r\n\r\n" not in self._data:
            more = sock.recv(65536)
            if not more:
                raise ConnectionError(f"closed within the head: {self._data!r}")
            self._data += more
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers: list[tuple[str, str]] = []
        for line in lines[1:]:
            name, _, value = line.partition(":")
            self.headers.append((name.lower(), value.strip()))
        self.ended = False  # the end mark was seen: chunked's last chunk, or the full length

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def _more(self) -> bool:
        data = self.sock.recv(65536)
        self._data += data
        return bool(data)

    def pieces(self) -> Iterator[bytes]:
        """Payload as it comes; `ended` tells afterwards whether the framing was completed."""
        if (self.header("transfer-encoding") or "") == "chunked":
            while True:
                while b"\r\n" not in self._data:
                    if not self._more():
                        return
                line, _, self._data = self._data.partition(b"\r\n")
                size = int(line, 16)
                while len(self._data) < size + 2:
                    if not self._more():
                        return
                if size == 0:
                    self._data = self._data[2:]
                    self.ended = True
                    return
                piece, self._data = self._data[:size], self._data[size + 2 :]
                yield piece
        elif self.header("content-length") is not None:
            left = int(self.header("content-length") or 0)
            while left:
                if not self._data and not self._more():
                    return
                piece, self._data = self._data[:left], self._data[left:]
                left -= len(piece)
                yield piece
            self.ended = True
        else:
            while self._data or self._more():
                piece, self._data = self._data, b""
                yield piece

    def body(self) -> bytes:
        return b"".join(self.pieces())


def request_bytes(path: str, body: Any, token: str | None, version: str = "1.1", **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + data


def ask(daemon: Daemon, path: str, body: Any, **headers: str) -> Reply:
    """One request on a connection of its own, its answer's head read."""
    sock = daemon.connect()
    sock.sendall(request_bytes(path, body, headers.pop("token", None) or daemon.token(), **headers))
    return Reply(sock)


CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "Say hello"}]}


def chat_chunk(text: str = "hello", **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, **more}
    return (
        b"data: "
        + json.dumps({"id": "c", "object": "chat.completion.chunk", "model": "m-1", "choices": [choice]}).encode()
        + b"\n\n"
    )


FINISH = chat_chunk("", finish_reason="stop")
_COUNTS = b'{"prompt_tokens":11,"completion_tokens":5,"total_tokens":16}'
USAGE = b'data: {"id":"c","object":"chat.completion.chunk","model":"m-1","choices":[],"usage":' + _COUNTS + b"}\n\n"
DONE = b"data: [DONE]\n\n"
