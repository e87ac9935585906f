"""The shipped settings in a network namespace of their own: applied by sysctl(8) as an operator would, seen by
`--check-config` from inside; and a badly set one, where each finding's own command mends it.

Needs root, as the other tests that look at the kernel; nothing outside the namespace is touched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxyd.host.kernel import BY_NAME, SETTINGS
from tests.daemon.harness import ROOT, Daemon, config_text, model_text, upstream_text
from tests.unit.cli.test_check_host import BAD

FILE = ROOT / "conf/sysctl.d/60-proxyd.conf"
HERE = [setting for setting in SETTINGS if setting.in_namespace]


class Namespace:
    """A fresh network namespace, held by a process that waits for its standard input to end."""

    def __init__(self, folder: Path) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up && echo ready && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        text = upstream_text("http://127.0.0.1:9/v1", more="max_connections = 100\nmax_idle = 10")
        self.daemon = Daemon(folder, config_text(folder, 3000, text + model_text("m", 1, '["openai"]')))

    def run(self, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *words]
        return subprocess.run(
            enter, capture_output=True, text=True, cwd=ROOT, env=self.daemon.environ, timeout=60, check=False, **more
        )

    def check(self) -> dict[str, dict[str, Any]]:
        """The findings about the kernel, by setting."""
        done = self.run(sys.executable, "-m", "proxyd", "--check-config", "--json", "-c", str(self.daemon.config))
        assert done.returncode == 0, done.stdout + done.stderr
        return {one["key"]: one for one in json.loads(done.stdout)["findings"] if one["key"].startswith("net.")}

    def set(self, **settings: str) -> None:
        for name, value in settings.items():
            done = self.run("sysctl", "-w", f"{name}={value}")
            assert done.returncode == 0, done.stderr

    def live(self, name: str) -> str:
        return " ".join(self.run("cat", f"/proc/sys/{name.replace('.', '/')}").stdout.split())

    def close(self) -> None:
        self._holder.communicate()


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    made = Namespace(tmp_path)
    yield made
    made.close()


def test_the_shipped_file_is_taken_line_by_line_and_leaves_nothing_to_find(namespace: Namespace) -> None:
    before = namespace.check()
    assert {"net.ipv4.tcp_notsent_lowat", "net.ipv4.tcp_rmem", "net.ipv4.tcp_migrate_req"} <= set(before)
    assert "net.core.default_qdisc" not in before  # there is none in a namespace
    done = namespace.run("sysctl", "-p", str(FILE))
    refused = [line for line in done.stderr.splitlines() if line]
    assert [line for line in refused if "default_qdisc" not in line] == []
    assert {setting.name: namespace.live(setting.name) for setting in HERE} == {
        setting.name: setting.wanted for setting in HERE
    }
    assert namespace.check() == {}


def test_a_badly_set_namespace_shows_each_finding_and_each_command_mends_its_own(namespace: Namespace) -> None:
    # Every algorithm but reno may be forbidden in a namespace.
    bad = {**{setting.name: BAD[setting.name] for setting in HERE}, "net.ipv4.tcp_congestion_control": "reno"}
    namespace.set(**bad)
    found = namespace.check()
    assert set(found) == set(bad)
    for name, one in found.items():
        assert (one["severity"], one["live"], one["wanted"]) == ("warning", bad[name], BY_NAME[name].wanted)
        assert one["file"] == str(namespace.daemon.config)
        mend = re.match(r"(sysctl -w .*?) \(for good: ", one["remedy"])
        assert mend is not None, one["remedy"]
        done = namespace.run("sh", "-c", mend[1])
        assert done.returncode == 0, done.stderr
    assert namespace.check() == {}


def test_ports_of_listeners_are_reserved_by_the_line_that_is_printed(namespace: Namespace) -> None:
    namespace.run("sysctl", "-p", str(FILE))
    namespace.set(**{"net.ipv4.ip_local_reserved_ports": "20000-20009"})
    listen = (
        "import socket, sys\n"
        "held = [socket.create_server(('127.0.0.1', 11211))]\n"
        "held.append(socket.create_server(('::1', 27017), family=socket.AF_INET6))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        ["nsenter", f"--net=/proc/{namespace._holder.pid}/ns/net", sys.executable, "-c", listen],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        (one,) = namespace.check().values()
        assert one["wanted"] == "11211,20000-20009,27017"
        line = re.search(r"net\.ipv4\.ip_local_reserved_ports = (\S+)\)", one["remedy"])
        assert line is not None
        own = namespace.daemon.folder / "61-ports.conf"
        own.write_text(f"net.ipv4.ip_local_reserved_ports = {line[1]}\n")
        assert namespace.run("sysctl", "-p", str(own)).returncode == 0
        assert namespace.check() == {}
        server.communicate()


def test_ports_are_computed_from_the_live_range(namespace: Namespace) -> None:
    namespace.run("sysctl", "-p", str(FILE))
    namespace.set(**{"net.ipv4.ip_local_port_range": "40000 40049"})
    (one,) = namespace.check().values()
    assert "50 ports for each source address and destination" in one["message"]
    assert "may open 100 connections to 127.0.0.1:9 (100 x 1 workers): 50 would get EADDRNOTAVAIL" in one["message"]


def test_where_only_processes_are_visible_the_kernel_is_not_judged(tmp_path: Path) -> None:
    text = upstream_text("http://127.0.0.1:9/v1", more="max_connections = 100\nmax_idle = 10")
    daemon = Daemon(tmp_path, config_text(tmp_path, 0, text + model_text("m", 1, '["openai"]')))
    program = f'exec "{sys.executable}" -m proxyd --check-config -c "{daemon.config}"'
    look = f"mount -t proc -o subset=pid proc /proc && {program}"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "sh", "-c", look],
        capture_output=True, text=True, cwd=ROOT, env=daemon.environ, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "/proc/sys" in line]
    assert line.startswith("warning ")
    assert "net." not in done.stdout.replace(line, "")
    assert not os.path.exists(tmp_path / "admin.sock")
