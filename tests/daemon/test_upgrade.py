"""USR2 on the real daemon, running from a copy of the package: same pid, streams whole, new code; what cannot be is
refused with nothing touched, and what breaks behind the check leaves the old workers serving."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    USAGE,
    Reply,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    upstream_text,
    wait_for,
)
from tests.daemon.installed import InstalledDaemon, broken


class Slow:
    """A provider whose answers end when they are let go."""

    def __init__(self) -> None:
        self.is_let_go = False
        self.upstream = Upstream(self._answer)

    def _answer(self, wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        sent = 0
        is_short = wire.seen.json["messages"][0]["content"] == "short"
        until = time.monotonic() + 60
        while sent < 3 or not (self.is_let_go or is_short or time.monotonic() > until):
            wire.chunk(chat_chunk(f"{sent} "))
            sent += 1
            time.sleep(0.02)
        for piece in (FINISH, USAGE, DONE):
            wire.chunk(piece)
        wire.send(b"0\r\n\r\n")


SHORT = {**CHAT, "messages": [{"role": "user", "content": "short"}]}


def numbers(body: bytes) -> list[int]:
    lines = [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]
    texts = [one["choices"][0]["delta"].get("content", "") for one in lines if one["choices"]]
    return [int(text) for text in texts if text]


@contextlib.contextmanager
def installed(folder: Path, slow: Slow, server: str = "", program: str = "") -> Iterator[InstalledDaemon]:
    port = free_port()
    more = upstream_text(slow.upstream.url + "/v1") + model_text("*", 1, '["openai"]')
    daemon = InstalledDaemon(folder, config_text(folder, port, more, server=server or "workers = 2"))
    daemon.port = port
    if program:
        script = folder / "proxyd-script"
        script.write_text(f"#!{sys.executable}\n{program}")
        script.chmod(0o755)
        daemon.command = [str(script), "-c", str(daemon.config)]
    try:
        daemon.start()
        wait_for(daemon.worker_pids, 20)  # one that serves answers before the node has started
        yield daemon
        daemon.close_clients()
        assert daemon.stop() == 0, daemon.log()[-3000:]
        assert "Traceback" not in daemon.log(), daemon.log()[-5000:]
    finally:
        daemon.close_clients()
        daemon.kill()
        slow.upstream.close()


def stream(daemon: InstalledDaemon) -> tuple[Reply, Iterator[bytes]]:
    reply = ask(daemon, "/v1/chat/completions", CHAT)
    pieces = reply.pieces()
    next(pieces)
    return reply, pieces


def is_whole(reply: Reply, pieces: Iterator[bytes]) -> bool:
    body = b"".join(pieces)
    got = numbers(body)
    return reply.ended and body.endswith(DONE) and got == list(range(got[0], got[-1] + 1))


def test_the_new_version_serves_under_the_same_pid_and_nobody_is_cut(tmp_path: Path) -> None:
    slow = Slow()
    with installed(tmp_path, slow) as daemon:
        assert daemon.process is not None
        running = [stream(daemon) for _ in range(4)]
        assert ask(daemon, "/v1/chat/completions", SHORT).body().endswith(DONE)
        revoked = daemon.token(user=99)
        assert daemon.admin("/sessions/revoke", "POST", json.dumps({"user": 99}).encode())[0] == 200
        before, pids = daemon.status(), daemon.worker_pids()
        requests = daemon.metric("proxyd_requests_total")
        daemon.installed.install("9.9.1")
        assert daemon.renew("upgrade").ok
        after = daemon.status()
        assert after["pid"] == before["pid"] == daemon.process.pid
        assert after["version"] == "9.9.1"
        assert after["uptime_s"] >= before["uptime_s"]
        assert {one["version"]: one["state"] for one in after["generations"]} == {
            "9.9.1": "serving",
            before["version"]: "draining",
        }
        assert not pids & daemon.worker_pids()
        assert daemon.metric("proxyd_requests_total") >= requests
        assert ask(daemon, "/v1/chat/completions", SHORT).body().endswith(DONE)
        assert ask(daemon, "/v1/chat/completions", SHORT, token=revoked).status == 403
        # A worker of the old generation that is killed is reaped by the image that did not fork it.
        victim = next(one for one in daemon.status()["workers"] if one["pid"] in pids)
        os.kill(victim["pid"], signal.SIGKILL)
        wait_for(lambda: all(one["pid"] != victim["pid"] for one in daemon.status()["workers"]))
        slow.is_let_go = True
        left = [is_whole(*one) for one in running]
        assert left.count(True) >= 4 - victim["streams"]
        wait_for(lambda: not daemon.draining())
        assert daemon.metric("proxyd_streams_active") == 0


REFUSED = {
    "syntax": "SyntaxError",
    "missing": "No module named",
    "no_boot": "cannot boot with this file (exit code 78)",
}
# Boots where it is tried, and not where it counts.
LATE = """
_start = WorkerServices.start

async def _late(self):
    if self._context.birth.generation:
        raise RuntimeError("not this time")
    await _start(self)

