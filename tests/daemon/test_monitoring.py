"""Alerts, percentiles, `proxyd status` and `proxyd top`, of a real node.

One node for most tests: an alert takes ten seconds to clear, and other tests run meanwhile.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import math
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import ROOT, Daemon, Reply, Upstream, Wire, free_port, node, request_bytes, wait_for
from tests.daemon.terminal import Terminal, command, run

PATH = "/v1/chat/completions"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
STREAMS = "streams_active >= 1"
NEVER = "queue_depth > 800"
ALERTS = f'alert_on = ["{STREAMS}", "{NEVER}", "p99_latency > 1h"]\npercentiles = [0.5, 0.9, 0.99]'
# Nobody measures a delay of a loaded machine exactly; what the daemon measured is in its log.
DELAYS_S = [0.06 * 1.07**step for step in range(40)]


def stream_late(wire: Wire) -> None:
    """The first event comes after the delay that the prompt names; "hold" holds the stream open."""
    prompt = wire.seen.json["messages"][0]["content"]
    if prompt == "hold":
        wire.stream(EVENT, end=False)
        wire.wait_closed(30)
        return
    time.sleep(float(prompt))
    wire.stream(EVENT, b"data: [DONE]\n\n")


def ask(daemon: Daemon, prompt: str) -> Reply:
    sock = daemon.connect()
    sock.settimeout(20)
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    sock.sendall(request_bytes(PATH, body, daemon.token()))
    return Reply(sock)


def status_of(daemon: Daemon) -> dict[str, Any]:
    return json.loads(daemon.admin("/status")[1])  # type: ignore[no-any-return]


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    lines = [line for line in daemon.log().splitlines() if f'"{name}"' in line]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    upstream = Upstream(stream_late)
    try:
        server = 'workers = 2\ndrain_timeout = "30s"'  # tests that close their clients wait for none of it
        with node(tmp_path_factory.mktemp("node"), upstream, server=server, monitoring=ALERTS) as found:
            yield found
    finally:
        upstream.close()


def test_a_condition_that_stays_true_is_an_alert_everywhere(daemon: Daemon) -> None:
    reply = ask(daemon, "hold")
    next(reply.pieces())
    (line,) = wait_for(lambda: events(daemon, "alert_raised"))
    assert (line["level"], line["process"], line["alert"], line["value"]) == ("warning", "telemetry", STREAMS, 1.0)
    assert daemon.metric("proxyd_alert_active", alert=STREAMS) == 1
    assert daemon.metric("proxyd_alert_active") == 1
    first, *others = status_of(daemon)["alerts"]
    assert (first["alert"], first["active"], first["value"], first["unit"]) == (STREAMS, True, 1.0, "")
    assert abs(time.time() - first["since"]) < 30
    assert [(one["alert"], one["active"]) for one in others] == [("p99_latency > 1h", False), (NEVER, False)]
    shown = run(daemon, "status").stdout
    assert re.search(rf"^ALERT: {STREAMS} since \d{{4}}-.* UTC, now 1$", shown, re.MULTILINE)
    assert NEVER not in shown
    reply.sock.close()  # the alert clears while the next tests run


def test_the_percentiles_of_status_are_within_5_percent_of_what_was_measured(daemon: Daemon) -> None:
    wait_for(lambda: len(measured(daemon)) == 1)  # that of the test before
    threads = [threading.Thread(target=lambda d=delay: ask(daemon, f"{d:.4f}").body()) for delay in DELAYS_S]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    exact = sorted(wait_for(lambda: len(measured(daemon)) == 1 + len(DELAYS_S) and measured(daemon)))
    told = status_of(daemon)["latency"]["proxyd_time_to_first_event_seconds"]
    for window in ("last_minute", "since_start"):
        assert told[window]["count"] == len(exact)
        for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            rank = math.ceil(q * len(exact))
            assert told[window][name] == pytest.approx(exact[rank - 1], rel=0.05, abs=0.001), (window, name)


def measured(daemon: Daemon) -> list[float]:
    """Each stream's time to its first event, by the access log, in seconds."""
    lines = [line for line in daemon.access_log() if line["route"] == PATH]
    return [line["ttft_ms"] / 1000 for line in lines if "ttft_ms" in line]


