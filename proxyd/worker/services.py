"""What a worker serves, put together: the only place that knows every room of it.

Owns the wiring, the order of starting and ending, and the words of readiness. Must not know how any of it works.

    Acceptor -> Door -> Relay -> Upstreams          listeners of the slot, and of a vacant one (adopt)
                  |       '--> Admission -> Ledger  shared by all workers; Asker has it read from the store
                  '---> Handoff -> WebServer        all other public routes
    admin listener -> AdminServer                   shared by all workers
    Relay -> SpoolWriter                            one row a transaction

Everything is made after the fork: it belongs to one loop and one process.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

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
from proxyd.relay.service import Relay, Waits
from proxyd.shm.beats import Beat, State
from proxyd.shm.ledger import Ledger
from proxyd.shm.metrics import read
from proxyd.shm.revocations import RevocationRing
from proxyd.store.revocations import RevocationFile
from proxyd.telemetry.questions import Channel
from proxyd.telemetry.segment import ensure_spool_dir
from proxyd.telemetry.spool import SpoolWriter
from proxyd.upstream.upstreams import Upstreams
from proxyd.web.admin import AdminContext, AdminServer
from proxyd.web.app import Readiness, WebContext, WebServer
from proxyd.web.limits_status import TotalsCache, limits_status
from proxyd.web.status import store_trouble
from proxyd.worker.adopt import Adoption
from proxyd.worker.asking import Asker
from proxyd.worker.book import SpoolBook
from proxyd.worker.jwks import KeyFetcher
from proxyd.worker.main import Context

# A connection accepted in the last moment has its request in the socket already: it is read before idle ones close.
LAST_READ_S = 0.1
DRAIN_RETRY_S = 5
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


async def build(context: Context, blueprint: Blueprint) -> WorkerServices:
    """The services of one worker, not yet accepting. What it raises means: this worker cannot boot."""
    return WorkerServices(context, blueprint)


class WorkerServices:
    """See worker.main.Services for what each public name means."""

    __slots__ = (
        "_acceptor", "_admin", "_adoption", "_asker", "_clock", "_context", "_door", "_is_last_read", "_keys",
        "_listeners", "_log", "_metrics", "_relay", "_revocations", "_ring", "_spool", "_standing", "_ticks", "_totals",
        "_upstreams", "_web", "_wheel",
    )  # fmt: skip

    def __init__(self, context: Context, blueprint: Blueprint) -> None:
        config, listeners = blueprint.config, blueprint.listeners
        loop, clock, log, metrics = context.loop, context.clock, context.log, context.metrics
        slot, seat = context.birth.slot, context.birth.seat
        self._context, self._clock, self._log, self._metrics = context, clock, log, metrics
        self._standing = context.standing
        self._listeners = listeners
        self._ticks = 0
        self._is_last_read = False
        self._wheel = Wheel(clock.monotonic())
        self._keys = keys = KeyFetcher(loop, config.auth.jwks_url, log) if config.auth.jwks_url else None
        sessions = Sessions(config.auth, blueprint.secrets, clock, request_fetch=keys.request if keys else None)
        if keys is not None:
            keys.remote = sessions.remote
        self._revocations = sessions.revocations
        self._ring = RevocationRing(context.region)
        self._upstreams = Upstreams(config, blueprint.secrets, metrics, log, clock, loop)
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
        self._web = WebServer(
            WebContext(
                models=config.model,
                readiness=self._readiness,
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
            slot,
            config.server.workers,
            lambda other: Acceptor(loop, listeners.tcp_of_slot(other), self._door.accept, log),
        )
        self._admin = AdminServer(
            AdminContext(
                region=context.region,
                workers=config.server.workers,
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
        if self._keys is not None and self._keys.remote is not None:
            self._keys.remote.tick()
            await self._keys.wait()
        self._maybe_learn_revocations()
        await self._web.start(self._context.loop)
        await self._admin.start(self._listeners.admin)
        self._acceptor.resume()

    # --- while it serves -----------------------------------------------------------------------------------------

    @property
    def streams(self) -> int:
        return self._relay.streaming

    @property
    def busy(self) -> int:
        connections = self._door.connections
        active = len(connections) - self._door.count(ClientState.IDLE)
        return max(self._relay.live, active, len(connections) if self._is_last_read else 0)

    def pulse(self) -> None:
        now = self._clock.monotonic()
        self._relay.tick(now)
        self._wheel.tick(now)
        self._adoption.pulse()
        self._maybe_learn_revocations()
        self._maybe_leave_node()

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
        if self._standing.state is State.DRAINING:
            raise Refusal(503, "draining", "This server is shutting down.", retry_after_s=DRAIN_RETRY_S, close=True)
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

    def _readiness(self) -> Readiness:
        state = self._standing.state
        if state is not State.READY:
            return Readiness(False, state.name.lower())
        broken = self._spool.broken_reason
        if broken is not None:
            return Readiness(False, "spool_unavailable", details={"spool": broken})
        return Readiness(True, details=self._telemetry())

    def _telemetry(self) -> dict[str, object]:
        """Whether rows flow: a store that is down keeps nobody from being served, but should be seen."""
        slot = self._context.region.slots - 2
        gauges = read(self._context.region, self._clock.monotonic(), [slot]).gauges
        waiting = sum(gauges.get("proxyd_telemetry_spool_bytes", {}).values())
        details: dict[str, object] = {
            "telemetry": Beat(self._context.region, slot).state.name.lower(),
            "spool_bytes": waiting,
            "limits": self._totals.read(self._clock.monotonic()),
        }
        trouble = store_trouble(gauges)
        if trouble is not None:
            # The admin listener tells the path as well; this route is public.
            reason = trouble["reason"].rpartition(": ")[2]
            details["store"] = {"state": "failing", "reason": reason, "failing_since": trouble["failing_since"]}
        return details

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

    def stop_accepting(self) -> None:
        slot = self._context.birth.slot
        self._maybe_leave_node()
        self._acceptor.close()
        self._adoption.close()
        self._door.draining = True
        for listener in self._listeners.of_slot(slot):
            self._accept_rest(listener)
        self._listeners.close_public()
        self._is_last_read = True
        self._context.loop.call_later(LAST_READ_S, self._close_idle)

    def _accept_rest(self, listener: socket.socket) -> None:
        """Whoever waits in the backlog gets an answer; closing the listener would reset them."""
        while True:
            try:
                sock, address = listener.accept()
            except OSError:
                return
            sock.setblocking(False)
            self._door.accept(sock, address)

    def _close_idle(self) -> None:
        self._is_last_read = False
        self._door.drain()

    def abort(self) -> None:
        self._relay.interrupt()

    async def close(self) -> None:
        self._relay.drop()
        self._door.close()
        self._asker.close()
        if self._keys is not None:
            self._keys.close()
        await self._admin.stop()
        await self._web.stop()
        await self._upstreams.close()
        self._spool.close()
