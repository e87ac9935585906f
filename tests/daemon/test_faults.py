"""Every phase of a request, and every way it can go wrong there, through the running daemon.

The tests of phases are generated: WAITING says how to bring a request into each phase of `relay/states.py` that waits
for anything, FAULTS what then happens, EXPECTED what must come of it. Two upstreams stand behind each phase: a patient
one, so that nothing but the fault can end the request, and a hasty one for the timeouts. Each test has a user of its
own, so its rows are found whatever the others do. After each: one row, gauges at rest, the node serves, the upstream's
connection is closed or back in the pool.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from proxyd.relay.states import Phase
from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    USAGE,
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
from tests.daemon.peer import LINGER_ZERO, Line, Peer

# Phases that begin and end within one turn of the loop: nothing can happen to a request there.
PASSING = {Phase.ADMITTED, Phase.CHOOSING, Phase.FINISHED}
WAITING = [phase for phase in Phase if phase not in PASSING]

PATIENT = 'connect_timeout = "20s"\nfirst_byte_timeout = "20s"\nidle_timeout = "20s"\ntotal_timeout = "60s"\n'
HASTY = 'connect_timeout = "500ms"\nfirst_byte_timeout = "500ms"\nidle_timeout = "500ms"\ntotal_timeout = "20s"\n'

BIG = "x" * (6 << 20)  # more than the kernel takes on both sides for a peer that does not read
LONG = b"".join(chat_chunk("y" * 1000) for _ in range(330))  # more than a small client takes, less than [stream] buffer


@dataclass
class Scene:
    """One request in its phase: what the test holds of it."""

    phase: Phase
    user: int
    client: socket.socket
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)
    act: str = "stay"
    line: Line | None = None
    reply: Reply | None = None


def play(scene: Scene, line: Line) -> None:
    """The upstream's part: into the phase, then what `act` says once the test lets it."""
    scene.line = line
    if scene.phase is Phase.CONNECTING:
        line.sock.recv(65536)  # a TLS hello that gets no answer
    elif scene.phase is Phase.SENDING:
        line.read_head()
    else:
        line.read_request()
    if scene.phase is Phase.COLLECTING:
        line.send(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"choices": [')
    elif scene.phase is Phase.STREAMING:
        line.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        line.chunk(chat_chunk("hello"))
    elif scene.phase is Phase.ENDING:
        body = LONG + FINISH + USAGE + DONE
        line.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body))
        line.send(body)
    scene.reached.set()
    if scene.act == "stay":
        line.wait_end(30)
        return
    scene.go.wait(20)
    if scene.act == "reset":
        line.reset()


