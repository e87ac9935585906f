"""A line for each request whatever its end, with all that is known of it, and nothing that is secret."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.daemon.harness import KEY, SECRET, Daemon, Reply, ask, request_bytes, wait_for
from tests.daemon.log_stage import ANSWER, PROMPT, chat, make_stage  # noqa: F401

# What docs/running.md promises of every line, and of those of admitted requests.
OF_ALL = {"time", "request_id", "peer", "route", "status", "duration_ms", "outcome", "cause"}
OF_ADMITTED = OF_ALL | {
    "user", "tenant", "model", "stream", "upstream", "upstream_status", "attempts", "reused", "prompt_tokens",
    "completion_tokens", "cached_tokens", "reasoning_tokens", "estimated", "ttft_ms", "events", "request_bytes",
    "bytes_in", "bytes_out",
}  # fmt: skip


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
