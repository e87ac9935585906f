"""What a worker serves, put together: the only place that knows every room of it.

Owns the wiring, the order of starting and ending, and the words of readiness. Must not know how any of it works.

    Acceptor -> Door -> Relay -> Upstreams          listeners of the slot, and of a vacant one (adopt)
                  |       '--> Admission -> Ledger  shared by all workers; Asker has it read from the store
                  '---> Handoff -> WebServer        all other public routes
    admin listener -> AdminServer                   shared by all workers
    Relay -> SpoolWriter                            one row a transaction
    HandOver ==> passage ==> Arrivals               idle connections, from a retiring worker to the next generation

    SERVING -> RETIRING -> DRAINING     retiring: as serving, without newcomers; draining: requests get 503
       '-----------------------'

Everything is made after the fork: it belongs to one loop and one process. This file is long because the order of
starting and of ending is to be read in one place.
"""

from __future__ import annotations

import asyncio

# Named here because others import them at their first use: each worker would pay for it with its first request, and by
# then pip may have replaced the files with those of another version.
import encodings.ascii
import encodings.idna  # noqa: F401
from dataclasses import dataclass
from enum import Enum
from typing import Any

import cryptography.hazmat.backends.openssl.backend  # noqa: F401

from proxyd.access.admission import Admission
from proxyd.access.revocations import RevocationsFull
from proxyd.access.session import Sessions
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.dialects.tokens import O200K
from proxyd.errors import Refusal
from proxyd.front.acceptor import Acceptor
from proxyd.front.connection import ClientConnection
from proxyd.front.door import Answered, Door, FrontSettings
from proxyd.front.handoff import Handoff
from proxyd.front.proxies import trusted_from
from proxyd.front.request import Request
from proxyd.front.states import State as ClientState
from proxyd.front.wheel import Wheel
from proxyd.host.sockets import Listeners
from proxyd.relay.attempt import vocabulary_ready
from proxyd.relay.service import Relay, Waits
from proxyd.shm.beats import Beat, State
from proxyd.shm.ledger import Ledger
from proxyd.shm.revocations import RevocationRing
from proxyd.store.revocations import RevocationFile
from proxyd.telemetry.questions import Channel
from proxyd.telemetry.segment import ensure_spool_dir
from proxyd.telemetry.spool import SpoolWriter
from proxyd.upstream.ports import used_on_node
from proxyd.upstream.upstreams import Upstreams
from proxyd.web.admin import AdminContext, AdminServer
from proxyd.web.app import WebContext, WebServer
from proxyd.web.limits_status import TotalsCache, limits_status
from proxyd.worker.adopt import Adoption
from proxyd.worker.asking import Asker
from proxyd.worker.book import SpoolBook
from proxyd.worker.handover import Arrivals, HandOver, Way
from proxyd.worker.jwks import KeyFetcher
from proxyd.worker.main import Context
from proxyd.worker.readiness import NodeReadiness

