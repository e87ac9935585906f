"""The compiled exchange on socket pairs, with a loop of our own that is turned by hand."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from proxyd._frame import BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH
from proxyd._relay import Engine, Exchange
from proxyd._sse import Splitter
from proxyd.shm.metrics import Metrics
from proxyd.shm.region import Region
from proxyd.wire.framing import Dechunker, encode_chunk


class Loop:
    """What the engine asks of a loop; readiness is turned by hand."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.soon: list[Callable[[], None]] = []

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None:
        self.readers[fd] = callback

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)


class Owner:
    """Remembers what it was told; answers with `ending` and `apology`."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.ending = b""
        self.apology = b""
        self.tapped = b""

    def on_first(self) -> None:
        self.told.append("first")

    def on_mark(self) -> None:
        self.told.append("mark")

    def on_tap(self, payload: bytes) -> None:
        self.tapped += payload

    def on_complete(self, leftover: int, held: bytes) -> bytes:
        self.told.append(("complete", leftover))
        return held + self.ending

    def on_broken(self, error: int, detail: str) -> bytes:
        self.told.append("broken")
        return self.apology

    def on_client_gone(self, error: int) -> None:
        self.told.append("gone")

    def on_drained(self) -> None:
        self.told.append("drained")

    def on_failure(self, error: BaseException) -> None:
        self.told.append(("failure", repr(error)))


class Rig:
    """An exchange between two socket pairs."""

    def __init__(
        self,
        *,
        in_kind: int = BODY_CHUNKED,
        in_length: int = 0,
        out_kind: int = BODY_CHUNKED,
        splitter: Splitter | None = None,
        tap: bool = False,
        turn: int = 65536,
        buffer: int = 262144,
    ) -> None:
        self.loop = Loop()
        self.owner = Owner()
        metrics = Metrics(Region.create(3), 0)
        self.engine = Engine(
            self.loop,
            turn,
            buffer,
            metrics.counter("proxyd_events_relayed_total"),
            metrics.counter("proxyd_bytes_relayed_total"),
            metrics.counter("proxyd_backpressure_events_total", kind="slow_reader"),
            metrics.histogram("proxyd_relay_lag_seconds"),
        )
        self.client, ours = socket.socketpair()
        theirs, self.upstream = socket.socketpair()
        self._keep = (ours, theirs)
        for sock in (ours, theirs, self.client, self.upstream):
            sock.setblocking(False)
        self.exchange = Exchange(
            self.engine,
            self.owner,
            ours.fileno(),
            theirs.fileno(),
            None,
            in_kind,
            in_length,
            out_kind,
            splitter,
            tap,
            4096,
        )

    def turn(self) -> None:
        """One batch of ready descriptors."""
        self.engine.on_ready()

    def taken(self) -> bytes:
        data = b""
        try:
            while more := self.client.recv(1 << 20):
                data += more
        except BlockingIOError:
            pass
        return data

    def close(self) -> None:
        self.exchange.close()
        for sock in (*self._keep, self.client, self.upstream):
            sock.close()


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def dechunked(data: bytes) -> tuple[bytes, bool]:
    reader = Dechunker()
    return reader.feed(data), reader.done


EVENT = b'data: {"x":1}\n\n'


def test_head_and_first_bytes_leave_in_one_piece(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"HEAD\r\n\r\n", encode_chunk(EVENT))
    assert r.taken() == b"HEAD\r\n\r\n" + encode_chunk(EVENT)
    assert r.owner.told == ["first"]


def test_a_head_without_body_bytes_is_sent_at_once(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"HEAD\r\n\r\n", b"")
    assert r.taken() == b"HEAD\r\n\r\n"


def test_one_turn_is_one_recv_and_one_send(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"H", b"")
    r.taken()
    r.upstream.send(encode_chunk(EVENT) * 3)
    r.turn()
    assert r.taken() == encode_chunk(EVENT * 3)


def test_the_last_bytes_and_the_end_mark_leave_together_and_the_owner_hears_once(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.owner.ending = b"more"
    r.exchange.start(b"", b"")
    r.upstream.send(encode_chunk(EVENT) + b"0\r\n\r\n")
    r.turn()
    assert r.taken() == encode_chunk(EVENT + b"more") + b"0\r\n\r\n"
    assert [told for told in r.owner.told if told != "first"] == [("complete", 0), "drained"]


def test_bytes_behind_the_end_are_counted_so_that_the_connection_is_not_reused(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", encode_chunk(EVENT) + b"0\r\n\r\nstray")
    assert ("complete", 5) in r.owner.told


@pytest.mark.parametrize("cut", ["eof", "half"])
def test_a_broken_upstream_gets_the_owners_apology_and_no_end_mark(rig: Callable[..., Rig], cut: str) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.owner.apology = b"data: sorry\n\n"
    r.exchange.start(b"", b"")
    r.upstream.send(encode_chunk(EVENT))
    if cut == "half":
        r.upstream.send(b"20\r\ndata: {")
    r.turn()
    r.upstream.close()
    r.turn()
    payload, done = dechunked(r.taken())
    assert payload == EVENT + b"data: sorry\n\n"
    assert not done
    assert r.owner.told[-2:] == ["broken", "drained"]


def test_a_close_delimited_body_ends_cleanly_with_its_held_bytes(rig: Callable[..., Rig]) -> None:
    r = rig(in_kind=BODY_CLOSE, splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", b"")
    r.upstream.send(EVENT + b"data: tail")
    r.turn()
    r.upstream.close()
    r.turn()
    assert dechunked(r.taken()) == (EVENT + b"data: tail", True)


def test_a_length_is_kept_when_nothing_is_split(rig: Callable[..., Rig]) -> None:
    r = rig(in_kind=BODY_LENGTH, in_length=10, out_kind=BODY_LENGTH, tap=True)
    r.exchange.start(b"H", b"01234")
    r.upstream.send(b"56789")
    r.turn()
    assert r.taken() == b"H0123456789"
    assert r.owner.tapped == b"0123456789"
    assert r.owner.told == ["first", ("complete", 0), "drained"]


def test_what_the_client_does_not_take_is_kept_and_then_the_upstream_is_not_read(rig: Callable[..., Rig]) -> None:
    r = rig(in_kind=BODY_CLOSE, out_kind=BODY_CLOSE, turn=4096, buffer=16384)
    r.exchange.start(b"", b"")
    sent = b""
    rng = random.Random(1)
    while not r.exchange.is_paused:
        piece = rng.randbytes(4096)
        r.upstream.send(piece)
        sent += piece
        r.turn()
        assert r.exchange.pending_bytes <= 16384
    assert r.exchange.stalls == 1
    got = b""
    while len(got) < len(sent):
        got += r.taken()
        r.turn()
    assert got == sent
    assert not r.exchange.is_paused


def test_a_pushed_comment_is_a_chunk_of_its_own_and_impossible_under_a_length(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", b"")
    assert r.exchange.at_boundary
    assert r.exchange.push(b": x\n")
    assert r.taken() == encode_chunk(b": x\n")
    fixed = rig(in_kind=BODY_LENGTH, in_length=3, out_kind=BODY_LENGTH)
    fixed.exchange.start(b"", b"")
    assert not fixed.exchange.push(b": x\n")


def test_an_unfinished_event_is_held_so_that_the_client_is_always_at_a_boundary(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", encode_chunk(EVENT + b"data: {"))
    assert dechunked(r.taken())[0] == EVENT
    assert r.exchange.at_boundary


def test_a_client_that_closes_is_told_once_and_nothing_comes_after_close(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", b"")
    r.client.close()
    r.turn()
    r.turn()
    assert r.owner.told == ["gone"]
    r.exchange.close()
    r.upstream.send(encode_chunk(EVENT))
    r.turn()
    assert r.owner.told == ["gone"]


def test_pipelined_bytes_are_kept_up_to_the_bound_and_an_end_behind_them_is_still_seen(
    rig: Callable[..., Rig],
) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    r.exchange.start(b"", b"")
    r.client.send(b"GET / HTTP/1.1\r\n")
    r.turn()
    assert r.exchange.pipelined == b"GET / HTTP/1.1\r\n"
    r.client.send(b"x" * 5000)
    r.turn()
    r.client.send(b"y" * 5000)
    r.turn()
    assert len(r.exchange.pipelined) == 5016
    assert r.owner.told == []
    r.client.close()
    r.turn()
    assert r.owner.told == ["gone"]


def test_a_reset_that_comes_with_data_is_seen_after_the_data(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    ours.setblocking(False)
    exchange = Exchange(
        r.engine, r.owner, r._keep[0].fileno(), ours.fileno(), None, BODY_CHUNKED, 0, BODY_CHUNKED, None, False, 4096
    )
    exchange.start(b"", b"")
    theirs.send(encode_chunk(EVENT))
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()
    for _ in range(10):
        r.turn()
    assert dechunked(r.taken())[0] == EVENT
    assert r.owner.told == ["first", "broken", "drained"]
    exchange.close()
    ours.close()


def test_an_exchange_closed_by_an_earlier_event_of_the_same_batch_gets_none_itself(rig: Callable[..., Rig]) -> None:
    r = rig(splitter=Splitter(lambda *_: None))
    others = []
    for _ in range(8):
        pairs = (*socket.socketpair(), *socket.socketpair())
        one = Exchange(
            r.engine, r.owner, pairs[0].fileno(), pairs[2].fileno(), None, BODY_CLOSE, 0, BODY_CLOSE, None, False, 64
        )
        one.start(b"", b"")
        pairs[3].send(encode_chunk(EVENT))
        others.append((one, pairs))

    def close_all() -> None:
        while others:
            one, pairs = others.pop()
            one.close()
            for sock in pairs:
                sock.close()

    r.owner.on_first = close_all  # type: ignore[method-assign]
    r.turn()
    r.turn()
    assert not others


def test_a_raising_callback_reaches_the_owner_and_not_the_loop(rig: Callable[..., Rig]) -> None:
    def angry(*_: object) -> None:
        raise RuntimeError("bug")

    r = rig(splitter=Splitter(angry))
    r.exchange.start(b"", encode_chunk(EVENT))
    assert r.owner.told == [("failure", "RuntimeError('bug')")]


def test_replaced_and_dropped_events_leave_in_one_chunk_with_their_neighbours(rig: Callable[..., Rig]) -> None:
    verdicts = iter([None, b"", b"data: new\n\n", None])
    r = rig(splitter=Splitter(lambda *_: next(verdicts)))
    r.exchange.start(b"", b"")
    r.upstream.send(encode_chunk(b"data: a\n\ndata: b\n\ndata: c\n\ndata: d\n\n"))
    r.turn()
    assert r.taken() == encode_chunk(b"data: a\n\ndata: new\n\ndata: d\n\n")


def test_every_cut_of_the_framing_gives_the_same_bytes(rig: Callable[..., Rig]) -> None:
    body = b"".join(b'data: {"n":%d}\n\n' % n for n in range(40))
    rng = random.Random(7)
    framed = b""
    at = 0
    while at < len(body):
        size = rng.randint(1, 60)
        framed += b"%X;ext=1\r\n%b\r\n" % (len(body[at : at + size]), body[at : at + size])
        at += size
    framed += b"0\r\nTrailer: x\r\n\r\n"
    for cut in range(1, len(framed), 3):
        r = rig(splitter=Splitter(lambda *_: None))
        r.exchange.start(b"", framed[:cut])
        r.upstream.send(framed[cut:])
        r.turn()
        assert dechunked(r.taken()) == (body, True), cut
        r.close()
