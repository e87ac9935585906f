"""Streams of one user side by side, on one worker and on several: they end together, and what they use is bounded."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.daemon.harness import (
    CHAT,
    Daemon,
    Reply,
    Script,
    Upstream,
    ask,
    node,
    request_bytes,
    wait_for,
)  # fmt: skip
from tests.daemon.quota_stage import (
    MARK_TOKENS,
    WORD,
    Provider,
)  # fmt: skip

Make = Callable[[Script], Upstream]


def streams_of_workers(daemon: Daemon) -> list[int]:
    workers = json.loads(daemon.admin("/status")[1])["workers"]
    return [worker["streams"] for worker in workers]


def test_streams_of_one_user_on_two_workers_cross_the_line_together(upstream: Make, tmp_path: Path) -> None:
    provider = Provider(gap=0.01)
    with node(tmp_path, upstream(provider), server="workers = 2") as daemon:
        token = daemon.token(quota_remaining=6000)
        replies: list[Reply] = []

        def on_both() -> bool:
            if min(streams_of_workers(daemon)) > 0:
                return True
            if len(replies) < 16:  # the kernel's hash gives each connection to one of the two
                replies.append(ask(daemon, "/v1/chat/completions", CHAT, token=token))
                assert replies[-1].status == 200
            return False

        wait_for(on_both, 20, every=0.2)
        with ThreadPoolExecutor(len(replies)) as pool:
            bodies = list(pool.map(Reply.body, replies))
        for reply, body in zip(replies, bodies, strict=True):
            assert not reply.ended
            assert body.count(b'"quota_exceeded"') == 1
        rows = daemon.wait_rows(len(replies))
        assert {row["status"] for row in rows} == {"interrupted"}
        told = sum(body.count(WORD.encode()) for body in bodies)
        # by the first kilobyte of each, which ends within a word
        assert sum(row["completion_tokens"] for row in rows) == pytest.approx(told, rel=0.03)
        spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        assert 6000 < spent <= 6000 + len(rows) * (MARK_TOKENS + 1)
        assert ask(daemon, "/v1/chat/completions", CHAT, token=token).status == 429
        wait_for(lambda: provider.closed == len(replies))


def test_a_hundred_requests_at_once_pass_the_quota_by_a_mark_and_an_event_each_at_most(
    upstream: Make, tmp_path: Path
) -> None:
    quota = 8000
    provider = Provider(gap=0.02)
    with node(tmp_path, upstream(provider), server="workers = 4") as daemon:
        token = daemon.token(quota_remaining=quota)
        body = request_bytes("/v1/chat/completions", CHAT, token)

        def one(_: int) -> tuple[int, bytes]:
            sock = daemon.connect()
            sock.settimeout(120)
            sock.sendall(body)
            reply = Reply(sock)
            return reply.status, reply.body()

        with ThreadPoolExecutor(100) as pool:
            answers = list(pool.map(one, range(100)))
        admitted = [answer for status, answer in answers if status == 200]
        assert {status for status, _ in answers} == {200, 429}
        assert all(answer.count(b'"quota_exceeded"') == 1 for _, answer in answers)
        rows = daemon.wait_rows(len(admitted), 30)
        spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows)
        told = sum(answer.count(WORD.encode()) for answer in admitted)
        assert sum(row["completion_tokens"] for row in rows) == pytest.approx(told, rel=0.03)
        assert quota < spent <= quota + len(rows) * (MARK_TOKENS + 1), (spent, len(rows))
        wait_for(lambda: provider.running == 0)
        assert ask(daemon, "/v1/chat/completions", CHAT, token=token).status == 429
