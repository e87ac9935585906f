"""The compiled exchange stops at the very event that reaches a limit, however the bytes are cut."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxyd._frame import BODY_CLOSE
from proxyd._scan import Watch
from proxyd._sse import Splitter
from proxyd.wire.framing import encode_chunk
from tests.unit.relay.test_compiled_exchange import Owner, Rig, dechunked

WATCH = Watch((b"usage",), (), (b"content",))
LAST_WORD = b"data: over\n\n"
DONE = b"data: [DONE]\n\n"


def block(text: str, end: bytes = b"\n") -> bytes:
    return b"data: " + json.dumps({"content": text}).encode() + end + end


class Ender(Owner):
    """Ends the exchange at its first mark, or lets the first `patience` marks pass."""

    def __init__(self, patience: int = 0, ahead: int = 1) -> None:
        super().__init__()
        self.exchange: Any = None
        self.patience = patience
        self.ahead = ahead
        self.until = 0
        self.marks: list[tuple[int, int]] = []

    def on_mark(self) -> None:
        super().on_mark()
        self.marks.append((self.exchange.events, self.exchange.text_bytes))
        if self.exchange.text_bytes < self.until:
            return
        if len(self.marks) > self.patience:
            self.exchange.halt()
            self.exchange.end(LAST_WORD if self.exchange.at_boundary else b"", False)
        else:
            self.exchange.mark_after(self.ahead)

    def on_drained(self) -> None:
        super().on_drained()
        self.exchange.close()


@pytest.fixture
def rig() -> Iterator[Callable[..., tuple[Rig, Ender]]]:
    made: list[Rig] = []

    def make(patience: int = 0, ahead: int = 1, watch: Watch | None = WATCH, **options: Any) -> tuple[Rig, Ender]:
        if "splitter" not in options:
            options["splitter"] = Splitter(lambda *_: None, watch)
        one = Rig(**options)
        made.append(one)
        owner = Ender(patience, ahead)
        owner.exchange = one.exchange
        # the exchange's owner is given when it is made: this one takes the place of the rig's
        for name in ("first", "mark", "tap", "complete", "broken", "client_gone", "drained", "failure"):
            setattr(one.owner, f"on_{name}", getattr(owner, f"on_{name}"))
        return one, owner

    yield make
    for one in made:
        one.close()


Make = Callable[..., tuple[Rig, Ender]]


def test_the_event_that_reaches_the_limit_is_the_last_of_a_burst(rig: Make) -> None:
    r, owner = rig()
    r.exchange.mark_after(10)
    r.exchange.start(b"", b"")
    r.upstream.send(encode_chunk(b"".join(block("four") for _ in range(100)) + DONE))
    r.turn()
    payload, done = dechunked(r.taken())
    assert payload == block("four") * 3 + LAST_WORD
    assert not done
    assert owner.marks == [(3, 12)]
    assert owner.told == ["first", "mark", "drained"]


def test_a_limit_that_is_reached_exactly_is_reached(rig: Make) -> None:
    r, _ = rig()
    r.exchange.mark_after(8)
    r.exchange.start(b"", encode_chunk(block("four") * 3))
    assert dechunked(r.taken())[0] == block("four") * 2 + LAST_WORD


def test_the_head_leaves_before_the_last_word_even_when_the_first_event_is_the_last(rig: Make) -> None:
    r, owner = rig()
    r.exchange.mark_after(1)
    r.exchange.start(b"HEAD", encode_chunk(block("four") * 3))
    got = r.taken()
    assert got.startswith(b"HEAD")
    assert dechunked(got[4:])[0] == block("four") + LAST_WORD
    assert owner.told == ["first", "mark", "drained"]


def test_a_body_that_became_whole_in_the_same_turn_is_cut_all_the_same(rig: Make) -> None:
    r, owner = rig()
    r.exchange.mark_after(5)
    r.exchange.start(b"", encode_chunk(block("four") * 3 + DONE) + b"0\r\n\r\n")
    assert dechunked(r.taken()) == (block("four") * 2 + LAST_WORD, False)
    assert not [told for told in owner.told if told[0] == "complete"]


def test_an_owner_that_goes_on_at_the_limit_gets_everything_and_the_whole_end(rig: Make) -> None:
    r, owner = rig(patience=99, ahead=6)
    r.exchange.mark_after(6)
    r.exchange.start(b"", encode_chunk(block("four") * 6 + DONE) + b"0\r\n\r\n")
    assert dechunked(r.taken()) == (block("four") * 6 + DONE, True)
    assert owner.marks == [(2, 8), (4, 16), (6, 24)]
    assert owner.told[-2:] == [("complete", 0), "drained"]


def test_the_terminal_event_waits_for_the_owner_where_the_limit_was_passed_in_its_turn(rig: Make) -> None:
    """Its end must be written down before a client can see it: on_complete comes before its bytes leave."""
    r, owner = rig(patience=1, ahead=1000)
    seen: list[bytes] = []
    complete = r.owner.on_complete

    def on_complete(leftover: int, held: bytes) -> bytes:
        seen.append(r.taken())
        return complete(leftover, held)

    r.owner.on_complete = on_complete  # type: ignore[method-assign]
    r.exchange.mark_after(1)
    r.exchange.start(b"", encode_chunk(block("four") * 2 + DONE) + b"0\r\n\r\n")
    assert dechunked(seen[0])[0] == block("four")
    assert dechunked(seen[0] + r.taken()) == (block("four") * 2 + DONE, True)
    assert owner.marks == [(1, 4)]


def test_without_a_limit_marks_come_at_the_end_of_a_turn_each_kilobyte(rig: Make) -> None:
    r, owner = rig(patience=99)
    owner.ahead = 1 << 40
    r.exchange.start(b"", b"")
    r.upstream.send(encode_chunk(block("x" * 100) * 30))
    r.turn()
    assert owner.marks == [(30, 3000)]
    assert len(r.taken()) == len(encode_chunk(block("x" * 100) * 30))


def test_a_limit_far_ahead_leaves_the_marks_where_they_are(rig: Make) -> None:
    r, owner = rig(patience=99, ahead=1 << 40)
    r.exchange.mark_after(1 << 40)
    r.exchange.start(b"", b"")
    for _ in range(4):
        r.upstream.send(encode_chunk(block("x" * 600)))
        r.turn()
    assert owner.marks == [(2, 1200), (4, 2400)]


def test_what_a_translator_counts_stops_it_too(rig: Make) -> None:
    counted = 0

    def on_event(name: bytes, data: bytes, flags: int) -> bytes:
        nonlocal counted
        counted += 4
        if counted >= 10:
            r.exchange.mark_after(0)
        return b"data: %d\n\n" % counted

    r, owner = rig(splitter=Splitter(on_event, None, 1 << 20, 1 << 20))
    r.exchange.mark_after(10)
    r.exchange.start(b"", encode_chunk(block("four") * 50))
    assert dechunked(r.taken())[0] == b"data: 4\n\ndata: 8\n\ndata: 12\n\n" + LAST_WORD
    assert counted == 12
    assert owner.told == ["first", "mark", "drained"]


def test_a_tapped_body_ends_behind_the_piece_that_reached_the_limit(rig: Make) -> None:
    r, owner = rig(splitter=None, tap=True)

    def on_tap(payload: bytes) -> None:
        if payload == b"two":
            r.exchange.mark_after(0)

    r.owner.on_tap = on_tap  # type: ignore[method-assign]
    r.exchange.mark_after(1000)
    r.exchange.start(b"", b"")
    for piece in (b"one", b"two", b"three"):
        r.upstream.send(encode_chunk(piece))
        r.turn()
    assert r.taken() == encode_chunk(b"one") + encode_chunk(b"two")
    assert owner.told == ["first", "mark", "drained"]


def test_a_tapped_body_that_is_whole_is_not_cut(rig: Make) -> None:
    r, owner = rig(splitter=None, tap=True)
    r.owner.on_tap = lambda payload: r.exchange.mark_after(0)  # type: ignore[method-assign]
    r.exchange.mark_after(1000)
    r.exchange.start(b"", encode_chunk(b"all of it") + b"0\r\n\r\n")
    assert dechunked(r.taken()) == (b"all of it", True)
    assert owner.told == ["first", ("complete", 0), "drained"]


def test_a_client_that_is_gone_at_the_limit_ends_it_once(rig: Make) -> None:
    r, owner = rig()
    r.exchange.mark_after(1)
    r.exchange.start(b"", b"")
    r.client.close()
    r.upstream.send(encode_chunk(block("four") * 3))
    r.exchange.on_upstream_readable()
    assert owner.told == ["first", "mark", "gone"]


def test_a_client_that_does_not_read_gets_the_last_word_when_it_does(rig: Make) -> None:
    r, owner = rig(in_kind=BODY_CLOSE, out_kind=BODY_CLOSE, turn=4096, buffer=1 << 20)
    r.exchange.mark_after(200_000)
    r.exchange.start(b"", b"")
    owner.until = 200_000
    for _ in range(200):
        assert r.exchange.text_bytes < 200_000
        r.upstream.send(block("x" * 1000))
        r.turn()
    assert owner.marks[-1] == (200, 200_000)
    assert "drained" not in owner.told
    assert r.exchange.pending_bytes > 0
    got = b""
    while "drained" not in owner.told:
        got += r.taken()
        r.turn()
    got += r.taken()
    assert got == block("x" * 1000) * 200 + LAST_WORD


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("limit", [1, 4, 23, 60])
def test_no_cut_of_the_bytes_moves_the_event_that_is_the_last(rig: Make, end: bytes, limit: int) -> None:
    rng = random.Random(limit)
    texts = ["word " * rng.randint(0, 3) + "\u00e9\U0001f600"[: rng.randint(0, 2)] for _ in range(30)]
    blocks, total, last = [], 0, b""
    for text in texts:
        piece = (b": a comment" + end if rng.random() < 0.2 else b"") + block(text, end)
        blocks.append(piece)
    for piece, text in zip(blocks, texts, strict=True):
        last += piece
        total += len(text.encode())
        if total >= limit:
            break
    body = b"".join(blocks)
    for cut in range(1, len(body), 7):
        r, owner = rig()
        r.exchange.mark_after(limit)
        r.exchange.start(b"", encode_chunk(body[:cut]))
        if "mark" not in owner.told:
            r.upstream.send(encode_chunk(body[cut:]))
            r.turn()
        got = dechunked(r.taken())[0]
        # of a CRLF that was cut in two, the LF goes with what is dropped: CR ends a line as well
        assert got in (last + LAST_WORD, last[:-1] + LAST_WORD), cut
        assert owner.marks == [(last.count(b"data:"), total)]
        r.close()


def test_carriage_returns_alone_and_a_byte_order_mark_lose_nothing(rig: Make) -> None:
    body = b"\xef\xbb\xbf" + block("first", b"\r") + b"\r\r" + block("second", b"\r") + block("third", b"\n")
    for cut in range(1, len(body)):
        r, owner = rig(patience=99, ahead=1)
        r.exchange.mark_after(1)
        r.exchange.start(b"", encode_chunk(body[:cut]))
        r.upstream.send(encode_chunk(body[cut:]) + b"0\r\n\r\n")
        r.turn()
        assert dechunked(r.taken()) == (body, True), cut
        assert owner.marks == [(1, 5), (2, 11), (3, 16)], cut
        r.close()


def test_an_event_that_was_let_go_in_part_is_ended_before_the_limit_is_looked_at(rig: Make) -> None:
    r, owner = rig(splitter=Splitter(lambda *_: None, WATCH, 1 << 20, 64))
    r.exchange.mark_after(1)
    r.exchange.start(b"", b"")
    body = block("x" * 300) + block("next")
    for at in range(0, len(body), 50):
        if "mark" in owner.told:
            break
        r.upstream.send(encode_chunk(body[at : at + 50]))
        r.turn()
    assert dechunked(r.taken())[0] == block("x" * 300) + LAST_WORD
    assert owner.marks == [(1, 300)]


def test_replaced_blocks_that_were_kept_are_sent_before_the_next_one_is_read(rig: Make) -> None:
    """A block of an earlier turn, then whole ones, then a part of one that is let go: each from its own memory."""
    verdicts = iter([b"data: new\n\n", None, b"", None, None, None])
    r, owner = rig(splitter=Splitter(lambda *_: next(verdicts), WATCH, 1 << 20, 128), patience=99, ahead=1)
    r.exchange.mark_after(1)
    r.exchange.start(b"", b"")
    usage = b'data: {"usage":{},"content":"a"}\n\n'
    body = usage + usage + usage + b'data: {"usage":{},"content":"' + b"y" * 400 + b'"}\n\n'
    r.upstream.send(encode_chunk(body[:20]))
    r.turn()
    r.upstream.send(encode_chunk(body[20:-5]))
    r.turn()
    r.upstream.send(encode_chunk(body[-5:]) + b"0\r\n\r\n")
    r.turn()
    payload, done = dechunked(r.taken())
    assert payload == b"data: new\n\n" + usage + body[len(usage) * 3 :]
    assert done
    assert [told for told in owner.told if told != "mark"] == ["first", ("complete", 0), "drained"]
