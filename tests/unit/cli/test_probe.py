"""What the steps of --probe share: bounds, and the words for what failed."""

from __future__ import annotations

import datetime
import os
import threading
from functools import partial

import pytest

from proxyd.cli import probe
from proxyd.cli import probe_http as net
from proxyd.cli.probe_http import Certificate
from proxyd.cli.probe_upstream import Outcome
from proxyd.store import probe as store
from tests.unit.config.texts import MINIMAL, valid


def fail() -> int:
    raise OSError(113, "No route to host")


def test_answers_come_in_the_order_of_the_questions_with_their_errors() -> None:
    results = net.gather([partial(int, "1"), fail, partial(int, "3")], 10.0)
    assert (results[0], results[2]) == (1, 3)
    assert isinstance(results[1], OSError)
    assert net.words(results[1]) == "No route to host"


def test_what_does_not_end_is_given_up_and_the_others_are_kept() -> None:
    never = threading.Event()
    results = net.gather([never.wait, partial(bool, 1)], 0.05)
    never.set()
    assert isinstance(results[0], TimeoutError)
    assert results[1] is True


def test_more_questions_than_threads_are_all_asked() -> None:
    assert net.gather([partial(abs, -number) for number in range(100)], 10.0) == list(range(100))


def test_no_question_has_no_answer() -> None:
    assert net.gather([], 1.0) == []


def test_days_are_whole_and_negative_once_it_is_over() -> None:
    ends = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)
    certificate = Certificate("TLSv1.3", ends, "CN=x")
    assert certificate.days(ends.timestamp() - 21 * 86_400) == 21
    assert certificate.days(ends.timestamp() - 21 * 86_400 + 1) == 20
    assert certificate.days(ends.timestamp() + 1) == -1


def test_a_timeout_is_told_in_seconds() -> None:
    assert net.words(TimeoutError()) == "no answer within 5 s"
    assert net.words(TimeoutError("timed out")) == "no answer within 5 s"
    assert net.words(ValueError("odd")) == "odd"


@pytest.mark.parametrize(
    ("sink", "uid", "is_warned"),
    [
        ("mysql:///proxyd?unix_socket=/nowhere.sock", 0, True),
        ("mysql:///proxyd?unix_socket=/nowhere.sock", 995, False),
        ("mysql://proxyd@127.0.0.1:1/proxyd", 0, False),
    ],
)
def test_root_is_warned_that_a_sink_without_a_user_was_asked_as_root(
    monkeypatch: pytest.MonkeyPatch, sink: str, uid: int, is_warned: bool
) -> None:
    config = valid(f'[telemetry]\nsink = "{sink}"\n' + MINIMAL)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(store, "look", lambda *_: store.Look("mysql: the schema is complete", []))
    outcome = Outcome(("telemetry", "sink"))
    probe._store(config, None, outcome)
    warned = [one for one in outcome.found if "asked as root" in one.message]
    assert bool(warned) is is_warned
    assert all(not one.is_error and "runuser -u proxyd" in one.remedy for one in warned)
