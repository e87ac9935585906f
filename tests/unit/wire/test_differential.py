"""The compiled splitter against its pure twin: any bytes, any cut, any verdicts."""
from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import proxyd._scan as compiled_scan
import proxyd._sse as compiled_sse
from proxyd.wire import scan as pure_scan
from proxyd.wire import sse as pure_sse

PIECES = st.sampled_from([
    b"data:", b"data: ", b"data", b"event: ", b"event:error", b"id: ", b"id", b"retry: 5", b"retry:", b"error: ",
    b"error", b":", b": comment", b"\r", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\xef\xbb\xbf", b"\xef",
    b"\x00", b" ",
    b"x", b"[DONE]", b"{", b"}", b'{"usage":{}}', b'{"usage":null}', b'{"content":"abc\\u00e9"}', b'"', b"\\",
    b"\xc3\xa9",
]) | st.binary(max_size=2)
BODY = st.lists(PIECES, max_size=40).map(b"".join)
VERDICTS = st.lists(st.sampled_from([None, None, b"", b"data: new\n\n", b"X\r\n"]), min_size=1, max_size=6)
WATCH = ([b"usage", b"error"], [b"message_stop"], [b"content"])


def record(
    sse: Any, scan: Any, pieces: list[bytes], verdicts: list[bytes | None], watched: bool, sizes: tuple[int, int] | None
) -> dict[str, Any]:
    """Everything that can be observed of a splitter while it takes `pieces`; a refusal ends it."""
    calls: list[tuple[bytes, bytes, int, bytes]] = []

    def on_event(name: bytes, data: bytes, flags: int) -> bytes | None:
        calls.append((name, data, flags, splitter.last_event_id))
        return verdicts[(len(calls) - 1) % len(verdicts)]

    watch = scan.Watch(*WATCH) if watched else None
    splitter = sse.Splitter(on_event, watch, *(sizes or ()))
    out: list[bytes] = []
    boundaries: list[bool] = []
    try:
        for piece in pieces:
            out.append(splitter.feed(piece))
            boundaries.append(splitter.at_boundary)
    except ValueError:
        return {"refused": True}
    out.append(splitter.finish())
    return {
        "out": b"".join(out),
        "feeds": out,
        "boundaries": boundaries,
        "ended at a boundary": splitter.at_boundary,
        "calls": calls,
        "events": splitter.events,
        "text_bytes": splitter.text_bytes,
        "sample": splitter.sample,
        "last_event_id": splitter.last_event_id,
        "tail_data": splitter.tail_data,
        # What an oversize block says in its unread part is looked at or not, as the cut has it.
        "comments": None if sizes else splitter.comments,
        "retry": None if sizes else splitter.retry,
    }


def cut(body: bytes, points: list[float]) -> list[bytes]:
    edges = sorted({0, len(body), *(int(point * len(body)) for point in points)})
    return [body[start:end] for start, end in pairwise(edges)]


CUT_POINTS = st.lists(st.floats(0, 1, exclude_max=True), max_size=12)


@settings(max_examples=2000, deadline=None)
@given(BODY, CUT_POINTS, VERDICTS, st.booleans())
def test_both_builds_do_the_same_with_any_bytes(
    body: bytes, points: list[float], verdicts: list[bytes | None], watched: bool
) -> None:
    pieces = cut(body, points)
    pure = record(pure_sse, pure_scan, pieces, verdicts, watched, None)
    assert record(compiled_sse, compiled_scan, pieces, verdicts, watched, None) == pure


@settings(max_examples=2000, deadline=None)
@given(BODY, CUT_POINTS, VERDICTS, st.booleans(), st.sampled_from([(40, 12), (24, 24), (12, 1), (30, 0), (10, 40)]))
def test_both_builds_do_the_same_at_their_bounds(
    body: bytes, points: list[float], verdicts: list[bytes | None], watched: bool, sizes: tuple[int, int]
) -> None:
    pieces = cut(body, points)
    pure = record(pure_sse, pure_scan, pieces, verdicts, watched, sizes)
    assert record(compiled_sse, compiled_scan, pieces, verdicts, watched, sizes) == pure


@settings(max_examples=500, deadline=None)
@given(BODY, CUT_POINTS, VERDICTS, st.booleans(), st.sampled_from([None, (40, 12), (24, 24), (12, 1)]))
def test_no_cut_changes_what_comes_out(
    body: bytes, points: list[float], verdicts: list[bytes | None], watched: bool, sizes: tuple[int, int] | None
) -> None:
    whole = record(pure_sse, pure_scan, [body], verdicts, watched, sizes)
    other = record(pure_sse, pure_scan, cut(body, points), verdicts, watched, sizes)
    for each in (whole, other):
        each.pop("feeds", None)
        each.pop("boundaries", None)
        if sizes:
            # finish() gives held bytes out: fewer when they were released before, but all in `out`.
            each.pop("ended at a boundary", None)
    assert other == whole


@settings(max_examples=500, deadline=None)
@given(BODY, CUT_POINTS, st.booleans())
def test_without_verdicts_the_bytes_out_are_the_bytes_in(body: bytes, points: list[float], watched: bool) -> None:
    for sse, scan in ((pure_sse, pure_scan), (compiled_sse, compiled_scan)):
        assert record(sse, scan, cut(body, points), [None], watched, None)["out"] == body
