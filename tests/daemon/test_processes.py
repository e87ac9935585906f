"""The tree of processes under kill -9, TERM, crash loops and silence; every test ends with nothing left running."""

from __future__ import annotations

import os
import random
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.trivial_driver import PATIENCE_S, Node, eventually


@pytest.fixture
def start() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(*, ready: bool = True, **options: Any) -> Node:
        node = Node(**options)
        nodes.append(node)
        if ready:
            node.wait_event("ready")
        return node

    yield make
    left = [node.family() for node in nodes if node.process.poll() is not None]
    for node in nodes:
        node.end()
    assert not any(left), f"left running: {left}"


def test_the_tree_is_titled_and_ends_cleanly_on_term(start: Callable[..., Node]) -> None:
    node = start(workers=2, extra=True)
    assert sorted(title.split(" (")[0] for title in node.family().values()) == [
        "proxyd: extra",
        "proxyd: master",
        "proxyd: telemetry",
        "proxyd: worker 0",
        "proxyd: worker 1",
    ]
    node.signal(signal.SIGTERM)
    assert node.wait_exit() == 0
    assert not node.family()


def test_the_kernel_spreads_connections_over_the_slots(start: Callable[..., Node]) -> None:
    node = start(workers=2)
    assert node.connect_to(0).pid != node.connect_to(1).pid


def test_a_killed_worker_has_a_successor_on_the_same_listener(start: Callable[..., Node]) -> None:
    node = start(workers=2)
    other = node.connect_to(1)
    victim = node.connect_to(0)
    os.kill(victim.pid, signal.SIGKILL)
    assert node.wait_event("child_died", child="worker 0")["how"] == "killed by SIGKILL"
    assert node.connect_to(0).pid != victim.pid
    assert other.ask(b"hold") == b"held"


def test_connections_waiting_in_a_dead_workers_backlog_are_served(start: Callable[..., Node]) -> None:
    node = start(workers=1)
    victim = node.connect_to(0)
    os.kill(victim.pid, signal.SIGSTOP)
    waiting = [node.connect() for _ in range(20)]
    os.kill(victim.pid, signal.SIGKILL)
    for client in waiting:
        client.greet()
        assert client.pid != victim.pid


def test_a_killed_telemetry_process_comes_back_and_workers_notice_nothing(start: Callable[..., Node]) -> None:
    node = start(workers=1)
    client = node.connect_to(0)
    (telemetry,) = [pid for pid, title in node.family().items() if "telemetry" in title]
    os.kill(telemetry, signal.SIGKILL)
    node.wait_event("child_died", child="telemetry")
    eventually(lambda: [p for p, t in node.family().items() if "telemetry" in t and p != telemetry], "a successor")
    assert client.ask(b"hold") == b"held"


def test_term_lets_streams_finish_and_refuses_newcomers(start: Callable[..., Node]) -> None:
    node = start(workers=2, drain_timeout=PATIENCE_S)
    clients = [node.connect_to(0), node.connect_to(1)]
    for client in clients:
        assert client.ask(b"hold") == b"held"
    node.signal(signal.SIGTERM)
    node.wait_event("draining")
    eventually(lambda: clients[0].ask(b"state") == b"DRAINING", "the worker's state")

    def is_refused() -> bool:
        try:
            node.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    eventually(is_refused, "refusal of newcomers")
    for client in clients:
        assert client.ask(b"state") == b"DRAINING"
        client.close()
    assert node.wait_exit() == 0
    assert node.wait_event("telemetry_stopped")


def test_streams_that_outlast_the_drain_are_ended_properly(start: Callable[..., Node]) -> None:
    node = start(workers=1, drain_timeout=0.2)
    client = node.connect_to(0)
    assert client.ask(b"hold") == b"held"
    node.signal(signal.SIGTERM)
    assert client.line() == b"aborted\n"
    assert node.wait_exit() == 0
    assert node.wait_event("drain_report", why="stopped", running=1, ended=1)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_second_signal_while_draining_ends_it_at_once(start: Callable[..., Node], second: signal.Signals) -> None:
    node = start(workers=1, drain_timeout=300)
    client = node.connect_to(0)
    assert client.ask(b"hold") == b"held"
    node.signal(signal.SIGTERM)
    node.wait_event("draining")
    node.signal(second)
    assert node.wait_exit() == 0
    assert not node.family()


def test_quit_ends_it_at_once(start: Callable[..., Node]) -> None:
    node = start(workers=2, drain_timeout=300, extra=True)
    client = node.connect_to(1)
    assert client.ask(b"hold") == b"held"
    node.signal(signal.SIGQUIT)
    assert node.wait_exit() == 0
    assert not node.family()


def test_ctrl_c_reaches_the_whole_group_and_is_still_a_drain(start: Callable[..., Node]) -> None:
    node = start(workers=2, drain_timeout=PATIENCE_S, extra=True)
    client = node.connect_to(0)
    assert client.ask(b"hold") == b"held"
    os.killpg(node.process.pid, signal.SIGINT)
    node.wait_event("draining")
    assert client.ask(b"state") in (b"READY", b"DRAINING")
    client.close()
    assert node.wait_exit() == 0
    assert not node.family()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1])
