"""The telemetry process's side of the workers' questions: takes them in, reads the store, writes the ledger.

Owns: the queue of questions, what one answer needs of the store and what it writes to the ledger. Must not know:
groups, spools, when there is time for it: the writer calls `serve` between two commits, on the connection that commits.

    sockets --on_readable--> queue (an entry a user and sort of question, whoever asks) --serve--> store, ledger, answer
                       '---> "no" at once while the store fails

What is written. S is the store's sum, `stored` the ledger's count of this node's tokens in committed rows, `settled`
that of tokens that workers have counted as spent. No commit is in flight while S is read, so a row of this node is in S
if and only if it is in `stored` (older rows are in S alone), and base = S - stored stays true while rows flow: from
then on base + settled is what was spent, on every worker, without asking again. It is exact for the rows of this node;
rows of others, and those that leave the window, come with the next reading. A dead worker's rows were settled by
nobody: the desk settles them in a slot of its own, in the turn in which it counts them as stored.

Heal. A kill between two instructions may leave `stored` and `settled` apart for good. When nothing waits to be stored,
and the user has nothing under way and has settled nothing for QUIET_S, they must be equal, and are made so.

Bounds: QUEUE_MAX entries, ASKERS_MAX askers each, more are dropped (they have a deadline of their own); one `serve`
takes SERVE_S, after which the writer's groups have their turn; SPENDS_MAX seconds of a user's rows are read to find
`free_at`.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from proxyd.clock import Clock
from proxyd.store.schema import Row, Store
from proxyd.telemetry.questions import QUESTION_BYTES, Question, pack_answer, unpack_question

__all__ = ["Accounts", "Ceiling", "Desk"]

# More than all workers' sockets hold together on any machine we know.
QUEUE_MAX = 4096
# Each worker has one equal question under way, and may ask again for one that it gave up on.
ASKERS_MAX = 256
# Taken from one socket in one turn of the loop, so that a worker in a frenzy leaves the others their turn.
TAKEN_A_TURN = 64
# Half a worker's patience. Twice: a group that is due waits that long; half: a crowd of new users takes more rounds.
SERVE_S = 0.025
# The same wait for settled tokens to come through spool and store, forty times the default linger.
QUIET_S = 2.0
# A user over the ceiling is so by little, so a few seconds of rows usually tell; a day has 86,400 of them.
SPENDS_A_READ = 512
SPENDS_MAX = 8192

# 9999-12-31: what a store's calendar takes. No claim of a token gets further than that.
LAST_SECOND = 253_402_300_799

_Key = tuple[int, bool, int | None]


class Accounts(Protocol):
    """What we need of shm.ledger.Ledger."""

    def find(self, user_id: int, slot: int = -1) -> Any: ...


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A user's ceiling in the rolling window; 0 tokens: none."""

    tokens: int = 0
    window_s: float = 86_400.0

    @classmethod
    def of(cls, config: Any) -> Self:
        return cls(config.quota.tokens, config.quota.window)


@dataclass(slots=True)
class _Entry:
    """One reading that is due, and who asked for it: (slot, number)."""

    question: Question
    askers: list[tuple[int, int]]


