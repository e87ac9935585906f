"""The desk: what a question makes it write to the ledger, who is answered, and what it drops."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from proxyd.clock import FakeClock
from proxyd.shm.ledger import Ledger
from proxyd.store.schema import Row, StoreError
from proxyd.telemetry import desk as desk_module
from proxyd.telemetry.desk import Ceiling, Desk
from proxyd.telemetry.questions import Question, pack_question, unpack_answer

DAY = 86_400.0


class End:
    """The telemetry process's end of a socketpair: what was asked, what was answered."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.inbox: deque[bytes] = deque()
        self.answers: list[tuple[int, bool]] = []
        self.is_full = self.is_closed = False

    def fileno(self) -> int:
        return self._number

    def recv(self, size: int) -> bytes:
        if not self.inbox:
            raise BlockingIOError
        return self.inbox.popleft()[:size]

    def send(self, data: bytes) -> int:
        if self.is_full:
            raise BlockingIOError
        answer = unpack_answer(data)
        assert answer is not None
        self.answers.append(answer)
        return len(data)

    def close(self) -> None:
        self.is_closed = True


class Loop:
    """Readers, called by hand."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}

    def add_reader(self, fd: int, callback: Callable[..., None], *args: Any) -> None:
        self.readers[fd] = lambda: callback(*args)

    def remove_reader(self, fd: int) -> None:
        del self.readers[fd]


class Sums:
    """A store of (user, second, tokens). `during` runs inside each read."""

    def __init__(self, *rows: tuple[int, float, int]) -> None:
        self.rows = list(rows)
        self.reads: list[tuple[int, float]] = []
        self.spend_reads = 0
        self.error: StoreError | None = None
        self.during: Callable[[], None] = lambda: None

    async def window_sum(self, user_id: int, since: float) -> int:
        await asyncio.sleep(0)
        self.reads.append((user_id, since))
        if self.error is not None:
            raise self.error
        found = sum(tokens for user, second, tokens in self.rows if user == user_id and second >= int(since))
        self.during()
        return found

    async def spends(self, user_id: int, since: float, limit: int) -> list[tuple[float, int]]:
        self.spend_reads += 1
        seconds: dict[float, int] = {}
        for user, second, tokens in sorted(self.rows):
            if user == user_id and second >= int(since):
                seconds[second] = seconds.get(second, 0) + tokens
        return list(seconds.items())[:limit]


class House:
    """A desk with two workers' sockets, a ledger with user 7 in it, and a store."""

    def __init__(self, *rows: tuple[int, float, int], ceiling: int = 0) -> None:
        self.clock = FakeClock()
        self.ledger = Ledger.create(3, users=256, tenants=4)
        self.account = self.ledger.at(0, 1).account(7)
        self.other = self.ledger.at(1, 1).account(7)
        self.ends = [End(100), End(101)]
        self.store = Sums(*rows)
        self.loop = Loop()
        self.woken = 0
        self.desk = Desk(self.ends, self.ledger, Ceiling(ceiling, DAY), self.clock)  # type: ignore[arg-type]
        self.desk.open(self.loop, self.wake)  # type: ignore[arg-type]

    def wake(self) -> None:
        self.woken += 1

    @property
    def now(self) -> float:
        return self.clock.wall()

    def ask(self, number: int, user: int = 7, since: float | None = 0.0, iat: int | None = None, slot: int = 0) -> None:
        self.ends[slot].inbox.append(pack_question(Question(number, user, since, iat)))
        self.loop.readers[100 + slot]()

    async def serve(self, is_quiet: bool = False) -> None:
        await self.desk.serve(self.store, is_quiet)  # type: ignore[arg-type]


async def test_both_sums_are_read_and_written_less_what_this_node_has_stored() -> None:
    house = House((7, 1000.0, 50), (7, 2000.0, 30), (8, 2000.0, 999))
    house.account.add(settled=45)
    house.account.add_stored(30)
    house.ask(1, since=500.0, iat=1500)
    await house.serve()
    window, token = house.account.window, house.account.token(1500)
    assert window is not None
    assert token is not None
    assert (window.base, token.base) == (80 - 30, 30 - 30)
    assert (window.at_ms, token.at_ms) == (int(house.clock.monotonic() * 1000),) * 2
    assert house.ends[0].answers == [(1, True)]


