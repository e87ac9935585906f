"""What a node's processes share, and a generation of workers made from a configuration and it.

Owns the composition of `worker` and `telemetry` with shared memory. Must not know argv, files, the master's doings or
secrets' places. Made once by the first start; an upgrade maps the same again (cli/adopt.py).

    Node: region, ledger, questions, passage        live as long as the node, whatever is reloaded
      '- generation(config, secrets, listeners, log) -> GenerationSpec
"""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass
from typing import Any

from proxyd.clock import SYSTEM
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.dialects.tokens import O200K
from proxyd.host.child import Birth, ChildSpec
from proxyd.host.passage import Passage
from proxyd.host.sockets import Listeners, count_time_wait
from proxyd.log import Log
from proxyd.master.spec import GenerationSpec
from proxyd.shm.beats import Beat, State
from proxyd.shm.ledger import Ledger
from proxyd.shm.metrics import read
from proxyd.shm.region import Region, count_seats
from proxyd.store.sink import load
from proxyd.telemetry import writer
from proxyd.telemetry.questions import Channel
from proxyd.telemetry.watch import Watch, watching
from proxyd.worker.main import Context, Services, run_telemetry, run_worker
from proxyd.worker.services import Blueprint, build


@dataclass(frozen=True, slots=True)
class Node:
    """The mappings and sockets. All are inherited by every child."""

    region: Region
    ledger: Ledger
    questions: Channel
    passage: Passage

    @classmethod
    def create(cls, config: Config) -> Node:
        """Raises OSError when the kernel gives no memory or no sockets; what was made goes with its last reference."""
        seats = count_seats(config.server.workers)
        return cls(
            region=Region.create(seats + 2, SYSTEM.wall()),
            # One seat more is the telemetry process's own.
            ledger=Ledger.create(seats + 1, permits=config.limits.most_streams),
            questions=Channel.create(seats),
            passage=Passage.create(),
        )

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> Node:
        """What `hand_over` told, mapped again. Raises ValueError for another layout, KeyError for what is missing."""
        return cls(
            region=Region.adopt(state["region"]),
            ledger=Ledger.adopt(state["ledger"]),
            questions=Channel.adopt(state["questions"]),
            passage=Passage.adopt(state["passage"]),
        )

    def hand_over(self) -> dict[str, Any]:
        questions, passage = list(self.questions.fds()), list(self.passage.fds())
        memory = [self.region.fd, self.ledger.fd]
        return {
            "region": self.region.fd,
            "ledger": self.ledger.fd,
            "questions": questions,
            "passage": passage,
            "memory": memory,
            "fds": [*memory, *questions, *passage],
        }

    def reclaim(self, seat: int, log: Log) -> None:
        """What a dead worker's requests held is free again."""
        freed = self.ledger.reclaim(seat)
        if freed:
            log.info("permits_freed", slot=seat, permits=freed)

    def generation(
        self, config: Config, secrets: Secrets, listeners: Listeners, log: Log, page_cookie: str = ""
    ) -> GenerationSpec:
        """Nothing is started: the master forks. What the sink needs is imported here, before the fork: a child that is
        born later must not find another version's files."""
        if not O200K.is_ready:
            O200K.load()  # 15 ms here once, and pages that all workers share; what is wrong with it each of them tells
        load(config.telemetry.sink)
        blueprint = Blueprint(
            config, secrets, listeners, self.ledger, self.questions, page_cookie, passage=self.passage
        )
        drain_timeout_s = config.server.drain_timeout

        def worker(birth: Birth) -> int:
            own = dataclasses.replace(blueprint, keeps_listeners=birth.keeps_listeners)

            async def build_services(context: Context) -> Services:
                return await build(context, own)

            return run_worker(birth, self.region, log, drain_timeout_s, build_services)

        def telemetry(birth: Birth) -> int:
            async def serve(context: Context, stop: asyncio.Event) -> None:
                watch = Watch(
                    config.monitoring.alert_on,
                    lambda now: read(self.region, now),
                    context.metrics,
                    context.log,
                    context.clock,
                    count_time_wait,
                )
                with watching(watch, context.loop):
                    await writer.run(
                        config,
                        secrets,
                        context.metrics,
                        context.log,
                        stop,
                        clock=context.clock,
                        enter=Beat(self.region, birth.seat).enter,
                        # A node that serves ends this process for a successor alone.
                        is_replaced=lambda: Beat(self.region, self.region.master).state is State.READY,
                        ledger=self.ledger,
                        questions=self.questions,
                        epoch=birth.epoch,
                    )

            return run_telemetry(birth, self.region, log, serve)

        return GenerationSpec(
            listeners=listeners,
            workers=config.server.workers,
            run_worker=worker,
            telemetry=ChildSpec("telemetry", telemetry),
            drain_timeout_s=drain_timeout_s,
            log=log,
        )
