"""Quota over eight workers and restarts: what is admitted, what the store adds, what holds while it is away."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from tests.daemon.harness import CHAT, Daemon, Script, Upstream, node, wait_for
from tests.daemon.limit_stage import (
    SPENT,
    Answer,
    House,
    finish,
    gauges,
    quota_decisions,
    request,
    send,
    side_by_side,
    wait_until_nothing_is_held,
)

MakeUpstream = Callable[[Script], Upstream]
EIGHT = "workers = 8"


def ask_until_refused(daemon: Daemon, token: str, most: int = 50) -> tuple[int, Answer]:
    """How many requests in a row passed, one at a time, and the refusal that followed."""
    for passed in range(most):
        answer = request(daemon, token)
        if answer.status != 200:
            return passed, answer
        wait_until_nothing_is_held(daemon)
    raise AssertionError(f"{most} requests passed")


# -- many workers ------------------------------------------------------------------------------------------------------


def test_a_hundred_requests_at_once_on_an_almost_empty_quota_pass_once_a_worker_at_most(
    tmp_path: Path, upstream: MakeUpstream
) -> None:
    house = House()
    with node(tmp_path, upstream(house), server=EIGHT) as daemon:
        token = daemon.token(quota_remaining=SPENT + 1)
        streams = [send(daemon, token) for _ in range(100)]
        # Those that are refused end; those that passed are held within the house.
        wait_for(lambda: daemon.metric("proxyd_requests_total", status="429") + house.inside == 100, 30)
        passed = house.inside
        assert 1 <= passed <= 8
        house.open.set()
        answers = [finish(sock) for sock in streams]
        assert sum(answer.status == 200 for answer in answers) == passed
        for answer in answers:
            if answer.status != 200:
                # It was no end of the quota: who holds it may spend less.
                assert (answer.code, answer.retry_after, answer.should_retry) == ("quota_exceeded", 1, None)
        wait_until_nothing_is_held(daemon)
        assert house.seen == passed


def test_what_one_worker_gave_is_spent_at_all_of_them(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT) as daemon:
        token = daemon.token(quota_remaining=3 * SPENT - 1)
        passed, refused = ask_until_refused(daemon, token)
        assert passed == 3
        for answer in [refused, *(request(daemon, token) for _ in range(24))]:
            assert (answer.status, answer.code, answer.should_retry) == (429, "quota_exceeded", "false")
            assert answer.retry_after == 60
        assert house.seen == 3
        # A new session of the same user has its own quota; what was spent before it is not charged.
        time.sleep(1.1)  # iat has whole seconds
        assert request(daemon, daemon.token(quota_remaining=1)).status == 200


def test_the_window_is_a_ceiling_beside_the_token_s_quota(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, quota=f"tokens = {2 * SPENT}") as daemon:
        assert ask_until_refused(daemon, daemon.token(1, quota_remaining=10**9))[0] == 2
        assert ask_until_refused(daemon, daemon.token(1))[0] == 0
        assert ask_until_refused(daemon, daemon.token(2, quota_remaining=SPENT))[0] == 1
        store, local = quota_decisions(daemon)
        assert store + local == house.seen + 3


# -- the store ---------------------------------------------------------------------------------------------------------


def test_what_was_spent_before_a_restart_still_counts(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, quota=f"tokens = {4 * SPENT}") as daemon:
        token = daemon.token(1, quota_remaining=2 * SPENT)
        assert ask_until_refused(daemon, token)[0] == 2
        assert request(daemon, daemon.token(2)).status == 200
        daemon.wait_rows(3)
        assert daemon.stop() == 0
        daemon.start()
        wait_for(lambda: telemetry_of(daemon) == "ready")
        answer = request(daemon, token)
        assert (answer.status, answer.code) == (429, "quota_exceeded")
        assert ask_until_refused(daemon, daemon.token(1))[0] == 2
        assert ask_until_refused(daemon, daemon.token(2))[0] == 3


def telemetry_of(daemon: Daemon) -> str:
    return str(json.loads(daemon.get("/readyz")[1]).get("details", {}).get("telemetry"))


def test_while_the_store_cannot_be_written_it_is_decided_on_what_is_known_and_the_metric_says_so(
    tmp_path: Path, upstream: MakeUpstream
) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, quota=f"tokens = {3 * SPENT}") as daemon:
        assert request(daemon, daemon.token(1)).status == 200
        daemon.wait_rows(1)
        with closing(sqlite3.connect(tmp_path / "telemetry.db", timeout=10, isolation_level=None)) as database:
            database.execute("BEGIN IMMEDIATE")
            assert request(daemon, daemon.token(2)).status == 200
            wait_for(lambda: telemetry_of(daemon) == "failing", 60)
            holds_without_the_store(daemon)
            database.execute("ROLLBACK")
        daemon.wait_rows(26, 60)


def test_while_nobody_answers_for_the_store_no_request_waits_for_it(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, quota=f"tokens = {3 * SPENT}") as daemon:
        assert request(daemon, daemon.token(1)).status == 200
        daemon.wait_rows(1)
        telemetry = daemon.child("telemetry")
        os.kill(telemetry, signal.SIGSTOP)
        try:
            holds_without_the_store(daemon)
        finally:
            os.kill(telemetry, signal.SIGCONT)
        daemon.wait_rows(25, 60)


def holds_without_the_store(daemon: Daemon) -> None:
    """New users and a known one are answered, though nobody can read what they spent; the ceiling of 3 x SPENT holds by
    what ends meanwhile. 24 rows."""
    before = quota_decisions(daemon)[1]
    answers = side_by_side(20, lambda number: request(daemon, daemon.token(100 + number)))
    assert [answer.status for answer in answers] == [200] * 20
    assert request(daemon, daemon.token(1)).status == 200
    passed, refused = ask_until_refused(daemon, daemon.token(200))
    assert (passed, refused.code) == (3, "quota_exceeded")
    assert quota_decisions(daemon)[1] >= before + 20 + 4


# -- Retry-After -------------------------------------------------------------------------------------------------------


def test_who_waits_as_long_as_a_window_says_may_ask_again(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(
        tmp_path, upstream(house), server=EIGHT, quota=f'tokens = {2 * SPENT}\nwindow = "3s"\nrefresh = "1s"'
    ) as daemon:
        token = daemon.token()
        for _ in range(2):
            answers = [request(daemon, token)]
            while answers[-1].status == 200:
                wait_until_nothing_is_held(daemon)
                answers.append(request(daemon, token))
            wait_s = answers[-1].retry_after
            assert wait_s is not None
            assert 1 <= wait_s <= 5
            time.sleep(wait_s)
            assert request(daemon, token).status == 200
        assert gauges(daemon)[:3] == (0, 0, 0)


def test_a_client_that_leaves_while_the_store_is_asked_costs_nothing(tmp_path: Path, upstream: MakeUpstream) -> None:
    house = House(is_open=True)
    with node(tmp_path, upstream(house), server=EIGHT, quota="tokens = 1000000") as daemon:
        for user in range(60):
            send(daemon, daemon.token(1000 + user), CHAT).close()
        assert request(daemon, daemon.token(1)).status == 200
        wait_until_nothing_is_held(daemon)
