"""The path of one streaming request through the running daemon: what the client gets, what is booked.

One file, long because each test is one sentence of the contract about that path.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    KEY,
    USAGE,
    Reply,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    node,
    request_bytes,
    wait_for,
)  # fmt: skip

Make = Callable[[Script], Upstream]


def named(event: dict[str, object]) -> bytes:
    """An Anthropic event."""
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def events(body: bytes) -> list[tuple[str, object]]:
    """(event, data) of a normalised stream."""
    found = []
    for block in body.decode().split("\n\n"):
        name, data = "", None
        for line in block.split("\n"):
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data = json.loads(line[6:])
        if data is not None:
            found.append((name, data))
    return found


def test_a_stream_passes_byte_for_byte_and_is_booked_with_the_providers_counts(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), chat_chunk("b"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        asked = {**CHAT, "stream_options": {"include_usage": True}}
        reply = ask(daemon, "/v1/chat/completions", asked, X_Request_Id="trace-1")
        assert reply.status == 200
        assert reply.body() == chat_chunk("a") + chat_chunk("b") + FINISH + USAGE + DONE
        assert reply.ended
        assert reply.header("x-accel-buffering") == "no"
        assert len([name for name, _ in reply.headers if name == "date"]) == 1  # ours: this upstream sends none
        assert "no-cache" in (reply.header("cache-control") or "")
        assert reply.header("x-proxyd-request-id") == "trace-1"
        (row,) = daemon.wait_rows(1)
        assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (11, 5, 0)
        assert (row["status"], row["user_id"], row["upstream"], row["request_id"]) == (
            "completed",
            7,
            "openai",
            "trace-1",
        )
        seen = up.requests[0]
        assert seen.json == asked
        assert seen.header("authorization") == f"Bearer {KEY}"
        assert seen.header("x-request-id") == "trace-1"
        assert daemon.token() not in seen.head.decode()


def test_injected_usage_is_booked_and_hidden_from_the_client(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("a"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        assert reply.body() == chat_chunk("a") + FINISH + DONE
        assert up.requests[0].json == {**CHAT, "stream_options": {"include_usage": True}}
        (row,) = daemon.wait_rows(1)
        assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"]) == (11, 5, 0)


def test_events_arrive_one_by_one(upstream: Make, tmp_path: Path) -> None:
    go = [threading.Event() for _ in range(3)]

    def script(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        for event in go:
            event.wait(10)
            wire.chunk(chat_chunk("x"))
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        go[0].set()
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        pieces = reply.pieces()
        assert next(pieces) == chat_chunk("x")
        for event in go[1:]:
            event.set()
            assert next(pieces).startswith(chat_chunk("x"))


def test_the_sites_route_answers_normalised_events_whatever_the_dialect(upstream: Make, tmp_path: Path) -> None:
    openai = upstream(lambda wire: wire.stream(chat_chunk("Hel"), chat_chunk("lo"), FINISH, USAGE, DONE))
    claude = upstream(
        lambda wire: wire.stream(
            named({"type": "message_start", "message": {"usage": {"input_tokens": 9, "output_tokens": 1}}}),
            named({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello"}}),
            named({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}}),
            named({"type": "message_stop"}),
        )
    )
    with node(tmp_path, openai, anthropic=claude) as daemon:
        for model, tokens in (("m", (11, 5)), ("claude", (9, 4))):
            sock = daemon.connect()
            body = json.dumps({"prompt": "Hi", "model": model}).encode()
            head = (
                "POST /api/v1/stream HTTP/1.1\r\nHost: site.example\r\nOrigin: http://site.example\r\n"
                f"Cookie: a=b; ai_session_jwt={daemon.token()}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            sock.sendall(head.encode() + body)
            reply = Reply(sock)
            assert reply.status == 200
            assert (reply.header("content-type") or "").startswith("text/event-stream")
            got = events(reply.body())
            assert reply.ended
            assert got[0][0] == "start"
            text = "".join(data["delta"] for name, data in got if not name)  # type: ignore[index]
            assert text == "Hello"
            usage = dict(got)["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"], usage["estimated"]) == (*tokens, False)  # type: ignore[index]
            assert got[-1] == ("done", {"finish_reason": "stop"})
        rows = daemon.wait_rows(2)
        assert [(row["prompt_tokens"], row["completion_tokens"], row["model_id"]) for row in rows] == [
            (11, 5, 1),
            (9, 4, 2),
        ]


def test_a_broken_upstream_ends_with_an_error_event_and_no_end_mark(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("a"), b'data: {"half', end=False)
        wire.reset()

    with node(tmp_path, upstream(script)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        body = reply.body()
        assert not reply.ended
        assert body.startswith(chat_chunk("a") + b'data: {"error":')
        assert b"half" not in body
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["estimated"]) == ("upstream_error", 1)
        assert row["completion_tokens"] == 1
        assert daemon.access_log()[-1]["cause"] == "upstream_broken"


def test_an_upstream_that_breaks_after_its_terminal_event_has_answered(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("a"), FINISH, USAGE, DONE, end=False)
        time.sleep(0.2)
        wire.reset()

    with node(tmp_path, upstream(script)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        assert reply.body() == chat_chunk("a") + FINISH + DONE
        assert reply.ended
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["completion_tokens"], row["estimated"]) == ("completed", 5, 0)


def test_a_client_that_leaves_stops_the_upstream_at_once(upstream: Make, tmp_path: Path) -> None:
    for count in (0, 1, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        closed: list[float] = []

        def script(wire: Wire) -> None:
            wire.stream(*[chat_chunk("x")] * max(count, 1), end=False)  # noqa: B023
            closed.append(wire.wait_closed())  # noqa: B023

        with node(folder, upstream(script)) as daemon:
            reply = ask(daemon, "/v1/chat/completions", CHAT)
            pieces = reply.pieces()
            seen = b""
            while seen.count(b"\n\n") < count:
                seen += next(pieces)
            left = time.monotonic()
            reply.sock.close()
            wait_for(lambda: closed)  # noqa: B023
            assert closed[0] - left < 5
            (row,) = daemon.wait_rows(1)
            assert (row["status"], row["estimated"]) == ("client_aborted", 1)
            wait_for(lambda: daemon.metric("proxyd_client_aborts_total") == 1)
            assert daemon.metric("proxyd_streams_active") == 0


def test_a_client_that_leaves_while_the_head_is_awaited_stops_the_upstream(upstream: Make, tmp_path: Path) -> None:
    closed: list[float] = []
    up = upstream(lambda wire: closed.append(wire.wait_closed()))
    with node(tmp_path, up) as daemon:
        sock = daemon.connect()
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        wait_for(lambda: up.requests)
        sock.close()
        wait_for(lambda: closed)
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["estimated"], row["completion_tokens"]) == ("client_aborted", 1, 0)


def test_a_client_that_resets_right_behind_its_request_is_noticed(upstream: Make, tmp_path: Path) -> None:
    closed: list[float] = []
    up = upstream(lambda wire: closed.append(wire.wait_closed()))
    with node(tmp_path, up) as daemon:
        os.kill(daemon.child("worker"), signal.SIGSTOP)
        sock = daemon.connect()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        sock.close()
        os.kill(daemon.child("worker"), signal.SIGCONT)
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "client_aborted"
        wait_for(lambda: len(closed) == len(up.requests))


def test_a_client_that_leaves_while_queued_for_a_connection_is_one_row(upstream: Make, tmp_path: Path) -> None:
    go = threading.Event()

    def script(wire: Wire) -> None:
        go.wait(10)
        wire.stream(DONE)

    up = upstream(script)
    with node(tmp_path, up, more="max_connections = 1") as daemon:
        first = daemon.connect()
        first.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        wait_for(lambda: up.requests)
        second = daemon.connect()
        second.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        time.sleep(0.3)
        second.close()
        rows = daemon.wait_rows(1)
        assert (rows[0]["status"], rows[0]["prompt_tokens"]) == ("client_aborted", 0)
        go.set()
        assert Reply(first).body() == DONE
        assert len(up.requests) == 1
        daemon.wait_rows(2)


def test_a_close_right_after_done_is_a_success(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("a"), FINISH, USAGE, DONE, end=False)
        time.sleep(0.3)
        wire.send(b"0\r\n\r\n")

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        body = b""
        for piece in reply.pieces():
            body += piece
            if DONE in body:
                break
        reply.sock.close()
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["completion_tokens"]) == ("completed", 5)
        ask(daemon, "/v1/chat/completions", CHAT).body()
        assert up.connections == 1


def test_silence_is_filled_with_comment_lines_at_event_boundaries(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("a"), end=False)
        time.sleep(1.2)
        half = chat_chunk("b")
        wire.chunk(half[:20])
        time.sleep(1.2)
        wire.chunk(half[20:])
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")

    with node(tmp_path, upstream(script), stream='heartbeat = "400ms"') as daemon:
        body = ask(daemon, "/v1/chat/completions", CHAT).body()
        lines = body.count(b": proxyd\n")
        assert lines >= 2
        assert body.replace(b": proxyd\n", b"") == chat_chunk("a") + chat_chunk("b") + DONE
        assert b": proxyd\n\n" not in body


def test_timeouts_end_with_the_right_answer_and_row(upstream: Make, tmp_path: Path) -> None:
    def silent(wire: Wire) -> None:
        if wire.seen.json["model"] == "head":
            wire.wait_closed()
            return
        wire.stream(chat_chunk("a"), end=False)
        if wire.seen.json["model"] == "total":
            for _ in range(100):
                wire.chunk(chat_chunk("b"))
                time.sleep(0.1)
        wire.wait_closed()

    more = 'first_byte_timeout = "500ms"\nidle_timeout = "700ms"\ntotal_timeout = "2s"'
    with node(tmp_path, upstream(silent), more=more) as daemon:
        reply = ask(daemon, "/v1/chat/completions", {**CHAT, "model": "head"})
        assert reply.status == 504
        assert json.loads(reply.body())["error"]["request_id"] == reply.header("x-proxyd-request-id")
        for model, cause in (("idle", "idle_timeout"), ("total", "total_timeout")):
            reply = ask(daemon, "/v1/chat/completions", {**CHAT, "model": model})
            body = reply.body()
            assert not reply.ended
            assert b'data: {"error":' in body
            wait_for(lambda: daemon.access_log()[-1]["cause"] == cause)  # noqa: B023
        assert [row["status"] for row in daemon.wait_rows(3)] == ["timeout"] * 3


def test_a_client_that_does_not_read_holds_the_upstream_back_and_is_dropped(upstream: Make, tmp_path: Path) -> None:
    sent = [0]

    def flood(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        piece = chat_chunk("x" * 8000)
        for _ in range(20_000):
            wire.chunk(piece)
            sent[0] += len(piece)

    with node(tmp_path, upstream(flood), stream='slow_client_timeout = "1s"\nbuffer = "128KiB"') as daemon:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", daemon.port))
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "client_aborted"
        assert daemon.access_log()[-1]["cause"] == "slow_client"
        assert sent[0] < 40 << 20
        assert daemon.metric("proxyd_backpressure_events_total") >= 1
        sock.close()


def test_keep_alive_and_pipelining_hold_across_streams(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk(wire.seen.json["model"]), DONE))
    with node(tmp_path, up) as daemon:
        sock = daemon.connect()
        for name in "abc":
            sock.sendall(request_bytes("/v1/chat/completions", {**CHAT, "model": name}, daemon.token()))
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
        sock.sendall(request_bytes("/v1/chat/completions", {**CHAT, "model": "d"}, daemon.token(), Connection="close"))
        data = b""
        while more := sock.recv(65536):
            data += more
        heads = [part for part in data.split(b"HTTP/1.1 200 ") if part]
        assert len(heads) == 5, data
        for name, part in zip(["a", "b", "c", None, "d"], heads, strict=True):
            if name is not None:
                assert chat_chunk(name) in part
        assert up.connections == 1


def test_refusals_have_the_contracts_statuses_and_leave_no_row(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    models = '[[model]]\nname = "m"\nid = 1\nupstreams = ["openai"]\n'
    with node(tmp_path, up, models=models) as daemon:

        def status(path: str, body: object, token: str | None, **headers: str) -> tuple[int, Reply]:
            sock = daemon.connect()
            sock.sendall(request_bytes(path, body, token, **headers))
            reply = Reply(sock)
            return reply.status, reply

        code, reply = status("/v1/chat/completions", CHAT, None)
        assert (code, reply.header("www-authenticate")) == (401, "Bearer")
        assert status("/v1/chat/completions", CHAT, "no.valid.token")[0] == 403
        assert status("/v1/chat/completions", CHAT, daemon.token(exp=1))[0] == 403
        code, reply = status("/v1/chat/completions", CHAT, daemon.token(quota_remaining=0))
        assert code == 429
        assert reply.header("retry-after") is not None
        assert json.loads(reply.body())["error"]["code"] == "quota_exceeded"
        code, reply = status("/v1/chat/completions", {**CHAT, "model": "other"}, daemon.token())
        assert code == 404
        code, reply = status("/v1/chat/completions", {"stream": True}, daemon.token())
        assert (code, json.loads(reply.body())["error"]["param"]) == (400, "model")
        code, reply = status("/v1/messages", b"{nonsense", daemon.token())
        assert (code, json.loads(reply.body())["type"]) == (400, "error")
        assert (
            status(
                "/v1/chat/completions",
                CHAT,
                None,
                Cookie=f"ai_session_jwt={daemon.token()}",
                Origin="https://evil.example",
            )[0]
            == 403
        )
        assert status("/v1/nothing", CHAT, daemon.token())[0] == 404
        assert daemon.get("/v1/chat/completions")[0] == 405
        assert not up.requests
        time.sleep(0.3)
        assert daemon.rows() == []
        assert daemon.metric("proxyd_requests_total", route="/v1/chat/completions", status="401") == 1


def test_an_upstream_refusal_is_passed_on_with_its_headers(upstream: Make, tmp_path: Path) -> None:
    error = {"error": {"message": "slow down", "type": "rate_limit", "code": "rate_limit_exceeded", "param": None}}
    up = upstream(
        lambda wire: wire.json(error, 429, retry_after_ms="50", x_request_id="req_theirs", x_ratelimit_remaining="0")
    )
    with node(tmp_path, up) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        assert (reply.status, json.loads(reply.body())) == (429, error)
        assert reply.header("retry-after-ms") == "50"
        assert reply.header("x-request-id") == "req_theirs"
        assert reply.header("x-proxyd-request-id") not in (None, "req_theirs")
        reply = ask(daemon, "/api/v1/stream", {"prompt": "hi", "model": "m"})
        assert reply.status == 429
        assert json.loads(reply.body())["error"]["message"] == "slow down"
        rows = daemon.wait_rows(2)
        assert [(row["status"], row["prompt_tokens"]) for row in rows] == [("upstream_error", 0)] * 2


def test_a_refused_injection_is_resent_once_as_it_came(upstream: Make, tmp_path: Path) -> None:
    def mistral(wire: Wire) -> None:
        if "stream_options" in wire.seen.json:
            wire.json(
                {
                    "object": "error",
                    "message": {"detail": [{"type": "extra_forbidden", "loc": ["body", "stream_options"]}]},
                },
                422,
            )
        else:
            wire.stream(chat_chunk("a"), FINISH, DONE)

    up = upstream(mistral)
    with node(tmp_path, up) as daemon:
        for _ in range(2):
            assert ask(daemon, "/v1/chat/completions", CHAT).body() == chat_chunk("a") + FINISH + DONE
        assert ["stream_options" in seen.json for seen in up.requests] == [True, False, False]
        assert up.requests[1].json == CHAT
        assert [row["status"] for row in daemon.wait_rows(2)] == ["completed"] * 2


def test_a_stale_pooled_connection_costs_nothing_but_a_retry(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> bool | None:
        if len(up.requests) == 2:
            return False  # the second request dies on the reused connection without a byte
        wire.stream(DONE)
        return None

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert (up.connections, len(up.requests)) == (2, 3)
        assert len(daemon.wait_rows(2)) == 2


def test_the_next_upstream_is_asked_when_one_cannot_be_reached(upstream: Make, tmp_path: Path) -> None:
    dead = upstream(lambda wire: None)
    dead.close()
    alive = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, dead, alive) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        (row,) = daemon.wait_rows(1)
        assert (row["upstream"], row["status"]) == ("openai2", "completed")


def test_no_upstream_at_all_is_502_and_a_row(upstream: Make, tmp_path: Path) -> None:
    dead = upstream(lambda wire: None)
    dead.close()
    with node(tmp_path, dead) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).status == 502
        assert ask(daemon, "/v1/messages", CHAT).status == 404
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == ("upstream_error", 0, 0)


def test_plain_json_passes_as_it_is_and_is_booked(upstream: Make, tmp_path: Path) -> None:
    choice = b'{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}'
    answer = b'  {"model":"m","choices":[' + choice + b'],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    with node(tmp_path, upstream(lambda wire: wire.json(answer))) as daemon:
        reply = ask(daemon, "/v1/chat/completions", {"model": "m", "messages": []})
        assert reply.body() == answer
        assert reply.header("content-length") == str(len(answer))
        (row,) = daemon.wait_rows(1)
        assert (row["prompt_tokens"], row["completion_tokens"], row["estimated"], row["status"]) == (
            3,
            2,
            0,
            "completed",
        )


def test_two_thousand_requests_one_after_another_open_one_connection(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(DONE))
    with node(tmp_path, up) as daemon:
        sock = daemon.connect()
        token = daemon.token()
        for _ in range(2_000):
            sock.sendall(request_bytes("/v1/chat/completions", CHAT, token))
            assert Reply(sock).body() == DONE
        assert up.connections == 1
        assert daemon.metric("proxyd_upstream_connects_total") == 1
        assert daemon.metric("proxyd_upstream_reuse_ratio") > 0.99
        daemon.wait_rows(2_000, 30)


def test_a_burst_leaves_the_neighbours_flowing(upstream: Make, tmp_path: Path) -> None:
    burst = b"".join(chat_chunk(f"word{n} ") for n in range(20_000))

    def script(wire: Wire) -> None:
        if wire.seen.json["model"] == "burst":
            wire.head(content_length=str(len(burst)))
            for at in range(0, len(burst), 999_983):
                wire.send(burst[at : at + 999_983])
            return
        wire.stream(*[chat_chunk("tick")] * 20, gap=0.02)

    with node(tmp_path, upstream(script)) as daemon:
        steady = [ask(daemon, "/v1/chat/completions", CHAT) for _ in range(5)]
        loud = ask(daemon, "/v1/chat/completions", {**CHAT, "model": "burst"})
        assert loud.body() == burst
        for reply in steady:
            assert reply.body() == chat_chunk("tick") * 20
