"""The whole daemon as a node: drain, a killed worker, revocation, the admin listener and `proxyd status`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    chat_chunk,
    node,
    request_bytes,
    wait_for,
)

MakeUpstream = Callable[[Script], Upstream]


_clients: list[socket.socket] = []


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    while _clients:
        _clients.pop().close()


def ask(daemon: Daemon, token: str | None = None) -> Reply:
    """A chat stream on a connection of its own, which ends with the test."""
    _clients.append(daemon.connect())
    _clients[-1].sendall(request_bytes("/v1/chat/completions", CHAT, token or daemon.token()))
    return Reply(_clients[-1])


class Held:
    """An upstream script: sends the first event, then the rest when released."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = 0

    def __call__(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        wire.chunk(chat_chunk("first"))
        self.begun += 1
        if self.go.wait(20):
            for piece in (chat_chunk("last"), FINISH, DONE):
                wire.chunk(piece)
            wire.send(b"0\r\n\r\n")


def first_of(reply: Reply) -> bytes:
    return next(reply.pieces())


def run_status(daemon: Daemon, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "proxyd", "-c", str(daemon.config), "status", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=daemon.environ,
        timeout=60,
        check=False,
    )


def status_of(daemon: Daemon) -> dict:
    code, body = daemon.admin("/status")
    assert code == 200
    return json.loads(body)


def test_term_lets_a_stream_end_and_newcomers_hear_that_it_ends(tmp_path: Path, upstream: MakeUpstream) -> None:
    held = Held()
    with node(tmp_path, upstream(held)) as daemon:
        reply = ask(daemon)
        assert b"first" in first_of(reply)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        wait_for(lambda: status_of(daemon)["state"] == "draining")

        refused = ask(daemon)
        assert (refused.status, refused.header("connection")) == (503, "close")
        assert json.loads(refused.body())["error"]["code"] == "draining"
        held.go.set()
        rest = reply.body()
        assert b"last" in rest
        assert rest.endswith(DONE)
        assert reply.ended
        assert daemon.process.wait(20) == 0
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "completed"


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(tmp_path: Path, upstream: MakeUpstream) -> None:
    with node(tmp_path, upstream(Held())) as daemon:
        reply = ask(daemon)
        assert b"first" in first_of(reply)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        rest = reply.body()
        assert b'"error"' in rest
        assert b"[DONE]" not in rest
        assert daemon.process.wait(20) == 0
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "interrupted"


def test_a_request_that_waits_in_the_backlog_at_term_is_answered(tmp_path: Path, upstream: MakeUpstream) -> None:
    held = Held()
    with node(tmp_path, upstream(held)) as daemon:
        worker = daemon.child("worker 0")
        os.kill(worker, signal.SIGSTOP)
        waiting = daemon.connect()
        _clients.append(waiting)
        waiting.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        wait_for(lambda: '"draining"' in daemon.log())
        os.kill(worker, signal.SIGCONT)
        held.go.set()
        reply = Reply(waiting)
        assert reply.status in (200, 503)
        if reply.status == 503:
            assert reply.header("retry-after") is not None


def test_a_stream_is_counted_from_its_admission_to_its_end_and_a_json_answer_never(
    tmp_path: Path, upstream: MakeUpstream
) -> None:
    go = threading.Event()

    def script(wire: Wire) -> None:
        if b'"stream": true' not in wire.seen.body:  # half an answer that is relayed as it comes
            wire.head(200, "application/json", content_length="20")
            wire.send(b'{"ok":true')
            go.wait(10)
            wire.send(b"         }")
        else:
            go.wait(10)
            wire.stream(chat_chunk("x"), FINISH, DONE)

    with node(tmp_path, upstream(script), server="workers = 2") as daemon:

        def counts() -> tuple[int, ...]:
            """Metric, status, its workers together, the master's title, the workers' titles together."""
            status = status_of(daemon)
            titles = [Path(f"/proc/{pid}/cmdline").read_text() for pid in (status["pid"], *daemon.children())]
            told = [sum(map(int, re.findall(r"(\d+) streams\)", title))) for title in titles]
            workers = sum(worker["streams"] for worker in status["workers"])
            metric = daemon.metric("proxyd_streams_active")
            return int(metric), status["streams"]["active"], workers, told[0], sum(told[1:])

        clients = [daemon.connect() for _ in range(5)]
        for number, client in enumerate(clients):
            body = CHAT if number < 3 else {**CHAT, "stream": False}
            client.sendall(request_bytes("/v1/chat/completions", body, daemon.token()))
        assert Reply(clients[4]).status == 200
        wait_for(lambda: counts() == (3, 3, 3, 3, 3))
        go.set()
        for client in clients[:3]:
            assert Reply(client).body().endswith(DONE)
        wait_for(lambda: counts() == (0, 0, 0, 0, 0))


def test_a_killed_worker_costs_the_others_nothing_and_its_counts_stay(tmp_path: Path, upstream: MakeUpstream) -> None:
    held = Held()
    with node(tmp_path, upstream(held), server="workers = 2") as daemon:
        pids = {daemon.child(f"worker {slot}"): slot for slot in range(2)}
        replies = [ask(daemon) for _ in range(8)]
        for reply in replies:
            assert b"first" in first_of(reply)
        wait_for(lambda: sum(worker["streams"] for worker in status_of(daemon)["workers"]) == 8)
        victim = daemon.child("worker 0")
        lost = next(worker["streams"] for worker in status_of(daemon)["workers"] if worker["pid"] == victim)
        events = daemon.metric("proxyd_events_relayed_total")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: status_of(daemon)["workers"][0]["pid"] not in (None, *pids))
        assert daemon.metric("proxyd_worker_restarts_total") == 1
        assert daemon.metric("proxyd_events_relayed_total") >= events
        assert daemon.metric("proxyd_streams_active") == 8 - lost
        held.go.set()
        ended = 0
        for reply in replies:
            try:
                ended += reply.body().endswith(DONE)
            except ConnectionError:
                pass
        assert ended == 8 - lost
        assert ask(daemon).status == 200
        wait_for(lambda: len(daemon.rows()) >= 9)
        assert sum(row["status"] == "interrupted" for row in daemon.rows()) == lost


