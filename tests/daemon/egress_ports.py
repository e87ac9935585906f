"""Local ports: a daemon, its upstream and its clients in a network namespace of their own, whose range is small.

    python -m tests.daemon.egress_ports [--requests 60000] [--ports 5000] [--clients 100] [SCENARIO ...]

Scenarios, all by default; each starts a daemon anew and fails with an AssertionError that says what was seen:
  keep      the upstream keeps connections: a handful of connections carry everything
  refuse    it answers `Connection: close` and closes: each request is a connection, and no port stays taken
  await     it answers `Connection: close` and waits for us to close, with tcp_tw_reuse off: the worst that there is
  out       it holds more streams than there are ports: a warning first, then requests wait, get 503 or go on, and all
            is as before when ports are free again
  sources   three source addresses take turns, a fourth that is not this host's is told and passed over

Needs root, or a kernel that lets users make namespaces; `ip` (iproute2). Clients come over a Unix socket, so the range
is the daemon's alone. Run by tests/daemon/test_egress.py with small numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.daemon.harness import Daemon, config_text, model_text, request_bytes, upstream_text, wait_for

SYSCTL = Path("/proc/sys/net/ipv4")
FIRST_PORT = 20_000
# The namespace is ours alone, and a listener within the range would take a port of it.
DAEMON_PORT, HOUSE_PORT = 8081, 8080
REQUEST_S = 30.0
ANSWER = json.dumps(
    {
        "id": "c",
        "object": "chat.completion",
        "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    }
).encode()


def enter_namespace(words: list[str]) -> None:
    """Begins again in a network namespace of its own (unshare(1)); the process stays the same one."""
    how = "-n" if os.getuid() == 0 else "-rn"
    os.execvp("unshare", ["unshare", how, sys.executable, "-m", "tests.daemon.egress_ports", "--inside", *words])


def prepare_namespace(ports: int) -> None:
    """A loopback, and so many local ports."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    (SYSCTL / "ip_local_port_range").write_text(f"{FIRST_PORT} {FIRST_PORT + ports - 1}")


class Provider(asyncio.Protocol):
    """One connection of the upstream; `house` says how it answers."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.data = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.house.connections += 1
        self.house.sources[transport.get_extra_info("peername")[0]] += 1

    def data_received(self, data: bytes) -> None:
        self.data += data
        while True:
            head, mark, rest = self.data.partition(b"\r\n\r\n")
            if not mark:
                return
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(rest) < length:
                return
            self.data = rest[length:]
            self.house.requests += 1
            if self.house.is_holding:
                self.house.held.append(self)
            else:
                self.answer()

    def answer(self) -> None:
        kept = self.house.way in ("keep", "out", "sources")
        more = b"" if kept else b"Connection: close\r\n"
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
            % (more, len(ANSWER), ANSWER)
        )
        if self.house.way == "refuse":
            self.transport.close()


class House:
    """The upstream, in a thread with a loop of its own."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.connections = self.requests = 0
        self.sources: collections.Counter[str] = collections.Counter()
        self.held: list[Provider] = []
        self.is_holding = False
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        wait_for(lambda: self.port)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        making = self._loop.create_server(lambda: Provider(self), "127.0.0.1", HOUSE_PORT)
        server = self._loop.run_until_complete(making)
        self.port = server.sockets[0].getsockname()[1]
        self._loop.run_forever()
        server.close()

    def let_go(self) -> None:
        """Answers all that is held."""

        def answer() -> None:
            for one in self.held:
                one.answer()
            self.held.clear()

        self.is_holding = False
        self._loop.call_soon_threadsafe(answer)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


class Answers:
    """What clients got: statuses, the codes of errors, and the bodies' Retry-After."""

    def __init__(self) -> None:
        self.statuses: collections.Counter[int] = collections.Counter()
        self.codes: collections.Counter[str] = collections.Counter()
        self.without_retry_after = 0

    def take(self, head: bytes, body: bytes) -> None:
        status = int(head[9:12])
        self.statuses[status] += 1
        if status != 200:
            self.codes[json.loads(body)["error"]["code"]] += 1
            self.without_retry_after += b"\r\nretry-after:" not in head.lower()


async def read_answer(reader: asyncio.StreamReader, answers: Answers) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    answers.take(head, await reader.readexactly(length))


