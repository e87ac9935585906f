"""A worker's side of the questions about what a user has spent.

Owns: the questions under way, their deadline, who shares them. Must not know: what is in the ledger or the store; a yes
means that the telemetry process has written the ledger since the question was asked.

    read -> telemetry not ready, too many under way, socket full ............ False, at once
         -> the same question is under way .................................. its answer is ours, too
         -> sent -> answered ............................................... True or False
                 -> DEADLINE_S without an answer ........................... False; the ledger may be written later
         -> nobody answers (SILENT_AFTER in a row) ......................... sent, but not waited for: False, at once

Bounds: a wait takes DEADLINE_S at most, MAX_UNDER_WAY questions are under way. A predecessor's answers bear numbers
that are not ours and are dropped, as is what is no answer at all. The user must have an account in the ledger before it
is asked for: the telemetry process writes to those that exist.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

from proxyd.log import Log
from proxyd.telemetry.questions import ANSWER_BYTES, Question, pack_question, unpack_answer

__all__ = ["DEADLINE_S", "MAX_UNDER_WAY", "SILENT_AFTER", "Asker"]

# The contract's bound on what the request path waits for the store. Half: a commit on a slow disk makes every new user
# be judged on local knowledge.
DEADLINE_S = 0.05
# Half of what the socket holds. Ten times more and the last could not be answered within the deadline anyway.
MAX_UNDER_WAY = 128
# One may hit a slow commit. More and a database that hangs costs as many requests a deadline each.
SILENT_AFTER = 2
# Answers taken in one turn of the loop.
ANSWERS_A_TURN = 64

_Key = tuple[int, bool, int | None]


class _UnderWay:
    __slots__ = ("answer", "key", "timer")

    def __init__(self, key: _Key, answer: asyncio.Future[bool], timer: asyncio.TimerHandle) -> None:
        self.key, self.answer, self.timer = key, answer, timer


class Asker:
    """One a worker. `end` is the slot's end of the channel (non-blocking); `is_ready` tells whether the telemetry
    process serves: `lambda: Beat(region, region.slots - 2).state is State.READY`."""

    __slots__ = ("_by_key", "_end", "_first", "_is_ready", "_log", "_loop", "_next", "_unanswered", "_under_way")

    def __init__(
        self, end: socket.socket, loop: asyncio.AbstractEventLoop, log: Log, *, is_ready: Callable[[], bool]
    ) -> None:
        self._end, self._loop, self._log, self._is_ready = end, loop, log, is_ready
        # Random, so that no answer to a predecessor's question is taken for one to ours.
        self._first = self._next = int.from_bytes(os.urandom(7), "little")
        self._under_way: dict[int, _UnderWay] = {}
        self._by_key: dict[_Key, int] = {}
        self._unanswered = 0
        loop.add_reader(end.fileno(), self._on_readable)

    async def read(self, user_id: int, window_since: float | None, token_iat: int | None) -> bool:
        """True when the ledger was written for this user in DEADLINE_S at most. What is None is not asked."""
        is_silent = self._unanswered >= SILENT_AFTER
        under_way = self._send(user_id, window_since, token_iat)
        if under_way is None or is_silent:
            return False
        return await asyncio.shield(under_way.answer)  # one who leaves must not take it from the others

    def ask(self, user_id: int, window_since: float | None, token_iat: int | None) -> None:
        """The same for one who does not wait."""
        self._send(user_id, window_since, token_iat)

    @property
    def under_way(self) -> int:
        """How many questions wait for their answer."""
        return len(self._under_way)

    def close(self) -> None:
        """Whoever waits is told no. Idempotent."""
        for number in list(self._under_way):
            self._end_question(number, False)
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end.fileno())
            self._end.close()

    def _send(self, user_id: int, window_since: float | None, token_iat: int | None) -> _UnderWay | None:
        """The question as it is under way now; None when it cannot be asked."""
        if not self._is_ready():
            return None
        key = (user_id, window_since is not None, token_iat)
        number = self._by_key.get(key)
        if number is not None:
            return self._under_way[number]
        if len(self._under_way) >= MAX_UNDER_WAY:
            return None
        number = self._next
        try:
            self._end.send(pack_question(Question(number, user_id, window_since, token_iat)))
        except (OSError, struct.error):  # full, closed, or a number that no store holds
            return None
        self._next += 1
        timer = self._loop.call_later(DEADLINE_S, self._on_deadline, number)
        self._by_key[key] = number
        under_way = self._under_way[number] = _UnderWay(key, self._loop.create_future(), timer)
        return under_way

    def _on_deadline(self, number: int) -> None:
        self._unanswered += 1
        self._end_question(number, False)

    def _end_question(self, number: int, ok: bool) -> None:
        under_way = self._under_way.pop(number, None)
        if under_way is None:
            return
        del self._by_key[under_way.key]
        under_way.timer.cancel()
        if not under_way.answer.done():
            under_way.answer.set_result(ok)

    def _on_readable(self) -> None:
        for _ in range(ANSWERS_A_TURN):
            try:
                # One byte more than an answer has: what is longer must not look like one.
                data = self._end.recv(ANSWER_BYTES + 1)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_broken(error.strerror or str(error))
                return
            if not data:
                self._on_broken("closed by the other side")
                return
            answer = unpack_answer(data)
            if answer is not None and self._first <= answer[0] < self._next:
                self._unanswered = 0  # late or not: somebody answers
                self._end_question(*answer)

    def _on_broken(self, reason: str) -> None:
        """The master holds the other end for as long as it lives, so this is a node that ends."""
        self._loop.remove_reader(self._end.fileno())
        self._log.debug("questions_closed", detail=reason)
