from typing import NamedTuple

from typing_extensions import Buffer

from proxyd._limits import Tenant

class Standing(NamedTuple):
    """What the store said: `base` tokens beside those settled here, read at `at_ms` (CLOCK_MONOTONIC); `free_at`: the
    wall second at which the window's sum falls below its ceiling, 0 when unknown or below; `first`: a token's base when
    it was first read."""

    base: int
    at_ms: int
    free_at: int
    first: int = 0

class Sums(NamedTuple):
    """Of one user over all slots, each slot read in this order, so that a token that moves is never missed."""

    held: int
    running: int
    settled: int

class Account:
    """One user's row. Found without a slot it cannot `add`."""

    @property
    def user_id(self) -> int: ...
    @property
    def row(self) -> int:
        """Where it lives: the same in every process of the node; private accounts begin at 0 again."""
    @property
    def is_shared(self) -> bool:
        """False: the table was full, only this process sees it, and telemetry does not find it."""
    @property
    def held(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def settled(self) -> int: ...
    @property
    def settled_at(self) -> int:
        """Monotonic ms of the last settle of any worker; 0: none yet."""
    def sums(self) -> Sums: ...
    def add(self, held: int = 0, running: int = 0, settled: int = 0, at_ms: int = 0) -> None:
        """Deltas to this slot's words. at_ms: when, for `settled_at`; 0 reads CLOCK_MONOTONIC."""

    # telemetry alone writes these
    @property
    def stored(self) -> int: ...
    def add_stored(self, n: int) -> None: ...
    def heal(self) -> None:
        """stored = settled."""
    @property
    def window(self) -> Standing | None:
        """None: never read."""
    def set_window(self, base: int, at_ms: int, free_at: int) -> None: ...
    def token(self, iat: int) -> Standing | None:
        """None: never read, or pushed out by four newer ones."""
    def set_token(self, iat: int, base: int, at_ms: int) -> None: ...

    # anybody
    def first_seen(self, token: int, is_new: bool) -> tuple[int, bool]:
        """What was settled, and what was told of `is_new`, when the first of all workers called this for the token
        (a number below 2^64); known until eight others of the user were. Less than 2^32 tokens ago."""
    @property
    def average_completion(self) -> int | None: ...
    def learn_completion(self, tokens: int) -> None: ...

class Table:
    def __init__(
        self, buffer: Buffer, slots: int, users: int, tenants: int, permits: int, is_shared: bool = True
    ) -> None: ...
    @staticmethod
    def measure(slots: int, users: int, tenants: int, permits: int) -> int:
        """Bytes of a table."""
    @property
    def max_users(self) -> int: ...
    @property
    def max_tenants(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def permits(self) -> int: ...
    @staticmethod
    def geometry() -> dict[str, int]:
        """What two programs must agree on beside the counts."""
    @property
    def users(self) -> int:
        """Rows that are taken: one a user, and at most one a worker that lost a race or died in one."""
    @property
    def tenants(self) -> int: ...
    @property
    def overflow(self) -> int: ...
    def count_overflow(self) -> None: ...
    def find(self, user_id: int, slot: int = -1) -> Account | None:
        """The user's row if it is there; it can `add` when its slot is named; the
        slot's words are then within every sum."""
    def reclaim(self, slot: int) -> int: ...
    def totals(self) -> tuple[int, int, int]:
        """(held, running, permits)."""

class Writer:
    """One slot's process: it alone may use it, and only after the fork."""

    def __init__(self, table: Table, slot: int, epoch: int) -> None: ...
    @property
    def taken(self) -> int:
        """Rows of the table that are taken."""
    def account(self, user_id: int) -> Account | None:
        """The user's row, made when there is none; None: the table is full."""
    def tenant(self, key: int) -> Tenant:
        """The row of a 64-bit key, or one of those that all without a row share."""
