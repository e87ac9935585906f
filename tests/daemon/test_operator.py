"""What an operator reads while something is wrong: events, access lines and status of a real node."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    Daemon,
    Reply,
    config_text,
    free_port,
    model_text,
    request_bytes,
    upstream_text,
    wait_for,
)
from tests.daemon.odd_stage import GOOD, whole
from tests.daemon.peer import Line, Peer

PATH = "/v1/chat/completions"


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    found = []
    for line in daemon.log().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry.get("event") == name:
            found.append(entry)
    return found


def status(daemon: Daemon) -> dict[str, Any]:
    return json.loads(daemon.admin("/status")[1])  # type: ignore[no-any-return]


def answer_well(line: Line) -> None:
    while line.read_request():
        line.send(GOOD)


class Node:
    """One daemon with one upstream at `port`, which may have nobody behind it."""

    def __init__(self, folder: Path, url: str) -> None:
        port = free_port()
        text = upstream_text(url, more='first_byte_timeout = "5s"') + model_text("*", 1, '["openai"]')
        self.daemon = Daemon(folder, config_text(folder, port, text, server="workers = 1\n"))
        self.daemon.port = port
        self.daemon.start()

    def ask(self, **headers: str) -> Reply:
        sock = self.daemon.connect()
        sock.settimeout(15)
        sock.sendall(request_bytes(PATH, CHAT, self.daemon.token(), **headers))
        reply = Reply(sock)
        reply.body()
        return reply


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Any]:
    made: list[Daemon] = []

    def make(url: str) -> Node:
        node = Node(tmp_path, url)
        made.append(node.daemon)
        return node

    yield make
    for daemon in made:
        daemon.close_clients()
        daemon.stop()


def test_an_only_upstream_that_is_down_is_an_event_and_not_healthy_in_status(nodes: Any) -> None:
    port = free_port()
    node = nodes(f"http://127.0.0.1:{port}/v1")
    assert {node.ask().status for _ in range(12)} == {502}
    (line,) = wait_for(lambda: events(node.daemon, "upstream_unreachable"))
    assert (line["upstream"], line["kind"], line["address"]) == ("openai", "refused", f"127.0.0.1:{port}")
    told = status(node.daemon)["upstreams"]["openai"]
    assert (told["breaker"], told["failing_kind"], told["errors"]) == ("failing", "refused", {"refused": 12})
    assert told["failing_since"] <= time.time()


def test_a_refused_key_is_an_event_with_its_number_and_the_line_has_the_provider_s_code(nodes: Any) -> None:
    refusal = {"error": {"type": "invalid_request_error", "code": "invalid_api_key", "message": "Incorrect: sk-secret"}}

    def play(line: Line) -> None:
        while line.read_request():
            line.send(whole(401, refusal) if answers.pop() else GOOD)

    answers = [False, True]
    peer = Peer(play)
    node = nodes(f"{peer.url}/v1")
    assert node.ask().status == 401
    (line,) = wait_for(lambda: events(node.daemon, "upstream_refuses_key"))
    assert (line["status"], line["key"]) == (401, "1 of 1")
    (access,) = wait_for(lambda: [line for line in node.daemon.access_log() if line["route"] == PATH])
    assert access["detail"] == "type=invalid_request_error code=invalid_api_key"
    assert "sk-secret" not in node.daemon.log()
    assert node.ask().status == 200
    peer.close()


def test_a_store_that_is_garbage_is_seen_while_running_and_told_once_more_at_the_end(
    nodes: Any, tmp_path: Path
) -> None:
    (tmp_path / "telemetry.db").write_bytes(b"this is not a database, " * 100)
    peer = Peer(answer_well)
    node = nodes(f"{peer.url}/v1")
    assert {node.ask().status for _ in range(3)} == {200}
    wait_for(lambda: status(node.daemon)["telemetry"]["state"] == "failing")
    store = status(node.daemon)["telemetry"]["store"]
    assert "not a database" in store["reason"]
    assert store["failing_since"] <= time.time()
    ready, body = node.daemon.get("/readyz")
    told = json.loads(body)["details"]
    assert (ready, told["telemetry"], told["store"]["reason"]) == (200, "failing", "file is not a database")
    before = len(events(node.daemon, "store_failed"))
    node.daemon.close_clients()
    node.daemon.stop()
    lines = events(node.daemon, "store_failed")[before:]
    assert len(lines) <= 12
    assert lines[-1]["retry_s"] is None
    assert sum(line["retry_s"] for line in lines[1:-1]) <= 5.1  # the first pause may be from before the TERM
    (last,) = events(node.daemon, "rows_left_in_spool")
    assert last["records"] == 3
    assert last["bytes"] > 0
    peer.close()


def test_a_second_daemon_on_one_state_dir_names_the_holder_and_takes_over(nodes: Any, tmp_path: Path) -> None:
    lock = (tmp_path / "telemetry.lock").open("w")
    lock.write("4242\n")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    peer = Peer(answer_well)
    node = nodes(f"{peer.url}/v1")
    (line,) = wait_for(lambda: events(node.daemon, "telemetry_waits_for_predecessor"))
    assert line["holder_pid"] == 4242
    assert node.ask().status == 200
    assert status(node.daemon)["telemetry"]["state"] == "waiting"
    lock.close()
    wait_for(lambda: events(node.daemon, "telemetry_took_over"))
    wait_for(lambda: status(node.daemon)["telemetry"]["rows"].get("stored") == 1)
    assert status(node.daemon)["telemetry"]["state"] == "ready"
    peer.close()


def test_a_term_to_the_whole_group_is_no_child_s_death(nodes: Any, tmp_path: Path) -> None:
    with (tmp_path / "telemetry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        peer = Peer(answer_well)
        node = nodes(f"{peer.url}/v1")
        wait_for(lambda: events(node.daemon, "telemetry_waits_for_predecessor"))
        assert node.daemon.process is not None
        for pid in (node.daemon.process.pid, *node.daemon.children()):
            os.kill(pid, signal.SIGTERM)
        assert node.daemon.process.wait(20) == 0
    assert not events(node.daemon, "child_died")
    assert len(events(node.daemon, "telemetry_waits_for_predecessor")) == 1
    peer.close()


def test_a_term_to_the_group_of_a_node_with_rows_stores_them_and_starts_nobody(nodes: Any, tmp_path: Path) -> None:
    peer = Peer(answer_well)
    node = nodes(f"{peer.url}/v1")
    assert {node.ask().status for _ in range(5)} == {200}
    node.daemon.close_clients()
    assert node.daemon.process is not None
    for pid in (node.daemon.process.pid, *node.daemon.children()):
        os.kill(pid, signal.SIGTERM)
    assert node.daemon.process.wait(20) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "telemetry.db")) as database:
        assert database.execute("SELECT count(*) FROM sys_ai_transactions").fetchone() == (5,)
    assert not [line for line in events(node.daemon, "child_died") if line["child"] == "telemetry"]
    peer.close()


def test_a_log_reopened_by_signal_says_so(nodes: Any) -> None:
    node = nodes("http://127.0.0.1:1/v1")
    assert node.daemon.process is not None
    os.kill(node.daemon.process.pid, signal.SIGUSR1)
    (line,) = wait_for(lambda: events(node.daemon, "logs_reopened"))
    assert line["processes"] == 3


def raw(node: Node, data: bytes) -> int:
    sock = node.daemon.connect()
    sock.settimeout(15)
    sock.sendall(data)
    reply = Reply(sock)
    reply.body()
    return reply.status


def test_what_was_refused_says_why_in_its_access_line(nodes: Any) -> None:
    node = nodes("http://127.0.0.1:1/v1")
    daemon = node.daemon
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n"
    wanted = {
        b"\x16\x03\x01\x02\x00": (400, "front", "rejected", "bad_request.tls_hello"),
        b"GET /healthz HTTP/1.1\r\n\r\n": (400, "front", "rejected", "bad_request.missing_host"),
        b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n": (
            400,
            "front",
            "rejected",
            "bad_request.bad_chunk",
        ),
        b"GET /v1/nothing HTTP/1.1\r\nHost: h\r\n\r\n": (404, "web", "rejected", "not_found"),
        b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n": (200, "web", "completed", "complete"),
        head + b"Authorization: Bearer no\r\n\r\n{}": (403, PATH, "rejected", "invalid_token.format"),
        head + b"Authorization: Bearer %b\r\n\r\n{}" % (daemon.token()[:-6] + "AAAAAA").encode(): (
            403,
            PATH,
            "rejected",
            "invalid_token.signature",
        ),
        head + b"Authorization: Bearer %b\r\n\r\n{}" % daemon.token(exp=1).encode(): (
            403,
            PATH,
            "rejected",
            "token_expired",
        ),
    }
    for data, (code, *_) in wanted.items():
        assert raw(node, data) == code, data
    cookie = b"Cookie: ai_session_jwt=%b\r\nOrigin: https://evil.example\r\n\r\n{}" % daemon.token().encode()
    assert raw(node, head + cookie) == 403
    lines = wait_for(lambda: [line for line in daemon.access_log() if line["status"] == 403 and "detail" in line])
    assert (lines[0]["cause"], lines[0]["detail"]) == ("origin_not_allowed", "origin=https://evil.example host=here")
    told = [(line["status"], line["route"], line["outcome"], line["cause"]) for line in daemon.access_log()]
    for expected in wanted.values():
        assert expected in told
