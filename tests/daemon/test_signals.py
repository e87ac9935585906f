"""What each signal does to the running daemon, and what an operator sees of it: exit code, time, log files, titles."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    ROOT,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    node,
    wait_for,
)

Make = Callable[[Script], Upstream]


class Endless:
    """An upstream script that streams until it is released, then ends properly."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        while not self.go.is_set():
            wire.chunk(chat_chunk("tick"))
            time.sleep(0.02)
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")


def stream(daemon: Daemon) -> Reply:
    """A stream that has begun."""
    reply = ask(daemon, "/v1/chat/completions", CHAT)
    assert reply.status == 200
    next(reply.pieces())
    return reply


def send(daemon: Daemon, number: signal.Signals) -> None:
    assert daemon.process is not None
    daemon.process.send_signal(number)


def is_leaving(daemon: Daemon) -> bool:
    """Newcomers hear that the node drains."""
    with daemon.connect() as sock:
        sock.sendall(b"GET /readyz HTTP/1.1\r\nHost: t\r\n\r\n")
        return Reply(sock).status == 503


def family(daemon: Daemon) -> list[int]:
    return daemon.children()


def none_left(pids: list[int]) -> bool:
    def is_alive(pid: int) -> bool:
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    return not any(map(is_alive, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_lets_all_streams_of_all_workers_end_and_exits_with_zero(
    upstream: Make, tmp_path: Path, number: signal.Signals
) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='workers = 2\ndrain_timeout = "30s"') as daemon:
        replies = [stream(daemon) for _ in range(6)]
        children = family(daemon)
        idle = daemon.connect()
        began = time.monotonic()
        send(daemon, number)
        wait_for(lambda: is_leaving(daemon))
        idle.settimeout(10)
        assert idle.recv(1) == b""  # a connection without a request is closed, not kept for the drain's length
        script.go.set()
        for reply in replies:
            assert reply.body().endswith(DONE)
            assert reply.ended
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - began < 20
        assert none_left(children)
        assert {row["status"] for row in daemon.wait_rows(6)} == {"completed"}


def test_a_request_on_a_kept_connection_during_the_drain_is_told_to_come_back(upstream: Make, tmp_path: Path) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='workers = 1\ndrain_timeout = "30s"') as daemon:
        kept = daemon.connect()
        kept.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: t\r\n")  # a head that is not complete yet
        live = stream(daemon)
        send(daemon, signal.SIGTERM)
        wait_for(lambda: is_leaving(daemon))
        kept.sendall(b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
        reply = Reply(kept)
        assert reply.status == 503
        assert reply.header("retry-after") is not None
        assert reply.header("connection") == "close"
        body = json.loads(reply.body())
        assert body["error"]["code"] == "draining"
        script.go.set()
        assert live.body().endswith(DONE)


def test_the_drain_is_over_at_its_timeout_whatever_the_streams_do(upstream: Make, tmp_path: Path) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='workers = 2\ndrain_timeout = "500ms"') as daemon:
        replies = [stream(daemon) for _ in range(4)]
        began = time.monotonic()
        send(daemon, signal.SIGTERM)
        for reply in replies:
            body = reply.body()
            assert b'"error"' in body
            assert DONE not in body
            assert not reply.ended
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - began < 10
        script.go.set()
        assert {row["status"] for row in daemon.wait_rows(4)} == {"interrupted"}


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGQUIT,)], ids=["second TERM", "QUIT"])
def test_some_signals_end_it_at_once_and_the_rows_come_with_the_next_start(
    upstream: Make, tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server='workers = 2\ndrain_timeout = "60s"') as daemon:
        replies = [stream(daemon) for _ in range(4)]
        children = family(daemon)
        began = time.monotonic()
        send(daemon, numbers[0])
        for number in numbers[1:]:
            wait_for(lambda: '"draining"' in daemon.log())
            send(daemon, number)
        assert daemon.process is not None
        assert daemon.process.wait(20) == 0
        assert time.monotonic() - began < 15  # not the sixty seconds
        wait_for(lambda: none_left(children))
        script.go.set()
        for reply in replies:
            with contextlib.suppress(ConnectionError):
                reply.body()
            assert not reply.ended
        daemon.start()
        rows = daemon.wait_rows(4)
        assert {(row["status"], row["estimated"]) for row in rows} == {("interrupted", 1)}


