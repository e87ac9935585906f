"""The options of the sockets that a running worker holds: asked of the kernel, and as ss(8) shows them.

`getsockopt` is asked on the worker's own sockets, which pidfd_getfd(2) hands to the parent of a process; ss tells what
has no other face: the timer, the congestion control in use, that a port was taken at connect().
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import CHAT, DONE, Daemon, Script, Upstream, Wire, ask, chat_chunk, node, wait_for

Make = Callable[[Script], Upstream]
SYS_PIDFD_GETFD = 438  # the same number on every architecture of Linux
AVAILABLE = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
OPTIONS = {
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "probes": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "notsent_lowat": (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT),
}
COMMON = {"nodelay": 1, "keepalive": 1, "idle": 30, "interval": 10, "probes": 3, "notsent_lowat": 16_384}


@contextlib.contextmanager
def sockets_of(pid: int) -> Iterator[list[socket.socket]]:
    """Copies of a process's connected TCP sockets."""
    pidfd = os.pidfd_open(pid)
    found = []
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if not os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    continue
                fd = libc.syscall(SYS_PIDFD_GETFD, pidfd, int(name), 0)
                assert fd >= 0, os.strerror(ctypes.get_errno())
                sock = socket.socket(fileno=fd)
                found.append(sock)
        yield [sock for sock in found if sock.family == socket.AF_INET and has_peer(sock)]
    finally:
        os.close(pidfd)
        for sock in found:
            sock.close()


def has_peer(sock: socket.socket) -> bool:
    try:
        return bool(sock.getpeername())
    except OSError:
        return False


def ss(which: str) -> str:
    """What ss says of the established connections that match, one line each."""
    words = ["ss", "-tnoieHO", "--inet-sockopt", "state", "established", which]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.fixture
def streaming(upstream: Make, tmp_path: Path) -> Iterator[Callable[..., tuple[Daemon, Upstream]]]:
    """A daemon in the middle of a stream, so that both its sockets are in use."""
    done: list[bool] = []

    def talk(wire: Wire) -> None:
        wire.stream(chat_chunk(), end=False)
        wait_for(lambda: done, 60)
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")

    with contextlib.ExitStack() as stack:

        def start(more: str) -> tuple[Daemon, Upstream]:
            house = upstream(talk)
            daemon = stack.enter_context(node(tmp_path, house, more=more))
            stack.callback(done.append, True)
            reply = ask(daemon, "/v1/chat/completions", CHAT)
            next(reply.pieces())
            return daemon, house

        yield start


def options_of(sock: socket.socket) -> dict[str, int]:
    return {name: sock.getsockopt(*where) for name, where in OPTIONS.items()}


def test_both_sides_have_the_options_that_bound_a_dead_peer_and_an_unread_byte(
    streaming: Callable[..., tuple[Daemon, Upstream]],
) -> None:
    daemon, house = streaming('source_addresses = ["127.0.0.2"]')
    with sockets_of(daemon.child("worker")) as found:
        (client,) = [sock for sock in found if sock.getsockname()[1] == daemon.port]
        (up,) = [sock for sock in found if sock.getpeername()[1] == house.port]
        assert options_of(client) == COMMON | {"user_timeout": 30_000}
        assert options_of(up) == COMMON | {"user_timeout": 20_000}
        assert up.getsockopt(socket.IPPROTO_IP, 24) == 1, "IP_BIND_ADDRESS_NO_PORT"
        assert up.getsockname()[0] == "127.0.0.2"
    # Once what was sent is acknowledged, the timer that runs is the keepalive's.
    timer = re.compile(r"timer:\(keepalive,[0-9]+sec,0\)")
    wait_for(lambda: all(timer.search(ss(which)) for which in (f"sport = :{daemon.port}", f"dport = :{house.port}")))
    of_client, of_upstream = ss(f"sport = :{daemon.port}"), ss(f"dport = :{house.port}")
    assert re.search(r"\bbind_addr_no_port\b", of_upstream), of_upstream
    assert "127.0.0.2:" in of_upstream
    assert "bind_addr_no_port" not in of_client


def test_bbr_is_the_upstream_socket_s_own_where_the_kernel_has_it_and_told_where_not(
    streaming: Callable[..., tuple[Daemon, Upstream]],
) -> None:
    daemon, house = streaming('congestion_control = "bbr"')
    own = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    line = ss(f"dport = :{house.port}")
    lines = [json.loads(line) for line in daemon.log().splitlines() if "congestion_control_unavailable" in line]
    if "bbr" in AVAILABLE:
        assert re.search(r"\bbbr\b", line), line
        assert lines == []
    else:
        assert re.search(rf"\b{own}\b", line), line
        assert lines[0]["wanted"] == "bbr"
    # The client's side is the kernel's to choose.
    assert re.search(rf"\b{own}\b", ss(f"sport = :{daemon.port}"))


def test_an_algorithm_that_the_kernel_has_not_is_told_once_and_the_stream_goes_on(
    streaming: Callable[..., tuple[Daemon, Upstream]],
) -> None:
    daemon, _ = streaming('congestion_control = "nosuch"')
    wait_for(lambda: "congestion_control_unavailable" in daemon.log())
    lines = [json.loads(line) for line in daemon.log().splitlines() if "congestion_control_unavailable" in line]
    assert [(line["upstream"], line["wanted"]) for line in lines] == [("openai", "nosuch")]
    assert "tcp_bbr" in lines[0]["remedy"]
