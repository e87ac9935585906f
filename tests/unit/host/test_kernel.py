"""The table of kernel settings: what is compared how, what is in our file and what is not, and that files are made of
it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from proxyd.host import kernel, kernel_files, sockets
from proxyd.host.kernel import BY_NAME, LEFT_ALONE, ON_OUR_SOCKETS, SETTINGS, is_met
from proxyd.upstream import dial

ROOT = Path(__file__).resolve().parents[3]
SYSCTL = (ROOT / kernel_files.SYSCTL).read_text()
# Each setting that the founding document names, and the value where it gives one that we do not take.
FOUNDING = {
    "net.ipv4.ip_local_port_range": "1024 65535",
    "net.ipv4.tcp_tw_reuse": "",
    "net.ipv4.tcp_fin_timeout": "",
    "net.ipv4.tcp_max_orphans": "262144",
    "net.core.somaxconn": "",
    "net.ipv4.tcp_max_syn_backlog": "8192000",
    "net.core.default_qdisc": "",
    "net.ipv4.tcp_congestion_control": "",
    "net.ipv4.tcp_slow_start_after_idle": "",
    "net.ipv4.tcp_migrate_req": "",
    "net.ipv4.tcp_notsent_lowat": "",
    "net.ipv4.tcp_rmem": "",
    "net.ipv4.tcp_wmem": "",
    "net.netfilter.nf_conntrack_max": "",
}


def lines() -> dict[str, str]:
    """What a program would set from the file."""
    found = {}
    for line in SYSCTL.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition(" = ")
            assert name not in found, f"{name} is set twice"
            found[name] = value
    return found


def test_the_files_are_made_of_the_table() -> None:
    remedy = "run: python -m proxyd.host.kernel_files ."
    assert kernel_files.sysctl_text() == SYSCTL, remedy
    assert kernel_files.modules_text() == (ROOT / kernel_files.MODULES_LOAD).read_text(), remedy
    page = (ROOT / kernel_files.PAGE).read_text()
    assert kernel_files.page_with_table(page) == page, remedy


def test_making_the_files_again_changes_nothing(tmp_path: Path) -> None:
    assert kernel_files.main([str(tmp_path)]) == 0
    assert (tmp_path / kernel_files.SYSCTL).read_text() == SYSCTL
    assert kernel_files.main([]) == 2


def test_the_file_sets_the_table_and_nothing_else() -> None:
    assert lines() == {setting.name: setting.wanted for setting in SETTINGS}


def test_every_founding_setting_is_judged_once() -> None:
    named = [setting.name for setting in SETTINGS] + [one.name for one in LEFT_ALONE]
    assert len(named) == len(set(named))
    assert set(FOUNDING) <= set(named)


@pytest.mark.parametrize("name", FOUNDING)
def test_a_harmful_founding_value_is_not_set_and_the_file_says_why(name: str) -> None:
    if FOUNDING[name]:
        assert lines().get(name) != FOUNDING[name]
        assert FOUNDING[name] in SYSCTL
    assert name in SYSCTL


def test_each_setting_says_why_what_to_mind_and_where_from() -> None:
    for setting in SETTINGS:
        assert setting.why
        assert setting.danger
        assert setting.source
        assert setting.wanted == kernel.normal(setting.wanted)
        assert is_met(setting, setting.wanted)


def test_modules_are_those_that_the_settings_name() -> None:
    text = (ROOT / kernel_files.MODULES_LOAD).read_text()
    names = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert names == ["tcp_bbr", "sch_fq"] == [name for name, _ in kernel.MODULES]
    assert BY_NAME["net.ipv4.tcp_congestion_control"].wanted == "bbr"
    assert BY_NAME["net.core.default_qdisc"].wanted == "fq"


def test_comments_stand_on_lines_of_their_own_and_fit_a_terminal() -> None:
    for line in SYSCTL.splitlines():
        assert len(line) <= 120
        assert line.startswith("#") or "#" not in line


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("net.core.somaxconn", ["65535", "131072"], ["4096", "", "many"]),
        ("net.ipv4.tcp_fin_timeout", ["10", "5"], ["60", "11", "0"]),
        ("net.ipv4.tcp_orphan_retries", ["3", "1"], ["0", "8"]),
        ("net.ipv4.tcp_notsent_lowat", ["16384", "4096"], ["4294967295", "-1", "0"]),
        ("net.ipv4.tcp_syncookies", ["1"], ["0", "2"]),
        ("net.ipv4.tcp_congestion_control", ["bbr"], ["cubic", ""]),
        ("net.ipv4.tcp_rmem", ["4096\t131072\t4194304", "4096 87380 1048576"], ["4096 131072 33554432", "4096"]),
        (
            "net.ipv4.ip_local_port_range",
            ["10240\t65535", "12000 65001"],
            ["1024 65535", "32768 60999", "10240 65534", "10241 65535", "65535", "a b"],
        ),
    ],
)
def test_live_values_are_compared_as_they_are_meant(name: str, good: list[str], bad: list[str]) -> None:
    assert [value for value in good if not is_met(BY_NAME[name], value)] == []
    assert [value for value in bad if is_met(BY_NAME[name], value)] == []


def test_the_command_is_one_that_a_shell_takes() -> None:
    assert kernel.command("net.core.somaxconn", "65535") == "sysctl -w net.core.somaxconn=65535"
    assert kernel.command("net.ipv4.tcp_rmem", "1 2 3") == "sysctl -w net.ipv4.tcp_rmem='1 2 3'"


def test_what_is_said_of_our_sockets_is_what_they_have() -> None:
    told = {one.name: one.instead for one in ON_OUR_SOCKETS}
    seconds = [constant // 1000 for constant in (sockets.USER_TIMEOUT_MS, dial.USER_TIMEOUT_MS)]
    assert told["TCP_USER_TIMEOUT"] == f"{seconds[0]} s towards clients, {seconds[1]} s towards upstreams"
    keepalive = (sockets.KEEPALIVE_IDLE_S, sockets.KEEPALIVE_INTERVAL_S, sockets.KEEPALIVE_PROBES)
    assert keepalive == (dial.KEEPALIVE_IDLE_S, dial.KEEPALIVE_INTERVAL_S, dial.KEEPALIVE_PROBES)
    assert told["SO_KEEPALIVE"] == "{} s idle, {} s, {} probes".format(*keepalive)
    assert told["TCP_NOTSENT_LOWAT"] == str(sockets.NOTSENT_LOWAT_BYTES) == str(dial.NOTSENT_LOWAT_BYTES)
    assert told["TCP_NOTSENT_LOWAT"] == BY_NAME["net.ipv4.tcp_notsent_lowat"].wanted
    limit = re.search(r"^LimitNOFILE=(\d+)$", (ROOT / "systemd/proxyd.service").read_text(), re.MULTILINE)
    assert limit is not None
    assert told["LimitNOFILE"].startswith(limit[1])


def test_every_setting_that_this_kernel_should_have_exists() -> None:
    for setting in SETTINGS:
        assert os.path.exists("/proc/sys/" + setting.name.replace(".", "/")) or not setting.in_namespace