async def test_what_is_not_asked_is_not_read() -> None:
    house = House((7, 1000.0, 50))
    house.ask(1, since=None, iat=900)
    await house.serve()
    assert house.store.reads == [(7, 900.0)]
    assert house.account.window is None


async def test_a_user_whom_the_ledger_does_not_know_is_answered_no_without_a_read() -> None:
    house = House((9, 1000.0, 50))
    house.ask(1, user=9)
    await house.serve()
    assert (house.ends[0].answers, house.store.reads) == ([(1, False)], [])


async def test_equal_questions_of_all_workers_are_one_read() -> None:
    house = House((7, 1000.0, 50))
    for slot, number in ((0, 1), (1, 1), (0, 2)):
        house.ask(number, since=float(number), iat=9, slot=slot)
    house.ask(3, since=1.0, iat=10)
    await house.serve()
    assert len(house.store.reads) == 4
    assert house.ends[0].answers == [(1, True), (2, True), (3, True)]
    assert house.ends[1].answers == [(1, True)]


async def test_whoever_asks_while_the_answer_is_being_read_has_it_too() -> None:
    house = House((7, 1000.0, 50))
    house.store.during = lambda: house.ask(2, slot=1)
    house.ask(1)
    await house.serve()
    assert (house.ends[0].answers, house.ends[1].answers) == ([(1, True)], [(2, True)])


async def test_a_store_that_fails_keeps_the_question_and_from_then_on_all_are_told_no() -> None:
    house = House()
    house.ask(1)
    house.store.error = StoreError("gone")
    with pytest.raises(StoreError):
        await house.serve()
    assert house.ends[0].answers == []
    house.desk.fail()
    house.ask(2, slot=1)
    assert (house.ends[0].answers, house.ends[1].answers) == ([(1, False)], [(2, False)])
    assert house.desk.waiting == 0
    house.desk.is_failing, house.store.error = False, None
    house.ask(3)
    await house.serve()
    assert house.ends[0].answers == [(1, False), (3, True)]


async def test_what_was_asked_of_a_predecessor_is_let_go_and_what_is_no_question_too() -> None:
    house = House()
    fresh = Desk(house.ends, house.ledger, Ceiling(), house.clock)  # type: ignore[arg-type]
    house.ends[0].inbox.append(pack_question(Question(1, 7, 0.0, None)))
    fresh.open(house.loop, house.wake)  # type: ignore[arg-type]
    for garbage in (b"x", b"x" * 33, b"\0" * 5):
        house.ends[0].inbox.append(garbage)
    house.loop.readers[100]()
    assert (fresh.waiting, house.woken) == (0, 0)


async def test_the_queue_is_bounded_and_what_is_beyond_has_no_answer(monkeypatch) -> None:
    monkeypatch.setattr(desk_module, "QUEUE_MAX", 3)
    house = House()
    for number in range(5):
        house.ask(number, iat=number)
    assert house.desk.waiting == 3
    await house.serve()
    assert [number for number, _ in house.ends[0].answers] == [0, 1, 2]


async def test_a_worker_that_reads_nothing_keeps_nobody_else_from_an_answer() -> None:
    house = House()
    house.ends[0].is_full = True
    house.ask(1)
    house.ask(2, iat=5, slot=1)
    await house.serve()
    assert house.ends[1].answers == [(2, True)]


async def test_one_serving_is_bounded_in_time_and_the_rest_waits_for_the_next() -> None:
    house = House()
    house.store.during = lambda: house.clock.advance(0.03)
    house.ask(1)
    house.ask(2, iat=5)
    await house.serve()
    assert (house.ends[0].answers, house.desk.waiting) == ([(1, True)], 1)
    await house.serve()
    assert house.desk.waiting == 0


async def test_a_question_wakes_the_writer() -> None:
    house = House()
    house.ask(1)
    assert house.woken == 1


async def test_closing_tells_no_to_who_waits() -> None:
    house = House()
    house.ask(1)
    house.desk.close()
    house.desk.close()
    assert house.ends[0].answers == [(1, False)]
    assert house.loop.readers == {}
    assert all(end.is_closed for end in house.ends)


