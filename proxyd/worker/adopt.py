"""Stands in for a slot that is kept waiting: its listener still gets its share of the port's connections.

Owns who accepts for whom. Must not know accepting: it turns acceptors on and off. The kernel goes on hashing new
clients to a SO_REUSEPORT listener as long as it is open, and closing it would reset those who wait there (unless
tcp_migrate_req is on). So while a crash loop keeps a slot vacant, every living worker of the same generation accepts on
that listener too. A slot whose process is alive, or dead for a moment only, is left alone; so are the slots of other
generations, which have their own workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from proxyd.host.child import Birth
from proxyd.shm.beats import Beat
from proxyd.shm.region import Region


class Accepting(Protocol):
    """front.acceptor.Acceptor has these."""

    def resume(self) -> None: ...
    def pause(self) -> None: ...
    def close(self) -> None: ...


class Adoption:
    """`make(slot)` gives a paused acceptor on that slot's TCP listeners; it is asked at the first need."""

    __slots__ = ("_acceptors", "_beats", "_generation", "_make")

    def __init__(self, region: Region, birth: Birth, make: Callable[[int], Accepting]) -> None:
        # Every seat a worker may have: which of them are the generation's is the master's to say, at any time.
        self._beats = [Beat(region, seat) for seat in range(region.telemetry) if seat != birth.seat]
        self._generation = birth.generation
        self._acceptors: dict[int, Accepting] = {}
        self._make = make

    def pulse(self) -> None:
        """Each 0.1 s: one load per other seat, some 20 us."""
        vacant = {beat.slot for beat in self._beats if beat.is_vacant and beat.generation == self._generation}
        for slot in vacant:
            acceptor = self._acceptors.get(slot)
            if acceptor is None:
                acceptor = self._acceptors[slot] = self._make(slot)
            acceptor.resume()
        for slot, acceptor in self._acceptors.items():
            if slot not in vacant:
                acceptor.pause()

    def close(self) -> None:
        """Before the listeners are closed."""
        for acceptor in self._acceptors.values():
            acceptor.close()
        self._acceptors.clear()
        self._beats.clear()
