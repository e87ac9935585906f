"""What stands between a user and more tokens: the session's own quota and the ceiling of the rolling window.

Owns: the lines that a user may not cross, how near it is to them, when they must be read from the store first, and in
what words a request is refused. Pure: it is given what the ledger knows. Must not know: shared memory, stores, HTTP.

    a line:   limit | spent for good ........ | held for requests under way ... | left
              at admission:   spent + held    >= limit is refused
              within answers: spent + running >  limit ends the answer          held is a forecast, running a count

Whichever line leaves less decides. Three refusals, told apart by what would help:
- only requests under way are in the way: they end, and may cost less than was set aside. Again in a second; SDKs may
  do that by themselves;
- the window is used up: it opens when its oldest tokens leave it, and that moment is told;
- the session's own quota is spent: it stays spent. Only a new session helps, and when the site mints it we cannot
  know, so a client is told to come back with one in the time this one has left, a minute at most.
The last two carry `x-should-retry: false`, or the SDKs would knock twice more in vain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum, auto
from typing import NamedTuple

from proxyd.errors import Refusal

MAX_RETRY_AFTER_S = 60
# Rows have whole seconds: a window's sum falls within the second behind the one that is told.
WINDOW_MARGIN_S = 1
# A refusal is decided on what was read at most this long ago. Half reads the store twice as often for a client that
# knocks in vain; twice lets one whose window has just opened knock once more.
REFUSAL_AGE_MS = 1000
# The same where the store could not yet tell when a window opens, because its newest rows were still on their way.
UNKNOWN_AGE_MS = 250
NO_RETRY = (("x-should-retry", "false"),)


class Kind(Enum):
    """Which of the two ceilings a line is."""

    WINDOW = auto()
    TOKEN = auto()


class Line(NamedTuple):
    """One ceiling: `limit` tokens, of which `spent` are gone. `read_at_ms` (monotonic): when the store was last asked,
    None for never. `free_at` (wall seconds): when a window that was full then opens again, 0 for unknown. A session
    without `iat` has no line that the store could be asked for (`is_readable`)."""

    kind: Kind
    limit: int
    spent: int
    read_at_ms: int | None = None
    free_at: int = 0
    is_readable: bool = True


class Times(NamedTuple):
    """What Retry-After is made of: now and the session's end in wall seconds, and the window's length."""

    now: float
    session_ends: float
    window_s: float


def left_of(lines: Sequence[Line], taken: int) -> int | None:
    """Tokens until the nearer line, with `taken` by requests under way; None without a line. May be negative."""
    return min(line.limit - line.spent for line in lines) - taken if lines else None


def share_of(left: int, held: int, others: int) -> int:
    """What a request that holds `held` may use before it is looked at again: alone all that is left, beside others of
    its user half of its part. So what they use meanwhile is known before it is gone: the last tokens are halved, not
    given to each of them."""
    return left * held // (2 * (held + others)) if left > 0 and others > 0 else left


def decide_refusal(lines: Sequence[Line], held: int, times: Times) -> Refusal | None:
    """None where the user may ask once more. `held`: set aside for its requests under way."""
    left = left_of(lines, held)
    if left is None or left > 0:
        return None
    spent = [line for line in lines if line.spent >= line.limit]
    if not spent:
        return Refusal(
            429,
            "quota_exceeded",
            "This user's requests under way may need all the tokens that are left; ask again when one has ended.",
            retry_after_s=1,
            reason="under_way",
        )
    # Where both are spent, the longer wait is the true one.
    line, wait_s = max(((line, _wait_s(line, times)) for line in spent), key=lambda found: found[1])
    if line.kind is Kind.WINDOW:
        message = "This user's tokens for the rolling window are used up."
    else:
        message = "This session has no tokens left; come back with a new session."
    reason = line.kind.name.lower()
    return Refusal(429, "quota_exceeded", message, retry_after_s=wait_s, headers=NO_RETRY, reason=reason)


def _wait_s(line: Line, times: Times) -> int:
    if line.kind is Kind.TOKEN:
        return max(1, min(math.ceil(times.session_ends - times.now), MAX_RETRY_AFTER_S))
    opens_at = line.free_at if line.free_at else times.now + times.window_s
    return max(1, math.ceil(opens_at + WINDOW_MARGIN_S - times.now))


def must_read(lines: Sequence[Line], is_refusal: bool, now: float, now_ms: int, oldest_ms: float = math.inf) -> bool:
    """Whether the store has to be asked before this is decided: a line that matters was never read, or longer ago than
    `oldest_ms`, or the answer would be no and the last reading may be out of date, or is of before the moment at which
    the window was to open.
    A session that came without any tokens is never asked for. `now`: wall seconds, of the same instant."""
    if any(line.kind is Kind.TOKEN and line.limit <= 0 for line in lines):
        return False
    for line in lines:
        if not line.is_readable:
            continue
        if line.read_at_ms is None or now_ms - line.read_at_ms > oldest_ms:
            return True
        if is_refusal and now_ms - line.read_at_ms > _longest_age_ms(line, now):
            return True
    return False


def _longest_age_ms(line: Line, now: float) -> float:
    """How old a reading may be that a refusal rests on."""
    if line.kind is Kind.TOKEN or line.spent < line.limit:
        return REFUSAL_AGE_MS
    if not line.free_at:
        return UNKNOWN_AGE_MS
    open_ms = (now - line.free_at - WINDOW_MARGIN_S) * 1000
    return REFUSAL_AGE_MS if open_ms < 0 else min(REFUSAL_AGE_MS, open_ms)


def age_ms(lines: Sequence[Line], now_ms: int) -> float:
    """How long ago the line was read that waits longest; infinity when one never was."""
    return max((math.inf if line.read_at_ms is None else now_ms - line.read_at_ms for line in lines), default=0)
