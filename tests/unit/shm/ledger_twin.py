"""The ledger as one would write it in one process: dicts, lists and the time as an argument. The oracle of the tests.

What it leaves open, because the real one does: which free permit is given, and the last digit of an average.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

TICK_MS = 250
LIVE_TICKS = 241  # the current one and 60 s
RING = 256


@dataclass
class WindowTwin:
    """Additions by tick. A late caller adds to the newest tick there is."""

    added: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    newest: int = 0

    def _from(self, now_ms: int) -> int:
        return max(now_ms // TICK_MS - LIVE_TICKS + 1, self.newest - RING + 1)

    def total(self, now_ms: int) -> int:
        return sum(n for tick, n in self.added.items() if tick >= self._from(now_ms))

    def fits(self, n: int, limit: int, now_ms: int) -> bool:
        total = self.total(now_ms)
        return total == 0 or total + n <= limit

    def try_add(self, n: int, limit: int, now_ms: int) -> bool:
        self.newest = max(self.newest, now_ms // TICK_MS)
        if not self.fits(n, limit, now_ms):
            return False
        self.added[self.newest] += n
        return True

    def add(self, n: int, now_ms: int) -> None:
        if n > 0:
            self.newest = max(self.newest, now_ms // TICK_MS)
            self.added[self.newest] += n
            return
        first = now_ms // TICK_MS
        for tick in range(max(first, self.newest - RING + 1), min(first + 15, self.newest) + 1):
            back = min(-n, self.added[tick])
            self.added[tick] -= back
            n += back

    def wait_ms(self, n: int, limit: int, now_ms: int) -> int:
        """By trying every tick's edge."""
        then = now_ms
        while not self.fits(n, limit, then):
            then = (then // TICK_MS + 1) * TICK_MS
        return then - now_ms


@dataclass
class TenantTwin:
    requests: WindowTwin = field(default_factory=WindowTwin)
    tokens: WindowTwin = field(default_factory=WindowTwin)
    permits: dict[int, tuple[int, int]] = field(default_factory=dict)  # permit: slot, start
    average_tokens: float | None = None
    average_ms: float | None = None

    def taken(self, limit: int) -> list[int]:
        return [permit for permit in self.permits if permit < limit]

    def oldest_start(self, limit: int) -> int:
        return min((self.permits[permit][1] for permit in self.taken(limit)), default=0)


@dataclass
class UserTwin:
    held: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    running: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    settled: int = 0
    settled_at: int = 0
    stored: int = 0
    window: tuple[int, int, int] | None = None
    tokens: dict[int, tuple[int, int]] = field(default_factory=dict)  # iat: base, at
    average: float | None = None

    def set_token(self, iat: int, base: int, at_ms: int) -> None:
        if iat not in self.tokens and len(self.tokens) == 4:
            del self.tokens[min(self.tokens, key=lambda one: self.tokens[one][1])]
        self.tokens[iat] = (base, at_ms)


def learnt(average: float | None, sample: int) -> float:
    return float(sample) if average is None else average + (sample - average) / 8


@dataclass
class LedgerTwin:
    users: dict[int, UserTwin] = field(default_factory=dict)
    tenants: dict[str, TenantTwin] = field(default_factory=dict)

    def account(self, user_id: int) -> UserTwin:
        return self.users.setdefault(user_id, UserTwin())

    def tenant(self, name: str) -> TenantTwin:
        return self.tenants.setdefault(name, TenantTwin())

    def reclaim(self, slot: int) -> int:
        for user in self.users.values():
            user.held.pop(slot, None)
            user.running.pop(slot, None)
        freed = 0
        for tenant in self.tenants.values():
            dead = [permit for permit, (owner, _) in tenant.permits.items() if owner == slot]
            for permit in dead:
                del tenant.permits[permit]
            freed += len(dead)
        return freed
