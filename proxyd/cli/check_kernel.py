"""`--check-config`: each kernel setting of the table against the live one, and what it means for this configuration.

Owns: the reasons, which compute with the configuration's numbers, and the command that mends a setting. Must not know:
files, how to read a setting (host/look), which values are right (host/kernel). Pure.
Every finding here is a warning: a start goes on with any of these settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from proxyd.cli.check_found import Found, Load
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.host import memory, ports
from proxyd.host.kernel import BY_NAME, PORT_RANGE, RESERVED_PORTS, SETTINGS, Setting, command, in_words, is_met
from proxyd.host.look import ALLOWED, AVAILABLE, TCP_MEM, TIMESTAMPS, Host

FOR_GOOD = "for good: conf/sysctl.d/60-proxyd.conf, then sysctl --system"
OWN_FILE = "/etc/sysctl.d/61-proxyd-ports.conf"
# A finding names that many ports; the line to write has them all.
_NAMED_PORTS = 8
# Measured: what a client that stops reading takes with our socket option alone, and with the sysctl for both ends.
_SWALLOWED_BYTES, _SWALLOWED_THEN = 4_830_000, 260_000


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration on one machine."""

    config: Config
    load: Load
    host: Host

    @property
    def reserved(self) -> set[int]:
        return ports.parse_list(self.host.settings.get(RESERVED_PORTS, ""))

    @property
    def tcp_limit(self) -> int:
        """Bytes that all TCP buffers may have; 0 where it is not to be seen (in a container)."""
        return memory.last_number(self.host.settings.get(TCP_MEM, "")) * self.host.page_bytes

    @property
    def allowed(self) -> list[str]:
        """Congestion controls that a socket without rights may have."""
        settings = self.host.settings
        return settings.get(ALLOWED, settings.get(AVAILABLE, "")).split()

    @property
    def algorithms(self) -> str:
        """What upstreams' sockets use, as the file says."""
        return ", ".join(sorted({one.congestion_control or "the system's" for one in self.config.upstream}))


def kernel_settings(case: Case) -> Iterator[Found]:
    """Each setting whose live value is not as good as the wanted one."""
    for setting in SETTINGS:
        live = case.host.settings.get(setting.name)
        if live is None:
            if setting.in_namespace:
                yield _missing(setting)
        elif not is_met(setting, live):
            key, reason = _REASONS[setting.name]
            message = f"is {live or 'empty'}, wanted {in_words(setting)}: {reason(case, live)}"
            yield Found(False, key, message, _remedy(case, setting), live, setting.wanted, setting.name)


def _missing(setting: Setting) -> Found:
    key, _ = _REASONS[setting.name]
    since = f" (it came with {setting.since})" if setting.since else ""
    message = f"does not exist here, or may not be read{since}; wanted {in_words(setting)}: {setting.why}"
    return Found(False, key, message, "run a newer kernel, or look as root", "", setting.wanted, setting.name)


def _remedy(case: Case, setting: Setting) -> str:
    """The command, and why the value will be back at the next boot where a file says so."""
    now = command(setting.name, setting.wanted)
    available = case.host.settings.get(AVAILABLE, "").split()
    if setting.name == "net.ipv4.tcp_congestion_control" and available and setting.wanted not in available:
        now = f"modprobe tcp_{setting.wanted} && {now} (for good also conf/modules-load.d/proxyd.conf)"
    elif setting.name == "net.ipv4.tcp_congestion_control" and setting.wanted not in case.allowed:
        # Only outside of a container may a default be one that is not allowed yet; there, it becomes so.
        now += ", in a container once it is the machine's own"
    line = case.host.written.get(setting.name)
    if line is None:
        return f"{now} ({FOR_GOOD})"
    place = f"{line.file}:{line.line}"
    if is_met(setting, line.value):
        return f"sysctl --system ({place} has it, and it is not in force)"
    return f"{now}, and correct {place}, which sets {line.value} at each boot"


# -- why it matters for this configuration -----------------------------------------------------------------------------


def _port_range(case: Case, live: str) -> str:
    ends = ports.parse_range(live) or (0, -1)
    has, busiest = ports.available(ends, case.reserved), case.load.busiest
    needs = f"{busiest.connections} connections to {busiest.destination} ({_product(case, busiest.destination)})"
    over = f" over {busiest.sources} source addresses" if busiest.sources > 1 else ""
    lacks = busiest.lacks(has)
    wanted = ports.parse_range(BY_NAME[PORT_RANGE].wanted) or (0, -1)
    if lacks:
        return (
            f"{has} ports for each source address and destination, and this configuration may open {needs}{over}:"
            f" {lacks} would get EADDRNOTAVAIL"
        )
    if ends[0] < wanted[0]:
        return (
            f"{has} ports are enough for {needs}{over}, but from {ends[0]} on they are those of services, which may"
            " then find their own taken"
        )
    rate = has * busiest.sources // ports.TIME_WAIT_S
    return (
        f"{has} ports for each source address and destination are enough for {needs}{over}; but should that upstream"
        f" close after each answer, a port rests for {ports.TIME_WAIT_S} s, and no more than {rate} new connections a"
        " second can be had"
    )


