"""kill -9 of any process at any time: it is replaced, the others are untouched, no row is lost or doubled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
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
    FINISH,
    ROOT,
    USAGE,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    node,
    request_bytes,
    wait_for,
)
from tests.daemon.kill_rounds import run

Make = Callable[[Script], Upstream]

ROUNDS = 12
# A gap that a reader would notice. The machine is shared, so this is no latency bound: a stream that waited for a
# successor, a reconnect or a timeout would show seconds.
GAP_S = 5.0


def test_a_dozen_kills_under_load_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    seed = int(os.environ.get("PROXYD_KILL_SEED", "11"))
    counted = run(tmp_path, ROUNDS, seed)
    assert counted["finished"] > 30 * ROUNDS / 2
    assert counted["master_starts"] == 2


# -- the backlog -------------------------------------------------------------------------------------------------------


def test_connections_that_wait_behind_a_killed_worker_are_served(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up, server="workers = 3") as daemon:
        ask(daemon, "/v1/chat/completions", CHAT).body()
        victim = daemon.child("worker 0")
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: _state(victim) == "T")
        waiting = [daemon.connect() for _ in range(90)]
        for number, sock in enumerate(waiting):
            sock.settimeout(30)
            sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token(), X_Request_Id=f"w-{number}"))
        # Two thirds are other workers' and answered now; what stays silent waits in the stopped one's backlog.
        wait_for(lambda: len(up.requests) >= 31, 20)
        quiet = _settled(lambda: len(up.requests))
        assert quiet < 91, "no connection waits for the stopped worker: the test shows nothing"
        os.kill(victim, signal.SIGKILL)
        for sock in waiting:
            reply = Reply(sock)
            assert reply.body() == chat_chunk("a") + FINISH + DONE
            assert reply.ended
        rows = daemon.wait_rows(91)
        assert {row["status"] for row in rows} == {"completed"}
        assert len({row["request_id"] for row in rows}) == 91


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _settled(what: Callable[[], int], seconds: float = 0.5) -> int:
    """The value once it has not changed for that long."""
    value, since = what(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.02)
        if what() != value:
            value, since = what(), time.monotonic()
    return value


# -- streams of the other workers --------------------------------------------------------------------------------------


class Ticker:
    """An upstream script that counts aloud until it is released."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        number = 0
        while not self.go.is_set():
            wire.chunk(chat_chunk(f"<{number}>"))
            number += 1
            time.sleep(0.02)
        for piece in (FINISH, DONE):
            wire.chunk(piece)
        wire.send(b"0\r\n\r\n")


class Reader:
    """A client that reads a stream in a thread and remembers its longest wait."""

    def __init__(self, daemon: Daemon) -> None:
        self.reply = ask(daemon, "/v1/chat/completions", CHAT)
        self.longest_s = 0.0
        self.data = b""
        self.is_whole = False
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        last = time.monotonic()
        with contextlib.suppress(ConnectionError, TimeoutError):
            for piece in self.reply.pieces():
                now = time.monotonic()
                self.longest_s, last = max(self.longest_s, now - last), now
                self.data += piece
        self.is_whole = self.reply.ended

    @property
    def has_no_hole(self) -> bool:
        count = self.data.count(b"<")
        return count > 0 and all(f"<{number}>".encode() in self.data for number in range(count))


def _streams(daemon: Daemon) -> list[int]:
    return [worker["streams"] for worker in json.loads(daemon.admin("/status")[1])["workers"]]


def test_long_streams_of_the_other_workers_go_on_without_a_gap(upstream: Make, tmp_path: Path) -> None:
    ticker = Ticker()
    with node(tmp_path, upstream(ticker), server="workers = 3") as daemon:
        readers = [Reader(daemon) for _ in range(18)]
        wait_for(lambda: sum(_streams(daemon)) == 18)
        lost = _streams(daemon)[0]
        assert 0 < lost < 18
        for _ in range(3):  # the worker, its successor and the telemetry process
            victim = daemon.child("worker 0")
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: _has_successor(daemon, victim), 20)  # noqa: B023
        os.kill(daemon.child("telemetry"), signal.SIGKILL)
        time.sleep(0.3)
        ticker.go.set()
        for reader in readers:
            reader.thread.join(20)
        whole = [reader for reader in readers if reader.is_whole]
        assert len(whole) == 18 - lost
        for reader in readers:
            assert reader.has_no_hole
        for reader in whole:
            assert reader.data.endswith(DONE)
            assert reader.longest_s < GAP_S
        wait_for(lambda: daemon.metric("proxyd_streams_active") == 0)
        assert daemon.metric("proxyd_worker_restarts_total") == 3
        rows = daemon.wait_rows(18, 20)
        statuses = [row["status"] for row in rows]
        assert (statuses.count("completed"), statuses.count("interrupted")) == (18 - lost, lost)
        cut = [row for row in rows if row["status"] == "interrupted"]
        assert all(row["estimated"] == 1 for row in cut)


