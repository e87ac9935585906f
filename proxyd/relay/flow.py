"""One request from its admission to its first relayed byte.

Owns: the walk through the upstreams, the retry rules, and what is answered where no stream comes of it. The only part
of the relay that is a task; from the first relayed byte on there are callbacks only (`exchange`).
Must not know: how connections are made, what a dialect's bytes mean.

    CHOOSING -> acquire -> CONNECTING -> send -> SENDING -> head -> AWAITING -> stream | collect and reply

Retries (SAFETY, "Upstream faults")
- Nothing of the request was sent (no connection): the next upstream is asked, as long as there is one.
- A reused connection that failed at once and gave not a byte: once more on a fresh one. The peer had closed it.
- An answer that is about that upstream (502, 503, 504, 529): the next upstream, or the fallback model where there is
  none, once, within the retry budget.
- Never after a byte was relayed, and never after bytes were sent on a fresh connection: that could bill twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from proxyd._relay import Engine
from proxyd.config.schema import ModelConfig
from proxyd.dialects.ask import Ask, Outgoing
from proxyd.dialects.base import build, dialects_of, make_observer, prompt_tokens
from proxyd.dialects.errors import is_usage_rejection
from proxyd.dialects.usage import Tally
from proxyd.errors import Refusal, UpstreamError, UpstreamErrorKind
from proxyd.front.connection import ClientConnection
from proxyd.front.request import Request
from proxyd.front.wheel import Wheel
from proxyd.ids import new_epoch
from proxyd.log import Log
from proxyd.relay.answer import Answer, Way, cause_of, decide_way, fails_over, refusal_of
from proxyd.relay.attempt import Patience, collect_body, read_head, send_request, vocabulary_ready
from proxyd.relay.deadlines import Limits
from proxyd.relay.delivery import Asker, begin_stream, reply_whole
from proxyd.relay.exchange import Stream
from proxyd.relay.outcome import NOTHING_SPENT, Transaction
from proxyd.relay.states import Cause, Phase
from proxyd.upstream.connection import Connection
from proxyd.upstream.origin import Origin
from proxyd.upstream.upstreams import Upstreams
from proxyd.wire.head import Headers

__all__ = ["Call", "Services"]

# A dial has connect_timeout for itself; waiting a little longer lets its own, more exact error come first.
QUEUE_GRACE_S = 0.1
# A peer that closed an idle connection answers the request on it with RST or FIN within a round trip. Half would give
# up on a far provider on a bad line; twice could send a request again that was worked on for two seconds.
STALE_S = 1.0
# How long an upstream that refused our `stream_options` is not sent them: its next version may take them.
NO_INJECTION_S = 600.0


class Services(Protocol):
    """What a call uses of its worker (the relay service)."""

    engine: Engine
    wheel: Wheel
    log: Log
    upstreams: Upstreams
    no_injection: dict[tuple[str, str], float]
    max_head: int

    def monotonic(self) -> float: ...
    def later(self, seconds: float, callback: Callable[[], None]) -> None: ...
    def limits_of(self, origin: Origin) -> Limits: ...
    def find_model(self, name: str) -> ModelConfig | None: ...
    def on_upstream_end(self, connection: Connection, kind: UpstreamErrorKind | None, detail: str) -> None: ...
    def on_streaming(self, call: Call, stream: Stream) -> None: ...


class Call:
    """One admitted request until it streams or is answered."""

    __slots__ = (
        "_ask", "_client", "_connection", "_cors", "_headers", "_key", "_model", "_origin", "_outgoing", "_query",
        "_retried", "_sent", "_sent_at", "_services", "_stop_cause", "_task", "_version", "transaction",
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
        self._sent_at = 0.0
        self._key = "none"
        self._stop_cause = Cause.CLIENT_GONE
        self._task: asyncio.Task[None] | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins; a client that goes away cancels it."""
        self._client.on_gone = self._on_gone
        self._task = loop.create_task(self._run())
        self._task.add_done_callback(self._on_done)

    def stop(self, cause: Cause) -> None:
        """Ends the call from outside (drained, revoked): the client gets 503 or 403."""
        self._stop_cause = cause
        if self._task is not None:
            self._task.cancel()

    def _on_done(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step never enters _run(): its request ends here."""
        if task.cancelled():
            self._close_upstream()
            self._finish_stopped()

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
                    services.upstreams.report(origin, False, error.kind, error.detail)
                    self._close_upstream()
                    if error.sent:
                        self._refuse(refusal_of(error), cause_of(error), self._spent(), str(error))
                        return
                    transaction.move(Phase.CHOOSING)
                    origin = plan.next()
                    continue
                status = answer.head.status
                services.upstreams.report(origin, status < 400, status)
                if status in (401, 403):
                    services.upstreams.report_refused_key(origin, status, self._key)
                if fails_over(status):
                    following = plan.next()
                    spare = self._fallback(model) if following is None else None
                    another = following is not None or (spare is not None and spare.name not in seen)
                    if another and self._may_retry():
                        self._close_upstream()
                        self._sent = False
                        transaction.move(Phase.CHOOSING)
                        origin = following
                        continue
                try:
                    await self._give(answer)
                except UpstreamError as error:
                    services.upstreams.report(origin, False, error.kind, error.detail)
                    services.log.warning(
                        "upstream_failed", upstream=origin.name, kind=error.kind.value, detail=error.detail
                    )
                    self._close_upstream()
                    self._refuse(refusal_of(error), cause_of(error), self._spent(), str(error))
                return
            model = self._fallback(model)
        if failed is None:
            failed = UpstreamError(UpstreamErrorKind.NO_UPSTREAM, self._model.name)
        self._refuse(refusal_of(failed), cause_of(failed), NOTHING_SPENT, str(failed))

    def _fallback(self, model: ModelConfig) -> ModelConfig | None:
        """The model that answers instead, if this session may use it."""
        allowed = self.transaction.session.models
        if not model.fallback or (allowed is not None and model.fallback not in allowed):
            return None
        return self._services.find_model(model.fallback)

    def _may_retry(self) -> bool:
        if self._retried or not self._services.upstreams.retries.try_retry():
            return False
        self._retried = True
        return True

    async def _ask_origin(self, origin: Origin) -> Answer:
        """One upstream's answer; a reused connection that gave nothing is replaced once."""
        key = (origin.name, self._model.name)
        now = self._services.monotonic()
        inject = self._services.no_injection.get(key, 0.0) <= now
        answer = await self._attempt(origin, inject)
        outgoing = self._outgoing
        assert outgoing is not None
        if not outgoing.injected or answer.head.status not in (400, 422):
            return answer
        connection = self._connection
        assert connection is not None
        self.transaction.move(Phase.COLLECTING)
        body = await self._collect(connection, answer)
        if not is_usage_rejection(answer.head.status, body):
            return Answer(answer.head, body)
        again = await self._attempt(origin, False)
        if again.head.status < 300 and self._ask.document.get("stream_options") is None:
            # It was our addition that was refused, and nothing of the client's: others need not find that out anew.
            self._services.no_injection[key] = now + NO_INJECTION_S
            self._services.log.warning("usage_injection_refused", upstream=origin.name, model=self._model.name)
        return again

    async def _attempt(self, origin: Origin, inject: bool) -> Answer:
        fresh = False
        while True:
            transaction = self.transaction
            transaction.move(Phase.CONNECTING)
            transaction.attempts += 1
            self._sent = False
            connection = await self._services.upstreams.acquire(
                origin, timeout_s=origin.config.connect_timeout + QUEUE_GRACE_S, fresh=fresh
            )
            self._connection = connection
            transaction.reused = connection.reused
            try:
                return await self._exchange(connection, inject)
            except UpstreamError as error:
                if fresh or not connection.reused or not self._was_stale(connection, error):
                    raise
                self._close_upstream()
                fresh = True

    def _was_stale(self, connection: Connection, error: UpstreamError) -> bool:
        """Whether the peer had closed this pooled connection before it read the request. It says so at once, without a
        byte of an answer, interim ones included; later, or after one, it may be at work on what we sent."""
        if error.kind not in (UpstreamErrorKind.RESET, UpstreamErrorKind.EOF_BEFORE_HEAD) or connection.has_answered:
            return False
        return self._services.monotonic() - self._sent_at < STALE_S

    async def _exchange(self, connection: Connection, inject: bool) -> Answer:
        """Sends the request on this connection and reads the head of its answer."""
        transaction = self.transaction
        patience = self._patience(connection.origin)
        outgoing = self._outgoing = build(self._ask, connection.origin.dialect, self._upstream_model(), inject)
        transaction.move(Phase.SENDING)
        self._sent = True
        self._sent_at = self._services.monotonic()
        self._key = connection.origin.next_key  # taken by send_request before it first waits
        await send_request(connection, outgoing, self._headers, self._query, transaction.request_id, patience)
        transaction.move(Phase.AWAITING)
        answer = await read_head(connection, patience)
        transaction.upstream_status = answer.head.status
        return answer

    def _patience(self, origin: Origin) -> Patience:
        until = self.transaction.started + origin.config.total_timeout
        return Patience(self._services.monotonic, until, origin.name)

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
        await vocabulary_ready(self._services.monotonic)
        transaction = self.transaction
        observer = make_observer(
            self._ask, origin.dialect, outgoing, request_id=transaction.request_id, epoch=new_epoch()
        )
        asker = Asker(self._client, self._ask, self._cors, self._version, transaction)
        if connection is None:
            # Collected already: a 400 or 422 to an injected request that was about something else.
            reply_whole(asker, answer, answer.initial, observer)
            return
        if answer.body_kind is None:
            self._release_upstream(answer, whole=not answer.initial)
            reply_whole(asker, answer, b"", observer)
            return
        way = decide_way(answer, asks_stream=self._ask.stream, translate=outgoing.translate, injected=outgoing.injected)
        if way is Way.COLLECT:
            transaction.move(Phase.COLLECTING)
            reply_whole(asker, answer, await self._collect(connection, answer), observer)
        elif way is Way.UNREADABLE:
            raise UpstreamError(UpstreamErrorKind.BAD_HEAD, origin.name, "neither events nor JSON", sent=True)
        else:
            services = self._services
            stream, exchange, head = begin_stream(
                asker,
                services,
                answer,
                way,
                observer,
                outgoing,
                connection,
                services.limits_of(origin),
                services.max_head,
            )
            self._connection = None
            services.on_streaming(self, stream)
            stream.start(exchange, head, answer.initial + connection.take_early())

    async def _collect(self, connection: Connection, answer: Answer) -> bytes:
        """The whole body; the connection goes back to its pool. Raises UpstreamError."""
        body, ended = await collect_body(connection, answer, self._patience(connection.origin))
        self._release_upstream(answer, whole=ended)
        return body

    # -- ends ----------------------------------------------------------------------------------------------------

    def _refuse(self, refusal: Refusal, cause: Cause, tally: Tally, detail: str = "") -> None:
        transaction = self.transaction
        if transaction.is_finished:
            return
        transaction.http_status = refusal.status
        transaction.release()
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
        if not self._sent or self._origin is None:
            return NOTHING_SPENT
        return Tally(prompt_tokens(self._ask, self._origin.dialect), 0, 0, 0, True)

    def _release_upstream(self, answer: Answer, *, whole: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(whole and answer.head.keep_alive, ended=whole)

    def _close_upstream(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release(False)

    def end_retry(self) -> None:
        """Gives the retry back to the budget, when the request is over."""
        if self._retried:
            self._retried = False
            self._services.upstreams.retries.end_retry()