async def load(path: str, token: str, requests: int, clients: int) -> Answers:
    """So many requests by so many clients, one after the other on each one's connection."""
    answers = Answers()
    asked = iter(range(requests))
    body = {"model": "m", "messages": [{"role": "user", "content": "Say hello"}]}
    request = request_bytes("/v1/chat/completions", body, token)

    async def client() -> None:
        reader, writer = await asyncio.open_unix_connection(path)
        for _ in asked:
            writer.write(request)
            await asyncio.wait_for(read_answer(reader, answers), REQUEST_S)
        writer.close()

    await asyncio.gather(*(client() for _ in range(min(clients, requests))))
    return answers


class Stage:
    """A daemon with one upstream at a house."""

    def __init__(self, way: str, *, more: str = "", workers: int = 1) -> None:
        self.house = House(way)
        self._folder = tempfile.TemporaryDirectory(prefix="proxyd-egress-")
        folder = Path(self._folder.name)
        port = DAEMON_PORT
        self.socket = f"{folder}/p.sock"
        upstreams = upstream_text(f"http://127.0.0.1:{self.house.port}/v1", more=f'congestion_control = ""\n{more}')
        server = f'workers = {workers}\nlisten = ["127.0.0.1:{port}", "unix:{self.socket}"]\n'
        self.daemon = Daemon(
            folder,
            config_text(
                folder, port, upstreams + model_text("*", 1, '["openai"]'), server=server, log='access = "off"\n'
            ),
        )
        self.daemon.port = port
        self.daemon.start()

    def ask(self, requests: int, clients: int) -> Answers:
        return asyncio.run(load(self.socket, self.daemon.token(), requests, clients))

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.daemon.log().splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == name]

    def metric(self, name: str) -> float:
        return self.daemon.metric(name, upstream="openai")

    def end(self, failed: bool = False) -> None:
        try:
            if not failed:
                assert self.daemon.stop() == 0, self.daemon.log()[-3000:]
                assert "Traceback" not in self.daemon.log(), self.daemon.log()[-5000:]
                assert not self.events("child_died"), self.daemon.log()[-3000:]
        finally:
            self.daemon.kill()
            self.house.close()
            self._folder.cleanup()


def all_answered(stage: Stage, requests: int, clients: int) -> None:
    """Every request has its 200, and the kernel never was without a port."""
    answers = stage.ask(requests, clients)
    assert answers.statuses == {200: requests}, (answers.statuses, answers.codes, stage.daemon.log()[-2000:])
    assert stage.metric("proxyd_egress_ports_out_total") == 0
    assert not stage.events("egress_ports_out")
    assert stage.house.requests == requests


def keep(requests: int, ports: int, clients: int) -> str:
    stage = Stage("keep", workers=2)
    try:
        all_answered(stage, requests, clients)
        assert stage.metric("proxyd_egress_ports_limit") == ports
        assert stage.house.connections <= 2 * clients, stage.house.connections
        assert not stage.events("upstream_refuses_keepalive")
        assert 0 < stage.metric("proxyd_egress_ports_used") <= 2 * clients
        told = f"{stage.house.connections} connections"
    except BaseException:
        stage.end(failed=True)
        raise
    stage.end()
    return told


