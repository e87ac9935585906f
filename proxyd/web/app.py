"""The web application: health, readiness, the model list, and the chat page.

Owns: the table of web routes and the shape of every answer given here (ids, errors, headers). Must not know: sockets,
the relay, how a session is checked: `WebContext` brings callables.

Invariants: every answer carries X-Proxyd-Request-Id and X-Request-Id; errors have the shape of `dialects.errors`; no
answer names aiohttp or Python; one access record an answer. A page of an allowed origin may read every error, and what
a session is asked for on: those routes answer its preflight as the relay's do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import orjson
from aiohttp import web

from proxyd.clock import Clock
from proxyd.dialects.errors import Named, error_body, models_page
from proxyd.errors import Refusal
from proxyd.front.door import Answered
from proxyd.front.handoff import OnEnd
from proxyd.front.request import Request
from proxyd.log import Log
from proxyd.web.handed import HandedRequestHandler
from proxyd.web.page import PAGE_HEADERS, page_bytes
from proxyd.wire.head import Headers

__all__ = ["Readiness", "WebContext", "WebServer", "make_app"]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this node should get new requests: why not, in a short phrase, and what a person wants to know."""

    ready: bool
    reason: str = "ready"
    retry_after_s: int = 5
    details: dict[str, object] | None = None


@dataclass(frozen=True, slots=True)
class WebContext:
    """What the application works with.

    authorise: who may ask: checks session and origin of a request, returns the CORS headers of its answer, or raises
    Refusal. preflight: the headers of the 204 to a browser's OPTIONS, or raises Refusal. cors: what lets a page read an
    error. page_cookie: the whole Set-Cookie value that the page's answer brings (the demo's session), or "".
    """

    models: Iterable[Named]
    readiness: Callable[[], Readiness]
    authorise: Callable[[Request], Headers]
    preflight: Callable[[Request], Headers]
    cors: Callable[[Headers], Headers]
    record: Callable[[Answered], None]
    log: Log
    clock: Clock
    max_head: int
    max_body: int
    has_page: bool = False
    page_cookie: str = ""


# Where a session is asked for, a browser asks first whether a page of another origin may bring one.
_PATHS_WITH_SESSION = ("/v1/models",)

# What is still being answered when the worker ends had the whole drain already; aiohttp's own default is a minute.
STOP_S = 1.0

_CONTEXT: web.AppKey[WebContext] = web.AppKey("context", WebContext)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def front_request(request: web.Request) -> Request:
    """The request as the front read it: its id, who is asking, and the headers as they came."""
    protocol = request.protocol
    assert isinstance(protocol, HandedRequestHandler), "only handed connections reach this application"
    return protocol.front


def make_app(context: WebContext) -> web.Application:
    """The application with its routes; HEAD is served where GET is."""
    app = web.Application(middlewares=[_answer], client_max_size=context.max_body)
    app[_CONTEXT] = context
    app.on_response_prepare.append(_finish_headers)
    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz)
    app.router.add_get("/v1/models", _models)
    for path in _PATHS_WITH_SESSION:
        app.router.add_options(path, _preflight)
    if context.has_page:
        app.router.add_get("/", _page)
    return app


