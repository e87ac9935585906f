"""Where the daemon listens: IPv4, IPv6, Unix sockets, several at once, and what it says when it cannot."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from proxyd import __version__
from tests.daemon.harness import (
    CHAT,
    DONE,
    ROOT,
    Daemon,
    Reply,
    Script,
    Upstream,
    ask,
    config_text,
    free_port,
    model_text,
    node,
    request_bytes,
    upstream_text,
    wait_for,
)

Make = Callable[[Script], Upstream]


def connect_unix(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def start_once(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    """For a daemon that is expected to refuse: its exit and what it said."""
    return subprocess.run(
        [sys.executable, "-m", "proxyd", "-c", str(daemon.config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=daemon.environ,
        timeout=60,
        check=False,
    )


def refusing(folder: Path, **changes: str) -> Daemon:
    """A daemon that was not started, with an upstream that it never reaches."""
    text = upstream_text("http://127.0.0.1:9/v1") + model_text("*", 1, '["openai"]')
    return Daemon(folder, config_text(folder, free_port(), text, **changes))


def test_one_node_serves_on_ipv4_ipv6_and_unix_sockets_at_once(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    port, public = free_port(), tmp_path / "public.sock"
    listen = f'listen = ["127.0.0.1:{port}", "[::1]:{port}", "unix:{public}"]\nworkers = 2'
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))  # this machine has IPv6 on loopback
    with contextlib.ExitStack() as stack:
        daemon = Daemon(
            tmp_path,
            config_text(
                tmp_path,
                port,
                upstream_text(up.url + "/v1") + model_text("*", 1, '["openai"]'),
                server=listen,
            ),
        )
        daemon.port = port
        stack.callback(daemon.kill)
        daemon.start()
        wait_for(lambda: '"listening"' in daemon.log())  # written when every worker serves, not the first
        (told,) = [json.loads(line) for line in daemon.log().splitlines() if '"listening"' in line]
        assert told["addresses"] == [f"127.0.0.1:{port}", f"[::1]:{port}", f"unix:{public}"]
        assert told["admin"] == f"unix:{tmp_path}/admin.sock"
        assert told["file"] == str(daemon.config)
        assert told["version"] == __version__
        makers: list[Callable[[], socket.socket]] = [
            daemon.connect,
            lambda: socket.create_connection(("::1", port), 10),
            lambda: connect_unix(public),
        ]
        for number, make in enumerate(makers):
            for again in range(3):
                sock = make()
                stack.callback(sock.close)
                name = f"l-{number}-{again}"
                sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token(), X_Request_Id=name))
                reply = Reply(sock)
                assert reply.body() == DONE
                assert reply.header("x-proxyd-request-id") == name  # a trusted proxy by default: ::1 and unix, too
                sock.close()
        assert len(daemon.wait_rows(9)) == 9
        wait_for(lambda: len(daemon.access_log()) >= 9)
        peers = {entry["peer"] for entry in daemon.access_log() if entry["route"] == "/v1/chat/completions"}
        assert peers == {"127.0.0.1", "::1", "unix"}
        assert stat.S_IMODE(public.stat().st_mode) == 0o660
        daemon.close_clients()
        assert daemon.stop() == 0
        assert not public.exists()
        assert not (tmp_path / "admin.sock").exists()
        assert "Traceback" not in daemon.log()


def test_a_unix_socket_alone_and_the_admin_on_loopback(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    public, admin = tmp_path / "p.sock", free_port()
    server = f'listen = ["unix:{public}"]\nadmin = "127.0.0.1:{admin}"\nworkers = 2'
    text = upstream_text(up.url + "/v1") + model_text("*", 1, '["openai"]')
    daemon = Daemon(tmp_path, config_text(tmp_path, 1, text, server=server))
    with daemon.log_path.open("wb") as log:
        daemon.process = subprocess.Popen(
            [sys.executable, "-m", "proxyd", "-c", str(daemon.config)],
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd=ROOT,
            env=daemon.environ,
        )
    try:
        wait_for(lambda: '"ready"' in daemon.log(), 30)
        with connect_unix(public) as sock:
            sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
            assert Reply(sock).body() == DONE
        connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=10)
        connection.request("GET", "/status")
        assert json.loads(connection.getresponse().read())["state"] == "ready"
        connection.close()
        daemon.wait_rows(1)
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_a_stale_unix_socket_of_a_dead_daemon_is_replaced(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "admin.sock"))
    stale.close()
    with node(tmp_path, up) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert daemon.admin("/status")[0] == 200


def test_a_port_that_somebody_else_has_is_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = start_once(refusing(tmp_path, server=f'listen = ["127.0.0.1:{port}"]\nworkers = 1'))
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == (
        f"proxyd: cannot listen on 127.0.0.1:{port}: Address already in use; another process has the address of "
        "server.listen: `ss -ltnp` names it; end it, or change server.listen"
    )
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("listen", "says"),
    [
        ("unix:{folder}/file", "not a socket"),
        ("unix:{folder}/none/p.sock", "none does not exist; install -d"),
        ("192.0.2.1:3000", "Cannot assign requested address"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_clear_line(tmp_path: Path, listen: str, says: str) -> None:
    (tmp_path / "file").write_text("mine")
    address = listen.format(folder=tmp_path)
    found = start_once(refusing(tmp_path, server=f'listen = ["{address}"]\nworkers = 1'))
    assert found.returncode == 1, found.stderr
    lines = found.stderr.strip().splitlines()
    assert "Traceback" not in found.stderr
    (line,) = [line for line in lines if says in line]
    assert "server.listen" in line
    assert address.removeprefix("unix:").removesuffix("/p.sock") in line
    assert (tmp_path / "file").read_text() == "mine"
