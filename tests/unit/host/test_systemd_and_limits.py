"""The manager's datagrams, inherited sockets, and the judgement on open files."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from proxyd.host import limits
from proxyd.host.systemd import Notifier, take_listen_fds


def test_the_manager_gets_readiness_watchdog_and_stopping(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    environ = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "5"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        notifier = Notifier(environ, pid=5)
        notifier.ready("serving")
        notifier.watchdog()
        notifier.stopping("draining")
        assert manager.recv(999) == f"READY=1\nSTATUS=serving\nMAINPID={os.getpid()}".encode()
        assert manager.recv(999) == b"WATCHDOG=1"
        assert manager.recv(999) == b"STOPPING=1\nSTATUS=draining"
    assert notifier.watchdog_s == 15.0
    assert environ == {}


def test_an_abstract_notify_socket_works() -> None:
    name = f"proxyd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        assert Notifier({"NOTIFY_SOCKET": "@" + name}).send("X=1")
        assert manager.recv(99) == b"X=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/nowhere/at/all"}])
def test_without_a_manager_notifying_does_nothing(environ: dict[str, str]) -> None:
    assert Notifier(environ).send("READY=1") is False


@pytest.mark.parametrize("usec, pid", [("0", "5"), ("x", "5"), ("1000", "6"), ("", "")])
def test_a_watchdog_that_is_off_or_another_processs_is_not_pinged(usec: str, pid: str) -> None:
    assert Notifier({"WATCHDOG_USEC": usec, "WATCHDOG_PID": pid}, pid=5).watchdog_s is None


def test_inherited_sockets_of_another_process_are_not_taken() -> None:
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "2"}
    assert take_listen_fds(environ, pid=2) == {}
    assert environ == {}


def test_too_few_open_files_refuse_and_say_what_to_do() -> None:
    found = limits.decide(1024, 2000)
    assert not found.is_enough
    assert "limit of 2000 is below the 2726" in found.problem
    assert "LimitNOFILE" in found.remedy


def test_a_tight_limit_warns_and_a_wide_one_is_silent() -> None:
    tight = limits.decide(1024, limits.decide(1024, 0).needed)
    assert tight.is_enough
    assert "leaves little" in tight.problem
    assert limits.decide(1024, 20_000).problem == limits.decide(1024, 20_000).remedy == ""


def test_raising_reaches_the_hard_limit() -> None:
    import resource

    allowed = limits.raise_open_files()
    assert allowed == resource.getrlimit(resource.RLIMIT_NOFILE)[1] == limits.allowed_open_files()