@pytest.mark.parametrize(
    "is_quiet, held, ago_s, healed",
    [(True, 0, 2.5, True), (False, 0, 2.5, False), (True, 5, 2.5, False), (True, 0, 1.5, False)],
)
async def test_a_quiet_users_drift_is_healed(is_quiet: bool, held: int, ago_s: float, healed: bool) -> None:
    house = House((7, 1000.0, 100))
    house.account.add(settled=100, at_ms=int(house.clock.monotonic() * 1000))
    house.other.add(held=held)
    house.account.add_stored(70)  # telemetry was killed between a commit and its count
    house.clock.advance(ago_s)
    house.ask(1)
    await house.serve(is_quiet)
    assert house.account.window is not None
    assert house.account.window.base + house.account.settled == (100 if healed else 130)


async def test_a_dead_workers_rows_count_at_once_and_the_next_reading_changes_nothing() -> None:
    house = House((7, 1000.0, 100))
    house.ask(1)
    await house.serve()
    row = Row(7, 1, 30, 50, 1500.0, "acme", "r1", "interrupted", 0, 0, 0, "openai", 1, 3, 4)
    stranger = row._replace(user_id=8)
    for _ in range(2):
        house.store.rows.append((7, 1500.0, 80))
        house.desk.count_interrupted(iter([row, stranger]))
    for _ in range(2):
        assert house.account.window is not None
        assert house.account.window.base + house.account.settled == 260
        assert (house.account.stored, house.account.settled) == (160, 160)
        house.ledger.reclaim(2)  # its own death takes nothing away
        house.ask(2)
        await house.serve()
    assert house.ledger.find(8) is None


async def test_the_moment_is_told_when_a_full_window_has_room_again() -> None:
    house = House(ceiling=100)
    house.store.rows = [(7, house.now - 500 + n, 30) for n in range(4)]
    house.ask(1, since=house.now - DAY)
    await house.serve()
    assert house.account.window is not None
    # 120 are spent; the oldest 30 leave 90, which is below.
    assert house.account.window.free_at == int(house.now - 500 + DAY)
    house.store.rows.append((7, house.now, 60))
    house.ask(2, since=house.now - DAY)
    await house.serve()
    assert house.account.window.free_at == int(house.now - 500 + 2 + DAY)  # 180: it takes three of them


async def test_no_moment_is_told_below_the_ceiling_or_without_one() -> None:
    for ceiling in (0, 31):
        house = House((7, 1_699_999_000.0, 30), ceiling=ceiling)
        house.ask(1, since=0.0)
        await house.serve()
        assert house.account.window is not None
        assert (house.account.window.free_at, house.store.spend_reads) == (0, 0)


async def test_the_moment_is_unknown_while_what_fills_the_window_is_on_its_way() -> None:
    house = House((7, 1_699_999_000.0, 30), ceiling=100)
    house.account.add(settled=200)
    house.ask(1, since=0.0)
    await house.serve()
    assert house.account.window is not None
    assert house.account.window.free_at == 0


async def test_the_search_for_the_moment_reads_on_and_gives_up_at_its_bound(monkeypatch) -> None:
    monkeypatch.setattr(desk_module, "SPENDS_A_READ", 4)
    monkeypatch.setattr(desk_module, "SPENDS_MAX", 12)
    house = House(ceiling=50)
    house.store.rows = [(7, house.now - 500 + n, 10) for n in range(14)]
    house.ask(1, since=house.now - DAY)
    await house.serve()
    assert house.account.window is not None
    assert house.account.window.free_at == int(house.now - 500 + 9 + DAY)
    house.store.rows = [(7, house.now - 500 + n, 10) for n in range(30)]
    house.store.spend_reads = 0
    house.ask(2, since=house.now - DAY)
    await house.serve()
    assert house.account.window.free_at == int(house.now + DAY)
    assert house.store.spend_reads == 3


async def test_times_beyond_any_calendar_are_asked_as_its_ends() -> None:
    house = House()
    house.ask(1, since=-5e300, iat=2**62)
    await house.serve()
    assert house.store.reads == [(7, 0.0), (7, 253_402_300_799.0)]
