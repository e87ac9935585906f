"""What `--check-config` calls an error refuses a start, and what it calls a warning does not: both are asked."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import ROOT, Daemon, Upstream, config_text, free_port, model_text, node, upstream_text

PLAIN = upstream_text("http://127.0.0.1:9/v1") + model_text("m", 1, '["openai"]')


@contextlib.contextmanager
def taken() -> Iterator[int]:
    """A port that this process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


Done = subprocess.CompletedProcess[str]


def both(daemon: Daemon, *, files: int = 0) -> tuple[Done, Done]:
    """The check and a start of the same file; a start that goes on would be ended by the timeout, as a failure."""
    limit = f"ulimit -n {files} && " if files else ""

    def run(*options: str) -> Done:
        program = [sys.executable, "-m", "proxyd", *options, "-c", str(daemon.config)]
        words = ["sh", "-c", f'{limit}exec "$@"', "sh", *program]
        return subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env=daemon.environ, timeout=60, check=False
        )

    return run("--check-config"), run()


@pytest.mark.parametrize("what", ["files", "address", "port", "admin", "directory", "model"])
def test_what_refuses_a_start_is_an_error_of_the_check(tmp_path: Path, what: str) -> None:
    with taken() as port:
        changes = {
            "address": {"server": 'listen = ["192.0.2.1:3000"]'},
            "port": {"server": f'listen = ["127.0.0.1:{port}"]'},
            "admin": {"server": f'admin = "127.0.0.1:{port}"'},
            "directory": {"server": f'admin = "unix:{tmp_path}/none/admin.sock"'},
        }.get(what, {})
        upstreams = PLAIN.replace('["openai"]', '["nobody"]') if what == "model" else PLAIN
        daemon = Daemon(tmp_path, config_text(tmp_path, free_port(), upstreams, **changes))
        checked, started = both(daemon, files=1000 if what == "files" else 0)
    assert (checked.returncode, started.returncode) == (1, 1), checked.stdout + started.stderr
    words = {
        "files": ("open files: the limit of 1000 is below", "open files: the limit of 1000 is below"),
        "address": ("no interface of this machine has 192.0.2.1", "no interface of this machine has"),
        "port": (f"process {os.getpid()} (", "another process has"),
        "admin": (f"process {os.getpid()} (", "another process has"),
        "directory": (f"{tmp_path}/none does not exist", f"{tmp_path}/none does not exist"),
        "model": ('there is no upstream "nobody"', 'there is no upstream "nobody"'),
    }[what]
    assert words[0] in next(line for line in checked.stdout.splitlines() if line.startswith("error ")), checked.stdout
    assert words[1] in started.stderr


def test_warnings_refuse_no_start_and_a_running_daemon_is_no_finding(tmp_path: Path) -> None:
    upstream = Upstream(lambda wire: None)
    more = 'source_addresses = ["127.0.0.1", "192.0.2.1"]\ncongestion_control = "no_such_one"'
    try:
        with node(tmp_path, upstream, more=more) as daemon:
            words = [sys.executable, "-m", "proxyd", "--check-config", "-c", str(daemon.config)]
            checked = subprocess.run(
                words, capture_output=True, text=True, cwd=ROOT, env=daemon.environ, timeout=60, check=False
            )
    finally:
        upstream.close()
    assert checked.returncode == 0, checked.stdout
    assert "no interface of this machine has 192.0.2.1" in checked.stdout
    assert "this kernel has no no_such_one" in checked.stdout
    assert f"127.0.0.1:{daemon.port}" not in checked.stdout
