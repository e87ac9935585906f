"""proxyd under a real systemd, with the unit that is shipped: install, start, reload, upgrade, restart, deaths, stop.

One machine is booted for all of these, in this order; each leaves a node that serves.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.daemon.harness import wait_for
from tests.daemon.nspawn import Machine
from tests.daemon.systemd_node import CONFIG, PACKAGE, PATIENCE_S, UNIT, SystemdNode


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdNode]:
    """A booted machine with proxyd installed and neither configured nor started."""
    folder = tmp_path_factory.mktemp("systemd")
    with Machine(folder) as machine:
        node = SystemdNode(machine, folder)
        node.install()
        yield node


@pytest.fixture
def node(installed: SystemdNode) -> SystemdNode:
    """One that serves."""
    assert installed.is_active, "\n".join(installed.messages()[-30:])
    return installed


@contextlib.contextmanager
def knocking(node: SystemdNode) -> Iterator[dict[str, int]]:
    """Connections come all the time; how each ended is in the dict afterwards."""
    ends: dict[str, int] = {}
    client = node.machine.start("python3", "/root/knocker.py")
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "knocking\n"
        yield ends
        node.machine.run("pkill", "-TERM", "-f", "/root/knocker.py")
        said, errors = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 0, errors
        ends.update(json.loads(said.splitlines()[-1]))
    finally:
        _end(client)


@contextlib.contextmanager
def streaming(node: SystemdNode, events: int, gap_s: float) -> Iterator[subprocess.Popen[str]]:
    """A stream that runs; it must come to its proper end, within the block or at its end."""
    client = node.machine.start(*node.curl(events, gap_s))
    try:
        assert client.stdout is not None
        assert client.stdout.readline().startswith("data: ")
        yield client
        said, errors = client.communicate(timeout=PATIENCE_S)
        assert client.returncode == 0, errors
        assert said.count('"content":') == events - 1
        assert said.endswith("data: [DONE]\n\n")
    finally:
        _end(client)


def _end(client: subprocess.Popen[str]) -> None:
    with client:  # closes its pipes
        client.kill()


def test_without_its_secrets_the_start_fails_and_the_journal_says_what_is_missing(installed: SystemdNode) -> None:
    started = installed.machine.run("systemctl", "start", UNIT, check=False)
    installed.machine.run("systemctl", "stop", UNIT)
    installed.machine.run("systemctl", "reset-failed", UNIT, check=False)
    assert started.returncode != 0
    said = "\n".join(installed.messages())
    for name in ("jwt.secret", "openai.key"):
        assert f"cannot read /etc/proxyd/{name}: No such file or directory; create it" in said
    assert "Protocol error" not in said  # systemd's own words for it


def test_the_installed_units_verify_in_silence_and_are_hardened(installed: SystemdNode) -> None:
    units = ["/usr/lib/systemd/system/proxyd.service", "/usr/lib/systemd/system/proxyd.socket"]
    verified = installed.machine.run("systemd-analyze", "verify", *units)
    assert (verified.stdout, verified.stderr) == ("", "")
    judged = installed.machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", units[0]).stdout
    level = float(judged.partition("exposure level for proxyd.service:")[2].split()[0])
    assert level <= 1.2


def test_enable_now_works_at_the_first_try(installed: SystemdNode) -> None:
    installed.make_secrets()
    checked = installed.machine.run("proxyd", "--check-config", check=False)
    assert checked.returncode == 0, checked.stdout
    assert "does not exist" not in checked.stdout
    cursor = installed.machine.cursor(UNIT)
    installed.machine.run("systemctl", "enable", "--now", "proxyd")
    assert installed.is_active, installed.messages()
    assert installed.machine.run("systemctl", "is-enabled", "proxyd").stdout == "enabled\n"
    said = installed.machine.run(*installed.curl(3)).stdout
    assert said.count('"content":') == 3
    assert said.endswith("data: [DONE]\n\n")
    assert installed.machine.run("proxyd", "status").returncode == 0
    wait_for(lambda: "serving (2 workers, " in installed.machine.show(UNIT, "StatusText"), PATIENCE_S, 0.2)
    assert {"listening", "ready"} <= {event["event"] for event in installed.events(cursor)}
    # The look before the start sees the kernel's settings, which the daemon's own sandbox hides.
    assert any("net.core.somaxconn" in line for line in installed.messages(cursor))


def test_the_daemon_runs_as_its_user_with_nothing_else_open_to_it(node: SystemdNode) -> None:
    status = node.machine.run("cat", f"/proc/{node.main_pid}/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines())
    assert fields["Uid"].split()[0] == node.machine.run("id", "-u", "proxyd").stdout.strip()
    assert (fields["CapEff"], fields["NoNewPrivs"], fields["Seccomp"]) == ("0000000000000000", "1", "2")
    modes = node.machine.run("stat", "-c", "%a %U", "/run/proxyd", "/var/lib/proxyd", "/etc/proxyd/jwt.secret").stdout
    assert modes.splitlines() == ["750 proxyd", "700 proxyd", "600 root"]


def test_a_reload_brings_the_changed_file_and_cuts_no_stream(node: SystemdNode) -> None:
    pid, before = node.main_pid, node.status()["last_reload"]
    with knocking(node) as ends, streaming(node, 40, 0.05):
        node.configure(lambda text: text.replace('access = "stdout"', 'access = "/var/log/proxyd/access.log"'))
        node.machine.run("systemctl", "reload", "proxyd")
        last = node.status()["last_reload"]
    assert last["ok"], last
    assert last != before
    assert node.main_pid == pid
    assert set(ends) == {"200"}
    node.machine.run(*node.curl(1))
    wait_for(lambda: '"route"' in node.machine.run("cat", "/var/log/proxyd/access.log").stdout, PATIENCE_S, 0.1)


def test_a_broken_file_fails_the_reload_changes_nothing_and_is_told_everywhere(node: SystemdNode) -> None:
    pid, generation = node.main_pid, node.status()["generations"][-1]["generation"]
    cursor = node.machine.cursor(UNIT)
    good = node.machine.run("cat", CONFIG).stdout
    node.machine.write(CONFIG, good.replace('head_timeout = "10s"', "head_timeout = 10"))
    reloaded = node.machine.run("systemctl", "reload", "proxyd", check=False)
    assert reloaded.returncode != 0
    last = node.status()["last_reload"]
    assert last["ok"] is False
    assert any("http.head_timeout" in finding for finding in last["findings"])
    assert "head_timeout" in node.machine.run("proxyd", "status").stdout
    assert "http.head_timeout" in "\n".join(node.messages(cursor))
    assert node.is_active
    assert (node.main_pid, node.status()["generations"][-1]["generation"]) == (pid, generation)
    assert node.machine.run(*node.curl(2)).stdout.endswith("data: [DONE]\n\n")
    node.machine.write(CONFIG, good)
    node.machine.run("systemctl", "reload", "proxyd")
    assert node.status()["last_reload"]["ok"]


def test_the_log_is_opened_anew_by_what_logrotate_runs(node: SystemdNode) -> None:
    rotate = node.machine.run("cat", "/etc/logrotate.d/proxyd").stdout
    command = rotate.partition("postrotate\n")[2].partition("endscript")[0]
    node.machine.run("mv", "/var/log/proxyd/access.log", "/var/log/proxyd/access.log.1")
    node.machine.run("sh", "-c", command)
    wait_for(lambda: node.machine.path("/var/log/proxyd/access.log").exists(), PATIENCE_S)
    node.machine.run(*node.curl(1))
    wait_for(lambda: '"route"' in node.machine.run("cat", "/var/log/proxyd/access.log").stdout, PATIENCE_S, 0.1)


def test_an_upgrade_keeps_the_pid_and_every_connection_and_the_new_version_serves(node: SystemdNode) -> None:
    pid, restarts = node.main_pid, node.machine.show(UNIT, "NRestarts")
    node.set_version("9.9.9")
    with knocking(node) as ends, streaming(node, 60, 0.05):
        node.machine.run("systemctl", "kill", "-s", "USR2", "--kill-whom=main", "proxyd")
        last = wait_for(
            lambda: (found := node.status()["last_reload"])["kind"] == "upgrade" and found, PATIENCE_S, 0.2
        )
        assert last["ok"], last
    serving = [one for one in node.status()["generations"] if one["state"] == "serving"]
    assert [one["version"] for one in serving] == ["9.9.9"]
    assert "9.9.9" in node.machine.run("proxyd", "status").stdout
    assert (node.main_pid, node.machine.show(UNIT, "NRestarts")) == (pid, restarts)
    assert node.is_active
    assert set(ends) == {"200"}


def test_a_broken_version_is_refused_before_anything_is_touched(node: SystemdNode) -> None:
    pid, workers = node.main_pid, node.workers()
    module = f"{PACKAGE}/worker/drain.py"
    good = node.machine.run("cat", module).stdout
    node.machine.write(module, good + "\nthis is no Python\n")
    upgraded = node.machine.run("proxyd", "upgrade", check=False)
    node.machine.write(module, good)
    assert upgraded.returncode == 1, upgraded.stdout + upgraded.stderr
    assert "cannot run" in upgraded.stderr
    assert "drain.py" in upgraded.stderr
    assert "SyntaxError" in upgraded.stderr
    assert not node.status()["last_reload"]["ok"]
    assert (node.main_pid, node.workers()) == (pid, workers)
    assert node.is_active
    assert node.machine.run(*node.curl(2)).stdout.endswith("data: [DONE]\n\n")


def test_a_restart_refuses_nobody_and_streams_end_in_the_drain(node: SystemdNode) -> None:
    pid = node.main_pid
    with knocking(node) as ends, streaming(node, 30, 0.05):
        node.machine.run("systemctl", "restart", "proxyd")
        time.sleep(0.2)
    assert node.main_pid != pid
    assert not [end for end in ends if end.startswith("connect: ")], ends
    assert set(ends) == {"200"}, ends


def test_a_killed_worker_is_replaced_and_the_unit_goes_on(node: SystemdNode) -> None:
    pid = node.main_pid
    (first, second) = node.workers()
    cursor = node.machine.cursor(UNIT)
    node.machine.run("kill", "-9", str(first))
    wait_for(lambda: len(now := node.workers()) == 2 and first not in now and second in now, PATIENCE_S, 0.1)
    assert node.main_pid == pid
    wait_for(lambda: any(event["event"] == "child_died" for event in node.events(cursor)), PATIENCE_S, 0.1)
    assert node.machine.run(*node.curl(2)).stdout.endswith("data: [DONE]\n\n")


def test_a_worker_that_fills_the_memory_dies_alone(node: SystemdNode) -> None:
    node.drop_in("[Service]\nMemoryMax=400M\n")
    node.machine.run("systemctl", "restart", "proxyd")
    node.wait_serving()
    pid, workers, cursor = node.main_pid, node.workers(), node.machine.cursor(UNIT)
    node.machine.run("python3", "/root/filler.py", "700", node.token())
    died = wait_for(
        lambda: [event for event in node.events(cursor) if event["event"] == "child_died"], PATIENCE_S, 0.1
    )
    assert "SIGKILL" in died[0]["how"]
    node.wait_serving()
    assert (node.main_pid, node.machine.show(UNIT, "NRestarts")) == (pid, "0")
    assert set(node.workers()) != set(workers)
    assert node.machine.run(*node.curl(2)).stdout.endswith("data: [DONE]\n\n")
    node.drop_in("")


def test_a_master_that_hangs_is_found_by_the_watchdog_and_started_anew(node: SystemdNode) -> None:
    node.drop_in("[Service]\nWatchdogSec=6s\n")
    node.machine.run("systemctl", "restart", "proxyd")
    pid = node.wait_serving()["pid"]
    cursor = node.machine.cursor(UNIT)
    with knocking(node) as ends:
        node.machine.run("kill", "-STOP", str(pid))
        wait_for(lambda: node.main_pid not in (0, pid), PATIENCE_S, 0.2)
        assert node.wait_serving()["pid"] != pid
    assert int(node.machine.show(UNIT, "NRestarts")) >= 1
    assert any("Watchdog timeout" in line for line in node.messages(cursor))
    assert not [end for end in ends if end.startswith("connect: ")], ends
    node.drop_in("")


def test_a_stop_ends_with_0_and_leaves_nothing(node: SystemdNode) -> None:
    cursor = node.machine.cursor(UNIT)
    node.machine.run("systemctl", "stop", "proxyd")
    shown = [node.machine.show(UNIT, name) for name in ("Result", "ExecMainCode", "ExecMainStatus", "ActiveState")]
    assert shown == ["success", "1", "0", "inactive"]
    assert node.machine.run("pgrep", "-u", "proxyd", check=False).stdout == ""
    assert {"draining", "stopped"} <= {event["event"] for event in node.events(cursor)}
    refused = node.machine.run("curl", "-sS", "http://127.0.0.1:3000/healthz", check=False)
    assert refused.returncode == 7, refused


def test_a_socket_unit_listens_before_the_daemon_does(installed: SystemdNode) -> None:
    installed.machine.run("systemctl", "enable", "--now", "proxyd.socket")
    # The first connection starts the daemon, and waits for it.
    asked = installed.machine.run("curl", "-sS", "--max-time", "30", "http://127.0.0.1:3000/healthz")
    assert asked.returncode == 0
    installed.wait_serving()
    holders = installed.machine.run("ss", "-Hltnp", "sport = :3000").stdout
    assert '"systemd"' in holders
    installed.machine.run("systemctl", "stop", "proxyd.socket", "proxyd.service")
    assert installed.machine.show(UNIT, "Result") == "success"


def test_the_journal_has_no_traceback(installed: SystemdNode) -> None:
    said = installed.messages()
    # A master that the watchdog aborts shows where it was: that is faulthandler's, not an exception's.
    assert not [line for line in said if line.startswith("Traceback")]
    assert not [event for event in installed.events() if event["event"] in ("tick_failed", "call_failed")]
