"""The MySQL sink: MariaDB 10.11 and MySQL 8, one session, one transaction a batch.

Owns: what is sent in which order, when a session is opened anew. Must not know: spool files, metrics, the protocol
(mysql_session.py), how rows are inserted and poison ones found (mysql_rows.py), SQL text (mysql_text.py).

A commit: START TRANSACTION, an INSERT of all rows, one upsert of all cursors, what is carried, closed and forgotten,
COMMIT. The answer to each is awaited before the next is sent. It creates no table: `proxyd schema --apply` does.

Unknown outcomes. A commit may fail after its COMMIT was sent: the connection is cut, the server frozen or killed. Then
`cursors()` decides, and the proof that it never errs is this. Let T be the transaction of an older session of this
node, N the new session that asks.
1. COMMIT is sent only after the upsert of T's cursors was answered. So from before COMMIT leaves us until T has ended,
   T holds exclusive locks on its rows of sys_ai_spool_offsets, new ones included.
2. `cursors()` reads this node's rows FOR UPDATE: it waits for the end of every transaction that holds one of them. So
   when it is answered and the COMMIT of T had been sent, T is over, and N sees all of T or nothing. This holds also
   when the COMMIT still lies in the buffer of a stopped server or of a proxy: till it is read, the locks stand.
3. When the COMMIT of T had not been sent, it never will be: the session was dropped. Its other statements may lie in
   some buffer and run later; at the connection's end the server undoes them.
4. InnoDB frees a transaction's locks when its commit is in memory, an instant before it is on disk; killed in between,
   the server forgets T although N saw it. So `cursors()` writes too (the owner's row) and commits: the log is one
   sequence, so when that COMMIT is answered, T is on disk.
5. N holds GET_LOCK of the node (mysql_session.py), which an older session keeps until after its transaction's end. That
   alone would do on one server; 1 and 2 need no such lock. A wait that is too long is a StoreError, and tried again.
An error before COMMIT was sent has a known outcome, nothing: a session found dead by a transaction's first statement is
replaced without a word.

Two daemons with one node.id, which is a copied disk or state_dir, would each adopt the other's cursors, find no such
files, and forget them: rows of files that are there all the same would be stored again. So
1. the lock is held as long as the daemon lives: a session that nobody uses is pinged, a lost one opened anew. The other
   daemon's `open` fails, and says which connection holds it.
2. a lost session loses the lock, and the other may come first. The row `@owner` of the node has a token that each
   daemon makes anew when it starts, and keeps in its state_dir (node.Owner), on disk before it is committed. What
   adopts is `cursors()`: it reads and writes the token in one transaction. One that our state_dir did not make says
   that another one wrote in between: StoreMisfit, and nothing is adopted or forgotten. A copy has older ones only.
3. nobody writes it without the lock, so a token that was ours when a session began is ours till it ends: `_verify`
   looks at the beginning, and commits need not.

Bounds: see Bounds in mysql_session.py; a statement has at most max_allowed_packet bytes.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

from proxyd.store.mysql_address import MysqlAddress
from proxyd.store.mysql_durability import LOSES
from proxyd.store.mysql_faults import SqlFault
from proxyd.store.mysql_reader import MysqlReader
from proxyd.store.mysql_rows import STRANGE_TRIES, Inserter, Log
from proxyd.store.mysql_session import Bounds, Session
from proxyd.store.mysql_text import bookkeeping
from proxyd.store.node import NAME, Owner
from proxyd.store.queries import WINDOW_SUM
from proxyd.store.schema import (
    Batch,
    Cursor,
    OpenTransaction,
    Row,
    SetAside,
    StoreError,
    StoreMisfit,
    utc_text,
)
from proxyd.store.schema_mysql import INSPECT, compare

__all__ = ["STRANGE_TRIES", "Bounds", "MysqlReader", "MysqlStore"]

_NODE = re.compile(r"[0-9A-Za-z_-]{0,16}")
# No stream has this name.
_OWNER = "@owner"
_MARK = (
    "INSERT INTO sys_ai_spool_offsets (node, stream, segment, position, finished)"
    " VALUES ({me}, '@owner', {token}, 0, 0) ON DUPLICATE KEY UPDATE position = position + 1"
)
# Between two tries to get a lost session back while nobody uses it.
_RECONNECT_S = 5.0


class MysqlStore:
    """The writing side; implements `schema.Store`. One task uses it at a time."""

    __slots__ = (
        "_address", "_bounds", "_earlier", "_inserter", "_is_connecting", "_is_open", "_log", "_node", "_owner",
        "_ping", "_session", "_timer", "_told",
    )  # fmt: skip

    def __init__(
        self,
        address: MysqlAddress,
        node: str,
        log: Log | None = None,
        bounds: Bounds | None = None,
        owner: Owner | None = None,
    ) -> None:
        if not _NODE.fullmatch(node):
            raise ValueError("a node is at most 16 letters, digits, - and _: it stands in SQL as it is")
        self._address, self._node, self._log, self._bounds = address, node, log, bounds or Bounds()
        self._owner = owner or Owner()
        # Open without a session: it was lost, and comes back with the next statement or look (`_on_idle`).
        self._is_open = self._is_connecting = False
        self._session: Session | None = None
        self._ping: asyncio.Task[None] | None = None
        self._earlier = 0
        self._timer: asyncio.TimerHandle | None = None
        self._inserter = Inserter(log)
        self._told: set[str] = set()

    # -- its life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connects and checks the schema; creates nothing."""
        self._is_open = False
        await self._end_ping()
        self._drop()
        session = await self._connect()
        try:
            await self._check(session)
            await self._verify(session)
        except BaseException:
            self._drop()
            raise
        self._is_open = True
        self._on_idle()

    async def close(self) -> None:
        self._is_open = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        await self._end_ping()
        self._drop()
        await asyncio.sleep(0)  # so that the goodbye leaves

    async def _connect(self) -> Session:
        self._is_connecting = True
        try:
            self._session = session = await Session.open(self._address, self._node, self._earlier, self._bounds)
        finally:
            self._is_connecting = False
        self._earlier = session.id
        return session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.quit()

    def _on_idle(self) -> None:
        """Uses a session that nobody used for long, so that the server keeps it, and looks again later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._is_open:
            return
        loop = asyncio.get_running_loop()
        session = self._session
        left = 0.0 if session is None else session.used_at + self._bounds.idle - loop.time()
        is_free = not self._is_connecting and (session is None or not (session.is_busy or session.in_transaction))
        if left <= 0 and is_free and (self._ping is None or self._ping.done()):
            self._ping = loop.create_task(self._stay())
            left = _RECONNECT_S if session is None else self._bounds.idle
        self._timer = loop.call_later(max(left, 1.0), self._on_idle)

    async def _stay(self) -> None:
        """Keeps the lock, or takes it again. What is wrong is told by the next statement, or has passed by then."""
        session = self._session
        try:
            if session is not None:
                await session.run("DO 1")
            else:
                await self._verify(await self._connect())
        except StoreError:
            self._drop()

    async def _end_ping(self) -> None:
        """One task uses a session at a time."""
        if self._ping is not None and not self._ping.done():
            self._ping.cancel()
            await asyncio.wait({self._ping})
        self._ping = None

    async def _check(self, session: Session) -> None:
        tables, columns, indexes = [await session.rows(sql) for sql in INSPECT]
        findings = compare(tables, columns, indexes)
        stops = [finding for finding in findings if finding.stops]
        if stops:
            more = f" and {len(stops) - 3} more" if len(stops) > 3 else ""
            remedy = (
                "change it by hand, or name another database in telemetry.sink"
                if any(finding.statement is None for finding in stops)
                else "run `proxyd schema --apply`"
            )
            raise StoreMisfit(f"{self._address}: {'; '.join(map(str, stops[:3]))}{more}; {remedy}")
        for finding in findings:
            if self._is_news(str(finding)):
                self._warn_index(finding.subject, finding.complaint)
        facts = session.facts
        if facts["log_bin"] and str(facts["binlog_format"]).upper() == "STATEMENT":
            raise StoreMisfit(
                f"{self._address}: binlog_format is STATEMENT, with which the server refuses every row at the isolation"
                " level that proxyd uses; set it to MIXED or ROW"
            )
        for name, losses in LOSES.items():
            value = int(facts[name])
            if value in losses and (name != "sync_binlog" or facts["log_bin"]) and self._is_news(f"{name} {value}"):
                if self._log is not None:
                    self._log.warning("store_not_durable", setting=name, value=value, may_lose=losses[value])

    def _warn_index(self, index: str, complaint: str) -> None:
        if self._log is not None:
            self._log.warning("store_index_missing", index=index, complaint=complaint)

    def _is_news(self, fact: str) -> bool:
        if fact in self._told:
            return False
        self._told.add(fact)
        return True

    # -- sessions and transactions -------------------------------------------------------------------------------------

    async def _first(self, sql: str) -> tuple[Session, list[tuple[Any, ...]]]:
        """Runs the first statement of some work; a session that is found dead, or rests, is replaced, once."""
        if not self._is_open:
            raise StoreError(f"{self._address}: not open")
        try:
            if self._ping is not None and not self._ping.done():
                await asyncio.wait({self._ping})
            session = self._session
            if session is not None:
                try:
                    return session, await session.rows(sql)
                except SqlFault as fault:
                    if not fault.is_lost:
                        raise
            session = await self._connect()
            await self._verify(session)
            return session, await session.rows(sql)
        except BaseException:
            self._fail()
            raise

    async def _begin(self) -> Session:
        session, _ = await self._first("START TRANSACTION")
        return session

    def _fail(self) -> None:
        """After any error: whatever the session was doing ends with it, and `open` is next."""
        self._is_open = False
        self._drop()

    # -- schema.Store --------------------------------------------------------------------------------------------------

    async def cursors(self) -> dict[str, Cursor]:
        """Waits for the end of every older transaction of this node; see the proof above."""
        me = f"'{self._node}'"
        session = await self._begin()
        try:
            await session.step(_MARK.format(me=me, token=self._owner.token))
            # Only `node =`: by this the scan ends at the node's last row without a look at the next one's lock.
            found = await session.rows(
                "SELECT stream, segment, position, finished FROM sys_ai_spool_offsets"  # noqa: S608
                f" WHERE node = {me} FOR UPDATE"
            )
            (token,) = [segment for name, segment, _, _ in found if name == _OWNER]
            self._refuse_stranger(token)
            if self._owner.keep(token) != token:
                await session.step(
                    f"UPDATE sys_ai_spool_offsets SET segment = {self._owner.token:d}"  # noqa: S608
                    f" WHERE node = {me} AND stream = '{_OWNER}'",
                )
            await session.run("COMMIT")
        except BaseException:
            self._fail()
            raise
        return {
            name: Cursor(name, segment, position, bool(end)) for name, segment, position, end in found if name != _OWNER
        }

    async def _verify(self, session: Session) -> None:
        """Another daemon may have come and gone between two sessions of ours."""
        if self._owner.is_kept:
            found = await session.rows(
                f"SELECT segment FROM sys_ai_spool_offsets WHERE node = '{self._node}' AND stream = '{_OWNER}'"  # noqa: S608
            )
            for (token,) in found:
                self._refuse_stranger(token)

    def _refuse_stranger(self, token: int) -> None:
        if not self._owner.holds(token):
            raise StoreMisfit(
                f"{self._address}: another state_dir stored under this node's name ({self._node}): two daemons have"
                f" copies of one {NAME}; in the one that is the copy, remove {NAME} and what its spool was copied with,"
                " and restart it; docs/accounting.md has the ways out"
            )

    async def open_transactions(self) -> list[OpenTransaction]:
        _, found = await self._first(
            f"SELECT stream, txn, intent, checkpoint FROM sys_ai_spool_open WHERE node = '{self._node}'"  # noqa: S608
        )
        return [OpenTransaction(*columns) for columns in found]

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        session = await self._begin()
        try:
            refused = await self._inserter.insert(session, batch)
            if refused:
                set_aside(refused)
            for statement in bookkeeping(batch, self._node, session.quote, session.max_bytes):
                await session.step(statement)
            await session.run("COMMIT")
        except BaseException:
            self._fail()
            raise
        self._inserter.on_committed(batch, refused)
        return len(refused)

    async def holds(self, row: Row) -> bool:
        request_id = row.request_id.encode(errors="replace").hex()
        _, found = await self._first(
            f"SELECT 1 FROM sys_ai_transactions WHERE user_id = {row.user_id:d}"  # noqa: S608
            f" AND created_at = '{utc_text(row.created_at)}' AND request_id = X'{request_id}' LIMIT 1"
        )
        return bool(found)

    async def window_sum(self, user_id: int, since: float) -> int:
        user, moment = f"{user_id:d}", f"'{utc_text(since)}'"
        _, ((total,),) = await self._first(WINDOW_SUM.replace("?", user, 1).replace("?", moment, 1))
        return int(total or 0)

    async def spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        _, found = await self._first(
            "SELECT UNIX_TIMESTAMP(created_at), SUM(prompt_tokens + completion_tokens) FROM sys_ai_transactions"  # noqa: S608
            f" WHERE user_id = {user_id:d} AND created_at >= '{utc_text(since)}'"
            f" GROUP BY created_at ORDER BY created_at LIMIT {limit:d}"
        )
        return [(float(second), int(tokens)) for second, tokens in found]

    async def newest(self) -> float | None:
        _, ((second,),) = await self._first("SELECT UNIX_TIMESTAMP(MAX(created_at)) FROM sys_ai_transactions")
        return None if second is None else float(second)

    async def delete_older(self, cutoff: float, limit: int) -> int:
        """Rows that another node is deleting are passed over, so that nobody waits."""
        session = await self._begin()
        try:
            found = await session.rows(
                f"SELECT transaction_id FROM sys_ai_transactions WHERE created_at < '{utc_text(cutoff)}'"  # noqa: S608
                f" ORDER BY created_at LIMIT {limit:d} FOR UPDATE SKIP LOCKED"
            )
            if found:
                ids = ",".join(str(number) for (number,) in found)
                await session.step(f"DELETE FROM sys_ai_transactions WHERE transaction_id IN ({ids})")  # noqa: S608
            await session.run("COMMIT")
        except BaseException:
            self._fail()
            raise
        return len(found)
