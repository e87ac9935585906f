"""A stream of the relay with everything around it made up: sockets in pairs, a clock, a book, a ticket, a client.

Owns: the fakes and how they are put together. `Stage.turn()` is one turn of the loop; nothing waits.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from proxyd._relay import Engine
from proxyd.access.cookies import Via
from proxyd.access.session import Session
from proxyd.clock import FakeClock
from proxyd.dialects.ask import Outgoing, parse_ask
from proxyd.dialects.base import Route, build, make_observer
from proxyd.front.wheel import Wheel
from proxyd.relay.answer import Answer, decide_way
from proxyd.relay.deadlines import Limits
from proxyd.relay.delivery import Asker, begin_stream
from proxyd.relay.instruments import Instruments
from proxyd.relay.outcome import Transaction
from proxyd.relay.states import Phase
from proxyd.shm.metrics import Metrics
from proxyd.shm.region import Region
from proxyd.wire.framing import Dechunker
from proxyd.wire.head import parse_response_head
from tests.unit.relay.test_compiled_exchange import Loop


class Account:
    """What the tickets of one user share."""

    def __init__(self, limit: int | None, spent: int = 0) -> None:
        self.limit = limit
        self.spent = spent
        self.running: dict[Ticket, int] = {}

    @property
    def left(self) -> int | None:
        return None if self.limit is None else self.limit - self.spent - sum(self.running.values())


class Ticket:
    """access.admission.Ticket as the relay sees it; remembers what it was told, in order."""

    def __init__(self, account: Account, told: list[Any]) -> None:
        self.account = account
        self.told = told

    def progress(self, tokens: int) -> bool:
        self.told.append(("progress", tokens))
        self.account.running[self] = tokens
        left = self.account.left
        return left is None or left >= 0

    def tokens_left(self) -> int | None:
        return self.account.left

    def share(self) -> int | None:
        left, streams = self.account.left, len(self.account.running)
        return left if left is None or streams == 1 else left // (2 * streams)

    def release(self) -> None:
        self.told.append("release")

    def settle(self, tokens: int) -> None:
        self.told.append(("settle", tokens))
        self.account.running.pop(self, None)
        self.account.spent += tokens

    def refund(self) -> None:
        self.told.append("refund")
        self.account.running.pop(self, None)


class Book:
    """Remembers the entries, in the order of all that is told."""

    broken_reason = None

    def __init__(self, told: list[Any]) -> None:
        self.told = told
        self.finals: list[dict[str, Any]] = []

    def new_txn(self) -> int:
        return 1

    def intent(self, *fields: Any) -> None: ...

    def checkpoint(self, txn: int, prompt: int, completion: int, **more: Any) -> None:
        self.told.append(("ending" if more.get("ending") else "checkpoint", prompt, completion))

    def flush(self) -> None:
        self.told.append("flush")

    def final(self, txn: int, user: int, model: int, prompt: int, completion: int, at: float, **more: Any) -> None:
        self.told.append(("final", prompt, completion, more["status"]))
        self.finals.append({"prompt": prompt, "completion": completion, **more})


class Log:
    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def access(self, fields: dict[str, Any]) -> None:
        self.lines.append(fields)

    def error(self, event: str, **fields: Any) -> None:
        raise AssertionError((event, fields))


class Client:
    """The front's connection: its descriptor is one end of a pair."""

    may_keep_alive = True
    date = b"Thu, 01 Jan 1970 00:00:00 GMT"

    def __init__(self, fd: int, told: list[Any]) -> None:
        self.fd = fd
        self.told = told

    def begin_stream(self) -> int:
        return self.fd

    def end_stream(self, keep_alive: bool, leftover: bytes = b"") -> None:
        self.told.append(("client ended", keep_alive))

    def abort(self) -> None:
        self.told.append("client aborted")


class Peer:
    """The upstream's connection."""

    def __init__(self, sock: socket.socket, told: list[Any]) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.told = told

    def release(self, reusable: bool, *, ended: bool = False) -> None:
        self.told.append(("upstream", "kept" if reusable else "closed"))


