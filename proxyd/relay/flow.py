"""One request from its admission to its first relayed byte.

Owns: the walk through the upstreams, the retry rules, and what is answered where no stream comes of it. The only part
of the relay that is a task; from the first relayed byte on there are callbacks only (`exchange`).
Must not know: how connections are made, what a dialect's bytes mean.

    CHOOSING -> acquire -> CONNECTING -> send -> SENDING -> head -> AWAITING -> stream | collect and reply

Retries (SAFETY, "Upstream faults")
- Nothing of the request was sent (no connection): the next upstream is asked, as long as there is one.
- A reused connection that gave nothing: once more on a fresh one. The peer closed it before it read the request.
- An answer that is about that upstream (502, 503, 504, 529): the next upstream, once, within the retry budget.
- Never after a byte was relayed, and never after bytes were sent on a fresh connection: that could bill twice.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from proxyd._relay import BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH, Engine, Exchange, Unframer
from proxyd._sse import Splitter
from proxyd.config.schema import ModelConfig
from proxyd.dialects.ask import Ask, Outgoing
from proxyd.dialects.base import build, dialects_of, make_observer
from proxyd.dialects.errors import is_usage_rejection, upstream_error_body
from proxyd.dialects.media import SSE
from proxyd.dialects.observer import Observer
from proxyd.dialects.translate import Translator
from proxyd.dialects.usage import Tally, settle
from proxyd.errors import Refusal, UpstreamError, UpstreamErrorKind
from proxyd.front.connection import ClientConnection
from proxyd.front.replies import Framing, relay_head
from proxyd.front.request import Request
from proxyd.front.wheel import Wheel
from proxyd.ids import new_epoch
from proxyd.log import Log
from proxyd.relay.answer import Answer, Way, cause_of, decide_way, fails_over, refusal_of, relayable, site_headers
from proxyd.relay.deadlines import Limits
from proxyd.relay.exchange import Stream, tls_of
from proxyd.relay.outcome import NOTHING_SPENT, Transaction
from proxyd.relay.states import Cause, Phase
from proxyd.relay.tap import MAX_BODY_BYTES, Tap
from proxyd.relay.upstream_head import request_head
from proxyd.upstream.connection import Connection
from proxyd.upstream.origin import Origin
from proxyd.upstream.upstreams import Upstreams
from proxyd.wire.head import HeadError, Headers, find_head_end, parse_response_head

__all__ = ["Call", "Services"]

# Providers send 1 to 2 KB of head. Half would refuse Azure's with long policies; twice lets a broken one eat memory.
MAX_ANSWER_HEAD_BYTES = 64 * 1024
READ_BYTES = 16 * 1024
# What one translated event may hold: nothing of it may pass before it is whole.
MAX_TRANSLATED_BYTES = 16 * 1024 * 1024


class Services(Protocol):
    """What a call uses of its worker (the relay service)."""

    engine: Engine
    wheel: Wheel
    log: Log
    upstreams: Upstreams
    no_injection: set[tuple[str, str]]
    max_head: int

    def monotonic(self) -> float: ...
    def limits_of(self, origin: Origin) -> Limits: ...
    def find_model(self, name: str) -> ModelConfig | None: ...
    def on_upstream_end(self, connection: Connection, kind: UpstreamErrorKind | None, detail: str) -> None: ...
    def on_streaming(self, call: Call, stream: Stream) -> None: ...
    def on_stream_end(self, stream: Stream) -> None: ...


class Call:
    """One admitted request until it streams or is answered."""

    __slots__ = (
        "_ask", "_client", "_connection", "_cors", "_headers", "_model", "_origin", "_outgoing", "_query",
        "_retried", "_sent", "_services", "_stop_cause", "_task", "_version", "transaction",
    )  # fmt: skip

    def __init__(
        self,
        services: Services,
        client: ClientConnection,
        request: Request,
        ask: Ask,
        model: ModelConfig,
        cors: Headers,
        transaction: Transaction,
    ) -> None:
        self._services = services
        self._client = client
        self._ask = ask
        self._model = model
        self._cors = cors
        self._headers = request.head.headers
        self._version = request.head.version
        self._query = request.head.query
        self.transaction = transaction
        self._connection: Connection | None = None
        self._origin: Origin | None = None
        self._outgoing: Outgoing | None = None
        self._retried = False
        self._sent = False
        self._stop_cause = Cause.CLIENT_GONE
        self._task: asyncio.Task[None] | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; a client that goes away cancels it."""
        self._client.on_gone = self._on_gone
        self._task = loop.create_task(self._run())

    def stop(self, cause: Cause) -> None:
        """Ends the call from outside (drained, revoked): the client gets 503 or 403."""
        self._stop_cause = cause
        if self._task is not None:
            self._task.cancel()

    def _on_gone(self) -> None:
        self.stop(Cause.CLIENT_GONE)

    async def _run(self) -> None:
        try:
            await self._walk()
        except asyncio.CancelledError:
            self._close_upstream()
            self._finish_stopped()
        except Exception as error:  # noqa: BLE001  a request ends here
            self._close_upstream()
            self._services.log.error("call_failed", request_id=self.transaction.request_id, error=repr(error))
            answer = Refusal(500, "internal_error", "The request could not be served.", close=True)
            self._refuse(answer, Cause.INTERNAL, NOTHING_SPENT)

    # -- the walk ------------------------------------------------------------------------------------------------

    async def _walk(self) -> None:
        """Asks upstream after upstream until one answers; answers the client in every case."""
        services, transaction = self._services, self.transaction
        failed: UpstreamError | None = None
        model: ModelConfig | None = self._model
        seen: set[str] = set()
        while model is not None and model.name not in seen:
            seen.add(model.name)
            self._model = model
            transaction.model_id, transaction.model_name = model.id, model.name
            plan = services.upstreams.plan(model, dialects_of(self._ask.route))
            transaction.move(Phase.CHOOSING)
            origin = plan.next()
            while origin is not None:
                self._origin = origin
                transaction.upstream = origin.name
                try:
                    answer = await self._ask_origin(origin)
                except UpstreamError as error:
                    failed = error
                    services.upstreams.report(origin, False, error.kind)
                    self._close_upstream()
                    if error.sent:
                        self._refuse(refusal_of(error), cause_of(error), self._spent(), str(error))
                        return
                    transaction.move(Phase.CHOOSING)
                    origin = plan.next()
                    continue
                status = answer.head.status
                services.upstreams.report(origin, status < 400, status)
                if fails_over(status):
                    following = plan.next()
                    if following is not None and self._may_retry():
                        self._close_upstream()
                        self._sent = False
                        transaction.move(Phase.CHOOSING)
                        origin = following
                        continue
                await self._give(answer)
                return
            model = services.find_model(model.fallback) if model.fallback else None
        if failed is None:
            failed = UpstreamError(UpstreamErrorKind.NO_UPSTREAM, self._model.name)
        self._refuse(refusal_of(failed), cause_of(failed), NOTHING_SPENT, str(failed))

    def _may_retry(self) -> bool:
        if self._retried or not self._services.upstreams.retries.try_retry():
            return False
        self._retried = True
        return True

    async def _ask_origin(self, origin: Origin) -> Answer:
        """One upstream's answer; a reused connection that gave nothing is replaced once."""
        key = (origin.name, self._model.name)
        inject = key not in self._services.no_injection
        answer = await self._attempt(origin, inject)
        outgoing = self._outgoing
        assert outgoing is not None
        if not outgoing.injected or answer.head.status not in (400, 422):
            return answer
        self.transaction.move(Phase.COLLECTING)
        body = await self._collect(answer)
        if not is_usage_rejection(answer.head.status, body):
            return _collected(answer, body)
        self._services.no_injection.add(key)
        self._services.log.warning("usage_injection_refused", upstream=origin.name, model=self._model.name)
        return await self._attempt(origin, False)

    async def _attempt(self, origin: Origin, inject: bool) -> Answer:
        fresh = False
        while True:
            transaction = self.transaction
            transaction.move(Phase.CONNECTING)
            transaction.attempts += 1
            self._sent = False
            connection = await self._services.upstreams.acquire(
                origin, timeout_s=origin.config.connect_timeout, fresh=fresh
            )
            self._connection = connection
            transaction.reused = connection.reused
            try:
                await self._send(origin, connection, inject)
                return await self._read_head(origin, connection)
            except UpstreamError as error:
                gave_nothing = error.kind in (UpstreamErrorKind.RESET, UpstreamErrorKind.EOF_BEFORE_HEAD)
                if fresh or not connection.reused or not gave_nothing:
                    raise
                self._close_upstream()
                fresh = True

    async def _send(self, origin: Origin, connection: Connection, inject: bool) -> None:
        transaction, ask = self.transaction, self._ask
        outgoing = build(ask, connection.origin.dialect, self._upstream_model(), inject)
        self._outgoing = outgoing
        path = outgoing.path
        if self._query and not outgoing.translate:
            path += "?" + self._query.decode("latin-1")
        head = request_head(
            origin.target(path),
            origin.host_header,
            origin.auth_headers(),
            self._headers,
            len(outgoing.body),
            request_id=transaction.request_id,
            dialect=origin.dialect,
            translate=outgoing.translate,
        )
        transaction.move(Phase.SENDING)
        self._sent = True
        try:
            await connection.send(head + outgoing.body, origin.config.first_byte_timeout)
        except UpstreamError as error:
            # An upstream may refuse before it has read everything: its answer, if there is one, is what counts.
            if error.kind is not UpstreamErrorKind.RESET or not connection.pending():
                raise

    async def _read_head(self, origin: Origin, connection: Connection) -> Answer:
        """The final head, 1xx skipped. Raises UpstreamError."""
        self.transaction.move(Phase.AWAITING)
        data = b""
        searched = 0
        timeout_s = origin.config.first_byte_timeout
        while True:
            more = await connection.recv(READ_BYTES, timeout_s)
            timeout_s = origin.config.idle_timeout
            if not more:
                kind = UpstreamErrorKind.BAD_HEAD if data else UpstreamErrorKind.EOF_BEFORE_HEAD
                raise UpstreamError(kind, origin.name, "closed within the head" if data else "", sent=True)
            data += more
            while True:
                end = find_head_end(data, max(0, searched - 3))
                if end < 0:
                    searched = len(data)
                    break
                try:
                    head = parse_response_head(data[:end])
                except HeadError as error:
                    raise UpstreamError(UpstreamErrorKind.BAD_HEAD, origin.name, error.reason, sent=True) from None
                data = data[end:]
                searched = 0
                if head.status >= 200:
                    self.transaction.upstream_status = head.status
                    return Answer(head, data)
            if len(data) > MAX_ANSWER_HEAD_BYTES:
                raise UpstreamError(UpstreamErrorKind.BAD_HEAD, origin.name, "head too large", sent=True)
            if searched == 0 and data and not b"HTTP/".startswith(data[:5]) and not data.startswith(b"HTTP/"):
                raise UpstreamError(UpstreamErrorKind.BAD_HEAD, origin.name, "not HTTP", sent=True)

    def _upstream_model(self) -> str:
        """The name to ask the upstream for; "" keeps the client's."""
        model = self._model
        if model.upstream_model:
            return model.upstream_model
        if self._ask.model is not None and (model.name == "*" or model.name == self._ask.model):
            return ""
        return model.name

    # -- answering -----------------------------------------------------------------------------------------------

    async def _give(self, answer: Answer) -> None:
        """The client gets this answer, in the way its head asks for."""
        outgoing, connection, origin = self._outgoing, self._connection, self._origin
        assert outgoing is not None
        assert origin is not None
        ask, transaction = self._ask, self.transaction
        observer = make_observer(
            ask,
            origin.dialect,
            outgoing,
            request_id=transaction.request_id,
            epoch=new_epoch(),
        )
        if connection is None:
            # Collected already: a 400 or 422 to an injected request that was about something else.
            self._reply_whole(answer, answer.initial, observer)
            return
        if answer.body_kind is None:
            self._release_upstream(answer, whole=not answer.initial)
            self._reply_whole(answer, b"", observer)
            return
        way = decide_way(answer, asks_stream=ask.stream, translate=outgoing.translate, injected=outgoing.injected)
        if way is Way.UNREADABLE:
            self._close_upstream()
            error = UpstreamError(
                UpstreamErrorKind.BAD_HEAD, origin.name, "neither an event stream nor JSON", sent=True
            )
            self._refuse(refusal_of(error), Cause.UPSTREAM_BROKEN, self._spent(), str(error))
        elif way is Way.COLLECT:
            transaction.move(Phase.COLLECTING)
            try:
                body = await self._collect(answer)
            except UpstreamError as error:
                self._services.upstreams.report(origin, False, error.kind)
                self._close_upstream()
                self._refuse(refusal_of(error), cause_of(error), self._spent(), str(error))
                return
            self._reply_whole(answer, body, observer)
        else:
            self._stream(answer, way, observer, outgoing, connection, origin)

    def _stream(
        self,
        answer: Answer,
        way: Way,
        observer: Observer | Translator,
        outgoing: Outgoing,
        connection: Connection,
        origin: Origin,
    ) -> None:
        services, ask, client, transaction = self._services, self._ask, self._client, self.transaction
        is_sse = way is Way.EVENTS
        kind = answer.body_kind
        assert kind is not None
        splitter: Splitter | None = None
        tap: Tap | None = None
        if is_sse:
            if outgoing.translate:
                splitter = Splitter(observer.on_event, None, MAX_TRANSLATED_BYTES, MAX_TRANSLATED_BYTES)
            else:
                splitter = Splitter(observer.on_event, observer.watch)
        else:
            media = answer.media(streaming=ask.stream)
            tap = Tap(observer, media, answer.content_type, answer.head.status, answer.coding)
        framing, out_kind = _framing(self._version, kind, answer.head.content_length or 0, is_sse)
        keep_alive = client.may_keep_alive and framing != "close"
        headers = answer.head.headers
        if outgoing.translate:
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *site_headers(headers)]
        elif outgoing.injected:
            headers = relayable(headers, shortened=True)
        head = relay_head(
            answer.head.status,
            answer.head.reason,
            headers,
            request_id=transaction.request_id,
            version=self._version,
            framing=framing,
            keep_alive=keep_alive,
            is_stream=is_sse or (tap is not None and answer.media(streaming=ask.stream) is SSE),
            extra=self._cors,
        )
        transaction.http_status = answer.head.status
        stream = Stream(
            services,
            client,
            connection,
            transaction,
            observer,
            _without_body(ask),
            tap,
            services.limits_of(origin),
            is_sse=is_sse,
            keep_alive=keep_alive,
            upstream_keeps=answer.head.keep_alive and kind != BODY_CLOSE,
            on_end=services.on_stream_end,
        )
        fd = client.begin_stream()
        exchange = Exchange(
            services.engine,
            stream,
            fd,
            connection.fd,
            tls_of(connection),
            kind,
            answer.head.content_length or 0,
            out_kind,
            splitter,
            tap is not None,
            services.max_head,
        )
        initial = answer.initial + connection.take_early()
        self._connection = None
        services.on_streaming(self, stream)
        if isinstance(observer, Translator):
            head = head + _frame(observer.preamble(), out_kind)
        stream.start(exchange, head, initial)

    async def _collect(self, answer: Answer) -> bytes:
        """The whole body; the connection goes back to its pool. Raises UpstreamError, also for one over the bound."""
        connection, origin = self._connection, self._origin
        assert connection is not None
        assert origin is not None
        kind = answer.body_kind
        if kind is None:
            return b""
        unframer = Unframer(kind, answer.head.content_length or 0)
        body = bytearray()
        data = answer.initial
        try:
            while True:
                if data:
                    body += unframer.feed(data)
                if unframer.done:
                    break
                if len(body) > MAX_BODY_BYTES:
                    raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, origin.name, "body too large", sent=True)
                data = await connection.recv(READ_BYTES, origin.config.idle_timeout)
                if not data:
                    if kind == BODY_CLOSE:
                        break
                    raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, origin.name, "closed within the body", sent=True)
        except ValueError:
            raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, origin.name, "bad framing", sent=True) from None
        self._release_upstream(answer, whole=unframer.done and unframer.leftover == 0)
        return bytes(body)

    def _reply_whole(self, answer: Answer, body: bytes, observer: Observer | Translator) -> None:
        """Answers with a body that was read wholly."""
        ask, transaction, status = self._ask, self.transaction, answer.head.status
        tap = Tap(observer, answer.media(streaming=ask.stream), answer.content_type, status, answer.coding)
        headers = relayable(answer.head.headers, shortened=False)
        out = body
        if isinstance(observer, Translator):
            headers = site_headers(answer.head.headers)
            if status == 200:
                headers += _EVENT_STREAM
                out = observer.preamble() + _translated(tap, body, observer)
                observer.finish(True, observer.text_bytes)
                out += observer.ending(True)
            else:
                headers.append((b"content-type", b"application/json"))
                out = upstream_error_body(status if status >= 400 else 502, body, transaction.request_id)
                status = status if status >= 400 else 502
                tap.feed(body)
                tap.finish(observer)
        else:
            tap.feed(body)
            tap.finish(observer)
        observer.finish(True, observer.text_bytes)
        transaction.move(Phase.ENDING)
        transaction.http_status = status
        transaction.bytes_out = len(out)
        transaction.first_event()
        tally = settle(observer, ask, observer.text_bytes, status < 400)
        self._client.reply(status, headers + self._cors, out)
        cause = Cause.COMPLETE if status < 400 else Cause.REFUSED_BY_UPSTREAM
        answered = "completed" if tap.is_opaque or (status < 400 and not body) else observer.outcome
        transaction.finish(cause, answered, tally)

    # -- ends ----------------------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, cause: Cause, tally: Tally, detail: str = "") -> None:
        transaction = self.transaction
        if transaction.is_finished:
            return
        transaction.http_status = refusal.status
        self._client.refuse(refusal, self._cors)
        transaction.finish(cause, "error", tally, detail=detail)

    def _finish_stopped(self) -> None:
        """The task was cancelled: the client left, or the call was stopped from outside."""
        cause = self._stop_cause
        if cause is Cause.REVOKED:
            self._refuse(Refusal(403, "session_revoked", "This session was revoked."), cause, self._spent())
        elif cause is Cause.DRAINED:
            refusal = Refusal(503, "draining", "This node is restarting.", retry_after_s=1, close=True)
            self._refuse(refusal, cause, self._spent())
        else:
            self.transaction.finish(cause, "truncated", self._spent())

    def _spent(self) -> Tally:
        """What a request costs that was sent and not answered: its prompt, by our count."""
        if not self._sent:
            return NOTHING_SPENT
        return Tally(self.transaction.prompt_estimate, 0, 0, 0, True)

    def _release_upstream(self, answer: Answer, *, whole: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(whole and answer.head.keep_alive)

    def _close_upstream(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(False)

    def end_retry(self) -> None:
        """Gives the retry back to the budget, when the request is over."""
        if self._retried:
            self._retried = False
            self._services.upstreams.retries.end_retry()


_EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _framing(version: tuple[int, int], kind: int, length: int, is_sse: bool) -> tuple[Framing, int]:
    """How the client gets the body: an event stream may grow or shrink, so it never has a length."""
    if kind == BODY_LENGTH and not is_sse:
        return length, BODY_LENGTH
    if version >= (1, 1):
        return "chunked", BODY_CHUNKED
    return "close", BODY_CLOSE


def _frame(payload: bytes, out_kind: int) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload) if out_kind == BODY_CHUNKED else payload


def _without_body(ask: Ask) -> Ask:
    """The ask as the streaming phase needs it: without the request's body, which may be megabytes."""
    return Ask(ask.route, ask.model, ask.stream, b"", {}, ask.prompt_text_bytes, ask.asked_usage)


def _collected(answer: Answer, body: bytes) -> Answer:
    return Answer(answer.head, body)


def _translated(tap: Tap, body: bytes, observer: Translator) -> bytes:
    """The frames of a body that came as a whole: JSON, or an event stream that was encoded."""
    frames: list[bytes] = []
    tap.divert(frames.append)
    tap.feed(body)
    tap.finish(observer)
    return b"".join(frames)