class Desk:
    """One a telemetry process. `ends`: its ends of the channel, by slot. The ledger's slot behind them is its own."""

    __slots__ = ("_accounts", "_ceiling", "_clock", "_ends", "_is_closed", "_loop", "_queue", "_wake", "is_failing")

    def __init__(
        self,
        ends: Sequence[socket.socket],
        accounts: Accounts,
        ceiling: Ceiling,
        clock: Clock,
    ) -> None:
        self._ends, self._accounts, self._ceiling, self._clock = ends, accounts, ceiling, clock
        self._wake: Callable[[], None] = lambda: None
        self._queue: dict[_Key, _Entry] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        # True while the store fails: no question is worth its wait then.
        self.is_failing = False

    def open(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        """Begins to listen; `wake` is called when there is something to serve. What lies in the sockets now was asked
        of a predecessor, and its askers have given up."""
        self._loop, self._wake = loop, wake
        for slot, end in enumerate(self._ends):
            while self._receive(end):
                pass
            loop.add_reader(end.fileno(), self._on_readable, slot)

    def close(self) -> None:
        """Whoever waits is told no."""
        if self._is_closed:
            return
        self._is_closed = True
        self.refuse_all()
        for end in self._ends:
            if self._loop is not None:
                self._loop.remove_reader(end.fileno())
            end.close()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def refuse_all(self) -> None:
        """Answers no to all that wait."""
        queue, self._queue = self._queue, {}
        for entry in queue.values():
            self._answer(entry, False)

    def fail(self) -> None:
        """The store fails: no to all that wait and all that come, until it is told to work again."""
        self.is_failing = True
        self.refuse_all()

    def count_stored(self, rows: Iterable[Row]) -> None:
        """These rows of this node are committed: what they cost is in the store's sums from now on."""
        for user_id, count in _sums(rows).items():
            account = self._accounts.find(user_id)
            if account is not None:
                account.add_stored(count)

    def count_interrupted(self, rows: Iterable[Row]) -> None:
        """These rows are committed, and those who were to settle them are dead: they are settled here, so that they
        count at once. Settled first: killed between the two, what is spent is too much until it is healed."""
        for user_id, count in _sums(rows).items():
            account = self._accounts.find(user_id, len(self._ends))
            if account is not None:
                account.add(settled=count, at_ms=int(self._clock.monotonic() * 1000))
                account.add_stored(count)

    async def serve(self, store: Store, is_quiet: bool) -> None:
        """Answers what waits, oldest first, for SERVE_S. `is_quiet`: nothing waits in the spool or in a group.

        Raises StoreError when the store does; the question is then still in the queue.
        """
        until = self._clock.monotonic() + SERVE_S
        while self._queue:
            key = next(iter(self._queue))
            ok = await self._read(store, self._queue[key].question, is_quiet)
            entry = self._queue.pop(key, None)  # whoever joined meanwhile has the fresh reading, too
            if entry is not None:
                self._answer(entry, ok)
            if self._clock.monotonic() >= until:
                return

    async def _read(self, store: Store, question: Question, is_quiet: bool) -> bool:
        """Writes the ledger for one question; False when the user has no account there."""
        account = self._accounts.find(question.user_id)
        if account is None:
            return False
        at_ms = int(self._clock.monotonic() * 1000)
        if is_quiet and account.held == 0 and account.settled_at + QUIET_S * 1000 <= at_ms:
            account.heal()
        if question.window_since is not None:
            since = min(max(question.window_since, 0.0), float(LAST_SECOND))
            base = await store.window_sum(question.user_id, since) - account.stored
            free_at = 0
            over = base + account.settled - self._ceiling.tokens
            if self._ceiling.tokens > 0 and over >= 0:
                free_at = await self._free_at(store, question.user_id, since, over)
            account.set_window(base, at_ms, free_at)
        if question.token_iat is not None:
            since = float(min(question.token_iat, LAST_SECOND))
            base = await store.window_sum(question.user_id, since) - account.stored
            account.set_token(question.token_iat, base, at_ms)
        return True

    async def _free_at(self, store: Store, user_id: int, since: float, over: int) -> int:
        """When the window has room again, in wall seconds: a second after it, for rows have whole seconds. 0 when the
        rows do not tell yet, because what fills it is still on its way; a whole window from now when it fills more of
        them than are read."""
        seen = 0
        while seen < SPENDS_MAX:
            spends = await store.spends(user_id, since, SPENDS_A_READ)
            for second, tokens in spends:
                over -= tokens
                if over < 0:
                    return math.ceil(second + self._ceiling.window_s)
            if len(spends) < SPENDS_A_READ:
                return 0
            seen += len(spends)
            since = spends[-1][0] + 1
        return math.ceil(self._clock.wall() + self._ceiling.window_s)

    def _on_readable(self, slot: int) -> None:
        end = self._ends[slot]
        for _ in range(TAKEN_A_TURN):
            data = self._receive(end)
            if data is None:
                break
            if not data:  # the node ends; without a reader the loop would turn for nothing
                if self._loop is not None:
                    self._loop.remove_reader(end.fileno())
                break
            question = unpack_question(data)
            if question is not None:
                self._take(slot, question)
        if self._queue:
            self._wake()

    def _receive(self, end: socket.socket) -> bytes | None:
        """A message; None when there is none now, b"" when there never will be."""
        try:
            return end.recv(QUESTION_BYTES + 1)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _take(self, slot: int, question: Question) -> None:
        asker = (slot, question.number)
        key = (question.user_id, question.window_since is not None, question.token_iat)
        entry = self._queue.get(key)
        if self.is_failing:
            self._answer(_Entry(question, [asker]), False)
        elif entry is None:
            if len(self._queue) < QUEUE_MAX:
                self._queue[key] = _Entry(question, [asker])
        elif len(entry.askers) < ASKERS_MAX:
            entry.askers.append(asker)

    def _answer(self, entry: _Entry, ok: bool) -> None:
        for slot, number in entry.askers:
            try:
                self._ends[slot].send(pack_answer(number, ok))
            except OSError:  # a worker that reads no answers has none to wait for
                continue


def _sums(rows: Iterable[Row]) -> dict[int, int]:
    """What each user's rows cost."""
    tokens: dict[int, int] = {}
    for row in rows:
        tokens[row.user_id] = tokens.get(row.user_id, 0) + row.prompt_tokens + row.completion_tokens
    return tokens
