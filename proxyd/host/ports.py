"""Local ports: how many outgoing connections may have, and which of them belong to services.

Owns: the kernel's notation of port lists, what listens on this node, the arithmetic of a range against destinations.
Must not know: the configuration, who asks. `listening`, `bind_error` and `holder` look at the machine, the rest is
pure.

A connection is (source address, source port, destination address, destination port). With IP_BIND_ADDRESS_NO_PORT a
source port serves every destination once for each source address, so it is one destination that runs a range out.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass

# How long the port of a closed connection is kept: TCP_TIMEWAIT_LEN of include/net/tcp.h, which no setting changes.
TIME_WAIT_S = 60
_LISTEN = "0A"  # of /proc/net/tcp, column st: proc(5), include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Egress:
    """What goes to one destination at most. `sources`: how many local addresses it is spread over, 1 or more."""

    destination: str
    connections: int
    sources: int = 1

    def lacks(self, ports: int) -> int:
        """How many connections find no port when a source address has so many; 0 when all do."""
        return max(0, self.connections - ports * self.sources)

    def sources_for(self, ports: int) -> int:
        """How many source addresses all connections need."""
        return -(-self.connections // max(1, ports))


def parse_range(text: str) -> tuple[int, int] | None:
    """The two ends of net.ipv4.ip_local_port_range, both of it; None for what is no range."""
    words = text.split()
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return int(words[0]), int(words[1])


def parse_list(text: str) -> set[int]:
    """Every port of net.ipv4.ip_local_reserved_ports: "11211,27017-27019". What is no number is passed over."""
    found: set[int] = set()
    for part in text.replace("\n", ",").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            found.update(range(int(first), min(int(last or first), 65535) + 1))
    return found


def write_list(ports: Iterable[int]) -> str:
    """The same, the other way round: neighbours as one range."""
    parts: list[list[int]] = []
    for port in sorted(set(ports)):
        if parts and parts[-1][1] == port - 1:
            parts[-1][1] = port
        else:
            parts.append([port, port])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def available(ends: tuple[int, int], reserved: set[int]) -> int:
    """How many ports a source address has for one destination."""
    low, high = ends
    return max(0, high - low + 1) - sum(low <= port <= high for port in reserved)


def unprotected(ports: Iterable[int], ends: tuple[int, int], reserved: set[int]) -> list[int]:
    """Those that an outgoing connection could take while their service is restarted."""
    return sorted({port for port in ports if ends[0] <= port <= ends[1]} - reserved)


def listening(net: str = "/proc/self/net") -> dict[int, set[int]]:
    """TCP ports that somebody in this network namespace listens on, and the inodes of the sockets. Empty where the
    kernel does not tell."""
    found: dict[int, set[int]] = {}
    for name in ("tcp", "tcp6"):
        try:
            with open(f"{net}/{name}", encoding="ascii") as file:
                next(file, "")
                for line in file:
                    words = line.split()
                    # Listeners come first; behind them may be a hundred thousand connections.
                    if len(words) < 10 or words[3] != _LISTEN:
                        break
                    found.setdefault(int(words[1].rpartition(":")[2], 16), set()).add(int(words[9]))
        except (OSError, ValueError):
            continue
    return found


def holder(inodes: set[int]) -> tuple[int, str] | None:
    """A process that has one of these sockets open, by number and name; not the first one, systemd, which holds sockets
    for others. None where there is no such process or this user may not know."""
    names = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if pid == "1":
            continue
        try:
            for name in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{name}") in names:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                        return int(pid), file.read().strip()
        except OSError:
            continue  # it ended, or is another user's
    return None


def bind_error(host: str, port: int) -> int:
    """Why an address cannot be bound (errno), 0 when it can. It is bound for a moment; nobody can connect to it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the daemon does: TIME_WAIT is no obstacle
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port))
    except OSError as error:
        return error.errno or -1
    return 0
