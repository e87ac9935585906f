"""Where lines go: a folder that is gone, a full disk, a reader that stalls, a flood. No stream waits for them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from proxyd.log import LINES_PER_WINDOW
from tests.daemon.harness import (
    DONE,
    ROOT,
    Daemon,
    Reply,
    ask,
    config_text,
    free_port,
    request_bytes,
    upstream_text,
    wait_for,
)
from tests.daemon.log_stage import MODELS, Make, chat, events, make_stage, provider  # noqa: F401


def test_a_log_whose_folder_is_gone_goes_on_in_the_old_file_and_is_said_once_by_each(
    stage: Callable[..., Daemon], tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    daemon = stage(log=f'access = "{folder}/access.log"', server="workers = 2")
    folder.rename(tmp_path / "moved")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGUSR1)
    told = wait_for(lambda: len(events(daemon, "log_reopen_failed")) >= 4 and events(daemon, "log_reopen_failed"))
    ask(daemon, "/v1/chat/completions", chat("good"), X_Request_Id="old-file").body()
    wait_for(lambda: "old-file" in (tmp_path / "moved" / "access.log").read_text())
    time.sleep(0.3)
    assert len(events(daemon, "log_reopen_failed")) == 4, "the master, two workers, telemetry"
    assert str(folder) in told[0]["detail"]
    folder.mkdir()
    daemon.process.send_signal(signal.SIGUSR1)
    wait_for((folder / "access.log").exists)

    def is_new() -> bool:
        ask(daemon, "/v1/chat/completions", chat("good"), X_Request_Id="new-file").body()
        return "new-file" in (folder / "access.log").read_text()

    wait_for(is_new)


class OnSmallDisk(Daemon):
    """A daemon with a file system of 256 KiB at `folder`/disk, which is seen through its own root."""

    def start(self) -> None:
        disk = self.folder / "disk"
        disk.mkdir()
        script = 'mount -t tmpfs -o size=256k none "$0" && exec "$@"'
        how = "-m" if os.getuid() == 0 else "-rm"
        words = ["unshare", how, "sh", "-c", script, str(disk), sys.executable, "-m", "proxyd", "-c", str(self.config)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=self.environ)
        wait_for(self._is_ready, 30)

    @property
    def disk(self) -> Path:
        assert self.process is not None
        return Path(f"/proc/{self.process.pid}/root{self.folder}/disk")


def test_a_full_disk_under_the_access_log_stops_no_stream_and_is_told(upstream: Make, tmp_path: Path) -> None:
    house = upstream(provider)
    port = free_port()
    text = upstream_text(f"{house.url}/v1") + MODELS
    daemon = OnSmallDisk(tmp_path, config_text(tmp_path, port, text, log=f'access = "{tmp_path}/disk/access.log"'))
    daemon.port = port
    try:
        daemon.start()

        def ask_good(name: str) -> None:
            reply = ask(daemon, "/v1/chat/completions", chat("good"), X_Request_Id=name)
            assert reply.body().endswith(DONE)
            assert reply.ended

        ask_good("before")
        wait_for(lambda: "before" in (daemon.disk / "access.log").read_text())
        with contextlib.suppress(OSError), (daemon.disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(b"x" * 4096)
        # The file's last block has some room; each line is about 600 bytes.
        for number in range(60):
            ask_good(f"full-{number}")
        (first, *_) = wait_for(lambda: events(daemon, "log_lines_lost"))
        assert (first["sink"], first["reason"]) == ("access", "No space left on device")
        assert daemon.get("/readyz")[0] == 200
        (daemon.disk / "filler").unlink()
        ask_good("after")
        wait_for(lambda: "after" in (daemon.disk / "access.log").read_text())
        over = wait_for(lambda: [line for line in events(daemon, "log_lines_lost") if line["reason"] == "over"])
        written = []
        for line in (daemon.disk / "access.log").read_text().splitlines():
            with contextlib.suppress(ValueError):
                written.append(json.loads(line)["request_id"])
        assert "before" in written
        assert written[-1] == "after"
        lost = sum(line["lines"] for line in events(daemon, "log_lines_lost"))
        assert over
        assert lost + sum(name.startswith("full-") for name in written) >= 60
        assert len([name for name in written if name.startswith("full-")]) < 60
        daemon.wait_rows(62)
        daemon.close_clients()
        assert daemon.stop() == 0, daemon.log()[-2000:]
    finally:
        daemon.kill()


class OnPipes(Daemon):
    """A daemon whose stdout and stderr are pipes that nobody reads for now."""

    def start(self) -> None:
        words = [sys.executable, "-m", "proxyd", "-c", str(self.config)]
        (self.out, out), (self.err, err) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT, env=self.environ)
        os.close(out)
        os.close(err)
        wait_for(self._is_ready, 30)


def test_a_reader_of_stdout_and_stderr_that_stalls_stops_no_stream(upstream: Make, tmp_path: Path) -> None:
    house = upstream(provider)
    port = free_port()
    text = upstream_text(f"{house.url}/v1") + MODELS
    daemon = OnPipes(tmp_path, config_text(tmp_path, port, text, server="workers = 2", log='level = "debug"'))
    daemon.port = port
    readers: list[threading.Thread] = []
    try:
        daemon.start()
        asked = 4000  # of 300 bytes each: the pipe and both workers' buffers hold half of them
        token = daemon.token()
        sock = daemon.connect()
        for number in range(asked):
            if number % 500 == 0:
                sock = daemon.connect()
            broken = request_bytes("/v1/chat/completions", b"{", token, X_Request_Id=f"stalled-{number}")
            sock.sendall(broken)
            reply = Reply(sock)
            assert (reply.status, bool(reply.body())) == (400, True)
        for _ in range(5):
            assert ask(daemon, "/v1/chat/completions", chat("good")).body().endswith(DONE)
        taken: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
        for name, fd in (("out", daemon.out), ("err", daemon.err)):
            readers.append(threading.Thread(target=drain, args=(fd, taken[name])))
            readers[-1].start()

        def lost() -> int:
            lines = [json.loads(line) for line in bytes(taken["err"]).splitlines(True) if line.endswith(b"\n")]
            told = [line for line in lines if line["event"] == "log_lines_lost"]
            return sum(line["lines"] for line in told if line["sink"] == "access")

        wait_for(lambda: lost() + bytes(taken["out"]).count(b"stalled-") >= asked)
        assert lost() > 0
        for line in bytes(taken["out"]).splitlines():
            json.loads(line)
        assert ask(daemon, "/v1/chat/completions", chat("good"), X_Request_Id="again").body().endswith(DONE)
        wait_for(lambda: b'"again"' in taken["out"])
        daemon.close_clients()
        assert daemon.stop() == 0
    finally:
        daemon.close_clients()
        daemon.kill()
        for reader in readers:
            reader.join(10)
        os.close(daemon.out)
        os.close(daemon.err)


def drain(fd: int, into: bytearray) -> None:
    while data := os.read(fd, 65536):
        into += data


def test_a_flood_of_upstream_errors_is_fifty_lines_and_a_count(stage: Callable[..., Daemon]) -> None:
    daemon = stage(log='access = "off"')
    flood = LINES_PER_WINDOW + 70
    token = daemon.token()

    def client() -> None:
        for _ in range(flood // 10):
            ask(daemon, "/v1/chat/completions", chat("cut"), token=token).body()

    clients = [threading.Thread(target=client) for _ in range(10)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(60)
    daemon.close_clients()
    daemon.stop()
    (told,) = events(daemon, "log_limited")
    failed = events(daemon, "upstream_failed")
    assert (told["of"], told["dropped"] + len(failed)) == ("upstream_failed", flood)
    assert len(failed) == LINES_PER_WINDOW
