"""What the daemon writes: a line for each request whatever its end, nothing that is secret; and that nobody is kept
waiting when nobody takes the lines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxyd.log import LINES_PER_WINDOW
from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    KEY,
    ROOT,
    SECRET,
    USAGE,
    Daemon,
    Reply,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    config_text,
    free_port,
    model_text,
    node,
    request_bytes,
    upstream_text,
    wait_for,
)

Make = Callable[[Script], Upstream]
PROMPT, ANSWER = "zebra-prompt-of-a-client", "quokka-answer-of-a-provider"
# What docs/running.md promises of every line, and of those of admitted requests.
OF_ALL = {"time", "request_id", "peer", "route", "status", "duration_ms", "outcome", "cause"}
OF_ADMITTED = OF_ALL | {
    "user", "tenant", "model", "stream", "upstream", "upstream_status", "attempts", "reused", "prompt_tokens",
    "completion_tokens", "cached_tokens", "reasoning_tokens", "estimated", "ttft_ms", "events", "request_bytes",
    "bytes_in", "bytes_out",
}  # fmt: skip


def provider(wire: Wire) -> Any:
    """Does what the request's model is called."""
    what = wire.seen.json.get("model", "")
    if wire.seen.path.endswith(("/embeddings", "/completions", "/responses", "/messages")) and what == "whole":
        return wire.json({"id": "x", "object": "list", "usage": {"prompt_tokens": 4, "total_tokens": 4}})
    if what == "good":
        return wire.stream(chat_chunk(ANSWER), FINISH, USAGE, DONE)
    if what == "error":
        return wire.json({"error": {"message": f"no: {PROMPT} {KEY}", "type": "server_error", "code": "x"}}, 500)
    if what == "key":
        return wire.json({"error": {"message": f"Incorrect API key provided: {KEY}", "code": "invalid_api_key"}}, 401)
    if what == "cut":
        wire.stream(chat_chunk(ANSWER), end=False)
        return False
    if what == "reset":
        wire.reset()
        return False
    if what == "nonsense":
        wire.send(f"{PROMPT} {KEY} is no HTTP\r\n\r\n".encode())
        return False
    wire.stream(chat_chunk(ANSWER), end=False)  # "endless", "idle": silent from here on
    wire.wait_closed(60)
    return False


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {**CHAT, "model": model, "messages": [{"role": "user", "content": PROMPT}], **more}


MODELS = "".join(
    model_text(name, number, '["openai"]')
    for number, name in enumerate(("good", "error", "key", "cut", "reset", "nonsense", "endless", "whole"), start=10)
)


