"""What an operator reads while something is wrong: events, access lines and status of a real node."""

from __future__ import annotations

import json
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
