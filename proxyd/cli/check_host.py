"""`--check-config`: the machine against this configuration, apart from the table of kernel settings (check_kernel).

Owns: open files, memory, connection tracking, the unit's times, addresses to listen on and to connect from. Must not
know: how they are read (host/look), how to start anything.
Severity: an error is what refuses a start of this process, or of the unit where it is the one that runs this file;
everything else is a warning. Open files are decided by the function that decides at the start (host/limits).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from proxyd.cli.check_found import Found, load_of
from proxyd.cli.check_kernel import (
    Case,
    congestion_control,
    kernel_settings,
    port_needs,
    reserved_ports,
    timestamps,
)
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.units import format_duration
from proxyd.host import limits, memory, ports
from proxyd.host.kernel import command
from proxyd.host.look import MAY_TRACK, TCP_MEM, TRACKED, TRACKED_FOR, UNPRIVILEGED, Host
from proxyd.shm.region import count_seats

# What the daemon may take beyond server.drain_timeout: streams that must be ended, and the last rows.
STOP_MARGIN_S = 15.0
# A stream is two connections, and nf_conntrack remembers a closed one for two minutes more.
TRACKED_PER_STREAM = 4
# Longer than every bound of ours: keepalive ends a dead connection after a minute. Twice: nothing gained.
TRACKED_FOR_S = 86_400
_ADMIN_S = 0.5


def host_findings(config: Config, host: Host, *, default_file: str) -> list[Found]:
    """Everything about the machine. `default_file`: what a unit without -c reads."""
    case = Case(config, load_of(config), host)
    found = [*_open_files(case, default_file), *_buffers(case, default_file), *_stop(case, default_file)]
    found += [*_listeners(case, default_file), *_source_addresses(case)]
    if not host.is_visible:
        found.append(_hidden())
        return found
    found += [*kernel_settings(case), *reserved_ports(case), *port_needs(case), *congestion_control(case)]
    found += [*timestamps(case), *_tcp_memory(case), *_tracking(case)]
    return found


def _hidden() -> Found:
    message = "this process cannot see /proc/sys (ProcSubset=pid of a unit, a sandbox): no kernel setting was looked at"
    remedy = "check from a shell, or with ExecStartPre=+ in the unit"
    return Found(False, ("server",), message, remedy, setting="kernel")


def _unit_runs_this(case: Case, default_file: str) -> bool:
    unit = case.host.unit
    return unit is not None and unit.runs(os.path.abspath(case.config.file), default_file)


def _open_files(case: Case, default_file: str) -> Iterator[Found]:
    """The limit of the process that would start: this one's, unless the unit is what starts this file."""
    unit, host = case.host.unit, case.host
    by_unit = unit is not None and not host.is_unit and _unit_runs_this(case, default_file)
    if by_unit and unit is not None:
        yield from _files(case, unit.open_files, f"LimitNOFILE of {unit.path}", is_decisive=True)
    whose = "the unit's limit" if host.is_unit else "the limit of this shell; the unit has its own"
    if not by_unit:
        whose = "the unit's limit" if host.is_unit else "the limit of this process, ulimit -Hn"
    yield from _files(case, host.open_files, whose, is_decisive=not by_unit)


def _files(case: Case, allowed: int, whose: str, *, is_decisive: bool) -> Iterator[Found]:
    judged = limits.decide(case.load.per_worker, allowed, count_seats(case.config.server.workers))
    if judged.problem and (is_decisive or not judged.is_enough):
        key: KeyPath = ("upstream", 0, "max_connections")
        is_error = is_decisive and not judged.is_enough
        message = f"{judged.problem} ({whose})" + ("; a start is refused" if is_error else "")
        yield Found(is_error, key, message, judged.remedy, str(allowed), str(judged.wanted))


