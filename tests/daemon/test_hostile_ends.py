"""What an enemy found: ends that were missed, requests sent twice, one client's request that changed another's row."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
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
)

Make = Callable[[Script], Upstream]


def test_a_client_that_ends_before_its_request_takes_its_first_step_has_a_row(upstream: Make, tmp_path: Path) -> None:
    up = upstream(lambda wire: wire.stream(chat_chunk("x"), FINISH, USAGE, DONE))
    with node(tmp_path, up) as daemon:
        bad = request_bytes("/v1/chat/completions", b"{", daemon.token())
        good = request_bytes("/v1/chat/completions", CHAT, daemon.token())
        for _ in range(20):
            sock = daemon.connect()
            # Eight requests are one turn of the connection: the ninth begins in the next, where the end is seen first.
            sock.sendall(bad * 8 + good)
            sock.shutdown(socket.SHUT_WR)
            time.sleep(0.01)
            sock.close()
        # How many of the ninths are read before their client's reset is the machine's matter; each that is has one row.
        ends = ("client_aborted", "completed")

        def admitted() -> int:
            lines = [line for line in daemon.access_log() if line["route"] == "/v1/chat/completions"]
            return sum(line["outcome"] in ends for line in lines)

        wait_for(admitted)
        wait_for(lambda: daemon.metric("proxyd_streams_active") == 0)
        wait_for(lambda: len(daemon.rows()) == admitted())
    # A request that never ended would be recovered now, as interrupted.
    rows = daemon.rows()
    assert len(rows) == admitted()
    assert {row["status"] for row in rows} <= set(ends)


@pytest.mark.parametrize("sign", ["interim", "half a head", "late"])
def test_a_reused_connection_that_showed_life_or_died_late_is_not_asked_again(
    upstream: Make, tmp_path: Path, sign: str
) -> None:
    def script(wire: Wire) -> bool | None:
        if len(up.requests) != 2:
            wire.stream(DONE)
            return None
        if sign == "interim":
            wire.send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
            time.sleep(0.2)
        elif sign == "half a head":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/ev")
            time.sleep(0.2)
            wire.reset()
        else:
            time.sleep(1.5)
        return False

    up = upstream(script)
    with node(tmp_path, up) as daemon:
        assert ask(daemon, "/v1/chat/completions", CHAT).body() == DONE
        assert ask(daemon, "/v1/chat/completions", CHAT).status == 502
        assert len(up.requests) == 2
        rows = daemon.wait_rows(2)
        assert (rows[1]["status"], rows[1]["attempts"]) == ("upstream_error", 1)
        assert rows[1]["prompt_tokens"] > 0


def test_one_clients_bad_stream_options_leave_the_others_accounted(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        options = wire.seen.json.get("stream_options") or {}
        if "include_obfuscation" in options:
            wire.json({"error": {"message": "Invalid type for 'stream_options.include_obfuscation'"}}, 400)
        else:
            wire.stream(chat_chunk("x"), FINISH, *([USAGE] if options.get("include_usage") else []), DONE)

    with node(tmp_path, upstream(script)) as daemon:
        poisoned = {**CHAT, "stream_options": {"include_obfuscation": "x"}}
        assert ask(daemon, "/v1/chat/completions", poisoned).status == 400
        ask(daemon, "/v1/chat/completions", CHAT).body()
        rows = daemon.wait_rows(2)
        assert (rows[1]["prompt_tokens"], rows[1]["completion_tokens"], rows[1]["estimated"]) == (11, 5, 0)


def test_a_client_that_leaves_behind_more_than_we_read_is_noticed(upstream: Make, tmp_path: Path) -> None:
    closed: list[float] = []
    up = upstream(lambda wire: closed.append(wire.wait_closed()))
    with node(tmp_path, up) as daemon:
        sock = daemon.connect()
        sock.sendall(request_bytes("/v1/chat/completions", CHAT, daemon.token()))
        wait_for(lambda: up.requests)
        sock.sendall(b"x" * 80_000)
        time.sleep(0.2)
        assert not closed
        sock.close()
        wait_for(lambda: closed)
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "client_aborted"


def test_an_upstream_that_goes_on_after_its_terminal_event_is_ended(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("x"), FINISH, USAGE, DONE, end=False)
        for _ in range(200):
            wire.chunk(b": still here\n")
            time.sleep(0.1)

    with node(tmp_path, upstream(script)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        body = reply.body()
        assert reply.ended
        assert body.replace(b": still here\n", b"") == chat_chunk("x") + FINISH + DONE
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["completion_tokens"], row["estimated"]) == ("completed", 5, 0)


def test_headers_named_by_the_upstreams_connection_end_here(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked", connection="X-Foo, keep-alive", X_Foo="secret", X_Bar="fine")
        wire.chunk(DONE)
        wire.send(b"0\r\n\r\n")

    with node(tmp_path, upstream(script)) as daemon:
        for body in (CHAT, {**CHAT, "stream_options": {"include_usage": True}}):
            reply = ask(daemon, "/v1/chat/completions", body)
            reply.body()
            assert reply.header("x-foo") is None
            assert reply.header("x-bar") == "fine"


def test_an_error_event_is_on_its_way_before_the_connection_breaks(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(chat_chunk("a"), end=False)
        wire.reset()

    with node(tmp_path, upstream(script)) as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT)
        body, heard = b"", 0.0
        for piece in reply.pieces():
            body += piece
            heard = time.monotonic()
        assert json.loads(body.split(b"data: ")[-1])["error"]["code"] == "upstream_broken"
        assert time.monotonic() - heard >= 0.03
        assert isinstance(reply, Reply)
        assert not reply.ended
