"""Upstream connections are few, reused and let go: no ephemeral port is spent that a pooled connection could save."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.daemon.harness import CHAT, DONE, Daemon, Reply, Script, Upstream, Wire, ask, node, request_bytes, wait_for

Make = Callable[[Script], Upstream]

ESTABLISHED, TIME_WAIT = "01", "06"
REQUESTS = 10_000
PER_CONNECTION = 100


def sockets_to(port: int) -> Counter[str]:
    """States of this host's sockets whose other end is `port`: our side of the upstream connections."""
    found: Counter[str] = Counter()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, _, remote, state = line.split()[:4]
        if int(remote.rpartition(":")[2], 16) == port:
            found[state] += 1
    return found


def time_wait_of_host() -> int:
    lines = Path("/proc/net/sockstat").read_text().splitlines()
    words = next(line for line in lines if line.startswith("TCP:")).split()
    return int(words[words.index("tw") + 1])


def sequence(daemon: Daemon, count: int) -> None:
    """`count` requests one after another, some on each client connection."""
    token = daemon.token()
    data = request_bytes("/v1/chat/completions", CHAT, token)
    for first in range(0, count, PER_CONNECTION):
        sock = daemon.connect()
        for _ in range(min(PER_CONNECTION, count - first)):
            sock.sendall(data)
            assert Reply(sock).body() == DONE
        daemon.close_clients()


def wave(daemon: Daemon, gate: Gate, count: int) -> None:
    """`count` streams at once, each on its own client connection."""
    gate.hold(count)
    clients = []
    for _ in range(count):
        sock = daemon.connect()
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        clients.append(sock)
    gate.release()
    for sock in clients:
        assert Reply(sock).body() == DONE


class Gate:
    """An upstream script that answers at once, or when as many requests came as hold() said."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._waiting = 0
        self._count = 0

    def hold(self, count: int) -> None:
        self._waiting, self._count = 0, count
        self._open.clear()

    def release(self) -> None:
        wait_for(lambda: self._waiting >= self._count, 20)
        self._open.set()

    def __call__(self, wire: Wire) -> None:
        self._waiting += 1
        assert self._open.wait(30)
        wire.stream(DONE)


def test_ten_thousand_requests_open_as_many_connections_as_were_needed_at_once(upstream: Make, tmp_path: Path) -> None:
    gate = Gate()
    up = upstream(gate)
    with node(tmp_path, up, server="workers = 2", log='access = "off"') as daemon:
        sequence(daemon, REQUESTS // 2)
        assert up.connections <= 2  # one a worker: each has its own pool
        wave(daemon, gate, 12)
        needed = up.connections
        assert 12 <= needed <= 14
        sequence(daemon, REQUESTS // 2)
        wave(daemon, gate, 4)
        # Which worker gets which client is the kernel's choice: a worker may need more in the second wave.
        assert up.connections <= needed + 4
        assert len(up.requests) == REQUESTS + 16
        assert daemon.metric("proxyd_upstream_connects_total") == up.connections
        assert daemon.metric("proxyd_upstream_reuse_ratio") > 0.99
        assert sockets_to(up.port)[TIME_WAIT] == 0
        assert sockets_to(up.port)[ESTABLISHED] == up.connections
        wait_for(lambda: time_wait_of_host() == daemon.metric("proxyd_sockets_time_wait") == time_wait_of_host())
        daemon.wait_rows(REQUESTS + 16, 60)


def test_idle_connections_are_closed_after_their_expiry(upstream: Make, tmp_path: Path) -> None:
    gate = Gate()
    up = upstream(gate)
    with node(tmp_path, up, more='idle_expiry = "500ms"') as daemon:
        wave(daemon, gate, 3)
        assert up.connections == 3
        wait_for(lambda: up.open == 0)
        assert daemon.metric("proxyd_upstream_connections", state="idle") == 0
        assert sockets_to(up.port)[TIME_WAIT] <= 3  # as many as expired, not as many as there were requests
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert up.connections == 4


def test_a_connection_older_than_max_age_is_replaced_between_requests(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, more='max_age = "600ms"') as daemon:
        until = time.monotonic() + 2.0
        asked = 0
        while time.monotonic() < until:
            sequence(daemon, 20)
            asked += 20
        assert 2 <= up.connections <= 1 + 2.0 / 0.6 + 1
        spans: dict[int, list[float]] = {}
        for seen in up.requests:
            spans.setdefault(seen.connection, []).append(seen.at)
        # Judged when it is taken: only the last request may begin as the age is reached.
        assert all(max(times) - min(times) < 1.5 for times in spans.values())
        assert len(up.requests) == asked
        assert up.open <= 1


def test_no_more_than_max_idle_connections_are_kept(upstream: Make, tmp_path: Path) -> None:
    gate = Gate()
    up = upstream(gate)
    with node(tmp_path, up, more="max_idle = 2") as daemon:
        wave(daemon, gate, 6)
        assert up.connections == 6
        wait_for(lambda: up.open == 2)
        wait_for(lambda: daemon.metric("proxyd_upstream_connections", state="idle") == 2)
        wave(daemon, gate, 2)
        assert up.connections == 6


def test_with_no_expiry_at_all_a_connection_serves_one_request(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, more='idle_expiry = "0s"') as daemon:
        sequence(daemon, 10)
        assert up.connections == 10
        wait_for(lambda: up.open == 0)


def test_an_upstream_that_refuses_keep_alive_is_asked_on_a_fresh_connection_each_time(
    upstream: Make, tmp_path: Path
) -> None:
    def script(wire: Wire) -> bool:
        match wire.seen.connection % 3:
            case 0:
                wire.head(content_length=str(len(DONE)), connection="close")
                wire.send(DONE)
            case 1:
                wire.head(transfer_encoding="chunked", connection="close")
                wire.chunk(DONE)
                wire.send(b"0\r\n\r\n")
            case _:
                wire.send(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + DONE)
        return False

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        sequence(daemon, 30)
        assert (up.connections, len(up.requests)) == (30, 30)
        wait_for(lambda: up.open == 0)
        assert {row["status"] for row in daemon.wait_rows(30)} == {"completed"}
        assert daemon.metric("proxyd_upstream_errors_total") == 0
        wait_for(lambda: daemon.metric("proxyd_upstream_connections") == 0)


def test_an_upstream_that_closes_idle_connections_costs_no_request(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> bool:
        wire.stream(DONE)  # promises keep-alive, and closes
        return False

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        sequence(daemon, 200)
        assert {row["status"] for row in daemon.wait_rows(200)} == {"completed"}
        assert daemon.metric("proxyd_streams_active") == 0


def test_cut_streams_give_their_ports_back(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: (wire.stream(b"data: 1\n\n", end=False), wire.wait_closed()))
    with node(tmp_path, up) as daemon:
        for _ in range(20):
            reply = ask(daemon, "/v1/chat/completions", CHAT)
            next(reply.pieces())
            daemon.close_clients()
        wait_for(lambda: up.open == 0)
        assert daemon.metric("proxyd_upstream_connections") == 0
        assert sockets_to(up.port)[ESTABLISHED] == 0
        assert len(daemon.wait_rows(20)) == 20
