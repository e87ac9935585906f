"""The admin listener: metrics, status and revocation, never on a public address.

Owns its three routes and their errors. Must not know how the node serves: it reads shared memory, publishes into the
ring of revocations and appends to their file. All workers accept on the one admin listener, whoever answers speaks
for the node. Who may connect is the Unix socket's mode, or loopback: there is no token here.

A revocation is in force from its publication on, and answered with 200 when it is on disk as well.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from proxyd.access.revocations import Revocations
from proxyd.clock import Clock
from proxyd.host.sockets import count_time_wait
from proxyd.log import Log
from proxyd.shm import metrics
from proxyd.shm.notice import Notices
from proxyd.shm.region import REVOCATION_ENTRIES, Region
from proxyd.shm.revocations import Kind, Revocation, RevocationFull
from proxyd.store.revocations import RevocationFile
from proxyd.web.exposition import CONTENT_TYPE, render_parts
from proxyd.web.generations import last_reload
from proxyd.web.status import build_status

# A revocation is three short fields; more is a mistake.
MAX_BODY_BYTES = 16 * 1024
SHUTDOWN_S = 1.0
LAST_ANSWERS_S = 0.3  # at the end of a worker; a request is under way for microseconds, an idle scraper waits in vain
# What a disk may take for one line; a client of ours has given up by then, and the revocation is in force anyway.
KEEP_TIMEOUT_S = 10.0
# The year 5138: beyond it somebody wrote milliseconds, and the revocation would never be forgotten.
MAX_EXP_S = 1e11
# Connections between accept and their transport: one turn of the loop each.
MAX_HANDSHAKES = 64


# Of what somebody sent, in an error message.
MAX_SHOWN = 64

_ROUTES = "GET /metrics, GET /status and POST /sessions/revoke"
_EXAMPLES = {
    "user": 'it is the number of the claim sub, such as {"user": 42}',
    "tenant": 'it is the claim tenant, such as {"tenant": "acme"}',
    "jti": 'it is the claim jti, such as {"jti": "4f1c"}',
}


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What the routes work with.

    revoke: publishes to every worker; raises ValueError or RevocationFull. kept: where revocations outlive the daemon.
    leeway_s: how long after its `exp` a token is taken. is_node: False in a worker whose master is gone. limits: the
    status's member of that name; given the tenants that have streams now.
    """

    region: Region
    clock: Clock
    log: Log
    percentiles: Sequence[float]
    revoke: Callable[[Revocation], int]
    kept: RevocationFile
    leeway_s: float
    is_node: Callable[[], bool]
    limits: Callable[[Iterable[str]], dict[str, Any]] = lambda streaming: {}


_CONTEXT: web.AppKey[AdminContext] = web.AppKey("admin", AdminContext)


def make_admin_app(context: AdminContext) -> web.Application:
    app = web.Application(middlewares=[_in_json], client_max_size=MAX_BODY_BYTES)
    app[_CONTEXT] = context
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/status", _status)
    app.router.add_post("/sessions/revoke", _revoke)
    return app


