"""Which upstream is asked, in which order, and which one is left alone for a while.

Owns: the order of a model's upstreams (tiers, shares by weight), one breaker per upstream, the retry budget.
Must not know: sockets, pools, loops, metrics; time comes in as `now` (monotonic seconds).

    CLOSED --5 failures in a row--> OPEN --30 s x count, at most 300--> HALF_OPEN --probe ok--> CLOSED
                                     ^                                      |
                                     '-------------probe failed-------------'

Invariants: an upstream is not ejected while no other that shares a model with it is in service; a plan whose upstreams
are all ejected still offers them; in HALF_OPEN one request at a time is let through. State is per worker: no worker
ejects for another, each needs its own five failures (a shared breaker would let one sick worker take an upstream from
all).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import Enum

from proxyd.errors import UpstreamErrorKind

# SAFETY, "Upstream faults". Half as many failures: a burst of bad luck ejects. Twice: ten clients have seen an error
# first.
FAILURES_TO_EJECT = 5
EJECTION_S = 30.0
EJECTION_MAX_S = 300.0
# An upstream that has stayed in service this long starts again at the first, short ejection.
FORGIVE_S = 300.0
# A probe that reports nothing (its client left) holds the door for this long. Half: slow first bytes get a second probe
# beside the first, which is harmless; twice: an upstream that is well stays out for two minutes.
PROBE_LEASE_S = 60.0
RETRY_SHARE = 0.2
RETRY_MINIMUM = 3


class Verdict(Enum):
    """What an outcome says about the upstream's health."""

    GOOD = 0
    BAD = 1
    NEUTRAL = 2  # says nothing: neither counted nor forgiven


_BY_KIND: dict[UpstreamErrorKind, Verdict] = {
    UpstreamErrorKind.RESOLVE: Verdict.BAD,
    UpstreamErrorKind.REFUSED: Verdict.BAD,
    UpstreamErrorKind.UNREACHABLE: Verdict.BAD,
    UpstreamErrorKind.CONNECT_TIMEOUT: Verdict.BAD,
    UpstreamErrorKind.TLS: Verdict.BAD,
    UpstreamErrorKind.RESET: Verdict.BAD,
    UpstreamErrorKind.EOF_BEFORE_HEAD: Verdict.BAD,
    UpstreamErrorKind.BAD_HEAD: Verdict.BAD,
    UpstreamErrorKind.FIRST_BYTE_TIMEOUT: Verdict.BAD,
    UpstreamErrorKind.IDLE_TIMEOUT: Verdict.BAD,
    UpstreamErrorKind.BROKEN_BODY: Verdict.BAD,
    # A long generation that we cut: the upstream was answering all the time.
    UpstreamErrorKind.TOTAL_TIMEOUT: Verdict.NEUTRAL,
    # Our own bounds, not the upstream's fault.
    UpstreamErrorKind.POOL_FULL: Verdict.NEUTRAL,
    UpstreamErrorKind.POOL_TIMEOUT: Verdict.NEUTRAL,
    UpstreamErrorKind.NO_PORTS: Verdict.NEUTRAL,
    UpstreamErrorKind.NO_UPSTREAM: Verdict.NEUTRAL,
}
_BY_STATUS: dict[int, Verdict] = {
    # One poisoned request gives 500 as often as it is repeated; it must not take the upstream from everybody else.
    500: Verdict.NEUTRAL,
    502: Verdict.BAD,
    503: Verdict.BAD,
    504: Verdict.BAD,
    529: Verdict.BAD,  # Anthropic: overloaded_error
    429: Verdict.NEUTRAL,  # a limit of our account: asking elsewhere is right, ejecting is not
}


def verdict(outcome: UpstreamErrorKind | int) -> Verdict:
    """What a failure kind or an answer's status counts as."""
    if isinstance(outcome, UpstreamErrorKind):
        return _BY_KIND[outcome]
    return _BY_STATUS.get(outcome, Verdict.GOOD if outcome < 500 else Verdict.NEUTRAL)


def is_upstream_error(status: int) -> bool:
    """True for answers that an operator should see among the upstream's errors: its own faults, and refusals of our key
    or our account. Other 4xx are the client's."""
    return status >= 500 or status in (401, 403, 429)


