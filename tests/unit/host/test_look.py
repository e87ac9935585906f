"""Ports, memory, units and sysctl files: what is read of a tree of files, and what is computed from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxyd.host import memory, ports, unit
from proxyd.host.look import look, written

ETC = "etc/systemd/system/proxyd.service"
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0
   1: 00000000:6989 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0
   2: 0100007F:C000 0100007F:0BB8 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0 100 0 0 10 0
"""


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "ports_in_it"), [("", set()), ("80", {80}), ("80,90-92", {80, 90, 91, 92}), ("80,x,90-91x\n", {80})]
)
def test_lists_of_ports_are_read(text: str, ports_in_it: set[int]) -> None:
    assert ports.parse_list(text) == ports_in_it


def test_lists_of_ports_are_written_as_the_kernel_does() -> None:
    assert ports.write_list({92, 80, 90, 91, 65535}) == "80,90-92,65535"
    assert ports.parse_list(ports.write_list(range(1000, 2000))) == set(range(1000, 2000))


def test_a_range_is_two_numbers() -> None:
    assert ports.parse_range("32768\t60999") == (32768, 60999)
    assert ports.parse_range("32768") is None
    assert ports.parse_range("") is None


def test_ports_that_are_reserved_are_not_available() -> None:
    assert ports.available((10, 19), {9, 10, 15, 20}) == 8
    assert ports.unprotected([9, 10, 15, 25], (10, 19), {15}) == [10]


def test_a_destination_lacks_what_ports_times_addresses_do_not_give() -> None:
    egress = ports.Egress("host:443", 1000, sources=2)
    assert egress.lacks(400) == 200
    assert egress.lacks(500) == 0
    assert egress.sources_for(400) == 3


def test_listeners_are_read_and_connections_are_not(tmp_path: Path) -> None:
    put(tmp_path, "tcp", TCP)
    assert ports.listening(str(tmp_path)) == {3000: {11}, 27017: {12}}
    assert ports.listening(str(tmp_path / "none")) == {}


def test_sizes_are_told_in_words() -> None:
    sizes = (0, 1000, 20480, 512 << 20, 1 << 30, 2358 << 20)
    assert [memory.in_words(size) for size in sizes] == ["0 B", "1000 B", "20 KiB", "512 MiB", "1 GiB", "2.3 GiB"]


def test_the_unit_in_etc_goes_before_the_vendor_s_and_drop_ins_before_both(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/systemd/system/proxyd.service", "[Service]\nLimitNOFILE=1\nUser=vendor\n")
    start = "ExecStart=/usr/bin/proxyd \\\n -c /a.toml"
    put(tmp_path, ETC, f"[Unit]\nUser=no\n[Service]\n# LimitNOFILE=7\nLimitNOFILE=2\nUser=proxyd\n{start}\n")
    found = unit.find(str(tmp_path))
    assert found is not None
    assert (found.path, found.open_files, found.user) == ("/etc/systemd/system/proxyd.service", 2, "proxyd")
    assert found.runs("/a.toml", "/default.toml")
    assert not found.runs("/default.toml", "/default.toml")
    vendor = "usr/lib/systemd/system/proxyd.service.d/10.conf"
    put(tmp_path, vendor, "[Service]\nLimitNOFILE=3:4\nTimeoutStopSec=5min\n")
    put(tmp_path, f"{ETC}.d/20.conf", "[Service]\nMemoryMax=2G\nLimitNOFILE=5\n")
    found = unit.find(str(tmp_path))
    assert found is not None
    assert (found.open_files, found.stop_s, found.memory_bytes) == (5, 300.0, 2 << 30)
    put(tmp_path, f"{ETC}.d/20.conf", "[Service]\nLimitNOFILE=infinity\nTimeoutStopSec=infinity\n")
    found = unit.find(str(tmp_path))
    assert found is not None
    assert (found.open_files, found.stop_s) == (1 << 30, float("inf"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("150", 150.0), ("150s", 150.0), ("2min 30s", 150.0), ("500ms", 0.5), ("", 90.0), ("1h", 3600.0)],
)
def test_spans_of_time_are_systemd_s(tmp_path: Path, text: str, seconds: float) -> None:
    put(tmp_path, ETC, f"[Service]\nTimeoutStopSec={text}\n")
    found = unit.find(str(tmp_path))
    assert found is not None
    assert found.stop_s == seconds


def test_the_shipped_unit_is_understood() -> None:
    shipped = Path(__file__).resolve().parents[3] / "systemd/proxyd.service"
    values = unit._settings(shipped.read_text())
    found = unit._unit("x", values)
    assert (found.open_files, found.stop_s, found.user) == (131072, 150.0, "proxyd")
    assert found.runs("/etc/proxyd/proxyd.toml", "/etc/proxyd/proxyd.toml")


def test_a_machine_without_a_unit_has_none(tmp_path: Path) -> None:
    assert unit.find(str(tmp_path)) is None


def test_the_last_file_by_name_wins_whatever_its_folder(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/sysctl.d/60-proxyd.conf", "# x\nnet.core.somaxconn = 65535\nnet.ipv4.tcp_rmem = 1 2 3\n")
    put(tmp_path, "etc/sysctl.d/50-early.conf", "net.core.somaxconn=1\n")
    names = ["net.core.somaxconn", "net.ipv4.tcp_rmem"]
    found = written(names, str(tmp_path))
    assert (found[names[0]].file, found[names[0]].line) == ("/usr/lib/sysctl.d/60-proxyd.conf", 2)
    assert found[names[1]].value == "1 2 3"
    put(tmp_path, "run/sysctl.d/99-late.conf", "-net/core/somaxconn = 128\n")
    assert written(names, str(tmp_path))[names[0]].value == "128"
    put(tmp_path, "etc/sysctl.conf", "; old\nnet.core.somaxconn = 256\n")
    assert written(names, str(tmp_path))[names[0]].file == "/etc/sysctl.conf"
    # A file of the same name in /etc replaces the vendor's.
    put(tmp_path, "etc/sysctl.d/60-proxyd.conf", "")
    assert names[1] not in written(names, str(tmp_path))


def test_a_look_at_a_tree_sees_its_settings_and_one_without_proc_sys_says_so(tmp_path: Path) -> None:
    assert not look({}, str(tmp_path)).is_visible
    put(tmp_path, "proc/sys/net/ipv4/tcp_rmem", "4096\t131072\t6291456\n")
    put(tmp_path, "proc/self/net/tcp", TCP)
    seen = look({"SYSTEMD_EXEC_PID": str(os.getpid())}, str(tmp_path))
    assert (seen.is_visible, seen.is_unit) == (True, True)
    assert seen.settings == {"net.ipv4.tcp_rmem": "4096 131072 6291456"}
    assert set(seen.listening) == {3000, 27017}
    assert seen.ram_bytes > 0


def test_a_pid_of_another_process_is_not_the_unit_s() -> None:
    assert not unit.started_this({"SYSTEMD_EXEC_PID": "1"}, 2)
    assert not unit.started_this({}, 2)
