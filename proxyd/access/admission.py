"""May this session do this now: the model it asks for, the tokens it has left.

Owns: the order of the questions, the refusals, and the Ticket that an admitted request holds until it ends. Must
not know: how spending is counted or shared (the ledger does), HTTP, prompts.

    admit -> model allowed for this token?  403 model_not_allowed
          -> tokens left of quota_remaining? 429 quota_exceeded      the token's own quota less what was spent since iat
          -> window below quota.tokens?      429 quota_exceeded      when configured
          -> Ticket (OPEN) --settle(tokens)--> SETTLED
                           --refund()--------> REFUNDED              both absorb; the first call wins

Retry-After. A spent token stays spent: only a new one helps, and when the site mints it we cannot know, so a client
is told to come back with one in the time the token has left, a minute at most. A used-up window has a real end, and
that is said. Both carry `x-should-retry: false`, or the SDKs would knock twice more with the same token.
A model that is not configured is a 404 and not this room's question: ask it first.
"""

from __future__ import annotations

import math
from enum import Enum, auto

from proxyd.access.cookies import Via
from proxyd.access.ledger import Ledger, LocalLedger, Reservation
from proxyd.access.session import Session
from proxyd.clock import Clock
from proxyd.config.schema import Config
from proxyd.errors import Refusal

MAX_RETRY_AFTER_S = 60
_NO_RETRY = (("x-should-retry", "false"),)


class TicketState(Enum):
    """What became of an admitted request's reservation."""

    OPEN = auto()
    SETTLED = auto()
    REFUNDED = auto()


class Ticket:
    """The right to make one request. End it with `settle` or `refund`; further calls do nothing."""

    __slots__ = ("_reservation", "session", "state")

    def __init__(self, session: Session, reservation: Reservation) -> None:
        self.session = session
        self.state = TicketState.OPEN
        self._reservation = reservation

    def settle(self, tokens: int) -> None:
        """The request ended having spent `tokens`, prompt and completion together."""
        assert tokens >= 0, tokens
        if self.state is TicketState.OPEN:
            self.state = TicketState.SETTLED
            self._reservation.settle(tokens)

    def refund(self) -> None:
        """The request ended without costing anything."""
        if self.state is TicketState.OPEN:
            self.state = TicketState.REFUNDED
            self._reservation.refund()


class _Nothing:
    """The reservation of a session nobody counts (auth.mode "off")."""

    __slots__ = ()

    def settle(self, tokens: int) -> None:
        pass

    def refund(self) -> None:
        pass


_NOTHING = _Nothing()


class Admission:
    """Admits requests for one worker. `ledger` counts; by default the one of this process."""

    __slots__ = ("_clock", "_ledger", "_window_s", "_window_tokens")

    def __init__(self, config: Config, clock: Clock, *, ledger: Ledger | None = None) -> None:
        self._clock = clock
        self._ledger: Ledger = LocalLedger(clock) if ledger is None else ledger
        self._window_s = config.quota.window
        self._window_tokens = config.quota.tokens

    def admit(self, session: Session, ask_model: str, *, estimate_tokens: int = 0) -> Ticket:
        """Lets the session ask for the configured model `ask_model`. Raises Refusal 403 or 429.

        `estimate_tokens` is held until the ticket ends, so that requests running side by side do not all pass on
        the same last tokens. Called and answered in one turn of the loop: nothing can come between the decision and
        the reservation.
        """
        if session.models is not None and ask_model not in session.models:
            raise Refusal(
                403, "model_not_allowed", "This session may not use this model.", param="model", headers=_NO_RETRY
            )
        if session.via is Via.OFF:
            return Ticket(session, _NOTHING)
        self._check_quota(session)
        self._check_window(session)
        return Ticket(session, self._ledger.reserve(session, estimate_tokens))

    def tokens_left(self, session: Session) -> int | None:
        """What the session may still spend, requests under way deducted; None without a limit. May be negative."""
        if session.quota_remaining is None:
            return None
        # Without iat nobody knows when the quota was counted: all that this process saw since counts.
        since = 0.0 if session.issued_at is None else session.issued_at
        return session.quota_remaining - self._ledger.spent_since(session, since)

    def _check_quota(self, session: Session) -> None:
        left = self.tokens_left(session)
        if left is None or left > 0:
            return
        token_left_s = math.ceil(session.expires_at - self._clock.wall())
        raise Refusal(
            429,
            "quota_exceeded",
            "This session has no tokens left; come back with a new session.",
            retry_after_s=min(token_left_s, MAX_RETRY_AFTER_S),
            headers=_NO_RETRY,
        )

    def _check_window(self, session: Session) -> None:
        if self._window_tokens <= 0:
            return
        wait_s = self._ledger.seconds_until_below(session, self._window_tokens, self._window_s)
        if wait_s > 0:
            raise Refusal(
                429,
                "quota_exceeded",
                "This user's tokens for the rolling window are used up.",
                retry_after_s=math.ceil(wait_s),
                headers=_NO_RETRY,
            )
