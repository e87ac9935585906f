"""THE table of kernel settings: what each should be on a node that runs proxyd, why, and what is dangerous about more.

Owns: the settings of `conf/sysctl.d/60-proxyd.conf` and `conf/modules-load.d/proxyd.conf`, which `kernel_files` writes
from here; what a live value is compared by; what the founding document named and we leave alone, with the reason.
Must not know: the configuration, files, the live kernel (`look` reads it, `cli/check_host` says what it means here).
Invariants: each setting that the founding document names is in SETTINGS or in LEFT_ALONE, never in both; values stand
as sysctl prints them, one space between the words of one.

Sources: ip-sysctl.rst, net.rst, nf_conntrack-sysctl.rst of the kernel's Documentation; tcp(7), ip(7), listen(2).
"Measured" means here: two cores, Linux 6.18, loopback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto


class Rule(Enum):
    """How a live value is compared with the wanted one."""

    EXACTLY = auto()
    AT_LEAST = auto()
    # From 1 to the wanted value: 0 stands for the kernel's own choice, which is more.
    AT_MOST = auto()
    # Two ports: no lower than ours, nearly as wide, and one even, one odd.
    PORTS = auto()
    # Three numbers: the last, which autotuning may reach, is no more than ours.
    MAXIMUM = auto()


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting that we ship. `founding`: what the founding document asked for, "" where it did not name it.
    `in_namespace` False: it exists once a machine, and inside a network namespace (a container) not at all."""

    name: str
    wanted: str
    rule: Rule
    why: str
    danger: str
    source: str
    founding: str = ""
    in_namespace: bool = True
    since: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """What is not in our file although the founding document, or many a guide, names it."""

    name: str
    founding: str
    verdict: str
    instead: str
    source: str


