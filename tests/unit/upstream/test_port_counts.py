"""Local ports as they are counted and judged, and as the pool waits for one; no sockets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from proxyd.upstream.pool import Acquire, Bound, Close, Dial, Dialled, Hand, Keep, NoPort, Released, Tick, Wait, Why
from proxyd.upstream.ports import (
    ASSUMED_PORTS,
    MAX_ADDRESSES,
    REFUSALS_TO_TELL,
    REPEAT_S,
    Neighbours,
    PortRange,
    Ports,
    PortState,
    Usage,
    decide_ports,
    read_port_range,
)
from tests.unit.upstream.test_pool_decisions import Conn, Desk


def sysctl(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


def test_the_range_is_what_is_left_of_it_without_the_reserved_ports(tmp_path: Path) -> None:
    folder = sysctl(
        tmp_path,
        ip_local_port_range="1000\t1999",
        ip_local_reserved_ports="80,999-1009,1500,1990-2010,5000-6000",
        tcp_tw_reuse="2",
        tcp_timestamps="1",
    )
    found = read_port_range(folder)
    assert (found.size, found.is_known) == (1000 - 10 - 1 - 10, True)
    assert [found.time_wait_s(host) for host in ("127.0.0.9", "::1", "192.0.2.1", "2001:db8::1%eth0")] == [1, 1, 60, 60]


@pytest.mark.parametrize(
    ("reuse", "timestamps", "seconds"),
    [("0", "1", (60, 60)), ("1", "1", (1, 1)), ("1", "0", (60, 60)), ("2", "1", (1, 60))],
)
def test_a_time_wait_lasts_a_minute_or_as_tcp_tw_reuse_says(
    tmp_path: Path, reuse: str, timestamps: str, seconds: tuple[int, int]
) -> None:
    found = read_port_range(
        sysctl(tmp_path, ip_local_port_range="1000 1999", tcp_tw_reuse=reuse, tcp_timestamps=timestamps)
    )
    assert (found.time_wait_s("127.0.0.1"), found.time_wait_s("192.0.2.1")) == seconds


@pytest.mark.parametrize("text", [None, "", "1000", "a b"])
def test_a_range_that_cannot_be_read_is_assumed(tmp_path: Path, text: str | None) -> None:
    found = read_port_range(tmp_path if text is None else sysctl(tmp_path, ip_local_port_range=text))
    assert (found.size, found.is_known, found.time_wait_s("127.0.0.1")) == (ASSUMED_PORTS, False, 60)


def test_eighty_percent_are_low_and_only_the_kernel_says_out() -> None:
    judged = [decide_ports(Usage(used, 100, False)) for used in (0, 79, 80, 100, 500)]
    assert judged == [PortState.FINE, PortState.FINE, PortState.LOW, PortState.LOW, PortState.LOW]
    assert decide_ports(Usage(3, 100, True)) is PortState.OUT


class World:
    """One worker's ports towards upstreams `a` and `b` at one place, 100 ports each."""

    def __init__(self, kit: SimpleNamespace, read: Callable[[], dict[str, int]] | None = None) -> None:
        self.metrics, self.log, self.now = kit.Metrics(), kit.Log(), 1000.0
        self.neighbours = Neighbours(read, lambda: self.now)
        siblings = ["a", "b"]
        self.a, self.b = (
            Ports(name, PortRange(100, True), 1, siblings, self.neighbours, self.metrics, self.log)  # type: ignore[arg-type]
            for name in siblings
        )

    def open(self, count: int, host: str = "192.0.2.1", ports: Ports | None = None) -> list[Any]:
        ports = ports or self.a
        made = []
        for _ in range(count):
            ports.on_dial(self.now)
            made.append(ports.on_open(host, self.now))
            ports.on_dialled()
        return made

    def events(self) -> list[str]:
        return [event for event, _ in self.log.lines]

    def used(self) -> int:
        return int(self.metrics.read("proxyd_egress_ports_used", upstream="a"))


