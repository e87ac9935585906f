"""A real door on loopback, in this process: acceptor, connections, handoff and web application, with a clock of ours.

The relay is a handler that the test chooses. Time stands still unless the test moves it, so a timeout test waits for
nothing and cannot flake on a slow machine.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from proxyd.clock import FakeClock
from proxyd.front.acceptor import Acceptor
from proxyd.front.connection import ClientConnection
from proxyd.front.door import Answered, Door, FrontSettings
from proxyd.front.handoff import Handoff
from proxyd.front.proxies import trusted_from
from proxyd.front.request import Request
from proxyd.front.wheel import Wheel
from proxyd.log import Log, Sink
from proxyd.web.app import Readiness, WebContext, WebServer

SETTINGS = FrontSettings(
    max_head=4096, max_body=64 * 1024, head_timeout=10, body_timeout=30, keepalive=75, send_timeout=60
)
PATIENCE_S = 20.0  # a broken test ends here; a good one waits for answers only


def echo(conn: ClientConnection, request: Request) -> None:
    """The relay of most tests: answers at once with the body it got."""
    conn.reply(200, [(b"content-type", b"application/octet-stream")], request.body)


def on_uvloop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Runs an async test on the loop that workers have, bounded."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await test(*args, **kwargs)

        uvloop.run(bounded())

    return run


class Client:
    """A raw client: bytes out, parsed answers in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """The next answer: status, headers (lower-case names), body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(first.split(" ")[1]), headers, body

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        return await self.reader.read()

    def reset(self) -> None:
        """Leaves with an RST."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.writer.transport.abort()

    def close(self) -> None:
        self.writer.close()


class House:
    """What a test holds."""

    def __init__(self, serve: Callable[[ClientConnection, Request], None], settings: FrontSettings) -> None:
        self.clock = FakeClock()
        self.wheel = Wheel(self.clock.monotonic())
        self.records: list[Answered] = []
        self.on_readyz: Callable[[], None] = lambda: None
        self.loop = asyncio.get_running_loop()
        self._sink = open("/dev/null", "wb")  # noqa: SIM115 - closed with the house
        self.log = Log(access="off", process="test", events=Sink(self._sink.fileno()))
        self.web = WebServer(
            WebContext(
                models=(),
                readiness=self._readiness,
                authorise=lambda request: [],
                preflight=lambda request: [(b"access-control-allow-origin", b"https://a.example")],
                cors=lambda headers: [],
                record=self.records.append,
                log=self.log,
                clock=self.clock,
                max_head=settings.max_head,
                max_body=settings.max_body,
                has_page=True,
                page_cookie="ai_session_jwt=t; Path=/; HttpOnly; SameSite=Strict",
            )
        )
        self.door = Door(
            self.loop,
            self.clock,
            self.wheel,
            self.log,
            settings,
            trusted_from(["127.0.0.0/8"]),
            serve=serve,
            web=Handoff(self.loop, self.web.make_protocol, self.log).give,
            preflight=lambda request: [(b"access-control-allow-origin", b"https://a.example")],
            record=self.records.append,
        )
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.acceptor = Acceptor(self.loop, [self.listener], self.door.accept, self.log)
        self.clients: list[Client] = []

    def _readiness(self) -> Readiness:
        self.on_readyz()
        return Readiness(False, "draining", 7)

    async def connect(self, receive_buffer: int = 0) -> Client:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await self.loop.sock_connect(sock, self.listener.getsockname())
        client = Client(*await asyncio.open_connection(sock=sock))
        self.clients.append(client)
        return client

    async def connection(self) -> ClientConnection:
        """The server's side of the only connection."""
        await self.until(lambda: len(self.door.connections) == 1)
        return next(iter(self.door.connections))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the loop run until `condition` holds; the test's own bound ends a vain wait."""
        while not condition():
            await asyncio.sleep(0.001)

    async def advance(self, seconds: float) -> None:
        """Moves the clock and lets the wheel fire, then the loop run."""
        self.clock.advance(seconds)
        self.wheel.tick(self.clock.monotonic())
        await asyncio.sleep(0)

    async def close(self) -> None:
        for client in self.clients:
            client.close()
        self.acceptor.close()
        self.listener.close()
        self.door.close()
        await self.web.stop()
        self._sink.close()


@asynccontextmanager
async def house(
    serve: Callable[[ClientConnection, Request], None] = echo, settings: FrontSettings = SETTINGS
) -> AsyncIterator[House]:
    """A running door, and nothing of it afterwards."""
    built = House(serve, settings)
    await built.web.start(built.loop)
    built.acceptor.resume()
    try:
        yield built
    finally:
        await built.close()