def test_rates_and_pools_are_told(daemon: Daemon) -> None:
    found = status_of(daemon)
    assert found["requests"]["per_s"] > 0
    assert wait_for(lambda: status_of(daemon)["streams"]["events_per_s"]) > 0
    pool = found["upstreams"]["openai"]["pool"]
    assert pool.keys() == {"idle", "active", "connecting"}
    assert pool["idle"] >= 1
    assert [(worker["slot"], worker["generation"] >= 0) for worker in found["workers"]] == [(0, True), (1, True)]
    assert found["last_reload"] is None


# --- Prometheus -------------------------------------------------------------------------------------------------------


def test_prometheus_takes_the_metrics_as_they_are(daemon: Daemon) -> None:
    text = daemon.admin("/metrics")[1]
    found = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_shipped_nginx_passes_metrics_on_and_nothing_else(daemon: Daemon, tmp_path: Path) -> None:
    port = free_port()
    text = (ROOT / "conf/nginx/proxyd-metrics.conf").read_text()
    text = text.replace("listen 127.0.0.1:9464;", f"listen 127.0.0.1:{port};")
    text = text.replace("unix:/run/proxyd/admin.sock", f"unix:{daemon.folder}/admin.sock")
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{name}_temp_path {tmp_path}/{name};\n" for name in names)
    user = "user root;\n" if os.geteuid() == 0 else ""  # the socket is 0660, and this folder is the test's alone
    config = tmp_path / "nginx.conf"
    config.write_text(f"{user}daemon off; pid {tmp_path}/pid;\nevents {{}}\nhttp {{\n{paths}{text}\n}}\n")

    def get(path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def listens() -> bool:
        with contextlib.suppress(ConnectionRefusedError):
            return get("/")[0] == 404
        return False

    nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(config), "-e", f"{tmp_path}/error.log"])
    try:
        wait_for(listens, 20)
        status, headers, body = get("/metrics", **{"Accept-Encoding": "gzip"})
        assert (status, headers["Content-Encoding"]) == (200, "gzip")
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert b'proxyd_alert_active{alert="' in gzip.decompress(body)
        for path in ("/status", "/sessions/revoke", "/metrics/"):
            assert get(path)[0] == get(path, "POST")[0] == 404
    finally:
        nginx.terminate()
        nginx.wait(20)


# --- proxyd status and proxyd top on a pipe --------------------------------------------------------------------------


def test_a_pipe_gets_plain_text_with_whole_lines(daemon: Daemon) -> None:
    for words in (["status"], ["top", "--count", "2", "--interval", "100ms"]):
        found = run(daemon, *words)
        assert (found.returncode, found.stderr) == (0, "")
        assert not set(found.stdout) - set(map(chr, range(32, 127))) - {"\n"}
        assert found.stdout.count("worker 1 ") == (2 if "top" in words else 1)
        assert "groups: " in found.stdout
    assert json.loads(run(daemon, "status", "--json").stdout)["pid"] == daemon.process.pid  # type: ignore[union-attr]