class AdminServer:
    """The application on its listeners, in one worker.

    Accepts by itself: `create_server(sock=...)` would call listen() again, with another backlog and with our pid as
    the socket's owner, by which a new master tells a living node from the orphans of a dead one (host/sockets.py).
    """

    __slots__ = ("_context", "_listeners", "_loop", "_runner", "_tasks")

    def __init__(self, context: AdminContext) -> None:
        self._context = context
        self._runner: web.AppRunner | None = None
        self._listeners: list[socket.socket] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[object]] = set()

    async def start(self, listeners: Sequence[socket.socket]) -> None:
        """Accepts from now on."""
        self._loop = asyncio.get_running_loop()
        self._runner = web.AppRunner(
            make_admin_app(self._context), handle_signals=False, access_log=None, shutdown_timeout=SHUTDOWN_S
        )
        await self._runner.setup()
        self._listeners = list(listeners)
        for listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._on_readable, listener)

    def close_listeners(self) -> None:
        """Accepts no more and lets go of the address; open connections stay."""
        for listener in self._listeners:
            if self._loop is not None and listener.fileno() >= 0:
                self._loop.remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()

    async def stop(self) -> None:
        self.close_listeners()
        if self._runner is not None:
            await self._answer_last(self._runner.server)
            await self._runner.cleanup()
            self._runner = None

    async def _answer_last(self, server: web.Server | None) -> None:
        """Who was accepted a moment ago asks now: closed without an answer, a reload were an outage to a monitor."""
        assert self._loop is not None
        until = self._loop.time() + LAST_ANSWERS_S
        # aiohttp tells nobody when one has its answer.
        while (self._tasks or (server is not None and server.connections)) and self._loop.time() < until:  # noqa: ASYNC110
            await asyncio.sleep(LAST_ANSWERS_S / 10)

    def _on_readable(self, listener: socket.socket) -> None:
        """One connection a turn: another worker may have been faster, and nobody is in a hurry here."""
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        server = self._runner.server if self._runner is not None else None
        if server is None or self._loop is None or len(self._tasks) >= MAX_HANDSHAKES:
            sock.close()
            return
        sock.setblocking(False)
        task: asyncio.Task[object] = self._loop.create_task(self._pass_on(server, sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, server: web.Server, sock: socket.socket) -> None:
        assert self._loop is not None
        try:
            await self._loop.connect_accepted_socket(server, sock)
        except OSError:  # the peer left between two callbacks of ours
            sock.close()


@web.middleware
async def _in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """What aiohttp refuses by itself, in our words."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        return _error(404, "not_found", f"There is nothing at {request.path[:MAX_SHOWN]}; here are {_ROUTES}.")
    except web.HTTPMethodNotAllowed as refused:
        answer = _error(405, "method_not_allowed", f"{request.method[:MAX_SHOWN]} is not for this; here are {_ROUTES}.")
        answer.headers["Allow"] = refused.headers["Allow"]
        return answer
    except web.HTTPRequestEntityTooLarge:
        return _error(413, "body_too_large", f"The body is larger than {MAX_BODY_BYTES} bytes.")


async def _metrics(request: web.Request) -> web.Response:
    context = request.app[_CONTEXT]
    snapshot = metrics.read(context.region, context.clock.monotonic())
    parts: list[bytes] = []
    for part in render_parts(snapshot, count_time_wait(), last_reload(Notices(context.region).get())):
        parts.append(part)
        await asyncio.sleep(0)  # streams have their turn between two families
    return web.Response(body=b"".join(parts), headers={"Content-Type": CONTENT_TYPE})


async def _status(request: web.Request) -> web.Response:
    context = request.app[_CONTEXT]
    now = context.clock.monotonic()
    document = build_status(
        context.region,
        metrics.read(context.region, now),
        monotonic_s=now,
        percentiles=context.percentiles,
        time_wait=count_time_wait(),
        notice=Notices(context.region).get(),
    )
    return _json(document | {"limits": context.limits(document["streams"]["by_tenant"])})


async def _revoke(request: web.Request) -> web.Response:
    """{"user": 42} or {"tenant": "t"} or {"jti": "..."}, one of them: its streams end, its tokens stay refused.

    With "exp", when the last of those tokens expires, the revocation is forgotten then; without, it is kept for good.
    """
    context = request.app[_CONTEXT]
    if not context.is_node():
        # The next node may be running already, and would not hear of it.
        return _error(503, "orphaned", "This process belongs to a daemon that has died; ask again.")
    now = context.clock.wall()
    try:
        document = orjson.loads(await request.read())
        entry = _revocation_of(document, now, context.leeway_s)
        number = context.revoke(entry)
    except orjson.JSONDecodeError:
        return _error(400, "invalid_json", "The body is not JSON.")
    except ValueError as error:
        return _error(400, "invalid_request", f"{error}.")
    except RevocationFull:
        context.log.error("revocations_full", kind=entry.kind.name.lower())
        message = f"{REVOCATION_ENTRIES} revocations are in force; a restart makes room for those whose exp has passed."
        return _error(503, "revocations_full", message)
    name = entry.kind.name.lower()
    told = {"revoked": {name: document[name]}, "at": now}
    context.log.info("session_revoked", kind=name, value=document[name], revocation=number)
    try:
        # In a thread: the disk may take long, and streams are relayed here.
        await asyncio.wait_for(asyncio.to_thread(context.kept.append, entry), KEEP_TIMEOUT_S)
    except OSError as error:  # TimeoutError is one
        detail = error.strerror or f"not written within {KEEP_TIMEOUT_S:g} s"
        context.log.error("revocation_not_kept", kind=name, path=str(context.kept.path), detail=detail)
        message = f"It is in force, but a restart forgets it: {context.kept.path}: {detail}. Repeat it."
        return _json(_error_of("revocation_not_kept", message) | told, 503)
    return _json(told)


def _revocation_of(document: object, now: float, leeway_s: float) -> Revocation:
    """Raises ValueError in the words of the answer."""
    names = document.keys() - {"exp"} if isinstance(document, dict) else set()
    if not isinstance(document, dict) or len(names) != 1 or not names <= {"user", "tenant", "jti"}:
        raise ValueError("Give one of user, tenant and jti, and exp if you know it")
    (name,) = names
    try:
        # Refused here in the words of those who will apply it: a worker could only log it.
        Revocations(max_entries=1).revoke(name, document[name], now)
    except ValueError as error:
        raise ValueError(f"{error}: {_shown(document[name])}; {_EXAMPLES[name]}") from None
    until = math.inf
    if "exp" in document:
        exp = document["exp"]
        if type(exp) not in (int, float) or not now < exp + leeway_s < MAX_EXP_S:
            raise ValueError(f"exp is not a time to come, in seconds since 1970: {_shown(exp)}")
        until = exp + leeway_s
    return Revocation(Kind[name.upper()], str(document[name]), now, until)


def _shown(value: object) -> str:
    """A value of the request as it stood there."""
    text = orjson.dumps(value).decode()
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def _error(status: int, code: str, message: str) -> web.Response:
    return _json(_error_of(code, message), status)


def _error_of(code: str, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": code}}