def test_hup_usr1_and_usr2_end_nobody(start: Callable[..., Node], number: signal.Signals) -> None:
    node = start(workers=1, extra=True)
    before = set(node.family())
    os.killpg(node.process.pid, number)
    if number is not signal.SIGUSR1:
        node.wait_event({signal.SIGHUP: "reload_unavailable", signal.SIGUSR2: "upgrade_unavailable"}[number])
    client = node.connect_to(0)
    assert client.ask(b"hold") == b"held"
    assert set(node.family()) == before
    client.close()
    node.signal(signal.SIGTERM)
    assert node.wait_exit() == 0


def test_a_crash_loop_backs_off_and_the_healthy_worker_serves(start: Callable[..., Node]) -> None:
    node = start(workers=2, fail={"1": "crash"})
    delays = [node.wait_event("child_died", child="worker 1")["successor_in_s"] for _ in range(4)]
    assert delays == [0.0, 0.1, 0.2, 0.4]
    for client in [node.connect() for _ in range(20)]:
        client.greet()
        assert client.slot == 0


def test_a_worker_that_cannot_boot_leaves_the_healthy_one_alone(start: Callable[..., Node]) -> None:
    node = start(workers=2, fail={"0": "cannot boot"}, drain_timeout=0.2)
    assert node.wait_event("child_died", child="worker 0")["how"] == "exit code 78"
    assert node.connect_to(1).ask(b"hold") == b"held"
    node.signal(signal.SIGTERM)
    assert node.wait_exit() == 0


def test_if_no_worker_can_boot_the_master_says_so_and_ends(start: Callable[..., Node]) -> None:
    node = start(ready=False, workers=2, fail={"0": "cannot boot", "1": "cannot boot"})
    assert node.wait_exit() == 78
    assert node.wait_event("cannot_start")
    assert not node.family()


def test_a_stuck_worker_leaves_a_traceback_and_is_replaced(start: Callable[..., Node]) -> None:
    node = start(workers=1, beat_timeout=1.0)
    victim = node.connect_to(0)
    victim.sock.sendall(b"stuck\n")
    assert node.wait_event("child_silent", child="worker 0")
    assert node.wait_event("child_died", child="worker 0")["how"] == "killed by SIGABRT"
    assert "Fatal Python error: Aborted" in node.text
    assert "_on_word" in node.text
    assert node.connect_to(0).pid != victim.pid


def test_a_frozen_worker_that_hears_no_abort_is_killed(start: Callable[..., Node]) -> None:
    node = start(workers=1, beat_timeout=1.0)
    victim = node.connect_to(0)
    os.kill(victim.pid, signal.SIGSTOP)
    assert node.wait_event("child_killed", child="worker 0")
    assert node.connect_to(0).pid != victim.pid


def test_when_the_master_is_killed_everybody_finishes_and_goes(start: Callable[..., Node], tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    node = start(workers=2, path=path, extra=False)
    client = node.connect_to(0)
    assert client.ask(b"hold") == b"held"
    node.signal(signal.SIGKILL)
    node.wait_event("orphaned", process="worker 1")
    eventually(lambda: client.ask(b"state") == b"DRAINING", "the worker's state")
    (telemetry,) = [title for title in node.family().values() if "telemetry" in title]
    assert telemetry
    successor = start(workers=2, path=path, port=node.port)
    assert successor.connect_to(0).ask(b"hold") == b"held"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        assert sock.recv(100).startswith(b"worker")
    client.close()
    eventually(lambda: not node.family(), "the end of the orphans")
    assert os.path.exists(path)


def test_a_second_daemon_on_the_same_addresses_is_refused(start: Callable[..., Node]) -> None:
    node = start(workers=1)
    second = start(ready=False, workers=1, port=node.port)
    assert second.wait_exit() == 1
    assert f"127.0.0.1:{node.port}" in second.text


def test_the_unix_path_goes_with_the_node(start: Callable[..., Node], tmp_path: Path) -> None:
    node = start(workers=2, path=str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(tmp_path / "s"))
        assert sock.recv(100).startswith(b"worker")
    node.signal(signal.SIGTERM)
    assert node.wait_exit() == 0
    assert os.listdir(tmp_path) == []


def test_systemd_hears_ready_watchdog_and_stopping_from_the_master_alone(
    start: Callable[..., Node], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        node = start(
            workers=2,
            environ={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "2000000", "WATCHDOG_PID": ""},
        )
        assert manager.recv(1000).startswith(b"FDSTORE=1\nFDNAME=listen-127.0.0.1_")
        assert b"FDNAME=proxyd-probe" in manager.recv(1000)
        ready = b""
        while not ready.startswith(b"READY"):
            ready = manager.recv(1000)
        assert ready.startswith(b"READY=1")
        assert f"MAINPID={node.process.pid}".encode() in ready
        assert manager.recv(1000) == b"WATCHDOG=1"
        node.signal(signal.SIGTERM)
        heard = b""
        while not heard.startswith(b"STOPPING=1"):
            heard = manager.recv(1000)
        assert node.wait_exit() == 0


def test_killing_any_child_at_any_time_refuses_nobody(start: Callable[..., Node]) -> None:
    node = start(workers=2)
    chance = random.Random(11)
    resets = 0
    for _ in range(20):
        children = [pid for pid, title in node.family().items() if "master" not in title]
        if children:
            os.kill(chance.choice(children), signal.SIGKILL)
        for _ in range(3):
            client = node.connect()
            try:
                client.greet()
            except (ConnectionError, IndexError):
                resets += 1  # its worker had accepted it and died
            client.close()
    assert resets < 20
    node.signal(signal.SIGTERM)
    assert node.wait_exit() == 0
    assert not node.family()
