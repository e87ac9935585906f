"""What answers at the database's address and is none, or is one that behaves badly; and what a session asks of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxyd.store.mysql import MysqlReader, MysqlStore
from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_session import Session
from proxyd.store.schema import Batch, StoreError
from tests.daemon.mariadb import Database
from tests.daemon.store_house import HASTY, NODE, House, mysql_house, never, row

Behaviour = Callable[[socket.socket], object]


def _junk(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")


def _short_junk(sock: socket.socket) -> None:
    sock.sendall(b"\x05\x00\x00\x00\x0ajunk")


def _busy(sock: socket.socket) -> None:
    message = b"\xff\x10\x04Too many connections"
    sock.sendall(len(message).to_bytes(3, "little") + b"\0" + message)


BEHAVIOURS: dict[str, tuple[Behaviour, str]] = {
    "closes": (lambda sock: sock.close(), "Lost connection|Can't connect"),
    "speaks HTTP": (_junk, "protocol|Lost connection|no connection|Packet sequence|Can't connect"),
    "greets with junk": (_short_junk, "protocol"),
    "has no room": (_busy, r"Too many connections \(error 1040\)"),
    "is silent": (lambda sock: None, "no connection within 2 s; is the server frozen"),
}


@contextlib.contextmanager
def peer(behaviour: Behaviour) -> Iterator[int]:
    """A listener that does this with each connection; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    taken: list[socket.socket] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                taken.append(sock)
                behaviour(sock)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    for sock in taken:
        sock.close()


@pytest.mark.parametrize("name", BEHAVIOURS)
async def test_whoever_is_no_database_is_told_from_one_in_words(name: str) -> None:
    behaviour, words = BEHAVIOURS[name]
    with peer(behaviour) as port:
        store = MysqlStore(MysqlAddress.parse(f"mysql://u:hunter2@127.0.0.1:{port}/d"), NODE, None, HASTY)
        for _ in range(2):
            with pytest.raises(StoreError, match=rf"^mysql u@127\.0\.0\.1:{port}/d: .*(?:{words})") as caught:
                await store.open()
            assert "hunter2" not in str(caught.value)
        await store.close()


@pytest.mark.parametrize("name", ["closes", "has no room"])
async def test_a_command_says_so_too(name: str) -> None:
    behaviour, words = BEHAVIOURS[name]
    with peer(behaviour) as port:
        address = MysqlAddress.parse(f"mysql://u:hunter2@127.0.0.1:{port}/d")
        with pytest.raises(StoreError, match=words):
            await asyncio.to_thread(MysqlReader, address)


async def test_a_session_has_the_settings_that_exactly_once_rests_on(mariadb: Database) -> None:
    session = await Session.open(MysqlAddress.parse(mariadb.url()), NODE, 0, HASTY)
    names = "tx_isolation", "autocommit", "time_zone", "innodb_lock_wait_timeout", "lock_wait_timeout", "wait_timeout"
    (found,) = await session.rows(f"SELECT {', '.join(f'@@SESSION.{name}' for name in names)}, @@SESSION.sql_mode")
    assert found[:-1] == ("READ-COMMITTED", 1, "+00:00", 1, 1, 60)
    assert "STRICT_ALL_TABLES" in found[-1]
    assert "NO_BACKSLASH_ESCAPES" not in found[-1]
    session.quit()


async def test_a_server_that_wants_no_backslashes_gets_the_texts_right_all_the_same(
    mariadb: Database, tmp_path: Path
) -> None:
    (mode,) = mariadb.query("SELECT @@GLOBAL.sql_mode")[0]
    mariadb.query("SET GLOBAL sql_mode = 'NO_BACKSLASH_ESCAPES,ANSI_QUOTES'")
    try:
        house: House = mysql_house(mariadb, tmp_path)
        async with house.open() as store:
            await store.commit(Batch(rows=[row(tenant='it\'s \\ "x"')]), never)
        assert mariadb.query("SELECT tenant FROM sys_ai_transactions") == [('it\'s \\ "x"',)]
    finally:
        mariadb.query("SET GLOBAL sql_mode = %s", mode)
