"""The manager's datagrams, inherited sockets, and the judgement on open files."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxyd.host import limits, systemd
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


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        yield sock


def told(manager: socket.socket) -> tuple[list[str], list[int]]:
    """One datagram: its lines and the descriptors that came with it."""
    data, fds, _, _ = socket.recv_fds(manager, 9999, 300)
    return data.decode().split("\n"), fds


def test_a_reload_is_told_with_its_time(manager: socket.socket) -> None:
    Notifier({"NOTIFY_SOCKET": manager.getsockname()}).reloading("upgrading to 0.2.0")
    (first, time, status), fds = told(manager)
    assert (first, status, fds) == ("RELOADING=1", "STATUS=upgrading to 0.2.0", [])
    assert time.startswith("MONOTONIC_USEC=")
    assert int(time.partition("=")[2]) > 0


def test_a_status_is_one_line_whatever_is_in_it(manager: socket.socket) -> None:
    Notifier({"NOTIFY_SOCKET": manager.getsockname()}).stopping("it says:\nMAINPID=1\r\n")
    assert told(manager)[0] == ["STOPPING=1", "STATUS=it says: MAINPID=1"]


def test_figures_stand_behind_the_last_words_and_are_sent_when_they_change(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    notifier.ready("serving; the last reload failed: a file")
    told(manager)
    for text in ("2 workers, 0 streams", "2 workers, 0 streams", "2 workers, 1 streams"):
        notifier.figures(text)
    notifier.watchdog()
    assert told(manager)[0] == ["STATUS=serving; the last reload failed: a file (2 workers, 0 streams)"]
    assert told(manager)[0] == ["STATUS=serving; the last reload failed: a file (2 workers, 1 streams)"]
    assert told(manager)[0] == ["WATCHDOG=1"]


def test_stored_descriptors_reach_the_manager_under_their_name(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        assert notifier.fd_store("listen-0", [one.fileno(), two.fileno()])
        lines, fds = told(manager)
        assert lines == ["FDSTORE=1", "FDNAME=listen-0", "FDPOLL=0"]
        kept = [socket.socket(fileno=fd) for fd in fds]
        assert [sock.getsockname() for sock in kept] == [one.getsockname(), two.getsockname()]
        for sock in kept:
            sock.close()
    assert notifier.fd_remove("listen-0")
    assert told(manager) == (["FDSTOREREMOVE=1", "FDNAME=listen-0"], [])


def test_more_descriptors_than_a_message_takes_go_in_several(manager: socket.socket) -> None:
    with open(os.devnull) as null:
        many = [os.dup(null.fileno()) for _ in range(systemd.FDS_A_MESSAGE + 1)]
        assert Notifier({"NOTIFY_SOCKET": manager.getsockname()}).fd_store("listeners", many)
    counts = []
    for _ in range(2):
        _, fds = told(manager)
        counts.append(len(fds))
        for fd in fds:
            os.close(fd)
    for fd in many:
        os.close(fd)
    assert counts == [systemd.FDS_A_MESSAGE, 1]


@pytest.mark.parametrize("name", ["", "a:b", "a\nb", "ä", "x" * 256])
def test_a_name_that_the_manager_would_take_for_another_is_refused(name: str, manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    with pytest.raises(ValueError, match="cannot be called"):
        notifier.fd_store(name, [0])
    with pytest.raises(ValueError, match="cannot be called"):
        notifier.fd_remove(name)


def test_a_manager_that_reads_nothing_holds_nobody_up_for_long(manager: socket.socket) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
    sent = 0
    while notifier.send("X=1"):
        sent += 1
        assert sent < 100_000
    with open(os.devnull) as null:
        assert notifier.fd_store("listen", [null.fileno()]) is False
        told(manager)
        assert notifier.fd_store("listen", [null.fileno()]) is True


def test_without_a_manager_nothing_is_stored() -> None:
    notifier = Notifier({})
    assert not notifier.is_managed
    assert notifier.fd_store("listen", [0]) is False
    assert notifier.fd_remove("listen") is False


def test_the_image_that_follows_gets_what_was_taken_and_no_more() -> None:
    taken = {"NOTIFY_SOCKET": "/run/n", "WATCHDOG_USEC": "9000000", "WATCHDOG_PID": "5"}
    environ = {**taken, "HOME": "/"}
    first = Notifier(environ, pid=5)
    assert environ == {"HOME": "/"}
    assert first.environ_for_exec() == taken
    follower = Notifier(first.environ_for_exec(), pid=5)
    assert follower.watchdog_s == first.watchdog_s == 4.5
    assert Notifier({}).environ_for_exec() == {}


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


@pytest.mark.parametrize("keeps", [True, False])
def test_whether_the_manager_keeps_descriptors_is_found_out(tmp_path: Path, keeps: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        store: list[int] = []

        def serve() -> None:
            for _ in range(3):
                data, fds, _, _ = socket.recv_fds(manager, 1000, 10)
                if keeps and data.startswith(b"FDSTORE=1"):
                    store.extend(fds)
                    continue
                for fd in fds:
                    os.close(fd)

        thread = threading.Thread(target=serve)
        thread.start()
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        try:
            assert notifier.has_store() is keeps
        finally:
            thread.join(10)
            for fd in store:
                os.close(fd)


def test_without_a_manager_nothing_is_kept() -> None:
    assert not Notifier({}).has_store()