def test_a_port_rests_for_a_minute_after_we_closed_first_and_not_otherwise(kit: SimpleNamespace) -> None:
    world = World(kit)
    first, second = world.open(2)
    world.a.on_closed(first, True, world.now)
    world.a.on_closed(second, False, world.now)
    assert world.used() == 1
    world.now += 59.9
    world.a.tick(world.now)
    assert world.used() == 1
    world.now += 1.2
    world.a.tick(world.now)
    assert world.used() == 0


def test_ports_that_rest_are_counted_over_a_jump_of_the_clock(kit: SimpleNamespace) -> None:
    world = World(kit)
    for _ in range(200):
        (held,) = world.open(1)
        world.a.on_closed(held, True, world.now)
        world.now += 1.0
    world.a.tick(world.now)
    assert world.used() in (60, 61)
    world.now += 100_000.0
    world.a.tick(world.now)
    assert world.used() == 0


def test_the_count_is_the_busiest_address_s_and_addresses_are_bounded(kit: SimpleNamespace) -> None:
    world = World(kit)
    world.open(5, "192.0.2.1")
    world.open(7, "192.0.2.2")
    world.a.tick(world.now)
    assert world.used() == 7
    for number in range(3 * MAX_ADDRESSES):
        (held,) = world.open(1, f"198.51.100.{number}")
        world.a.on_closed(held, False, world.now)
    assert len(world.a._held) <= MAX_ADDRESSES
    world.a.tick(world.now)
    assert world.used() == 7


def test_the_warning_comes_at_eighty_percent_and_then_once_a_minute(kit: SimpleNamespace) -> None:
    world = World(kit)
    held = world.open(79)
    assert (world.events(), world.a.is_low) == ([], False)
    held += world.open(1)
    assert (world.events(), world.a.is_low) == (["egress_ports_low"], True)
    assert world.log.lines[0][1]["used"] == 80
    assert world.log.lines[0][1]["limit"] == 100
    for _ in range(int(REPEAT_S) - 1):
        world.now += 1.0
        world.a.tick(world.now)
    assert len(world.events()) == 1
    world.now += 1.0
    world.a.tick(world.now)
    assert len(world.events()) == 2
    for one in held[:10]:
        world.a.on_closed(one, False, world.now)
    world.a.tick(world.now)
    assert (world.a.is_low, world.a.state(world.now)) == (False, PortState.FINE)


def test_dials_under_way_count_so_a_burst_is_told_before_it_has_taken_all(kit: SimpleNamespace) -> None:
    world = World(kit)
    for _ in range(80):
        world.a.on_dial(world.now)
    assert world.events() == ["egress_ports_low"]


def test_an_upstream_at_the_same_place_takes_of_the_same_ports(kit: SimpleNamespace) -> None:
    world = World(kit)
    world.open(70, ports=world.b)
    world.open(10)
    assert world.events() == ["egress_ports_low"]
    assert world.log.lines[0][1]["used"] == 80


def test_other_workers_are_read_once_a_second_and_only_by_who_holds_some(kit: SimpleNamespace) -> None:
    readings = []

    def read() -> dict[str, int]:
        readings.append(world.now)
        return {"a": 75 + world.used(), "b": 0}

    world = World(kit, read)
    world.a.tick(world.now)
    assert readings == []
    world.open(5)
    assert len(readings) == 1
    assert world.events() == ["egress_ports_low"]
    world.now += 0.5
    world.a.tick(world.now)
    assert len(readings) == 1
    world.open(5)
    assert len(readings) == 2, "a jump of a twentieth is looked at sooner"
    assert world.a.state(world.now) is PortState.LOW


def test_a_kernel_without_a_port_is_told_once_a_minute_with_the_dials_and_its_end(kit: SimpleNamespace) -> None:
    world = World(kit)
    for _ in range(5):
        world.a.on_none(world.now, "192.0.2.1:443")
    assert (world.events(), world.a.state(world.now), world.a.is_low) == (["egress_ports_out"], PortState.OUT, True)
    world.now += REPEAT_S
    world.a.on_none(world.now, "192.0.2.1:443")
    assert [fields["dials"] for _, fields in world.log.lines] == [1, 5]
    world.a.on_enough()
    world.a.on_enough()
    assert world.events() == ["egress_ports_out", "egress_ports_out", "egress_ports_back"]
    assert world.metrics.read("proxyd_egress_ports_out_total", upstream="a") == 6