class WebServer:
    """The application, running for handed connections only: it listens nowhere."""

    __slots__ = ("_context", "_loop", "_runner")

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Readies the application."""
        self._loop = loop
        self._runner = web.AppRunner(
            make_app(self._context), handle_signals=False, access_log=None, shutdown_timeout=STOP_S
        )
        await self._runner.setup()

    async def stop(self) -> None:
        """Ends what is being answered and forgets the application."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def make_protocol(self, request: Request, may_keep: bool, kept: bytes, on_end: OnEnd) -> HandedRequestHandler:
        """The factory that `front.handoff.Handoff` takes."""
        server = self._runner.server if self._runner is not None else None
        loop = self._loop
        assert server is not None, "start() first"
        assert loop is not None, "start() first"
        return HandedRequestHandler(server, loop, request, may_keep, kept, on_end, self._context.max_head)


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Makes an answer out of whatever the handler does, and records it."""
    context = request.app[_CONTEXT]
    front = front_request(request)
    response, refusal = await _respond(context, front, request, handler)
    if response.status >= 400:
        _add_headers(response, context.cors(front.head.headers))
    body = response.body if isinstance(response, web.Response) else None
    context.record(
        Answered(
            request_id=front.request_id,
            route="web",
            method=request.method,
            path=front.head.path,
            status=response.status,
            peer=front.peer,
            bytes_sent=len(body) if isinstance(body, bytes | bytearray) and request.method != "HEAD" else 0,
            duration_s=context.clock.monotonic() - front.received_at,
            cause=refusal.cause if refusal is not None else "",
            detail=refusal.detail if refusal is not None else "",
        )
    )
    return response


async def _respond(
    context: WebContext, front: Request, request: web.Request, handler: Handler
) -> tuple[web.StreamResponse, Refusal | None]:
    """The answer, and the refusal that it says, if it is one."""
    try:
        # The router decodes percent escapes and so would serve `/v1%2Fmodels`: an equal path is the only match.
        if request.match_info.http_exception is None and not _is_exact(request, front):
            raise _unknown(front)
        return await handler(request), None
    except Refusal as refusal:
        return _refused(front, refusal)
    except web.HTTPMethodNotAllowed as refused:
        allow = ", ".join(sorted(refused.allowed_methods))
        message = f"{front.head.path} takes {allow}, not {request.method}."
        return _refused(front, Refusal(405, "method_not_allowed", message, headers=(("Allow", allow),)))
    except web.HTTPException as refused:
        if refused.status == 404:
            return _refused(front, _unknown(front))
        return _refused(front, Refusal(max(refused.status, 400), "bad_request", refused.reason))
    except Exception as error:  # noqa: BLE001 - here one request ends, not the worker
        context.log.error("web_handler_failed", request_id=front.request_id, error=repr(error))
        return _refused(front, Refusal(500, "internal_error", "The request could not be served."))


def _is_exact(request: web.Request, front: Request) -> bool:
    resource = request.match_info.route.resource
    return resource is None or "{" in resource.canonical or resource.canonical == front.head.path


def _unknown(front: Request) -> Refusal:
    return Refusal(404, "not_found", f"There is nothing at {front.head.path}.")


def _refused(front: Request, refusal: Refusal) -> tuple[web.Response, Refusal]:
    return _refuse(front, refusal), refusal


def _refuse(front: Request, refusal: Refusal) -> web.Response:
    response = web.Response(
        status=refusal.status,
        body=error_body(front.head.path, refusal, front.request_id),
        content_type="application/json",
        headers=dict(refusal.headers),
    )
    if refusal.close:
        response.force_close()
    return response


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    front = front_request(request)
    response.headers["X-Proxyd-Request-Id"] = front.request_id
    response.headers["X-Request-Id"] = front.request_id
    # aiohttp would name itself and Python with their versions.
    response.headers.popall("Server", None)


def _json(document: object, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


async def _healthz(request: web.Request) -> web.StreamResponse:
    return _json({"status": "ok"})


async def _readyz(request: web.Request) -> web.StreamResponse:
    state = request.app[_CONTEXT].readiness()
    document: dict[str, object] = {"status": "ready" if state.ready else "unavailable", "reason": state.reason}
    if state.details:
        document["details"] = state.details
    response = _json(document, 200 if state.ready else 503)
    if not state.ready:
        response.headers["Retry-After"] = str(state.retry_after_s)
    return response


async def _models(request: web.Request) -> web.StreamResponse:
    context = request.app[_CONTEXT]
    cors = context.authorise(front_request(request))
    response = web.Response(body=models_page(context.models), content_type="application/json")
    _add_headers(response, cors)
    return response


async def _preflight(request: web.Request) -> web.StreamResponse:
    headers = request.app[_CONTEXT].preflight(front_request(request))
    response = web.Response(status=204)
    _add_headers(response, headers)
    return response


def _add_headers(response: web.StreamResponse, headers: Headers) -> None:
    """A line that is there already, such as the Vary of a refused preflight, is not said twice."""
    for name, value in headers:
        field, text = name.decode("latin-1"), value.decode("latin-1")
        if text not in response.headers.getall(field, []):
            response.headers.add(field, text)


def _is_loopback(host: str) -> bool:
    # A name of somebody else's that leads here (DNS rebinding) would get the demo's session for its own pages.
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name in ("127.0.0.1", "localhost", "[::1]")


async def _page(request: web.Request) -> web.StreamResponse:
    context = request.app[_CONTEXT]
    response = web.Response(body=page_bytes(), headers=PAGE_HEADERS)
    if context.page_cookie and _is_loopback(request.host):
        response.headers["Set-Cookie"] = context.page_cookie
    return response