def test_top_on_a_pipe_without_a_daemon_fails_and_names_the_address(daemon: Daemon, tmp_path: Path) -> None:
    config = tmp_path / "proxyd.toml"
    config.write_text(daemon.config.read_text().replace("/admin.sock", "/nobody.sock"))
    found = subprocess.run(
        [sys.executable, "-m", "proxyd", "-c", str(config), "top"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert "proxyd top: not running: nothing listens on unix:" in found.stderr


def test_a_reader_that_has_enough_ends_top_without_a_word(daemon: Daemon) -> None:
    line = f"{' '.join(command(daemon, 'top', '--interval', '100ms'))} | head -n 2"
    found = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert found.stderr == ""
    assert found.stdout.splitlines()[1].startswith("proxyd ")


# --- proxyd top on a terminal ----------------------------------------------------------------------------------------


@pytest.fixture
def terminal(daemon: Daemon) -> Iterator[Terminal]:
    found = Terminal(daemon)
    yield found
    found.close()


def test_top_fits_80_by_24_and_q_ends_it(terminal: Terminal) -> None:
    terminal.wait_for("/s now")  # the second look: what happened since the first
    assert termios.tcgetattr(terminal.slave) != terminal.modes
    os.write(terminal.master, b"q")
    assert terminal.ends() == 0
    assert terminal.is_as_before()
    frames = [frame for frame in terminal.frames() if any("q quits" in line for line in frame)]
    assert len(frames) >= 2
    for frame in frames:
        assert len(frame) == 24
        assert max(len(line) for line in frame) <= 80
    text = "\n".join(frames[-1])
    for part in ("proxyd ", "worker 0", "worker 1", "telemetry", "time to first event", "openai", "closed", "rows: "):
        assert part in text
    assert "\x1b[32m" in terminal.read()


def test_status_on_a_terminal_has_colours_and_keeps_to_its_width(daemon: Daemon) -> None:
    for environ, has_codes in (({}, True), ({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)):
        terminal = Terminal(daemon, "status", **environ)
        try:
            assert terminal.ends() == 0
            text = terminal.read()
            assert ("\x1b[" in text) == has_codes
            assert ("\x1b[32mready" in text) == (not environ)
            lines = re.sub(r"\x1b\[[0-9;]*m", "", text).split("\r\n")
            assert any(line.startswith("worker 1 ") for line in lines)
            assert "\x1b" not in "".join(lines)
            assert not has_codes or max(map(len, lines)) <= 80
        finally:
            terminal.close()


@pytest.mark.parametrize(
    ("how", "code"), [("key", 0), (signal.SIGINT, 0), (signal.SIGTERM, -15), (signal.SIGHUP, -1)], ids=str
)
def test_top_leaves_the_terminal_as_it_was_however_it_ends(terminal: Terminal, how: Any, code: int) -> None:
    terminal.wait_for("q quits")
    if how == "key":
        os.write(terminal.master, b"\x03")
    else:
        terminal.process.send_signal(how)
    assert terminal.ends() == code
    assert terminal.is_as_before()
    assert "Traceback" not in terminal.read()


def test_top_gives_the_terminal_back_while_it_is_stopped(terminal: Terminal) -> None:
    terminal.wait_for("q quits")
    terminal.process.send_signal(signal.SIGTSTP)
    wait_for(lambda: Path(f"/proc/{terminal.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 20)
    terminal.read()
    assert terminal.is_as_before()
    terminal.process.send_signal(signal.SIGCONT)
    wait_for(lambda: terminal.read().count("\x1b[?1049h") == 2, 20)
    os.write(terminal.master, b"q")
    assert terminal.ends() == 0
    assert terminal.is_as_before()


def test_the_alert_is_over_ten_seconds_after_its_condition(daemon: Daemon) -> None:
    (line,) = wait_for(lambda: events(daemon, "alert_cleared"), 30)
    assert (line["level"], line["alert"]) == ("info", STREAMS)
    assert line["lasted_s"] >= 10
    wait_for(lambda: daemon.metric("proxyd_alert_active") == 0)
    assert not any(one["active"] for one in status_of(daemon)["alerts"])


# --- generations -----------------------------------------------------------------------------------------------------


def asked(daemon: Daemon) -> int:
    return int(status_of(daemon)["requests"]["answered"])


def test_metrics_and_status_stay_right_while_generations_overlap_and_a_worker_dies(daemon: Daemon) -> None:
    assert daemon.process is not None
    replies = [ask(daemon, "hold") for _ in range(3)]
    for reply in replies:
        next(reply.pieces())
    before, rows, restarts = asked(daemon), daemon.rows(), daemon.metric("proxyd_worker_restarts_total")
    old = {worker["pid"] for worker in status_of(daemon)["workers"]}
    daemon.process.send_signal(signal.SIGHUP)
    wait_for(lambda: status_of(daemon)["last_reload"], 20)
    found = status_of(daemon)
    assert (found["last_reload"]["ok"], found["last_reload"]["kind"]) == (True, "reload")
    assert daemon.metric("proxyd_last_reload_successful", kind="reload") == 1

    serving, draining = found["generations"]
    assert (serving["state"], serving["workers"], serving["streams"]) == ("serving", 2, 0)
    assert (draining["state"], draining["streams"]) == ("draining", 3)
    assert 0 < draining["ends_in_s"] <= 30
    shown = run(daemon, "status").stdout
    assert re.search(rf"^generation {draining['generation']}: draining for \d+s, 3 streams, ", shown, re.MULTILINE)
    assert "last reload: done at " in shown

    # Any worker answers for both, and what either counts is the node's.
    assert daemon.metric("proxyd_streams_active") == found["streams"]["active"] == 3
    ask(daemon, "0.001").body()
    wait_for(lambda: asked(daemon) == before + 1)
    assert daemon.metric("proxyd_requests_total") >= before + 1

    victim = next(one for one in found["workers"] if one["generation"] == serving["generation"])
    os.kill(victim["pid"], signal.SIGKILL)
    wait_for(lambda: daemon.metric("proxyd_worker_restarts_total") == restarts + 1, 20)
    assert asked(daemon) >= before + 1
    wait_for(lambda: [one["state"] for one in status_of(daemon)["workers"][:2]] == ["ready"] * 2, 20)
    again = next(one for one in status_of(daemon)["workers"] if one["seat"] == victim["seat"])
    assert (again["slot"], again["restarts"]) == (victim["slot"], 1)
    assert again["pid"] != victim["pid"]

    daemon.close_clients()  # the old generation has nothing left
    wait_for(lambda: len(status_of(daemon)["generations"]) == 1, 20)
    last = status_of(daemon)
    assert not old & {worker["pid"] for worker in last["workers"]}
    assert len(last["workers"]) == 2
    assert (last["streams"]["active"], daemon.metric("proxyd_streams_active")) == (0, 0)
    wait_for(lambda: asked(daemon) == before + 4)
    wait_for(lambda: len(daemon.rows()) == len(rows) + 4, 20)


# --- a restart -------------------------------------------------------------------------------------------------------


def test_top_waits_for_a_daemon_that_restarts_and_shows_the_new_one(daemon: Daemon) -> None:
    """The last test: it restarts the node that the others share."""
    terminal = Terminal(daemon)
    with subprocess.Popen(
        command(daemon, "top", "--interval", "100ms"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as piped:
        try:
            assert piped.stdout is not None
            os.set_blocking(piped.stdout.fileno(), False)
            said = b""

            def reads(text: str) -> bool:
                nonlocal said
                with contextlib.suppress(BlockingIOError):
                    said += os.read(piped.stdout.fileno(), 1 << 20)  # type: ignore[union-attr]
                terminal.read()
                return text.encode() in said

            old = daemon.process.pid  # type: ignore[union-attr]
            terminal.wait_for(f"pid {old}")
            wait_for(lambda: reads(f"pid {old}"), 20)
            daemon.close_clients()
            daemon.stop()
            terminal.wait_for("waiting for unix:")
            wait_for(lambda: reads("waiting for unix:"), 20)
            daemon.start()
            new = daemon.process.pid  # type: ignore[union-attr]
            terminal.wait_for(f"pid {new}")
            wait_for(lambda: reads(f"pid {new}"), 20)
            os.write(terminal.master, b"q")
            assert terminal.ends() == 0
            piped.send_signal(signal.SIGINT)
            assert piped.wait(20) == 0
            assert b"\x1b" not in said
            assert b"Traceback" not in said
        finally:
            piped.kill()
            terminal.close()
