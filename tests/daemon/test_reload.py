"""HUP on the real daemon: what a reload may change, what it refuses, and that streams notice nothing of it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    USAGE,
    Daemon,
    Reply,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    free_port,
    node,
    wait_for,
)

SERVER = 'workers = 2\ndrain_timeout = "20s"'


class Gate:
    """Answers whose end waits until it is opened."""

    def __init__(self) -> None:
        self.is_open = False

    def __call__(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        wire.chunk(chat_chunk("begun"))
        wait_for(lambda: self.is_open, 60)
        for piece in (FINISH, USAGE, DONE):
            wire.chunk(piece)
        wire.send(b"0\r\n\r\n")


def at_once(wire: Wire) -> None:
    wire.stream(chat_chunk(), FINISH, USAGE, DONE)


def command(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxyd", *words, "-c", str(daemon.config)],
        cwd=ROOT, env=daemon.environ, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def change(daemon: Daemon, old: str, new: str) -> None:
    text = daemon.config.read_text()
    assert old in text
    daemon.config.write_text(text.replace(old, new))


def status(daemon: Daemon) -> Any:
    import json

    return json.loads(daemon.admin("/status")[1])


def begin(daemon: Daemon) -> tuple[Reply, Iterator[bytes]]:
    reply = ask(daemon, "/v1/chat/completions", CHAT)
    pieces = reply.pieces()
    next(pieces)
    return reply, pieces


def serves(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return sock.recv(100).startswith(b"HTTP/1.1 200")
    return False


def test_a_reload_serves_the_new_file_and_streams_of_the_old_one_end_whole(
    upstream: Callable[..., Upstream], tmp_path: Path
) -> None:
    gate = Gate()
    provider = upstream(gate)
    second = free_port()
    with node(tmp_path, provider, server=SERVER) as daemon:
        reply, pieces = begin(daemon)
        requests = daemon.metric("proxyd_requests_total")
        provider.script = at_once
        change(daemon, f':{daemon.port}"]', f':{daemon.port}", "127.0.0.1:{second}"]')
        change(daemon, "workers = 2", "workers = 3")
        change(daemon, 'name = "*"', 'name = "only-this"')
        done = command(daemon, "reload")
        assert done.returncode == 0, done.stderr
        assert "generation 2 serves" in done.stdout
        assert serves(daemon.port)
        assert serves(second)
        assert ask(daemon, "/v1/chat/completions", CHAT).status == 404
        assert ask(daemon, "/v1/chat/completions", {**CHAT, "model": "only-this"}).body().endswith(DONE)
        told = status(daemon)
        assert [(one["state"], one["workers"]) for one in told["generations"]] == [("serving", 3), ("draining", 1)]
        assert daemon.metric("proxyd_requests_total") >= requests

        # The added address goes again, and nobody listens there any more.
        change(daemon, f', "127.0.0.1:{second}"]', "]")
        assert command(daemon, "reload").returncode == 0
        wait_for(lambda: not serves(second))
        assert serves(daemon.port)
        gate.is_open = True
        assert b"".join(pieces).endswith(DONE)
        assert reply.ended
        wait_for(lambda: len(status(daemon)["generations"]) == 1)
        assert len(daemon.wait_rows(2)) == 2


def test_what_a_reload_refuses_changes_nothing_and_is_told_everywhere(
    upstream: Callable[..., Upstream], tmp_path: Path
) -> None:
    with (
        node(tmp_path, upstream(at_once), server=SERVER) as daemon,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        good = daemon.config.read_text()
        pids = set(daemon.children())
        port = taken.getsockname()[1]
        wrong = {
            "unknown key": (good.replace("workers = 2", "workerz = 2"), "did you mean workers"),
            "not TOML": (good + "\n[[[", "not TOML"),
            "a restart option": (re.sub(r"state_dir = .*", 'state_dir = "/srv/elsewhere"', good), "systemctl restart"),
            "an address that is taken": (good.replace('listen = [', f'listen = ["127.0.0.1:{port}", '), str(port)),
            "too many streams": (good + "\n[limits]\nconcurrent_streams = 60000\n", "room for"),
            "a log that cannot be": (good.replace("[log]\n", '[log]\naccess = "/proc/nowhere/log"\n'), "/proc/nowhere"),
        }
        for name, (text, says) in wrong.items():
            daemon.config.write_text(text)
            done = command(daemon, "reload")
            assert done.returncode == 1, (name, done)
            assert says in done.stderr, (name, done.stderr)
            assert not status(daemon)["last_reload"]["ok"]
            assert set(daemon.children()) == pids, name
            assert ask(daemon, "/v1/chat/completions", CHAT).body().endswith(DONE)
        assert daemon.log().count('"event":"reload_failed"') == len(wrong)
        daemon.config.write_text(good)
        assert command(daemon, "reload").returncode == 0


def test_a_reload_takes_a_new_secret_and_a_new_log_file(upstream: Callable[..., Upstream], tmp_path: Path) -> None:
    with node(tmp_path, upstream(at_once), server=SERVER) as daemon:
        old = daemon.token()
        (tmp_path / "jwt.secret").write_text("another-secret-of-at-least-32-bytes!")
        change(daemon, "[log]\n", f'[log]\naccess = "{tmp_path}/access.log"\n')
        assert command(daemon, "reload").returncode == 0
        assert ask(daemon, "/v1/chat/completions", CHAT, token=old).status == 403
        wait_for(lambda: '"status":403' in (tmp_path / "access.log").read_text())
        # Every process that writes there hears of a rotated file, the master's next children too.
        (tmp_path / "access.log").rename(tmp_path / "access.log.1")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGUSR1)
        wait_for((tmp_path / "access.log").exists)
        os.kill(daemon.child("worker 0"), signal.SIGKILL)
        wait_for(lambda: all(one["state"] == "ready" for one in status(daemon)["workers"]))
        for _ in range(10):
            ask(daemon, "/v1/chat/completions", CHAT, token=old)
        wait_for(lambda: (tmp_path / "access.log").read_text().count('"status":403') == 10)


def test_without_a_manager_the_end_is_as_ever_after_reloads(upstream: Callable[..., Upstream], tmp_path: Path) -> None:
    path = tmp_path / "public.sock"
    with node(tmp_path, upstream(at_once)) as daemon:
        address = f'"127.0.0.1:{daemon.port}"'
        daemon.config.write_text(daemon.config.read_text().replace(address, f'{address}, "unix:{path}"'))
        assert command(daemon, "reload").returncode == 0
        assert command(daemon, "reload").returncode == 0
        assert path.exists()
    assert not path.exists()  # nobody keeps the listeners for a successor


def test_a_new_worker_killed_in_the_middle_fails_the_reload_alone(
    upstream: Callable[..., Upstream], tmp_path: Path
) -> None:
    gate = Gate()
    with node(tmp_path, upstream(gate), server=SERVER) as daemon:
        reply, pieces = begin(daemon)
        assert daemon.process is not None
        before = set(daemon.children())
        killed = False
        for _ in range(20):
            daemon.process.send_signal(signal.SIGHUP)
            young = wait_for(lambda known=before: new_worker(daemon, known), 10, every=0.0005)
            with contextlib.suppress(ProcessLookupError):
                os.kill(young, signal.SIGKILL)
            wait_for(lambda: status(daemon)["renewal"]["under_way"] is None)
            if not status(daemon)["last_reload"]["ok"]:
                killed = True
                break
            before = before | set(daemon.children())
        assert killed, "never met one before it was ready"
        assert "killed by SIGKILL" in status(daemon)["last_reload"]["detail"]
        gate.is_open = True
        assert b"".join(pieces).endswith(DONE)
        assert reply.ended
        wait_for(lambda: sum(one["state"] == "ready" for one in status(daemon)["workers"]) == 2)


def new_worker(daemon: Daemon, before: set[int]) -> int:
    for pid in set(daemon.children()) - before:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"proxyd: worker"):
                return pid
    return 0


def test_reloads_in_a_row_with_another_log_leave_no_descriptor(
    upstream: Callable[..., Upstream], tmp_path: Path
) -> None:
    with node(tmp_path, upstream(at_once), server="workers = 1") as daemon:
        assert daemon.process is not None
        change(daemon, "[log]\n", f'[log]\naccess = "{tmp_path}/0.log"\n')
        counts = []
        for number in range(1, 9):
            change(daemon, f"{number - 1}.log", f"{number}.log")
            daemon.process.send_signal(signal.SIGHUP)
            wait_for(lambda wanted=number: (status(daemon)["last_reload"] or {}).get("number") == wanted)
            wait_for(lambda: len(status(daemon)["generations"]) == 1 and len(daemon.children()) == 2, 20)
            counts.append(len(os.listdir(f"/proc/{daemon.process.pid}/fd")))
        assert max(counts[1:]) <= counts[0] + 1, counts  # an old telemetry that is just ending
