"""What the tests of limits share: an upstream that counts who is with it, clients in threads, the node's gauges.

Owns: no limit and no assertion about one. Must not know how proxyd counts.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.daemon.harness import CHAT, DONE, FINISH, USAGE, Daemon, Reply, Wire, chat_chunk, request_bytes, wait_for

PATH = "/v1/chat/completions"
SPENT = 16  # what USAGE says


class House:
    """An upstream's script: a stream that begins at once and ends when `open` is set; it says something each `every`
    seconds until then. Counts who is in it."""

    def __init__(self, *, is_open: bool = False, every: float = 60.0) -> None:
        self._every = every
        self.open = threading.Event()
        if is_open:
            self.open.set()
        self.inside = self.most = self.seen = 0
        self._lock = threading.Lock()

    def __call__(self, wire: Wire) -> None:
        with self._lock:
            self.seen += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        is_out = False
        try:
            wire.head(transfer_encoding="chunked")
            wire.chunk(chat_chunk("hello"))
            until = time.monotonic() + 60
            while not self.open.wait(self._every) and time.monotonic() < until:
                wire.chunk(chat_chunk("."))
            for piece in (FINISH, USAGE, DONE):
                wire.chunk(piece)
            # Before the last byte: the proxy may send the next request as soon as it has that.
            self._leave()
            is_out = True
            wire.send(b"0\r\n\r\n")
        finally:
            if not is_out:
                self._leave()

    def has_seen(self, count: int) -> bool:
        return self.seen == count

    def _leave(self) -> None:
        with self._lock:
            self.inside -= 1


@dataclass
class Answer:
    """What one request came to, and the instants between which it was answered."""

    status: int
    sent_at: float
    ended_at: float
    code: str = ""
    retry_after: int | None = None
    should_retry: str | None = None
    body: bytes = b""
    is_whole: bool = False


def send(daemon: Daemon, token: str, body: dict[str, Any] | None = None, path: str = PATH) -> socket.socket:
    sock = daemon.connect()
    sock.settimeout(60)
    sock.sendall(request_bytes(path, CHAT if body is None else body, token))
    return sock


def finish(sock: socket.socket, sent_at: float = 0.0) -> Answer:
    """Reads the answer to its end. A connection that breaks is status 0."""
    try:
        reply = Reply(sock)
        body = reply.body()
    except OSError:
        return Answer(0, sent_at, time.monotonic())
    answer = Answer(reply.status, sent_at, time.monotonic(), body=body, is_whole=reply.ended)
    retry_after = reply.header("retry-after")
    answer.retry_after = None if retry_after is None else int(retry_after)
    answer.should_retry = reply.header("x-should-retry")
    if reply.status >= 400:
        with contextlib.suppress(ValueError):  # cut off
            answer.code = json.loads(body)["error"].get("code", "")
    return answer


def request(daemon: Daemon, token: str, body: dict[str, Any] | None = None, path: str = PATH) -> Answer:
    sent_at = time.monotonic()
    with send(daemon, token, body, path) as sock:
        return finish(sock, sent_at)


def side_by_side(count: int, what: Callable[[int], Any]) -> list[Any]:
    """what(0) ... what(count - 1), each in a thread, begun together; their results by number."""
    results: list[Any] = [None] * count
    together = threading.Barrier(count)

    def run(number: int) -> None:
        together.wait(30)
        results[number] = what(number)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a client still waits"
    return results


def limits_of(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(daemon.admin("/status")[1])["limits"]
    return found


def gauges(daemon: Daemon) -> tuple[int, int, int, float]:
    """(held, running, permits, streams active): all 0 when nothing is under way."""
    limits = limits_of(daemon)
    return limits["held"], limits["running"], limits["permits"], daemon.metric("proxyd_streams_active")


def wait_until_nothing_is_held(daemon: Daemon, seconds: float = 20.0) -> None:
    def is_idle() -> bool:
        try:
            return gauges(daemon) == (0, 0, 0, 0)
        except OSError:  # the worker that answered was killed
            return False

    wait_for(is_idle, seconds, every=0.05)


def quota_decisions(daemon: Daemon) -> tuple[int, int]:
    """How many rested on the store, and on local knowledge."""
    name = "proxyd_quota_decisions_total"
    return int(daemon.metric(name, basis="store")), int(daemon.metric(name, basis="local"))
