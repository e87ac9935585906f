"""May this session do this now: the model it asks for, the tokens it has left, what its tenant may do at once and a
minute.

Owns: the order of the questions, the refusals, what is set aside. Must not know: how the ledger counts across
processes, who reads the store, HTTP, prompts.

    admit -> model allowed for this token?            403 model_not_allowed
          -> tokens left of quota and window?         429 quota_exceeded               access/quota.py
          -> a permit of the tenant's free?           429 concurrency_limit_exceeded
          -> one more request in this minute?         429 rate_limit_exceeded
          -> its tokens, too?                         429 rate_limit_exceeded
          -> Ticket                                                                    access/ticket.py

A refused request consumes nothing: what was taken before the refusal is given back at once. Nothing here waits: where
the store must be read first, NeedsReading says what, the caller waits and asks once more with may_wait=False, and then
is decided on what is known. A request reserves its prompt's estimate and the completion to expect: the user's average,
FIRST_COMPLETION before there is one, never more than the request's own max_tokens, and in the tenant's minute a
sixteenth of the limit at most.

A model that is not configured is a 404 and not this room's question: ask it first.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from proxyd.access.cookies import Via
from proxyd.access.quota import NO_RETRY, Kind, Line, Times, age_ms, decide_refusal, left_of, must_read
from proxyd.access.session import Session
from proxyd.access.ticket import Minute, Ticket, TicketState
from proxyd.clock import Clock
from proxyd.config.schema import Config
from proxyd.errors import Refusal
from proxyd.shm.ledger import Account, SlotLedger, Tenant
from proxyd.shm.metrics import Metrics

__all__ = ["Admission", "NeedsReading", "Ticket", "TicketState", "decide_wait_s"]

# Completion tokens to expect of a user who has none behind him yet. Half lets more of a new user's requests start side
# by side than a small quota pays for; twice refuses the second of two short ones.
FIRST_COMPLETION = 256
# What an answer is expected to have, however few tokens the request allows: a JSON answer is never cut, and an upstream
# may not heed it. Half lets twice as many requests begin on their word; twice makes a classifier's one token cost 32.
LEAST_COMPLETION = 16
# No completion to expect is more than this part of a tenant's minute. Half lets half as many short requests begin side
# by side after a long answer; twice lets a minute be overshot by twice as many long answers.
PARTS_OF_A_MINUTE = 16
# What a client that finds all permits taken waits when nobody has given one back yet.
UNKNOWN_WAIT_S = 10
# The longest such wait. Half brings clients back too early behind long answers; twice is longer than they stay.
MAX_WAIT_S = 60
# Sessions whose first sight is remembered here, too, for the ledger has a user's last eight; 150 bytes each.
MAX_FIRST_SEEN = 10_000
# A token seen this soon after its `iat` is charged from there on: what its user spent in the same second was not with
# it. Half: a browser that loads a page before it asks is late; twice gives more of what a predecessor spends away.
NEW_S = 2.0

# How often requests under way ask for a user's reading while the store does not answer. Twice: seconds pass before what
# other nodes spent is known; half asks for each kilobyte of a fast answer.
ASK_AGAIN_MS = 1000
MAX_ASKED = 10_000


class NeedsReading(Exception):
    """The store has to be asked before this can be decided: for the user's window since `window_since` (wall s), for
    what he spent since `token_iat`; None of either: not asked for."""

    def __init__(self, user_id: int, window_since: float | None, token_iat: int | None) -> None:
        super().__init__(user_id, window_since, token_iat)
        self.user_id = user_id
        self.window_since = window_since
        self.token_iat = token_iat


class TenantRules(NamedTuple):
    """The limits of one tenant; 0 is none."""

    streams: int
    requests: int
    tokens: int


class Admission:
    """Admits requests for one worker, by the ledger that all workers share. `refresh` is called with a user, a window's
    beginning and an iat (None: not asked for) whose last reading is older than quota.refresh; it must not wait.
    `started_at` (wall s): when the ledger began to count."""

    __slots__ = (
        "_asked", "_by_store", "_clock", "_first_seen", "_general", "_ledger", "_locally", "_oldest_ms", "_refresh",
        "_refresh_ms", "_rules", "_started_at", "_window_s", "_window_tokens",
    )  # fmt: skip

    def __init__(
        self,
        config: Config,
        clock: Clock,
        ledger: SlotLedger,
        metrics: Metrics,
        *,
        refresh: Callable[[int, float | None, int | None], None] = lambda user_id, window_since, token_iat: None,
        started_at: float = 0.0,
    ) -> None:
        self._clock = clock
        self._ledger = ledger
        self._refresh = refresh
        self._started_at = started_at
        self._window_s = config.quota.window
        self._window_tokens = config.quota.tokens
        self._refresh_ms = config.quota.refresh * 1000
        # Twice, for a reading is asked for only when somebody comes, and a second for its way.
        self._oldest_ms = 2 * self._refresh_ms + 1000
        limits = config.limits
        self._general = TenantRules(limits.concurrent_streams, limits.requests_per_minute, limits.tokens_per_minute)
        self._rules = {name: TenantRules(*limits.for_tenant(name)) for name in limits.tenants}
        self._first_seen: OrderedDict[tuple[int, int], tuple[int, bool]] = OrderedDict()
        self._asked: OrderedDict[int, int] = OrderedDict()
        self._by_store = metrics.counter("proxyd_quota_decisions_total", basis="store")
        self._locally = metrics.counter("proxyd_quota_decisions_total", basis="local")

    def now_ms(self) -> int:
        """The clock that all processes share, as the ledger counts it."""
        return int(self._clock.monotonic() * 1000)

    def admit(
        self,
        session: Session,
        model: str,
        *,
        prompt_tokens: int = 0,
        max_tokens: int | None = None,
        counts: bool = True,
        may_wait: bool = False,
    ) -> Ticket:
        """Lets the session ask for the configured model. Raises Refusal 403 or 429, or NeedsReading with `may_wait`.

        `counts` is False for what costs no tokens (count_tokens): then only requests_per_minute counts. Called and
        answered in one turn of the loop: of this worker's own requests none comes between the look and the
        reservation, so N workers can let at most N - 1 requests too many begin.
        """
        if session.models is not None and model not in session.models:
            raise Refusal(
                403, "model_not_allowed", "This session may not use this model.", param="model", headers=NO_RETRY
            )
        account: Account | None = None
        reserved = 0
        if counts and session.via is not Via.OFF:
            account = self._ledger.account(session.user_id)
            self._check_quota(session, account, may_wait)
            reserved = prompt_tokens + _expected(account.average_completion, max_tokens)
        rules = self._rules.get(session.tenant, self._general)
        if not any(rules):
            return Ticket(self, session, account=account, prompt_tokens=prompt_tokens, reserved=reserved)
        return self._admit_tenant(session, rules, account, prompt_tokens, reserved, max_tokens, counts)

    # -- the tenant's limits -------------------------------------------------------------------------------------

    def _admit_tenant(
        self,
        session: Session,
        rules: TenantRules,
        account: Account | None,
        prompt_tokens: int,
        reserved: int,
        max_tokens: int | None,
        counts: bool,
    ) -> Ticket:
        """Takes a permit, a request and its tokens; all or nothing."""
        tenant = self._ledger.tenant(session.tenant)
        now = self._clock.monotonic()
        now_ms = int(now * 1000)
        permit = -1
        if counts and rules.streams:
            permit = tenant.acquire(rules.streams, int(now))
            if permit < 0:
                raise _too_many(tenant, rules.streams, now)
        if rules.requests and not tenant.requests.try_add(1, rules.requests, now_ms):
            if permit >= 0:
                tenant.release(permit)
            wait_ms = tenant.requests.wait_ms(1, rules.requests, now_ms)
            raise _too_fast("requests", "This tenant may make no more requests in this minute.", wait_ms)
        minute: Minute | None = None
        if counts and rules.tokens:
            expected = _expected(self._average(account, tenant, prompt_tokens), max_tokens)
            booked = max(1, prompt_tokens + min(expected, max(1, rules.tokens // PARTS_OF_A_MINUTE)))
            if not tenant.tokens.try_add(booked, rules.tokens, now_ms):
                if permit >= 0:
                    tenant.release(permit)
                if rules.requests:
                    tenant.requests.add(-1, now_ms)
                wait_ms = tenant.tokens.wait_ms(booked, rules.tokens, now_ms)
                raise _too_fast("tokens", "This tenant has used its tokens of this minute.", wait_ms)
            minute = Minute(tenant, booked, now_ms, rules.tokens)
        return Ticket(
            self,
            session,
            account=account,
            prompt_tokens=prompt_tokens,
            reserved=reserved,
            tenant=tenant,
            permit=permit,
            minute=minute,
            started_ms=now_ms,
        )

    @staticmethod
    def _average(account: Account | None, tenant: Tenant, prompt_tokens: int) -> int | None:
        """The completion to expect in the tenant's minute: a user nobody knows yet is like his tenant's others."""
        if account is not None and account.average_completion is not None:
            return account.average_completion
        tokens = tenant.average_tokens
        return None if tokens is None else max(0, tokens - prompt_tokens)

    # -- the user's quota ----------------------------------------------------------------------------------------

    def _check_quota(self, session: Session, account: Account, may_wait: bool) -> None:
        """Raises Refusal 429 or NeedsReading."""
        sums = account.sums()
        lines = self._lines(session, account, sums.settled)
        if not lines:
            return
        now, now_ms = self._clock.wall(), self.now_ms()
        times = Times(now, session.expires_at, self._window_s)
        refusal = decide_refusal(lines, sums.held, times)
        window_since = now - self._window_s if self._window_tokens else None
        iat = _iat(session)
        if may_wait and account.is_shared and must_read(lines, refusal is not None, now, now_ms, self._oldest_ms):
            raise NeedsReading(session.user_id, window_since, iat)
        age = age_ms(lines, now_ms)
        if age > self._refresh_ms and account.is_shared and (window_since is not None or iat is not None):
            self._refresh(session.user_id, window_since, iat)
        (self._by_store if age <= self._oldest_ms else self._locally).add(1)
        if refusal is not None:
            raise refusal

    def left(self, session: Session, account: Account) -> int | None:
        """Tokens until the nearer line, by what the user's requests under way used so far; None without a line."""
        sums = account.sums()
        lines = self._lines(session, account, sums.settled)
        readable = [line for line in lines if line.is_readable]
        if readable and age_ms(readable, self.now_ms()) > self._refresh_ms and account.is_shared:
            self._ask_again(session)
        return left_of(lines, sums.running)

    def _ask_again(self, session: Session) -> None:
        """A request under way has its user's reading made anew; not more often than once in ASK_AGAIN_MS, for it looks
        again and again while nobody answers."""
        now_ms, user_id = self.now_ms(), session.user_id
        if now_ms - self._asked.get(user_id, -ASK_AGAIN_MS) < ASK_AGAIN_MS:
            return
        iat = _iat(session)
        window_since = self._clock.wall() - self._window_s if self._window_tokens else None
        if window_since is None and iat is None:
            return
        self._asked[user_id] = now_ms
        self._asked.move_to_end(user_id)
        if len(self._asked) > MAX_ASKED:
            self._asked.popitem(last=False)
        self._refresh(user_id, window_since, iat)

    def _lines(self, session: Session, account: Account, settled: int) -> list[Line]:
        """The user's lines, with what the ledger knows of them now. `settled`: spent here by requests that ended."""
        lines: list[Line] = []
        if self._window_tokens:
            known = account.window
            if known is None:
                lines.append(Line(Kind.WINDOW, self._window_tokens, settled))
            else:
                spent = max(0, known.base + settled)
                lines.append(Line(Kind.WINDOW, self._window_tokens, spent, known.at_ms, known.free_at))
        quota = session.quota_remaining
        if quota is not None:
            iat = _iat(session)
            known = account.token(iat) if iat is not None else None
            before, is_new = self._seen(session, account, settled)
            if known is not None:
                spent = known.base + settled - (known.first + before if is_new else 0)
                lines.append(Line(Kind.TOKEN, quota, max(0, spent), known.at_ms))
            else:
                if iat is not None and iat <= self._started_at:
                    before = 0
                lines.append(Line(Kind.TOKEN, quota, max(0, settled - before), is_readable=iat is not None))
        return lines

    def _seen(self, session: Session, account: Account, settled: int) -> tuple[int, bool]:
        """What the user had settled here when a worker, any worker, first saw this session, and whether that was
        within NEW_S of its `iat`: then it begins there, and what the store had of its user in that moment (the `first`
        base) was not spent with it. One without `iat` always begins there."""
        token = _token(session)
        key = (account.user_id, token)
        seen = self._first_seen.get(key)
        if seen is None:
            issued_at = session.issued_at
            is_new = issued_at is not None and max(self._started_at, self._clock.wall() - NEW_S) <= issued_at
            seen = self._first_seen[key] = account.first_seen(token, is_new)
            if len(self._first_seen) > MAX_FIRST_SEEN:
                self._first_seen.popitem(last=False)
        before, is_new = seen
        return min(before, settled), is_new  # a private row may have begun anew since


