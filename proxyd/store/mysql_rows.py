"""A batch's rows into MySQL: whole, in pieces where the server is slow, without those that it refuses.

Owns: how many rows a statement has, poison rows. Must not know: cursors, when a transaction begins and commits, error
numbers (mysql_faults.py).

Pieces. A statement has a deadline, a transaction has none. So what a server cannot insert in one statement within it is
sent in several, of the same transaction: half as many rows after one that took more than half of the deadline, or all
of it, which fails the transaction and is tried again; twice as many after one that took less than an eighth. A group
that was too large once is stored at the second try, or a few later.

Poison rows. A row whose values the server refuses (mysql_faults.ROWS) is found by halving within savepoints, set aside
with the server's words, and its neighbours are stored. An error of the server (locks, space, rights, schema) fails the
whole batch, to be tried again. A number nobody knows is taken for the server's STRANGE_TRIES times for the same batch;
after that for the rows', if at least one row, of the batch or one that was stored before, can be stored alone.

Bounds: a piece has LEAST_ROWS or more; halving takes at most 6 statements for each refused row and halving step.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

from proxyd.store.mysql_faults import Blame, SqlFault
from proxyd.store.mysql_session import NoAnswer, Session
from proxyd.store.mysql_text import inserts, row_texts
from proxyd.store.schema import COLUMNS, Batch, Row, StoreError

# With the writer's pauses, doubling from 0.05 s, this is most of a second: less than any operator's repair takes, and
# more than a hiccup. Half would set rows aside for a hiccup; twice holds all rows up for 10 s.
STRANGE_TRIES = 4
# A server that needs half a second for each row is past helping. Half: no server is; twice: one of 0.3 s is given up.
LEAST_ROWS = 16
_ALL = 1 << 30
# Its own stored rows pass where made up ones would not: a trigger may look for a known model.
_NEWEST = (
    f"SELECT {', '.join(COLUMNS).replace('created_at', 'UNIX_TIMESTAMP(created_at)')} FROM sys_ai_transactions"  # noqa: S608
    " ORDER BY transaction_id DESC LIMIT 1"
)


class Log(Protocol):
    """What we need of log.Log."""

    def warning(self, event: str, /, **fields: Any) -> None: ...


class Inserter:
    """What is known of the server from earlier batches."""

    __slots__ = ("_log", "_piece", "_sample", "_strange", "_strange_tries")

    def __init__(self, log: Log | None) -> None:
        self._log = log
        # Rows of a statement.
        self._piece = _ALL
        # The batch that met an error which nobody knows, and how often.
        self._strange: Batch | None = None
        self._strange_tries = 0
        # A row that was stored.
        self._sample: Row | None = None

    async def insert(self, session: Session, batch: Batch) -> list[tuple[Row, str]]:
        """All rows, in a transaction that has nothing else yet; those that cannot be stored, with the reason."""
        texts, refused = row_texts(batch.rows, session.quote)
        try:
            await self._send(session, [text for _, text in texts])
        except SqlFault as fault:
            is_strange = fault.blame is Blame.UNKNOWN
            if fault.blame is Blame.SERVER or (is_strange and not self._is_worn_out(batch)):
                raise
            # From the start, with savepoints: no doubt what of a failed statement is there.
            await session.run("ROLLBACK")
            await session.run("START TRANSACTION")
            found = await self._halve(session, texts, is_strange)
            if is_strange and len(found) == len(texts) and not await self._can_store_any(session):
                raise
            refused += found
        return refused

    def on_committed(self, batch: Batch, refused: Sequence[tuple[Row, str]]) -> None:
        self._strange = None
        if batch.rows and len(refused) < len(batch.rows):
            failed = {id(row) for row, _ in refused}
            self._sample = next(row for row in reversed(batch.rows) if id(row) not in failed)

    async def _send(self, session: Session, texts: Sequence[bytes]) -> None:
        """In as many statements as the server's pace and its largest packet ask for."""
        loop = asyncio.get_running_loop()
        sent = 0
        while sent < len(texts):
            part = texts[sent : sent + self._piece]
            sent += len(part)
            for statement in inserts(part, session.max_bytes):
                began = loop.time()
                try:
                    await session.step(statement)
                except NoAnswer as error:
                    self._shrink(len(part))
                    raise StoreError(
                        f"{error} to an INSERT of {len(part)} rows; the next has {self._piece} at most: if the server"
                        " is slow and not frozen, let telemetry.batch_rows be smaller"
                    ) from error
                took = loop.time() - began
                if took > session.patience / 2:
                    self._shrink(len(part), took)
                elif took < session.patience / 8 and len(part) == self._piece:
                    self._piece *= 2

    def _shrink(self, rows: int, took: float | None = None) -> None:
        piece = max(LEAST_ROWS, min(self._piece, rows // 2))
        if took is not None and piece < rows and self._log is not None:
            self._log.warning(
                "store_slow", rows=rows, took_s=round(took, 1), next_rows=piece, setting="telemetry.batch_rows"
            )
        self._piece = piece

    def _is_worn_out(self, batch: Batch) -> bool:
        """True when the batch met an unknown error more often than STRANGE_TRIES."""
        if self._strange is not batch:
            self._strange, self._strange_tries = batch, 0
        self._strange_tries += 1
        return self._strange_tries > STRANGE_TRIES

    async def _halve(
        self, session: Session, texts: Sequence[tuple[Row, bytes]], takes_strange: bool
    ) -> list[tuple[Row, str]]:
        """Inserts every row that can be inserted; the others, in their order, with the server's words."""
        refused: list[tuple[Row, str]] = []
        parts = [texts]
        while parts:
            part = parts.pop()
            fault = await self._try_part(session, [text for _, text in part])
            if fault is None:
                continue
            if fault.blame is Blame.SERVER or (fault.blame is Blame.UNKNOWN and not takes_strange):
                raise fault
            if len(part) == 1:
                refused.append((part[0][0], f"{fault.number}: {fault.text}"))
            else:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        return refused

    async def _try_part(self, session: Session, texts: Sequence[bytes]) -> SqlFault | None:
        """Inserts all of them or, with the fault returned, none."""
        await session.step("SAVEPOINT part")
        try:
            await self._send(session, texts)
        except SqlFault as fault:
            if fault.is_lost:
                raise
            await session.step("ROLLBACK TO SAVEPOINT part")
            return fault
        return None

    async def _can_store_any(self, session: Session) -> bool:
        """True when a row like one that was stored before still could be; it is taken back."""
        sample = self._sample
        if sample is None:
            found = await session.rows(_NEWEST)
            sample = Row(*found[0]) if found else Row(0, 0, 0, 0, time.time(), "", "", "", 0, 0, 0, "", 0, 0, 0)
        texts, _ = row_texts([sample._replace(request_id=f"proxyd-try-{os.urandom(8).hex()}")], session.quote)
        if not texts or await self._try_part(session, [text for _, text in texts]) is not None:
            return False
        await session.step("ROLLBACK TO SAVEPOINT part")
        return True
