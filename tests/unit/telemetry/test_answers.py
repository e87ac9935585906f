"""The ledger's sums stay exact while rows flow: questions, commits, settles and deaths in any order; real SQLite."""

from __future__ import annotations

import asyncio
import socket
import sqlite3
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.clock import SYSTEM
from proxyd.shm.ledger import Ledger
from proxyd.store.schema import Batch, Row, SetAside, StoreError
from proxyd.store.sqlite import SqliteStore
from proxyd.telemetry.desk import Ceiling, Desk
from proxyd.telemetry.questions import Channel, Question, pack_question, unpack_answer
from proxyd.telemetry.record import Checkpoint
from proxyd.telemetry.spool import SpoolWriter
from proxyd.telemetry.writer import Settings, Writer
from tests.unit.telemetry.world import Meters, World, final, intent

SLOTS, USERS = 2, (41, 42)


class Gated(SqliteStore):
    """A store whose commits wait at a gate, on either side of the transaction, and may fail there."""

    __slots__ = ("error", "gate", "is_after", "reached")

    def __init__(self, path: Path, *, is_after: bool = False) -> None:
        super().__init__(path, "os")
        self.gate, self.reached, self.is_after = asyncio.Event(), asyncio.Event(), is_after
        self.error: StoreError | None = None

    async def commit(self, batch: Batch, set_aside: SetAside) -> int:
        refused = await super().commit(batch, set_aside) if self.is_after else 0
        self.reached.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return refused if self.is_after else await super().commit(batch, set_aside)