class Stage:
    """The daemon with a patient and a hasty upstream, plain and TLS, and the scenes being played."""

    def __init__(self, folder: Path, slow_client: str = "1s") -> None:
        self.folder = folder
        self.begun: list[Scene] = []
        self.users = itertools.count(100)
        self.lock = threading.Lock()
        self.next: Scene | None = None
        self.peer = Peer(self._play, receive_buffer=4096)
        port = free_port()
        text = ""
        for name, more in (("patient", PATIENT), ("hasty", HASTY)):
            text += upstream_text(self.peer.url + "/v1", name=name, more=more)
            text += upstream_text(f"https://127.0.0.1:{self.peer.port}/v1", name=f"{name}-tls", more=more)
        for number, name in enumerate(("patient", "patient-tls", "hasty", "hasty-tls"), 1):
            text += model_text(name, number, json.dumps([name]))
        config = config_text(
            folder,
            port,
            text,
            stream=f'slow_client_timeout = "{slow_client}"\nbuffer = "512KiB"',
            http="trusted_proxies = []",
        )
        self.daemon = Daemon(folder, config.replace('drain_timeout = "5s"', 'drain_timeout = "300ms"'))
        self.daemon.port = port

    def _play(self, line: Line) -> None:
        with self.lock:
            scene, self.next = self.next, None
        if scene is not None:
            play(scene, line)
        elif line.read_request():
            line.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(DONE))
            line.send(DONE)

    def begin(self, phase: Phase, *, hasty: bool = False, act: str = "stay") -> Scene:
        """A request of its own user, in `phase`."""
        client = socket.socket()
        if phase is Phase.ENDING:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(15)
        client.connect(("127.0.0.1", self.daemon.port))
        scene = Scene(phase, next(self.users), client, act=act)
        self.begun.append(scene)
        before = self.busy()
        self.next = scene
        model = ("hasty" if hasty else "patient") + ("-tls" if phase is Phase.CONNECTING else "")
        body: dict[str, Any] = {**CHAT, "model": model}
        path = "/v1/chat/completions"
        if phase is Phase.SENDING:
            body["messages"] = [{"role": "user", "content": BIG}]
        if phase is Phase.COLLECTING:
            path, body = "/api/v1/stream", {"prompt": "hi", "model": model}
        client.sendall(request_bytes(path, body, self.daemon.token(scene.user)))
        assert scene.reached.wait(15)
        if phase is Phase.STREAMING:
            scene.reply = Reply(client)
            assert next(scene.reply.pieces()) == chat_chunk("hello")
        elif phase is Phase.ENDING:
            # The upstream was read to its end, and what the client did not take waits in the daemon.
            wait_for(lambda: self.busy() == before)
        else:
            time.sleep(0.05)
        return scene

    def busy(self) -> float:
        return self.daemon.metric("proxyd_upstream_connections", state="busy") + self.daemon.metric(
            "proxyd_upstream_connections", state="connecting"
        )

    def row(self, user: int) -> dict[str, Any]:
        """The only row of this user."""
        wait_for(lambda: [row for row in self.daemon.rows() if row["user_id"] == user])
        (row,) = [row for row in self.daemon.rows() if row["user_id"] == user]
        return row

    def assert_at_rest(self, scene: Scene) -> None:
        """After a test: the gauges are down, and the node serves as if nothing had been."""
        scene.client.close()
        if scene.line is not None:
            # A connection that is in the pool now, or whose dial goes on: nobody would ever answer on it.
            scene.line.end()
        wait_for(lambda: self.daemon.metric("proxyd_streams_active") == 0)
        wait_for(lambda: self.busy() == 0)
        assert "Traceback" not in self.daemon.log()
        assert self.ask_plainly() == DONE

    def ask_plainly(self) -> bytes:
        with self.daemon.connect() as sock:
            body = {**CHAT, "model": "patient"}
            sock.sendall(request_bytes("/v1/chat/completions", body, self.daemon.token(99)))
            return Reply(sock).body()

    def close(self) -> None:
        self.peer.close()
        for scene in self.begun:
            scene.client.close()
        self.daemon.close_clients()
        self.daemon.kill()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("faults"))
    try:
        stage.daemon.start()
        yield stage
        stage.daemon.close_clients()
        assert stage.daemon.stop() == 0
        assert "Traceback" not in stage.daemon.log()
    finally:
        stage.close()


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
    sock.close()


def test_every_phase_of_the_table_is_tested_or_passes_within_a_turn() -> None:
    assert PASSING.isdisjoint(WAITING)
    assert PASSING | set(WAITING) == set(Phase)


@pytest.mark.parametrize("way", ["closes", "resets"])
@pytest.mark.parametrize("phase", WAITING, ids=lambda phase: phase.value)
def test_a_client_that_goes_in_any_phase_is_one_aborted_row_and_stops_the_upstream(
    phase: Phase, way: str, stage: Stage
) -> None:
    scene = stage.begin(phase)
    began = time.monotonic()
    if way == "resets":
        reset(scene.client)
    else:
        scene.client.close()
    row = stage.row(scene.user)
    assert row["status"] == "client_aborted"
    assert row["upstream"] == ("patient-tls" if phase is Phase.CONNECTING else "patient")
    if phase is Phase.CONNECTING:
        assert (row["prompt_tokens"], row["completion_tokens"]) == (0, 0)  # nothing was asked
    elif phase is Phase.ENDING:
        assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (11, 5, 0)
    else:
        assert row["prompt_tokens"] > 0
        assert row["estimated"] == 1
    assert scene.line is not None
    if phase not in (Phase.CONNECTING, Phase.ENDING):
        # CONNECTING: the dial ends in the pool; ENDING: the upstream is in the pool already.
        assert scene.line.gone.wait(10)
        assert time.monotonic() - began < 10
    stage.assert_at_rest(scene)


# What the client is told when the upstream goes: a status, "event" for an error event, None for nothing at all.
GONE = {
    Phase.CONNECTING: 502,
    Phase.SENDING: 502,
    Phase.AWAITING: 502,
    Phase.COLLECTING: 502,
    Phase.STREAMING: "event",
    Phase.ENDING: None,
}


def told(scene: Scene) -> tuple[int, bytes, bool]:
    """(status, the rest of the body, whether it ended cleanly)."""
    reply = scene.reply or Reply(scene.client)
    body = reply.body()
    return reply.status, body, reply.ended


