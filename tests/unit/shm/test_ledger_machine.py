"""Random operations of several slots, against the twin: every answer and every sum is the same."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from proxyd.shm.ledger import Ledger, SlotLedger, Totals
from tests.unit.shm.ledger_twin import LedgerTwin, learnt

SLOTS = 3
USERS = [0, 1, 4092, 2**63, 2**64 - 1]
TENANTS = ["default", "acme", "\udc80odd"]

slots = st.integers(0, SLOTS - 1)
users = st.sampled_from(USERS)
tenants = st.sampled_from(TENANTS)
tokens = st.integers(0, 50_000)
limits = st.integers(1, 12)
windows = st.sampled_from(["requests", "tokens"])
# Behind the newest reading of the clock: calls of several processes interleave.
late = st.one_of(st.just(0), st.integers(0, 3_700))


class LedgerMachine(RuleBasedStateMachine):
    permits = Bundle("permits")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger.create(SLOTS, permits=12)
        self.twin = LedgerTwin()
        self.epochs = [1] * SLOTS
        self.hands: list[SlotLedger] = [self.ledger.at(slot, 1) for slot in range(SLOTS)]
        self.now_ms = 5_000_000

    @rule(ms=st.one_of(st.integers(0, 2_000), st.integers(0, 130_000)))
    def time_passes(self, ms: int) -> None:
        self.now_ms += ms

    @rule(slot=slots, user=users, held=tokens, running=tokens)
    def a_request_runs(self, slot: int, user: int, held: int, running: int) -> None:
        self.hands[slot].account(user).add(held=held, running=running)
        twin = self.twin.account(user)
        twin.held[slot] += held
        twin.running[slot] += running

    @rule(slot=slots, user=users, settled=tokens)
    def a_request_ends(self, slot: int, user: int, settled: int) -> None:
        twin = self.twin.account(user)
        held, running = twin.held.pop(slot, 0), twin.running.pop(slot, 0)
        self.hands[slot].account(user).add(-held, -running, settled, at_ms=self.now_ms)
        twin.settled += settled
        if settled:
            twin.settled_at = self.now_ms

    @rule(user=users, n=tokens, is_healed=st.booleans())
    def rows_are_stored(self, user: int, n: int, is_healed: bool) -> None:
        account, twin = self.ledger.find(user), self.twin.users.get(user)
        assert (account is None) == (twin is None)
        if account is None or twin is None:
            return
        if is_healed:
            account.heal()
            twin.stored = twin.settled
        else:
            account.add_stored(n)
            twin.stored += n

    @rule(user=users, base=st.integers(-(2**40), 2**40), free_at=st.integers(0, 2**33))
    def the_window_is_read(self, user: int, base: int, free_at: int) -> None:
        self.hands[0].account(user).set_window(base, self.now_ms, free_at)
        self.twin.account(user).window = (base, self.now_ms, free_at)

    @rule(user=users, iat=st.integers(-1, 6), base=st.integers(-(2**40), 2**40))
    def a_token_is_read(self, user: int, iat: int, base: int) -> None:
        self.now_ms += 1  # which entry goes when two are of the same millisecond is left open
        self.hands[0].account(user).set_token(iat, base, self.now_ms)
        self.twin.account(user).set_token(iat, base, self.now_ms)

    @rule(slot=slots, user=users, tenant=tenants, n=tokens)
    def averages_are_learnt(self, slot: int, user: int, tenant: str, n: int) -> None:
        self.hands[slot].account(user).learn_completion(n)
        account = self.twin.account(user)
        account.average = learnt(account.average, n)
        row, twin = self.hands[slot].tenant(tenant), self.twin.tenant(tenant)
        row.learn_tokens(n)
        twin.average_tokens = learnt(twin.average_tokens, n)
        row.learn_ms(2 * n)
        twin.average_ms = learnt(twin.average_ms, 2 * n)

    @rule(slot=slots, tenant=tenants, which=windows, n=st.integers(0, 14), limit=limits, behind=late)
    def a_minute_is_asked(self, slot: int, tenant: str, which: str, n: int, limit: int, behind: int) -> None:
        window = getattr(self.hands[slot].tenant(tenant), which)
        twin = getattr(self.twin.tenant(tenant), which)
        now_ms = self.now_ms - behind
        assert window.wait_ms(n, limit, now_ms) == twin.wait_ms(n, limit, now_ms)
        assert window.try_add(n, limit, now_ms) == twin.try_add(n, limit, now_ms)

    @rule(
        slot=slots,
        tenant=tenants,
        which=windows,
        n=st.integers(-14, 14),
        behind=st.one_of(late, st.integers(0, 90_000)),
    )
    def a_minute_is_corrected(self, slot: int, tenant: str, which: str, n: int, behind: int) -> None:
        behind = min(behind, 3_700) if n > 0 else behind  # what is given back may be of long ago
        getattr(self.hands[slot].tenant(tenant), which).add(n, self.now_ms - behind)
        getattr(self.twin.tenant(tenant), which).add(n, self.now_ms - behind)

    @rule(target=permits, slot=slots, tenant=tenants, limit=limits)
    def a_permit_is_asked(self, slot: int, tenant: str, limit: int):  # type: ignore[no-untyped-def]
        twin = self.twin.tenant(tenant)
        permit = self.hands[slot].tenant(tenant).acquire(limit, self.now_ms // 1000)
        if permit < 0:
            assert len(twin.taken(limit)) == limit
            return multiple()
        assert permit < limit
        assert permit not in twin.permits
        twin.permits[permit] = (slot, self.now_ms // 1000)
        return slot, self.epochs[slot], tenant, permit

    @rule(one=consumes(permits))
    def a_permit_comes_back(self, one: tuple[int, int, str, int]) -> None:
        slot, epoch, tenant, permit = one
        if epoch == self.epochs[slot]:  # else its process is dead, and reclaim was here
            self.hands[slot].tenant(tenant).release(permit)
            assert self.twin.tenant(tenant).permits.pop(permit)[0] == slot

    @rule(slot=slots)
    def a_worker_dies(self, slot: int) -> None:
        assert self.ledger.reclaim(slot) == self.twin.reclaim(slot)
        self.epochs[slot] += 1
        self.hands[slot] = self.ledger.at(slot, self.epochs[slot])

    @invariant()
    def users_are_the_same(self) -> None:
        for user in USERS:
            account, twin = self.ledger.find(user), self.twin.users.get(user)
            assert (account is None) == (twin is None)
            if account is None or twin is None:
                continue
            assert account.user_id == user
            sums = (sum(twin.held.values()), sum(twin.running.values()), twin.settled)
            assert account.sums() == sums == (account.held, account.running, account.settled)
            assert (account.stored, account.settled_at) == (twin.stored, twin.settled_at)
            assert account.window == (twin.window and (*twin.window, 0))
            for iat in range(-1, 7):
                standing = account.token(iat)
                assert (standing and standing[:2]) == twin.tokens.get(iat)
            assert is_near(account.average_completion, twin.average)

    @invariant()
    def tenants_are_the_same(self) -> None:
        for name, twin in self.twin.tenants.items():
            for hand in self.hands:
                tenant = hand.tenant(name)
                assert tenant.requests.total(self.now_ms) == twin.requests.total(self.now_ms)
                assert tenant.tokens.total(self.now_ms) == twin.tokens.total(self.now_ms)
                for limit in (1, 5, 12):
                    assert tenant.in_use(limit) == len(twin.taken(limit))
                    assert tenant.oldest_start(limit) == twin.oldest_start(limit)
                assert is_near(tenant.average_tokens, twin.average_tokens)
                assert is_near(tenant.average_ms, twin.average_ms)

    @invariant()
    def totals_are_the_same(self) -> None:
        users, tenants = self.twin.users.values(), self.twin.tenants.values()
        assert self.ledger.totals() == Totals(
            users=len(users),
            tenants=len(tenants),
            held=sum(sum(user.held.values()) for user in users),
            running=sum(sum(user.running.values()) for user in users),
            permits=sum(len(tenant.permits) for tenant in tenants),
            overflow=0,
        )


def is_near(average: int | None, twin: float | None) -> bool:
    return average is twin is None or (average is not None and twin is not None and abs(average - twin) <= 1)


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
