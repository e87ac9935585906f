"""A daemon with upstreams that do what a test says, request by request.

`odd` stands alone behind every model name; pairs `NAME-a`, `NAME-b` (each test its own, so that no breaker remembers
another test) stand behind the model NAME. Rows are found by the user, of which each request has its own. Import
`running_stage` and `stage_at_rest` to have the fixtures `running` and `stage`.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    Daemon,
    Reply,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    request_bytes,
    upstream_text,
    wait_for,
)  # fmt: skip
from tests.daemon.peer import Line, Peer

PAIRS = ("over502", "over503", "over504", "over529", "passed", "breaker", "silent", "stale", "budget", "dead")
TIMES = """max_connections = 64
max_idle = 16
connect_timeout = "2s"
first_byte_timeout = "3s"
idle_timeout = "700ms"
total_timeout = "20s"
"""
PATH = "/v1/chat/completions"
SSE = b"Content-Type: text/event-stream\r\n"
BODY = chat_chunk("hello") + FINISH + DONE
GOOD = b"HTTP/1.1 200 OK\r\n" + SSE + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def whole(status: int, document: Any, more: bytes = b"") -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (
        status,
        more,
        len(body),
        body,
    )


class Stage:
    """The daemon, and two upstreams that do what `a` and `b` say."""

    def __init__(self, folder: Path) -> None:
        self.users = itertools.count(100)
        self.a: Callable[[Line], object] = self.well
        self.b: Callable[[Line], object] = self.well
        self.peers = {"a": Peer(lambda line: self.a(line)), "b": Peer(lambda line: self.b(line))}
        gone = free_port()
        text = upstream_text(self.peers["a"].url + "/v1", name="odd", more=TIMES)
        for pair in PAIRS:
            first = f"http://127.0.0.1:{gone}" if pair == "dead" else self.peers["a"].url
            text += upstream_text(first + "/v1", name=f"{pair}-a", more=TIMES)
            text += upstream_text(self.peers["b"].url + "/v1", name=f"{pair}-b", more=TIMES)
            text += model_text(pair, 10 + PAIRS.index(pair), json.dumps([f"{pair}-a", f"{pair}-b"]))
        text += upstream_text(f"http://127.0.0.1:{gone}/v1", name="gone", more=TIMES)
        text += model_text("main", 3, '["gone"]', 'fallback = "spare"')
        text += upstream_text(self.peers["b"].url + "/v1", name="busy", more=TIMES)
        text += model_text("busy", 5, '["busy"]', 'fallback = "spare"')
        text += model_text("spare", 4, '["odd"]', 'upstream_model = "spare-1"')
        text += upstream_text(self.peers["a"].url, name="claude", dialect="anthropic", more=TIMES)
        text += model_text("claude", 2, '["claude"]') + model_text("*", 1, '["odd"]')
        port = free_port()
        self.daemon = Daemon(folder, config_text(folder, port, text))
        self.daemon.port = port

    def well(self, line: Line) -> None:
        while line.read_request():
            line.send(GOOD)

    def begin(
        self, body: Any = CHAT, path: str = PATH, user: int | None = None, **headers: str
    ) -> tuple[socket.socket, int]:
        user = user or next(self.users)
        sock = self.daemon.connect()
        sock.settimeout(15)
        sock.sendall(request_bytes(path, body, self.daemon.token(user), **headers))
        return sock, user

    def ask(self, body: Any = CHAT, path: str = PATH, **headers: str) -> tuple[Reply, bytes, dict[str, Any]]:
        """(reply, body, row) of one request."""
        sock, user = self.begin(body, path, **headers)
        reply = Reply(sock)
        return reply, reply.body(), self.row(user)

    def hang_up(self) -> None:
        """Ends every upstream connection: the next ones run what `a` and `b` say then."""
        for peer in self.peers.values():
            for line in peer.lines:
                line.end()
        wait_for(lambda: self.daemon.metric("proxyd_upstream_connections") == 0)

    def row(self, user: int) -> dict[str, Any]:
        wait_for(lambda: [row for row in self.daemon.rows() if row["user_id"] == user])
        (row,) = [row for row in self.daemon.rows() if row["user_id"] == user]
        return row

    def connections(self, name: str = "a") -> int:
        return len(self.peers[name].lines)


@pytest.fixture(scope="module", name="running")
def running_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("answers"))
    try:
        stage.daemon.start()
        yield stage
        stage.daemon.close_clients()
        assert stage.daemon.stop() == 0
        assert "Traceback" not in stage.daemon.log()
    finally:
        for peer in stage.peers.values():
            peer.close()
        stage.daemon.close_clients()
        stage.daemon.kill()


@pytest.fixture(name="stage")
def stage_at_rest(running: Stage) -> Iterator[Stage]:
    """With nothing in the pools, and at rest again after the test."""
    yield running
    running.a = running.b = running.well
    running.daemon.close_clients()
    running.hang_up()
    wait_for(lambda: running.daemon.metric("proxyd_streams_active") == 0)


def answering(answer: bytes, into: list[bytes] | None = None) -> Callable[[Line], None]:
    def script(line: Line) -> None:
        while line.read_request():
            if into is not None:
                into.append(line.body)
            line.send(answer)

    return script
