"""The provider corpus through splitter and observer: the accounting of expected.json, however the bytes are cut."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from proxyd._sse import Splitter as CompiledSplitter
from proxyd.dialects.base import SSE, inflater, media_kind
from proxyd.wire.sse import Splitter as PureSplitter
from tests.corpus_cases import CORPUS, cuts
from tests.unit.dialects.corpus_runs import (
    Case,
    accounting,
    api_cases,
    assert_accounting,
    case_named,
    observer_for,
    run,
)

SSE_CASES = [case for case in api_cases() if case.is_sse]
BODY_CASES = [case for case in api_cases() if not case.is_sse]
SMALL = 6000
BUILDS = {"compiled": CompiledSplitter, "pure": PureSplitter}


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", SSE_CASES, ids=name_of)
def test_a_case_is_accounted_as_expected_with_only_the_watched_events_reported(case: Case, build: str) -> None:
    observer = observer_for(case)
    out, splitter = run(BUILDS[build], observer, [case.body], clean=True)
    assert out == case.body
    assert_accounting(observer, case.expected)
    if "sse" in case.expected:
        assert splitter.events == case.expected["sse"]["dispatched_events"]


@pytest.mark.parametrize("case", SSE_CASES, ids=name_of)
def test_a_case_is_accounted_as_expected_with_every_event_reported(case: Case) -> None:
    observer = observer_for(case)
    run(CompiledSplitter, observer, [case.body], clean=True, watched=False)
    assert_accounting(observer, case.expected)


@pytest.mark.parametrize("case", SSE_CASES, ids=name_of)
def test_no_cut_of_the_bytes_changes_the_accounting(case: Case) -> None:
    for _, chunks in cuts(case.body):
        observer = observer_for(case)
        out, _ = run(CompiledSplitter, observer, chunks, clean=True)
        assert out == case.body
        assert_accounting(observer, case.expected)


@pytest.mark.parametrize("case", [case for case in SSE_CASES if len(case.body) <= SMALL], ids=name_of)
def test_the_pure_splitter_gives_the_same_accounting_byte_by_byte(case: Case) -> None:
    observer = observer_for(case)
    run(PureSplitter, observer, [case.body[at : at + 1] for at in range(len(case.body))], clean=True)
    assert_accounting(observer, case.expected)


@pytest.mark.parametrize("case", BODY_CASES, ids=name_of)
def test_an_answer_that_is_no_event_stream_is_accounted_as_expected(case: Case) -> None:
    observer = observer_for(case)
    observer.on_body(case.expected["content_type"], case.expected["http_status"], case.body)
    observer.finish(True, 0)
    assert_accounting(observer, case.expected)


# --- hiding ------------------------------------------------------------------------------------------------------


def events_of(body: bytes) -> list[bytes]:
    """The data of every dispatched event."""
    data_of_all: list[bytes] = []

    def keep(name: bytes, data: bytes, flags: int) -> None:
        if not flags & 4:  # an `error:` field is no event
            data_of_all.append(data)

    CompiledSplitter(keep).feed(body)
    return data_of_all


@pytest.mark.parametrize("case", [case for case in SSE_CASES if case.route.value.endswith("completions")], ids=name_of)
def test_exactly_the_usage_only_events_are_hidden_when_usage_was_injected(case: Case) -> None:
    before = events_of(case.body)
    after = [data for at, data in enumerate(before) if at not in case.expected["usage_only_events"]]
    plain = observer_for(case)
    run(CompiledSplitter, plain, [case.body], clean=True)
    for build in BUILDS.values():
        for chunks in ([case.body], [case.body[at : at + 1] for at in range(len(case.body))]):
            hiding = observer_for(case, hide=True)
            out, _ = run(build, hiding, chunks, clean=True)
            assert events_of(out) == after
            assert accounting(hiding) == accounting(plain)
            if len(case.body) > SMALL:
                break


# --- early ends --------------------------------------------------------------------------------------------------


def boundaries(body: bytes) -> list[int]:
    """Where a complete event ends."""
    ends: list[int] = []
    splitter = CompiledSplitter(lambda name, data, flags: None)
    events = 0
    for at in range(len(body)):
        splitter.feed(body[at : at + 1])
        if splitter.events != events:
            events = splitter.events
            ends.append(at + 1)
    return ends


def early_ends(case: Case) -> list[tuple[int, bytes]]:
    ends = boundaries(case.body)
    if len(ends) > 50:
        ends = ends[:5] + ends[-5:]
    return [(at, case.body[:end]) for at, end in enumerate(ends, 1)]


@pytest.mark.parametrize("case", SSE_CASES, ids=name_of)
def test_a_stream_that_breaks_between_events_is_accounted_for_what_it_had(case: Case) -> None:
    for at, prefix in early_ends(case):
        watched, full = observer_for(case), observer_for(case)
        run(CompiledSplitter, watched, [prefix], clean=False)
        run(CompiledSplitter, full, [prefix], clean=False, watched=False)
        found, wanted = accounting(watched), accounting(full)
        if case.name == "compat/azure-content-filter.sse" and at in (2, 3):
            # the first event names no model and plain deltas are not looked at: known from the finish chunk on
            assert found.pop("model") is None
            wanted.pop("model")
        assert found == wanted
        if watched.error is not None:
            assert watched.outcome == "error"
        elif watched.terminal:
            assert watched.outcome == "completed"
        else:
            assert watched.outcome == "truncated"
            assert watched.usage_source in ("none", "provider_partial")


@pytest.mark.parametrize("case", [case for case in SSE_CASES if case.name.startswith("anthropic/")], ids=name_of)
def test_the_placeholder_of_message_start_is_never_booked(case: Case) -> None:
    for _, prefix in early_ends(case):
        if b"message_delta" in prefix:
            break
        observer = observer_for(case)
        run(CompiledSplitter, observer, [prefix], clean=False)
        assert observer.usage.completion is None
        if b"message_start" in prefix:
            assert observer.usage.prompt is not None


@pytest.mark.parametrize(("events", "completion"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4), (7, 5)])
def test_running_counts_of_several_choices_are_added_up_when_the_stream_breaks(events: int, completion: int) -> None:
    case = case_named("compat/vllm-continuous-n2-truncated.sse")
    observer = observer_for(case)
    run(CompiledSplitter, observer, [dict(early_ends(case))[events]], clean=False)
    assert (observer.usage.prompt, observer.usage.completion) == (10, completion)


def test_a_clean_end_without_done_is_complete_only_when_every_seen_choice_finished() -> None:
    case = case_named("openai/chat-n2.sse")
    outcomes = []
    for _, prefix in early_ends(case):
        observer = observer_for(case)
        run(CompiledSplitter, observer, [prefix], clean=True)
        outcomes.append(observer.outcome)
    assert outcomes == ["truncated"] * 6 + ["completed"] * 3


# --- encoded -----------------------------------------------------------------------------------------------------


def encoded() -> list[dict[str, Any]]:
    return [case.expected for case in api_cases() if "content_encoding" in case.expected]


@pytest.mark.parametrize("expected", encoded(), ids=lambda expected: expected["file"])
@pytest.mark.parametrize("size", [1, 7, 100000])
def test_an_encoded_stream_is_accounted_from_an_inflated_copy(expected: dict[str, Any], size: int) -> None:
    body = (CORPUS / expected["file"]).read_bytes()
    decoder = inflater(expected["content_encoding"])
    assert decoder is not None
    assert media_kind(expected["content_type"]) is SSE
    copy = [decoder.feed(body[at : at + size]) for at in range(0, len(body), size)]
    while decoder.more:
        copy.append(decoder.feed(b""))
    assert b"".join(copy) == zlib.decompress(body, 47)
    observer = observer_for(case_named(expected["file"]))
    run(CompiledSplitter, observer, copy, clean=True)
    assert_accounting(observer, expected)


# --- the hot path ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "most"),
    [
        ("openai/chat-burst-2000-events.sse", 3),
        ("openai/chat-include-usage.sse", 4),
        ("openai/chat-utf8-cuts.sse", 4),
        ("anthropic/cache-tokens.sse", 3),
        ("openai/responses-completed.sse", 2),
    ],
)
def test_plain_deltas_are_never_reported(name: str, most: int) -> None:
    case = case_named(name)
    calls: list[bytes] = []
    observer = observer_for(case)
    CompiledSplitter(lambda name, data, flags: calls.append(data), observer.watch).feed(case.body)
    assert len(calls) <= most
