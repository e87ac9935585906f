"""A streaming answer, from its head to its end: what the compiled exchange reports, and what is done about it.

Owns: the lives of the client's and the upstream's connection while an answer is relayed, and which end it comes to.
Must not know: how the upstream was chosen, routes, tokens' rules. The bytes themselves are moved by `proxyd._relay`.

    upstream whole   -> held bytes, the translator's ending, end mark; upstream to the pool; client kept alive
    upstream broken  -> the dialect's error event at an event boundary, no end mark; both closed
    client gone      -> upstream closed at once; but after the terminal event it was a success: read on, briefly
    deadline         -> as broken (upstream), or closed (client)
    out of tokens    -> as broken, at the event that crossed the line; but after the terminal event it was a success

Invariants: `_settle` runs once (Transaction.finish absorbs the rest) and after it neither connection is touched again;
no callback of the compiled exchange comes after its close().
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from functools import partial
from typing import Protocol

from proxyd._relay import Engine, Exchange
from proxyd._sse import Splitter
from proxyd.dialects.ask import Ask
from proxyd.dialects.errors import error_event
from proxyd.dialects.observer import Observer
from proxyd.dialects.translate import Translator
from proxyd.dialects.usage import Tally, settle
from proxyd.errors import UpstreamErrorKind
from proxyd.front.connection import ClientConnection
from proxyd.front.wheel import NEVER, NOT_PARKED, Wheel
from proxyd.log import Log
from proxyd.relay.deadlines import Due, Limits, Times, decide_due
from proxyd.relay.meter import Meter
from proxyd.relay.outcome import Transaction, error_words
from proxyd.relay.states import Cause, Phase
from proxyd.relay.tap import Tap
from proxyd.upstream.connection import Connection

__all__ = ["HEARTBEAT", "Shared", "Stream"]

HEARTBEAT = b": proxyd\n"
# The synchronous openai-python closes right after [DONE]; the rest of the answer is usually in the next packet. Half
# would throw a connection away on a slow provider; twice keeps a dead client's upstream for nothing.
SINK_S = 1.0
# The terminal event was relayed and the upstream does not end its body: it has nothing to say that a client would read.
# Half could cut a slow trailer; twice keeps clients waiting that read to the end of the body.
AFTER_TERMINAL_S = 3.0
# Between an error event and the close that follows it. A browser drops what its script has not read yet when the
# connection breaks: closed at once, 2 of 3 error events were lost in Chromium, none after 10 ms.
LAST_WORD_S = 0.05

_CAUSE_KINDS = {
    Cause.UPSTREAM_BROKEN: UpstreamErrorKind.BROKEN_BODY,
    Cause.IDLE_TIMEOUT: UpstreamErrorKind.IDLE_TIMEOUT,
    Cause.TOTAL_TIMEOUT: UpstreamErrorKind.TOTAL_TIMEOUT,
}
_MESSAGES = {
    Cause.UPSTREAM_BROKEN: ("api_error", "upstream_broken", "The upstream's answer broke off."),
    Cause.IDLE_TIMEOUT: ("timeout_error", "upstream_timeout", "The upstream stopped answering."),
    Cause.TOTAL_TIMEOUT: ("timeout_error", "upstream_timeout", "The answer took longer than is allowed."),
    Cause.DRAINED: ("overloaded_error", "draining", "This node is restarting; ask again."),
    Cause.REVOKED: ("authentication_error", "session_revoked", "This session was revoked."),
    Cause.QUOTA_EXCEEDED: ("rate_limit_error", "quota_exceeded", "This user's tokens are used up."),
    Cause.INTERNAL: ("api_error", "internal_error", "The answer could not be relayed."),
}


class Shared(Protocol):
    """What all streams of a worker share (the relay service)."""

    engine: Engine
    wheel: Wheel
    log: Log

    def monotonic(self) -> float: ...
    def later(self, seconds: float, callback: Callable[[], None]) -> None: ...
    def on_upstream_end(self, connection: Connection, kind: UpstreamErrorKind | None, detail: str) -> None: ...


class Stream:
    """One answer being relayed; the owner of an Exchange and an entry of the wheel."""

    __slots__ = (
        "_ask", "_cause", "_client", "_detail", "_exchange", "_finishing", "_has_last_word", "_is_sse",
        "_keep_alive", "_limits", "_observer", "_reusable", "_shared", "_sinking", "_tap", "_told_at",
        "_translator", "_upstream", "_upstream_keeps", "_whole", "deadline", "meter", "parked", "transaction",
    )  # fmt: skip

    def __init__(
        self,
        shared: Shared,
        client: ClientConnection,
        upstream: Connection,
        transaction: Transaction,
        observer: Observer | Translator,
        ask: Ask,
        tap: Tap | None,
        limits: Limits,
        *,
        is_sse: bool,
        keep_alive: bool,
        upstream_keeps: bool,
    ) -> None:
        self._shared = shared
        self._client = client
        self._upstream: Connection | None = upstream
        self.transaction = transaction
        self._observer = observer
        self._translator = observer if isinstance(observer, Translator) else None
        self._ask = ask
        self._tap = tap
        self._limits = limits
        self._is_sse = is_sse
        self._keep_alive = keep_alive
        self._upstream_keeps = upstream_keeps
        self._cause: Cause | None = None
        self._detail = ""
        self._whole = False
        self._sinking = False
        self._finishing = False
        self.meter = Meter(transaction, ask, observer, tap)
        self._told_at: float | None = None
        self._has_last_word = False
        self._exchange: Exchange | None = None
        self.deadline = NEVER
        self.parked = NOT_PARKED

    def start(self, exchange: Exchange, head: bytes, initial: bytes) -> None:
        """Begins to relay; the answer may be over when this returns."""
        self._exchange = exchange
        self.transaction.move(Phase.STREAMING)
        self._shared.wheel.add(self, self._shared.monotonic() + min(1.0, self._limits.heartbeat_s or 1.0))
        self.meter.start(exchange)
        exchange.start(head, initial)

    # -- what the compiled exchange reports ----------------------------------------------------------------------

    def on_first(self) -> None:
        self.transaction.first_event()

    def on_mark(self) -> None:
        self._checkpoint()

    def on_tap(self, payload: bytes) -> None:
        if self._tap is not None:
            self._tap.feed(payload)
            if self.meter.is_limited:
                self.meter.on_text(self._tap.text_bytes)

    def on_limited_event(self, name: bytes, data: bytes, flags: int) -> bytes | None:
        """The splitter's on_event where a translator counts the text and there is a line to be seen."""
        frames = self._observer.on_event(name, data, flags)
        self.meter.on_text(self._observer.text_bytes)
        return frames

    def on_complete(self, leftover: int, held: bytes) -> bytes:
        """The upstream's framing is satisfied: it goes back to the pool now, the client gets its end."""
        exchange = self._exchange
        assert exchange is not None
        self._cause = self._cause or Cause.COMPLETE
        self._whole = True
        self._release_upstream(reusable=self._upstream_keeps and leftover == 0)
        if exchange.splitter is not None and exchange.splitter.tail_data is not None:
            self._observer.on_tail(exchange.splitter.tail_data)
        self._finish_observer(clean=True)
        if not self.transaction.is_finished and not self._sinking:
            self.transaction.move(Phase.ENDING)
            self.transaction.secure(self._tally(exchange), self._content())
        if self._translator is not None:
            return self._translator.ending(True)
        return held

    def on_broken(self, error: int, detail: str) -> bytes | None:
        """The upstream failed within the body; None: the client has all of the answer all the same."""
        self._detail = detail or (os.strerror(error) if error else "")
        if self._complete_without_end():
            return None
        return self._break(Cause.UPSTREAM_BROKEN)

    def on_client_gone(self, error: int) -> None:
        """The client closed or reset its side."""
        exchange = self._exchange
        assert exchange is not None
        if self._sinking:
            return
        if self._whole:
            # The answer was read wholly; part of it was never taken, unless only our end mark was.
            if exchange.undelivered:
                self._cause = Cause.CLIENT_GONE
            self._settle()
            return
        if self._cause is None and self._observer.terminal and not exchange.undelivered:
            self._sinking = True
            self._keep_alive = False
            self._client.end_stream(False)
            exchange.sink()
            self._shared.wheel.add(self, self._shared.monotonic() + SINK_S)
            return
        self._cause = self._cause or Cause.CLIENT_GONE
        self._settle()

    def on_drained(self) -> None:
        self._settle()

    def on_failure(self, error: BaseException) -> None:
        """A bug of ours, or an event too large to translate: logged once, both sides closed."""
        self._shared.log.error("relay_failed", request_id=self.transaction.request_id, error=repr(error))
        if self._cause is not None:
            self._whole = False
            self._settle()
            return
        self._end(Cause.INTERNAL)

    # -- deadlines and orders ------------------------------------------------------------------------------------

    def on_deadline(self, now: float) -> None:
        """The wheel's look at the stream: at least once a second."""
        exchange = self._exchange
        if exchange is None or self.transaction.is_finished:
            return
        if self._sinking:
            self._settle()
            return
        if self._observer.terminal and self._cause is None:
            if self._told_at is None:
                self._told_at = now
            elif now - self._told_at >= AFTER_TERMINAL_S:
                self._end(Cause.TOTAL_TIMEOUT)
                return
        times = Times(
            started=self.transaction.started,
            last_read=exchange.last_read_ms / 1000,
            last_write=exchange.last_write_ms / 1000,
            pending=exchange.pending_bytes,
            paused=exchange.is_paused,
            draining_only=self._cause is not None,
        )
        due, look = decide_due(self._limits, times, now)
        self._shared.wheel.add(self, look)
        match due:
            case Due.TOTAL:
                self._end(Cause.TOTAL_TIMEOUT)
            case Due.IDLE:
                self._end(Cause.IDLE_TIMEOUT)
            case Due.SLOW_CLIENT:
                if self._cause in (None, Cause.COMPLETE):
                    self._cause = Cause.SLOW_CLIENT
                self._whole = False
                self._settle()
            case Due.HEARTBEAT:
                if self._is_sse and exchange.at_boundary:
                    exchange.push(HEARTBEAT)
                self._checkpoint()
            case Due.NOTHING:
                self._checkpoint()

    def interrupt(self, cause: Cause) -> bool:
        """Ends the stream from outside: drained or revoked. False: it had come to its own end already."""
        is_running = self._cause is None
        self._end(cause)  # which looks at the same
        return is_running

    def drop(self) -> None:
        """Closes both sides now, without another byte; the row says interrupted."""
        exchange = self._exchange
        if self._cause is None or (self._cause is Cause.COMPLETE and exchange is not None and exchange.pending_bytes):
            self._cause = Cause.DRAINED  # read to its end, but the client has not got it
        self._whole = False
        self._settle()

    # -- ends ----------------------------------------------------------------------------------------------------

    def _end(self, cause: Cause) -> None:
        exchange = self._exchange
        if exchange is None or self._cause is not None:
            return
        exchange.halt()
        if self._complete_without_end():
            exchange.end(b"", True)
        else:
            exchange.end(self._break(cause), False)

    def _complete_without_end(self) -> bool:
        """Whether the terminal event was relayed, so that only the end of the framing is missing: the answer is
        complete, and an error event behind it would be a lie. Then everything is done but to end the exchange."""
        exchange = self._exchange
        assert exchange is not None
        if self._cause is not None or not self._observer.terminal or self._observer.error is not None:
            return False
        self._cause = Cause.COMPLETE
        self._release_upstream(reusable=False)
        self._finish_observer(clean=False)
        self._whole = True
        if not self._sinking:
            self.transaction.move(Phase.ENDING)
            self.transaction.secure(self._tally(exchange), self._content())
        return True

    def _break(self, cause: Cause) -> bytes:
        """What a client is told when its answer cannot go on: an error event where one may stand, else nothing."""
        exchange = self._exchange
        assert exchange is not None
        self._cause = self._cause or cause
        boundary = self._is_sse and exchange.at_boundary
        self._release_upstream(reusable=False)
        self._finish_observer(clean=False)
        if not self.transaction.is_finished:
            self.transaction.move(Phase.ENDING)
        if not boundary or self._sinking:
            return b""
        kind, code, message = _MESSAGES[self._cause]
        self._has_last_word = True
        if self._translator is not None:
            error = {"message": message, "type": kind, "code": code, "param": None}
            return self._translator.error_event(error)
        return error_event(self._ask.route, kind, message, code, self.transaction.request_id)

    def _finish_observer(self, *, clean: bool) -> None:
        exchange = self._exchange
        assert exchange is not None
        if self._finishing:
            return
        self._finishing = True
        meter: Splitter | Tap | None = exchange.splitter
        if self._tap is not None:
            self._tap.finish(self._observer)
            meter = self._tap
        if meter is None:
            self._observer.finish(clean, 0)
        else:
            self._observer.finish(clean, meter.text_bytes, meter.sample)

    def _release_upstream(self, *, reusable: bool) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is None:
            return
        self._shared.on_upstream_end(upstream, _CAUSE_KINDS.get(self._cause) if self._cause else None, self._detail)
        upstream.release(reusable, ended=self._whole)
        self.transaction.release()

    def _checkpoint(self) -> None:
        """Counts so far. A stream whose user is over the line ends here, unless it has its terminal event. A body that
        is no event stream is whole or nothing: it goes on."""
        if self._exchange is None or self.transaction.is_finished or self.meter.look():
            return
        may_be_cut = self._is_sse or (self._tap is not None and self._tap.is_stream)
        if may_be_cut and not self._sinking and not self._observer.terminal:
            self._end(Cause.QUOTA_EXCEEDED)

    def _content(self) -> str:
        """completed, truncated or error: the answer's content. What nobody can read was whole if its framing was."""
        if self._tap is not None and self._tap.is_opaque and self._whole:
            return "completed"
        return self._observer.outcome

    def _tally(self, exchange: Exchange) -> Tally:
        """What to book, once the observer has finished."""
        text_bytes = max(exchange.text_bytes, self._observer.text_bytes)
        return settle(self._observer, self._ask, text_bytes, self.transaction.upstream_status < 400)

    def _settle(self) -> None:
        """The end: both descriptors leave the exchange, the client is kept or closed, the transaction is finished."""
        exchange = self._exchange
        if exchange is None or self.transaction.is_finished:
            return
        self._finish_observer(clean=False)
        self._exchange = None
        self.meter.close()
        exchange.close()
        self._shared.wheel.cancel(self)
        cause = self._cause or Cause.INTERNAL
        self._cause = cause
        transaction = self.transaction
        self._release_upstream(reusable=False)
        transaction.events = exchange.events
        transaction.bytes_in = exchange.bytes_in
        transaction.bytes_out = exchange.bytes_out
        answer = self._content()
        if self._sinking and answer != "error":
            cause, answer = Cause.COMPLETE, "completed"
        if transaction.upstream_status >= 400 and cause is Cause.COMPLETE:
            cause = Cause.REFUSED_BY_UPSTREAM
        tally = self._tally(exchange)
        pipelined = exchange.pipelined
        if not self._sinking:
            if cause in (Cause.SLOW_CLIENT, Cause.CLIENT_GONE):
                self._client.abort()
            elif self._has_last_word:
                self._shared.later(LAST_WORD_S, partial(self._client.end_stream, False))
            else:
                self._client.end_stream(self._keep_alive and self._whole, pipelined)
        transaction.finish(cause, answer, tally, detail=self._detail or error_words(self._observer.error))


def tls_of(connection: Connection) -> ssl.SSLSocket | None:
    """The TLS socket to read through, or None for a plain one."""
    return connection.sock if isinstance(connection.sock, ssl.SSLSocket) else None
