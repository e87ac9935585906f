"""A reload crossed with every phase of a request: nobody who is served by the old workers notices.

HUP with an unchanged file is enough: a new generation comes, the old one retires.
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.daemon.harness import (
    CHAT,
    DONE,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    chat_chunk,
    node,
    request_bytes,
    wait_for,
)

Make = Callable[[Script], Upstream]
ANSWER = {
    "id": "x",
    "choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1},
}


class Held:
    """An upstream that answers at once, but for requests that say how it shall wait; `go` ends the waiting."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, wire: Wire) -> None:
        user = wire.seen.json.get("user")
        if user == "before":
            self.go.wait(30)
        if user == "stream":
            wire.head(transfer_encoding="chunked")
            while not self.go.wait(0.05):
                wire.chunk(chat_chunk("tick"))
            wire.chunk(DONE)
            wire.send(b"0\r\n\r\n")
        elif user == "large":
            wire.json({**ANSWER, "padding": "x" * 3_000_000})
        else:
            wire.json(ANSWER)


def chat(daemon: Daemon, user: str = "") -> bytes:
    body: dict[str, Any] = {**CHAT, "stream": user == "stream", "user": user}
    return request_bytes("/v1/chat/completions", body, daemon.token())


def kept(daemon: Daemon) -> socket.socket:
    sock = daemon.connect()
    sock.settimeout(20)
    assert answer(sock, chat(daemon)).status == 200
    return sock


def answer(sock: socket.socket, data: bytes) -> Reply:
    sock.sendall(data)
    reply = Reply(sock)
    reply.body()
    assert reply.ended
    return reply


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in daemon.log().splitlines() if f'"{name}"' in line]
    return [line for line in lines if line.get("event") == name]


def reload(daemon: Daemon, times: int = 1) -> None:
    """Returns when the old workers have their order."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(events(daemon, "retiring")) == times, 30)


def retired(daemon: Daemon, count: int = 1) -> list[dict[str, Any]]:
    """The reports of the retired workers, once there are `count`."""
    wait_for(lambda: len([one for one in events(daemon, "drain_report") if one["why"] == "retired"]) >= count, 30)
    return [one for one in events(daemon, "drain_report") if one["why"] == "retired"]


def test_each_phase_of_a_request_is_finished_by_whoever_has_it(upstream: Make, tmp_path: Path) -> None:
    held = Held()
    with node(tmp_path, upstream(held), server='drain_timeout = "60s"') as daemon:
        fresh, idle, half_head, half_body = daemon.connect(), kept(daemon), kept(daemon), kept(daemon)
        before, streaming, web = kept(daemon), kept(daemon), daemon.connect()
        large = socket.socket()
        large.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        large.connect(("127.0.0.1", daemon.port))
        assert answer(web, b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n").status == 200
        request = chat(daemon)
        half_probe = daemon.connect()
        half_probe.sendall(b"GET /readyz HTTP/1.1\r\nHo")
        half_head.sendall(request[:30])
        half_body.sendall(request[:-5])
        before.sendall(chat(daemon, "before"))
        streaming.sendall(chat(daemon, "stream"))
        stream = Reply(streaming)
        next(stream.pieces())
        large.sendall(chat(daemon, "large"))
        wait_for(lambda: daemon.metric("proxyd_streams_active") == 1)
        time.sleep(0.3)  # the halves have been read
        reload(daemon)

        for sock in (fresh, idle, web):  # handed over: they stay
            for _ in range(2):
                reply = answer(sock, request)
                assert (reply.status, reply.header("connection")) == (200, None)
        for sock, rest in ((half_head, request[30:]), (half_body, request[-5:])):
            reply = answer(sock, rest)
            assert (reply.status, reply.header("connection")) == (200, "close")
            assert sock.recv(1) == b""
        reply = answer(half_probe, b"st: test\r\n\r\n")
        assert (reply.status, reply.header("connection")) == (200, "close"), "the node is ready, and so it says"
        assert daemon.get("/readyz")[0] == 200
        reply = Reply(large)
        assert len(reply.body()) > 3_000_000
        held.go.set()
        reply = Reply(before)
        assert (reply.status, reply.header("connection")) == (200, "close")
        reply.body()
        assert stream.body().endswith(DONE)
        assert stream.ended
        assert stream.header("connection") is None
        assert answer(streaming, request).status == 200, "it had announced that it stays: it was handed over"
        large.close()
        (report,) = retired(daemon)
        assert (report["ended"], report["dropped"], report["left"]) == (0, 0, [])
        assert report["handed_over"] >= 4
        assert {line["status"] for line in daemon.access_log()} == {200}


def test_who_outlasts_the_drain_timeout_is_ended_with_an_error_event_and_not_before(
    upstream: Make, tmp_path: Path
) -> None:
    held = Held()
    with node(tmp_path, upstream(held), server='drain_timeout = "1s"') as daemon:
        streams = []
        for _ in range(3):
            sock = kept(daemon)
            sock.sendall(chat(daemon, "stream"))
            streams.append(Reply(sock))
        reload(daemon)
        for stream in streams:
            assert b'"draining"' in stream.body()
        (report,) = retired(daemon)
        assert report["took_s"] >= 1.0
        assert (report["running"], report["ended"], report["dropped"], len(report["left"])) == (3, 3, 0, 3)
        held.go.set()
        assert {row["status"] for row in daemon.wait_rows(6)} == {"completed", "interrupted"}


def test_a_term_ends_a_retiring_worker_too(upstream: Make, tmp_path: Path) -> None:
    held = Held()
    with node(tmp_path, upstream(held), server='drain_timeout = "1s"') as daemon:
        sock = kept(daemon)
        sock.sendall(chat(daemon, "stream"))
        stream = Reply(sock)
        reload(daemon)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        assert b'"draining"' in stream.body()
        assert daemon.process.wait(20) == 0
        assert {one["why"] for one in events(daemon, "drain_report")} == {"stopped"}
        held.go.set()


def test_requests_sent_at_the_very_moment_all_have_their_answers(upstream: Make, tmp_path: Path) -> None:
    """Clients that send their next request as soon as they have an answer, as nginx does; and some that never do."""
    workers = 2
    with node(tmp_path, upstream(Held()), server=f'workers = {workers}\ndrain_timeout = "60s"') as daemon:
        request, stop = chat(daemon), threading.Event()
        lost: list[BaseException] = []
        answers = [0] * 16

        def client(number: int) -> None:
            sock = None
            try:
                while not stop.is_set():
                    if sock is None:
                        sock = socket.create_connection(("127.0.0.1", daemon.port), 20)
                    reply = answer(sock, request)
                    assert reply.status == 200
                    answers[number] += 1
                    if reply.header("connection") == "close":
                        sock.close()
                        sock = None
                    time.sleep(0.003 * number)
            except BaseException as error:
                lost.append(error)
            finally:
                if sock is not None:
                    sock.close()

        clients = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for one in clients:
            one.start()
        try:
            for times in (1, 2, 3):
                reload(daemon, times * workers)
                retired(daemon, times * workers)
        finally:
            stop.set()
            for one in clients:
                one.join(30)
        assert lost == []
        assert min(answers) > 0
        assert sum(one["handed_over"] for one in retired(daemon)) > 0
        assert {line["status"] for line in daemon.access_log()} == {200}
