from typing import Final

PERMITS_MAX: Final[int]
TICK_MS: Final[int]
WINDOW_TICKS: Final[int]

class Window:
    """What a tenant did in the last 60 s. now_ms: CLOCK_MONOTONIC."""

    def try_add(self, n: int, limit: int, now_ms: int) -> bool:
        """Adds n (>= 0) if it fits, or if the window is empty. limit > 0."""
    def add(self, n: int, now_ms: int) -> None:
        """n > 0: whatever the limit. n < 0: gives back what was added with this now_ms, as far as it still counts."""
    def total(self, now_ms: int) -> int: ...
    def wait_ms(self, n: int, limit: int, now_ms: int) -> int:
        """How long until try_add(n, limit) succeeds if nobody else comes; 0: now."""

class Tenant:
    @property
    def row(self) -> int: ...
    @property
    def is_own(self) -> bool:
        """False: the table was full and this row is that of all tenants who came too late."""
    @property
    def requests(self) -> Window: ...
    @property
    def tokens(self) -> Window: ...
    def acquire(self, limit: int, now_s: int) -> int:
        """A permit (>= 0), or -1: at one instant of the call all `limit` were taken. A limit above PERMITS_MAX, or
        what the table was made for, counts as that. now_s: CLOCK_MONOTONIC."""
    def release(self, permit: int) -> None:
        """Once for each permit; one that is not this process's any more is left alone."""
    def in_use(self, limit: int) -> int:
        """Permits below `limit` that are taken."""
    def oldest_start(self, limit: int) -> int:
        """The `now_s` of the oldest of them; 0: none."""
    @property
    def average_tokens(self) -> int | None: ...
    def learn_tokens(self, n: int) -> None: ...
    @property
    def average_ms(self) -> int | None: ...
    def learn_ms(self, n: int) -> None: ...
