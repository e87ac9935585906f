"""Revocations outlive the daemon: over a restart, over a kill -9 of everything, and what is said when they cannot."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import CHAT, DONE, Daemon, Script, Upstream, ask, node, wait_for
from tests.daemon.test_listeners import refusing, start_once

Make = Callable[[Script], Upstream]
CHATS = "/v1/chat/completions"


def revoke(daemon: Daemon, **what: object) -> tuple[int, dict[str, object]]:
    code, body = daemon.admin("/sessions/revoke", "POST", json.dumps(what).encode())
    return code, json.loads(body)


def statuses(daemon: Daemon, token: str) -> set[int]:
    """What several connections get, so that each worker is likely to be asked."""
    return {ask(daemon, CHATS, CHAT, token=token).status for _ in range(6)}


def end_by_term(daemon: Daemon) -> None:
    assert daemon.stop(signal.SIGTERM) == 0


def end_by_kill(daemon: Daemon) -> None:
    pids = daemon.children()
    daemon.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


@pytest.mark.parametrize("end", [end_by_term, end_by_kill])
def test_a_revoked_token_stays_refused_after_the_daemon_was_started_again(
    upstream: Make, tmp_path: Path, end: Callable[[Daemon], None]
) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up, server="workers = 2") as daemon:
        by_user, by_tenant, by_jti = daemon.token(7), daemon.token(8, tenant="acme"), daemon.token(9, jti="the-token")
        spared = daemon.token(10, jti="another", tenant="other")
        assert revoke(daemon, user=7)[0] == 200
        assert revoke(daemon, tenant="acme", exp=int(time.time()) + 3600)[0] == 200
        assert revoke(daemon, jti="the-token")[0] == 200
        for _ in range(2):
            daemon.close_clients()
            end(daemon)
            daemon.start()
            for token in (by_user, by_tenant, by_jti):
                assert statuses(daemon, token) == {403}
            assert statuses(daemon, spared) == {200}
        assert os.stat(tmp_path / "revocations.jsonl").st_mode & 0o777 == 0o600


def test_a_disk_that_refuses_the_line_is_told_and_the_revocation_holds_in_memory(
    upstream: Make, tmp_path: Path
) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    path = tmp_path / "revocations.jsonl"
    with node(tmp_path, up, server="workers = 2") as daemon:
        path.mkdir()  # no line can be written into a directory, by root neither
        token = daemon.token(7)
        code, answer = revoke(daemon, user=7)
        assert code == 503
        assert answer["revoked"] == {"user": 7}
        assert answer["error"]["code"] == "revocation_not_kept"  # type: ignore[index]
        assert str(path) in answer["error"]["message"]  # type: ignore[index]
        assert statuses(daemon, token) == {403}
        wait_for(lambda: '"revocation_not_kept"' in daemon.log())
        path.rmdir()
        assert revoke(daemon, user=7) == (200, {"revoked": {"user": 7}, "at": pytest.approx(time.time(), abs=10)})
        assert json.loads(path.read_text())["value"] == "7"


def test_a_revocation_whose_tokens_have_expired_is_forgotten_at_the_start(upstream: Make, tmp_path: Path) -> None:
    path = tmp_path / "revocations.jsonl"
    old = {"kind": "user", "value": "7", "at": 1000.0, "until": 2000.0}
    path.write_text(json.dumps(old) + "\n" + json.dumps({**old, "value": "8", "until": None}) + "\n")
    with node(tmp_path, upstream(lambda wire: wire.stream(DONE))):
        (line,) = path.read_text().splitlines()
        assert json.loads(line) == {**old, "value": "8", "until": None}


@pytest.mark.parametrize("exp", [1000, "soon", True, None, 1e12, float("inf")])
def test_an_exp_that_is_no_time_to_come_is_refused(shared: Daemon, exp: object) -> None:
    code, answer = revoke(shared, user=7, exp=exp)
    assert code == 400
    assert answer["error"]["message"]  # type: ignore[index]
    assert not (shared.folder / "revocations.jsonl").exists()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """One idle node for questions that change nothing."""
    upstream = Upstream(lambda wire: wire.json({"ok": True}))
    with node(tmp_path_factory.mktemp("shared"), upstream) as daemon:
        yield daemon
    upstream.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "revocations.jsonl cannot be read: Is a directory"), ("what?\n", "revocations.jsonl:1 is no")],
)
def test_a_file_that_cannot_be_read_is_one_line_with_a_remedy_and_no_start(
    tmp_path: Path, text: str | None, says: str
) -> None:
    path = tmp_path / "revocations.jsonl"
    if text is None:
        path.mkdir()
    else:
        path.write_text(text)
    found = start_once(refusing(tmp_path))
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("proxyd: ")]
    assert says in line
    assert "revoked tokens are accepted again" in line
    assert not (tmp_path / "admin.sock").exists()


def test_an_orphan_of_a_killed_master_takes_no_revocation_for_its_successor(upstream: Make, tmp_path: Path) -> None:
    """Its connection may still be open: what it published would reach nobody who serves."""
    import http.client
    import socket

    def held(wire) -> None:
        wire.head(transfer_encoding="chunked")
        wire.chunk(b": open\n\n")
        wire.wait_closed(20)

    with node(tmp_path, upstream(held)) as daemon:
        stream = ask(daemon, CHATS, CHAT)
        next(stream.pieces())  # it keeps the orphan alive
        admin = http.client.HTTPConnection("localhost", timeout=10)
        admin.sock = socket.socket(socket.AF_UNIX)
        admin.sock.connect(str(tmp_path / "admin.sock"))
        admin.request("GET", "/status")
        assert admin.getresponse().read()
        assert daemon.process is not None
        os.kill(daemon.process.pid, signal.SIGKILL)
        daemon.process.wait()
        wait_for(lambda: '"orphaned"' in daemon.log())
        admin.request("POST", "/sessions/revoke", body=b'{"user": 7}')
        answer = admin.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (503, "orphaned")
        admin.close()
        daemon.close_clients()
        daemon.start()