@pytest.mark.parametrize("way", ["close", "reset"])
@pytest.mark.parametrize("phase", WAITING, ids=lambda phase: phase.value)
def test_an_upstream_that_goes_in_any_phase_is_told_once_and_booked_once(phase: Phase, way: str, stage: Stage) -> None:
    scene = stage.begin(phase, act=way)
    asked = len(stage.peer.lines)
    scene.go.set()
    status, body, ended = told(scene)
    row = stage.row(scene.user)
    wanted = GONE[phase]
    if wanted is None:
        assert (status, body.count(b"\n\n"), ended) == (200, 332, True)  # the hidden usage event is not among them
        assert row["status"] == "completed"
    elif wanted == "event":
        assert (status, ended) == (200, False)
        assert json.loads(body.removeprefix(b"data: "))["error"]["code"] == "upstream_broken"
        assert row["status"] == "upstream_error"
    else:
        assert (status, ended) == (wanted, True)
        assert json.loads(body)["error"]["type"] == "api_error"
        assert row["status"] == "upstream_error"
        assert row["attempts"] == 1
    assert len(stage.peer.lines) == asked  # nothing was asked a second time
    stage.assert_at_rest(scene)


STALLED = {
    Phase.CONNECTING: 504,
    Phase.SENDING: 504,
    Phase.AWAITING: 504,
    Phase.COLLECTING: 504,
    Phase.STREAMING: "event",
}


@pytest.mark.parametrize("phase", STALLED, ids=lambda phase: phase.value)
def test_an_upstream_that_stalls_in_any_phase_is_a_timeout(phase: Phase, stage: Stage) -> None:
    scene = stage.begin(phase, hasty=True)
    status, body, ended = told(scene)
    row = stage.row(scene.user)
    assert row["status"] == "timeout"
    assert row["attempts"] == 1
    if phase is Phase.STREAMING:
        assert (status, ended) == (200, False)
        assert json.loads(body.removeprefix(b"data: "))["error"]["code"] == "upstream_timeout"
    else:
        assert (status, ended) == (504, True)
        assert json.loads(body)["error"]["code"] == "upstream_timeout"
    assert scene.line is not None
    assert scene.line.gone.wait(10)
    stage.assert_at_rest(scene)


def test_a_client_that_stalls_while_its_answer_ends_is_dropped(stage: Stage) -> None:
    scene = stage.begin(Phase.ENDING)
    row = stage.row(scene.user)
    assert (row["status"], row["completion_tokens"], row["estimated"]) == ("client_aborted", 5, 0)
    stage.assert_at_rest(scene)


def test_a_request_id_of_somebody_we_do_not_trust_is_not_taken(stage: Stage) -> None:
    with stage.daemon.connect() as sock:
        body = {**CHAT, "model": "patient"}
        sock.sendall(request_bytes("/v1/chat/completions", body, stage.daemon.token(98), X_Request_Id="forged"))
        reply = Reply(sock)
        assert reply.body() == DONE
    ours = reply.header("x-proxyd-request-id")
    assert ours == reply.header("x-request-id") == stage.row(98)["request_id"] != "forged"
    assert b"forged" not in stage.peer.lines[-1].head


# -- TERM --------------------------------------------------------------------------------------------------------------


@dataclass
class Drained:
    """What came of one request in each phase, and of the node, when it was told to end."""

    rows: dict[Phase, dict[str, Any]]
    told: dict[Phase, tuple[int, bytes, bool] | None]
    code: int
    log: str


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drained]:
    stage = Stage(tmp_path_factory.mktemp("drained"), slow_client="30s")
    try:
        stage.daemon.start()
        scenes = {phase: stage.begin(phase) for phase in WAITING}
        answers: dict[Phase, tuple[int, bytes, bool] | None] = {}
        assert stage.daemon.process is not None
        stage.daemon.process.send_signal(signal.SIGTERM)
        for phase, scene in scenes.items():
            # ENDING takes nothing: its client is what the drain cannot finish.
            answers[phase] = None if phase is Phase.ENDING else told(scene)
        code = stage.daemon.process.wait(20)
        rows = {}
        for phase, scene in scenes.items():
            (rows[phase],) = [row for row in stage.daemon.rows() if row["user_id"] == scene.user]
        yield Drained(rows, answers, code, stage.daemon.log())
    finally:
        stage.close()


@pytest.mark.parametrize("phase", WAITING, ids=lambda phase: phase.value)
def test_a_drain_that_is_over_ends_every_phase_with_an_answer_and_one_row(phase: Phase, drained: Drained) -> None:
    assert drained.code == 0
    assert "Traceback" not in drained.log
    answer = drained.told[phase]
    assert drained.rows[phase]["status"] == "interrupted"
    if phase is Phase.ENDING:
        assert (drained.rows[phase]["completion_tokens"], drained.rows[phase]["estimated"]) == (5, 0)
    elif phase is Phase.STREAMING:
        assert answer is not None
        assert answer[0::2] == (200, False)
        assert json.loads(answer[1].removeprefix(b"data: "))["error"]["code"] == "draining"
    else:
        assert answer is not None
        assert answer[0::2] == (503, True)
        assert json.loads(answer[1])["error"]["code"] == "draining"
