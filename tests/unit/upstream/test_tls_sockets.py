"""TLS towards an origin, against servers with certificates made here."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.tls import OriginTls, build_context

BIG = b"x" * (16 * 1024 * 1024)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def exchange(conn: Any) -> None:
    await conn.send(b"ping", 5.0)
    assert await conn.recv(100, 5.0) == b"ping"


def test_the_context_verifies_and_speaks_only_what_we_relay() -> None:
    context = build_context()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_bytes_pass_over_a_verified_connection(
    in_loop: Callable[..., None], authority: Callable[[str], Any], host: str
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo, ca.server("localhost", "127.0.0.1"))
        conn = await world.connect(port, OriginTls(host, ca.ca_file))
        await exchange(conn)
        assert conn.sock.selected_alpn_protocol() == "http/1.1"
        assert conn.sock.version() == "TLSv1.3"
        assert conn.is_quiet()

    in_loop(scene)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("wrong host", "Hostname mismatch"),
        ("expired", "certificate has expired"),
        ("unknown authority", "unable to get local issuer certificate"),
    ],
)
def test_a_certificate_that_does_not_hold_is_told_with_its_reason_and_host(
    in_loop: Callable[..., None], authority: Callable[[str], Any], case: str, reason: str
) -> None:
    ours, theirs = authority("ours"), authority("theirs")

    async def scene(world: Any) -> None:
        signer = theirs if case == "unknown authority" else ours
        names = ("elsewhere.example",) if case == "wrong host" else ("localhost",)
        port = await world.peers.serve(echo, signer.server(*names, expired=case == "expired"))
        world.loop.set_exception_handler(lambda *_: None)  # the server's own complaint about us
        upstreams = world.upstreams({"url": f"https://localhost:{port}/v1", "ca_file": ours.ca_file})
        with pytest.raises(UpstreamError) as caught:
            await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.TLS, False)
        assert caught.value.detail.startswith("certificate verify failed: ")
        assert reason in caught.value.detail
        assert caught.value.detail.endswith("(host localhost)")
        assert upstreams.stats()["up"]["connecting"] == 0

    in_loop(scene)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_second_dial_resumes_the_session_of_the_first(
    in_loop: Callable[..., None], authority: Callable[[str], Any], version: ssl.TLSVersion
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        context = ca.server("localhost")
        context.maximum_version = context.minimum_version = version
        port = await world.peers.serve(echo, context)
        upstreams = world.upstreams({"url": f"https://localhost:{port}", "ca_file": ca.ca_file})
        origin = upstreams.origins["up"]
        resumed = []
        for reusable in (True, False, False):
            conn = await upstreams.acquire(origin, timeout_s=5.0, fresh=True)
            await exchange(conn)
            resumed.append(conn.sock.session_reused)
            conn.release(reusable)
        assert resumed == [False, True, True]

    in_loop(scene)


def test_session_tickets_do_not_make_an_idle_connection_look_dead(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo, ca.server("localhost"))
        upstreams = world.upstreams({"url": f"https://localhost:{port}", "ca_file": ca.ca_file})
        origin = upstreams.origins["up"]
        (await upstreams.acquire(origin, timeout_s=5.0)).release(True)  # nothing read: the tickets are yet to come
        for _ in range(20):
            await asyncio.sleep(0.001)
            conn = await upstreams.acquire(origin, timeout_s=5.0)
            await exchange(conn)
            conn.release(True)
        assert upstreams.stats()["up"]["connects"] == 1

    in_loop(scene)


def test_a_tls_peer_that_closes_an_idle_connection_is_noticed(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo, ca.server("localhost"))
        upstreams = world.upstreams({"url": f"https://localhost:{port}", "ca_file": ca.ca_file})
        conn = await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        await exchange(conn)
        conn.release(True)
        assert upstreams.stats()["up"]["idle"] == 1
        world.peers.writers[0].close()
        await world.until(lambda: upstreams.stats()["up"]["idle"] == 0)

    in_loop(scene)


def test_a_large_body_passes_over_tls_beside_its_tickets(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        async def slow_start(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await asyncio.sleep(0.05)  # the tickets arrive while the client is blocked in its send
            writer.transport.resume_reading()
            left = len(BIG)
            while left:
                left -= len(await reader.read(1 << 20))
            writer.write(b"all")

        port = await world.peers.serve(slow_start, ca.server("localhost"))
        conn = await world.connect(port, OriginTls("localhost", ca.ca_file))
        assert await conn.send(BIG, 30.0) is True
        assert await conn.recv(10, 5.0) == b"all"

    in_loop(scene)


def test_an_early_refusal_over_tls_is_still_readable(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.transport.pause_reading()
            writer.write(b"HTTP/1.1 413 No\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.transport.abort()

        port = await world.peers.serve(refuse, ca.server("localhost"))
        conn = await world.connect(port, OriginTls("localhost", ca.ca_file))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(BIG, 30.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.RESET, True)
        assert await conn.recv(4096, 5.0) == b"HTTP/1.1 413 No\r\n\r\n"

    in_loop(scene)


def test_bytes_that_tls_holds_already_are_pending(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        port = await world.peers.serve(echo, ca.server("localhost"))
        conn = await world.connect(port, OriginTls("localhost", ca.ca_file))
        await conn.send(b"abcdef", 5.0)
        assert await conn.recv(2, 5.0) == b"ab"
        assert conn.pending() == 4
        assert not conn.is_quiet()

    in_loop(scene)


def test_a_peer_that_speaks_no_tls_is_told_as_tls(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await reader.read()

        port = await world.peers.serve(plain)
        with pytest.raises(UpstreamError) as caught:
            await world.connect(port, OriginTls("localhost", ca.ca_file))
        assert caught.value.kind is UpstreamErrorKind.TLS
        assert caught.value.detail.endswith("(host 127.0.0.1)")

    in_loop(scene)


def test_a_peer_that_never_shakes_hands_is_a_connect_timeout(
    in_loop: Callable[..., None], authority: Callable[[str], Any]
) -> None:
    ca = authority("ours")

    async def scene(world: Any) -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.Event().wait()

        port = await world.peers.serve(silent)
        section = {"url": f"https://localhost:{port}", "ca_file": ca.ca_file, "connect_timeout": "100ms"}
        upstreams = world.upstreams(section)
        with pytest.raises(UpstreamError) as caught:
            await upstreams.acquire(upstreams.origins["up"], timeout_s=5.0)
        assert (caught.value.kind, caught.value.detail) == (UpstreamErrorKind.CONNECT_TIMEOUT, "TLS handshake")

    in_loop(scene)


def test_a_ca_file_that_cannot_be_used_names_the_upstream(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        with pytest.raises(OSError, match=r"upstream up: ca_file /nowhere/ca\.pem: No such file"):
            world.upstreams({"url": "https://localhost", "ca_file": "/nowhere/ca.pem"})

    in_loop(scene)
