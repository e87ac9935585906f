"""What --check-config says of a machine, decided from numbers: no file and no socket of this one is looked at."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from proxyd.cli import check
from proxyd.cli.check_found import to_findings
from proxyd.cli.check_host import host_findings
from proxyd.config.load import parse
from proxyd.errors import Finding
from proxyd.host.kernel import BY_NAME, SETTINGS
from proxyd.host.look import ALLOWED, AVAILABLE, MAY_TRACK, TCP_MEM, TRACKED, TRACKED_FOR, Host, Written
from proxyd.host.unit import Unit
from tests.unit.cli.hosts import GOOD, changed, without

RANGE = "net.ipv4.ip_local_port_range"
FILE = "/etc/proxyd/proxyd.toml"
TEXT = """[server]
listen = ["127.0.0.1:3000"]
admin = "unix:/run/proxyd/none.sock"
workers = 4
[auth]
mode = "off"
[[upstream]]
name = "a"
url = "https://api.example.com/v1"
[[model]]
name = "m"
id = 1
upstreams = ["a"]
"""
BAD = {
    "net.ipv4.ip_local_port_range": "32768 60999",
    "net.ipv4.tcp_tw_reuse": "0",
    "net.ipv4.tcp_fin_timeout": "60",
    "net.core.somaxconn": "128",
    "net.ipv4.tcp_max_syn_backlog": "128",
    "net.ipv4.tcp_syncookies": "0",
    "net.core.default_qdisc": "pfifo_fast",
    "net.ipv4.tcp_congestion_control": "cubic",
    "net.ipv4.tcp_slow_start_after_idle": "1",
    "net.ipv4.tcp_migrate_req": "0",
    "net.ipv4.tcp_notsent_lowat": "4294967295",
    "net.ipv4.tcp_rmem": "4096 131072 33554432",
    "net.ipv4.tcp_wmem": "4096 16384 4194304",
    "net.ipv4.tcp_orphan_retries": "0",
}


def look_at(host: Host, *changes: tuple[str, str]) -> list[Finding]:
    text = TEXT
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    config, findings = parse(text, FILE, {})
    assert config is not None, [finding.text() for finding in findings]
    return to_findings(config, host_findings(config, host, default_file=FILE))


def only(host: Host, *changes: tuple[str, str]) -> Finding:
    (finding,) = look_at(host, *changes)
    return finding


def about(key: str, host: Host, *changes: tuple[str, str]) -> Finding:
    (finding,) = [one for one in look_at(host, *changes) if one.key == key]
    return finding


def test_a_good_machine_has_no_findings() -> None:
    assert look_at(GOOD) == []


def test_each_setting_has_a_bad_value_here() -> None:
    assert set(BAD) == set(BY_NAME)


@pytest.mark.parametrize("name", BAD)
def test_each_setting_is_named_with_its_values_and_the_command_that_mends_it(name: str) -> None:
    found = {one.key: one for one in look_at(changed({name: BAD[name]}))}
    one = found[name]
    assert (one.severity, one.file, one.live, one.wanted) == ("warning", FILE, BAD[name], BY_NAME[name].wanted)
    assert f"is {BAD[name]}, wanted " in one.message
    assert f"sysctl -w {name}=" in one.remedy
    assert set(found) == {name}


def test_a_machine_with_all_of_them_has_them_all_and_no_error() -> None:
    found = look_at(changed(BAD))
    assert {one.key for one in found} == set(BAD)
    assert all(one.severity == "warning" for one in found)


def test_what_a_container_does_not_have_is_no_finding() -> None:
    once = [setting.name for setting in SETTINGS if not setting.in_namespace]
    assert once == ["net.core.default_qdisc"]
    assert look_at(without(*once, TCP_MEM)) == []


def test_a_setting_that_the_kernel_lacks_is_told_with_its_version() -> None:
    one = only(without("net.ipv4.tcp_migrate_req"))
    assert "Linux 5.14" in one.message
    assert one.live == ""


def test_a_hidden_kernel_is_said_once_and_looked_at_no_further() -> None:
    one = only(Host(is_visible=False, open_files=131072))
    assert (one.severity, one.key) == ("warning", "kernel")
    assert "ExecStartPre=+" in one.remedy


# -- what it means for the configuration -------------------------------------------------------------------------------


def test_the_backlog_that_somaxconn_cuts_is_computed() -> None:
    one = only(changed({"net.core.somaxconn": "128"}), ("workers = 4", "workers = 4\nbacklog = 512"))
    assert "listen() cuts server.backlog = 512 to 128" in one.message
    assert one.line == 5


def test_ports_are_computed_from_connections_workers_and_the_range() -> None:
    many = ('name = "a"\n', 'name = "a"\nmax_connections = 8000\n')
    host = changed({"net.ipv4.ip_local_port_range": "32768 60999"})
    one = about(RANGE, host, many)
    assert "28232 ports" in one.message
    assert "32000 connections to api.example.com:443 (8000 x 4 workers): 3768 would get EADDRNOTAVAIL" in one.message
    # Two addresses have twice the ports; then it is enough.
    two = ('name = "a"\n', 'name = "a"\nmax_connections = 8000\nsource_addresses = ["127.0.0.2", "127.0.0.3"]\n')
    assert "are enough for 32000 connections" in about(RANGE, host, two).message


def test_reserved_ports_are_not_there_for_connections() -> None:
    many = ('name = "a"\n', 'name = "a"\nmax_connections = 7000\n')
    settings = {"net.ipv4.ip_local_port_range": "32768 60999", "net.ipv4.ip_local_reserved_ports": "32768-33767"}
    assert "27232 ports for each source address" in about(RANGE, changed(settings), many).message
    assert "768 would get EADDRNOTAVAIL" in about(RANGE, changed(settings), many).message


def test_more_than_any_range_gives_asks_for_source_addresses() -> None:
    many = ('name = "a"\n', 'name = "a"\nmax_connections = 20000\n')
    one = about("upstream[0].source_addresses", GOOD, many)
    assert "80000 connections to api.example.com:443 (20000 x 4 workers): 24704 of them find no port" in one.message
    assert one.remedy.startswith("name 2 local addresses")


def test_upstreams_with_one_destination_share_its_ports() -> None:
    other = '[[upstream]]\nname = "b"\nurl = "https://api.example.com/v1"\n[[model]]'
    host = changed({"net.ipv4.ip_local_port_range": "32768 60999"})
    both = only(host, ("[[model]]", other))
    assert "8192 connections to api.example.com:443 (2048 x 4 workers)" in both.message


def test_low_ports_are_those_of_services() -> None:
    found = {one.key: one.message for one in look_at(changed({RANGE: "1024 65535"}))}
    assert "from 1024 on they are those of services" in found[RANGE]
    assert "listeners on 3000 (3000: proxyd's), within 1024" in found["net.ipv4.ip_local_reserved_ports"]


def test_ports_that_somebody_listens_on_are_reserved_with_the_whole_line() -> None:
    host = changed({"net.ipv4.ip_local_reserved_ports": "20000-20001"}, listening={80: {1}, 11211: {2}, 27017: {3}})
    one = only(host, ("127.0.0.1:3000", "127.0.0.1:11212"))
    assert one.key == "net.ipv4.ip_local_reserved_ports"
    assert (one.live, one.wanted) == ("20000-20001", "11211-11212,20000-20001,27017")
    assert "listeners on 11211-11212,27017 (11212: proxyd's), within 10240 to 65535" in one.message
    assert "net.ipv4.ip_local_reserved_ports = 11211-11212,20000-20001,27017" in one.remedy
    done = changed({"net.ipv4.ip_local_reserved_ports": one.wanted}, listening={80: {1}, 11211: {2}, 27017: {3}})
    assert look_at(done, ("127.0.0.1:3000", "127.0.0.1:11212")) == []


def test_the_range_to_come_counts_for_reserved_ports_too() -> None:
    host = changed({"net.ipv4.ip_local_port_range": "32768 60999"}, listening={11211: {1}})
    assert {one.key for one in look_at(host)} == {"net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"}


def test_reuse_of_ports_without_timestamps_is_none() -> None:
    one = only(changed({"net.ipv4.tcp_timestamps": "0"}))
    assert "without it tcp_tw_reuse has no effect" in one.message
    assert one.remedy == "sysctl -w net.ipv4.tcp_timestamps=1"
    assert look_at(changed({"net.ipv4.tcp_timestamps": "2"})) == []


def test_large_buffers_are_computed_against_tcp_mem() -> None:
    one = only(changed({"net.ipv4.tcp_rmem": "4096 131072 33554432"}))
    assert "a stalled stream may hold 33 MiB in the kernel, so 44 fill tcp_mem (1.4 GiB), of the 4096" in one.message


def test_memory_is_computed_against_the_streams() -> None:
    one = only(changed(ram_bytes=1 << 30))
    assert one.key == "stream.buffer"
    assert "4096 streams of 256 KiB hold 1 GiB when clients stop reading, and this machine has 1 GiB" in one.message
    assert one.wanted == "128 KiB"


def test_a_tcp_memory_that_ordinary_streams_fill_is_told() -> None:
    one = only(changed({TCP_MEM: "1000 2000 4000"}))
    assert one.key == TCP_MEM
    assert "TCP may have 15.6 MiB in all, and 4096 ordinary streams need 160 MiB" in one.message


@pytest.mark.parametrize("name, word", [("bbr", "modprobe tcp_bbr"), ("dctcp", "modprobe tcp_dctcp")])
def test_a_congestion_control_that_the_kernel_lacks_names_its_module(name: str, word: str) -> None:
    host = changed({AVAILABLE: "reno cubic", ALLOWED: "reno cubic"})
    one = only(host, ('name = "a"\n', f'name = "a"\ncongestion_control = "{name}"\n'))
    assert (one.key, one.line, one.name) == ("upstream[0].congestion_control", 9, "a")
    assert "tcp_available_congestion_control is reno cubic" in one.message
    assert word in one.remedy


def test_the_default_is_not_set_to_what_must_be_loaded_first() -> None:
    host = changed({AVAILABLE: "reno cubic", ALLOWED: "reno cubic", "net.ipv4.tcp_congestion_control": "cubic"})
    one = next(one for one in look_at(host) if one.key == "net.ipv4.tcp_congestion_control")
    assert one.remedy.startswith("modprobe tcp_bbr && sysctl -w net.ipv4.tcp_congestion_control=bbr")


def test_a_congestion_control_that_only_root_may_choose_is_told() -> None:
    one = only(changed({ALLOWED: "reno cubic"}))
    assert "only root may choose bbr" in one.message
    assert one.remedy == "sysctl -w net.ipv4.tcp_allowed_congestion_control='reno cubic bbr'"


def test_the_system_s_own_congestion_control_needs_nothing() -> None:
    assert look_at(changed({ALLOWED: "reno"}), ('name = "a"\n', 'name = "a"\ncongestion_control = ""\n')) == []


def test_connection_tracking_is_sized_for_the_streams() -> None:
    one = only(changed({MAY_TRACK: "8192", TRACKED: "77"}))
    assert "4096 streams are 16384 tracked connections" in one.message
    assert f"sysctl -w {MAY_TRACK}=16384" in one.remedy
    assert "docs/kernel.md" in one.remedy
    assert look_at(changed({MAY_TRACK: "262144", TRACKED: "77"})) == []


def test_five_days_of_tracking_are_told_only_where_something_is_tracked() -> None:
    settings = {MAY_TRACK: "262144", TRACKED_FOR: "432000"}
    assert look_at(changed({**settings, TRACKED: "0"})) == []
    assert "remembered for 120 h, and 77 of 262144 are taken" in only(changed({**settings, TRACKED: "77"})).message


# -- files that say otherwise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("65535", ["sysctl --system (/usr/lib/sysctl.d/60-proxyd.conf:9 has it"]),
        ("256", ["sysctl -w net.core.somaxconn=65535", "correct /usr/lib/sysctl.d/60-proxyd.conf:9, which sets 256"]),
    ],
)
def test_it_is_the_live_value_that_counts_and_the_file_is_named(value: str, words: list[str]) -> None:
    written = {"net.core.somaxconn": Written("/usr/lib/sysctl.d/60-proxyd.conf", 9, value)}
    remedy = only(changed({"net.core.somaxconn": "128"}, written=written)).remedy
    assert [word for word in words if word not in remedy] == []
    assert look_at(changed(written=written)) == []


# -- open files and the unit -------------------------------------------------------------------------------------------


def unit(**changes: Any) -> Unit:
    values = {
        "path": "/etc/systemd/system/proxyd.service", "starts": f"/usr/bin/proxyd -c {FILE}", "user": "proxyd",
        "open_files": 131072, "stop_s": 150.0, "memory_bytes": 0, **changes,
    }  # fmt: skip
    return Unit(**values)


def test_too_few_open_files_are_an_error_as_the_start_is_refused() -> None:
    one = only(changed(open_files=1000))
    assert (one.severity, one.live, one.wanted) == ("error", "1000", "3750")
    assert "below the 2726" in one.message
    assert "a start is refused" in one.message


def test_with_a_unit_for_this_file_its_limit_decides_and_the_shell_s_is_a_warning() -> None:
    assert look_at(changed(unit=unit())) == []
    shell = only(changed(unit=unit(), open_files=1000))
    assert shell.severity == "warning"
    assert "this shell" in shell.message
    low = only(changed(unit=unit(open_files=2000)))
    assert low.severity == "error"
    assert "LimitNOFILE of /etc/systemd/system/proxyd.service" in low.message


def test_a_unit_for_another_file_says_nothing_of_this_one() -> None:
    other = unit(starts="/usr/bin/proxyd -c /etc/proxyd/other.toml", open_files=2000, stop_s=1.0)
    assert look_at(changed(unit=other)) == []
    assert only(changed(unit=other, open_files=1000)).severity == "error"


def test_within_the_unit_its_own_limit_is_this_process_s() -> None:
    one = only(changed(unit=unit(), is_unit=True, open_files=1000))
    assert one.severity == "error"
    assert "the unit's limit" in one.message


def test_a_drain_longer_than_systemd_waits_is_told() -> None:
    one = only(changed(unit=unit(stop_s=90.0)))
    assert (one.key, one.severity, one.wanted) == ("server.drain_timeout", "warning", "135s")
    assert "TimeoutStopSec=135s" in one.remedy


def test_the_unit_s_memory_bounds_the_buffers() -> None:
    assert "MemoryMax of" in only(changed(unit=unit(memory_bytes=1 << 30))).message


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"), [(errno.EADDRNOTAVAIL, "no interface of this machine has"), (errno.EACCES, "may not bind")]
)
def test_an_address_that_refuses_the_start_is_an_error(code: int, words: str) -> None:
    one = only(changed(bind_error=lambda host, port: code if port == 3000 else 0))
    assert (one.severity, one.key) == ("error", "server.listen[0]")
    assert words in one.message


def test_an_address_that_is_taken_is_told_but_not_to_systemd() -> None:
    def taken(host: str, port: int) -> int:
        return errno.EADDRINUSE

    assert "another process has 127.0.0.1:3000" in only(changed(bind_error=taken)).message
    assert look_at(changed(bind_error=taken, is_unit=True)) == []


def test_a_port_that_the_unit_s_user_may_not_bind_is_a_warning() -> None:
    host = changed({"net.ipv4.ip_unprivileged_port_start": "1024"}, unit=unit())
    found = look_at(host, ("127.0.0.1:3000", "127.0.0.1:80"))
    assert [one.severity for one in found] in (["warning"], [])  # [] for who is not root: bind says it then
    other = changed(unit=unit(starts="/usr/bin/proxyd -c /etc/proxyd/other.toml"))
    assert look_at(other, ("127.0.0.1:3000", "127.0.0.1:80")) == []


def test_a_source_address_of_nobody_is_a_warning() -> None:
    def bind(host: str, port: int) -> int:
        return errno.EADDRNOTAVAIL if host == "192.0.2.1" else 0

    addresses = 'name = "a"\nsource_addresses = ["127.0.0.1", "192.0.2.1"]\n'
    one = only(changed(bind_error=bind), ('name = "a"\n', addresses))
    assert (one.severity, one.key) == ("warning", "upstream[0].source_addresses[1]")


# -- how it is printed -------------------------------------------------------------------------------------------------


def test_json_has_the_values_beside_each_other(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxyd.toml"
    path.write_text(TEXT)
    check.run(str(path), as_json=True, environ={}, see=lambda environ: changed({"net.core.somaxconn": "128"}))
    document = json.loads(capsys.readouterr().out)
    (one,) = [one for one in document["findings"] if one["key"].startswith("net.")]
    assert (one["severity"], one["live"], one["wanted"], one["file"]) == ("warning", "128", "65535", str(path))
    assert one["remedy"].startswith("sysctl -w net.core.somaxconn=65535")
    assert set(one) == {"severity", "file", "line", "key", "message", "remedy", "name", "live", "wanted"}


def test_a_line_begins_with_severity_place_and_setting(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxyd.toml"
    path.write_text(TEXT)
    check.run(str(path), as_json=False, environ={}, see=lambda environ: changed({"net.core.somaxconn": "128"}))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "net.core" in line]
    assert line.startswith(f"warning {path}:1 net.core.somaxconn: is 128, wanted at least 65535: ")


def test_a_machine_is_looked_at_beside_errors_of_secrets(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxyd.toml"
    path.write_text(TEXT.replace('mode = "off"', f'secret_file = "{tmp_path}/none"'))
    code = check.run(str(path), as_json=False, environ={}, see=lambda environ: changed({"net.core.somaxconn": "128"}))
    out = capsys.readouterr().out
    assert code == 1
    assert "auth.secret_file" in out
    assert "net.core.somaxconn" in out