def _has_successor(daemon: Daemon, victim: int) -> bool:
    with contextlib.suppress(AssertionError):
        return daemon.child("worker 0", 0) != victim
    return False


def test_a_cut_stream_is_billed_from_its_last_checkpoint(upstream: Make, tmp_path: Path) -> None:
    ticker = Ticker()
    with node(tmp_path, upstream(ticker)) as daemon:
        reader = Reader(daemon)
        wait_for(lambda: reader.data.count(b"<") > 80, 30)  # more than a second: a checkpoint was due
        os.kill(daemon.child("worker 0"), signal.SIGKILL)
        (row,) = daemon.wait_rows(1)
        ticker.go.set()
        reader.thread.join(10)
        assert not reader.is_whole
        assert (row["status"], row["estimated"]) == ("interrupted", 1)
        assert row["prompt_tokens"] > 0
        assert row["completion_tokens"] > 0


def test_counts_are_on_record_before_the_client_sees_the_end(upstream: Make, tmp_path: Path) -> None:
    """The worker is killed when its client has the last byte: before the turn that wrote it could write the row."""
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        asked = {**CHAT, "stream_options": {"include_usage": True}}
        for number in range(6):
            sock = daemon.connect()
            victim = wait_for(lambda: _find(daemon), 20)
            sock.sendall(request_bytes("/v1/chat/completions", asked, daemon.token(), X_Request_Id=f"e-{number}"))
            assert DONE in Reply(sock).body()
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: _has_successor(daemon, victim), 30)  # noqa: B023
        for row in daemon.wait_rows(6, 20):
            assert (row["prompt_tokens"], row["completion_tokens"]) == (11, 5), row


def _find(daemon: Daemon) -> int | None:
    with contextlib.suppress(AssertionError):
        return daemon.child("worker 0", 0)
    return None


# -- the spool ---------------------------------------------------------------------------------------------------------


def _kill_all(daemon: Daemon) -> None:
    """Power off, as far as processes are concerned: nobody writes a last word."""
    assert daemon.process is not None
    family = [daemon.process.pid, *daemon.children()]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)  # so that nobody answers another's death
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    daemon.process.wait()
    wait_for(lambda: not any(_is_alive(pid) for pid in family[1:]))


def _is_alive(pid: int) -> bool:
    try:
        return _state(pid) != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("damage", ["torn", "garbage", "zeros", "half a head"])
def test_a_torn_tail_of_the_spool_costs_no_finished_row(
    upstream: Make, tmp_path: Path, damage: str
) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        asked = {**CHAT, "stream_options": {"include_usage": True}}
        os.kill(daemon.child("telemetry"), signal.SIGSTOP)  # what is written stays in the spool
        for number in range(10):
            reply = ask(daemon, "/v1/chat/completions", asked, X_Request_Id=f"t-{number}")
            assert DONE in reply.body()
        wait_for(lambda: len(daemon.access_log()) >= 10)
        _kill_all(daemon)
        (segment,) = [path for path in (tmp_path / "spool").rglob("*") if path.is_file() and path.stat().st_size > 500]
        data = segment.read_bytes()
        ruined = {
            "torn": data[:-7],
            "garbage": data + os.urandom(200),
            "zeros": data + bytes(4096),
            "half a head": data + data[-1:] + b"\1",
        }[damage]
        segment.write_bytes(ruined)
        daemon.start()
        rows = daemon.wait_rows(10, 20)
        assert {row["request_id"] for row in rows} == {f"t-{number}" for number in range(10)}
        statuses = [row["status"] for row in rows]
        assert statuses == ["completed"] * 10  # also the one whose final is torn: its end was announced before it
        assert all((row["prompt_tokens"], row["completion_tokens"]) == (11, 5) for row in rows)
        wait_for(lambda: "spool_tail_cut" in daemon.log())
        assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
        daemon.wait_rows(11)