class Stage:
    """One stream, begun by `begin()`. `told` has what happened, in order."""

    LIMITS = Limits(idle_s=30.0, total_s=300.0, slow_client_s=10.0, heartbeat_s=0.4)

    def __init__(self, account: Account | None = None) -> None:
        self.told: list[Any] = []
        self.clock = FakeClock()
        self.monotonic = self.clock.monotonic
        self.log = Log()
        self.wheel = Wheel(self.clock.monotonic())
        metrics = Metrics(Region.create(3), 0)
        instruments = Instruments(metrics)
        counters = (instruments.events, instruments.bytes, instruments.stalls, instruments.lag)
        self.engine = Engine(Loop(), 65536, 1 << 20, *counters)
        self.engine.now_ms = int(self.clock.monotonic() * 1000)
        self.client, ours = socket.socketpair()
        theirs, self.upstream = socket.socketpair()
        self._sockets = (self.client, ours, theirs, self.upstream)
        for sock in self._sockets:
            sock.setblocking(False)
        self.account = Account(None) if account is None else account
        self.ticket = Ticket(self.account, self.told)
        self.book = Book(self.told)
        self.peer = Peer(theirs, self.told)
        self.front = Client(ours.fileno(), self.told)
        self.prompt = 0
        self.instruments = instruments
        self.later_calls: list[Callable[[], None]] = []
        self.stream: Any = None
        self.reads = True
        self._got = b""

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.later_calls.append(callback)

    def on_upstream_end(self, connection: Any, kind: Any, detail: str) -> None:
        self.told.append(("upstream failed", kind) if kind else "upstream fine")

    def begin(
        self,
        route: Route = Route.CHAT,
        dialect: str = "openai",
        initial: bytes = b"",
        head: bytes = b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n",
        body: bytes = b'{"model":"m","stream":true,"messages":[],"input":"","prompt":"","max_tokens":9}',
        room: int | None = None,
    ) -> Stage:
        """Starts to relay an answer with this head, of which `initial` has come. `room`: the tokens that the user has
        left when the prompt is paid."""
        ask = parse_ask(route, body)
        outgoing: Outgoing = build(ask, dialect, "m", True)  # type: ignore[arg-type]
        observer = make_observer(ask, dialect, outgoing, request_id="req", epoch=1)  # type: ignore[arg-type]
        self.prompt = ask.prompt.tokens(observer.factor)
        if room is not None:
            self.account.limit = self.prompt + room
        transaction = Transaction(
            request_id="req",
            route=route.value,
            session=Session(7, "default", self.account.limit, 0.0, 1e12, None, None, Via.BEARER),
            model_name="m",
            model_id=1,
            is_stream=True,
            peer="",
            started=self.clock.monotonic(),
            prompt_estimate=self.prompt,
            ticket=self.ticket,  # type: ignore[arg-type]
            clock=self.clock,
            book=self.book,
            instruments=self.instruments,
            log=self.log,  # type: ignore[arg-type]
            on_finished=lambda _: self.told.append("finished"),
        )
        for phase in (Phase.CHOOSING, Phase.CONNECTING, Phase.SENDING, Phase.AWAITING):
            transaction.move(phase)
        answer = Answer(parse_response_head(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n"), b"")
        transaction.upstream_status = 200
        way = decide_way(answer, asks_stream=True, translate=outgoing.translate, injected=outgoing.injected)
        asker = Asker(self.front, ask, [], (1, 1), transaction)  # type: ignore[arg-type]
        self.stream, exchange, sent = begin_stream(
            asker,
            self,
            answer,
            way,
            observer,
            outgoing,
            self.peer,
            self.LIMITS,
            4096,  # type: ignore[arg-type]
        )
        self.stream.start(exchange, sent, initial)
        return self

    def turn(self, data: bytes = b"") -> None:
        """The upstream sends, the engine turns."""
        if data:
            self.upstream.send(data)
        self.engine.on_ready()
        if self.reads:
            self._got += self._take()

    def pass_time(self, seconds: float) -> None:
        """The wheel's ticks of so many seconds."""
        for _ in range(round(seconds * 10)):
            self.clock.advance(0.1)
            self.engine.now_ms = int(self.clock.monotonic() * 1000)
            self.wheel.tick(self.clock.monotonic())

    def taken(self) -> bytes:
        """What the client has got since the last time."""
        got, self._got = self._got + self._take(), b""
        return got

    def _take(self) -> bytes:
        data = b""
        try:
            while more := self.client.recv(1 << 20):
                data += more
        except BlockingIOError:
            pass
        return data

    def answered(self) -> tuple[bytes, bool]:
        """The payload that the client got, and whether its framing was completed."""
        data = self.taken()
        reader = Dechunker()
        return reader.feed(data[data.index(b"\r\n\r\n") + 4 :]), reader.done

    def close(self) -> None:
        if self.stream is not None:
            self.stream.drop()
        self.engine.close()
        for sock in self._sockets:
            sock.close()
