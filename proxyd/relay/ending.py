"""In which order a leaving worker ends what still runs, and what it tells of them.

Owns: the order, who was told to end, the first names of those for the drain report. Must not know sockets or how a
request is ended; the relay service does that.

    running, oldest first   [a b c d e f]        ended: a, b (told, perhaps not finished yet), reported with their age
                             ^ next()

Invariants: a request is told once; the order is made once for as many as there are, so ending 50,000 over a minute
costs one sort and not one a look; who came later is found when the order is used up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from proxyd.relay.outcome import Transaction

__all__ = ["MAX_NAMED", "Endings"]

# One log line of about 3 KB. Those that were ended first have run longest, so they are the ones to look at.
MAX_NAMED = 20


class Endings:
    """One a relay. `count` were ended by us, `named` tells of the first of them."""

    __slots__ = ("_ended", "_order", "_told", "count", "named")

    def __init__(self) -> None:
        self._order: deque[Transaction] = deque()
        self._told: set[Transaction] = set()
        self._ended: set[Transaction] = set()
        self.count = 0
        self.named: list[dict[str, Any]] = []

    @property
    def under_way(self) -> int:
        """How many were told to end, and have not."""
        return len(self._told)

    @property
    def over(self) -> int:
        """How many of those that were ended by us are finished."""
        return self.count - len(self._ended)

    def next(self, live: Callable[[], Iterable[Transaction]]) -> Transaction | None:
        """The longest-running request that was not told yet; from now on it was."""
        for _ in range(2):
            while self._order:
                found = self._order.popleft()
                if not found.is_finished and found not in self._told:
                    self._told.add(found)
                    return found
            self._order.extend(sorted((one for one in live() if one not in self._told), key=lambda one: one.started))
        return None

    def ended(self, transaction: Transaction, now: float) -> None:
        """It was ended by us, and not by itself a moment before."""
        self.count += 1
        if not transaction.is_finished:
            self._ended.add(transaction)
        if len(self.named) < MAX_NAMED:
            self.named.append(
                {
                    "request_id": transaction.request_id,
                    "route": transaction.route,
                    "tenant": transaction.session.tenant,
                    "upstream": transaction.upstream,
                    "seconds": round(now - transaction.started, 1),
                }
            )

    def forget(self, transaction: Transaction) -> None:
        """It is finished."""
        self._told.discard(transaction)
        self._ended.discard(transaction)
