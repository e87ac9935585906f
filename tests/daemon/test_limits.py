"""Limits of a tenant over eight workers: at once, a minute, by tenant; what a refusal costs; what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.daemon import limit_ends
from tests.daemon.harness import (
    CHAT,
    ROOT,
    Daemon,
    Script,
    Upstream,
    config_text,
    free_port,
    model_text,
    node,
    upstream_text,
    wait_for,
)
from tests.daemon.limit_stage import (
    SPENT,
    Answer,
    House,
    finish,
    limits_of,
    request,
    send,
    side_by_side,
    wait_until_nothing_is_held,
)

MakeUpstream = Callable[[Script], Upstream]
EIGHT = "workers = 8"
SHORT = {**CHAT, "max_tokens": 5}


# -- at once -----------------------------------------------------------------------------------------------------------


def test_as_many_as_may_run_are_never_refused_round_after_round(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, limits="concurrent_streams = 10") as daemon:
        token = daemon.token()
        for _ in range(12):
            # Each round begins when every client of the last has seen its end: nobody runs then.
            answers = side_by_side(10, lambda _: request(daemon, token))
            assert [answer.status for answer in answers] == [200] * 10
        assert house.most <= 10
        wait_until_nothing_is_held(daemon)


def test_of_200_clients_the_upstream_sees_ten_and_none_is_refused_while_fewer_run(
    tmp_path: Path, upstream: MakeUpstream
) -> None:
    house = House(is_open=True)
    admitted: list[Answer] = []
    refused: list[Answer] = []
    with node(tmp_path, upstream(house), server=EIGHT, limits="concurrent_streams = 10") as daemon:
        token = daemon.token()

        def client(_: int) -> None:
            until = time.monotonic() + 90
            while time.monotonic() < until:
                answer = request(daemon, token)
                if answer.status == 200:
                    admitted.append(answer)
                    return
                refused.append(answer)
                time.sleep(0.2)

        side_by_side(200, client)
        assert len(admitted) == 200
        assert house.most <= 10
        assert {(answer.status, answer.code) for answer in refused} <= {(429, "concurrency_limit_exceeded")}
        for answer in refused:
            # Ten others were between their request and the end of their answer while this one was refused.
            others = sum(one.sent_at < answer.ended_at and one.ended_at > answer.sent_at for one in admitted)
            assert others >= 10
            assert answer.retry_after is not None
            assert answer.retry_after >= 1
        wait_until_nothing_is_held(daemon)


def test_a_full_house_refuses_and_one_who_leaves_makes_room_for_one(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House()
    with node(tmp_path, upstream(house), server=EIGHT, limits="concurrent_streams = 3") as daemon:
        token = daemon.token()
        inside = [send(daemon, token) for _ in range(3)]
        wait_for(lambda: house.inside == 3)
        assert [request(daemon, token).code for _ in range(16)] == ["concurrency_limit_exceeded"] * 16
        inside.pop().close()
        wait_for(lambda: limits_of(daemon)["tenants"]["default"]["concurrent_streams"]["used"] == 2)
        inside.append(send(daemon, token))
        wait_for(lambda: house.seen == 4)
        assert request(daemon, token).status == 429
        house.open.set()
        assert [finish(sock).status for sock in inside] == [200] * 3
        assert request(daemon, token).status == 200


def test_a_json_answer_that_is_awaited_counts_too_and_count_tokens_does_not(
    tmp_path: Path, upstream: MakeUpstream
) -> None:
    house = House()

    def counter(wire: object) -> None:
        wire.json({"input_tokens": 3})  # type: ignore[attr-defined]

    with node(
        tmp_path, upstream(house), anthropic=upstream(counter), server=EIGHT, limits="concurrent_streams = 1"
    ) as daemon:
        token = daemon.token()
        whole = send(daemon, token, {**CHAT, "stream": False})
        wait_for(lambda: house.inside == 1)
        assert request(daemon, token).code == "concurrency_limit_exceeded"
        count = {"model": "claude", "messages": [{"role": "user", "content": "hi"}]}
        assert request(daemon, token, count, "/v1/messages/count_tokens").status == 200
        house.open.set()
        finish(whole)
        wait_until_nothing_is_held(daemon)


# -- a minute ----------------------------------------------------------------------------------------------------------


def test_twenty_requests_pass_in_a_minute_and_the_next_is_told_how_long(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, limits="requests_per_minute = 20") as daemon:
        token = daemon.token()
        began = time.monotonic()
        answers = side_by_side(20, lambda _: request(daemon, token))
        assert [answer.status for answer in answers] == [200] * 20
        for answer in side_by_side(40, lambda _: request(daemon, token)):
            assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
            assert answer.retry_after is not None
            # The first of the twenty leaves the window 60 s after it came, in a tick of a quarter second.
            earliest, latest = began + 60, began + (answer.ended_at - began) + 61.5
            assert earliest - 1 <= answer.ended_at + answer.retry_after <= latest
        assert house.seen == 20
        assert limits_of(daemon)["tenants"]["default"]["requests_per_minute"] == {"used": 20, "limit": 20}


def test_tokens_of_a_minute_are_counted_as_they_were_spent(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, limits=f"tokens_per_minute = {10 * SPENT}") as daemon:
        token = daemon.token()
        used = []
        for _ in range(10):
            assert request(daemon, token, SHORT).status == 200
            wait_until_nothing_is_held(daemon)
            used.append(limits_of(daemon)["tenants"]["default"]["tokens_per_minute"]["used"])
        assert used == [SPENT * count for count in range(1, 11)]
        answer = request(daemon, token, SHORT)
        assert (answer.status, answer.code) == (429, "rate_limit_exceeded")
        assert answer.retry_after is not None
        assert 1 <= answer.retry_after <= 61
        assert house.seen == 10


# -- what a refusal costs ----------------------------------------------------------------------------------------------


def test_a_refused_request_uses_up_nothing(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House()
    limits = f"concurrent_streams = 1\nrequests_per_minute = 3\ntokens_per_minute = {10 * SPENT}"
    with node(tmp_path, upstream(house), server=EIGHT, limits=limits) as daemon:
        token = daemon.token()
        held = send(daemon, token, SHORT)
        wait_for(lambda: house.inside == 1)
        assert {request(daemon, token, SHORT).code for _ in range(24)} == {"concurrency_limit_exceeded"}
        house.open.set()
        assert finish(held).status == 200
        # Tokens do not fit: neither a request nor a place is used up by it.
        large = {**SHORT, "messages": [{"role": "user", "content": "so many words " * 200}]}
        assert {request(daemon, token, large).code for _ in range(24)} == {"rate_limit_exceeded"}
        assert [request(daemon, token, SHORT).status for _ in range(3)] == [200, 200, 429]
        assert house.seen == 3
        wait_until_nothing_is_held(daemon)
        assert len(daemon.rows()) <= 3
        assert daemon.metric("proxyd_requests_total", status="429") == 49


def test_a_tenant_has_its_own_limits_and_its_own_count(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    limits = "requests_per_minute = 2\n[limits.tenants.big]\nrequests_per_minute = 5\n[limits.tenants.free]\n"
    limits += "requests_per_minute = 0\n"
    with node(tmp_path, upstream(house), server=EIGHT, limits=limits) as daemon:

        def passed(**claims: str) -> int:
            token = daemon.token(**claims)
            answers = side_by_side(8, lambda _: request(daemon, token))
            return sum(answer.status == 200 for answer in answers)

        assert passed(tenant="big") == 5
        assert passed(tenant="free") == 8
        assert passed(tenant="other") == 2
        assert passed() == 2
        told = limits_of(daemon)["tenants"]
        assert told["big"] == {"requests_per_minute": {"used": 5, "limit": 5}}
        assert "free" not in told


def test_limits_hold_without_sessions(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, auth='mode = "off"', limits="requests_per_minute = 5") as daemon:
        answers = side_by_side(16, lambda _: request(daemon, "none"))
        assert sorted(answer.status for answer in answers) == [200] * 5 + [429] * 11


# -- kills -------------------------------------------------------------------------------------------------------------


def test_workers_killed_within_200_streams_leave_every_place_free(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House()
    with node(
        tmp_path, upstream(house), server=EIGHT, limits="concurrent_streams = 200", more="max_connections = 400"
    ) as daemon:
        token = daemon.token(quota_remaining=10**9)
        for expected in (200, 400):
            house.open.clear()
            streams = [send(daemon, token) for _ in range(200)]
            wait_for(partial(house.has_seen, expected), 60)
            assert request(daemon, token).code == "concurrency_limit_exceeded"
            for slot in range(8):
                os.kill(daemon.child(f"worker {slot}"), signal.SIGKILL)
            for sock in streams:
                finish(sock)
            wait_for(lambda: daemon.get("/readyz")[0] == 200, 30)
            wait_until_nothing_is_held(daemon, 30)
            house.open.set()  # only now: what was cut has no worker that could have ended it
        assert daemon.log().count('"permits_freed"') >= 8


def test_a_thousand_requests_that_end_in_every_way_and_killed_workers_leave_nothing_held(tmp_path: Path) -> None:
    told = limit_ends.run(tmp_path, 1000, kills=5, seed=int(time.time()))
    assert told[200] > 0
    assert sum(told.values()) == 1000


def test_a_start_without_room_for_the_ledger_says_so_in_one_line(tmp_path: Path) -> None:
    models = upstream_text("http://127.0.0.1:1/v1") + model_text("*", 1, '["openai"]')
    text = config_text(tmp_path, free_port(), models, server=EIGHT, limits="concurrent_streams = 60000")
    daemon = Daemon(tmp_path, text)
    least = 500 * 1024  # KiB: enough for the interpreter, and half of what the ledger takes of the address space
    command = f'ulimit -v {least}; exec "{sys.executable}" -m proxyd -c "{daemon.config}"'
    ended = subprocess.run(["bash", "-c", command], capture_output=True, cwd=ROOT, env=daemon.environ, timeout=60)
    assert ended.returncode == 1
    told = ended.stderr.decode()
    assert told.startswith("proxyd: nothing to share among 8 workers: Cannot allocate memory; ")
    assert told.count("\n") == 1
    assert not (tmp_path / "admin.sock").exists()
