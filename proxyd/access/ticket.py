"""The right to make one request: what it holds in the ledger until it ends, and how that is set right.

Owns: the Ticket and its states. Must not know: who is admitted, HTTP, rows.

    OPEN --settle(tokens)--> SETTLED
         --refund()--------> REFUNDED      both absorb; the first call wins

    it holds:  held      of the user: the larger of its reservation and what it used so far
               running   of the user: what it used so far
               Minute    in the tenant's minute: as held; what is missing is added, what is too much taken back
               permit    of the tenant, until release() or the end

Its process may die at any instruction: held, running and the permit are the slot's in the ledger, which the master
reclaims; what stands in the minute leaves it by itself.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from proxyd.access.quota import share_of
from proxyd.access.session import Session
from proxyd.shm.ledger import Account, Tenant

__all__ = ["Minute", "Ticket", "TicketState"]

# What an average learns of one answer at most: none that is one is longer, and a provider that tells 2^32 once would
# keep its user away for the next hundred.
MOST_LEARNT = 1 << 20


class Issuer(Protocol):
    """What a ticket asks of the admission that gave it."""

    def now_ms(self) -> int: ...
    def left(self, session: Session, account: Account) -> int | None: ...


class TicketState(Enum):
    """What became of an admitted request's reservation."""

    OPEN = auto()
    SETTLED = auto()
    REFUNDED = auto()


class Minute:
    """What one ticket has booked in its tenant's sliding minute, which has `limit` tokens."""

    __slots__ = ("_at_ms", "_grown", "_grown_at_ms", "_limit", "_reserved", "_tenant")

    def __init__(self, tenant: Tenant, reserved: int, at_ms: int, limit: int) -> None:
        self._tenant = tenant
        self._limit = limit
        self._reserved, self._at_ms = reserved, at_ms
        self._grown, self._grown_at_ms = 0, at_ms

    def grow(self, tokens: int, now_ms: int) -> None:
        """`tokens` so far: what passes the reservation counts from now on."""
        more = tokens - self._reserved - self._grown
        if more > 0:
            self._tenant.tokens.add(more, now_ms)
            self._grown, self._grown_at_ms = self._grown + more, now_ms

    def end(self, tokens: int, now_ms: int) -> None:
        """`tokens` in all: too much is taken back from where it was counted."""
        self.grow(tokens, now_ms)
        from_growth = min(self._grown, self._reserved + self._grown - tokens)
        if from_growth > 0:
            self._tenant.tokens.add(-from_growth, self._grown_at_ms)
        if tokens < self._reserved:
            self._tenant.tokens.add(tokens - self._reserved, self._at_ms)

    def learn(self, tokens: int) -> None:
        """What a request usually costs; one that was larger than the minute says no more than that it was."""
        self._tenant.learn_tokens(min(tokens, self._limit, MOST_LEARNT))


class Ticket:
    """The right to make one request. End it with `settle` or `refund`; further calls do nothing."""

    __slots__ = (
        "_account", "_held", "_issuer", "_minute", "_permit", "_prompt", "_reserved", "_running", "_started_ms",
        "_tenant", "session", "state",
    )  # fmt: skip

    def __init__(
        self,
        issuer: Issuer,
        session: Session,
        *,
        account: Account | None = None,
        prompt_tokens: int = 0,
        reserved: int = 0,
        tenant: Tenant | None = None,
        permit: int = -1,
        minute: Minute | None = None,
        started_ms: int = 0,
    ) -> None:
        """`account` is None for what no quota counts, `tenant` where the tenant has no limits."""
        self.session = session
        self.state = TicketState.OPEN
        self._issuer = issuer
        self._account = account
        self._prompt = prompt_tokens
        self._reserved = self._held = reserved
        self._running = 0
        self._tenant = tenant
        self._permit = permit
        self._minute = minute
        self._started_ms = started_ms
        if account is not None and reserved:
            account.add(held=reserved)

    def progress(self, tokens_so_far: int) -> bool:
        """What it used so far, prompt and completion. False: the user is over a line; end the answer."""
        if self.state is not TicketState.OPEN:
            return True
        if self._minute is not None:
            self._minute.grow(tokens_so_far, self._issuer.now_ms())
        if self._account is None:
            return True
        held = max(self._reserved, tokens_so_far)
        self._account.add(held=held - self._held, running=tokens_so_far - self._running)
        self._held, self._running = held, tokens_so_far
        left = self.tokens_left()
        return left is None or left >= 0

    def tokens_left(self) -> int | None:
        """Until the user's nearer line, by what all his requests used so far; None without one. May be negative."""
        if self._account is None:
            return None
        return self._issuer.left(self.session, self._account)

    def share(self) -> int | None:
        """How far it may go until it is looked at again; None without a line, and negative behind it."""
        left = self.tokens_left()
        if left is None or self._account is None:
            return None
        return share_of(left, self._held, self._account.held - self._held)

    def release(self) -> None:
        """Gives the permit back: the upstream has answered, the next may come. Repeats do nothing."""
        permit, self._permit = self._permit, -1
        if permit >= 0 and self._tenant is not None:
            self._tenant.learn_ms(max(0, self._issuer.now_ms() - self._started_ms))
            self._tenant.release(permit)

    def settle(self, tokens: int) -> None:
        """The request ended having spent `tokens`, prompt and completion together."""
        assert tokens >= 0, tokens
        if self.state is not TicketState.OPEN:
            return
        self._end(TicketState.SETTLED, tokens)
        if self._account is not None:
            self._account.learn_completion(min(max(0, tokens - self._prompt), MOST_LEARNT))
        if self._minute is not None:
            self._minute.learn(tokens)

    def refund(self) -> None:
        """The request ended without costing anything."""
        if self.state is TicketState.OPEN:
            self._end(TicketState.REFUNDED, 0)

    def _end(self, state: TicketState, tokens: int) -> None:
        self.state = state
        now_ms = self._issuer.now_ms()
        if self._account is not None:
            self._account.add(held=-self._held, running=-self._running, settled=tokens, at_ms=now_ms)
        if self._minute is not None:
            self._minute.end(tokens, now_ms)
        self.release()
