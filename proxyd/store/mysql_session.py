"""One session with MySQL or MariaDB: its settings, its lock, its deadlines, its end.

Owns: aiomysql's connection, and the only use of it. Must not know: rows, cursors, when a session is opened anew.

    open() -> settings -> the node's lock -> run() and rows(), each with a deadline -> quit() or abort()

Settings, each for this session only
  time_zone                  UTC, so that TIMESTAMP columns take and give UTC whatever the server's zone is
  sql_mode                   strict: a value that does not fit is an error and never cut
  isolation                  READ COMMITTED: no gap locks, so that nodes and retention do not stand in each other's way
  innodb_lock_wait_timeout, lock_wait_timeout
                             small: waiting is done by the caller, who says so
  sql_select_limit           none: we say LIMIT where we want one
  wait_timeout               a session whose peer died without a word gives up its transaction and lock soon

The lock (GET_LOCK) is the node's name: two daemons with one node.id, which is a copied state_dir, do not write at
once. The server frees it when a session ends, after its transaction's end, so holding it proves that no older
session of this node does anything any more. mysql.py keeps a session for as long as the daemon lives.

Invariants: a session that did not answer in time, or whose task was cancelled, is closed and never used again; no
exception of the driver leaves this file: what the server refused is SqlFault, all else StoreError.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import aiomysql
import pymysql
from pymysql.constants import ER

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_faults import SqlFault
from proxyd.store.mysql_reader import ALL_ROWS, explained, number_and_text
from proxyd.store.schema import StoreError, StoreMissing

_QUIT = b"\x01\x00\x00\x00\x01"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds."""

    # To a server across a continent a handshake takes half a second. Ten times more holds a shutdown up.
    connect: float = 5.0
    # The longest silence; a group's statements take milliseconds. Half: a server that waits for its disk is cut off.
    answer: float = 10.0
    # How long the server lets us wait for a lock; below `answer`, so that it tells and not we.
    lock: int = 5
    # A session that is used by nobody is pinged after this, so that its lock stays ours.
    idle: float = 40.0
    # When the server ends a silent one, and gives the lock to who waits; above `idle`.
    server_wait: int = 60


class NoAnswer(StoreError):
    """The server was silent for `Bounds.answer`; the session is gone."""


