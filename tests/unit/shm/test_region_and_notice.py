"""The mapping's header, what a program of another layout makes of it, and the master's notices."""

from __future__ import annotations

import os
import struct

import pytest

from proxyd.shm.beats import Beat, State
from proxyd.shm.metrics import Metrics, read
from proxyd.shm.notice import Notices
from proxyd.shm.region import NOTICE_MAX, Region


def test_the_next_image_finds_all_of_it_through_the_descriptor() -> None:
    region = Region.create(4, 1234.5)
    Metrics(region, 1).counter("seen", a="b").add(7)
    Beat(region, 1).birth(0, 9, 50.0, slot=1, generation=3)
    fd = os.dup(region.fd)
    del region
    adopted = Region.adopt(fd)
    assert (adopted.slots, adopted.started_at, adopted.telemetry, adopted.master) == (4, 1234.5, 2, 3)
    assert read(adopted, 1.0).total("seen") == 7
    beat = Beat(adopted, 1)
    assert (beat.generation, beat.slot, beat.epoch, beat.state) == (3, 1, 9, State.STARTING)
    assert adopted.fd == fd


def test_the_descriptor_ends_at_execve_and_its_size_cannot_change() -> None:
    region = Region.create(2)
    assert not os.get_inheritable(region.fd)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 4096)


@pytest.mark.parametrize(
    ("offset", "value", "named"),
    [
        (8, 77, "version 77, this program's is 2"),
        (24, 64, "beat bytes 64, this program's are 128"),
        (40, 4096, "series 4096, this program's are 2048"),
        (12, 9, "bytes for 9 seats"),
        (0, 1, "not proxyd's"),
    ],
)
def test_another_layout_is_refused_with_what_differs(offset: int, value: int, named: str) -> None:
    region = Region.create(3)
    struct.pack_into("=I", region.memory, offset, value)
    fd = os.dup(region.fd)
    with pytest.raises(ValueError, match=named):
        Region.adopt(fd)
    os.close(fd)  # still the caller's


def test_memory_of_another_kind_is_refused() -> None:
    fd = os.memfd_create("other")
    os.write(fd, b"x")
    with pytest.raises(ValueError, match="no header"):
        Region.adopt(fd)
    os.close(fd)


def test_an_order_to_retire_holds_until_the_seat_is_born_again() -> None:
    region = Region.create(3)
    master, worker = Beat(region, 0), Beat(region, 0)
    master.birth(0, 1, 10.0, slot=0, generation=1)
    assert worker.retire_by_s is None
    master.retire(130.25)
    assert worker.retire_by_s == 130.25
    master.birth(4711, 1, 10.0)
    assert (worker.retire_by_s, worker.generation) == (130.25, 1)
    master.birth(0, 2, 20.0, slot=-1, generation=2)
    assert (worker.retire_by_s, worker.generation, worker.slot) == (None, 2, -1)


def test_a_notice_reaches_other_processes_whole() -> None:
    region = Region.create(2)
    notices = Notices(region)
    assert notices.get() is None
    notices.put({"n": 0, "text": "x"})
    pid = os.fork()
    if pid == 0:
        writer = Notices(region)
        for n in range(1, 3000):
            writer.put({"n": n, "text": chr(97 + n % 26) * (n % 5000)})
        os._exit(0)
    last = 0
    while last < 2999:
        got = notices.get()
        if got is not None:
            assert got["n"] >= last
            last = got["n"]
            assert got["text"] == chr(97 + last % 26) * (last % 5000) or last == 0
    os.waitpid(pid, 0)


def test_a_master_that_died_while_writing_leaves_the_notice_before() -> None:
    region = Region.create(2)
    notices = Notices(region)
    notices.put({"n": 1})
    offset = notices._at(2)
    region.memory[offset : offset + 200] = b"\xff" * 200
    assert notices.get() == {"n": 1}
    notices.put({"n": 2})
    assert notices.get() == {"n": 2}


def test_a_notice_that_is_too_long_says_what_it_left_out() -> None:
    region = Region.create(2)
    notices = Notices(region)
    notices.put({"ok": False, "detail": "d" * 20000, "findings": [f"{n} " + "f" * 3000 for n in range(50)]})
    got = notices.get()
    assert got is not None
    assert got["ok"] is False
    assert got["findings"][-1].startswith("and ")
    assert got["findings"][0].startswith("0 fff")
    with pytest.raises(ValueError, match=f"{NOTICE_MAX} fit"):
        notices.put({str(n): n for n in range(5000)})
    assert notices.get() == got
