"""Streams whose user runs out of tokens on the way: what clients and SDKs see, what is booked, what providers see."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    node,
    wait_for,
)  # fmt: skip
from tests.daemon.quota_stage import (
    CLAUDE,
    WAYS,
    WORD,
    Provider,
    asked,
    block,
    rows_of,
    wait_for_vocabulary,
)  # fmt: skip

Make = Callable[[Script], Upstream]


@pytest.mark.parametrize("burst", [1, 700])
def test_each_dialect_ends_at_the_event_that_crossed_the_line_and_the_provider_is_stopped(
    upstream: Make, tmp_path: Path, burst: int
) -> None:
    provider = Provider(burst)
    up = upstream(provider)
    with node(tmp_path, up, anthropic=up) as daemon:
        wait_for_vocabulary(daemon)
        for user, (path, model) in enumerate(WAYS, 100):
            before = provider.closed
            token = daemon.token(user, quota_remaining=200)
            reply = ask(daemon, path, asked(path, model), token=token)
            assert reply.status == 200
            body = reply.body()
            assert not reply.ended, path
            blocks = body.split(b"\n\n")
            assert blocks.pop() == b"", path
            last = blocks[-1]
            assert b"quota_exceeded" in last or (path == "/v1/messages" and b"rate_limit_error" in last), path
            assert last.startswith(b"event: error\n") == (path not in ("/v1/chat/completions", "/v1/completions")), path
            assert (b'"retryable":false' in last) == (path == "/api/v1/stream")
            for end in (b"[DONE]", b"message_stop", b"response.completed", b"event: done", b"event: usage"):
                assert end not in body
            wait_for(lambda before=before: provider.closed == before + 1)
            (row,) = rows_of(daemon, user, 1)
            assert (row["status"], row["estimated"]) == ("interrupted", 1)
            words = body.count(b'"' + WORD.encode() + b'"')
            factor = CLAUDE if model == "claude" else 1
            assert row["completion_tokens"] == round(words * factor), path
            assert 200 < row["prompt_tokens"] + row["completion_tokens"] <= 202, path
            asks = len(up.requests)
            assert ask(daemon, path, asked(path, model), token=token).status == 429
            assert len(up.requests) == asks
        causes = [line["cause"] for line in daemon.access_log() if line.get("user", 1) != 1 and line["status"] == 200]
        assert set(causes) == {"quota_exceeded"}
        assert daemon.metric("proxyd_streams_active") == 0


def test_the_openai_sdk_raises_and_does_not_ask_again(upstream: Make, tmp_path: Path) -> None:
    import openai

    provider = Provider()
    up = upstream(provider)
    messages: Any = [{"role": "user", "content": "Say hello"}]

    def stream_of(client: openai.OpenAI, call: str) -> Any:
        if call == "chat":
            return client.chat.completions.create(model="m", stream=True, messages=messages)
        if call == "completions":
            return client.completions.create(model="m", stream=True, prompt="Say hello")
        return client.responses.create(model="m", stream=True, input="Say hello")

    with node(tmp_path, up) as daemon:
        for number, call in enumerate(("chat", "completions", "responses")):
            token = daemon.token(number, quota_remaining=100)
            with openai.OpenAI(base_url=f"http://127.0.0.1:{daemon.port}/v1", api_key=token) as client:
                got: list[Any] = []
                with pytest.raises(openai.APIError) as caught:
                    got.extend(stream_of(client, call))
                assert caught.value.code == "quota_exceeded"
                with pytest.raises(openai.RateLimitError) as refused:
                    client.chat.completions.create(model="m", messages=messages)
                assert refused.value.code == "quota_exceeded"
            assert len(up.requests) == number + 1
        assert [row["status"] for row in daemon.wait_rows(3)] == ["interrupted"] * 3
        wait_for(lambda: provider.closed == 3)


def test_the_anthropic_sdk_raises_and_does_not_ask_again(upstream: Make, tmp_path: Path) -> None:
    import anthropic

    provider = Provider()
    up = upstream(provider)
    messages: Any = [{"role": "user", "content": "Say hello"}]
    with node(tmp_path, anthropic=up) as daemon:
        wait_for_vocabulary(daemon, "/v1/messages", "claude")
        before = provider.closed
        token = daemon.token(quota_remaining=100)
        pieces: list[str] = []
        with (
            anthropic.Anthropic(base_url=f"http://127.0.0.1:{daemon.port}", api_key=token) as client,
            client.messages.stream(model="claude", max_tokens=4096, messages=messages) as stream,
            pytest.raises(anthropic.APIStatusError) as caught,
        ):
            pieces.extend(stream.text_stream)
        assert "rate_limit_error" in str(caught.value)
        (row,) = rows_of(daemon, 7, 1)
        assert (row["status"], row["prompt_tokens"]) == ("interrupted", 9)
        words = row["completion_tokens"] / CLAUDE
        assert len(up.requests) == before + 1
        assert 100 < 9 + row["completion_tokens"] <= 102
        assert words - 1 <= len(pieces) <= words + 1
        wait_for(lambda: provider.closed == before + 1)


def test_the_last_token_may_be_used_and_what_was_told_to_its_end_is_complete(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.stream(*[chat_chunk(WORD)] * 40, FINISH, DONE)

    with node(tmp_path, upstream(script)) as daemon:
        wait_for_vocabulary(daemon)
        assert ask(daemon, "/v1/chat/completions", CHAT).body()
        (first,) = rows_of(daemon, 7, 1)
        assert (first["status"], first["completion_tokens"]) == ("completed", 40)
        whole = first["prompt_tokens"] + 40
        token = daemon.token(8, quota_remaining=whole)
        reply = ask(daemon, "/v1/chat/completions", CHAT, token=token)
        assert reply.body() == chat_chunk(WORD) * 40 + FINISH + DONE
        assert reply.ended
        assert ask(daemon, "/v1/chat/completions", CHAT, token=token).status == 429
        reply = ask(daemon, "/v1/chat/completions", CHAT, token=daemon.token(9, quota_remaining=whole - 1))
        body = reply.body()
        assert body.startswith(chat_chunk(WORD) * 40 + b'data: {"error":')
        assert not reply.ended
        for user, status in ((8, "completed"), (9, "interrupted")):
            (row,) = rows_of(daemon, user, 1)
            assert (row["status"], row["completion_tokens"]) == (status, 40)


def test_counts_that_the_provider_tells_on_the_way_are_booked_as_told(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        for number in range(1, 2000):
            usage = {"prompt_tokens": 21, "completion_tokens": 10 * number, "total_tokens": 21 + 10 * number}
            choice = {"index": 0, "delta": {"content": WORD}, "finish_reason": None}
            wire.chunk(block({"id": "c", "model": "m-1", "choices": [choice], "usage": usage}))
            time.sleep(0.01)

    with node(tmp_path, upstream(script)) as daemon:
        token = daemon.token(quota_remaining=1000)
        body = ask(daemon, "/v1/chat/completions", CHAT, token=token).body()
        told = [json.loads(one[6:]) for one in body.split(b"\n\n") if one.startswith(b"data: {")]
        assert told[-1]["error"]["code"] == "quota_exceeded"
        (row,) = daemon.wait_rows(1)
        last = told[-2]["usage"]
        assert (row["prompt_tokens"], row["completion_tokens"]) == (21, last["completion_tokens"])
        assert (row["status"], row["estimated"]) == ("interrupted", 0)
        # a mark is 64 bytes on at least: thirteen words of ten tokens
        assert 1000 < last["total_tokens"] <= 1000 + 140


def test_comment_lines_and_the_error_event_stand_between_events(upstream: Make, tmp_path: Path) -> None:
    def script(wire: Wire) -> None:
        wire.head(transfer_encoding="chunked")
        half = chat_chunk(WORD * 100)
        wire.chunk(chat_chunk(WORD))
        time.sleep(1.5)
        wire.chunk(half[:40])
        time.sleep(1.5)
        wire.chunk(half[40:])
        wire.wait_closed()

    with node(tmp_path, upstream(script), stream='heartbeat = "400ms"') as daemon:
        reply = ask(daemon, "/v1/chat/completions", CHAT, token=daemon.token(quota_remaining=60))
        body = reply.body()
        assert not reply.ended
        assert body.count(b": proxyd\n") >= 2
        events = body.replace(b": proxyd\n", b"")
        assert events.startswith(chat_chunk(WORD) + chat_chunk(WORD * 100) + b'data: {"error":')
        (row,) = daemon.wait_rows(1)
        assert row["status"] == "interrupted"


def test_a_json_answer_is_not_cut_but_it_is_spent(upstream: Make, tmp_path: Path) -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 500, "total_tokens": 511}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x" * 3000}, "finish_reason": "stop"}

    def script(wire: Wire) -> None:
        data = json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode()
        wire.head(content_type="application/json", content_length=str(len(data)))
        wire.send(data[:1500])
        time.sleep(2.5)
        wire.send(data[1500:])

    with node(tmp_path, upstream(script)) as daemon:
        token = daemon.token(quota_remaining=50)
        asked_whole = {"model": "m", "messages": CHAT["messages"]}
        reply = ask(daemon, "/v1/chat/completions", asked_whole, token=token)
        assert json.loads(reply.body())["usage"] == usage
        (row,) = daemon.wait_rows(1)
        assert (row["status"], row["completion_tokens"]) == ("completed", 500)
        assert ask(daemon, "/v1/chat/completions", asked_whole, token=token).status == 429
