"""Local ports towards one upstream: how many there are, how many are in use, and what an operator is told of it.

Owns: the range that the kernel takes ports from, the count of those that this worker's connections hold, the one pure
function that judges it (`decide_ports`), its metrics and its lines in the log. Must not know: sockets, pools, requests.

    open connections + closed by us less than a TIME_WAIT ago  (all workers)  against  ports x source addresses

    FINE --80 % in use--> LOW: a warning; our closes are resets, which leave no TIME_WAIT
    any  --the kernel finds none--> OUT: dials wait

Only the kernel says OUT. Our count is an estimate: other programs take ports from the same range, and TIME_WAITs are
used again under `tcp_tw_reuse`; refusing requests on an estimate would refuse some that can be served.

A port is held by an address that is dialled, so the count is that of the busiest address. Bounds: MAX_ADDRESSES
addresses and a count for each second of a TIME_WAIT. Times are monotonic seconds.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from proxyd._shm import Gauge
from proxyd.log import Log
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.region import Region

__all__ = [
    "Held", "Neighbours", "PortRange", "PortState", "Ports", "Usage", "decide_ports", "read_port_range", "used_on_node",
]  # fmt: skip

USED = "proxyd_egress_ports_used"
SYSCTL = Path("/proc/sys/net/ipv4")
# Linux: TCP_TIMEWAIT_LEN is a constant of 60 s; with tcp_tw_reuse the port is free again after tcp_tw_reuse_delay, 1 s.
TIME_WAIT_S = 60
REUSE_S = 1
# The kernel's own default range (32768 60999), assumed where /proc/sys is hidden (ProcSubset=pid of the shipped unit).
ASSUMED_PORTS = 28_232
# From here on the warning. At half: told at a load that may stay for years; at 95 %: a burst is faster than the reader.
LOW_SHARE = 0.8
REPEAT_S = 60.0
# A peer that closes after this many answers within ten seconds, and after half of them, keeps no connection alive.
# Half: a provider that restarts is told; four times: a small node never hears of it.
REFUSALS_TO_TELL = 20
REFUSAL_WINDOW_S = 10.0
REFUSAL_REPEAT_S = 600.0
# Addresses of one name whose connections are counted apart; of more, those that hold nothing are forgotten.
MAX_ADDRESSES = 64
# How often shared memory is read for what the other workers hold: each second, sooner when our own count moved by a
# twentieth of the limit, and not at all below a hundredth of it. Reading costs up to 2 ms of the loop, so that a burst
# which takes all ports at once costs twenty readings and is told before it is over.
READ_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class PortRange:
    """What the kernel takes local ports from. `is_known`: it was read, not assumed. `reuses_all`, `reuses_loopback`:
    where TIME_WAIT is over after REUSE_S."""

    size: int = ASSUMED_PORTS
    is_known: bool = False
    reuses_all: bool = False
    reuses_loopback: bool = False

    def time_wait_s(self, host: str) -> int:
        """How long a port stays taken after we closed first towards this address."""
        if self.reuses_all or (self.reuses_loopback and _is_loopback(host)):
            return REUSE_S
        return TIME_WAIT_S


def read_port_range(sysctl: Path = SYSCTL) -> PortRange:
    """The range of this network namespace less what is reserved in it; the assumed one where it cannot be read."""
    try:
        low, high = map(int, (sysctl / "ip_local_port_range").read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return PortRange()
    reserved = 0
    for part in _read(sysctl / "ip_local_reserved_ports").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (not last or last.isdecimal()):
            reserved += max(0, min(high, int(last or first)) - max(low, int(first)) + 1)
    reuse = _read(sysctl / "tcp_tw_reuse") if _read(sysctl / "tcp_timestamps") != "0" else "0"
    return PortRange(max(1, high - low + 1 - reserved), True, reuse == "1", reuse in ("1", "2"))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def used_on_node(region: Region, monotonic_s: float) -> dict[str, int]:
    """What all workers hold, by upstream: what `Neighbours` reads."""
    gauges = read(region, monotonic_s).gauges.get(USED, {})
    return {dict(labels)["upstream"]: count for labels, count in gauges.items()}


class PortState(Enum):
    FINE = 0
    LOW = 1
    OUT = 2


@dataclass(frozen=True, slots=True)
class Usage:
    """What a judgement is made of. `used`: by all workers; `is_out`: the kernel found none, and dials wait for one."""

    used: int
    limit: int
    is_out: bool


def decide_ports(usage: Usage) -> PortState:
    """How the ports towards an upstream stand."""
    if usage.is_out:
        return PortState.OUT
    return PortState.LOW if usage.used >= LOW_SHARE * usage.limit else PortState.FINE


class Held:
    """The ports of one dialled address in this worker: open ones, and a ring of seconds of those in TIME_WAIT."""

    __slots__ = ("_ring", "_second", "_span_s", "_waiting", "open")

    def __init__(self, time_wait_s: int) -> None:
        self.open = 0
        self._span_s = time_wait_s + 1  # whole seconds: the last one may have just begun
        self._ring = [0] * self._span_s
        self._waiting = 0
        self._second = 0

    def wait(self, now: float) -> None:
        self._turn(now)
        self._ring[int(now) % self._span_s] += 1
        self._waiting += 1

    def used(self, now: float) -> int:
        self._turn(now)
        return self.open + self._waiting

    def _turn(self, now: float) -> None:
        """Forgets the seconds that are over."""
        second = int(now)
        for past in range(max(self._second + 1, second - self._span_s + 1), second + 1):
            self._waiting -= self._ring[past % self._span_s]
            self._ring[past % self._span_s] = 0
        self._second = max(second, self._second)


class Neighbours:
    """What all workers hold towards an upstream, by the gauges that each of them sets.

    `read`: the gauge proxyd_egress_ports_used of the node, by upstream; None where there is one worker.
    """

    __slots__ = ("_gauges", "_monotonic", "_node", "_own", "_read", "_read_s")

    def __init__(self, read: Callable[[], Mapping[str, int]] | None, monotonic: Callable[[], float]) -> None:
        self._read, self._monotonic = read, monotonic
        self._gauges: dict[str, Gauge] = {}
        self._own: dict[str, int] = {}  # our gauges at the time of
        self._node: Mapping[str, int] = {}  # the reading
        self._read_s = -READ_EVERY_S

    def enter(self, name: str, gauge: Gauge) -> None:
        """`gauge` is what this worker tells of upstream `name`."""
        self._gauges[name] = gauge

    def others(self, name: str, siblings: Sequence[str], limit: int) -> int:
        """What others hold towards the host and port of `name`: other workers, and our other `siblings` there."""
        own = self._gauges[name].value
        if self._read is not None and own * 100 >= limit:
            age_s = self._monotonic() - self._read_s
            moved = abs(own - self._own.get(name, 0)) * 20 >= limit
            if moved or age_s >= READ_EVERY_S:
                self._node = self._read()
                self._own = {each: gauge.value for each, gauge in self._gauges.items()}
                self._read_s = self._monotonic()
        here = sum(self._gauges[each].value for each in siblings if each != name)
        elsewhere = sum(max(0, self._node.get(each, 0) - self._own.get(each, 0)) for each in siblings)
        return here + elsewhere


class Ports:
    """The ports of one upstream in one worker. `siblings`: the upstreams at the same host and port, itself included."""

    __slots__ = (
        "_answers", "_dials", "_held", "_is_low", "_is_out", "_limit", "_log", "_name", "_neighbours", "_outs",
        "_outs_counter", "_range", "_refusals", "_refused", "_siblings", "_sources", "_told_s", "_used_gauge",
        "_window_s",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        ports: PortRange,
        sources: int,
        siblings: Sequence[str],
        neighbours: Neighbours,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self._name, self._range, self._sources, self._log = name, ports, max(1, sources), log
        self._siblings, self._neighbours = siblings, neighbours
        self._held: dict[str, Held] = {}
        self._dials = 0
        self._limit = ports.size * self._sources
        self._used_gauge = metrics.gauge("proxyd_egress_ports_used", upstream=name)
        metrics.gauge("proxyd_egress_ports_limit", upstream=name).set(self._limit)
        self._refusals = metrics.counter("proxyd_upstream_keepalive_refused_total", upstream=name)
        self._outs_counter = metrics.counter("proxyd_egress_ports_out_total", upstream=name)
        neighbours.enter(name, self._used_gauge)
        self._is_low = self._is_out = False
        self._told_s: dict[str, float] = {}
        self._outs = 0  # since the last line
        self._answers = self._refused = 0  # in the window that began at
        self._window_s = 0.0

    @property
    def is_low(self) -> bool:
        """Close so that no TIME_WAIT stays."""
        return self._is_low or self._is_out

    def state(self, now: float) -> PortState:
        return decide_ports(Usage(self._count(now), self._limit, self._is_out))

    # -- what the keeper tells ---------------------------------------------------------------------------------------

    def on_dial(self, now: float) -> None:
        """A dial begins, so it takes a port; `on_dialled` is its end, whatever came of it."""
        self._dials += 1
        self._look(now)

    def on_dialled(self) -> None:
        self._dials -= 1

    def on_open(self, host: str, now: float) -> Held:
        """A connection to this address was made; what it holds is for `on_closed`."""
        held = self._held.get(host)
        if held is None:
            if len(self._held) >= MAX_ADDRESSES:
                self._held = {name: each for name, each in self._held.items() if each.used(now)}
            held = self._held.setdefault(host, Held(self._range.time_wait_s(host)))
        held.open += 1
        return held

    def on_closed(self, held: Held, by_us: bool, now: float) -> None:
        """It was closed; `by_us` first and in order, so its port rests in TIME_WAIT."""
        held.open -= 1
        if by_us:
            held.wait(now)
        self._used_gauge.set(self._used(now))

    def on_none(self, now: float, detail: str) -> None:
        """The kernel found no local port for a dial, which now waits."""
        self._outs_counter.add(1)
        self._outs += 1
        self._is_out = True
        if not self._is_due("egress_ports_out", now, REPEAT_S):
            return
        self._log.error(
            "egress_ports_out",
            upstream=self._name,
            detail=detail,
            used=self._count(now),
            limit=self._limit,
            dials=self._outs,
            remedy="requests wait for a port; add upstream.source_addresses or widen net.ipv4.ip_local_port_range",
        )
        self._outs = 0

    def on_enough(self) -> None:
        """Nobody waits for a port any more."""
        if self._is_out:
            self._is_out = False
            self._log.info("egress_ports_back", upstream=self._name)

    def on_answered(self, refused: bool, now: float) -> None:
        """An exchange ended as it should; `refused`: the peer will not have the connection used again."""
        if now - self._window_s >= REFUSAL_WINDOW_S:
            self._answers = self._refused = 0
            self._window_s = now
        self._answers += 1
        if not refused:
            return
        self._refusals.add(1)
        self._refused += 1
        if self._refused < REFUSALS_TO_TELL or 2 * self._refused < self._answers:
            return
        if self._is_due("upstream_refuses_keepalive", now, REFUSAL_REPEAT_S):
            self._log.warning(
                "upstream_refuses_keepalive",
                upstream=self._name,
                refused=self._refused,
                answers=self._answers,
                ports=self._limit,
                remedy="each request takes a new connection and a local port: have the upstream keep connections open",
            )

    def tick(self, now: float) -> None:
        """Once a second."""
        self._look(now)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _used(self, now: float) -> int:
        """In this worker, towards the busiest address; dials are taken to go there."""
        return self._dials + max((held.used(now) for held in self._held.values()), default=0)

    def _count(self, now: float) -> int:
        """In all workers."""
        own = self._used(now)
        self._used_gauge.set(own)
        return own + self._neighbours.others(self._name, self._siblings, self._limit)

    def _look(self, now: float) -> None:
        """Shows what is in use, and warns while there is still room."""
        used = self._count(now)
        self._is_low = decide_ports(Usage(used, self._limit, False)) is PortState.LOW
        if self._is_low and not self._is_out and self._is_due("egress_ports_low", now, REPEAT_S):
            self._log.warning(
                "egress_ports_low",
                upstream=self._name,
                used=used,
                limit=self._limit,
                is_limit_known=self._range.is_known,
                source_addresses=self._sources,
                remedy="add upstream.source_addresses, widen net.ipv4.ip_local_port_range, "
                "or have the upstream keep connections open",
            )

    def _is_due(self, event: str, now: float, repeat_s: float) -> bool:
        """At most one line of a kind in that time."""
        told = self._told_s.get(event)
        if told is not None and now - told < repeat_s:
            return False
        self._told_s[event] = now
        return True
