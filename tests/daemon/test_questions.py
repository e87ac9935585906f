"""Workers that spend and ask, the telemetry process that answers, all of them real: sums are exact, whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from proxyd.clock import SYSTEM
from proxyd.log import Log, Sink
from proxyd.shm.beats import Beat, State
from proxyd.shm.ledger import Account, Ledger
from proxyd.shm.region import Region
from proxyd.telemetry.questions import Channel
from proxyd.telemetry.record import Final, Intent
from proxyd.telemetry.segment import ensure_spool_dir
from proxyd.telemetry.spool import SpoolWriter
from proxyd.telemetry.writer import run
from proxyd.worker.asking import Asker
from tests.daemon.harness import wait_for
from tests.daemon.test_telemetry_kill import FileLog, Meters, fork, kill

SLOTS, USERS = 3, 12
SEED = int(os.environ.get("PROXYD_KILL_SEED", "20"))


class Node:
    """A master's part: what is shared, the children, and slot SLOTS as a worker of the test's own."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir, self.log = state_dir, state_dir / "log"
        ensure_spool_dir(state_dir)
        self.ledger = Ledger.create(SLOTS + 2, users=1024, tenants=4)
        self.channel = Channel.create(SLOTS + 1)
        self.region = Region.create(SLOTS + 2, SYSTEM.wall())
        self.beat = Beat(self.region, SLOTS + 1)
        self.children: dict[str, int] = {}
        self.lives = 0

    def start(self, name: str) -> None:
        self.lives += 1
        epoch = self.lives
        body = self._telemetry if name == "telemetry" else lambda: self._worker(int(name), epoch)
        self.children[name] = fork(body, self.log)

    def kill(self, name: str) -> None:
        kill(self.children.pop(name))
        if name == "telemetry":
            self.beat.death()
        else:
            self.ledger.reclaim(int(name))

    def stop(self, name: str) -> None:
        os.kill(self.children[name], signal.SIGTERM)
        _, status = os.waitpid(self.children.pop(name), 0)
        assert status == 0, self.log.read_text()[-4000:]

    def close(self) -> None:
        for pid in self.children.values():
            os.kill(pid, signal.SIGCONT)
            kill(pid)
        self.channel.close()

    def asker(self) -> Asker:
        end, loop = self.channel._asking[SLOTS], asyncio.get_running_loop()
        return Asker(
            end, loop, Log(access="off", events=Sink(-1)), is_ready=lambda: self.beat.state is State.READY
        )  # fmt: skip

    def _telemetry(self) -> None:
        config = SimpleNamespace(
            server=SimpleNamespace(state_dir=self.state_dir),
            quota=SimpleNamespace(tokens=0, window=86_400.0),
            telemetry=SimpleNamespace(
                sink=f"sqlite:///{self.state_dir}/telemetry.db", linger=0.005, batch_rows=40, durability="os",
                retention=86_400.0, spool_max=0,
            ),
        )  # fmt: skip

        async def life() -> None:
            stop = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
            shared = {"ledger": self.ledger, "questions": self.channel, "epoch": 1}
            self.beat.enter(State.READY)
            await run(config, None, Meters(), FileLog(self.log), stop, enter=self.beat.enter, **shared)

        asyncio.run(life())

    def _worker(self, slot: int, epoch: int) -> None:
        rng = random.Random(SEED * 1000 + epoch)
        share = self.ledger.at(slot, epoch)

        async def life() -> None:
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            loop.add_signal_handler(signal.SIGTERM, stop.set)
            log = FileLog(self.log)
            spool = SpoolWriter.on_loop(loop, ensure_spool_dir(self.state_dir), slot, epoch, "os", log)
            asker = Asker(
                self.channel.keep_asking(slot), loop, Log(access="off", events=Sink(-1)),
                is_ready=lambda: self.beat.state is State.READY,
            )  # fmt: skip
            while not stop.is_set():
                for _ in range(rng.randrange(1, 6)):
                    user, tokens = rng.randrange(USERS), rng.randrange(1, 100)
                    account = share.account(user)
                    account.add(held=tokens)
                    txn = spool.new_txn()
                    spool.intent(Intent(txn, f"{epoch}-{txn}", user, "t", 1, "up", time.time(), 0))
                    if rng.random() < 0.3:
                        await asker.read(user, 0.0, 1000)
                    spool.final(
                        Final(txn, user, 1, 0, tokens, time.time(), "t", f"{epoch}-{txn}", "completed", 0, 0, 0, "up",
                              1, 5, 9)
                    )  # fmt: skip
                    account.add(settled=tokens, held=-tokens)
                await asyncio.sleep(0.001)
            spool.close()
            asker.close()

        asyncio.run(life())

    def sums(self) -> dict[int, int]:
        database = sqlite3.connect(self.state_dir / "telemetry.db")
        try:
            return dict(database.execute("SELECT user_id, SUM(completion_tokens) FROM sys_ai_transactions GROUP BY 1"))
        finally:
            database.close()

    def account(self, user: int) -> Account:
        account = self.ledger.find(user)
        assert account is not None
        return account

    def standing(self, user: int) -> int:
        """What any worker takes the user to have spent."""
        account = self.account(user)
        window = account.window
        assert window is not None
        return window.base + account.settled


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    try:
        yield node
    finally:
        node.close()