WorkerServices.start = _late
"""


def test_what_cannot_run_is_refused_before_anything_is_touched(tmp_path: Path) -> None:
    slow = Slow()
    with installed(tmp_path, slow) as daemon:
        reply, pieces = stream(daemon)
        pids = daemon.worker_pids()
        for how, says in REFUSED.items():
            with broken(daemon, how):
                told = daemon.renew("upgrade")
            assert not told.ok
            assert says in json.dumps(told.result), how
            assert daemon.worker_pids() == pids
        slow.is_let_go = True
        assert is_whole(reply, pieces)


def test_a_program_that_cannot_serve_leaves_the_old_workers_and_another_upgrade_mends_it(tmp_path: Path) -> None:
    slow = Slow()
    with installed(tmp_path, slow) as daemon:
        reply, pieces = stream(daemon)
        pids = daemon.worker_pids()
        services = daemon.installed.get("worker/services.py")
        daemon.installed.put("worker/services.py", services + LATE)
        told = daemon.renew("upgrade")
        daemon.installed.put("worker/services.py", services)
        assert not told.ok
        assert "did not start" in told.result["detail"]
        assert daemon.worker_pids() == pids
        assert ask(daemon, "/v1/chat/completions", SHORT).body().endswith(DONE)
        # The master runs the new program, and what of it could not boot is mended on disk: it needs another upgrade.
        assert daemon.renew("upgrade").ok
        assert not daemon.worker_pids() & pids
        slow.is_let_go = True
        assert is_whole(reply, pieces)


AFTER_CHECK = """
import sys
sys.argv[0] = {path!r}
from proxyd.cli.main import main
code = main()
if "--check-upgrade" in sys.argv:
    {then}
sys.exit(code)
"""


def test_if_execve_itself_fails_everything_is_as_before(tmp_path: Path) -> None:
    slow = Slow()
    script = str(tmp_path / "proxyd-script")
    program = AFTER_CHECK.format(path=script, then=f"import os; os.rename({script!r}, {script + '.away'!r})")
    with installed(tmp_path, slow, program=program) as daemon:
        reply, pieces = stream(daemon)
        pids = daemon.worker_pids()
        told = daemon.renew("upgrade")
        assert not told.ok
        assert "cannot be executed: No such file" in told.result["detail"]
        assert daemon.worker_pids() == pids
        os.rename(script + ".away", script)
        assert daemon.renew("reload").ok
        slow.is_let_go = True
        assert is_whole(reply, pieces)
        os.kill(next(iter(daemon.worker_pids())), signal.SIGKILL)  # a child of ours, as ever
        wait_for(lambda: len(daemon.worker_pids()) == 2)


def test_a_term_that_comes_before_an_execve_that_fails_ends_the_node_in_order(tmp_path: Path) -> None:
    script = str(tmp_path / "proxyd-script")
    # The new program's check ends its parent as its last act: the signal waits when the master comes to the execve.
    then = f"import os; os.rename({script!r}, {script + '.away'!r}); os.kill(os.getppid(), 15)"
    with installed(tmp_path, Slow(), program=AFTER_CHECK.format(path=script, then=then)) as daemon:
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGUSR2)
        assert daemon.process.wait(30) == 0
        assert "Traceback" not in daemon.log()


def test_a_file_that_breaks_behind_the_check_leaves_the_old_workers_serving(tmp_path: Path) -> None:
    slow = Slow()
    script, config = str(tmp_path / "proxyd-script"), str(tmp_path / "proxyd.toml")
    program = AFTER_CHECK.format(path=script, then=f"open({config!r}, 'a').write('[nonsense]')")
    with installed(tmp_path, slow, program=program) as daemon:
        _, pieces = stream(daemon)
        pids, good = daemon.worker_pids(), daemon.config.read_text()
        told = daemon.renew("upgrade")
        assert not told.ok
        assert "nonsense" in json.dumps(told.result)
        assert daemon.worker_pids() == pids
        assert ask(daemon, "/v1/chat/completions", SHORT).body().endswith(DONE)
        daemon.config.write_text(good)
        # An old worker that dies now has a successor of the new program, from the file as it is.
        victim = next(iter(pids))
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(daemon.worker_pids()) == 2 and victim not in daemon.worker_pids())
        assert daemon.renew("reload").ok
        slow.is_let_go = True
        with contextlib.suppress(ConnectionError):
            b"".join(pieces)  # whole, unless its worker was the victim


def test_signals_that_come_within_the_execve_are_not_lost(tmp_path: Path) -> None:
    slow = Slow()
    with installed(tmp_path, slow) as daemon:
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGUSR2)
        wait_for(lambda: "upgrade_begun" in daemon.log())
        for number in (signal.SIGUSR1, signal.SIGHUP):  # each at its own moment of the check, the execve, the adoption
            time.sleep(0.5)
            daemon.process.send_signal(number)
        wait_for(lambda: "reloaded" in daemon.log() and "logs_reopened" in daemon.log(), 30)
        assert '"event":"upgraded"' in daemon.log()


def test_orphans_of_a_master_killed_right_after_an_upgrade_finish_and_go(tmp_path: Path) -> None:
    slow = Slow()
    is_over = False
    with contextlib.suppress(AssertionError), installed(tmp_path, slow) as daemon:
        assert daemon.process is not None
        reply, pieces = stream(daemon)
        assert daemon.renew("upgrade").ok
        family = daemon.children()
        assert len(family) >= 4
        daemon.process.kill()
        slow.is_let_go = True
        assert is_whole(reply, pieces)
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in family), 20)
        daemon.process.wait()
        is_over = True  # leaving asserts an exit code that a killed daemon does not have
    assert is_over
    assert not any(os.path.exists(f"/proc/{pid}") for pid in family)


def test_an_upgrade_hands_over_every_descriptor_and_leaves_none(tmp_path: Path) -> None:
    slow = Slow()
    with installed(tmp_path, slow, server="workers = 1") as daemon:
        assert daemon.process is not None
        folder = f"/proc/{daemon.process.pid}/fd"

        def held() -> list[str]:
            found = []
            for name in os.listdir(folder):
                with contextlib.suppress(OSError):
                    found.append(os.readlink(f"{folder}/{name}").partition(":[")[0])
            return sorted(found)

        before = held()
        assert daemon.renew("upgrade").ok
        wait_for(lambda: not daemon.draining() and len(daemon.children()) == 2, 20)
        wait_for(lambda: held() == before)
