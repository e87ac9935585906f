"""When a loop that is late is an overload, and when it is over."""

from __future__ import annotations

import pytest

from proxyd.worker.overload import REFUSING, UNREADY, Episode, LagWatch, Rule

RULES = pytest.mark.parametrize("rule", [UNREADY, REFUSING], ids=["unready", "refusing"])


def pulses(watch: Episode | LagWatch, now: float, lag: float, count: int) -> float:
    """`count` pulses that are each `lag` late; the time of the last."""
    for _ in range(count):
        now += 0.1 + lag
        watch.see(lag, now)
    return now


@RULES
def test_a_loop_that_is_in_time_or_a_little_late_is_no_overload(rule: Rule) -> None:
    episode = Episode(rule)
    now = pulses(episode, 0.0, 0.0, 100)
    pulses(episode, now, 0.9 * rule.late_s, 100)
    assert not episode.is_on


@RULES
def test_a_process_that_is_stopped_again_and_again_is_no_overload(rule: Rule) -> None:
    episode = Episode(rule)
    now = 0.0
    for _ in range(10):
        now = pulses(episode, now, 20.0, 1)
        assert not episode.is_on
        now = pulses(episode, now, 0.0, 1)


@RULES
def test_a_loop_that_stays_late_is_one_and_not_before_its_time(rule: Rule) -> None:
    episode = Episode(rule)
    late = 1.2 * rule.late_s
    began = now = pulses(episode, 0.0, late, 1)
    while now - began < rule.after_s or now == began:
        assert not episode.is_on
        now = pulses(episode, now, late, 1)
    assert episode.is_on


@RULES
def test_a_pulse_that_is_only_a_little_late_does_not_end_it(rule: Rule) -> None:
    episode = Episode(rule)
    now = 0.0
    for _ in range(5):
        now = pulses(episode, now, 1.2 * rule.late_s, 1)
        now = pulses(episode, now, (rule.late_s + rule.timely_s) / 2, 1)
    assert episode.is_on


@RULES
def test_it_is_over_after_pulses_in_time_and_not_at_the_first(rule: Rule) -> None:
    episode = Episode(rule)
    now = pulses(episode, 0.0, 1.2 * rule.late_s, 10)
    now = pulses(episode, now, 0.0, 1)
    assert episode.is_on
    pulses(episode, now, 0.0, round(rule.calm_s * 10) + 1)
    assert not episode.is_on


def test_a_loop_that_is_two_seconds_late_is_not_ready_and_refuses_nobody() -> None:
    watch = LagWatch()
    pulses(watch, 0.0, 2.0, 100)
    assert watch.is_overloaded
    assert not watch.is_refusing
    assert watch.lag_s == 2.0