def test_a_refused_keepalive_is_told_after_twenty_answers_and_not_of_a_minority(kit: SimpleNamespace) -> None:
    world = World(kit)
    for _ in range(REFUSALS_TO_TELL - 1):
        world.a.on_answered(True, world.now)
    assert world.events() == []
    world.a.on_answered(True, world.now)
    for _ in range(100):
        world.a.on_answered(True, world.now)
    assert world.events() == ["upstream_refuses_keepalive"]
    for number in range(1000):
        world.b.on_answered(number % 3 == 0, world.now)
    assert world.events() == ["upstream_refuses_keepalive"]
    assert world.metrics.read("proxyd_upstream_keepalive_refused_total", upstream="a") == REFUSALS_TO_TELL + 100


# -- the pool without a port -------------------------------------------------------------------------------------------


def out(desk: Desk, busy: int) -> tuple[list[Conn], Any]:
    """So many connections in use, and a waiter for whom there was no port."""
    conns = desk.busy(*(f"c{number}" for number in range(busy)))
    waiter = desk.waiter()
    assert desk.on(Acquire(waiter)) == (Wait(waiter), Dial())
    assert desk.on(NoPort()) == (Bound(busy),)
    return conns, waiter


def test_who_has_no_port_goes_on_waiting_and_nobody_else_dials() -> None:
    desk = Desk(max_connections=10)
    out(desk, 2)
    second = desk.waiter()
    assert desk.on(Acquire(second)) == (Wait(second),)
    assert (desk.state.waiting, desk.state.connecting, desk.state.total) == (2, 0, 2)


def test_a_connection_that_ends_makes_room_for_one_dial_and_one_that_is_released_is_handed_on() -> None:
    desk = Desk(max_connections=10)
    (a, b), waiter = out(desk, 2)
    assert desk.on(Released(a, False)) == (Close(a, Why.SPENT), Dial())
    assert desk.on(Released(b, True)) == (Hand(waiter, b),)


def test_each_tick_tries_one_port_and_each_success_two_until_nobody_waits() -> None:
    desk = Desk(max_connections=10)
    (_, waiter) = out(desk, 1)
    others = [desk.waiter() for _ in range(5)]
    for other in others:
        desk.on(Acquire(other))
    assert desk.on(Tick()) == (Bound(2), Dial())
    assert desk.on(NoPort()) == (Bound(1),)
    assert desk.on(Tick()) == (Bound(2), Dial())
    first = Conn("first")
    assert desk.on(Dialled(first)) == (Hand(waiter, first), Bound(4), Dial(), Dial())
    second = Conn("second")
    assert desk.on(Dialled(second)) == (Hand(others[0], second), Bound(6), Dial(), Dial())
    for number in range(4):
        desk.on(Dialled(Conn(f"more{number}")))
    assert desk.state.waiting == 0
    assert desk.on(Tick()) == (Bound(None),)
    assert desk.on(Tick()) == ()


def test_without_any_connection_the_tick_alone_finds_the_port() -> None:
    desk = Desk(max_connections=10)
    _, waiter = out(desk, 0)
    assert desk.on(Tick()) == (Bound(1), Dial())
    conn = Conn("c")
    assert desk.on(Dialled(conn))[0] == Hand(waiter, conn)


def test_a_dial_of_a_waiter_who_left_ends_in_the_pool_while_ports_are_out() -> None:
    desk = Desk(max_connections=10)
    out(desk, 1)
    desk.on(Tick())
    conn = Conn("c")
    waiter = desk.state.head()
    assert waiter is not None
    desk.state._leave(waiter)
    assert desk.on(Dialled(conn)) == (Keep(conn), Bound(4))