@pytest.fixture
def stage(upstream: Make, tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """A daemon before this provider, and one upstream more that nobody listens at ("gone") and a hasty one ("idle")."""
    with contextlib.ExitStack() as stack:

        def start(**changes: str) -> Daemon:
            house = upstream(provider)
            # [[upstream]] tables may follow [[model]] tables: the harness makes the first upstream only.
            models = MODELS + upstream_text(f"http://127.0.0.1:{free_port()}/v1", name="gone")
            models += model_text("gone", 30, '["gone"]')
            models += upstream_text(f"{house.url}/v1", name="hasty", more='idle_timeout = "1s"')
            models += model_text("idle", 31, '["hasty"]')
            return stack.enter_context(node(tmp_path, house, models=models, **changes))

        yield start


def line_of(daemon: Daemon, request_id: str) -> dict[str, Any]:
    """The one line of a request."""

    def found() -> list[dict[str, Any]]:
        return [line for line in daemon.access_log() if line["request_id"] == request_id]

    wait_for(found)
    (line,) = found()
    return line


def test_every_end_of_a_request_has_one_line_with_all_that_is_known_of_it(stage: Callable[..., Daemon]) -> None:
    daemon = stage(server='drain_timeout = "1s"')
    token = daemon.token(77, tenant="acme")

    def end(name: str, body: Any, path: str = "/v1/chat/completions", **headers: str) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            ask(daemon, path, body, **{"token": token, "X_Request_Id": name, **headers}).body()
        return line_of(daemon, name)

    admitted = {
        # request id: (status, upstream's status, row status, cause)
        "good": (200, 200, "completed", "complete"),
        "error": (500, 500, "upstream_error", "refused_by_upstream"),
        "key": (401, 401, "upstream_error", "refused_by_upstream"),
        "cut": (200, 200, "upstream_error", "upstream_broken"),
        "reset": (502, 0, "upstream_error", "upstream_broken"),
        "nonsense": (502, 0, "upstream_error", "upstream_broken"),
        "gone": (502, 0, "upstream_error", "upstream_unreachable"),
        "idle": (200, 200, "timeout", "idle_timeout"),
    }
    for name, (status, theirs, outcome, cause) in admitted.items():
        line = end(name, chat(name))
        assert set(line) - {"detail"} == OF_ADMITTED, name
        assert (line["status"], line["upstream_status"], line["outcome"], line["cause"]) == (
            status, theirs, outcome, cause,
        ), line  # fmt: skip
        assert (line["user"], line["tenant"], line["model"], line["peer"]) == (77, "acme", name, "127.0.0.1")
        assert line["upstream"] == {"gone": "gone", "idle": "hasty"}.get(name, "openai")
        assert line["request_bytes"] > len(PROMPT)
    line = line_of(daemon, "good")
    counts = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "estimated")
    assert [line[name] for name in counts] == [11, 5, 0, 0, False]
    assert line["ttft_ms"] <= line["duration_ms"] + 1
    assert line["events"] >= 3
    assert line["bytes_in"] > line["bytes_out"] > len(ANSWER)
    assert line_of(daemon, "cut")["estimated"] is True

    # The other kinds of routes.
    for path, body in (
        ("/v1/embeddings", {"model": "whole", "input": PROMPT}),
        ("/v1/completions", {"model": "whole", "prompt": PROMPT}),
        ("/v1/responses", {"model": "whole", "input": PROMPT}),
        ("/api/v1/stream", {"model": "good", "prompt": PROMPT}),
    ):
        line = end(f"route{path.replace('/', '-')}", body, path)
        assert (set(line), line["route"], line["outcome"]) == (OF_ADMITTED, path, "completed"), line

    # A client that leaves.
    reply = ask(daemon, "/v1/chat/completions", chat("endless"), token=token, X_Request_Id="left")
    next(reply.pieces())
    daemon.close_clients()
    line = line_of(daemon, "left")
    assert (line["status"], line["outcome"], line["cause"]) == (200, "client_aborted", "client_gone")
    assert set(line) == OF_ADMITTED

    # What is refused before anything is asked.
    for name, body, headers, status, cause, known in (
        ("forged", chat("good"), {"token": token[:-8] + "AAAAAAAA"}, 403, "invalid_token.signature", set()),
        ("unknown", chat("unheard-of"), {}, 404, "model_not_found", {"user", "tenant"}),
        ("notjson", b"{", {}, 400, "invalid_json", {"user", "tenant"}),
        ("notmine", chat("good"), {"token": daemon.token(78, models=["cut"])}, 403, "model_not_allowed",
         {"user", "tenant", "model"}),
        ("spent", chat("good"), {"token": daemon.token(79, quota_remaining=0)}, 429, "quota_exceeded.token",
         {"user", "tenant", "model"}),
    ):  # fmt: skip
        line = end(name, body, **headers)
        assert (line["status"], line["outcome"], line["cause"]) == (status, "rejected", cause), line
        assert set(line) - {"detail"} == OF_ALL | known, line
    # What proxyd answers itself.
    daemon.get("/v1/models", **{"X-Request-Id": "web-1", "Authorization": f"Bearer {token}"})
    assert set(line_of(daemon, "web-1")) == OF_ALL | {"method", "path", "bytes"}

    # What a drain ends.
    reply = ask(daemon, "/v1/chat/completions", chat("endless"), token=token, X_Request_Id="drained")
    next(reply.pieces())
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGTERM)
    daemon.process.wait(30)
    line = line_of(daemon, "drained")
    assert (line["outcome"], line["cause"], set(line)) == ("interrupted", "drained", OF_ADMITTED)


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_line_holds_a_token_a_key_a_cookie_or_a_word_of_what_was_said(
    stage: Callable[..., Daemon], form: str
) -> None:
    daemon = stage(log=f'format = "{form}"\nlevel = "debug"')
    good, forged = daemon.token(), daemon.token()[:-8] + "AAAAAAAA"
    crumbs = "site=crumb-of-another-site"
    for name in ("good", "error", "key", "cut", "reset", "nonsense", "gone", "idle", "unheard-of"):
        for token in (good, forged):
            ask(daemon, "/v1/chat/completions", chat(name), token=token, Cookie=crumbs).body()
    sock = daemon.connect()
    cookie = f"ai_session_jwt={good}; {crumbs}"
    sock.sendall(request_bytes("/api/v1/stream", {"prompt": PROMPT, "model": "good"}, None, Cookie=cookie))
    Reply(sock).body()
    for path in (f"/v1/chat/completions?api_key={good}", f"/nowhere?token={good}&said={PROMPT}"):
        with contextlib.suppress(OSError):
            ask(daemon, path, chat("good"), X_Api_Key=good).body()
    for raw in (f"{PROMPT} {good}", f"GET / HTTP/1.1\r\nCookie {good}", f"GET /{PROMPT} HTTP/9"):
        sock = daemon.connect()
        sock.sendall(f"{raw}\r\n\r\n".encode())
        with contextlib.suppress(OSError):
            sock.recv(65536)
    daemon.admin("/sessions/revoke", "POST", json.dumps({"user": 7}).encode())
    shown = daemon.admin("/status")[1].decode() + daemon.admin("/metrics")[1].decode()
    daemon.close_clients()
    assert daemon.stop() == 0
    said = daemon.log() + shown
    assert said.count("/v1/chat/completions") >= 18
    for secret in (*good.split("."), forged, KEY, SECRET, PROMPT, ANSWER, "crumb-of", "Bearer", "Incorrect API key"):
        assert secret not in said, next(line for line in said.splitlines() if secret in line)
    assert daemon.log().startswith("{") is (form == "json")


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


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


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    found = []
    for line in daemon.log().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == name:
                found.append(entry)
    return found


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
