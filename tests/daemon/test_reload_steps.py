"""Every step of a reload, and every way it can fail, on a trivial node: what served goes on untouched, each time."""

from __future__ import annotations

import contextlib
import os
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

    def make(*renewals: dict[str, Any], **options: Any) -> Node:
        node = Node(**{"workers": 2, "renewals": list(renewals), **options})
        nodes.append(node)
        node.wait_event("ready")
        return node

    yield make
    for node in nodes:
        if node.process.poll() is None:
            node.signal(signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                node.wait_exit()
    left = [node.family() for node in nodes]
    for node in nodes:
        node.end()
    assert not any(left), f"left running: {left}"


def workers(node: Node) -> set[int]:
    return {pid for pid, title in node.family().items() if title.startswith("proxyd: worker")}


def descriptors(node: Node) -> int:
    return len(os.listdir(f"/proc/{node.process.pid}/fd"))


def reload(node: Node) -> dict[str, Any]:
    node.signal(signal.SIGHUP)
    return node.wait_event("reloaded")


def test_a_reload_replaces_the_workers_and_lets_the_old_ones_finish(start: Any) -> None:
    node = start()
    held = node.connect_to(0)
    assert held.ask(b"hold") == b"held"
    before = workers(node)
    told = reload(node)
    assert (told["generation"], told["workers"]) == (2, 2)
    assert node.connect_to(0).pid not in before
    assert node.connect_to(1).pid not in before
    assert held.ask(b"state") == b"READY"  # the node is
    assert held.pid in workers(node)
    held.close()
    node.wait_event("generation_gone", generation=1)
    assert not before & workers(node)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "a check that finds errors": ({"examine": "bad"}, "has errors"),
    "a check that crashes": ({"examine": "crash"}, "cannot run: exit code 9"),
    "a check that hangs": ({"examine": "hang"}, "did not end in time"),
    "a check that writes without end": ({"examine": "flood"}, "did not end in time"),
    "a plan that is refused": ({"refuse": "no room for this"}, "no room for this"),
    "a plan with a bug": ({"bug": "colour"}, "KeyError: 'colour'"),
    "a worker that cannot boot": ({"fail": {"1": "cannot boot"}}, "worker 1 of generation 2 did not start: exit code"),
    "a worker that crashes": ({"fail": {"0": "crash"}}, "worker 0 of generation 2 did not start: exit code 1"),
    "a worker that is never ready": ({"fail": {"1": "hang"}}, "worker 1 of generation 2 not ready within 0.7 s"),
    "more workers than there are seats": ({"workers": 15}, "15 workers do not fit twice"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_reload_that_fails_leaves_everything_as_it_was(start: Any, how: str) -> None:
    wish, says = FAILURES[how]
    node = start(wish, check_timeout=0.7, boot_timeout=0.7)
    before, open_before = workers(node), descriptors(node)
    node.signal(signal.SIGHUP)
    assert says in node.wait_event("reload_failed")["detail"]
    eventually(lambda: workers(node) == before, "only the old workers")
    assert {node.connect_to(0).pid, node.connect_to(1).pid} == before
    eventually(lambda: descriptors(node) <= open_before, "no descriptor is left")
    assert reload(node)["workers"] == 2
    assert node.connect_to(0).pid not in before


def test_what_a_failed_generation_had_accepted_is_finished(start: Any) -> None:
    node = start({"fail": {"1": "hang"}}, boot_timeout=2.0)
    before = workers(node)
    node.signal(signal.SIGHUP)
    eventually(lambda: len(workers(node) - before) == 2, "the new workers")
    accepted = eventually(lambda: new_client(node, before), "a client of a new worker")
    assert accepted.ask(b"hold") == b"held"
    node.wait_event("reload_failed")
    assert accepted.ask(b"state") == b"READY"
    accepted.close()
    eventually(lambda: workers(node) == before, "only the old workers")


def new_client(node: Node, before: set[int]) -> Any:
    client = node.connect()
    client.greet()
    if client.pid not in before:
        return client
    client.close()
    return None


def test_more_and_fewer_workers(start: Any) -> None:
    node = start({"workers": 4}, {"workers": 1})
    open_before = descriptors(node)
    reload(node)
    assert len({node.connect_to(slot).pid for slot in range(4)}) == 4
    reload(node)
    only = node.connect_to(0).pid
    for _ in range(20):  # the listeners of slots that are gone have their share of newcomers, and one who accepts
        client = node.connect()
        client.greet()
        assert client.pid == only
        client.close()
    node.wait_event("generation_gone", generation=2)
    eventually(lambda: len(workers(node)) == 1, "one worker")
    assert descriptors(node) <= open_before + 2  # the listeners of two more slots stay open for who waits there


def test_hups_in_a_row_are_one_after_the_other_and_become_few(start: Any) -> None:
    node = start()
    for _ in range(20):
        node.signal(signal.SIGHUP)
    eventually(lambda: node.wait_event("reloaded"), "a first result")
    told = reload(node)
    assert told["number"] < 10
    eventually(lambda: len(workers(node)) == 2, "two workers are left")


def test_a_hup_while_the_node_starts_waits_for_it(start: Any) -> None:
    node = Node(workers=2, renewals=[])
    try:
        eventually(lambda: len(workers(node)) == 2, "workers")
        node.signal(signal.SIGHUP)
        node.wait_event("ready")
        assert node.wait_event("reloaded")["generation"] == 2
        node.signal(signal.SIGTERM)
        assert node.wait_exit() == 0
        assert not node.family()
    finally:
        node.end()


def test_an_upgrade_to_what_is_no_such_program_changes_nothing(start: Any) -> None:
    node = start()
    before, open_before = workers(node), descriptors(node)
    node.signal(signal.SIGUSR2)
    assert "cannot run: exit code 3" in node.wait_event("upgrade_failed")["detail"]
    assert workers(node) == before
    eventually(lambda: descriptors(node) <= open_before, "no descriptor is left")


def test_an_upgrade_that_is_asked_for_in_the_middle_of_a_reload_follows_it(start: Any) -> None:
    node = start({"examine": "hang"}, check_timeout=1.0)
    node.signal(signal.SIGHUP)
    node.wait_event("reload_begun")
    node.signal(signal.SIGUSR2)
    assert "under way" in node.wait_event("upgrade_waits")["detail"]
    node.signal(signal.SIGHUP)
    node.wait_event("reload_failed", number=1)
    node.wait_event("upgrade_failed", number=2)
    node.wait_event("reloaded", number=3)


@pytest.mark.parametrize("wish", [{"examine": "hang"}, {"fail": {"1": "hang"}}])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
def test_the_end_in_the_middle_of_a_reload_leaves_nothing(
    start: Any, wish: dict[str, Any], number: signal.Signals
) -> None:
    node = start(wish, drain_timeout=0.3)
    before = len(node.family())
    node.signal(signal.SIGHUP)
    eventually(lambda: len(node.family()) > before, "a child more")
    node.signal(number)
    if "fail" in wish and number is signal.SIGTERM:
        node.wait_event("draining")
        node.signal(signal.SIGQUIT)  # one that never looks for signals would hold it up for 5 s
    assert node.wait_exit() == 0
    assert not node.family()


def test_a_killed_worker_of_a_generation_that_drains_is_not_replaced(start: Any) -> None:
    node = start()
    held = node.connect_to(1)
    held.ask(b"hold")
    reload(node)
    os.kill(held.pid, signal.SIGKILL)
    assert node.wait_event("child_ended", child="worker 1")["how"] == "killed by SIGKILL"
    node.wait_event("generation_gone", generation=1)
    eventually(lambda: len(workers(node)) == 2, "the two that serve")


def test_a_stuck_worker_of_a_generation_that_drains_is_found_and_not_replaced(start: Any) -> None:
    node = start(beat_timeout=1.0)
    stuck = node.connect_to(0)
    stuck.sock.sendall(b"stuck\n")
    reload(node)
    node.wait_event("child_silent", child="worker 0")
    node.wait_event("generation_gone", generation=1)
    eventually(lambda: len(workers(node)) == 2, "the two that serve")


def test_telemetry_is_never_there_twice(start: Any) -> None:
    node = start()

    def telemetry() -> list[int]:
        return [pid for pid, title in node.family().items() if title.startswith("proxyd: telemetry")]

    (before,) = telemetry()
    for _ in range(5):
        reload(node)
        assert len(telemetry()) <= 1
    eventually(lambda: len(telemetry()) == 1 and telemetry() != [before], "a successor")


def test_the_manager_hears_of_each_reload_and_keeps_the_listeners(start: Any, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        node = start(
            {"examine": "bad"}, {"workers": 3}, environ={"NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        assert said(manager, b"READY=1")
        node.signal(signal.SIGHUP)
        assert said(manager, b"RELOADING=1")
        assert b"failed" in said(manager, b"READY=1")
        node.signal(signal.SIGHUP)
        said(manager, b"RELOADING=1")
        assert b"STATUS=serving\n" in said(manager, b"READY=1")


def said(manager: socket.socket, word: bytes) -> bytes:
    while True:
        words = manager.recv(4000)
        if words.startswith(word):
            return words


def test_usr1_in_a_reload_is_for_everybody(start: Any) -> None:
    node = start({"fail": {"1": "hang"}}, boot_timeout=1.0)
    node.signal(signal.SIGHUP)
    node.wait_event("reload_begun")
    node.signal(signal.SIGUSR1)
    node.wait_event("logs_reopened")
    node.wait_event("reload_failed")


def test_many_reloads_leave_no_descriptors_and_no_processes(start: Any) -> None:
    node = start(workers=1)
    reload(node)
    eventually(lambda: len(node.family()) == 3, "master, worker, telemetry")
    before = descriptors(node)
    for _ in range(10):
        reload(node)
    eventually(lambda: len(node.family()) == 3, "master, worker, telemetry")
    eventually(lambda: descriptors(node) <= before, "no descriptor is left")
