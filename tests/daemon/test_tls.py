"""Upstreams behind TLS: the same path, the same bytes; and what only TLS can do wrong.

One daemon with turns of 4 KiB, so that every full record is larger than a turn and its rest waits inside OpenSSL, where
no readiness tells of it. One TLS 1.3 and one TLS 1.2 upstream; certificates are made for the test.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.corpus_cases import Case, event_stream_cases
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
from tests.unit.upstream.conftest import Authority

PATH = "/v1/chat/completions"
SSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
CHUNKED = SSE + b"Transfer-Encoding: chunked\r\n\r\n"
RECORD = 16384
VERSIONS = ("tls13", "tls12")
CASES = [case for case in event_stream_cases("openai", "compat") if case.expected["api"] == "openai.chat"]
LIMITS = 'max_connections = 64\nmax_idle = 16\nidle_timeout = "10s"\n'


def sized(body: bytes) -> bytes:
    return SSE + b"Content-Length: %d\r\n\r\n" % len(body) + body


class Stage:
    """The daemon, a TLS 1.3 and a TLS 1.2 upstream that run `play`, and one that speaks no TLS."""

    def __init__(self, folder: Path) -> None:
        self.users = itertools.count(100)
        self.play: Callable[[Line], object] = self.well
        ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.peers: dict[str, Peer] = {}
        text = ""
        for number, name in enumerate(VERSIONS, 1):
            context = ours.server("localhost")
            if name == "tls12":
                context.maximum_version = ssl.TLSVersion.TLSv1_2
            self.peers[name] = Peer(lambda line: self.play(line), tls=context)
            text += self._upstream(name, "localhost", self.peers[name], ours) + model_text(name, number, f'["{name}"]')
        self.peers["plain"] = Peer(lambda line: self.play(line))
        for number, (name, host, peer, authority) in enumerate(
            (
                ("stranger", "localhost", "tls13", theirs),
                ("elsewhere", "127.0.0.1", "tls13", ours),
                ("plain", "localhost", "plain", ours),
            ),
            10,
        ):
            text += self._upstream(name, host, self.peers[peer], authority) + model_text(name, number, f'["{name}"]')
        port = free_port()
        stream = 'turn_bytes = "4KiB"\nbuffer = "64KiB"'
        self.daemon = Daemon(folder, config_text(folder, port, text, stream=stream))
        self.daemon.port = port

    @staticmethod
    def _upstream(name: str, host: str, peer: Peer, authority: Authority) -> str:
        more = f'{LIMITS}ca_file = "{authority.ca_file}"'
        return upstream_text(f"https://{host}:{peer.port}/v1", name=name, more=more)

    def well(self, line: Line) -> None:
        while line.read_request():
            line.send(sized(DONE))

    def begin(self, model: str, **more: Any) -> tuple[socket.socket, int]:
        user = next(self.users)
        sock = self.daemon.connect()
        sock.settimeout(20)
        body = {**CHAT, "model": model, "stream_options": {"include_usage": True}, **more}
        sock.sendall(request_bytes(PATH, body, self.daemon.token(user)))
        return sock, user

    def ask(self, model: str, **more: Any) -> tuple[Reply, bytes, dict[str, Any]]:
        sock, user = self.begin(model, **more)
        reply = Reply(sock)
        return reply, reply.body(), self.row(user)

    def row(self, user: int) -> dict[str, Any]:
        wait_for(lambda: [row for row in self.daemon.rows() if row["user_id"] == user])
        (row,) = [row for row in self.daemon.rows() if row["user_id"] == user]
        return row


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("tls"))
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


@pytest.fixture
def stage(running: Stage) -> Iterator[Stage]:
    """With empty pools, and at rest again after the test."""
    yield running
    running.daemon.close_clients()
    for peer in running.peers.values():
        for line in peer.lines:
            line.end()
    wait_for(lambda: running.daemon.metric("proxyd_upstream_connections") == 0)
    wait_for(lambda: running.daemon.metric("proxyd_streams_active") == 0)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.path)
def test_the_corpus_passes_byte_for_byte_over_tls(case: Case, version: str, stage: Stage) -> None:
    rng = random.Random(case.path)
    ways: list[tuple[bytes, list[bytes]]] = []
    body = case.body
    points = sorted(rng.sample(range(1, len(body)), min(40, len(body) - 1)))
    pieces = [body[a:b] for a, b in itertools.pairwise([0, *points, len(body)])]
    ways.append((CHUNKED, [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces] + [b"0\r\n\r\n"]))
    ways.append((SSE + b"Content-Length: %d\r\n\r\n" % len(body), pieces))
    ways.append((SSE + b"Connection: close\r\n\r\n", [body]))
    turns = iter(ways)

    def play(line: Line) -> None:
        while line.read_request():
            head, records = next(turns)
            line.send(head)
            for record in records:
                line.send(record)
            if b"close" in head:
                return

    stage.play = play
    for _ in ways:
        reply, got, row = stage.ask(version)
        assert (reply.status, got, reply.ended) == (200, body, True)
        assert row["status"] == ("completed" if case.expected["outcome"] == "completed" else "upstream_error")
        if case.expected["usage"]["total_tokens"] is not None:
            assert row["completion_tokens"] == case.expected["usage"]["completion_tokens"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_event_of_a_mebibyte_passes_whole(version: str, stage: Stage) -> None:
    body = chat_chunk("é" * (1 << 19)) + FINISH + DONE
    stage.play = lambda line: line.read_request() and line.send(sized(body))
    reply, got, row = stage.ask(version)
    assert (got == body, reply.ended, row["status"]) == (True, True, "completed")
    assert row["completion_tokens"] == 1 << 19  # o200k has no token of two of them


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("corked", [False, True], ids=["one by one", "many in a segment"])
def test_many_small_records_pass(version: str, corked: bool, stage: Stage) -> None:
    events = [chat_chunk(f"w{n} ") for n in range(3000)]

    def play(line: Line) -> None:
        line.read_request()
        line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, corked)
        line.send(CHUNKED)
        for event in events:
            line.chunk(event)
        line.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE))
        line.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
        line.wait_end(10)

    stage.play = play
    reply, got, row = stage.ask(version)
    assert (got == b"".join(events) + DONE, reply.ended) == (True, True)
    assert (row["status"], row["estimated"]) == ("completed", 1)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_record_larger_than_a_turn_leaves_nothing_inside_openssl(version: str, stage: Stage) -> None:
    event = chat_chunk("z" * 100)
    record = event * (RECORD // len(event))

    def play(line: Line) -> None:
        line.read_request()
        line.send(SSE + b"\r\n")
        line.send(record)
        line.wait_end(15)  # not a byte more: what is there must come by itself

    stage.play = play
    sock, _ = stage.begin(version)
    reply = Reply(sock)
    got = b""
    for piece in reply.pieces():
        got += piece
        if len(got) >= len(record):
            break
    assert got == record
    sock.close()
    assert stage.peers[version].lines[-1].gone.wait(5)  # a client that goes stops a TLS upstream, too


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_that_does_not_read_holds_a_tls_upstream_back_and_gets_every_byte_later(
    version: str, stage: Stage
) -> None:
    event = chat_chunk("x" * 2000)
    count = (24 << 20) // len(event)
    sent = [0]

    def play(line: Line) -> None:
        line.read_request()
        line.send(SSE + b"Content-Length: %d\r\n\r\n" % (count * len(event) + len(DONE)))
        block = event * 8  # about a record
        for _ in range(count // 8):
            line.send(block)
            sent[0] += len(block)
        line.send(event * (count % 8) + DONE)
        line.wait_end(10)

    stage.play = play
    before = stage.daemon.metric("proxyd_backpressure_events_total")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(20)
    sock.connect(("127.0.0.1", stage.daemon.port))
    user = next(stage.users)
    sock.sendall(request_bytes(PATH, {**CHAT, "model": version}, stage.daemon.token(user)))
    wait_for(lambda: stage.daemon.metric("proxyd_backpressure_events_total") > before)
    last = -1
    until = time.monotonic() + 10
    while sent[0] != last:
        assert time.monotonic() < until
        last = sent[0]
        time.sleep(0.3)
    assert sent[0] < 20 << 20
    left, first = count * len(event) + len(DONE), True
    for piece in Reply(sock).pieces():
        left -= len(piece)
        assert not first or piece.startswith(event[:100])
        first = False
    assert left == 0
    assert stage.row(user)["status"] == "completed"
    sock.close()


def test_a_close_without_close_notify_ends_what_the_framing_says(stage: Stage) -> None:
    body = chat_chunk("a") + FINISH + DONE

    def play(line: Line) -> None:
        # SSLSocket.close() sends no close_notify
        line.read_request()
        kind = json.loads(line.body)["messages"][0]["content"]
        if kind == "length":
            line.send(sized(body))
        elif kind == "close":
            line.send(SSE + b"\r\n" + body)
        else:
            line.send(CHUNKED)
            line.chunk(chat_chunk("a"))

    stage.play = play
    for kind in ("length", "close"):
        reply, got, row = stage.ask("tls13", messages=[{"role": "user", "content": kind}])
        assert (got, reply.ended, row["status"]) == (body, True, "completed")
    reply, got, row = stage.ask("tls13", messages=[{"role": "user", "content": "cut"}])
    assert (reply.ended, row["status"]) == (False, "upstream_error")
    assert got.startswith(chat_chunk("a") + b'data: {"error":')


@pytest.mark.parametrize("version", VERSIONS)
def test_a_connection_is_used_again_and_a_new_one_resumes_the_session(version: str, stage: Stage) -> None:
    resumed: list[bool | None] = []

    def play(line: Line) -> None:
        assert isinstance(line.sock, ssl.SSLSocket)
        resumed.append(line.sock.session_reused)
        while line.read_request():
            line.send(sized(DONE))

    stage.play = play
    before = len(stage.peers[version].lines)
    for _ in range(30):
        assert stage.ask(version)[1] == DONE
    assert len(stage.peers[version].lines) - before == 1
    stage.peers[version].lines[-1].end()
    wait_for(lambda: stage.daemon.metric("proxyd_upstream_connections") == 0)
    _, got, row = stage.ask(version)
    assert (got, row["attempts"]) == (DONE, 1)
    assert resumed[-1] is True
    assert len(stage.peers[version].lines) - before == 2


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("stranger", "certificate verify failed: unable to get local issuer certificate (host localhost)"),
        ("elsewhere", "certificate verify failed: "),
        ("plain", "(host localhost)"),
    ],
)
def test_an_upstream_that_cannot_be_trusted_is_a_502_and_a_plain_line(model: str, reason: str, stage: Stage) -> None:
    def play(line: Line) -> None:
        line.sock.recv(65536)
        line.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    stage.play = play
    reply, got, row = stage.ask(model)
    assert (reply.status, json.loads(got)["error"]["code"]) == (502, "upstream_tls")
    assert (row["status"], row["prompt_tokens"], row["upstream"]) == ("upstream_error", 0, model)
    (line,) = wait_for(lambda: [line for line in stage.daemon.access_log() if line.get("upstream") == model])
    assert reason in line["detail"]
    assert line["cause"] == "upstream_tls"
    assert "localhost" not in got.decode()  # the client is not told where it is


@pytest.mark.parametrize("version", VERSIONS)
def test_a_large_request_reaches_a_tls_upstream_whole(version: str, stage: Stage) -> None:
    stage.play = lambda line: line.read_request() and line.send(sized(DONE))
    prompt = "p" * (5 << 20)
    assert stage.ask(version, messages=[{"role": "user", "content": prompt}])[1] == DONE
    assert json.loads(stage.peers[version].lines[-1].body)["messages"][0]["content"] == prompt