MODULES: tuple[tuple[str, str], ...] = (
    ("tcp_bbr", "net.ipv4.tcp_congestion_control and upstream.congestion_control name it"),
    ("sch_fq", "net.core.default_qdisc names it"),
)

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "net.ipv4.ip_local_port_range", "10240 65535", Rule.PORTS, founding="1024 65535",
        why="each connection to an upstream takes a local port of this range, once for each source address and"
        " destination; the kernel asks for one bound even and one odd",
        danger="1024 65535 is dangerous alone: outgoing connections sit on the ports of services. With 9,000 of them, 5"
        " of 6 runs could not bind one of ten usual service ports (measured). So list what listens above 10240 in"
        " net.ipv4.ip_local_reserved_ports. And more ports are second best: upstream.source_addresses gives a whole"
        " range for each address",
        source="ip-sysctl.rst, ip(7); measured",
    ),
    Setting(
        "net.ipv4.tcp_tw_reuse", "1", Rule.EXACTLY, founding="1",
        why="a port in TIME_WAIT towards a destination may be used for it again after a second; outgoing only. The pool"
        " makes it rarely needed: watch proxyd_sockets_time_wait",
        danger="needs net.ipv4.tcp_timestamps, which is on; the default 2 does it on loopback only",
        source="ip-sysctl.rst",
    ),
    Setting(
        "net.ipv4.tcp_fin_timeout", "10", Rule.AT_MOST, founding="10",
        why="how long a socket that nobody holds any more waits in FIN_WAIT_2 for the other side's end",
        danger="often misread: TIME_WAIT is 60 s whatever stands here (measured)",
        source="tcp(7), ip-sysctl.rst; measured",
    ),
    Setting(
        "net.core.somaxconn", "65535", Rule.AT_LEAST, founding="65535",
        why="listen() takes the smaller of its argument and this: with less, server.backlog is cut in silence",
        danger="a cap and not a target: 65,535 that wait at 20,000 accepts a second hide three seconds. proxyd listens"
        " with server.backlog (4096); watch ListenOverflows (nstat)",
        source="listen(2), net.rst",
    ),
    Setting(
        "net.ipv4.tcp_max_syn_backlog", "8192", Rule.AT_LEAST, founding="8192000",
        why="half-open connections that are remembered before SYN cookies begin",
        danger="8192000 is wrong: the queue is bounded by the accept backlog anyway, and with SYN cookies off it would"
        " allow gigabytes of them",
        source="ip-sysctl.rst, tcp(7)",
    ),
    Setting(
        "net.ipv4.tcp_syncookies", "1", Rule.EXACTLY,
        why="a flood of SYNs leaves the listener reachable",
        danger="2 sends cookies always, which loses TCP options; it is for tests",
        source="ip-sysctl.rst",
    ),
    Setting(
        "net.core.default_qdisc", "fq", Rule.EXACTLY, founding="fq", in_namespace=False,
        why="paces BBR's packets and shares an interface fairly among connections",
        danger="no effect on loopback, and on an interface only when it comes up anew (or `tc qdisc replace`). Since"
        " Linux 4.13 BBR paces itself without it, at some CPU",
        source="net.rst, tc-fq(8)",
    ),
    Setting(
        "net.ipv4.tcp_congestion_control", "bbr", Rule.EXACTLY, founding="bbr",
        why="a lost packet on a long way does not halve the rate of a stream; and what is the default may be chosen per"
        " socket by everybody, as upstream.congestion_control does",
        danger="the module must be loaded first (modules-load.d), or the line fails; nothing to gain on loopback",
        source="ip-sysctl.rst, tcp(7)",
    ),
    Setting(
        "net.ipv4.tcp_slow_start_after_idle", "0", Rule.EXACTLY, founding="0",
        why="with cubic a pooled connection that was idle starts slowly again: a long prompt takes more round trips",
        danger="no effect on BBR's sockets, which keep their own model of the path",
        source="ip-sysctl.rst",
    ),
    Setting(
        "net.ipv4.tcp_migrate_req", "1", Rule.EXACTLY, founding="1", since="Linux 5.14",
        why="when one of several SO_REUSEPORT listeners is closed, what waits in its queue goes to another: without it"
        " 22 to 26 % of the queued connections were reset, with it none (measured)",
        danger="none known; proxyd keeps its listeners in the master besides",
        source="ip-sysctl.rst; measured",
    ),
    Setting(
        "net.ipv4.tcp_notsent_lowat", "16384", Rule.AT_MOST, founding="16384",
        why="the most valuable one: how much a socket takes that it has not sent. Behind a proxy that does not buffer,"
        " a client that stopped reading swallowed 10.05 MB before proxyd saw it; with our socket option alone 4.83 MB;"
        " with this, which is for the proxy's sockets, too, 0.26 MB (measured)",
        danger="very small values cost a system call for each little piece",
        source="tcp(7), ip-sysctl.rst; measured",
    ),
    Setting(
        "net.ipv4.tcp_rmem", "4096 131072 4194304", Rule.MAXIMUM, founding="named",
        why="the last number is what a connection's receive buffer may grow to, and what a stalled stream eats",
        danger="large maxima are for bulk transfers over long ways; here a few hundred stalled clients would fill"
        " net.ipv4.tcp_mem",
        source="tcp(7), ip-sysctl.rst",
    ),
    Setting(
        "net.ipv4.tcp_wmem", "4096 16384 1048576", Rule.MAXIMUM, founding="named",
        why="the last number is what a connection's send buffer may grow to, and what a client that stalls eats",
        danger="as for tcp_rmem",
        source="tcp(7), ip-sysctl.rst",
    ),
    Setting(
        "net.ipv4.tcp_orphan_retries", "3", Rule.AT_MOST,
        why="how often a socket that nobody holds sends its last bytes again: this and TCP_USER_TIMEOUT bound orphans;"
        " 0 stands for 8, which is minutes",
        danger="1 gives up on clients with a bad line",
        source="ip-sysctl.rst",
    ),
)  # fmt: skip

RESERVED_PORTS = "net.ipv4.ip_local_reserved_ports"
PORT_RANGE = "net.ipv4.ip_local_port_range"