def _buffers(case: Case, default_file: str) -> Iterator[Found]:
    ram, unit = case.host.ram_bytes, case.host.unit
    where = f"this machine has {memory.in_words(ram)}"
    if unit is not None and 0 < unit.memory_bytes < ram and _unit_runs_this(case, default_file):
        ram, where = unit.memory_bytes, f"MemoryMax of {unit.path} is {memory.in_words(unit.memory_bytes)}"
    held = memory.buffers(case.load.streams, case.config.stream.buffer)
    if memory.are_too_large(held, ram):
        message = (
            f"{case.load.streams} streams of {memory.in_words(case.config.stream.buffer)} hold {memory.in_words(held)}"
            f" when clients stop reading, and {where}: a worker would be killed for memory"
        )
        wanted = memory.in_words(int(ram * memory.BUFFERS_SHARE) // case.load.streams)
        live = memory.in_words(case.config.stream.buffer)
        yield Found(False, ("stream", "buffer"), message, "lower it, or upstream.max_connections", live, wanted)


def _tcp_memory(case: Case) -> Iterator[Found]:
    need = memory.ordinary_tcp(case.load.streams)
    if 0 < case.tcp_limit < need:
        live = case.host.settings[TCP_MEM]
        page = case.host.page_bytes
        wanted = " ".join(str(part * need // page // 4) for part in (6, 8, 12))
        message = (
            f"is {live}, wanted {wanted}: TCP may have {memory.in_words(case.tcp_limit)} in all, and"
            f" {case.load.streams} ordinary streams need {memory.in_words(need)}: connections would be reset"
        )
        remedy = f"{command(TCP_MEM, wanted)}, or lower upstream.max_connections"
        yield Found(False, ("upstream", 0, "max_connections"), message, remedy, live, wanted, TCP_MEM)


def _tracking(case: Case) -> Iterator[Found]:
    """Only where nf_conntrack is loaded; how long it remembers only where it has something to remember."""
    settings = case.host.settings
    most, count = settings.get(MAY_TRACK, ""), settings.get(TRACKED, "0")
    need = TRACKED_PER_STREAM * case.load.streams
    exempt = "or exempt our connections (NOTRACK, docs/kernel.md)"
    key: KeyPath = ("upstream", 0, "max_connections")
    if most.isdigit() and int(most) < need:
        wanted = 1 << (need - 1).bit_length()
        message = (
            f"is {most}, wanted at least {wanted}: {case.load.streams} streams are {need} tracked connections, with"
            f" those that just closed ({count} are tracked now); at the limit packets are dropped"
        )
        yield Found(False, key, message, f"{command(MAY_TRACK, str(wanted))}, {exempt}", most, str(wanted), MAY_TRACK)
    lasts = settings.get(TRACKED_FOR, "")
    if lasts.isdigit() and int(lasts) > TRACKED_FOR_S and count not in ("", "0"):
        wanted_s = 3600
        message = (
            f"is {lasts}, wanted {wanted_s}: a connection that ended without a word is remembered for"
            f" {int(lasts) // 3600} h, and {count} of {most} are taken"
        )
        remedy = f"{command(TRACKED_FOR, str(wanted_s))}, {exempt}"
        yield Found(False, key, message, remedy, lasts, str(wanted_s), TRACKED_FOR)


def _stop(case: Case, default_file: str) -> Iterator[Found]:
    unit, drain = case.host.unit, case.config.server.drain_timeout
    if unit is not None and _unit_runs_this(case, default_file) and unit.stop_s < drain + STOP_MARGIN_S:
        wanted = f"{drain + STOP_MARGIN_S:.0f}s"
        message = (
            f"{format_duration(drain)}, and systemd kills after TimeoutStopSec={unit.stop_s:.0f}s ({unit.path}):"
            " streams would be cut in the middle of the drain"
        )
        remedy = f"systemctl edit proxyd: [Service] TimeoutStopSec={wanted}"
        yield Found(False, ("server", "drain_timeout"), message, remedy, f"{unit.stop_s:.0f}s", wanted)


# -- addresses ---------------------------------------------------------------------------------------------------------


def _listeners(case: Case, default_file: str) -> Iterator[Found]:
    """What would refuse the start. Nothing where systemd is just starting the unit: the start itself comes next, and
    systemd may hold the listeners for it."""
    if case.host.is_unit:
        return
    server = case.config.server
    places = [(("server", "listen", index), one) for index, one in enumerate(server.listen)]
    for key, address in (*places, (("server", "admin"), server.admin)):
        if address.kind == "unix":
            continue
        code = case.host.bind_error(address.host, address.port)
        if code == errno.EADDRINUSE:
            yield from _taken(case, key, address.text, address.port)
        elif code == errno.EADDRNOTAVAIL:
            message = f"no interface of this machine has {address.host}; a start is refused"
            yield Found(True, key, message, "`ip address` lists them")
        elif code == errno.EACCES:
            first = _first_free(case)
            message = f"this user (uid {os.geteuid()}) may not bind a port below {first}; a start is refused"
            yield Found(True, key, message, f"a higher port, or {command(UNPRIVILEGED, str(address.port))}")
        elif address.port and _unit_runs_this(case, default_file) and _is_beyond_the_unit(case, address.port):
            message = f"root may bind port {address.port}, the unit's user may not: its start is refused"
            remedy = f"a higher port, or {command(UNPRIVILEGED, str(address.port))}"
            yield Found(False, key, message, remedy, _first_free(case), str(address.port))


def _first_free(case: Case) -> str:
    return case.host.settings.get(UNPRIVILEGED, "1024")


def _is_beyond_the_unit(case: Case, port: int) -> bool:
    unit, first = case.host.unit, _first_free(case)
    return os.geteuid() == 0 and unit is not None and unit.user != "root" and first.isdigit() and port < int(first)


def _taken(case: Case, key: KeyPath, text: str, port: int) -> Iterator[Found]:
    """Nothing where it is the running proxyd of this file; a warning where it may be systemd with a socket for it."""
    holder = ports.holder(case.host.listening.get(port, set()))
    if (holder is None or holder[1].startswith("proxyd")) and _answers(case.config):
        return
    if holder is None:
        message = f"another process has {text}, or systemd for the unit"
        yield Found(False, key, message, "`ss -ltnp`, as root, names it; end it, or choose another port")
    else:
        message = f"process {holder[0]} ({holder[1]}) has {text}; a start is refused"
        yield Found(True, key, message, "end it, or choose another port")


def _answers(config: Config) -> bool:
    """Whether the daemon of this configuration runs: somebody accepts at server.admin."""
    admin = config.server.admin
    family = socket.AF_UNIX if admin.kind == "unix" else socket.AF_INET6 if ":" in admin.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_ADMIN_S)
            sock.connect(admin.path if admin.kind == "unix" else (admin.host, admin.port))
    except OSError as error:
        return isinstance(error, PermissionError | TimeoutError)  # it is there, and not ours to ask
    return True


def _source_addresses(case: Case) -> Iterator[Found]:
    """A start goes on without them: an address may come later, with its interface."""
    for index, upstream in enumerate(case.config.upstream):
        for number, address in enumerate(upstream.source_addresses):
            if case.host.bind_error(str(address), 0) == errno.EADDRNOTAVAIL:
                key: KeyPath = ("upstream", index, "source_addresses", number)
                message = f"no interface of this machine has {address}: every connection from it fails"
                yield Found(False, key, message, f"ip address add {address} dev ..., or take it out")
