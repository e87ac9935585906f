"""What the upstream tests share: fake metrics, a uvloop to run in, local peers, certificates made on the spot."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from proxyd.clock import FakeClock
from proxyd.config.schema import Config
from proxyd.config.secrets import Secret, Secrets
from proxyd.upstream.connection import Connection
from proxyd.upstream.dial import Dialer
from proxyd.upstream.origin import Origin
from proxyd.upstream.resolve import Resolver
from proxyd.upstream.tls import OriginTls
from proxyd.upstream.upstreams import Upstreams

HANG_GUARD_S = 60.0
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class FakeSeries:
    """A counter or a gauge in a plain attribute."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, n: int = 1) -> None:
        self.value += n

    def set(self, n: int) -> None:
        self.value = n


class FakeMetrics:
    """The writer's side of shm metrics, in a dict."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], FakeSeries] = {}

    def counter(self, name: str, **labels: str) -> FakeSeries:
        return self.series.setdefault((name, frozenset(labels.items())), FakeSeries())

    gauge = counter

    def read(self, name: str, **labels: str) -> int:
        series = self.series.get((name, frozenset(labels.items())))
        return series.value if series is not None else 0


class FakeLog:
    """Keeps every line."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def _take(self, event: str, /, **fields: Any) -> None:
        self.lines.append((event, fields))

    debug = info = warning = error = _take


class Peers:
    """Local servers for one test, closed with it."""

    def __init__(self) -> None:
        self.accepted = 0
        self.writers: list[asyncio.StreamWriter] = []
        self._servers: list[asyncio.Server] = []

    async def serve(self, handler: Handler, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> int:
        """The port of a new server."""

        async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.accepted += 1
            self.writers.append(writer)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                await handler(reader, writer)

        server = await asyncio.start_server(on_client, host, 0, ssl=tls)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for writer in self.writers:
            writer.close()
        for writer in self.writers:
            with contextlib.suppress(Exception):
                await writer.wait_closed()


class World:
    """One test's surroundings inside the loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.clock = FakeClock()
        self.metrics = FakeMetrics()
        self.log = FakeLog()
        self.peers = Peers()
        self._open: list[Any] = []

    def config(self, *upstreams: dict[str, Any], models: list[dict[str, Any]] | None = None) -> Config:
        sections = [{"name": "up", "connect_timeout": "5s", "congestion_control": "", **each} for each in upstreams]
        if models is None:
            models = [{"name": "*", "id": 1, "upstreams": [each["name"] for each in sections]}]
        return Config.model_validate({"upstream": sections, "model": models})

    def origin(self, url: str, keys: tuple[Secret, ...] = (), **options: Any) -> Origin:
        return Origin(self.config({"url": url, **options}).upstream[0], keys)

    def dialer(self, origin: Origin, resolver: Resolver | None = None) -> Dialer:
        return Dialer(origin, resolver or Resolver(self.loop, self.clock), self.loop, self.log)  # type: ignore[arg-type]

    def upstreams(self, *sections: dict[str, Any], models: list[dict[str, Any]] | None = None) -> Upstreams:
        made = Upstreams(
            self.config(*sections, models=models),
            Secrets(),
            self.metrics,
            self.log,
            self.clock,
            self.loop,  # type: ignore[arg-type]
        )
        self._open.append(made)
        return made

    async def connect(self, port: int, tls: OriginTls | None = None) -> Connection:
        """A BUSY connection that belongs to no pool; its release closes it."""
        origin = self.origin(f"http://127.0.0.1:{port}")
        sock = await self.dialer(origin).dial(5.0)
        conn = Connection(origin, sock, self.loop, dialled_at_s=0.0, on_release=lambda conn, _: conn.close(), tls=tls)
        self._open.append(conn)
        if tls is not None:
            await conn.handshake(5.0)
        conn.park()
        conn.take()
        return conn

    async def until(self, condition: Callable[[], Any]) -> None:
        """Gives the loop turns until `condition` holds; the hang guard ends a test where it never does."""
        while not condition():
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        for each in self._open:
            if isinstance(each, Connection):
                each.close()
            else:
                await each.close()
        await self.peers.close()


@contextlib.asynccontextmanager
async def _world() -> AsyncIterator[World]:
    world = World()
    try:
        yield world
    finally:
        await world.close()


@pytest.fixture
def in_loop() -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    """Runs a test's coroutine function in uvloop with a World, under a guard against hanging."""

    def run(scene: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(HANG_GUARD_S), _world() as world:
                await scene(world)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    return run


class Authority:
    """A certificate authority in a folder, and the servers it vouches for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._cert = self._sign(self._name, self._key.public_key(), ca=True)
        self.ca_file = str(folder / f"{name}.pem")
        Path(self.ca_file).write_bytes(self._cert.public_bytes(serialization.Encoding.PEM))

    def server(self, *hosts: str, expired: bool = False) -> ssl.SSLContext:
        """A server's context with a certificate for `hosts`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
        cert = self._sign(subject, key.public_key(), hosts=hosts, expired=expired)
        file = self._folder / f"server-{cert.serial_number}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + cert.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file)
        context.set_alpn_protocols(["http/1.1"])
        return context

    def _sign(
        self,
        subject: x509.Name,
        public_key: Any,
        *,
        ca: bool = False,
        hosts: tuple[str, ...] = (),
        expired: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 10 * day)
            .not_valid_after(now - day if expired else now + day)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        )
        if hosts:
            names: list[x509.GeneralName] = []
            for host in hosts:
                try:
                    names.append(x509.IPAddress(ipaddress.ip_address(host)))
                except ValueError:
                    names.append(x509.DNSName(host))
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Callable[[str], Authority]:
    return lambda name: Authority(tmp_path, name)


@pytest.fixture
def kit() -> SimpleNamespace:
    """The fakes, for tests without a loop."""
    return SimpleNamespace(Metrics=FakeMetrics, Log=FakeLog)
