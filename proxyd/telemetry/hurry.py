"""A store that is waited for no longer than a stop has time.

Owns: the deadline of each call while the process stops. Must not know: what is stored, which database it is.
Why: a database that hangs answers its own deadline later than the master kills, and nobody would say what stays behind.
Invariants: before the stop a call takes as long as it takes; after a StoreError of ours the call was cancelled, and
whether a commit happened is decided by the cursors, at the next start.
Bounds: `left()` seconds from the stop on, or LEAST_S for a call that begins when there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from proxyd.store.schema import Batch, Cursor, OpenTransaction, Row, SetAside, Store, StoreError

__all__ = ["LEAST_S", "Hurried"]

# For the last commit of a store that works. Ten times more, and the master kills.
LEAST_S = 0.5
T = TypeVar("T")


class Hurried:
    """Implements `schema.Store`, by another. `left`: asked when the stop has begun."""

    __slots__ = ("_left", "_stop", "_store")

    def __init__(self, store: Store, stop: asyncio.Event, left: Callable[[], float]) -> None:
        self._store, self._stop, self._left = store, stop, left

    async def open(self) -> None:
        await self._within(self._store.open())

    async def close(self) -> None:
        await self._store.close()

    async def cursors(self) -> dict[str, Cursor]:
        return await self._within(self._store.cursors())

    async def open_transactions(self) -> list[OpenTransaction]:
        return await self._within(self._store.open_transactions())

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        return await self._within(self._store.commit(batch, set_aside))

    async def holds(self, row: Row) -> bool:
        return await self._within(self._store.holds(row))

    async def window_sum(self, user_id: int, since: float) -> int:
        return await self._within(self._store.window_sum(user_id, since))

    async def spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        return await self._within(self._store.spends(user_id, since, limit))

    async def newest(self) -> float | None:
        return await self._within(self._store.newest())

    async def delete_older(self, cutoff: float, limit: int) -> int:
        return await self._within(self._store.delete_older(cutoff, limit))

    async def _within(self, call: Awaitable[T]) -> T:
        task = asyncio.ensure_future(call)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await asyncio.wait({task}, timeout=max(LEAST_S, self._left()))
            if not task.done():
                raise StoreError("the store does not answer within the time that a stop has")
            return task.result()
        finally:
            stopping.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
