"""Who has spent how much, as far as this worker knows: reserve before, settle after, refund on failure.

Owns: the interface that any ledger has towards `admission`, and the ledger of one process. Must not know: tokens'
bytes, models, HTTP.

What it knows: spending that went through this process since it started, per user. What it cannot know: other
workers, other nodes, and the time before it started. So it never refuses a user who has tokens left, and may let
one spend up to once per worker; a ledger that all workers share takes its place behind the same two protocols.

    account of a user:  spends  (second, tokens) oldest first, at most MAX_SPENDS; the older half is merged pairwise
    when full
                        held    tokens reserved by requests under way

Invariants: what a user spent counts against every token of that user issued before it, not only the one that was
sent; merged spends keep the earlier time, so merging may forget a spend for a token minted in between but never
invents one; at most MAX_ACCOUNTS users are remembered, those with requests under way first.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from proxyd.access.session import Session
from proxyd.clock import Clock

# Seconds in which a user spent anything that are kept apart. 256 are the last four minutes of constant use, exact.
MAX_SPENDS = 256
# About 1 KB each when busy. Half forgets users while their tokens live on a node with more than 25,000 users a worker.
MAX_ACCOUNTS = 50_000


class Reservation(Protocol):
    """Tokens set aside for one request. Exactly one of the two is called, once; `admission.Ticket` sees to that."""

    def settle(self, tokens: int) -> None:
        """The request ended: it spent `tokens`."""

    def refund(self) -> None:
        """The request never reached an upstream: it spent nothing."""


class Ledger(Protocol):
    """Knows what users have spent."""

    def spent_since(self, session: Session, since: float) -> int:
        """Tokens that the session's user spent or holds, from `since` (wall seconds) on."""

    def seconds_until_below(self, session: Session, tokens: int, window_s: float) -> float:
        """How long until the user's spending in the rolling window falls below `tokens`; 0 when it is below."""

    def reserve(self, session: Session, tokens: int) -> Reservation:
        """Sets `tokens` aside. Decides nothing: `admission` did, in the same turn of the loop."""


class _Account:
    __slots__ = ("held", "spends")

    def __init__(self) -> None:
        self.held = 0
        self.spends: list[tuple[float, int]] = []

    def spend(self, now: float, tokens: int) -> None:
        second = float(int(now))
        spends = self.spends
        if spends and spends[-1][0] >= second:
            spends[-1] = (spends[-1][0], spends[-1][1] + tokens)
            return
        if len(spends) >= MAX_SPENDS:
            half = len(spends) // 2
            spends[:half] = [(spends[i][0], spends[i][1] + spends[i + 1][1]) for i in range(0, half - 1, 2)]
        spends.append((second, tokens))

    def since(self, since: float) -> int:
        total = self.held
        for second, tokens in reversed(self.spends):
            # The second of `since` itself counts: `iat` has whole seconds.
            if second < float(int(since)):
                break
            total += tokens
        return total


class LocalLedger:
    """The ledger of one process, in memory."""

    __slots__ = ("_accounts", "_clock", "_max_accounts")

    def __init__(self, clock: Clock, max_accounts: int = MAX_ACCOUNTS) -> None:
        self._clock = clock
        self._max_accounts = max_accounts
        self._accounts: OrderedDict[int, _Account] = OrderedDict()

    def spent_since(self, session: Session, since: float) -> int:
        account = self._accounts.get(session.user_id)
        return 0 if account is None else account.since(since)

    def seconds_until_below(self, session: Session, tokens: int, window_s: float) -> float:
        account = self._accounts.get(session.user_id)
        if account is None:
            return 0.0
        now = self._clock.wall()
        over = account.since(now - window_s) - tokens
        if over < 0:
            return 0.0
        for second, spent in account.spends:
            if second < float(int(now - window_s)):
                continue
            over -= spent
            if over < 0:
                return max(1.0, second + 1.0 + window_s - now)
        return 1.0  # only requests under way are in the way: they end

    def reserve(self, session: Session, tokens: int) -> Reservation:
        account = self._accounts.get(session.user_id)
        if account is None:
            account = self._accounts[session.user_id] = _Account()
            self._make_room()
        self._accounts.move_to_end(session.user_id)
        account.held += tokens
        return _LocalReservation(account, tokens, self._clock)

    def _make_room(self) -> None:
        """Forgets the users unseen for longest. Those with requests under way are passed over, a few at a time, to
        keep the cost bounded.
        """
        for _ in range(8):
            if len(self._accounts) <= self._max_accounts:
                return
            user_id, account = next(iter(self._accounts.items()))
            if account.held:
                self._accounts.move_to_end(user_id)
            else:
                del self._accounts[user_id]


class _LocalReservation:
    __slots__ = ("_account", "_clock", "_held")

    def __init__(self, account: _Account, held: int, clock: Clock) -> None:
        self._account = account
        self._held = held
        self._clock = clock

    def settle(self, tokens: int) -> None:
        self._account.held -= self._held
        if tokens:
            self._account.spend(self._clock.wall(), tokens)

    def refund(self) -> None:
        self._account.held -= self._held
