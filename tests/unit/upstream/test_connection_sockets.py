"""Connection on loopback, plain: the state table, deadlines, early answers, what makes it unfit for the pool."""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.upstream.connection import EARLY_ANSWER_GRACE_S, State, transition

BIG = b"x" * (16 * 1024 * 1024)  # more than two socket buffers hold
REFUSAL = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def has_error(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def refuse_unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.pause_reading()
    writer.write(REFUSAL)
    await writer.drain()
    await asyncio.Event().wait()


ALLOWED = {
    (State.CONNECTING, State.TLS_HANDSHAKE),
    (State.CONNECTING, State.IDLE),
    (State.CONNECTING, State.CLOSED),
    (State.TLS_HANDSHAKE, State.IDLE),
    (State.TLS_HANDSHAKE, State.CLOSED),
    (State.IDLE, State.BUSY),
    (State.IDLE, State.CLOSED),
    (State.BUSY, State.IDLE),
    (State.BUSY, State.LEAVING),
    (State.BUSY, State.CLOSED),
    (State.LEAVING, State.CLOSED),
    (State.CLOSED, State.CLOSED),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(State, State)))
def test_only_the_edges_of_the_table_exist(old: State, new: State) -> None:
    if (old, new) in ALLOWED:
        assert transition(old, new) is new
    else:
        with pytest.raises(RuntimeError, match="no edge"):
            transition(old, new)


