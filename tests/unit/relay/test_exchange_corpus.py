"""The provider corpus through the compiled exchange, framed as upstreams frame it and cut at every position.

The oracle is the same bytes through the pure twins (Dechunker, wire.sse.Splitter); both get the dialect's observer.
Bodies up to 6 kB are cut at every position of their framed bytes; the larger ones at random ones.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxyd._frame import BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH
from proxyd._relay import Engine, Exchange
from proxyd._sse import Splitter as CompiledSplitter
from proxyd.shm.metrics import Metrics
from proxyd.shm.region import Region
from proxyd.wire.framing import Dechunker
from proxyd.wire.sse import Splitter as PureSplitter
from tests.corpus_cases import SEED, TWO_WAY_LIMIT, event_stream_cases
from tests.unit.dialects.corpus_runs import Case, accounting, api_cases, assert_accounting, observer_for

CASES = [case for case in api_cases() if case.is_sse]
SMALL = [case for case in CASES if len(case.body) <= TWO_WAY_LIMIT]
LARGE = [case for case in CASES if len(case.body) > TWO_WAY_LIMIT]
HIDING = [case for case in SMALL if case.expected["usage_only_events"]]
OUT = 1 << 22
EVENT = b'data: {"choices":[]}\n\n'
PIECE = 32768  # fits into a socket pair


class Loop:
    """No readiness at all: the test turns the exchange by hand."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...
    def remove_reader(self, fd: int) -> None: ...
    def call_soon(self, callback: Callable[[], None]) -> None: ...


class Owner:
    """What the stream does at a clean end, with the observer of the dialect."""

    def __init__(self, observer: Any) -> None:
        self.observer = observer
        self.exchange: Any = None
        self.leftover = -1
        self.broken = False

    def on_first(self) -> None: ...
    def on_mark(self) -> None: ...
    def on_drained(self) -> None: ...

    def on_complete(self, leftover: int, held: bytes) -> bytes:
        self.leftover = leftover
        if self.exchange.splitter.tail_data is not None:
            self.observer.on_tail(self.exchange.splitter.tail_data)
        self.observer.finish(True, self.exchange.text_bytes)
        return held

    def on_broken(self, error: int, detail: str) -> bytes:
        self.broken = True
        self.observer.finish(False, self.exchange.text_bytes)
        return b""

    def on_failure(self, error: BaseException) -> None:
        raise AssertionError("the exchange failed") from error


class Bench:
    """An engine and two socket pairs, used for one exchange after another."""

    def __init__(self) -> None:
        metrics = Metrics(Region.create(3), 0)
        self.engine = Engine(
            Loop(),
            1 << 20,
            OUT,
            metrics.counter("proxyd_events_relayed_total"),
            metrics.counter("proxyd_bytes_relayed_total"),
            metrics.counter("proxyd_backpressure_events_total", kind="slow_reader"),
            metrics.histogram("proxyd_relay_lag_seconds"),
        )
        self.client, self.ours = socket.socketpair()
        self.theirs, self.upstream = socket.socketpair()
        for sock in (self.client, self.ours, self.theirs, self.upstream):
            sock.setblocking(False)

    def close(self) -> None:
        self.engine.close()
        for sock in (self.client, self.ours, self.theirs, self.upstream):
            sock.close()

    def run(self, observer: Any, kind: int, length: int, pieces: list[bytes], *, end: bool) -> tuple[bytes, Owner, Any]:
        """Relays the pieces, one a turn, and the upstream's end if `end`; payload as the client gets it."""
        owner = Owner(observer)
        splitter = CompiledSplitter(observer.on_event, observer.watch)
        exchange = Exchange(
            self.engine,
            owner,
            self.ours.fileno(),
            self.theirs.fileno(),
            None,
            kind,
            length,
            BODY_CLOSE,
            splitter,
            False,
            4096,
        )
        owner.exchange = exchange
        exchange.start(b"", pieces[0])
        got = self.taken(exchange)
        for piece in pieces[1:]:
            for at in range(0, len(piece), PIECE):
                self.upstream.send(piece[at : at + PIECE])
                exchange.on_upstream_readable()
                got += self.taken(exchange)
        if end:
            self.upstream.close()
            exchange.on_upstream_readable()
            got += self.taken(exchange)
        exchange.close()
        if end or owner.broken:
            self.upstream.close()
            self.theirs.close()
            self.theirs, self.upstream = socket.socketpair()
            self.theirs.setblocking(False)
            self.upstream.setblocking(False)
        return got, owner, splitter

    def taken(self, exchange: Exchange) -> bytes:
        """What the client has been sent; what did not fit into the socket follows as there is room."""
        got = b""
        while True:
            try:
                got += self.client.recv(OUT)
            except BlockingIOError:
                if not exchange.pending_bytes:
                    return got
                self.engine.on_ready()


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def chunked(body: bytes, rng: random.Random) -> bytes:
    """Chunks that know nothing of events: sizes 1 to 90, extensions and upper-case digits now and then."""
    framed = b""
    at = 0
    while at < len(body):
        piece = body[at : at + rng.choice((1, 2, 7, 30, 90, 500))]
        framed += b"%X%b\r\n%b\r\n" % (len(piece), rng.choice((b"", b"", b";a=b", b' ;q="x"')), piece)
        at += len(piece)
    return framed + b"0\r\n" + rng.choice((b"", b"X-Trailer: y\r\n")) + b"\r\n"


