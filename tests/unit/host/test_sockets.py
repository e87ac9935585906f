"""Listeners: shared ports, inherited options, Unix paths of the living and of the dead."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxyd.host import sockets
from proxyd.host.sockets import Listeners, UnixListener, bind_tcp


@dataclass(frozen=True)
class At:
    kind: str
    host: str | None = None
    port: int | None = None
    path: str | None = None


@pytest.fixture
def closing():
    held: list[socket.socket] = []
    yield held
    for sock in held:
        sock.close()


def test_listeners_of_one_address_share_its_port(closing) -> None:
    made = bind_tcp("127.0.0.1", 0, 3, 16)
    closing += made
    assert len({sock.getsockname() for sock in made}) == 1
    assert not any(sock.getblocking() for sock in made)


def test_a_second_daemon_on_the_same_port_is_refused_although_reuseport_would_let_it(closing) -> None:
    made = bind_tcp("127.0.0.1", 0, 2, 16)
    closing += made
    port = made[0].getsockname()[1]
    with pytest.raises(OSError, match=f"127.0.0.1:{port}") as caught:
        bind_tcp("127.0.0.1", port, 2, 16)
    assert caught.value.errno == errno.EADDRINUSE


def test_accepted_sockets_inherit_every_option_of_the_listener(closing) -> None:
    (listener,) = bind_tcp("127.0.0.1", 0, 1, 16)
    client = socket.create_connection(listener.getsockname())
    listener.setblocking(True)
    accepted, _ = listener.accept()
    closing += [listener, client, accepted]
    tcp = socket.IPPROTO_TCP
    seen = {
        option: accepted.getsockopt(level, getattr(socket, option))
        for level, option in [
            (tcp, "TCP_NODELAY"),
            (tcp, "TCP_USER_TIMEOUT"),
            (tcp, "TCP_NOTSENT_LOWAT"),
            (tcp, "TCP_KEEPIDLE"),
            (tcp, "TCP_KEEPINTVL"),
            (tcp, "TCP_KEEPCNT"),
            (socket.SOL_SOCKET, "SO_KEEPALIVE"),
        ]
    }
    assert seen == {
        "TCP_NODELAY": 1,
        "TCP_USER_TIMEOUT": 30_000,
        "TCP_NOTSENT_LOWAT": 16_384,
        "TCP_KEEPIDLE": 30,
        "TCP_KEEPINTVL": 10,
        "TCP_KEEPCNT": 3,
        "SO_KEEPALIVE": 1,
    }
    assert accepted.getsockopt(tcp, socket.TCP_DEFER_ACCEPT) == 0


def test_an_ipv6_listener_leaves_ipv4_alone(closing) -> None:
    (six,) = bind_tcp("::", 0, 1, 16)
    closing.append(six)
    closing += bind_tcp("0.0.0.0", six.getsockname()[1], 1, 16)


def test_a_name_that_does_not_resolve_names_the_address() -> None:
    with pytest.raises(sockets.ListenError, match=r"cannot listen on host\.invalid:80"):
        bind_tcp("host.invalid", 80, 1, 16)


def test_a_unix_listener_has_its_mode_and_removes_its_own_path_only(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = UnixListener(path, 16)
    assert os.stat(path).st_mode & 0o777 == 0o660
    assert os.listdir(tmp_path) == ["s"]
    first.sock.close()
    second = UnixListener(path, 16)
    first.unlink()
    assert os.path.exists(path)
    second.unlink()
    assert not os.path.exists(path)
    second.sock.close()


def test_a_unix_path_on_which_a_living_process_answers_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = UnixListener(path, 16)
    with pytest.raises(OSError, match=f"in use by process {os.getpid()}"):
        UnixListener(path, 16)
    first.unlink()
    first.sock.close()


def test_a_unix_path_that_is_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(OSError, match="not a socket"):
        UnixListener(str(path), 16)
    assert path.read_text() == "precious"


def test_orphans_of_a_dead_master_do_not_keep_the_unix_path(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    reading, writing = os.pipe()
    master = os.fork()
    if master == 0:
        UnixListener(path, 16)
        worker = os.fork()
        if worker == 0:
            signal.pause()
            os._exit(0)
        os.write(writing, str(worker).encode())
        os._exit(0)
    os.waitpid(master, 0)
    orphan = int(os.read(reading, 32))
    try:
        successor = UnixListener(path, 16)
        successor.unlink()
        successor.sock.close()
    finally:
        os.kill(orphan, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_every_slot_has_its_own_tcp_listener_and_all_share_the_unix_one(tmp_path: Path) -> None:
    path, admin = str(tmp_path / "s"), str(tmp_path / "a")
    listeners = Listeners([At("tcp", "127.0.0.1", 0), At("unix", path=path)], [At("unix", path=admin)], 2, 16)
    try:
        (tcp0, unix0), (tcp1, unix1) = listeners.public
        assert unix0 is unix1
        assert tcp0 is not tcp1
        assert tcp0.getsockname() == tcp1.getsockname()
        assert listeners.of_slot(1) == [tcp1, unix1]
        assert listeners.tcp_of_slot(1) == [tcp1]
        listeners.unlink_public()
        assert (os.path.exists(path), os.path.exists(admin)) == (False, True)
        listeners.close_public()
        assert {sock.fileno() for sock in (tcp0, tcp1, unix0)} == {-1}
        assert listeners.admin[0].fileno() >= 0
    finally:
        listeners.unlink()
        listeners.close()
    assert not os.path.exists(admin)


def test_a_failed_start_leaves_nothing_open_and_no_path(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="cannot listen"):
            Listeners([At("unix", path=path), At("tcp", "127.0.0.1", port)], [], 2, 16)
    assert not os.path.exists(path)


def test_a_full_backlog_is_an_answer_too(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(path)
        server.listen(0)
        waiting.connect(path)
        with pytest.raises(OSError, match="in use"):
            sockets.refuse_live(path)


def test_time_wait_is_counted_where_only_processes_are_visible_in_proc() -> None:
    """As under the unit's ProcSubset=pid: a mount namespace whose /proc has no /proc/net."""
    program = (
        "import os; from proxyd.host.sockets import count_time_wait\n"
        "print('mounted', os.path.exists('/proc/net/sockstat'), count_time_wait() is not None)"
    )
    namespaces = ["-m"] if os.geteuid() == 0 else ["-Urmpf"]
    script = 'mount -t proc -o subset=pid proc /proc && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", *namespaces, "sh", "-c", script, sys.executable, program],
        cwd=Path(sockets.__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.stdout.startswith("mounted"):
        assert done.stdout == "mounted False True\n"
    else:  # may not mount here: what subset=pid leaves is everything below a process's own directory (proc(5))
        assert sockets.SOCKSTAT.startswith("/proc/self/")
        assert sockets.count_time_wait() is not None


def test_an_address_that_cannot_be_had_is_named_as_the_file_names_it() -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(sockets.ListenError) as caught:
            bind_tcp("::1", port, 1, 16)
    assert caught.value.address == f"[::1]:{port}"
    assert caught.value.errno == errno.EADDRINUSE