LEFT_ALONE: tuple[Judged, ...] = (
    Judged(
        RESERVED_PORTS, "not named",
        verdict="required beside a port range that reaches down to services, and different on each node: writing it"
        " replaces the whole list, so a list of ours would remove yours",
        instead="`proxyd --check-config` computes it from what listens on this node and prints the complete line, for a"
        " file of your own: /etc/sysctl.d/61-proxyd-ports.conf",
        source="ip-sysctl.rst",
    ),
    Judged(
        "net.ipv4.tcp_max_orphans", "262144",
        verdict="the wrong lever: each orphan may hold 64 KiB that cannot be swapped, 16 GiB in all; and it does not"
        " exist inside a network namespace",
        instead="the kernel's own value, TCP_USER_TIMEOUT on every socket, tcp_orphan_retries = 3",
        source="ip-sysctl.rst, tcp(7)",
    ),
    Judged(
        "net.ipv4.tcp_mem", "not named",
        verdict="the kernel sets it by the machine's memory",
        instead="smaller maxima in tcp_rmem and tcp_wmem; `proxyd --check-config` compares it with what is configured",
        source="tcp(7)",
    ),
    Judged(
        "net.ipv4.tcp_keepalive_time", "named",
        verdict="the default of two hours is useless here, and other programs may count on it",
        instead="SO_KEEPALIVE with 30 s, 10 s, 3 probes on each of our sockets",
        source="tcp(7)",
    ),
    Judged(
        "net.netfilter.nf_conntrack_max", "named",
        verdict="only where nf_conntrack is loaded and a rule uses it; an established connection is kept for 5 days",
        instead="exempt loopback and egress to port 443 (NOTRACK, docs/kernel.md), or size it: `proxyd --check-config`"
        " computes how much",
        source="nf_conntrack-sysctl.rst",
    ),
)  # fmt: skip

# Of the founding document, and set on each of our sockets rather than for the machine: host/sockets and upstream/dial.
ON_OUR_SOCKETS: tuple[Judged, ...] = (
    Judged(
        "IP_BIND_ADDRESS_NO_PORT", "on",
        verdict="right whenever a source address is bound: over 2,000 ports and to two destinations 2,000 connections"
        " could be had without it, 4,000 with it (measured)",
        instead="always, with upstream.source_addresses", source="ip(7); measured",
    ),
    Judged(
        "TCP_USER_TIMEOUT", "on",
        verdict="right: it bounds unacknowledged data and zero windows, goes before keepalive, is inherited on accept",
        instead="30 s towards clients, 20 s towards upstreams", source="tcp(7)",
    ),
    Judged("SO_KEEPALIVE", "on", verdict="right, per socket", instead="30 s idle, 10 s, 3 probes", source="tcp(7)"),
    Judged("TCP_NODELAY", "on", verdict="right: an event must not wait for the next", instead="on", source="tcp(7)"),
    Judged(
        "TCP_NOTSENT_LOWAT", "16384", verdict="right, beside the sysctl: on our sockets whatever the node's value is",
        instead="16384", source="tcp(7)",
    ),
    Judged(
        "TCP_CONGESTION", "bbr", verdict="right on the way to a provider",
        instead="upstream.congestion_control", source="tcp(7)",
    ),
    Judged(
        "LimitNOFILE", "large", verdict="right, per worker: two descriptors a stream, and a third more",
        instead="131072 in the unit; a start refuses a limit below what the configuration needs", source="getrlimit(2)",
    ),
)  # fmt: skip

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


def normal(value: str) -> str:
    """A value with one space between its words, as they are compared: the kernel puts tabs there."""
    return " ".join(value.split())


def is_met(setting: Setting, live: str) -> bool:
    """Whether the live value is as good as the wanted one. What is no number where one must be is not."""
    if setting.rule is Rule.EXACTLY:
        return normal(live) == setting.wanted
    try:
        has, wants = _numbers(live), _numbers(setting.wanted)
    except ValueError:
        return False
    if len(has) != len(wants):
        return False
    if setting.rule is Rule.AT_LEAST:
        return has[0] >= wants[0]
    if setting.rule is Rule.AT_MOST:
        return 1 <= has[0] <= wants[0]
    if setting.rule is Rule.MAXIMUM:
        return has[2] <= wants[2]
    # Nine tenths: a node that keeps a corner for itself has enough all the same.
    is_wide = has[1] - has[0] + 1 >= 0.9 * (wants[1] - wants[0] + 1)
    return has[0] >= wants[0] and is_wide and has[0] % 2 != has[1] % 2


def in_words(setting: Setting) -> str:
    """The wanted value, with how it is meant."""
    if setting.rule is Rule.AT_LEAST:
        return f"at least {setting.wanted}"
    if setting.rule is Rule.AT_MOST:
        return f"at most {setting.wanted}"
    return setting.wanted


def command(name: str, value: str) -> str:
    """What sets it now, until the next boot."""
    quoted = f"'{value}'" if " " in value else value
    return f"sysctl -w {name}={quoted}"


def _numbers(value: str) -> list[int]:
    return [int(word) for word in value.split()]
