"""The commands as an operator types them: token piped into curl, usage, status, --check-config on broken files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    KEY,
    ROOT,
    SECRET,
    USAGE,
    Daemon,
    Script,
    Upstream,
    ask,
    chat_chunk,
    config_text,
    model_text,
    node,
    upstream_text,
)

Make = Callable[[Script], Upstream]


def proxyd(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxyd", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environ,
        timeout=60,
        check=False,
    )


def test_a_token_from_the_command_line_streams_with_curl(upstream: Make, tmp_path: Path) -> None:
    assert shutil.which("curl"), "curl belongs to what the tests need"
    up = upstream(lambda wire: wire.stream(chat_chunk("Hi"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        script = f"""
set -eu
TOKEN=$("{sys.executable}" -m proxyd -c "{daemon.config}" token --user 42 --tenant acme --ttl 10m)
curl -sSN --max-time 20 "http://127.0.0.1:{daemon.port}/api/v1/stream" \\
  -H "Authorization: Bearer $TOKEN" -H 'Content-Type: application/json' -d '{{"prompt":"hello","model":"m"}}'
"""
        found = subprocess.run(
            ["bash", "-c", script],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=daemon.environ,
            timeout=60,
            check=False,
        )
        assert found.returncode == 0, found.stderr
        assert 'data: {"delta":"Hi"}' in found.stdout
        assert "event: done" in found.stdout
        (row,) = daemon.wait_rows(1)
        assert (row["user_id"], row["tenant"]) == (42, "acme")
        # The same user, as an operator asks.
        page = proxyd(daemon.environ, "-c", str(daemon.config), "usage", "--user", "42")
        assert page.returncode == 0, page.stderr
        assert "16" in page.stdout
        document = json.loads(
            proxyd(daemon.environ, "-c", str(daemon.config), "usage", "--user", "42", "--json").stdout
        )
        assert "11" in json.dumps(document)
        nobody = proxyd(daemon.environ, "-c", str(daemon.config), "usage", "--user", "43", "--window", "1h")
        assert nobody.returncode == 0
        status = proxyd(daemon.environ, "-c", str(daemon.config), "status")
        assert "worker 0" in status.stdout


def test_a_token_of_the_command_line_carries_its_quota(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up) as daemon:
        token = proxyd(daemon.environ, "-c", str(daemon.config), "token", "--user", "1", "--quota", "0").stdout.strip()
        assert ask(daemon, "/v1/chat/completions", CHAT, token=token).status == 429


def test_version_names_what_it_stands_on() -> None:
    found = proxyd(dict(os.environ), "--version")
    assert found.returncode == 0
    for word in ("proxyd", "uvloop", "aiohttp", "OpenSSL", "Python"):
        assert word in found.stdout


GOOD_UPSTREAM = upstream_text("http://127.0.0.1:9/v1") + model_text("*", 1, '["openai"]')

# What is wrong, the file's changes, the text of upstreams and models, and what the finding must name.
BROKEN: dict[str, tuple[dict[str, str], str, list[str]]] = {
    "unknown key": ({"server": "worker = 3"}, GOOD_UPSTREAM, ["server.worker", "workers"]),
    "unknown section": ({"servers": ""}, GOOD_UPSTREAM, ["servers", "server"]),
    "bare number": ({"stream": "heartbeat = 15"}, GOOD_UPSTREAM, ["stream.heartbeat", "15s"]),
    "bad unit": ({"http": 'max_body = "8 parsecs"'}, GOOD_UPSTREAM, ["http.max_body"]),
    "not TOML": ({"stream": "heartbeat = ="}, GOOD_UPSTREAM, ["not TOML"]),
    "upstream missing": ({}, upstream_text("http://h/v1") + model_text("*", 1, '["opena"]'), ["opena", "openai"]),
    "no model": ({}, upstream_text("http://h/v1"), ["model"]),
    "no upstream": ({}, "", ["upstream"]),
    "model twice": ({}, GOOD_UPSTREAM + model_text("*", 2, '["openai"]'), ["model"]),
    "bad url": ({}, upstream_text("ftp://h/v1") + model_text("*", 1, '["openai"]'), ["url"]),
    "off in public": (
        {"auth": 'mode = "off"', "server": 'listen = ["0.0.0.0:3000"]\nworkers = 1'},
        GOOD_UPSTREAM,
        ["auth.mode", "0.0.0.0:3000"],
    ),
    "admin in public": ({"server": 'admin = "0.0.0.0:3001"\nworkers = 1'}, GOOD_UPSTREAM, ["server.admin"]),
    "mixed algorithms": ({"auth": 'algorithms = ["HS256", "RS256"]'}, GOOD_UPSTREAM, ["auth.algorithms"]),
    "secret missing": ({"auth": 'secret_file = "/nonexistent/secret"'}, GOOD_UPSTREAM, ["/nonexistent/secret"]),
    "key missing": (
        {},
        upstream_text("http://h/v1").replace("UPSTREAM_KEY", "NO_SUCH_KEY") + model_text("*", 1, '["openai"]'),
        ["NO_SUCH_KEY"],
    ),
    "fallback loop": ({}, GOOD_UPSTREAM + model_text("a", 2, '["openai"]', 'fallback = "b"'), ["fallback", "b"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_config_names_the_line_the_key_and_what_to_do(tmp_path: Path, name: str) -> None:
    changes, upstreams, expected = BROKEN[name]
    daemon = Daemon(tmp_path, config_text(tmp_path, 3000, upstreams, **changes))
    found = proxyd(daemon.environ, "--check-config", "-c", str(daemon.config))
    assert found.returncode == 1, found.stdout + found.stderr
    text = found.stdout + found.stderr
    errors = [line for line in text.splitlines() if line.startswith("error ")]
    assert errors, text
    assert all(line.startswith(f"error {daemon.config}:") for line in errors), errors
    named = " ".join(errors)
    for word in expected:
        assert word in named
    assert SECRET not in text
    assert KEY not in text
    assert "Traceback" not in text
    report = json.loads(proxyd(daemon.environ, "--check-config", "--json", "-c", str(daemon.config)).stdout)
    assert any(word in json.dumps(report) for word in expected)


@pytest.mark.parametrize(("content", "mode", "expected"), [("short", 0o600, "32"), (SECRET, 0o644, "chmod")])
def test_a_secret_that_is_weak_or_readable_by_all_is_an_error_and_never_shown(
    tmp_path: Path, content: str, mode: int, expected: str
) -> None:
    daemon = Daemon(tmp_path, config_text(tmp_path, 3000, GOOD_UPSTREAM))
    secret = tmp_path / "jwt.secret"
    secret.chmod(0o600)
    secret.write_text(content)
    secret.chmod(mode)
    found = proxyd(daemon.environ, "--check-config", "-c", str(daemon.config))
    assert found.returncode == 1
    assert expected in found.stdout + found.stderr
    assert content not in found.stdout + found.stderr
    refused = proxyd(daemon.environ, "-c", str(daemon.config))
    assert refused.returncode == 1
    assert "not started" in refused.stderr


def test_check_config_of_a_good_file_exits_with_zero_and_of_none_with_two(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, config_text(tmp_path, 3000, GOOD_UPSTREAM))
    good = proxyd(daemon.environ, "--check-config", "-c", str(daemon.config))
    assert good.returncode == 0, good.stdout + good.stderr
    missing = proxyd(daemon.environ, "--check-config", "-c", str(tmp_path / "none.toml"))
    assert missing.returncode == 2
    assert "none.toml" in missing.stdout + missing.stderr
    assert proxyd(daemon.environ, "-c", str(tmp_path / "none.toml")).returncode == 2


def test_all_faults_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    text = upstream_text("ftp://h") + model_text("*", 1, '["nowhere"]')
    changes = {"stream": 'heartbeat = 1\nbufer = "1KiB"', "log": 'level = "loud"'}
    daemon = Daemon(tmp_path, config_text(tmp_path, 3000, text, **changes))
    found = proxyd(daemon.environ, "--check-config", "-c", str(daemon.config))
    told = found.stdout + found.stderr
    for word in ("heartbeat", "bufer", "log.level", "url", "nowhere"):
        assert word in told