def refused(way: str, requests: int, ports: int, clients: int) -> str:
    """Each request is a connection, many times the range in all; it is said at the first twenty."""
    if way == "await":
        (SYSCTL / "tcp_tw_reuse").write_text("0")
    stage = Stage(way)
    try:
        all_answered(stage, requests, min(clients, ports // 4))
        assert stage.house.connections >= requests > ports
        lines = wait_for(lambda: stage.events("upstream_refuses_keepalive"))
        assert len(lines) == 1, lines
        assert lines[0]["refused"] <= ports // 4, lines
        assert stage.metric("proxyd_upstream_keepalive_refused_total") == requests
        told = f"{stage.house.connections} connections, {stage.metric('proxyd_egress_ports_used'):.0f} ports in use"
    except BaseException:
        stage.end(failed=True)
        raise
    stage.end()
    (SYSCTL / "tcp_tw_reuse").write_text("2")
    return told


def out(requests: int, ports: int, clients: int) -> str:
    """More streams than ports: those that have one are answered, others hear 503, and it is over when they end."""
    more = f'connect_timeout = "{max(2, ports // 200)}s"\nmax_connections = {ports + ports // 2}\n'
    stage = Stage("out", workers=2, more=more)
    house = stage.house
    try:
        house.is_holding = True
        late = ports // 4
        background: dict[str, Answers] = {}
        asking = threading.Thread(target=lambda: background.update(all=stage.ask(ports + late, ports + late)))
        asking.start()
        wait_for(lambda: len(house.held) == ports, 60)  # every port is in use
        wait_for(lambda: stage.metric("proxyd_upstream_errors_total") == late, 60)  # the others have had their 503
        again = stage.ask(3, 3)
        assert again.codes == {"upstream_no_ports": 3}, again.codes
        assert again.statuses == {503: 3}
        assert again.without_retry_after == 0
        low, none = stage.events("egress_ports_low"), stage.events("egress_ports_out")
        assert low, stage.daemon.log()
        assert none, stage.daemon.log()
        assert low[0]["time"] <= none[0]["time"], (low, none)
        assert low[0]["used"] < ports, low
        assert stage.daemon.metric("proxyd_breaker_state") == 0
        assert not stage.events("upstream_unreachable")
        # Whoever waits while ports come back is served.
        waiting: dict[str, Answers] = {}
        second = threading.Thread(target=lambda: waiting.update(all=stage.ask(20, 20)))
        second.start()
        time.sleep(0.2)
        house.let_go()
        asking.join(60)
        second.join(60)
        first = background["all"]
        assert first.statuses == {200: ports, 503: late}, first.statuses
        assert first.codes == {"upstream_no_ports": late}
        assert first.without_retry_after == 0
        assert waiting["all"].statuses == {200: 20}, (waiting["all"].statuses, waiting["all"].codes)
        assert stage.ask(requests, clients).statuses == {200: requests}
        wait_for(lambda: stage.events("egress_ports_back"), 10)
        dials = stage.metric("proxyd_egress_ports_out_total")
        told = f"{ports} held, {late} refused, 20 waited, {dials:.0f} dials found no port"
    except BaseException:
        stage.end(failed=True)
        raise
    stage.end()
    return told


def sources(requests: int, ports: int, clients: int) -> str:
    names = ["127.0.0.2", "127.0.0.3", "192.0.2.1", "127.0.0.4"]
    # The upstream keeps connections, so that each must be dialled for its own: as many at once as are asked.
    stage = Stage("sources", more=f"source_addresses = {json.dumps(names)}\n")
    try:
        stage.house.is_holding = True
        asked = min(ports, 60)
        answers: dict[str, Answers] = {}
        asking = threading.Thread(target=lambda: answers.update(all=stage.ask(asked, asked)))
        asking.start()
        wait_for(lambda: len(stage.house.held) == asked, 60)
        stage.house.let_go()
        asking.join(60)
        assert answers["all"].statuses == {200: asked}
        seen = stage.house.sources
        assert set(seen) == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}, seen
        assert min(seen.values()) >= asked // 4 - 1, seen
        lines = wait_for(lambda: stage.events("source_address_unusable"))
        assert [line["source"] for line in lines] == ["192.0.2.1"], lines
        assert "192.0.2.1" in lines[0]["reason"], lines
        assert stage.metric("proxyd_egress_ports_limit") == 4 * ports
        told = ", ".join(f"{name} {count}" for name, count in sorted(seen.items()))
    except BaseException:
        stage.end(failed=True)
        raise
    stage.end()
    return told


SCENARIOS: dict[str, Callable[[int, int, int], str]] = {
    "keep": keep,
    "refuse": lambda *sizes: refused("refuse", *sizes),
    "await": lambda *sizes: refused("await", *sizes),
    "out": out,
    "sources": sources,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60_000)
    parser.add_argument("--ports", type=int, default=5_000)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("scenario", nargs="*", choices=[[], *SCENARIOS], help="all by default")
    options = parser.parse_args()
    if not options.inside:
        enter_namespace(sys.argv[1:])
    for name in options.scenario or SCENARIOS:
        began = time.monotonic()
        few, ports = options.requests, options.ports
        if name == "out":  # each request is held, in one process of Python here and there
            few, ports = min(few, 1000), min(ports, 1000)
        prepare_namespace(ports)
        told = SCENARIOS[name](few, ports, options.clients)
        took_s = time.monotonic() - began
        print(f"{name:8} ok  {few} requests, {ports} ports: {told}; {took_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
