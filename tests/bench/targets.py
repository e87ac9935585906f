"""What is measured: the C relay, nginx and proxyd, each listening on loopback in front of the same upstream.

Owns: their configurations and how each is started, pinned and recognised. A target names the one process whose CPU time
is the relay's cost (`pid`), and the others that belong to it (`beside`: masters, the telemetry process), which are
printed apart; proxyd's run on the load core.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.tools import ROOT, BenchError, Rig, Started, wait_for


@dataclass
class Target:
    """A running proxy. `token` is what its clients present."""

    name: str
    port: int
    pid: int
    started: Started
    token: str = "none"
    beside: dict[str, int] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_relay(rig: Rig, upstream_port: int) -> Target:
    """The floor: bytes from one socket to the other."""
    started, port = rig.start_listener("relay", str(upstream_port), core=rig.cores.proxy)
    return Target("c", port, started.pid, started)


NGINX = """
daemon off;
{user}
worker_processes 1;
worker_rlimit_nofile 20000;
error_log {folder}/error.log warn;
pid {folder}/nginx.pid;
events {{ worker_connections 16384; multi_accept on; }}
http {{
    access_log off;
    tcp_nodelay on;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 100000;
    upstream behind {{
        server 127.0.0.1:{upstream} max_fails=0;
        keepalive 1024;
        keepalive_requests 100000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=8192;
        location = /ready {{ return 200 "ready"; }}
        location / {{
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Connection '';
            proxy_set_header Host $http_host;
            proxy_buffering off;
            proxy_cache off;
            gzip off;
            proxy_next_upstream off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


def start_nginx(rig: Rig, upstream_port: int, *, on_load_core: bool = False) -> Target:
    """One worker, buffering off, no access log, upstream connections kept: conf/nginx without TLS.

    on_load_core: it is no subject here but stands in front of one (the 25 ms cadence of a deployed node).
    """
    port = free_port()
    folder = rig.folder / f"nginx-{port}"
    folder.mkdir()
    path = folder / "nginx.conf"
    user = "user root;" if os.getuid() == 0 else ""
    path.write_text(NGINX.format(user=user, folder=folder, port=port, upstream=upstream_port))
    binary = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert binary is not None
    core = rig.cores.load if on_load_core else rig.cores.proxy
    started = rig.start([binary, "-c", str(path), "-p", str(folder), "-e", str(folder / "error.log")], core)
    try:
        wait_for(lambda: _answers(port, "/ready"), 10, "nginx")
    except BenchError as error:
        raise BenchError(f"{error}; {started.tail()}") from None
    worker = next(pid for pid in started.children() if _title(pid).startswith("nginx: worker"))
    return Target("nginx", port, worker, started, beside={"master": started.pid})


PROXYD = """
[server]
listen = ["127.0.0.1:{port}"]
admin = "unix:{folder}/admin.sock"
workers = 1
state_dir = "{folder}"
runtime_dir = "{folder}"
drain_timeout = "2s"

[auth]
secret_file = "{folder}/jwt.secret"

[telemetry]
sink = "sqlite:///{folder}/telemetry.db"

[log]
access = "off"

[[upstream]]
name = "bench"
dialect = "openai"
url = "http://127.0.0.1:{upstream}/v1"
api_key_env = "PROXYD_BENCH_KEY"
max_connections = 6144
max_idle = 1024

[[model]]
name = "*"
id = 1
upstreams = ["bench"]
"""


def start_proxyd(rig: Rig, upstream_port: int, *, python: str = sys.executable) -> Target:
    """The daemon through its CLI: authentication on, splitting and accounting on, rows in SQLite, the access log off.

    The worker alone runs on the proxy core; master and telemetry run on the load core.
    """
    port = free_port()
    folder = rig.folder / f"proxyd-{port}"
    folder.mkdir()
    config = folder / "proxyd.toml"
    config.write_text(PROXYD.format(folder=folder, port=port, upstream=upstream_port))
    secret = folder / "jwt.secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_hex(32))
    program = [python, "-m", "proxyd", "-c", str(config)]
    started = rig.start(program, rig.cores.load, PROXYD_BENCH_KEY="sk-bench")
    try:
        wait_for(lambda: started.process.poll() is not None or _answers(port, "/readyz"), 30, "proxyd")
    except BenchError as error:
        raise BenchError(f"{error}; {started.tail()}") from None
    if started.process.poll() is not None:
        raise BenchError(f"proxyd ended; {started.tail()}")
    children = {_title(pid).removeprefix("proxyd: ").split()[0]: pid for pid in started.children()}
    if "worker" not in children:
        raise BenchError(f"proxyd has no worker among {children}")
    pin(children["worker"], rig.cores.proxy)
    token = subprocess.run(
        [python, "-m", "proxyd", "token", "-c", str(config), "--user", "7"],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=ROOT,
        env={**os.environ, "PROXYD_BENCH_KEY": "sk-bench"},
    ).stdout.strip()
    beside = {"master": started.pid, **{name: pid for name, pid in children.items() if name != "worker"}}
    return Target("proxyd", port, children["worker"], started, token, beside)


def pin(pid: int, core: int) -> None:
    """Every thread of it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


def _title(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""
