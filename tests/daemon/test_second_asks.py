"""What may be asked a second time and what never; and the questions that the contract leaves to us."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    Reply,
    chat_chunk,
    wait_for,
)  # fmt: skip
from tests.daemon.odd_stage import BODY, GOOD, PATH, SSE, Stage, answering, running_stage, stage_at_rest, whole  # noqa: F401
from tests.daemon.peer import Line

# -- a second upstream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [502, 503, 504, 529])
def test_an_upstream_that_cannot_is_followed_by_the_next_one_once(status: int, stage: Stage) -> None:
    model = f"over{status}"
    stage.a = answering(whole(status, {"error": {"message": "busy"}}))
    reply, body, row = stage.ask({**CHAT, "model": model})
    assert (reply.status, body) == (200, BODY)
    assert (row["upstream"], row["attempts"], row["status"]) == (f"{model}-b", 2, "completed")
    stage.b = answering(whole(503, {"error": {"message": "busy too"}}))
    stage.hang_up()
    reply, body, row = stage.ask({**CHAT, "model": model})
    assert (reply.status, json.loads(body)) == (503, {"error": {"message": "busy too"}})
    assert (row["upstream"], row["attempts"], row["prompt_tokens"]) == (f"{model}-b", 2, 0)


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500])
def test_other_refusals_are_the_clients_and_nobody_else_is_asked(status: int, stage: Stage) -> None:
    stage.a = answering(whole(status, {"error": {"message": "no"}}))
    before = stage.connections("b")
    reply, body, row = stage.ask({**CHAT, "model": "passed"})
    assert (reply.status, json.loads(body)) == (status, {"error": {"message": "no"}})
    assert (row["upstream"], row["attempts"], row["status"]) == ("passed-a", 1, "upstream_error")
    assert stage.connections("b") == before


def test_five_failures_in_a_row_open_the_breaker_and_the_others_are_asked_first(stage: Stage) -> None:
    asked: list[bytes] = []
    stage.a = answering(whole(503, {"error": {"message": "busy"}}), asked)
    for _ in range(7):
        assert stage.ask({**CHAT, "model": "breaker"})[1] == BODY
    assert len(asked) == 5
    assert stage.daemon.metric("proxyd_breaker_state", upstream="breaker-a") == 2
    assert stage.daemon.metric("proxyd_breaker_state", upstream="breaker-b") == 0
    assert stage.ask({**CHAT, "model": "breaker"})[2]["attempts"] == 1


@pytest.mark.parametrize("end", ["closes", "resets"])
def test_a_request_that_was_sent_on_a_fresh_connection_is_never_sent_again(end: str, stage: Stage) -> None:
    asked: list[bytes] = []

    def script(line: Line) -> None:
        line.read_request()
        asked.append(line.body)
        if end == "resets":
            line.reset()

    stage.a = script
    before = stage.connections("b")
    reply, body, row = stage.ask({**CHAT, "model": "silent"})
    assert (reply.status, json.loads(body)["error"]["code"]) == (502, "upstream_reset")
    assert (len(asked), stage.connections("b") - before) == (1, 0)
    assert (row["attempts"], row["status"], row["estimated"]) == (1, "upstream_error", 1)
    assert row["prompt_tokens"] > 0  # it may have been billed


def test_a_stale_connection_is_replaced_once_and_then_it_is_over(stage: Stage) -> None:
    asked: list[int] = []

    def script(line: Line) -> None:
        while line.read_request():
            asked.append(line.number)
            if len(asked) > 1:
                return
            line.send(GOOD)

    stage.a = script
    before = stage.connections("b")
    assert stage.ask({**CHAT, "model": "stale"})[1] == BODY
    reply, _, row = stage.ask({**CHAT, "model": "stale"})
    assert (reply.status, row["attempts"]) == (502, 2)
    assert len(asked) == 3  # the answer; the stale connection; the fresh one
    assert asked[0] == asked[1] != asked[2]
    assert stage.connections("b") == before


def test_retries_are_at_most_three_of_ten_at_once(stage: Stage) -> None:
    together, release = threading.Barrier(10), threading.Event()
    asked: list[bytes] = []

    def busy(line: Line) -> None:
        line.read_request()
        together.wait(10)
        line.send(whole(503, {"error": {"message": "busy"}}))

    def slow(line: Line) -> None:
        line.read_request()
        asked.append(line.body)
        release.wait(10)
        line.send(GOOD)

    stage.a, stage.b = busy, slow
    begun = [stage.begin({**CHAT, "model": "budget"}) for _ in range(10)]
    wait_for(lambda: len([row for row in stage.daemon.rows() if row["user_id"] in {user for _, user in begun}]) == 7)
    wait_for(lambda: len(asked) == 3)
    release.set()
    assert sorted(Reply(sock).status for sock, _ in begun) == [200] * 3 + [503] * 7
    assert sorted(stage.row(user)["attempts"] for _, user in begun) == [1] * 7 + [2] * 3


def test_an_upstream_that_cannot_be_reached_costs_no_retry_and_a_fallback_model_answers(stage: Stage) -> None:
    _, body, row = stage.ask({**CHAT, "model": "dead"})
    assert (body, row["upstream"], row["attempts"]) == (BODY, "dead-b", 2)
    asked: list[bytes] = []
    stage.a = answering(GOOD, asked)
    assert stage.daemon.metric("proxyd_upstream_errors_total", upstream="dead-a", kind="refused") == 1
    _, body, row = stage.ask({**CHAT, "model": "main"})
    assert (body, row["upstream"], row["model_id"]) == (BODY, "odd", 4)
    assert json.loads(asked[0])["model"] == "spare-1"
    stage.b = answering(whole(503, {"error": {"message": "busy"}}))
    _, body, row = stage.ask({**CHAT, "model": "busy"})
    assert (body, row["upstream"], row["model_id"], row["attempts"]) == (BODY, "odd", 4, 2)


# -- questions the contract leaves to us -------------------------------------------------------------------------------

ANTHROPIC = [
    {"type": "message_start", "message": {"model": "c", "usage": {"input_tokens": 9, "output_tokens": 1}}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
    {"type": "message_stop"},
]
COMPLETED = {"type": "response.completed", "response": {"usage": {"input_tokens": 3, "output_tokens": 2}}}


def named(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


LEAVING = {
    "chat, after [DONE]": (PATH, CHAT, [chat_chunk("a"), FINISH, DONE], DONE, "completed"),
    "chat, before [DONE]": (PATH, CHAT, [chat_chunk("a"), FINISH], b'"stop"', "client_aborted"),
    "responses": ("/v1/responses", {"model": "m", "stream": True, "input": "x"}, [named(COMPLETED)], b"completed",
                  "completed"),
    "messages": ("/v1/messages", {**CHAT, "model": "claude"}, [named(event) for event in ANTHROPIC], b"message_stop",
                 "completed"),
    "messages, before the end": ("/v1/messages", {**CHAT, "model": "claude"},
                                 [named(event) for event in ANTHROPIC[:3]], b"message_delta", "client_aborted"),
    "the site's route": ("/api/v1/stream", {"prompt": "x", "model": "m"}, [chat_chunk("a"), FINISH, DONE],
                         b"event: done", "completed"),
}  # fmt: skip


@pytest.mark.parametrize("label", LEAVING)
def test_a_client_that_leaves_after_the_terminal_event_had_all_of_it(label: str, stage: Stage) -> None:
    path, body, pieces, last, status = LEAVING[label]

    def script(line: Line) -> None:
        line.read_request()
        line.send(b"HTTP/1.1 200 OK\r\n" + SSE + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            line.chunk(piece)
        line.wait_end(10)

    stage.a = script
    sock, user = stage.begin(body, path)
    reply = Reply(sock)
    got = b""
    for piece in reply.pieces():
        got += piece
        if last in got:
            break
    sock.close()
    assert stage.row(user)["status"] == status
    line = stage.peers["a"].lines[-1]
    assert line.gone.wait(5)


@pytest.mark.parametrize("status", [201, 202, 204, 206, 299])
def test_the_sites_route_takes_nothing_but_200_for_an_answer(status: int, stage: Stage) -> None:
    def script(line: Line) -> None:
        while line.read_request():
            if status == 204:
                line.send(b"HTTP/1.1 204 X\r\n\r\n")
            else:
                line.send(GOOD.replace(b"200 OK", b"%d X" % status))

    stage.a = script
    reply, body, row = stage.ask({"prompt": "x", "model": "m"}, "/api/v1/stream")
    assert (reply.status, reply.header("content-type")) == (502, "application/json")
    assert json.loads(body)["error"]["message"]
    assert (row["status"], row["prompt_tokens"], row["completion_tokens"]) == ("upstream_error", 0, 0)
    # a native route passes it on as it is, and reads no events out of it (WHATWG HTML 9.2.2)
    sock, user = stage.begin()
    reply, row = Reply(sock), stage.row(user)
    assert (reply.status, b"" if status == 204 else reply.body()) == (status, b"" if status == 204 else BODY)
    assert (row["status"], row["completion_tokens"], row["estimated"]) == ("completed", 0, 1)


def test_request_ids_are_the_trusted_proxys_or_ours_and_the_upstreams_own_is_shown_beside(stage: Stage) -> None:
    given = {"trace-1": "trace-1", "a" * 64: "a" * 64, "b" * 65: None, "two words": None, "x;y": None, "": None}
    for value, wanted in given.items():
        reply, _, row = stage.ask(X_Request_Id=value)
        ours = reply.header("x-proxyd-request-id")
        assert ours == row["request_id"] == reply.header("x-request-id")
        assert ours == wanted or (wanted is None and ours != value and len(str(ours)) == 32)
        assert f"x-request-id: {ours}".encode() in stage.peers["a"].lines[-1].head.lower()
    stage.a = answering(GOOD.replace(SSE, SSE + b"X-Request-Id: req_theirs\r\nX-Proxyd-Request-Id: lie\r\n"))
    stage.hang_up()
    reply, _, row = stage.ask(X_Request_Id="trace-2")
    assert reply.header("x-request-id") == "req_theirs"
    assert reply.header("x-proxyd-request-id") == row["request_id"] == "trace-2"
    assert [name for name, _ in reply.headers].count("x-proxyd-request-id") == 1
