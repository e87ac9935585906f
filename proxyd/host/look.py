"""One look at the machine: live kernel settings, ports, limits, memory, the unit, and who writes which setting.

Owns: reading them; `Host`, which decisions are made from. Must not know: what is wanted, the configuration.
Invariants: nothing is changed or started; what cannot be read is missing rather than an error; well under 0.1 s.

A network namespace has settings of its own: what is read is that of this process, as a daemon started here would have.
The unit hides /proc/sys from the daemon (ProcSubset=pid), so there `is_visible` is False; `ExecStartPre=+` sees it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from proxyd.host import limits, ports, unit
from proxyd.host.kernel import BY_NAME, RESERVED_PORTS, normal
from proxyd.host.unit import Unit

AVAILABLE = "net.ipv4.tcp_available_congestion_control"
ALLOWED = "net.ipv4.tcp_allowed_congestion_control"
TCP_MEM = "net.ipv4.tcp_mem"
TIMESTAMPS = "net.ipv4.tcp_timestamps"
UNPRIVILEGED = "net.ipv4.ip_unprivileged_port_start"
TRACKED, MAY_TRACK = "net.netfilter.nf_conntrack_count", "net.netfilter.nf_conntrack_max"
TRACKED_FOR = "net.netfilter.nf_conntrack_tcp_timeout_established"
_OTHERS = (AVAILABLE, ALLOWED, TCP_MEM, TIMESTAMPS, UNPRIVILEGED, TRACKED, MAY_TRACK, TRACKED_FOR)
NAMES = (*BY_NAME, RESERVED_PORTS, *_OTHERS)
# sysctl.d(5), in the order in which a file of one name wins; /etc/sysctl.conf is read last (sysctl(8), --system).
FOLDERS = ("etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d", "lib/sysctl.d")
LAST_FILE = "etc/sysctl.conf"
FILE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """The line of a sysctl file that wins at the next boot."""

    file: str
    line: int
    value: str


@dataclass(frozen=True, slots=True)
class Host:
    """What was seen. `settings` by name, with single spaces; a name that is missing does not exist here or may not be
    read. `listening`: TCP ports and the inodes of their sockets. `ram_bytes` 0: unknown. `is_unit`: systemd started
    this process, so `open_files` is the unit's limit. `bind_error`: see ports; asked for the configured addresses."""

    is_visible: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, Written] = field(default_factory=dict)
    listening: Mapping[int, set[int]] = field(default_factory=dict)
    ram_bytes: int = 0
    page_bytes: int = 4096
    open_files: int = 1 << 30
    unit: Unit | None = None
    is_unit: bool = False
    bind_error: Callable[[str, int], int] = lambda host, port: 0


def look(environ: Mapping[str, str], root: str = "/") -> Host:
    """Everything at once. `root`: of a tree in the place of /, for tests."""
    return Host(
        is_visible=os.path.isdir(os.path.join(root, "proc/sys/net")),
        settings=_live(NAMES, root),
        written=written(NAMES, root),
        listening=ports.listening(os.path.join(root, "proc/self/net")),
        ram_bytes=_ram(),
        page_bytes=os.sysconf("SC_PAGE_SIZE"),
        open_files=limits.allowed_open_files(),
        unit=unit.find(root),
        is_unit=unit.started_this(environ, os.getpid()),
        bind_error=ports.bind_error,
    )


def _ram() -> int:
    """By a system call: /proc/meminfo is not there where only processes are visible."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _live(names: Iterable[str], root: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            path = os.path.join(root, "proc/sys", name.replace(".", "/"))
            with open(path, encoding="ascii", errors="replace") as file:
                found[name] = normal(file.read(FILE_BYTES))
        except OSError:
            continue
    return found


def written(names: Iterable[str], root: str = "/") -> dict[str, Written]:
    """For each setting the line that wins, of all sysctl files that may be read."""
    wanted = set(names)
    found: dict[str, Written] = {}
    for path in _files(root):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                lines = file.read(FILE_BYTES).splitlines()
        except OSError:
            continue
        for number, line in enumerate(lines, 1):
            name, sign, value = line.strip().removeprefix("-").partition("=")
            name = name.strip().replace("/", ".")
            if sign and name in wanted:
                found[name] = Written("/" + os.path.relpath(path, root), number, normal(value))
    return found


def _files(root: str) -> list[str]:
    """In the order in which they are applied: by name, whatever folder each lies in."""
    named: dict[str, str] = {}
    for folder in FOLDERS:
        try:
            found = os.listdir(os.path.join(root, folder))
        except OSError:
            continue
        for name in found:
            if name.endswith(".conf"):
                named.setdefault(name, os.path.join(root, folder, name))
    return [*(named[name] for name in sorted(named)), os.path.join(root, LAST_FILE)]