def test_usr1_makes_every_process_write_into_a_new_access_log(upstream: Make, tmp_path: Path) -> None:
    access, moved = tmp_path / "access.log", tmp_path / "access.log.1"
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, server="workers = 2", log=f'access = "{access}"') as daemon:

        def ask_as(name: str) -> None:
            assert ask(daemon, "/v1/chat/completions", CHAT, X_Request_Id=name).body() == DONE

        for number in range(8):
            ask_as(f"old-{number}")
        wait_for(lambda: access.read_text().count("old-") == 8)
        access.rename(moved)
        ask_as("old-8")  # goes on into the moved file: nothing is lost between rename and signal
        wait_for(lambda: moved.read_text().count("old-") == 9)
        send(daemon, signal.SIGUSR1)
        wait_for(access.exists)
        # Each worker opens it by itself: those that have not yet still write into the old one.
        wait_for(lambda: len(_openers(access)) == len(daemon.children()) + 1)
        for number in range(8):
            ask_as(f"new-{number}")
        wait_for(lambda: access.read_text().count("new-") == 8)
        assert "new-" not in moved.read_text()
        assert access.stat().st_mode & 0o007 == 0
        for line in access.read_text().splitlines():
            json.loads(line)
        assert not daemon.access_log()  # not on stdout, too
        daemon.wait_rows(17)


def _openers(path: Path) -> set[str]:
    """Processes that hold the file open."""
    inode = path.stat().st_ino
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{entry}/fd"):
                    with contextlib.suppress(OSError):
                        if os.stat(f"/proc/{entry}/fd/{fd}").st_ino == inode:
                            found.add(entry)
    return found


def test_an_access_log_that_is_off_writes_no_request(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, log='access = "off"') as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT, X_Request_Id="quiet-1").body() == DONE
        daemon.wait_rows(1)
        daemon.get("/healthz")
        time.sleep(0.3)
        assert "quiet-1" not in daemon.log()
        assert "healthz" not in daemon.log()


def test_an_access_log_that_cannot_be_opened_is_one_line_and_no_start(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: None)
    where = tmp_path / "no" / "such" / "folder" / "access.log"
    with (
        pytest.raises(AssertionError, match=r"log\.access: .* does not exist; install -d"),
        node(tmp_path, up, log=f'access = "{where}"'),
    ):
        pass
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "Traceback" not in "".join(lines)
    assert len([line for line in lines if "log.access" in line]) == 1


def test_a_log_in_text_form_is_for_people(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, log='format = "text"') as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT, X_Request_Id="plain-1").body() == DONE
        wait_for(lambda: "request_id=plain-1" in daemon.log())
        assert "{" not in next(line for line in daemon.log().splitlines() if "plain-1" in line)


def test_process_titles_show_what_each_is_doing(upstream: Make, tmp_path: Path) -> None:
    script = Endless()
    with node(tmp_path, upstream(script), server="workers = 2") as daemon:
        replies = [stream(daemon) for _ in range(5)]

        def titles() -> list[str]:
            assert daemon.process is not None
            pids = [daemon.process.pid, *daemon.children()]
            return [Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0 ") for pid in pids]

        def figures(kind: str) -> int:
            found = [re.search(rf"^proxyd: {kind}.*?(\d+) streams", title) for title in titles()]
            return sum(int(match[1]) for match in found if match)

        wait_for(lambda: figures("worker") == 5)
        wait_for(lambda: figures("master") == 5)
        assert any(title.startswith("proxyd: telemetry") for title in titles())
        script.go.set()
        for reply in replies:
            reply.body()
        wait_for(lambda: figures("worker") == 0)


def test_a_pipe_that_nobody_reads_does_not_stop_the_service(upstream: Make, tmp_path: Path) -> None:
    """stdout and stderr on a full pipe: the log is lost and says so later, requests go on."""
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up) as daemon:
        assert daemon.stop() == 0
        read_fd, write_fd = os.pipe()
        daemon.process = subprocess.Popen(
            [sys.executable, "-m", "proxyd", "-c", str(daemon.config)],
            stdout=write_fd,
            stderr=write_fd,
            env=daemon.environ,
            cwd=ROOT,
        )
        os.close(write_fd)
        try:
            wait_for(daemon._is_ready, 30)
            for _ in range(600):  # some 500 bytes each: more than a pipe holds
                assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
                daemon.close_clients()
            assert daemon.get("/readyz")[0] == 200
            assert daemon.stop() == 0
            assert len(daemon.rows()) == 600
        finally:
            os.close(read_fd)
