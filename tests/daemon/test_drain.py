"""TERM: who may finish, who is ended when, what newcomers hear, and what is told of it."""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    node,
    request_bytes,
    upstream_text,
    wait_for,
)

Make = Callable[[Script], Upstream]


class Endless:
    """An upstream script that streams until it is released, then ends properly."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        while not self.go.wait(0.05):
            wire.chunk(chat_chunk("tick"))
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")


def stream(daemon: Daemon, name: str) -> Reply:
    """A stream that has begun."""
    reply = ask(daemon, "/v1/chat/completions", CHAT, X_Request_Id=name)
    assert reply.status == 200
    next(reply.pieces())
    return reply


def kept(daemon: Daemon) -> socket.socket:
    """A connection that had its first answer."""
    sock = daemon.connect()
    assert get(sock, "/healthz").status == 200
    return sock


def get(sock: socket.socket, path: str) -> Reply:
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    reply = Reply(sock)
    reply.body()
    return reply


def term(daemon: Daemon) -> float:
    assert daemon.process is not None
    began = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    return began


def ends(replies: dict[str, Reply]) -> list[tuple[str, float, bytes]]:
    """Each stream's name, when its connection ended and what came last, in the order of the ends."""
    looking = selectors.DefaultSelector()
    tail = dict.fromkeys(replies, b"")
    for name, reply in replies.items():
        looking.register(reply.sock, selectors.EVENT_READ, name)
    found = []
    while looking.get_map():
        for key, _ in looking.select(30):
            data = key.fileobj.recv(65536)  # type: ignore[union-attr]
            tail[key.data] = (tail[key.data] + data)[-2000:]
            if not data:
                looking.unregister(key.fileobj)
                found.append((key.data, time.monotonic(), tail[key.data]))
    return found


def reports(daemon: Daemon) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if '"drain_report"' in line]
    return [line for line in lines if line["event"] == "drain_report"]


def test_streams_are_ended_one_by_one_in_the_second_half_and_all_are_told(upstream: Make, tmp_path: Path) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='drain_timeout = "3s"') as daemon:
        names = [f"s{number}" for number in range(8)]
        replies = {}
        for name in names:
            replies[name] = stream(daemon, name)
            time.sleep(0.02)
        began = term(daemon)
        found = ends(replies)
        times = [at - began for _, at, _ in found]
        assert times[0] >= 1.5, times
        assert len({round(at, 1) for at in times}) >= 3, times
        assert all(b'"draining"' in tail for _, _, tail in found)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        (report,) = reports(daemon)
        assert (report["why"], report["running"], report["finished"], report["ended"]) == ("stopped", 8, 0, 8)
        assert report["dropped"] == 0
        assert [one["request_id"] for one in report["left"]] == names, "the one that runs longest goes first"
        assert set(report["left"][0]) == {"request_id", "route", "tenant", "upstream", "seconds"}
        assert {row["status"] for row in daemon.wait_rows(8)} == {"interrupted"}
        script.go.set()


def test_a_connection_that_is_kept_hears_at_once_that_the_node_leaves(upstream: Make, tmp_path: Path) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='drain_timeout = "60s"') as daemon:
        running = stream(daemon, "running")
        probe, asker = kept(daemon), kept(daemon)
        term(daemon)
        wait_for(lambda: '"draining"' in daemon.log())
        time.sleep(0.5)  # idle for a while: it is not closed before it could ask
        reply = get(probe, "/readyz")
        assert (reply.status, reply.header("connection")) == (503, "close")
        assert probe.recv(1) == b""
        asker.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        refused = Reply(asker)
        assert (refused.status, refused.header("connection")) == (503, "close")
        assert refused.header("retry-after")
        assert json.loads(refused.body())["error"]["code"] == "draining"
        script.go.set()
        assert running.body().endswith(DONE)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        (report,) = reports(daemon)
        assert (report["running"], report["finished"], report["ended"], report["left"]) == (1, 1, 0, [])


def test_a_drain_without_time_ends_all_at_its_end(upstream: Make, tmp_path: Path) -> None:
    """Streams with their error event, and who has no answer yet with 503."""
    script = Endless()

    def late(wire: Wire) -> None:
        if wire.seen.header("x-request-id") == "late":
            script.go.wait(30)
        else:
            script(wire)

    with node(tmp_path, upstream(late), server='drain_timeout = "500ms"') as daemon:
        replies = {f"s{number}": stream(daemon, f"s{number}") for number in range(3)}
        waiting = daemon.connect()
        waiting.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token(), X_Request_Id="late"))
        wait_for(lambda: daemon.metric("proxyd_streams_active") == 4)
        began = term(daemon)
        found = ends(replies)
        assert min(at for _, at, _ in found) - began >= 0.5
        assert all(b'"draining"' in tail for _, _, tail in found)
        refused = Reply(waiting)
        assert (refused.status, refused.header("connection")) == (503, "close")
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert "child_killed" not in daemon.log()
        (report,) = reports(daemon)
        assert [one["request_id"] for one in report["left"]] == ["s0", "s1", "s2", "late"]
        script.go.set()


def test_a_client_that_takes_nothing_does_not_hold_the_end(upstream: Make, tmp_path: Path) -> None:
    """Neither its stream nor a SIGKILL: it is cut, and named as dropped."""

    def flood(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        while True:
            wire.chunk(chat_chunk("x" * 30_000))

    with node(tmp_path, upstream(flood), server='drain_timeout = "200ms"') as daemon:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", daemon.port))
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        wait_for(lambda: daemon.metric("proxyd_backpressure_events_total") > 0)
        term(daemon)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        sock.close()
        (report,) = reports(daemon)
        assert (report["running"], report["dropped"]) == (1, 1)
        assert "child_killed" not in daemon.log()
        assert {row["status"] for row in daemon.wait_rows(1)} == {"interrupted"}


@pytest.mark.parametrize("workers", [1, 3])
def test_newcomers_are_told_to_come_back_for_as_long_as_it_takes(upstream: Make, tmp_path: Path, workers: int) -> None:
    """Over TCP and a Unix socket, also those whom the kernel gave to a worker that had nothing to wait for."""
    script = Endless()
    path = tmp_path / "public.sock"
    port = free_port()
    server = f'listen = ["127.0.0.1:{port}", "unix:{path}"]\nworkers = {workers}\ndrain_timeout = "60s"'
    text = upstream_text(upstream(script).url + "/v1") + model_text("*", 1, '["openai"]')
    daemon = Daemon(tmp_path, config_text(tmp_path, port, text, server=server))
    daemon.port = port
    with contextlib.ExitStack() as stack:
        stack.callback(daemon.kill)
        stack.callback(daemon.close_clients)
        daemon.start()
        running = stream(daemon, "running")
        term(daemon)
        wait_for(lambda: '"draining"' in daemon.log())
        time.sleep(0.5)
        for number in range(24):
            if number % 2:
                sock = daemon.connect()
            else:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(10)
                sock.connect(str(path))
            with sock:
                reply = get(sock, "/readyz")
                assert (reply.status, reply.header("connection")) == (503, "close")
        with daemon.connect() as sock:
            sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
            refused = Reply(sock)
            assert refused.status == 503
            assert refused.header("retry-after")
        script.go.set()
        assert running.body().endswith(DONE)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert not path.exists()
        with pytest.raises(ConnectionRefusedError):
            daemon.connect()
