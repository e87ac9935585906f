"""`proxyd --demo` as a stranger runs it, alone and behind a real nginx with the configuration we ship."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 30.0


@dataclass
class Demo:
    process: subprocess.Popen[str]
    port: int
    token: str
    folder: Path
    said: str

    def ask(self, port: int, words: int, pace: int = 5) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        body = json.dumps({"prompt": f"[demo: words={words} pace={pace}] Hello"})
        connection.request("POST", "/api/v1/stream", body, {"Authorization": f"Bearer {self.token}"})
        return connection, connection.getresponse()


@contextmanager
def demo() -> Iterator[Demo]:
    """A running demo whose temporary files land in a folder of ours."""
    environ = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "proxyd", "--demo", "--port", "0"],
            cwd=ROOT, env=environ | {"TMPDIR": folder}, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            text = ""
            while "Ctrl-C" not in text:
                line = process.stdout.readline()
                assert line, f"the demo ended: {text}"
                text += line
            port, token = re.search(r"127\.0\.0\.1:(\d+)", text), re.search(r"Bearer ([\w.-]+)", text)
            assert port is not None
            assert token is not None
            yield Demo(process, int(port[1]), token[1], Path(folder), text)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE_S)
            if process.stdout is not None:
                process.stdout.close()


def group_members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_the_demo_streams_word_by_word_and_ctrl_c_leaves_nothing() -> None:
    with demo() as running:
        connection, response = running.ask(running.port, 400)
        assert response.status == 200
        assert response.getheader("content-type", "").startswith("text/event-stream")
        while b'data: {"delta":' not in response.readline():
            pass
        assert len(list(running.folder.iterdir())) == 1
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.process.wait(PATIENCE_S) == 0
        connection.close()
        assert list(running.folder.iterdir()) == []
        assert running.process.stdout is not None
        assert re.search(rf"^stopped; removed {running.folder}/proxyd-demo-\w+$", running.process.stdout.read(), re.M)
        assert group_members(running.process.pid) == []


def test_the_page_gets_its_session_and_the_session_streams() -> None:
    with demo() as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=PATIENCE_S)
        connection.request("GET", "/")
        page = connection.getresponse()
        cookie = page.getheader("set-cookie", "")
        assert b"<title>" in page.read()
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        # Cookies ignore ports: the name keeps two demos apart.
        assert cookie.startswith(f"proxyd_demo_{running.port}=")
        # The same connection goes on to the relay, with the cookie and the page's own origin.
        headers = {"Cookie": cookie.partition(";")[0], "Origin": f"http://127.0.0.1:{running.port}"}
        connection.request("POST", "/api/v1/stream", '{"prompt": "[demo: pace=0] Hi"}', headers)
        answer = connection.getresponse()
        events = answer.read()
        assert answer.status == 200
        assert b"event: done" in events
        connection.request("POST", "/api/v1/stream", '{"prompt": "Hi"}', headers | {"Origin": "https://evil.example"})
        refused = connection.getresponse()
        refused.read()
        assert refused.status == 403
        connection.close()


def test_the_printed_curl_line_and_the_commands_of_the_readme_run_when_they_are_pasted() -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## A first request") : readme.index("## Installing")]
    commands = re.findall(r"^```sh\n(curl .*?)^```$", section, re.M | re.DOTALL)
    programs = re.findall(r"^```python\n(.*?)^```$", section, re.M | re.DOTALL)
    assert (len(commands), len(programs)) == (1, 2)
    with demo() as running:
        printed = re.search(r"^ +curl .*?\n\n", running.said, re.M | re.DOTALL)
        exported = re.search(r"^  (export TOKEN=.*)$", running.said, re.M)
        assert printed is not None
        assert exported is not None
        here = f"127.0.0.1:{running.port}"
        pasted = [printed[0], exported[1] + "\n" + commands[0].replace("127.0.0.1:3000", here)]
        calls = [["bash", "-c", text] for text in pasted]
        calls += [[sys.executable, "-c", program.replace("127.0.0.1:3000", here)] for program in programs]
        environ = {"PATH": os.environ["PATH"]}
        for number, call in enumerate(calls):
            env = environ | ({"TOKEN": running.token} if number >= len(pasted) else {})
            done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
            assert done.returncode == 0, done.stderr
            assert "not an AI" in done.stdout or '"delta":" AI:"' in done.stdout


def test_a_taken_port_is_told_and_nothing_is_left() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "proxyd", "--demo", "--port", str(taken.getsockname()[1])],
            cwd=ROOT, env=os.environ | {"TMPDIR": folder}, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.endswith("taken; choose another: --port N\n")
        assert list(Path(folder).iterdir()) == []


@contextmanager
def nginx(port: int, folder: Path) -> Iterator[int]:
    """The shipped configuration, with its addresses replaced and without TLS; yields the port it listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = probe.getsockname()[1]
    text = (ROOT / "conf/nginx/proxyd.conf").read_text()
    text = text.replace("server unix:/run/proxyd/proxyd.sock max_fails=0;", f"server 127.0.0.1:{port} max_fails=0;")
    text = re.sub(r"\n\s*(listen \[::\]|ssl_certificate)[^\n]*", "", text)
    text = text.replace("listen 443 ssl http2;", f"listen 127.0.0.1:{listen};")
    paths = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{ worker_connections 256; }}\n"
        f"http {{ access_log off;\n{paths}{text}\n}}\n"
    )
    process = subprocess.Popen(["nginx", "-p", str(folder), "-c", str(config), "-e", f"{folder}/error.log"])
    try:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", listen), PATIENCE_S).close()
                break
            except ConnectionRefusedError:
                assert process.poll() is None, (folder / "error.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield listen
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="n-") as folder:
        yield Path(folder)


def test_behind_the_shipped_nginx_events_arrive_one_by_one_and_requests_mix(scratch: Path) -> None:
    with demo() as running, nginx(running.port, scratch) as front:
        connection, response = running.ask(front, 30, pace=20)
        assert response.status == 200
        assert response.getheader("x-accel-buffering") == "no"
        pieces = []
        while piece := response.read1():
            pieces.append(piece)
        assert b"event: done" in pieces[-1]
        # Buffered, it would be one or two pieces; on a busy machine a few events may share one.
        assert len(pieces) > 10
        for number in range(20):
            if number % 2:
                connection.request("GET", "/readyz")
            else:
                body = '{"model": "demo", "messages": [{"role": "user", "content": "[demo: delay=0] Hi"}]}'
                headers = {"Authorization": f"Bearer {running.token}", "X-Request-Id": "forged"}
                connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            # nginx's own $request_id: 32 hex digits, whatever the client sent.
            assert re.fullmatch(r"[0-9a-f]{32}", answer.getheader("x-proxyd-request-id", ""))
        connection.close()