def _token(session: Session) -> int:
    """64 bits that tell the session's token from the user's others."""
    return int.from_bytes(session.token_key[:8], "little")


def _iat(session: Session) -> int | None:
    """The whole second from which the session's quota counts; None where there is none, or nobody knows."""
    return None if session.quota_remaining is None or session.issued_at is None else int(session.issued_at)


def _expected(average: int | None, max_tokens: int | None) -> int:
    """The completion to set aside for a request; `max_tokens` 0: there is none."""
    if max_tokens == 0:
        return 0
    expected = FIRST_COMPLETION if average is None else average
    return expected if max_tokens is None else min(expected, max(LEAST_COMPLETION, max_tokens))


def decide_wait_s(average_s: float, elapsed_s: float) -> int:
    """When to ask again for the permit of a request that has run for `elapsed_s`. Answers differ, so it is given a
    quarter more than the average; one that is past the average is taken for half done."""
    left_s = 1.25 * average_s - elapsed_s if elapsed_s <= average_s else elapsed_s
    return min(MAX_WAIT_S, max(1, math.ceil(left_s)))


def _too_many(tenant: Tenant, limit: int, now: float) -> Refusal:
    average_ms = tenant.average_ms
    wait_s = UNKNOWN_WAIT_S
    if average_ms is not None:
        # The start is a whole second, rounded down: counted from the next one, nobody is called back too early for it.
        wait_s = decide_wait_s(average_ms / 1000, max(0.0, now - 1 - tenant.oldest_start(limit)))
    return Refusal(
        429,
        "concurrency_limit_exceeded",
        f"This tenant has {limit} requests under way, which is all it may have at once.",
        retry_after_s=wait_s,
    )


def _too_fast(reason: str, message: str, wait_ms: int) -> Refusal:
    return Refusal(429, "rate_limit_exceeded", message, retry_after_s=math.ceil(wait_ms / 1000), reason=reason)