def test_a_revoked_user_loses_the_stream_and_the_token_on_every_worker(tmp_path: Path, upstream: MakeUpstream) -> None:
    with node(tmp_path, upstream(Held()), server="workers = 2") as daemon:
        token, other = daemon.token(7), daemon.token(8)
        mine = [ask(daemon, token) for _ in range(4)]
        theirs = ask(daemon, other)
        for reply in (*mine, theirs):
            assert b"first" in first_of(reply)
        code, body = daemon.admin("/sessions/revoke", "POST", b'{"user": 7}')
        assert (code, json.loads(body)["revoked"]) == (200, {"user": 7})
        for reply in mine:
            assert b'"error"' in reply.body()
        for _ in range(6):
            assert ask(daemon, token).status == 403
        again = ask(daemon, other)
        assert b"first" in first_of(again)
        victim = daemon.child("worker 0")
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: status_of(daemon)["workers"][0]["pid"] not in (None, victim))
        wait_for(lambda: status_of(daemon)["workers"][0]["state"] == "ready")
        for _ in range(6):
            assert ask(daemon, token).status == 403
        daemon.stop(signal.SIGQUIT)


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"user": 1, "tenant": "t"}',
        b'{"user": "x"}',
        b'{"user": -1}',
        b'{"user": true}',
        b'{"tenant": ""}',
        b'{"tenant": 5}',
        b'{"user": 1e3}',
        b'{"user": [1]}',
        b'{"jti": null}',
        b'{"who": 1}',
        b'{"tenant": "' + b"x" * 400 + b'"}',
    ],
)
@pytest.mark.usefixtures("shared")
def test_a_revocation_that_names_nobody_is_refused(body: bytes, shared: Daemon) -> None:
    code, answer = shared.admin("/sessions/revoke", "POST", body)
    assert code == 400, answer
    assert json.loads(answer)["error"]["message"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory):
    """One idle node for questions that change nothing."""
    upstream = Upstream(lambda wire: wire.json({"ok": True}))
    with node(tmp_path_factory.mktemp("shared"), upstream, server="workers = 2") as daemon:
        yield daemon
    upstream.close()