class Session:
    """Not yet shared: one task uses it at a time. `id` is the server's number of the connection."""

    __slots__ = ("_address", "_bounds", "_connection", "_loop", "_transport", "facts", "id", "is_busy", "used_at")

    def __init__(self, connection: Any, address: MysqlAddress, bounds: Bounds) -> None:
        self._connection, self._address, self._bounds = connection, address, bounds
        self._loop = asyncio.get_running_loop()
        # Kept, because the driver drops it when it closes by itself, without making sure that the socket goes.
        self._transport = connection._writer.transport
        self.is_busy = False
        self.used_at = self._loop.time()
        self.id = 0
        self.facts: dict[str, Any] = {}

    @classmethod
    async def open(cls, address: MysqlAddress, node: str, earlier: int, bounds: Bounds) -> Session:
        """Connects, sets up, takes the node's lock. `earlier`: the id of a session of ours that may still hold it."""
        try:
            async with asyncio.timeout(bounds.connect):
                connection = await aiomysql.connect(**address.arguments(), db=address.database, autocommit=True)
        except TimeoutError:
            raise StoreError(f"{address}: no connection within {bounds.connect:g} s; is the server frozen?") from None
        except (pymysql.Error, OSError) as error:
            missing = number_and_text(error)[0] == ER.BAD_DB_ERROR
            cause = f": {error.__cause__}" if isinstance(error.__cause__, OSError) else ""
            raise (StoreMissing if missing else StoreError)(explained(address, error) + cause) from error
        except StoreError:
            raise
        except Exception as error:  # garbage instead of a greeting; the connection ends here
            raise StoreError(f"{address}: does not speak MySQL's protocol: {type(error).__name__}") from error
        session = cls(connection, address, bounds)
        try:
            if address.ssl_ca and not connection._secure:
                raise StoreError(f"{address}: the server offers no TLS, and ssl_ca asks for it")
            await session._set_up(node, earlier)
        except BaseException:
            session.abort()
            raise
        return session

    async def _set_up(self, node: str, earlier: int) -> None:
        bounds = self._bounds
        await self.run(
            "SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION',"
            f" innodb_lock_wait_timeout = {bounds.lock}, lock_wait_timeout = {bounds.lock},"
            f" wait_timeout = {bounds.server_wait}, sql_select_limit = {ALL_ROWS}"
        )
        await self.run("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
        lock = f"'proxyd.{self.quote(node)}'"
        names = ("max_allowed_packet", "innodb_flush_log_at_trx_commit", "sync_binlog", "log_bin", "binlog_format")
        ((self.id, holder, *values),) = await self.rows(
            f"SELECT CONNECTION_ID(), IS_USED_LOCK({lock}), {', '.join(f'@@{name}' for name in names)}"
        )
        self.facts = dict(zip(names, values, strict=True))
        if holder and holder == earlier:
            try:
                await self.run(f"KILL {holder:d}")
            except SqlFault as fault:
                if fault.is_lost:
                    raise
                # It ended meanwhile, or this user may not: the wait below does as well.
        ((taken,),) = await self.rows(f"SELECT GET_LOCK({lock}, {bounds.lock})")
        if taken != 1:
            raise StoreError(
                f"{self._address}: {await self._holder(lock)} writes for this node ({node}): an earlier process of ours"
                " that is ending, or a daemon with a copy of state_dir; give each its own node.id"
            )

    async def _holder(self, lock: str) -> str:
        """Who has the lock. Of another user's connection the server tells the number and not the host."""
        ((holder,),) = await self.rows(f"SELECT IS_USED_LOCK({lock})")
        if holder is None:
            return "a connection that has just ended"
        found = await self.rows(f"SELECT host FROM information_schema.processlist WHERE id = {holder:d}")  # noqa: S608
        return f"connection {holder}" + "".join(f" from {host}" for (host,) in found)

    @property
    def patience(self) -> float:
        """The deadline of a statement."""
        return self._bounds.answer

    @property
    def max_bytes(self) -> int:
        """Of a statement."""
        return max(1024, int(self.facts.get("max_allowed_packet") or 0) - 64)

    @property
    def in_transaction(self) -> bool:
        """What the server's last answer said."""
        return bool(self._connection.get_transaction_status())

    def quote(self, text: str) -> str:
        """Escaped for between quotes, by the driver, in the way that the server's session wants."""
        return str(self._connection.escape_string(text))

    async def run(self, sql: str | bytes) -> int:
        """Runs a statement; how many rows it touched."""
        await self._ask(sql)
        return int(self._connection.affected_rows())

    async def step(self, sql: str | bytes) -> int:
        """`run` inside a transaction."""
        touched = await self.run(sql)
        if not self.in_transaction:
            raise StoreError(f"{self._address}: the server ended a transaction by itself")
        return touched

    async def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """All rows of its answer."""
        await self._ask(sql)
        # Not by a cursor: that asks for warnings too, and prints them.
        return list(self._connection._result.rows or ())

    async def _ask(self, sql: str | bytes) -> None:
        self.is_busy = True
        try:
            async with asyncio.timeout(self._bounds.answer):
                await self._connection.query(sql)
        except TimeoutError:
            self.abort()
            raise NoAnswer(f"{self._address}: no answer within {self._bounds.answer:g} s") from None
        except pymysql.Error as error:
            number, text = number_and_text(error)
            fault = SqlFault(explained(self._address, error), number, text)
            if fault.is_lost:
                self.abort()
            raise fault from error
        except Exception as error:  # a stream of packets that makes no sense: the connection ends here
            self.abort()
            raise StoreError(f"{self._address}: {type(error).__name__} in MySQL's protocol: {error}") from error
        except BaseException:
            self.abort()
            raise
        finally:
            self.is_busy = False
            self.used_at = self._loop.time()

    def quit(self) -> None:
        """Says goodbye and closes; an open transaction is rolled back by the server. Does not wait."""
        if not self._transport.is_closing():
            self._transport.write(_QUIT)
        self._connection.close()

    def abort(self) -> None:
        """Closes at once; what was not sent never is."""
        self._transport.abort()
        self._connection.close()