# A connection accepted in the last moment has its request in the socket already: it is read before idle ones close.
LAST_READ_S = 0.1
# The same where a successor takes the listeners: each request that comes within it is served, none is missed by others.
LAST_SERVED_S = 0.5
# A connection that is kept may ask once more, and hears that the node leaves: a balancer that looks at /readyz does.
# Half may miss one that looks every five seconds, twice keeps clients on a node that has nothing for them.
KEPT_IDLE_S = 5.0
# Where a successor takes the listeners, newcomers wait for it so long, and hear 503 then. Half: more of a restart's are
# refused; twice: a stop, which looks the same, keeps clients waiting that might ask another node.
HOLD_S = 5.0
DRAIN_RETRY_S = 5
OVERLOAD_RETRY_S = 5
EXPIRE_EVERY_TICKS = 60


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What all workers are built from; made once, before the fork."""

    config: Config
    secrets: Secrets
    listeners: Listeners
    ledger: Ledger
    questions: Channel
    page_cookie: str = ""
    """The Set-Cookie value of the chat page's answer (the demo's session), or ""."""
    passage: Way | None = None
    """The way of idle connections between generations; None where there is only one."""
    keeps_listeners: bool = False
    """Whether the service manager keeps the listeners when all processes have ended: then a TERM leaves who waits in
    the backlogs to the successor."""


class Part(Enum):
    """What the worker does with a request that comes."""

    SERVING = "serving"
    RETIRING = "retiring"
    DRAINING = "draining"


async def build(context: Context, blueprint: Blueprint) -> WorkerServices:
    """The services of one worker, not yet accepting. What it raises means: this worker cannot boot."""
    return WorkerServices(context, blueprint)


class WorkerServices:
    """See worker.main.Services for what each public name means."""

    __slots__ = (
        "_acceptor", "_admin", "_adoption", "_arrivals", "_asker", "_blueprint", "_clock", "_context", "_door",
        "_hand_over", "_has_left", "_keys", "_last_read", "_listeners", "_log", "_metrics", "_part", "_ready",
        "_relay", "_revocations", "_ring", "_spool", "_standing", "_ticks", "_totals", "_upstreams", "_was_retiring",
        "_web", "_wheel",
    )  # fmt: skip

    def __init__(self, context: Context, blueprint: Blueprint) -> None:
        config, listeners = blueprint.config, blueprint.listeners
        loop, clock, log, metrics = context.loop, context.clock, context.log, context.metrics
        slot, seat = context.birth.slot, context.birth.seat
        self._context, self._clock, self._log, self._metrics = context, clock, log, metrics
        self._standing = context.standing
        self._blueprint = blueprint
        self._listeners = listeners
        self._part = Part.SERVING
        self._ticks = 0
        self._was_retiring = self._has_left = False
        self._last_read: asyncio.TimerHandle | None = None
        self._wheel = Wheel(clock.monotonic())
        self._keys = keys = KeyFetcher(loop, config.auth.jwks_url, log) if config.auth.jwks_url else None
        sessions = Sessions(config.auth, blueprint.secrets, clock, request_fetch=keys.request if keys else None)
        if keys is not None:
            keys.remote = sessions.remote
        self._revocations = sessions.revocations
        self._ring = RevocationRing(context.region)
        ports_used = lambda: used_on_node(context.region, clock.monotonic())  # noqa: E731
        self._upstreams = Upstreams(config, blueprint.secrets, metrics, log, clock, loop, ports_used)
        self._spool = SpoolWriter.on_loop(
            loop,
            ensure_spool_dir(config.server.state_dir),
            seat,
            context.birth.epoch,
            config.telemetry.durability,
            log,
            spool_max=config.telemetry.spool_max,
        )
        self._totals = totals = TotalsCache(blueprint.ledger)
        share = blueprint.ledger.at(seat, context.birth.epoch)
        telemetry = Beat(context.region, context.region.telemetry)
        self._asker = asker = Asker(
            blueprint.questions.keep_asking(seat), loop, log, is_ready=lambda: telemetry.state is State.READY
        )
        admission = Admission(config, clock, share, metrics, refresh=asker.ask, started_at=context.region.started_at)
        book = SpoolBook(self._spool)
        waits = Waits(keys.wait if keys is not None else None, asker.read, self._maybe_learn_revocations)
        self._relay = Relay(
            loop, config, clock, log, metrics, self._wheel, sessions, admission, self._upstreams, book, waits
        )
        self._ready = NodeReadiness(
            context.region, self._standing, self._spool, totals, lambda: self._acceptor, clock, log
        )
        self._web = WebServer(
            WebContext(
                models=config.model,
                readiness=self._ready.read,
                authorise=lambda request: self._relay.authorize(request)[1],
                preflight=self._relay.preflight,
                cors=self._relay.cors,
                record=self._record,
                log=log,
                clock=clock,
                max_head=config.http.max_head,
                max_body=config.http.max_body,
                has_page=config.demo.page,
                page_cookie=blueprint.page_cookie,
            )
        )
        self._door = Door(
            loop,
            clock,
            self._wheel,
            log,
            FrontSettings(
                max_head=config.http.max_head,
                max_body=config.http.max_body,
                head_timeout=config.http.head_timeout,
                body_timeout=config.http.body_timeout,
                keepalive=config.http.keepalive,
                send_timeout=config.stream.slow_client_timeout,
            ),
            trusted_from(config.http.trusted_proxies),
            serve=self._serve,
            web=Handoff(loop, self._web.make_protocol, log).give,
            preflight=self._relay.preflight,
            cors=self._relay.cors,
            record=self._record,
        )
        self._acceptor = Acceptor(loop, listeners.of_slot(slot), self._door.accept, log)
        self._adoption = Adoption(
            context.region,
            context.birth,
            lambda other: Acceptor(loop, listeners.tcp_of_slot(other), self._door.accept, log),
        )
        passage = blueprint.passage
        self._hand_over = HandOver(loop, self._door, passage, log) if passage is not None else None
        self._arrivals = Arrivals(loop, self._door, passage) if passage is not None else None
        self._admin = AdminServer(
            AdminContext(
                region=context.region,
                clock=clock,
                log=log,
                percentiles=config.monitoring.percentiles,
                revoke=self._ring.publish,
                kept=RevocationFile(config.server.state_dir),
                leeway_s=config.auth.leeway,
                is_node=lambda: self._standing.has_master,
                limits=lambda streaming: limits_status(
                    totals.read(clock.monotonic()), share, config.limits, streaming, clock.monotonic()
                ),
            )
        )

    async def start(self) -> None:
        O200K.prepare()  # now, and not with the first request: a reload would be felt by all who come then
        if self._keys is not None and self._keys.remote is not None:
            self._keys.remote.tick()
            await self._keys.wait()
        self._maybe_learn_revocations()
        await self._web.start(self._context.loop)
        await self._admin.start(self._listeners.admin)
        await vocabulary_ready(self._clock.monotonic)
        self._acceptor.resume()
        if self._arrivals is not None:
            self._arrivals.resume()

    # --- while it serves -----------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        return self._relay.streaming

    @property
    def busy(self) -> int:
        connections = self._door.connections
        active = len(connections) - self._door.count(ClientState.IDLE)
        return max(self._relay.live, active, len(connections) if self._last_read is not None else 0)

    @property
    def held(self) -> int:
        return max(self._relay.live, len(self._door.connections))

    @property
    def running(self) -> int:
        return self._relay.live

    @property
    def finished(self) -> int:
        return self._relay.finished - self._relay.endings.over

    @property
    def handed_over(self) -> int:
        return self._hand_over.count if self._hand_over is not None else 0

    @property
    def ended(self) -> int:
        return self._relay.endings.count

    @property
    def named(self) -> list[dict[str, Any]]:
        return self._relay.endings.named

    def pulse(self) -> None:
        now = self._clock.monotonic()
        self._ready.pulse(now)
        self._relay.tick(now)
        self._wheel.tick(now)
        self._adoption.pulse()
        self._maybe_learn_revocations()
        self._maybe_leave_node()
        if self._part is Part.RETIRING and self._hand_over is not None:
            self._hand_over.look()  # stopped, if it is a drain

    def tick(self) -> None:
        self._upstreams.tick()
        trouble = O200K.take_trouble()
        if trouble:
            self._log.warning("vocabulary_unavailable", detail=trouble)
        if self._keys is not None and self._keys.remote is not None:
            self._keys.remote.tick()
        self._ticks += 1
        if self._ticks % EXPIRE_EVERY_TICKS == 0:
            self._revocations.expire(self._clock.wall())

    def _serve(self, conn: ClientConnection, request: Request) -> None:
        if self._part is Part.DRAINING:
            raise Refusal(503, "draining", "This server is shutting down.", retry_after_s=DRAIN_RETRY_S, close=True)
        if self._ready.is_refusing:
            raise Refusal(503, "overloaded", "This server is overloaded.", retry_after_s=OVERLOAD_RETRY_S)
        self._maybe_learn_revocations()  # one holds from the answer to it on, not from the next pulse
        self._relay.serve(conn, request)

    def _maybe_learn_revocations(self) -> None:
        if not self._ring.has_news():
            return
        for entry in self._ring.take():
            try:
                self._revocations.revoke(entry.kind.name.lower(), entry.value, entry.at, entry.until)
            except (ValueError, RevocationsFull) as error:  # the ring is smaller, and admin has checked the value
                self._log.error("revocation_lost", kind=entry.kind.name.lower(), detail=str(error))
        ended = self._relay.revoke(self._revocations.is_revoked)
        if ended:
            self._log.info("requests_revoked", requests=ended)

    def _record(self, answered: Answered) -> None:
        """The access line and the count of what the relay did not answer."""
        self._metrics.counter("proxyd_requests_total", route=answered.route, status=str(answered.status)).add()
        self._log.access(
            {
                "request_id": answered.request_id,
                "peer": answered.peer,
                "route": answered.route,
                "method": answered.method,
                "path": answered.path,
                "status": answered.status,
                "outcome": "completed" if answered.status < 400 else "rejected",
                "cause": answered.cause or ("complete" if answered.status < 400 else "not_ready"),
                "bytes": answered.bytes_sent,
                "duration_ms": round(answered.duration_s * 1000),
                **({"detail": answered.detail} if answered.detail else {}),
            }
        )

    def _maybe_leave_node(self) -> None:
        """An orphan speaks for no node any more: the admin address is the next master's."""
        if not self._standing.has_master:
            self._admin.close_listeners()

    # --- the end -------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        self._part = Part.RETIRING
        self._leave_listeners(takes_rest=True)
        # The next generation answers there, with the configuration that holds.
        self._admin.close_listeners()
        if self._arrivals is not None and self._hand_over is not None:
            self._arrivals.pause()
            self._hand_over.begin()
        else:
            self._door.retire(lambda conn: None)

    @property
    def awaited(self) -> int:
        """Where the listeners stay open behind us, who knocks at ours would be heard by nobody."""
        if not self._blueprint.keeps_listeners or self._was_retiring:
            return 0
        region, own = self._context.region, self._context.birth.seat
        return sum(Beat(region, seat).streams for seat in range(region.telemetry) if seat != own)

    @property
    def is_orphan(self) -> bool:
        return not self._standing.has_master

    def refuse(self) -> None:
        self._was_retiring = self._part is Part.RETIRING
        is_kept = self._blueprint.keeps_listeners
        # Where a successor comes, what is on its way on kept connections is still served; a 503 would be the only one.
        self._part = Part.RETIRING if is_kept else Part.DRAINING
        self._maybe_leave_node()
        self._door.draining = True
        if self._hand_over is not None:
            self._hand_over.stop()
        if not self._was_retiring:
            self._adoption.close()
            self._listeners.close_public(but=self._context.birth.slot)
            if is_kept:
                self._acceptor.pause()
                self._context.loop.call_later(HOLD_S, self._refuse_who_waits)
            if self._arrivals is not None:
                self._arrivals.pause()
                self._arrivals.take_rest()
        self._begin_last_read()
        self._context.loop.call_later(KEPT_IDLE_S, self._door.drain)

    def _refuse_who_waits(self) -> None:
        if not self._has_left:
            self._acceptor.resume()

    def stop_accepting(self) -> None:
        if not self._was_retiring:
            self._leave_listeners(takes_rest=not self._blueprint.keeps_listeners)
        self._begin_last_read()

    def _leave_listeners(self, *, takes_rest: bool) -> None:
        """Whoever waits in the backlog gets an answer here, or from who keeps the listeners open."""
        self._has_left = True
        self._acceptor.pause()
        self._adoption.close()
        if takes_rest:
            self._acceptor.accept_rest()
        self._acceptor.close()
        self._listeners.close_public()

    def _begin_last_read(self) -> None:
        """Anew for those who came last: what began before must not end it for them."""
        if self._last_read is not None:
            self._last_read.cancel()
        is_kept = self._blueprint.keeps_listeners
        window_s = LAST_SERVED_S if is_kept else LAST_READ_S
        self._last_read = self._context.loop.call_later(window_s, self._after_last_read, is_kept)

    def _after_last_read(self, has_successor: bool) -> None:
        self._last_read = None
        self._part = Part.DRAINING
        self._door.drain(fresh_only=not has_successor)

    def interrupt(self, keep: int) -> int:
        return self._relay.interrupt(keep)

    async def close(self) -> None:
        self._relay.drop()
        self._door.drain()
        self._door.close()
        self._asker.close()
        if self._keys is not None:
            self._keys.close()
        await self._admin.stop()
        await self._web.stop()
        await self._upstreams.close()
        self._spool.close()
