"""Idle client connections on their way from a retiring worker to its successors.

Owns both ends of the way in a worker: what is given, what is taken, and what is done when the way is full. Must not
know HTTP; the door says which connections are idle.

    retiring worker:  door -> HandOver -> give ==> passage (the master's, shared by all) ==> take -> Arrivals -> door

A connection changes hands between two requests, and what its client has sent meanwhile lies in the socket, so the
client notices nothing: no request meets a closed connection. Nothing is lost with a worker that dies before it takes:
what lies in the passage is taken by another one.

Bounds: GIVEN_A_TURN and TAKEN_A_TURN in one turn of the loop; the passage holds a few hundred. One that cannot be given
for STUCK_S is said once in the log and stays here: its next answer is its last, or its keep-alive time passes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from typing import Protocol

from proxyd.front.connection import ClientConnection
from proxyd.front.door import Door
from proxyd.log import Log

__all__ = ["Arrivals", "Giving", "HandOver", "Taking", "Way"]

# About 10 us each. Half: more turns for 10,000 connections; twice: 2 ms in which nobody is relayed to.
GIVEN_A_TURN = 100
TAKEN_A_TURN = 32
# The takers empty a full passage in a few turns. Half spins, twice lets 10,000 idle connections take a second.
RETRY_S = 0.01
STUCK_S = 5.0
STARVED_PAUSE_S = 0.1


class Giving(Protocol):
    """host.passage.Passage has it."""

    def give(self, sock: socket.socket) -> bool:
        """Sends a duplicate of the socket; False when it cannot now. Does not block."""
        ...


class Taking(Protocol):
    """host.passage.Passage has these."""

    @property
    def take_fd(self) -> int: ...

    def take(self) -> socket.socket | None:
        """The next socket; None when there is none now. Does not block."""
        ...


class Way(Giving, Taking, Protocol):
    """Both ends; all workers of all generations have the same."""


class HandOver:
    """The giving side, in a worker that retires."""

    __slots__ = (
        "_door", "_is_told", "_log", "_loop", "_passage", "_stopped", "_stuck_since", "_timer", "_waiting", "count",
    )  # fmt: skip

    def __init__(self, loop: asyncio.AbstractEventLoop, door: Door, passage: Giving, log: Log) -> None:
        self._loop, self._door, self._passage, self._log = loop, door, passage, log
        self._waiting: deque[ClientConnection] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._stuck_since: float | None = None
        self._is_told = False
        self._stopped = False
        self.count = 0

    def begin(self) -> None:
        """From now on idle connections are given away, and those that become idle."""
        self._door.retire(self._on_idle)
        self.look()

    def look(self) -> None:
        """Each pulse: all that are idle, those that could not be given before among them."""
        if not self._waiting and not self._stopped:
            self._waiting.extend(conn for conn in self._door.connections if conn.is_idle)
            self._go_on()

    def stop(self) -> None:
        """The node ends, too: nobody would take them."""
        self._stopped = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_idle(self, conn: ClientConnection) -> None:
        if not self._stopped and conn.is_idle:
            self._waiting.append(conn)
            if self._timer is None:
                self._go_on()

    def _go_on(self) -> None:
        self._timer = None
        for _ in range(GIVEN_A_TURN):
            if not self._waiting:
                return
            conn = self._waiting.popleft()
            if not conn.is_idle:
                continue
            if not conn.offer(self._passage.give):
                self._waiting.appendleft(conn)
                self._on_full()
                break
            self.count += 1
            self._stuck_since = None
        if self._waiting:
            self._timer = self._loop.call_later(RETRY_S, self._go_on)

    def _on_full(self) -> None:
        now = self._loop.time()
        if self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since >= STUCK_S and not self._is_told:
            self._is_told = True
            self._log.warning("handover_stuck", connections=len(self._waiting))


class Arrivals:
    """The taking side, in a worker that serves."""

    __slots__ = ("_door", "_loop", "_passage", "_running", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, door: Door, passage: Taking) -> None:
        self._loop, self._door, self._passage = loop, door, passage
        self._running = False
        self._timer: asyncio.TimerHandle | None = None

    def resume(self) -> None:
        """Takes from now on."""
        self._timer = None
        if not self._running:
            self._running = True
            self._loop.add_reader(self._passage.take_fd, self._on_readable)

    def pause(self) -> None:
        """Takes no more; what lies in the passage is another worker's."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            self._running = False
            self._loop.remove_reader(self._passage.take_fd)

    def take_rest(self) -> None:
        """All that lies there: the node ends, and nobody else would answer them."""
        while self._take_one():
            pass

    def _on_readable(self) -> None:
        for _ in range(TAKEN_A_TURN):
            if not self._has_descriptor():
                self.pause()
                self._timer = self._loop.call_later(STARVED_PAUSE_S, self.resume)
                return
            if not self._take_one():
                return

    def _has_descriptor(self) -> bool:
        """Whether one is free. A message that is received without one loses what it carries (unix(7), MSG_CTRUNC)."""
        try:
            os.close(os.dup(self._passage.take_fd))
        except OSError:
            return False
        return True

    def _take_one(self) -> bool:
        sock = self._passage.take()
        if sock is None:
            return False
        sock.setblocking(False)
        try:
            address = sock.getpeername()
        except OSError:  # the client is gone
            sock.close()
        else:
            self._door.accept(sock, address, is_kept=True)
        return True
