"""What a request may wait for before it is admitted, and how far it has come.

Owns the two records. Must not know who waits or how: the relay service has the tasks, the worker brings the waits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from proxyd.dialects.ask import Ask

__all__ = ["Turn", "Waits"]


@dataclass(frozen=True, slots=True)
class Waits:
    """What a request may wait for before it is admitted, each once and each with a bound of its own.

    keys: until the fetch of a token's key has ended. reading: until the ledger has been written from the store; False
    when it was not. recheck: called when a wait is over, before the session is looked at again."""

    keys: Callable[[], Awaitable[None]] | None = None
    reading: Callable[[int, float | None, int | None], Awaitable[bool]] | None = None
    recheck: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Turn:
    """How far a request has come: what it may still wait for, and its body when that has been read."""

    may_wait_keys: bool = True
    may_wait_reading: bool = True
    ask: Ask | None = None