def through_twins(case: Case, framed: bytes, *, hide: bool = False) -> tuple[bytes, Any, Any]:
    observer = observer_for(case, hide=hide)
    reader = Dechunker()
    splitter = PureSplitter(observer.on_event, observer.watch)
    out = splitter.feed(reader.feed(framed))
    assert reader.done
    out += splitter.finish()
    if splitter.tail_data is not None:
        observer.on_tail(splitter.tail_data)
    observer.finish(True, splitter.text_bytes)
    return out, observer, splitter


def name_of(case: Case) -> str:
    return case.name


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_framed_bytes_cut_at_every_position_give_the_twins_bytes_and_accounting(case: Case, bench: Bench) -> None:
    framed = chunked(case.body, random.Random(SEED))
    wanted, twin, pure = through_twins(case, framed)
    assert wanted == case.body
    assert_accounting(twin, case.expected)
    known = accounting(twin)
    for cut in range(1, len(framed)):
        observer = observer_for(case)
        got, owner, splitter = bench.run(observer, BODY_CHUNKED, 0, [framed[:cut], framed[cut:]], end=False)
        assert got == wanted, cut
        assert owner.leftover == 0, cut
        assert accounting(observer) == known, cut
        assert (splitter.events, splitter.comments, splitter.text_bytes) == (
            pure.events,
            pure.comments,
            pure.text_bytes,
        ), cut


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_framed_bytes_one_by_one_and_in_random_pieces_give_the_same(case: Case, bench: Bench) -> None:
    rng = random.Random(SEED)
    body = case.body
    runs: list[tuple[int, int, bytes, bool]] = [
        (BODY_CHUNKED, 0, chunked(body, rng), False),
        (BODY_LENGTH, len(body), body, False),
        (BODY_CLOSE, 0, body, True),
    ]
    for kind, length, framed, end in runs:
        ways = [[framed]]
        if len(body) <= TWO_WAY_LIMIT:
            ways.append([framed[at : at + 1] for at in range(len(framed))])
        for _ in range(20):
            points = sorted(rng.sample(range(1, len(framed)), min(6, len(framed) - 1)))
            ways.append([framed[a:b] for a, b in zip([0, *points], [*points, len(framed)], strict=True)])
        for pieces in ways:
            observer = observer_for(case)
            got, owner, splitter = bench.run(observer, kind, length, pieces, end=end)
            assert got == body
            assert not owner.broken
            assert_accounting(observer, case.expected)
            if "sse" in case.expected:
                assert splitter.events == case.expected["sse"]["dispatched_events"]