def test_streams_cut_by_the_death_of_all_are_settled_by_the_next_start(upstream: Make, tmp_path: Path) -> None:
    ticker = Ticker()
    with node(tmp_path, upstream(ticker), server="workers = 2") as daemon:
        readers = [Reader(daemon) for _ in range(8)]
        wait_for(lambda: all(reader.data.count(b"<") > 5 for reader in readers))
        _kill_all(daemon)
        ticker.go.set()
        daemon.start()
        rows = daemon.wait_rows(8, 20)
        assert {(row["status"], row["estimated"]) for row in rows} == {("interrupted", 1)}
        assert len({row["request_id"] for row in rows}) == 8
        assert DONE in ask(daemon, "/v1/chat/completions", CHAT).body()
        assert daemon.metric("proxyd_streams_active") == 0
        _kill_all(daemon)
        daemon.start()
        assert len(daemon.wait_rows(9, 20)) == 9  # read again, written once


def test_a_client_of_a_killed_worker_sees_a_broken_answer_and_never_a_whole_one(upstream: Make, tmp_path: Path) -> None:
    ticker = Ticker()
    with node(tmp_path, upstream(ticker)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        next(reply.pieces())
        os.kill(daemon.child("worker 0"), signal.SIGKILL)
        with contextlib.suppress(ConnectionError):
            assert DONE not in reply.body()
        assert not reply.ended
        ticker.go.set()
        daemon.wait_rows(1)


def test_idle_client_connections_of_a_killed_worker_are_closed_and_new_ones_served(
    upstream: Make, tmp_path: Path
) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up) as daemon:
        idle = daemon.connect()
        idle.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        assert Reply(idle).body() == DONE
        os.kill(daemon.child("worker 0"), signal.SIGKILL)
        idle.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert idle.recv(1) == b""
        fresh: socket.socket = daemon.connect()
        fresh.settimeout(30)
        fresh.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        assert Reply(fresh).body() == DONE
        daemon.wait_rows(2)


def test_a_worker_that_dies_again_and_again_turns_nobody_away(upstream: Make, tmp_path: Path) -> None:
    """Its slot stays empty for longer and longer; the kernel goes on giving that listener its share of clients."""
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, server="workers = 2") as daemon:
        stop = threading.Event()
        killed: list[int] = []

        def kill_it() -> None:
            while not stop.is_set():
                with contextlib.suppress(AssertionError, ProcessLookupError):
                    pid = daemon.child("worker 0", 0)
                    # One that serves already may hold accepted clients: those it may cut. A newborn has none.
                    if pid not in killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)
                time.sleep(0.005)

        killer = threading.Thread(target=kill_it, daemon=True)
        killer.start()
        wait_for(lambda: len(killed) >= 4, 20)
        answered = cut = 0
        until = time.monotonic() + 3.0
        while time.monotonic() < until or answered < 50:
            sock = daemon.connect()
            sock.settimeout(15)
            try:
                sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
                assert Reply(sock).body() == DONE
                answered += 1
            except ConnectionError:
                cut += 1
            sock.close()
        stop.set()
        killer.join(5)
        # Only a client that a newborn accepted in its few milliseconds may be cut: at most one a death.
        assert cut <= len(killed)
        wait_for(lambda: all(worker == "ready" for worker in _states(daemon)), 30)
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE


def _states(daemon: Daemon) -> list[str]:
    return [worker["state"] for worker in json.loads(daemon.admin("/status")[1])["workers"]]


def test_a_master_killed_while_it_starts_leaves_nothing_in_the_way(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, server="workers = 2") as daemon:
        assert daemon.stop() == 0
        family: set[int] = set()
        for delay_s in (0.05, 0.25, 0.4, 0.5, 0.6, 0.8):  # the interpreter, the imports, the bind, the forks, the boot
            with daemon.log_path.open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "proxyd", "-c", str(daemon.config)],
                    stdout=log,
                    stderr=log,
                    cwd=ROOT,
                    env=daemon.environ,
                )
            daemon.process = process
            time.sleep(delay_s)
            family.update(daemon.children())
            process.kill()
            process.wait()
        daemon.start()
        family -= set(daemon.children())
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        wait_for(lambda: not any(_is_alive(pid) for pid in family), 20)
        assert daemon.admin("/status")[0] == 200
        daemon.wait_rows(1)
