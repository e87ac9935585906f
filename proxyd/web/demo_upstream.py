"""The demo upstream: a labelled stand-in for a provider, at a realistic pace, on loopback only.

Owns: its HTTP surface, the pace, and the faults it plays on request. Must not know: proxyd's configuration or workers.
`proxyd --demo` runs it as a child; tests run `python -m proxyd.web.demo_upstream --port 0`, which prints its port.
Never part of a configured node. Only loopback peers are answered, and with a key only who knows the key.

Faults, for tests and for showing what a client sees: the same directives in the model's name (`demo-error-429`,
`demo-burst`), in the prompt (`[demo: pace=5 words=200]`) or in the header `X-Demo-Scenario`, in this order; a later
one overrides. docs/development.md lists them. One that is not known is answered by a sentence with those that are.

`GET /demo/state` tells `requests`, `live` and `aborted` (clients that went away), so that a test can see what its proxy
left running.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ipaddress
import re
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from aiohttp import web

from proxyd.host.child import Birth
from proxyd.web import demo_answers as answers

__all__ = [
    "ALONE", "NUMBERED", "Pace", "decide_scenario", "explain", "listen", "main", "make_app", "run_child", "serve",
]  # fmt: skip

# What the providers do on a good day: first token after a few hundred ms, then 20 to 50 tokens a second.
DELAY_MS = 250
PACE_MS = 40

# A stall ends by itself after this, so that nothing of a test hangs for ever.
STALL_S = 600.0
# Prime and small: event boundaries and write boundaries never agree for long.
BURST_PIECE_BYTES = 1013

# Directives with a number, and those that stand alone.
NUMBERED = ("error", "cut", "stall", "delay", "pace", "words")
ALONE = ("burst", "no_usage")

_DIRECTIVE = re.compile(rf"(?:({'|'.join(NUMBERED)})=([0-9]{{1,9}})|({'|'.join(ALONE)}))")
_IN_PROMPT = re.compile(r"\[demo:([^\]]*)\]")
# A model may have any name: what is no directive here is a name.
_IN_MODEL = re.compile(rf"demo-(?:({'|'.join(NUMBERED)})-([0-9]{{1,9}})|({'|'.join(ALONE)}))")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Pace:
    """Milliseconds before the first byte and between events."""

    delay_ms: int = DELAY_MS
    pace_ms: int = PACE_MS


@dataclass(frozen=True, slots=True)
class Scenario:
    """What this answer does; -1 where nothing was asked for."""

    error: int = 0
    cut: int = -1
    stall: int = -1
    delay: int = DELAY_MS
    pace: int = PACE_MS
    words: int = 0
    burst: bool = False
    no_usage: bool = False
    unknown: str = ""


@dataclass(slots=True)
class Counts:
    """What `GET /demo/state` tells."""

    requests: int = 0
    live: int = 0
    aborted: int = 0


@dataclass(slots=True)
class _Demo:
    key: str
    pace: Pace
    counts: Counts = field(default_factory=Counts)


_DEMO: web.AppKey[_Demo] = web.AppKey("demo", _Demo)


def decide_scenario(pace: Pace, model: str, prompt: str, header: str) -> Scenario:
    """The faults asked for. Pure; `unknown` is the first directive that is none."""
    chosen = Scenario(delay=pace.delay_ms, pace=pace.pace_ms)
    in_model = _IN_MODEL.search(model)
    asked = [in_model[3] or f"{in_model[1]}={in_model[2]}"] if in_model is not None else []
    for text in (*_IN_PROMPT.findall(prompt), header):
        asked += text.replace(",", " ").split()
    for word in asked:
        directive = _DIRECTIVE.fullmatch(word)
        change: dict[str, Any]
        if directive is None:
            change = {"unknown": chosen.unknown or word}
        elif directive[3]:
            change = {directive[3]: True}
        else:
            change = {directive[1]: min(int(directive[2]), 1_000_000)}
        if not 400 <= change.get("error", 400) <= 599:
            change = {"unknown": chosen.unknown or word}
        chosen = replace(chosen, **change)
    return chosen


def explain(unknown: str) -> str:
    """What the demo answers where it was asked for something it cannot do."""
    known = ", ".join([f"{name}=N" for name in NUMBERED] + list(ALONE))
    return f"The demo does not know the directive {unknown}. It knows {known}; error takes 400 to 599."


def make_app(key: str = "", pace: Pace | None = None) -> web.Application:
    """The application; paths are served with and without `/v1`, as base URLs differ between the dialects."""
    app = web.Application(middlewares=[_guard], client_max_size=64 * 1024 * 1024)
    app[_DEMO] = _Demo(key, pace or Pace())
    for prefix in ("", "/v1"):
        app.router.add_post(f"{prefix}/chat/completions", _answering(answers.chat))
        app.router.add_post(f"{prefix}/completions", _answering(answers.completion))
        app.router.add_post(f"{prefix}/responses", _answering(answers.response))
        app.router.add_post(f"{prefix}/messages", _answering(answers.message))
        app.router.add_post(f"{prefix}/embeddings", _embeddings)
        app.router.add_post(f"{prefix}/messages/count_tokens", _count_tokens)
        app.router.add_get(f"{prefix}/models", _models)
    app.router.add_get("/demo/state", _state)
    return app


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    demo = request.app[_DEMO]
    try:
        is_near = ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        is_near = False
    if not is_near:
        return _error(request, 403, "The demo upstream answers this machine only.")
    given = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get("X-Api-Key", "")
    if demo.key and not hmac.compare_digest(given.encode(), demo.key.encode()):
        return _error(request, 401, "The demo upstream does not know this key.")
    return await handler(request)


def _error(request: web.Request, status: int, text: str) -> web.Response:
    kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 529: "overloaded_error"}.get(
        status, "api_error" if status >= 500 else "invalid_request_error"
    )
    error: dict[str, Any] = {"type": kind, "message": text}
    if "/messages" in request.path:
        document: dict[str, Any] = {"type": "error", "error": error, "request_id": "req_demo"}
    else:
        document = {"error": {**error, "param": None, "code": kind}}
    headers = {"Retry-After": "1"} if status in (429, 503, 529) else {}
    return web.Response(
        status=status, body=orjson.dumps(document), content_type="application/json", headers=headers
    )


async def _document(request: web.Request) -> dict[str, Any] | None:
    try:
        document = orjson.loads(await request.read())
    except ValueError:
        return None
    return document if isinstance(document, dict) else None


def _answering(answer: Callable[[answers.Question, bool], Any]) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        document = await _document(request)
        if document is None:
            return _error(request, 400, "The body is not a JSON object.")
        demo = request.app[_DEMO]
        header = request.headers.get("X-Demo-Scenario", "")
        plain = answers.read_question(document)
        scenario = decide_scenario(demo.pace, plain.model, plain.prompt, header)
        question = answers.read_question(document, scenario.words)
        if scenario.unknown:
            question = answers.say(question, explain(scenario.unknown))
        demo.counts.requests += 1
        demo.counts.live += 1
        try:
            await asyncio.sleep(scenario.delay / 1000)
            if scenario.error:
                return _error(request, scenario.error, f"The demo was asked to answer {scenario.error}.")
            if not document.get("stream"):
                whole = answer(question, False)
                if scenario.no_usage:
                    whole.pop("usage", None)
                return _json(whole)
            if scenario.no_usage:
                question = replace(question, is_usage_wanted=False)
            return await _stream(request, answer(question, True), scenario)
        except (asyncio.CancelledError, ConnectionError):
            demo.counts.aborted += 1
            raise
        finally:
            demo.counts.live -= 1

    return handle


async def _stream(request: web.Request, events: list[bytes], scenario: Scenario) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "X-Request-Id": "req_demo"}
    )
    await response.prepare(request)
    if scenario.burst:
        everything = b"".join(events)
        for at in range(0, len(everything), BURST_PIECE_BYTES):
            await response.write(everything[at : at + BURST_PIECE_BYTES])
        await response.write_eof()
        return response
    for number, event in enumerate(events):
        if number == scenario.cut:
            # Without the last chunk: what a crashed provider looks like.
            if request.transport is not None:
                request.transport.abort()
            return response
        if number == scenario.stall:
            await asyncio.sleep(STALL_S)
        await response.write(event)
        if scenario.pace:
            await asyncio.sleep(scenario.pace / 1000)
    await response.write_eof()
    return response


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(
        body=orjson.dumps(document), content_type="application/json", headers={"X-Request-Id": "req_demo"}
    )


async def _embeddings(request: web.Request) -> web.StreamResponse:
    document = await _document(request)
    if document is None:
        return _error(request, 400, "The body is not a JSON object.")
    return _json(answers.embeddings(document))


async def _count_tokens(request: web.Request) -> web.StreamResponse:
    document = await _document(request)
    if document is None:
        return _error(request, 400, "The body is not a JSON object.")
    return _json({"input_tokens": answers.read_question(document).prompt_tokens})


async def _models(request: web.Request) -> web.StreamResponse:
    return _json(answers.models())


async def _state(request: web.Request) -> web.StreamResponse:
    counts = request.app[_DEMO].counts
    return _json({"requests": counts.requests, "live": counts.live, "aborted": counts.aborted})


async def serve(listener: socket.socket, key: str, pace: Pace, stop: asyncio.Event) -> None:
    """Answers on `listener` (bound to loopback) until `stop`; what runs then is ended at once."""
    # A client that leaves cancels its handler: the pace of an answer nobody reads must not keep it alive.
    runner = web.AppRunner(
        make_app(key, pace), handle_signals=False, access_log=None, handler_cancellation=True, shutdown_timeout=0.1
    )
    await runner.setup()
    await web.SockSite(runner, listener).start()
    try:
        await stop.wait()
    finally:
        await runner.cleanup()


def listen(port: int = 0) -> socket.socket:
    """A listener on loopback; port 0 lets the kernel choose."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(512)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def run_child(birth: Birth, listener: socket.socket, key: str) -> int:
    """The body of the demo's extra child: serves until TERM, or until the master is gone."""

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        # Ctrl-C reaches the whole process group; who ends when is the master's decision.
        loop.add_signal_handler(signal.SIGINT, lambda: None)
        loop.add_reader(birth.lifeline_fd, stop.set)
        try:
            await serve(listener, key, Pace(), stop)
        finally:
            loop.remove_reader(birth.lifeline_fd)

    asyncio.run(body())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m proxyd.web.demo_upstream`: prints `PORT` on a line of its own and serves until it is ended."""
    parser = argparse.ArgumentParser(prog="python -m proxyd.web.demo_upstream", description="a stand-in provider")
    parser.add_argument("--port", type=int, default=0, help="0: one that is free")
    parser.add_argument("--key", default="", help="the bearer key or x-api-key to ask for")
    parser.add_argument("--delay-ms", type=int, default=DELAY_MS)
    parser.add_argument("--pace-ms", type=int, default=PACE_MS)
    args = parser.parse_args(argv)
    listener = listen(args.port)
    print(listener.getsockname()[1], flush=True)  # noqa: T201 - this is a command's answer

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await serve(listener, args.key, Pace(args.delay_ms, args.pace_ms), stop)

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