def _product(case: Case, destination: str) -> str:
    """Where the number comes from: "1024 x 4 workers"."""
    total = next(one.connections for _, one in case.load.egress if one.destination == destination)
    return f"{total // case.load.workers} x {case.load.workers} workers"


def _tw_reuse(case: Case, live: str) -> str:
    busiest = case.load.busiest
    return (
        f"a port to {busiest.destination} rests for {ports.TIME_WAIT_S} s after an upstream closed, of which"
        f" {busiest.connections} may be open; with 1 it can be used again after one second"
    )


def _fin_timeout(case: Case, live: str) -> str:
    return f"each of up to {case.load.streams} streams whose client vanished keeps a socket for {live} s after its end"


def _somaxconn(case: Case, live: str) -> str:
    backlog = case.config.server.backlog
    if live.isdigit() and int(live) < backlog:
        return f"listen() cuts server.backlog = {backlog} to {live}, and connections beyond that are dropped in a burst"
    return f"server.backlog = {backlog} just fits; a larger one, or that of nginx in front, would be cut in silence"


def _syn_backlog(case: Case, live: str) -> str:
    listeners = case.load.tcp_listeners * case.load.workers
    return f"half-open connections of {listeners} TCP listeners with server.backlog = {case.config.server.backlog} each"


def _syncookies(case: Case, live: str) -> str:
    who = "server.listen is" if case.load.is_public else "nginx in front of server.listen may be"
    return f"without them a flood of SYNs fills the queue, and {who} reachable from other machines"


def _qdisc(case: Case, live: str) -> str:
    return f"upstream.congestion_control is {case.algorithms}: without fq BBR paces with timers of its own, at some CPU"


def _congestion(case: Case, live: str) -> str:
    clients = "server.listen's clients come over it" if case.load.is_public else "nginx's clients come over it"
    return f"upstreams use {case.algorithms}, other sockets of this machine {live}: {clients}"


def _slow_start(case: Case, live: str) -> str:
    return (
        "a connection of the pool that was idle (upstream.idle_expiry) begins slowly again, unless it has bbr;"
        f" configured: {case.algorithms}"
    )


def _migrate(case: Case, live: str) -> str:
    server = case.config.server
    return (
        f"{server.workers} listeners share each TCP address: closing one resets the up to {server.backlog} connections"
        " that wait there"
    )


def _notsent(case: Case, live: str) -> str:
    text = (
        f"behind a proxy a client that stops reading takes {_SWALLOWED_BYTES / 1e6:.2f} MB before proxyd sees it,"
        f" {_SWALLOWED_THEN / 1e6:.2f} MB with 16384; {case.load.streams} streams are allowed"
    )
    if case.tcp_limit:
        text += f", and {case.tcp_limit // _SWALLOWED_BYTES} such fill tcp_mem ({memory.in_words(case.tcp_limit)})"
    return text


def _maxima(case: Case, live: str) -> str:
    read, write = (memory.last_number(case.host.settings.get(f"net.ipv4.tcp_{one}", "")) for one in ("rmem", "wmem"))
    ours = sum(memory.last_number(BY_NAME[f"net.ipv4.tcp_{one}"].wanted) for one in ("rmem", "wmem"))
    limit = case.tcp_limit or case.host.ram_bytes
    name = f"tcp_mem ({memory.in_words(limit)})" if case.tcp_limit else f"the memory ({memory.in_words(limit)})"
    full = memory.stalled_until_full(limit, read, write)
    return (
        f"a stalled stream may hold {memory.in_words(read + write)} in the kernel, so {full} fill {name}, of the"
        f" {case.load.streams} that this configuration allows; with ours it is {limit // ours}"
    )


def _orphans(case: Case, live: str) -> str:
    held = memory.in_words(memory.last_number(case.host.settings.get("net.ipv4.tcp_wmem", "")))
    return f"a client that vanished keeps up to {held} for minutes after its stream ended, and {case.load.streams} may"


# For each setting the option that makes it matter, and the reason.
_REASONS: dict[str, tuple[KeyPath, Callable[[Case, str], str]]] = {
    PORT_RANGE: (("upstream", 0, "max_connections"), _port_range),
    "net.ipv4.tcp_tw_reuse": (("upstream", 0, "max_connections"), _tw_reuse),
    "net.ipv4.tcp_fin_timeout": (("server", "listen"), _fin_timeout),
    "net.core.somaxconn": (("server", "backlog"), _somaxconn),
    "net.ipv4.tcp_max_syn_backlog": (("server", "backlog"), _syn_backlog),
    "net.ipv4.tcp_syncookies": (("server", "listen"), _syncookies),
    "net.core.default_qdisc": (("upstream", 0, "congestion_control"), _qdisc),
    "net.ipv4.tcp_congestion_control": (("upstream", 0, "congestion_control"), _congestion),
    "net.ipv4.tcp_slow_start_after_idle": (("upstream", 0, "idle_expiry"), _slow_start),
    "net.ipv4.tcp_migrate_req": (("server", "workers"), _migrate),
    "net.ipv4.tcp_notsent_lowat": (("stream", "buffer"), _notsent),
    "net.ipv4.tcp_rmem": (("stream", "buffer"), _maxima),
    "net.ipv4.tcp_wmem": (("stream", "buffer"), _maxima),
    "net.ipv4.tcp_orphan_retries": (("server", "listen"), _orphans),
}