class Node:
    """Two workers with their spools and ledger slots, and telemetry processes one after the other."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger = Ledger.create(SLOTS + 1, users=256, tenants=4)
        self.slots = [self.ledger.at(slot, 1) for slot in range(SLOTS)]
        self.spools = [world.writer("os") for _ in range(SLOTS)]
        self.settled: Counter[int] = Counter()
        self.foreign: Counter[int] = Counter()  # of others, committed
        self.known: dict[int, int] = {}  # of others, at the last reading
        self.number = self.deaths = 0
        self.born()

    def born(self) -> None:
        """A telemetry process; an earlier one is gone without a word."""
        self.store = SqliteStore(self.world.database, "os")
        self.channel = Channel.create(SLOTS)
        self.desk = Desk(self.channel._answering, self.ledger, Ceiling(), self.world.clock)
        config = Settings(1.0, 3, 0.0, epoch=1)
        self.writer = Writer(
            self.world.spool, self.store, config, Meters(), self.world.log, asyncio.Event(), self.world.clock,
            desk=self.desk,
        )  # fmt: skip
        self.is_recovered = False

    async def begin(self) -> None:
        if not self.is_recovered:
            self.is_recovered = await self.writer.recover()
            assert self.is_recovered
            self.desk.open(asyncio.get_running_loop(), lambda: None)

    async def die(self) -> None:
        if self.is_recovered:
            self.desk.close()
            await self.store.close()
            self.writer._gatherer.close()
        self.channel.close()

    def row(self, slot: int, user: int, tokens: int, *, is_first: bool = True) -> None:
        """A request ends: settled, then spooled, or the other way round."""
        account, now_ms = self.slots[slot].account(user), int(self.world.clock.monotonic() * 1000)
        if is_first:
            account.add(settled=tokens, at_ms=now_ms)
        spool = self.spools[slot]
        txn = spool.new_txn()
        spool.intent(intent(txn, user_id=user, created_at=self.world.clock.wall()))
        fields = {"user_id": user, "prompt_tokens": 0, "completion_tokens": tokens}
        spool.final(final(txn, f"{slot}-{txn}", created_at=self.world.clock.wall(), **fields))
        if not is_first:
            account.add(settled=tokens, at_ms=now_ms)
        self.settled[user] += tokens

    def dies(self, slot: int, user: int, tokens: int) -> None:
        """A worker is killed with a request under way, and has a successor."""
        spool = self.spools[slot]
        txn = spool.new_txn()
        spool.intent(intent(txn, user_id=user, created_at=self.world.clock.wall()))
        spool.checkpoint(Checkpoint(txn, 0, tokens, duration_ms=1))
        spool.flush()
        self.slots[slot].account(user).add(held=tokens, running=tokens)
        self.world.die(spool)
        self.ledger.reclaim(slot)
        self.deaths += 1
        self.slots[slot], self.spools[slot] = self.ledger.at(slot, 1 + self.deaths), self.world.writer("os")

    def interrupted(self, user: int) -> int:
        return self.world.query(
            "SELECT COALESCE(SUM(prompt_tokens + completion_tokens), 0) FROM sys_ai_transactions"
            f" WHERE status = 'interrupted' AND user_id = {user}"
        )[0][0]

    async def ask(self, slot: int, user: int) -> None:
        self.slots[slot].account(user)
        self.number += 1
        end = self.channel._asking[slot]
        end.send(pack_question(Question(self.number, user, 0.0, 1000)))
        self.desk._on_readable(slot)
        await self.writer.step()  # as `serve` does: what was written two seconds ago has been seen
        assert await self.writer.attend()
        assert unpack_answer(end.recv(64)) == (self.number, True)
        self.known[user] = self.foreign[user]

    def check(self) -> None:
        for user, foreign in self.known.items():
            account = self.ledger.find(user)
            assert account is not None
            window, token = account.window, account.token(1000)
            assert window is not None
            assert token is not None
            spent = foreign + self.settled[user] + self.interrupted(user)
            assert window.base + account.settled == spent
            assert token.base + account.settled == spent


slots, users, tokens = st.integers(0, SLOTS - 1), st.sampled_from(USERS), st.integers(1, 100)
moves = st.one_of(
    st.tuples(st.just("row"), slots, users, tokens, st.booleans()),
    st.tuples(st.just("dies"), slots, users, tokens),
    st.tuples(st.just("flush"), slots),
    st.tuples(st.just("step")),
    st.tuples(st.just("ask"), slots, users),
    st.tuples(st.just("foreign"), users, tokens),
    st.tuples(st.just("kill")),
    st.tuples(st.just("clock"), st.sampled_from([-7200.0, -5.0, 90_000.0])),
    st.tuples(st.just("later"), st.floats(0.1, 5.0)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(moves, max_size=40), st.booleans())
def test_base_and_settled_are_the_exact_sum_in_any_order_of_events(script: list[tuple], has_past: bool) -> None:
    with TemporaryDirectory() as directory:
        world = World(Path(directory))
        if has_past:  # the spool of an earlier life of the node, not stored yet
            past = world.writer("os", epoch=77 | 1 << 16)
            for user in USERS:
                txn = past.new_txn()
                past.intent(intent(txn, user_id=user))
                past.final(final(txn, f"past-{user}", user_id=user, created_at=world.clock.wall()))
            past.close()
            world._writers.remove(past)
            world.clock.advance(10.0)
        asyncio.run(_play(world, script, has_past))
        world.close()


async def _play(world: World, script: list[tuple], has_past: bool) -> None:
    node = Node(world)
    await node.begin()
    if has_past:
        while not await node.writer.step():
            pass
        node.foreign.update(dict.fromkeys(USERS, 30))
    for name, *arguments in script:
        await node.begin()
        if name == "row":
            slot, user, count, is_first = arguments
            node.row(slot, user, count, is_first=is_first)
        elif name == "dies":
            node.dies(*arguments)
        elif name == "flush":
            node.spools[arguments[0]].flush()
        elif name == "step":
            await node.writer.step()
        elif name == "ask":
            await node.ask(*arguments)
        elif name == "later":
            for spool in node.spools:  # a worker does so at the end of each turn of its loop
                spool.flush()
            world.clock.advance(arguments[0])
        elif name == "clock":  # set by NTP or by hand
            world.clock.step_wall(arguments[0])
        elif name == "foreign":
            user, count = arguments
            await node.store.commit(Batch(rows=[row(user, count, world.clock.wall())]), lambda refused: None)
            node.foreign[user] += count
        else:
            await node.die()
            node.born()
        node.check()
    # At rest nothing is in transit: the store alone has it all.
    await node.begin()
    for spool in node.spools:
        spool.flush()
    await node.writer.step()
    world.clock.advance(2.0)  # a clock that was set back tells nothing of how long a row has waited: linger begins anew
    while not await node.writer.step():
        pass
    for user in USERS:
        await node.ask(0, user)
        assert await node.store.window_sum(user, 0.0) == (
            node.settled[user] + node.foreign[user] + node.interrupted(user)
        )
    node.check()
    await node.die()


def row(user: int, count: int, created_at: float) -> Row:
    return Row(user, 1, 0, count, created_at, "acme", "foreign", "completed", 0, 0, 0, "openai", 1, 3, 4)


class Serving:
    """A telemetry process that serves in the background, with one worker's end of a channel and a store at a gate."""

    def __init__(self, world: World, store: Gated, linger_s: float = 0.0) -> None:
        self.world, self.store = world, store
        world.clock = SYSTEM  # type: ignore[assignment]
        self.ledger = Ledger.create(2, users=64, tenants=4)
        self.account = self.ledger.at(0, 1).account(42)
        self.channel = Channel.create(1)
        self.spool: SpoolWriter = world.writer("os")
        self.stop = asyncio.Event()
        self.desk = desk = Desk(self.channel._answering, self.ledger, Ceiling(), SYSTEM)
        config = Settings(linger_s, 100, 0.0)
        self.writer = Writer(world.spool, store, config, Meters(), world.log, self.stop, desk=desk)
        self.task = asyncio.get_running_loop().create_task(self.writer.serve())

    def end_request(self, txn: int, tokens: int) -> None:
        self.account.add(settled=tokens)
        self.spool.intent(intent(txn))
        self.spool.final(final(txn, prompt_tokens=0, completion_tokens=tokens))
        self.spool.flush()

    def has_gathered(self) -> bool:
        return bool(self.writer._gatherer.group.batch.rows)

    def ask(self, number: int) -> None:
        self.channel._asking[0].send(pack_question(Question(number, 42, 0.0, None)))

    async def begin(self) -> None:
        """Until the desk listens: what was asked before, was asked of a predecessor."""
        while self.desk._loop is None:
            await asyncio.sleep(0)

    async def answer(self) -> tuple[int, bool]:
        async with asyncio.timeout(20):
            answer = unpack_answer(await asyncio.get_running_loop().sock_recv(self.channel._asking[0], 64))
        assert answer is not None
        return answer

    async def is_unanswered(self) -> bool:
        for _ in range(50):
            await asyncio.sleep(0)
        try:
            self.channel._asking[0].recv(64, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        return False

    async def end(self) -> None:
        self.store.gate.set()
        self.stop.set()
        async with asyncio.timeout(20):
            self.spool.close()
            self.world._writers.remove(self.spool)
            await self.task
        self.channel.close()


@pytest.mark.parametrize("is_after", [False, True])
async def test_a_question_during_a_commit_waits_for_its_end_and_sees_all_of_it(world: World, is_after: bool) -> None:
    serving = Serving(world, Gated(world.database, is_after=is_after))
    serving.end_request(1, 30)
    serving.end_request(2, 12)
    await asyncio.wait_for(serving.store.reached.wait(), 20)
    serving.ask(1)
    assert await serving.is_unanswered()
    serving.store.gate.set()
    assert await serving.answer() == (1, True)
    assert serving.account.window is not None
    assert (serving.account.window.base, serving.account.stored, serving.account.settled) == (0, 42, 42)
    await serving.end()


async def test_a_question_waits_for_no_group_that_is_only_gathered(world: World) -> None:
    serving = Serving(world, Gated(world.database), linger_s=3600.0)
    await serving.begin()
    serving.end_request(1, 30)
    while not serving.task.done() and not serving.has_gathered():
        await asyncio.sleep(0.001)
    serving.ask(1)
    assert await serving.answer() == (1, True)
    assert serving.account.window is not None
    assert (serving.account.window.base, serving.account.stored, serving.account.settled) == (0, 0, 30)
    await serving.end()


async def test_while_the_store_fails_the_answer_is_no_at_once_and_yes_when_it_works_again(world: World) -> None:
    store = Gated(world.database, is_after=True)
    serving = Serving(world, store)
    store.error = StoreError("the connection broke after the commit")
    serving.end_request(1, 30)
    await asyncio.wait_for(store.reached.wait(), 20)
    serving.ask(1)
    assert await serving.is_unanswered()
    store.gate.set()
    assert await serving.answer() == (1, False)
    while await _ask_again(serving) == (2, False):
        await asyncio.sleep(0.01)
    window = serving.account.window
    assert window is not None
    assert window.base + serving.account.settled == 30
    assert (serving.account.stored, window.base) == (30, 0)
    await serving.end()


async def _ask_again(serving: Serving) -> tuple[int, bool]:
    serving.store.error = None
    serving.ask(2)
    return await serving.answer()


async def test_rows_that_are_set_aside_stay_spent_though_they_are_not_in_the_store(world: World) -> None:
    store = Gated(world.database)
    store.gate.set()
    serving = Serving(world, store)
    serving.account.add(settled=7)
    await serving.begin()
    serving.ask(1)
    assert await serving.answer() == (1, True)
    world.refuse_user(2**63)
    poison = serving.ledger.at(0, 1).account(2**63)
    poison.add(settled=5)
    serving.spool.final(final(1, user_id=2**63, prompt_tokens=0, completion_tokens=5))
    serving.spool.final(final(2, prompt_tokens=0, completion_tokens=7))
    serving.spool.flush()
    async with asyncio.timeout(20):
        while serving.account.stored != 7:
            await asyncio.sleep(0.005)
    assert poison.stored == 0
    await serving.end()


async def test_a_question_that_breaks_the_store_is_told_no_and_the_store_is_opened_again(world: World) -> None:
    store = Gated(world.database)
    store.gate.set()
    serving = Serving(world, store)
    await serving.begin()
    serving.ask(1)
    assert await serving.answer() == (1, True)
    await store._run(lambda: store._live().execute("ALTER TABLE sys_ai_transactions RENAME TO elsewhere"))
    serving.ask(2)
    assert await serving.answer() == (2, False)
    await store._run(lambda: _rename_back(world))
    answer = (3, False)
    while answer == (3, False):
        serving.ask(3)
        answer = await serving.answer()
        await asyncio.sleep(0.01)
    await serving.end()


def _rename_back(world: World) -> None:
    database = sqlite3.connect(world.database)
    database.execute("ALTER TABLE elsewhere RENAME TO sys_ai_transactions")
    database.close()
