"""Stands in for a slot that is kept waiting: its listener still gets its share of the port's connections.

Owns who accepts for whom. Must not know accepting: it turns acceptors on and off. The kernel goes on hashing new
clients to a SO_REUSEPORT listener as long as it is open, and closing it would reset those who wait there (unless
tcp_migrate_req is on). So while a crash loop keeps a slot vacant, every living worker accepts on that listener too.
A slot whose process is alive, or dead for a moment only, is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from proxyd.shm.beats import Beat
from proxyd.shm.region import Region


class Accepting(Protocol):
    """front.acceptor.Acceptor has these."""

    def resume(self) -> None: ...
    def pause(self) -> None: ...
    def close(self) -> None: ...


class Adoption:
    """`make(slot)` gives a paused acceptor on that slot's TCP listeners; it is asked at the first need."""

    __slots__ = ("_acceptors", "_beats", "_make")

    def __init__(self, region: Region, own_slot: int, workers: int, make: Callable[[int], Accepting]) -> None:
        self._beats = {slot: Beat(region, slot) for slot in range(workers) if slot != own_slot}
        self._acceptors: dict[int, Accepting] = {}
        self._make = make

    def pulse(self) -> None:
        """Each 0.1 s: one load per other slot."""
        for slot, beat in self._beats.items():
            if beat.is_vacant:
                acceptor = self._acceptors.get(slot)
                if acceptor is None:
                    acceptor = self._acceptors[slot] = self._make(slot)
                acceptor.resume()
            elif slot in self._acceptors:
                self._acceptors[slot].pause()

    def close(self) -> None:
        """Before the listeners are closed."""
        for acceptor in self._acceptors.values():
            acceptor.close()
        self._beats.clear()