def test_the_admin_listener_is_not_on_the_public_address(shared: Daemon) -> None:
    for path in ("/metrics", "/status"):
        assert shared.get(path)[0] == 404
    assert shared.admin("/healthz")[0] == 404
    assert os.stat(shared.folder / "admin.sock").st_mode & 0o777 == 0o660


def test_metrics_come_from_the_whole_node_whoever_answers(shared: Daemon) -> None:
    before = shared.metric("proxyd_requests_total", route="web")
    for _ in range(10):
        shared.get("/healthz")
    for _ in range(6):
        assert shared.metric("proxyd_requests_total", route="web") == before + 10


def test_status_is_readable_and_is_json_when_asked(shared: Daemon) -> None:
    plain = run_status(shared)
    assert plain.returncode == 0, plain.stderr
    assert "worker 1" in plain.stdout
    assert "telemetry" in plain.stdout
    document = json.loads(run_status(shared, "--json").stdout)
    assert shared.process is not None
    assert document["pid"] == shared.process.pid
    assert [worker["state"] for worker in document["workers"]] == ["ready", "ready"]
    assert set(document["latency"]["proxyd_relay_lag_seconds"]["last_minute"]) >= {"p50", "p95", "p99", "p99.9"}


def test_status_of_a_daemon_that_is_not_running_says_so(shared: Daemon, tmp_path: Path) -> None:
    text = shared.config.read_text().replace(f"{shared.folder}/admin.sock", f"{tmp_path}/none.sock")
    other = Daemon(tmp_path, text)
    found = run_status(other)
    assert found.returncode == 1
    assert found.stderr.startswith("proxyd status: not running: nothing listens on unix:")


def test_a_second_daemon_with_the_same_file_is_refused_and_the_first_serves_on(shared: Daemon) -> None:
    second = subprocess.run(
        [sys.executable, "-m", "proxyd", "-c", str(shared.config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=shared.environ,
        timeout=60,
        check=False,
    )
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1:{shared.port}" in second.stderr
    assert shared.get("/readyz")[0] == 200
    assert status_of(shared)["state"] == "ready"


def test_after_kill_9_of_the_master_a_new_one_takes_the_addresses(tmp_path: Path, upstream: MakeUpstream) -> None:
    first, held = Held(), Held()
    scripts = iter([first, held])
    with node(tmp_path, upstream(lambda wire: next(scripts, held)(wire)), server="workers = 2") as daemon:
        finishing = ask(daemon)
        assert b"first" in first_of(finishing)
        lasting = ask(daemon)
        assert b"first" in first_of(lasting)
        assert daemon.process is not None
        orphans = daemon.children()
        daemon.process.kill()
        daemon.process.wait()
        wait_for(lambda: '"orphaned"' in daemon.log())
        first.go.set()
        assert finishing.body().endswith(DONE)
        # The other stream's worker still holds its sockets while the next master starts.
        daemon.start()
        held.go.set()
        assert ask(daemon).status == 200
        rest = lasting.body()
        assert rest.endswith(DONE) or b'"error"' in rest
        wait_for(lambda: not [pid for pid in orphans if os.path.exists(f"/proc/{pid}/fd/0")], 30)
        daemon.wait_rows(3, 30)


def test_without_its_state_directory_no_worker_boots_and_the_daemon_says_why(tmp_path: Path) -> None:
    upstream = Upstream(lambda wire: None)
    try:
        with (
            pytest.raises(AssertionError, match="state_dir"),
            node(tmp_path, upstream, server='state_dir = "/proc/missing"\n#'),
        ):
            pass
    finally:
        upstream.close()


def test_usr1_moves_every_process_to_the_new_access_log(tmp_path: Path, upstream: MakeUpstream) -> None:
    path = tmp_path / "access.log"
    script = upstream(lambda wire: wire.json({"ok": True}))
    with node(tmp_path, script, server="workers = 2", log=f'access = "{path}"') as daemon:
        wait_for(lambda: path.exists() and "/readyz" in path.read_text())
        path.rename(tmp_path / "access.log.1")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGUSR1)
        wait_for(path.exists)
        for _ in range(8):
            daemon.get("/healthz")
        wait_for(lambda: path.read_text().count("/healthz") >= 1)
        old = (tmp_path / "access.log.1").read_text().count("/healthz")
        assert wait_for(lambda: path.read_text().count("/healthz") + old == 8)
