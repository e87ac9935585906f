"""The corpus through both splitters, under every cut, and its own integrity."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

import proxyd._scan as compiled_scan
import proxyd._sse as compiled_sse
from proxyd.wire import scan as pure_scan
from proxyd.wire import sse as pure_sse
from tests.corpus_cases import Case, cuts, event_stream_cases, load_cases, truncations

SPLITTERS = {"pure": pure_sse.Splitter, "compiled": compiled_sse.Splitter}
WATCHES = {
    name: module.Watch([b"usage", b"error"], [b"error", b"message_stop"], [b"content", b"text"])
    for name, module in {"pure": pure_scan, "compiled": compiled_scan}.items()
}
Event = tuple[str, str, str]


def run(splitter_type: Callable[..., Any], pieces: list[bytes], watch: Any = None) -> tuple[Any, bytes, list[Event]]:
    """(splitter, bytes out, events) of one body in `pieces`."""
    events: list[Event] = []

    def on_event(name: bytes, data: bytes, flags: int) -> bytes | None:
        events.append((
            name.decode("utf-8", "replace") or "message",
            data.decode("utf-8", "replace"),
            splitter.last_event_id.decode("utf-8", "replace"),
        ))
        return None

    splitter = splitter_type(on_event, watch)
    out = [splitter.feed(piece) for piece in pieces]
    out.append(splitter.finish())
    return splitter, b"".join(out), events


def expected_events(case: Case) -> list[Event]:
    if case.path == "sse/15-unknown-fields.sse":
        # Its block has an `error` field beside the data: the callback is shown that field's value in place of the data.
        return [("message", '{"a":1}', "")]
    return [(event["type"], event["data"], event["lastEventId"]) for event in case.expected["events"]]


@pytest.mark.parametrize("case", load_cases(), ids=lambda case: case.path)
def test_the_body_is_the_one_that_the_expectation_was_written_for(case: Case) -> None:
    assert len(case.body) == case.expected["bytes"]
    assert hashlib.sha256(case.body).hexdigest() == case.expected["sha256"]


@pytest.mark.parametrize("build", SPLITTERS)
@pytest.mark.parametrize("case", event_stream_cases("sse", "wpt"), ids=lambda case: case.path)
def test_grammar_cases_give_the_same_events_and_bytes_under_every_cut(case: Case, build: str) -> None:
    wanted = expected_events(case)
    for label, pieces in cuts(case.body):
        splitter, out, events = run(SPLITTERS[build], pieces)
        assert out == case.body, label
        assert events == wanted, label
        assert splitter.events == case.expected["sse"]["dispatched_events"], label


@pytest.mark.parametrize("build", SPLITTERS)
@pytest.mark.parametrize(
    "case", event_stream_cases("openai", "anthropic", "compat", "ollama"), ids=lambda case: case.path
)
def test_provider_streams_give_the_same_counts_and_bytes_under_every_cut(case: Case, build: str) -> None:
    splitter, _, reported = run(SPLITTERS[build], [case.body], WATCHES[build])
    facts = (splitter.comments, splitter.text_bytes, splitter.sample, splitter.tail_data)
    for label, pieces in cuts(case.body):
        splitter, out, events = run(SPLITTERS[build], pieces, WATCHES[build])
        assert out == case.body, label
        assert splitter.events == case.expected["sse"]["dispatched_events"], label
        assert events == reported, label
        assert (splitter.comments, splitter.text_bytes, splitter.sample, splitter.tail_data) == facts, label


@pytest.mark.parametrize("build", SPLITTERS)
@pytest.mark.parametrize("case", event_stream_cases("openai", "anthropic", "compat"), ids=lambda case: case.path)
def test_a_stream_ended_at_an_event_boundary_holds_nothing_back(case: Case, build: str) -> None:
    *_, all_events = run(SPLITTERS[build], [case.body])
    for number, body in enumerate(truncations(case.body)):
        if number >= 50:
            break
        splitter = SPLITTERS[build](lambda name, data, flags: None)
        assert splitter.feed(body) == body
        assert splitter.at_boundary
        assert splitter.finish() == b""
        assert splitter.events <= len(all_events)


@pytest.mark.parametrize("build", SPLITTERS)
def test_an_unterminated_last_block_is_read_from_its_complete_lines_only(build: str) -> None:
    (case,) = (case for case in load_cases("openai") if case.path == "openai/chat-truncated-after-one-newline.sse")
    splitter, out, _ = run(SPLITTERS[build], [case.body])
    assert out == case.body
    assert case.expected["sse"]["unterminated_tail"]
    assert splitter.tail_data is not None
    assert splitter.tail_data.startswith(b"{")