async def until_answered(node: Node, asker: Asker, user: int) -> None:
    async with asyncio.timeout(60):
        while not await asker.read(user, 0.0, None):
            await asyncio.sleep(0.01)


async def test_while_workers_spend_and_ask_each_reading_stays_exact_to_the_end(house: Node) -> None:
    house.start("telemetry")
    for slot in range(SLOTS):
        house.start(str(slot))
    for user in range(USERS):
        wait_for(lambda user=user: house.ledger.find(user) is not None and house.account(user).window is not None, 60.0)
    time.sleep(1.0)
    before = {user: house.account(user).settled for user in range(USERS)}
    for slot in range(SLOTS):
        house.stop(str(slot))
    assert all(house.account(user).settled >= before[user] > 0 for user in range(USERS))
    asked_last = {user: house.standing(user) for user in range(USERS)}
    # Nobody asked since the rest was stored: what was read in the middle of it all is exact now.
    house.stop("telemetry")
    assert house.sums() == asked_last
    assert all(house.account(user).stored == house.account(user).settled for user in range(USERS))


async def test_after_deaths_of_all_kinds_a_quiet_users_sum_is_the_stores(house: Node) -> None:
    rng = random.Random(SEED)
    for name in ("telemetry", *map(str, range(SLOTS))):
        house.start(name)
    for _ in range(20):
        time.sleep(rng.uniform(0.02, 0.12))
        name = rng.choice(["telemetry", "telemetry", *map(str, range(SLOTS))])
        house.kill(name)
        house.start(name)
    for slot in range(SLOTS):
        house.kill(str(slot))
    assert house.ledger.totals().held == 0
    await asyncio.sleep(2.1)  # the time after which a user counts as quiet
    asker = house.asker()
    for user in range(USERS):
        await until_answered(house, asker, user)
    sums = house.sums()
    assert {user: house.standing(user) for user in range(USERS)} == {user: sums.get(user, 0) for user in range(USERS)}
    asker.close()
    house.stop("telemetry")
    assert "Traceback" not in house.log.read_text()


async def test_a_stopped_telemetry_process_costs_two_deadlines_and_answers_when_it_goes_on(house: Node) -> None:
    house.start("telemetry")
    asker = house.asker()
    house.ledger.at(SLOTS, 1).account(7)
    await until_answered(house, asker, 7)
    os.kill(house.children["telemetry"], signal.SIGSTOP)
    has_waited = []
    for user in range(20):
        house.ledger.at(SLOTS, 1).account(user)
        task = asyncio.get_running_loop().create_task(asker.read(user, 0.0, None))
        for _ in range(3):
            await asyncio.sleep(0)
        has_waited.append(not task.done())
        assert not await task
    assert has_waited == [True, True] + [False] * 18
    os.kill(house.children["telemetry"], signal.SIGCONT)
    await until_answered(house, asker, 7)
    wait_for(lambda: house.account(19).window is not None, 60.0)  # those that nobody waited for were asked, too
    asker.close()


async def test_a_dead_telemetry_process_is_not_waited_for_and_its_successor_answers(house: Node) -> None:
    house.start("telemetry")
    asker = house.asker()
    house.ledger.at(SLOTS, 1).account(7)
    await until_answered(house, asker, 7)
    house.kill("telemetry")
    assert not await asker.read(7, 0.0, None)
    assert asker.under_way == 0
    house.start("telemetry")
    await until_answered(house, asker, 7)
    asker.close()
    with contextlib.suppress(KeyError):
        house.stop("telemetry")
