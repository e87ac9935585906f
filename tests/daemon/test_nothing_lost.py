"""Nothing is lost while the node renews itself: small versions of renew_rounds.py and fake_manager.py.

The figures of the issue (3,000 requests a second, 1,000 streams, 40 renewals) come from the modules' own main().
"""

from __future__ import annotations

from pathlib import Path

from tests.daemon import fake_manager, renew_rounds
from tests.daemon.load import total
from tests.daemon.renew_rounds import Plan


def test_reloads_and_upgrades_good_and_broken_lose_no_request_and_cut_no_stream(tmp_path: Path) -> None:
    plan = Plan(
        reloads=2, upgrades=2, broken=("file_key", "syntax"), streams=48, rate=300, ways=renew_rounds.WAYS,
        pause_s=0.3, drain_timeout_s=60, stream_events=(20, 40), stream_rate=10,
    )  # fmt: skip
    outcome = renew_rounds.run(tmp_path, plan)
    assert outcome.faults == [], renew_rounds.describe(outcome)
    assert outcome.failures == []
    assert [renewal.ok for renewal in outcome.renewals].count(True) == 4
    assert total(outcome.reports, "requests")["whole"] > 300
    assert total(outcome.reports, "streams")["whole"] >= 48


def test_streams_that_outlive_the_drain_are_told_so_and_not_before_it_is_over(tmp_path: Path) -> None:
    plan = Plan(
        reloads=2, upgrades=0, broken=(), streams=20, rate=100, ways=("tcp", "unix"),
        pause_s=1.0, drain_timeout_s=1, stream_events=(90, 90), stream_rate=20,
    )  # fmt: skip
    outcome = renew_rounds.run(tmp_path, plan)
    assert outcome.faults == [], renew_rounds.describe(outcome)
    assert outcome.ended_by_drain == len(outcome.failures) >= 20


def test_a_restart_with_the_listeners_in_the_descriptor_store_refuses_nobody(tmp_path: Path) -> None:
    outcome = fake_manager.load_rounds(tmp_path, restarts=2, rate=200, streams=10, drain_timeout_s=1)
    assert outcome.faults == [], outcome.faults[:10]
    assert outcome.kept
    assert total(outcome.reports, "requests")["failed"]["connect"] == 0
    assert total(outcome.reports, "requests")["whole"] > 300
