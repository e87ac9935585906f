"""The relay of one worker: takes requests in, keeps the live ones, ends them on order.

Owns: who may ask for what (through access), the set of live calls and streams, draining and revocation, the coarse
time. Must not know: how a request came in or how a stream is relayed; those are `front` and `exchange`.

    serve -> authorize, parse, admit -> Call                                    all in one turn of the loop
                 |               '-- NeedsReading: the store is asked (50 ms at most), then once more, without waiting
                 '-- UnknownKey: its key is fetched, then once more

Invariants: every admitted request is in exactly one of `_calls`, `_streams` until its transaction is finished, and
`live` is their number; nothing that is refused before admission has a row, everything after it has exactly one. A
request that waits has consumed nothing: its client may leave, the drain's end answers it 503, and its session is looked
at anew when the wait is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from proxyd._relay import Engine
from proxyd.access.admission import Admission, NeedsReading, Ticket
from proxyd.access.origin import OriginPolicy, forwarded_scheme
from proxyd.access.session import Session, Sessions, UnknownKey
from proxyd.clock import Clock
from proxyd.config.schema import Config, ModelConfig
from proxyd.dialects.ask import Ask, Route, parse_ask
from proxyd.dialects.base import dialects_of
from proxyd.dialects.tokens import estimate
from proxyd.errors import Refusal, UpstreamErrorKind
from proxyd.front.connection import ClientConnection
from proxyd.front.request import Request
from proxyd.front.wheel import Wheel
from proxyd.log import Log
from proxyd.relay.book import Book
from proxyd.relay.deadlines import Limits
from proxyd.relay.ending import Endings
from proxyd.relay.exchange import Stream
from proxyd.relay.flow import Call
from proxyd.relay.instruments import Instruments
from proxyd.relay.outcome import CLIENT_LEFT, Transaction
from proxyd.relay.states import Cause
from proxyd.relay.waiting import Turn, Waits
from proxyd.shm.metrics import Metrics
from proxyd.upstream.connection import Connection
from proxyd.upstream.origin import Origin
from proxyd.upstream.upstreams import Upstreams
from proxyd.wire.head import Headers

__all__ = ["Relay", "Waits"]


class Relay:
    """Serves the relay routes of one worker."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: Config,
        clock: Clock,
        log: Log,
        metrics: Metrics,
        wheel: Wheel,
        sessions: Sessions,
        admission: Admission,
        upstreams: Upstreams,
        book: Book,
        waits: Waits | None = None,
    ) -> None:
        self._loop = loop
        self._waits = Waits() if waits is None else waits
        self._waiting: dict[asyncio.Task[None], Callable[[Refusal], None]] = {}
        self._config = config
        self._clock = clock
        self._sessions = sessions
        self._admission = admission
        self._book = book
        self._origins = OriginPolicy(config.auth.allowed_origins)
        self._instruments = Instruments(metrics)
        self._calls: dict[Transaction, Call] = {}
        self._streams: dict[Transaction, Stream] = {}
        self._limits: dict[str, Limits] = {}
        self.endings = Endings()
        self.finished = 0
        """Admitted requests that are over, since the worker's start."""
        self.log = log
        self.wheel = wheel
        self.upstreams = upstreams
        self.no_injection: dict[tuple[str, str], float] = {}
        self.max_head = config.http.max_head
        self.engine = Engine(
            loop,
            config.stream.turn_bytes,
            config.stream.buffer,
            self._instruments.events,
            self._instruments.bytes,
            self._instruments.stalls,
            self._instruments.lag,
        )
        self.engine.now_ms = int(clock.monotonic() * 1000)

    # -- what the worker uses ------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """Admitted requests that are not over: calls and streams."""
        return len(self._calls) + len(self._streams)

    @property
    def streaming(self) -> int:
        """Admitted requests that asked for a stream and are not over, whether their answer has begun or not. Beside
        them `_streams` holds JSON answers being relayed, and `_calls` streams that are awaited."""
        return self._instruments.active_streams

    def tick(self, now: float) -> None:
        """Every wheel granularity: sets the coarse time of the exchanges, before the wheel looks at them."""
        self.engine.now_ms = int(now * 1000)

    def interrupt(self, keep: int = 0) -> int:
        """Ends requests, those that run longest first, until `keep` go on: a stream gets its error event, a call a 503.
        With 0, who waits to be admitted is refused, too. How many were ended now."""
        count = 0
        while self.live - self.endings.under_way > keep:
            transaction = self.endings.next(lambda: [*self._calls, *self._streams])
            if transaction is None:
                break
            call, stream = self._calls.get(transaction), self._streams.get(transaction)
            if call is not None:
                call.stop(Cause.DRAINED)
            if call is not None or (stream is not None and stream.interrupt(Cause.DRAINED)):
                count += 1
                self.endings.ended(transaction, self._clock.monotonic())
        if keep <= 0:
            count += len(self._waiting)
            for task, refuse in list(self._waiting.items()):
                task.cancel()
                refuse(Refusal(503, "draining", "This node is restarting.", retry_after_s=1, close=True))
        return count

    def drop(self) -> int:
        """Closes what interrupt() did not end, without another byte; how many there were."""
        count = self.live
        for stream in list(self._streams.values()):
            stream.drop()
        return count

    def revoke(self, is_revoked: Callable[[Session], bool]) -> int:
        """Ends every live request of a revoked session; how many there were."""
        count = 0
        for transaction, call in list(self._calls.items()):
            if is_revoked(transaction.session):
                call.stop(Cause.REVOKED)
                count += 1
        for transaction, stream in list(self._streams.items()):
            if is_revoked(transaction.session):
                stream.interrupt(Cause.REVOKED)
                count += 1
        return count

    def preflight(self, request: Request) -> Headers:
        """The headers of the 204 to a browser's preflight. Raises Refusal 403."""
        scheme = forwarded_scheme(request.head.headers, request.trusted)
        return self._origins.preflight(request.head.headers, scheme=scheme)

    def cors(self, headers: Headers) -> Headers:
        """The headers that let an allowed page read an answer."""
        return self._origins.cors_headers(headers)

    def authorize(self, request: Request) -> tuple[Session, Headers]:
        """Who asks, and the CORS headers of every answer to it. Raises Refusal 401 or 403."""
        headers = request.head.headers
        session = self._sessions.authenticate(headers)
        scheme = forwarded_scheme(headers, request.trusted)
        verdict = self._origins.decide(headers, cookie_used=session.is_ambient, scheme=scheme)
        verdict.enforce()
        return session, verdict.cors_headers

    # -- a request -----------------------------------------------------------------------------------------------

    def serve(self, client: ClientConnection, request: Request) -> None:
        """One complete request on a relay route: refused at once, or admitted and begun."""
        self._serve(client, request, Turn())

    def _serve(self, client: ClientConnection, request: Request, turn: Turn) -> None:
        route = Route(request.head.path)
        session: Session | None = None
        model: ModelConfig | None = None
        ask = turn.ask
        try:
            session, cors = self.authorize(request)
            if ask is None:
                ask = parse_ask(route, request.body)
            model = self._choose_model(ask)
            if self._book.broken_reason is not None:
                raise Refusal(
                    503, "spool_unavailable", "Requests cannot be accounted for at the moment.", retry_after_s=5
                )
            is_billed = route is not Route.COUNT_TOKENS
            prompt_estimate = estimate(ask.prompt_text_bytes) if is_billed else 0
            ticket = self._admission.admit(
                session,
                ask.model or model.name,
                prompt_tokens=prompt_estimate,
                max_tokens=0 if route is Route.EMBEDDINGS else ask.max_tokens,
                counts=is_billed,
                may_wait=turn.may_wait_reading and self._waits.reading is not None,
            )
        except NeedsReading as needed:
            assert self._waits.reading is not None, "may_wait said so"
            wait = partial(self._waits.reading, needed.user_id, needed.window_since, needed.token_iat)
            self._serve_later(client, request, replace(turn, may_wait_reading=False, ask=ask), wait)
            return
        except Refusal as refusal:
            is_pending = isinstance(refusal, UnknownKey) and refusal.is_pending
            if is_pending and turn.may_wait_keys and self._waits.keys is not None:
                self._serve_later(client, request, replace(turn, may_wait_keys=False), self._waits.keys)
                return
            self._refused(client, request, route, session, refusal, model.name if model is not None else "")
            return
        if ask.model is None:
            ask = replace(ask, model=model.name)
        try:
            self._begin(client, request, session, cors, ask, model, prompt_estimate, ticket)
        except BaseException:
            ticket.refund()
            raise

    def _begin(
        self,
        client: ClientConnection,
        request: Request,
        session: Session,
        cors: Headers,
        ask: Ask,
        model: ModelConfig,
        prompt_estimate: int,
        ticket: Ticket,
    ) -> None:
        """An admitted request becomes a transaction and a call."""
        transaction = Transaction(
            request_id=request.request_id,
            route=ask.route.value,
            session=session,
            model_name=model.name,
            model_id=model.id,
            is_stream=ask.stream,
            peer=request.peer,
            started=request.received_at,
            prompt_estimate=prompt_estimate,
            ticket=ticket,
            clock=self._clock,
            book=self._book,
            instruments=self._instruments,
            log=self.log,
            on_finished=self._on_finished,
        )
        transaction.request_bytes = len(request.body)
        transaction.begin()
        self.upstreams.retries.begin()
        call = Call(self, client, request, ask, model, cors, transaction)
        self._calls[transaction] = call
        call.start(self._loop)

    def _serve_later(
        self, client: ClientConnection, request: Request, turn: Turn, wait: Callable[[], Awaitable[object]]
    ) -> None:
        """Once more when `wait` is over; never, if the client leaves meanwhile."""
        route = Route(request.head.path)
        refuse = partial(self._refused, client, request, route, None)
        task = self._loop.create_task(self._resume(client, request, turn, wait))
        self._waiting[task] = refuse

        def on_done(task: asyncio.Task[None]) -> None:
            self._waiting.pop(task, None)
            error = None if task.cancelled() else task.exception()
            if error is not None:
                self.log.error("call_failed", request_id=request.request_id, error=repr(error))
                refuse(Refusal(500, "internal_error", "The request could not be served.", close=True))

        def on_gone() -> None:
            task.cancel()
            self._told(request, route, None, CLIENT_LEFT, Cause.CLIENT_GONE.value)

        task.add_done_callback(on_done)
        client.on_gone = on_gone

    async def _resume(
        self, client: ClientConnection, request: Request, turn: Turn, wait: Callable[[], Awaitable[object]]
    ) -> None:
        await wait()
        client.on_gone = None
        self._waits.recheck()
        self._serve(client, request, turn)

    def _choose_model(self, ask: Ask) -> ModelConfig:
        """The configured model that answers. Raises Refusal 404, or 400 where the site's route needs a name."""
        dialects = dialects_of(ask.route)
        if ask.model is None:
            for model in self._config.model:
                if model.name != "*" or model.upstream_model:
                    return model
            raise Refusal(400, "missing_required_parameter", "you must provide a model", param="model")
        found = self._config.find_model(ask.model)
        if found is None or (ask.model == "*" and not found.upstream_model):
            raise Refusal(404, "model_not_found", "The model does not exist or you may not use it.", param="model")
        chosen: ModelConfig | None = found
        seen: set[str] = set()
        while chosen is not None and chosen.name not in seen:
            seen.add(chosen.name)
            if any(self.upstreams.origins[name].dialect in dialects for tier in chosen.upstreams for name in tier):
                return found
            chosen = self._config.find_model(chosen.fallback) if chosen.fallback else None
        raise Refusal(
            404,
            "model_not_found",
            "The model exists, but its upstreams do not speak this route's dialect; ask on another route.",
            param="model",
        )

    def _refused(
        self, client: ClientConnection, request: Request, route: Route, session: Session | None, refusal: Refusal,
        model: str = "",
    ) -> None:  # fmt: skip
        client.refuse(refusal, self.cors(request.head.headers))
        self._told(request, route, session, refusal.status, refusal.cause, model=model, detail=refusal.detail)

    def _told(
        self, request: Request, route: Route, session: Session | None, status: int, cause: str, **more: str
    ) -> None:
        """Metric and access line of a request that was never admitted."""
        self._instruments.request(route.value, status)
        fields: dict[str, Any] = {
            "request_id": request.request_id,
            "peer": request.peer,
            "route": route.value,
            "status": status,
            "outcome": "rejected",
            "cause": cause,
            "duration_ms": round((self._clock.monotonic() - request.received_at) * 1000),
        }
        if session is not None:
            fields["user"] = session.user_id
            fields["tenant"] = session.tenant
        fields.update((name, text) for name, text in more.items() if text)
        self.log.access(fields)

    # -- what calls and streams use ------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return self._clock.monotonic()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Calls back once; the worker's end does not wait for it."""
        self._loop.call_later(seconds, callback)

    def find_model(self, name: str) -> ModelConfig | None:
        return self._config.find_model(name)

    def limits_of(self, origin: Origin) -> Limits:
        """The streaming limits towards one upstream, made once."""
        limits = self._limits.get(origin.name)
        if limits is None:
            limits = self._limits[origin.name] = Limits(
                idle_s=origin.config.idle_timeout,
                total_s=origin.config.total_timeout,
                slow_client_s=self._config.stream.slow_client_timeout,
                heartbeat_s=self._config.stream.heartbeat,
            )
        return limits

    def on_upstream_end(self, connection: Connection, kind: UpstreamErrorKind | None, detail: str) -> None:
        """A body ended; how it began was reported when its head came."""
        if kind is not None:
            self.upstreams.report(connection.origin, False, kind, detail)
            self.log.warning("upstream_failed", upstream=connection.origin.name, kind=kind.value, detail=detail)

    def on_streaming(self, call: Call, stream: Stream) -> None:
        """A call became a stream."""
        call.end_retry()
        self._calls.pop(stream.transaction, None)
        self._streams[stream.transaction] = stream

    def _on_finished(self, transaction: Transaction) -> None:
        self.finished += 1
        self.endings.forget(transaction)
        self.upstreams.retries.end()
        call = self._calls.pop(transaction, None)
        if call is not None:
            call.end_retry()
        self._streams.pop(transaction, None)