# -- what is not in the table, and computed ----------------------------------------------------------------------------


def reserved_ports(case: Case) -> Iterator[Found]:
    """Ports of services, ours among them, that an outgoing connection could take while nobody listens there."""
    live = case.host.settings.get(PORT_RANGE, "")
    ends, wanted = ports.parse_range(live), ports.parse_range(BY_NAME[PORT_RANGE].wanted)
    if ends is None or wanted is None:
        return
    if not is_met(BY_NAME[PORT_RANGE], live):  # soon it is ours
        ends = min(ends[0], wanted[0]), max(ends[1], wanted[1])
    open_ports = ports.unprotected({*case.host.listening, *case.load.listen_ports}, ends, case.reserved)
    if not open_ports:
        return
    own = sorted(set(open_ports) & case.load.listen_ports)
    named = ports.write_list(open_ports[:_NAMED_PORTS]) + (" and others" if len(open_ports) > _NAMED_PORTS else "")
    whole = ports.write_list({*case.reserved, *open_ports})
    whose = f" ({ports.write_list(own)}: proxyd's)" if own else ""
    has = case.host.settings.get(RESERVED_PORTS, "")
    message = (
        f"is {has or 'empty'}, wanted {whole}: there are listeners on {named}{whose}, within {ends[0]} to {ends[1]}"
        " where outgoing connections take their ports: a service that is restarted may find its own taken"
    )
    remedy = f"{command(RESERVED_PORTS, whole)} (for good the whole line in {OWN_FILE}: {RESERVED_PORTS} = {whole})"
    yield Found(False, ("server", "listen"), message, remedy, has, whole, RESERVED_PORTS)


def timestamps(case: Case) -> Iterator[Found]:
    """What tcp_tw_reuse stands on."""
    live = case.host.settings.get(TIMESTAMPS, "1")
    if live == "0":
        message = f"is 0, wanted 1: without it tcp_tw_reuse has no effect, and {_tw_reuse(case, live)}"
        key: KeyPath = ("upstream", 0, "max_connections")
        yield Found(False, key, message, command(TIMESTAMPS, "1"), live, "1", TIMESTAMPS)


def port_needs(case: Case) -> Iterator[Found]:
    """Destinations that even our range could not serve: then it is source addresses that are missing."""
    wanted = ports.parse_range(BY_NAME[PORT_RANGE].wanted) or (0, -1)
    has = ports.available(wanted, case.reserved)
    live = case.host.settings.get(PORT_RANGE, "")
    for index, egress in case.load.egress:
        if egress.lacks(has):
            need = egress.sources_for(has)
            message = (
                f"{egress.sources} source address{'es' if egress.sources > 1 else ''} for {egress.connections}"
                f" connections to {egress.destination} ({_product(case, egress.destination)}): {egress.lacks(has)} of"
                f" them find no port even with {PORT_RANGE} = {BY_NAME[PORT_RANGE].wanted}, {has} for each address"
                + (f" (live: {live})" if live else "")
            )
            remedy = f"name {need} local addresses, or lower upstream.max_connections or server.workers"
            key: KeyPath = ("upstream", index, "source_addresses")
            yield Found(False, key, message, remedy, str(egress.sources), str(need))


def congestion_control(case: Case) -> Iterator[Found]:
    """Algorithms that upstreams ask for and sockets of an unprivileged daemon cannot have; one finding for each."""
    settings = case.host.settings
    if AVAILABLE not in settings:
        return
    available = settings[AVAILABLE].split()
    told = {""}
    for index, upstream in enumerate(case.config.upstream):
        name = upstream.congestion_control
        if name in told:
            continue
        told.add(name)
        key: KeyPath = ("upstream", index, "congestion_control")
        if name not in available:
            message = f"this kernel has no {name} ({AVAILABLE} is {settings[AVAILABLE]}): connections use the system's"
            remedy = f"modprobe tcp_{name} (for good: conf/modules-load.d/proxyd.conf), or leave it empty"
            yield Found(False, key, message, remedy, settings[AVAILABLE], name)
        elif name not in case.allowed:
            message = f"only root may choose {name} ({ALLOWED} is {settings[ALLOWED]}): others get the system's"
            remedy = command(ALLOWED, f"{settings[ALLOWED]} {name}")
            yield Found(False, key, message, remedy, settings[ALLOWED], name)
