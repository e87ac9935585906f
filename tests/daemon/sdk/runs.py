"""One run of the whole session: every SDK, on every way, against one scripted provider.

Owns: the provider, the daemon and nginx of the run, the drivers' processes, and what each step gave. Must not know:
what may differ (documented.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.harness import ROOT, Daemon, Seen, Upstream, Wire, config_text, free_port, model_text, upstream_text
from tests.daemon.sdk.nginx import Nginx, nginx_before
from tests.daemon.sdk.steps import MAX_BODY_BYTES, SDKS, STEPS, steps_of

HERE = Path(__file__).parent
DIRECT, PROXYD, NGINX_TCP, NGINX_UNIX = "direct", "proxyd", "nginx tcp", "nginx unix"
VIA = (PROXYD, NGINX_TCP, NGINX_UNIX)
Key = tuple[str, str, str]  # sdk, way, step


class Provider:
    """The scripted upstream of all steps: a request names its step in a header, which nobody on the way may drop."""

    def __init__(self) -> None:
        self.attempts: dict[Key, list[Seen]] = defaultdict(list)
        self.strays: list[bytes] = []
        self._answers = {step.name: step.answer for step in STEPS}
        self._lock = threading.Lock()
        self.upstream = Upstream(self._answer)

    def _answer(self, wire: Wire) -> bool | None:
        marks = (wire.seen.header("x-step") or "").split("|")
        if len(marks) != 3:
            self.strays.append(wire.seen.head)
            return False
        sdk, way, step = marks
        with self._lock:
            self.attempts[sdk, way, step].append(wire.seen)
        return self._answers[step](wire, json.loads(wire.seen.body) if wire.seen.body else {})


@dataclass
class Run:
    """What became of it."""

    provider: Provider
    daemon: Daemon
    nginx: Nginx
    seen: dict[Key, dict[str, Any]] = field(default_factory=dict)

    def base_url(self, way: str, sdk: str) -> str:
        ports = {PROXYD: self.daemon.port, NGINX_TCP: self.nginx.tcp, NGINX_UNIX: self.nginx.unix}
        port = self.provider.upstream.port if way == DIRECT else ports[way]
        return f"http://127.0.0.1:{port}" + ("/v1" if sdk.startswith("openai") else "")

    def drive(self, sdk: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
        """Runs one SDK's driver; its lines."""
        if sdk.endswith("-js"):
            node = shutil.which("node")
            assert node is not None, "node is missing: run tests/install-deps"
            command = [node, str(HERE / "session.mjs")]
        else:
            command = [sys.executable, str(HERE / "session.py")]
        # a proxy or a key of the machine's own must not get between
        environ = {
            name: value
            for name, value in os.environ.items()
            if not name.lower().endswith("_proxy") and not name.startswith(("OPENAI_", "ANTHROPIC_"))
        }
        done = subprocess.run(command, input=json.dumps(plan).encode(), capture_output=True, timeout=300, env=environ)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    def _session(self, sdk: str, failed: list[BaseException]) -> None:
        token = self.daemon.token()
        keys = {"bad": "sk-of-nobody", "spent": self.daemon.token(8, quota_remaining=0)}
        ways = {way: {"base_url": self.base_url(way, sdk), "api_key": token, "keys": keys} for way in (DIRECT, *VIA)}
        try:
            for line in self.drive(sdk, {"sdk": sdk, "ways": ways, "steps": [step.wire() for step in steps_of(sdk)]}):
                self.seen[sdk, line["way"], line["step"]] = line["seen"]
        except BaseException as error:
            failed.append(error)

    def run(self) -> None:
        """All SDKs side by side: most of the time they wait between attempts."""
        failed: list[BaseException] = []
        threads = [threading.Thread(target=self._session, args=(sdk, failed)) for sdk in SDKS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def outcome(self, sdk: str, way: str, step: str) -> dict[str, Any]:
        """What the SDK got, and what the provider saw of it."""
        key = (sdk, way, step)
        return {**self.seen[key], "attempts": [told(seen) for seen in self.provider.attempts[key]]}


def told(seen: Seen) -> dict[str, Any]:
    """An attempt as the provider saw it."""
    fields = [line.decode().partition(": ") for line in seen.head.split(b"\r\n")[1:]]
    headers = {name.lower(): value for name, _, value in fields}
    headers["x-step"] = ""  # it names the way
    headers.pop("content-length", None)
    return {"path": seen.path, "headers": headers, "body": json.loads(seen.body) if seen.body else None}


def install_javascript() -> None:
    """The pinned npm packages, installed if they are not; a machine that cannot is a failure."""
    done = subprocess.run([str(HERE / "install")], capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()


@contextlib.contextmanager
def node_of(folder: Path) -> Iterator[Run]:
    """The provider, proxyd on TCP and on a Unix socket, and nginx before both."""
    provider = Provider()
    port = free_port()
    sock = f"{folder}/proxyd.sock"
    url = provider.upstream.url
    upstreams = (
        upstream_text(url + "/v1")
        + upstream_text(url, name="anthropic", dialect="anthropic")
        + model_text("gpt-4o", 1, '["openai"]')
        + model_text("old", 2, '["openai"]')
        + model_text("claude", 3, '["anthropic"]')
    )
    text = config_text(folder, port, upstreams, http=f'max_body = "{MAX_BODY_BYTES}B"')
    listen = f'listen = ["127.0.0.1:{port}"]'
    assert listen in text
    daemon = Daemon(folder, text.replace(listen, f'listen = ["127.0.0.1:{port}", "unix:{sock}"]'))
    daemon.port = port
    try:
        daemon.start()
        with nginx_before(folder, port, sock) as nginx:
            yield Run(provider, daemon, nginx)
        assert daemon.stop() == 0, daemon.log()[-3000:]
        assert "Traceback" not in daemon.log(), daemon.log()[-5000:]
    finally:
        daemon.kill()
        provider.upstream.close()


__all__ = ["DIRECT", "NGINX_TCP", "NGINX_UNIX", "PROXYD", "ROOT", "VIA", "Run", "install_javascript", "node_of"]
