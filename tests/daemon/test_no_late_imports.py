"""A daemon that runs imports nothing: what is on disk may be of a newer version by then (an upgrade is installed while
the old one serves), and half of two versions is neither. An audit hook tells of each module that is looked for."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.daemon.harness import CHAT, DONE, FINISH, SECRET, USAGE, Upstream, Wire, ask, chat_chunk, node, wait_for

HOOK = """
import os, sys

def _hook(event, given, path={path!r}, exists=os.path.exists, getpid=os.getpid):
    if event == "import" and exists(path):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"%d %s %s\\n" % (getpid(), given[0].encode(), (given[1] or "").encode()))
        os.close(fd)

sys.addaudithook(_hook)
"""


def answer(wire: Wire) -> Any:
    body = wire.seen.json
    if body.get("fail"):
        wire.json({"error": {"message": "no", "type": "server_error"}}, 500)
        return None
    if body.get("cut"):
        wire.head(transfer_encoding="chunked")
        wire.chunk(chat_chunk())
        return False
    if not body.get("stream"):
        wire.json({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]})
        return None
    wire.stream(chat_chunk("né日本"), FINISH, USAGE, DONE)
    return None


def test_nothing_is_imported_once_the_node_serves(upstream: Callable[..., Upstream], tmp_path: Path) -> None:
    armed = tmp_path / "imports"
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK.format(path=str(armed)))
    os.environ["PYTHONPATH"] = str(tmp_path / "hook")
    try:
        with node(tmp_path, upstream(answer), server="workers = 2") as daemon:
            assert daemon.process is not None
            armed.write_text("")
            for body in (
                CHAT,
                {**CHAT, "stream": False},
                {**CHAT, "fail": 1},
                {**CHAT, "cut": 1},
                {**CHAT, "stream_options": {"include_usage": True}},
                {"model": 5},
                b"\xff no json",
            ):
                ask(daemon, "/v1/chat/completions", body).body()
            ask(daemon, "/api/v1/stream", {"prompt": "hello"}).body()
            ask(daemon, "/v1/chat/completions", CHAT, token="no.such.token").body()
            ask(daemon, "/v1/chat/completions", CHAT, Origin="https://elsewhere.example").body()
            for path in ("/healthz", "/readyz", "/v1/models", "/nothing"):
                daemon.get(path)
            for path in ("/metrics", "/status", "/nothing"):
                daemon.admin(path)
            daemon.admin("/sessions/revoke", "POST", json.dumps({"user": 1234}).encode())
            daemon.process.send_signal(signal.SIGUSR1)
            os.kill(daemon.child("worker 1"), signal.SIGKILL)
            (tmp_path / "jwt.secret").write_text(SECRET)
            daemon.process.send_signal(signal.SIGHUP)
            wait_for(lambda: json.loads(daemon.admin("/status")[1])["last_reload"])
            ask(daemon, "/v1/chat/completions", CHAT).body()
            daemon.config.write_text(daemon.config.read_text() + "\n[nonsense]\n")
            daemon.process.send_signal(signal.SIGHUP)
            wait_for(lambda: not json.loads(daemon.admin("/status")[1])["last_reload"]["ok"])
            found = armed.read_text()
    finally:
        del os.environ["PYTHONPATH"]
    assert found == "", found