def test_what_is_sent_arrives_and_comes_back(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        conn = await world.connect(await world.peers.serve(echo))
        data = bytes(range(256)) * 100
        assert await conn.send(data, 5.0) is True
        received = b""
        while len(received) < len(data):
            received += await conn.recv(4096, 5.0)
        assert received == data
        assert conn.is_quiet()

    in_loop(scene)


def test_a_large_body_waits_for_room_and_arrives_whole(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            left = len(BIG)
            while left:
                left -= len(await reader.read(1 << 20))
            writer.write(b"all")

        conn = await world.connect(await world.peers.serve(count))
        assert await conn.send(BIG, 30.0) is True
        assert await conn.recv(10, 5.0) == b"all"
        assert conn.is_quiet()

    in_loop(scene)


def test_the_end_of_the_peer_is_an_empty_read_and_not_fit_for_the_pool(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"bye")
            writer.close()

        conn = await world.connect(await world.peers.serve(leave))
        assert [await conn.recv(100, 5.0), await conn.recv(100, 5.0)] == [b"bye", b""]
        assert not conn.is_quiet()

    in_loop(scene)


def test_silence_before_and_within_an_answer_are_different_timeouts(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        conn = await world.connect(await world.peers.serve(echo))
        with pytest.raises(UpstreamError) as first:
            await conn.recv(100, 0.01)
        await conn.send(b"x", 5.0)
        await conn.recv(100, 5.0)
        with pytest.raises(UpstreamError) as later:
            await conn.recv(100, 0.01)
        assert (first.value.kind, first.value.sent) == (UpstreamErrorKind.FIRST_BYTE_TIMEOUT, False)
        assert (later.value.kind, later.value.sent) == (UpstreamErrorKind.IDLE_TIMEOUT, True)
        assert not conn.is_quiet()

    in_loop(scene)


def test_a_peer_that_takes_nothing_times_the_send_out(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await asyncio.Event().wait()

        conn = await world.connect(await world.peers.serve(deaf))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(BIG, 0.3)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.IDLE_TIMEOUT, True)
        assert not conn.is_quiet()

    in_loop(scene)


def test_a_reset_while_receiving_is_told_as_reset(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(1)
            reset(writer)

        conn = await world.connect(await world.peers.serve(slam))
        await conn.send(b"x", 5.0)
        with pytest.raises(UpstreamError) as caught:
            await conn.recv(100, 5.0)
        assert (caught.value.kind, caught.value.detail) == (UpstreamErrorKind.RESET, "receiving: ECONNRESET")
        assert caught.value.sent

    in_loop(scene)


def test_an_early_refusal_and_close_fail_the_send_and_leave_the_answer_readable(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.transport.pause_reading()
            writer.write(REFUSAL)
            writer.close()

        conn = await world.connect(await world.peers.serve(refuse))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(BIG, 30.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.RESET, True)
        assert await conn.recv(4096, 5.0) == REFUSAL
        assert not conn.is_quiet()

    in_loop(scene)


def test_a_failed_send_tells_that_an_answer_is_there(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read(10)
            writer.write(REFUSAL)
            reset(writer)

        conn = await world.connect(await world.peers.serve(refuse))
        assert await conn.send(b"x" * 10, 5.0) is True
        await world.until(lambda: has_error(conn.fd))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(b"more", 5.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.RESET, True)
        assert conn.pending() == len(REFUSAL)
        assert await conn.recv(4096, 5.0) == REFUSAL

    in_loop(scene)


def test_what_came_before_anything_was_sent_is_no_answer(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def time_out(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            reset(writer)

        conn = await world.connect(await world.peers.serve(time_out))
        await world.until(lambda: has_error(conn.fd))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(b"GET", 5.0)
        assert (caught.value.sent, conn.pending()) == (False, 0)

    in_loop(scene)


def test_an_answer_to_a_body_that_the_peer_no_longer_takes_ends_the_send(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        conn = await world.connect(await world.peers.serve(refuse_unread))
        started = world.loop.time()
        assert await conn.send(BIG, 30.0) is False
        assert world.loop.time() - started >= EARLY_ANSWER_GRACE_S * 0.9
        assert conn.pending() == len(REFUSAL)
        assert await conn.recv(20, 5.0) + await conn.recv(4096, 5.0) == REFUSAL
        assert conn.pending() == 0
        assert not conn.is_quiet()

    in_loop(scene)


def test_an_answer_that_begins_while_the_peer_still_reads_does_not_cut_the_body(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        got = 0

        async def eager(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal got
            writer.write(b"early")
            while got < len(BIG):
                got += len(await reader.read(1 << 20))
            writer.write(b"late")

        conn = await world.connect(await world.peers.serve(eager))
        assert await conn.send(BIG, 30.0) is True
        received = b""
        while received != b"earlylate":
            received += await conn.recv(4096, 5.0)
        assert got == len(BIG)
        assert conn.is_quiet()

    in_loop(scene)


def test_a_peer_that_closes_while_we_send_is_a_reset(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            writer.write_eof()
            await asyncio.Event().wait()

        conn = await world.connect(await world.peers.serve(half))
        with pytest.raises(UpstreamError) as caught:
            await conn.send(BIG, 30.0)
        assert caught.value.kind is UpstreamErrorKind.RESET
        assert await conn.recv(100, 5.0) == b""

    in_loop(scene)


def test_a_send_to_a_peer_that_is_gone_has_sent_nothing(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            reset(writer)

        conn = await world.connect(await world.peers.serve(slam))
        await world.until(lambda: not conn.is_quiet())
        with pytest.raises(UpstreamError) as caught:
            await conn.send(b"GET", 5.0)
        assert (caught.value.kind, caught.value.sent) == (UpstreamErrorKind.RESET, False)

    in_loop(scene)


@pytest.mark.parametrize("action", ["send", "recv"])
def test_a_cancelled_wait_leaves_nothing_registered(in_loop: Callable[..., None], action: str) -> None:
    async def scene(world: Any) -> None:
        async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await asyncio.Event().wait()

        conn = await world.connect(await world.peers.serve(deaf))
        task = asyncio.create_task(conn.send(BIG, 30.0) if action == "send" else conn.recv(1, 30.0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not world.loop.remove_reader(conn.fd)
        assert not world.loop.remove_writer(conn.fd)
        assert conn.is_quiet() is (action == "recv")

    in_loop(scene)


def test_closing_under_a_wait_wakes_it(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        conn = await world.connect(await world.peers.serve(silent))
        task = asyncio.create_task(conn.recv(1, 30.0))
        await asyncio.sleep(0)
        conn.release(False)
        with pytest.raises(UpstreamError, match="closed on our side"):
            await task
        conn.release(True)
        conn.close()
        assert conn.state is State.CLOSED

    in_loop(scene)


def test_unread_bytes_make_a_connection_unfit(in_loop: Callable[..., None]) -> None:
    async def scene(world: Any) -> None:
        conn = await world.connect(await world.peers.serve(echo))
        await conn.send(b"abc", 5.0)
        assert await conn.recv(2, 5.0) == b"ab"
        assert not conn.is_quiet()

    in_loop(scene)