class BreakerState(Enum):
    """Values are those of proxyd_breaker_state."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """One upstream's health in this worker."""

    __slots__ = ("_closed_at_s", "_ejections", "_failures", "_probe_until_s", "_until_s")

    def __init__(self) -> None:
        self._failures = 0  # in a row
        self._ejections = 0
        self._until_s: float | None = None  # end of the ejection; None is CLOSED
        self._probe_until_s: float | None = None
        self._closed_at_s = 0.0

    def state(self, now: float) -> BreakerState:
        if self._until_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now < self._until_s else BreakerState.HALF_OPEN

    def allows(self, now: float) -> bool:
        """True when a request may go there: always when CLOSED, in HALF_OPEN while no probe is under way."""
        state = self.state(now)
        if state is BreakerState.HALF_OPEN:
            return self._probe_until_s is None or now >= self._probe_until_s
        return state is BreakerState.CLOSED

    def begin(self, now: float) -> None:
        """A request goes there; in HALF_OPEN it is the probe."""
        if self.state(now) is BreakerState.HALF_OPEN:
            self._probe_until_s = now + PROBE_LEASE_S

    def record(self, outcome: Verdict, now: float, *, may_eject: bool) -> bool:
        """Counts one outcome; True when it ejected the upstream. Outcomes that arrive while OPEN are of requests that
        began before the ejection: they change nothing."""
        state = self.state(now)
        if state is BreakerState.OPEN:
            return False
        if state is BreakerState.HALF_OPEN:
            self._probe_until_s = None
            if outcome is Verdict.GOOD:
                self._close(now)
            elif outcome is Verdict.BAD:
                if may_eject:
                    self._eject(now)
                    return True
                self._close(now)
            return False
        if outcome is Verdict.GOOD:
            self._failures = 0
        elif outcome is Verdict.BAD:
            self._failures += 1
            if self._failures >= FAILURES_TO_EJECT and may_eject:
                if now - self._closed_at_s >= FORGIVE_S:
                    self._ejections = 0
                self._eject(now)
                return True
        return False

    def until_s(self) -> float:
        """When the ejection ends (monotonic); 0 when there is none."""
        return self._until_s or 0.0

    def _eject(self, now: float) -> None:
        self._ejections += 1
        self._failures = 0
        self._probe_until_s = None
        self._until_s = now + min(EJECTION_S * self._ejections, EJECTION_MAX_S)

    def _close(self, now: float) -> None:
        self._until_s = None
        self._failures = 0
        self._closed_at_s = now


Tiers = tuple[tuple[str, ...], ...]


class Balancer:
    """The order of upstreams for each request. `weights`: name to weight. `models`: the tiers of every model, which say
    who can stand in for whom."""

    __slots__ = ("_breakers", "_credits", "_peers", "_weights")

    def __init__(self, weights: Mapping[str, int], models: Iterable[Tiers]) -> None:
        self._weights = dict(weights)
        self._breakers = {name: Breaker() for name in weights}
        self._credits: dict[tuple[str, ...], dict[str, int]] = {}
        self._peers: dict[str, set[str]] = {name: set() for name in weights}
        for tiers in models:
            names = {name for tier in tiers for name in tier}
            for name in names:
                self._peers[name] |= names - {name}

    def breaker(self, name: str) -> Breaker:
        return self._breakers[name]

    def record(self, name: str, outcome: Verdict, now: float) -> bool:
        """Counts an outcome; True when `name` was ejected by it."""
        others = any(self._breakers[peer].state(now) is BreakerState.CLOSED for peer in self._peers[name])
        return self._breakers[name].record(outcome, now, may_eject=others)

    def choose(self, tiers: Tiers, names: Collection[str], tried: Collection[str], now: float) -> str | None:
        """The next upstream of a plan: of the first tier that has one in service, by share. `names` are those that can
        serve the request. When nobody was tried yet and all are ejected, the one whose ejection ends first."""
        for tier in tiers:
            able = [name for name in tier if name in names and name not in tried and self._breakers[name].allows(now)]
            if able:
                name = able[0] if len(able) == 1 else self._by_share(tier, able)
                self._breakers[name].begin(now)
                return name
        if tried:
            return None
        ejected = [name for tier in tiers for name in tier if name in names]
        return min(ejected, key=lambda name: self._breakers[name].until_s(), default=None)

    def _by_share(self, tier: tuple[str, ...], able: Sequence[str]) -> str:
        """Smooth weighted round robin (nginx): everybody gains his weight, the richest is chosen and pays the total."""
        credits_ = self._credits.setdefault(tier, dict.fromkeys(tier, 0))
        for name in able:
            credits_[name] += self._weights[name]
        chosen = max(able, key=lambda name: credits_[name])
        credits_[chosen] -= sum(self._weights[name] for name in able)
        return chosen


class RetryBudget:
    """At most a fifth of the active requests may be retries, three at least: a sick upstream must not see its load
    double.

    `begin`/`end` bracket each request, `try_retry`/`end_retry` each retry within it.
    """

    __slots__ = ("_active", "_retries")

    def __init__(self) -> None:
        self._active = 0
        self._retries = 0

    def begin(self) -> None:
        self._active += 1

    def end(self) -> None:
        assert self._active > 0
        self._active -= 1

    def try_retry(self) -> bool:
        """Takes one retry out of the budget; False when there is none left."""
        if self._retries >= max(RETRY_MINIMUM, int(self._active * RETRY_SHARE)):
            return False
        self._retries += 1
        return True

    def end_retry(self) -> None:
        assert self._retries > 0
        self._retries -= 1