@pytest.mark.parametrize("case", HIDING, ids=name_of)
def test_hidden_events_are_hidden_whatever_the_cut_of_the_framing(case: Case, bench: Bench) -> None:
    framed = chunked(case.body, random.Random(SEED + 1))
    wanted, twin, _ = through_twins(case, framed, hide=True)
    known = accounting(twin)
    for cut in range(1, len(framed)):
        observer = observer_for(case, hide=True)
        got, _, _ = bench.run(observer, BODY_CHUNKED, 0, [framed[:cut], framed[cut:]], end=False)
        assert got == wanted, cut
        assert accounting(observer) == known, cut


@pytest.mark.parametrize("case", SMALL, ids=name_of)
def test_a_chunked_body_cut_short_is_broken_and_shows_whole_events_only(case: Case, bench: Bench) -> None:
    framed = chunked(case.body, random.Random(SEED + 2))
    for cut in range(1, len(framed) - 1, max(1, len(framed) // 60)):
        observer = observer_for(case)
        got, owner, splitter = bench.run(observer, BODY_CHUNKED, 0, [framed[:cut]], end=True)
        assert owner.broken, cut
        assert owner.leftover == -1, cut
        assert case.body.startswith(got)
        # Nothing of an unfinished block was shown: what was, ends where the splitter stood between two blocks.
        again = PureSplitter(lambda *_: None)
        assert again.feed(got) == got
        assert again.at_boundary
        assert again.events == splitter.events
        assert observer.outcome in ("error", "completed" if observer.terminal else "truncated")


def test_events_before_a_bad_chunk_are_shown_however_the_bytes_are_cut(bench: Bench) -> None:
    case = next(case for case in CASES if case.name == "openai/chat-basic-no-usage.sse")
    good = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (case.body[:300], case.body[300:700]))
    shown = case.body[: case.body[:700].rindex(b"\n\n") + 2]
    for bad in (b"zz\r\n", b"-1\r\n", b"5\r\nhelloX", b"5\n"):
        framed = good + bad + b"5\r\nafter\r\n0\r\n\r\n"
        for cut in range(1, len(framed)):
            got, owner, _ = bench.run(observer_for(case), BODY_CHUNKED, 0, [framed[:cut], framed[cut:]], end=False)
            assert owner.broken, (bad, cut)
            assert got == shown, (bad, cut)


@pytest.mark.parametrize("tail", [b"", b"x", b"\ndata: y\n"])
def test_a_block_released_in_the_turn_that_ends_the_body_is_sent_as_it_was(tail: bytes, bench: Bench) -> None:
    hold = 64 * 1024
    for early in (hold - 20, hold - 1, hold, hold + 1):
        body = EVENT + b"data: " + b"z" * (hold + 6) + tail
        for kind, first in ((BODY_LENGTH, body[:early]), (BODY_CHUNKED, b"%x\r\n%b" % (len(body), body[:early]))):
            last = body[early:] + (b"\r\n0\r\n\r\n" if kind == BODY_CHUNKED else b"")
            observer = observer_for(CASES[0])
            got, owner, _ = bench.run(observer, kind, len(body), [first, last], end=False)
            assert got == body
            assert owner.leftover == 0


@pytest.mark.parametrize("case", event_stream_cases("sse", "wpt"), ids=lambda case: case.path)
def test_the_syntax_cases_pass_the_exchange_whatever_the_cut(case: Any, bench: Bench) -> None:
    rng = random.Random(SEED)
    framed = chunked(case.body, rng)
    small = len(framed) <= 2 * TWO_WAY_LIMIT
    for cut in range(1, len(framed)) if small else [rng.randrange(1, len(framed)) for _ in range(40)]:
        got, owner, splitter = bench.run(
            observer_for(CASES[0]), BODY_CHUNKED, 0, [framed[:cut], framed[cut:]], end=False
        )
        assert got == case.body, cut
        assert owner.leftover == 0, cut
        assert splitter.events == case.expected["sse"]["dispatched_events"], cut
