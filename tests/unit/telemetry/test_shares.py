"""Of a group's room every stream has its share, and so have re-queued letters."""

from __future__ import annotations

import os

from proxyd.store.schema import Row
from proxyd.telemetry.deadletter import DeadLetter, append_dead_letters
from proxyd.telemetry.gather import Gatherer
from proxyd.telemetry.requeue import new_requeue_path
from proxyd.telemetry.segment import DEAD_LETTERS
from tests.unit.telemetry.world import World, final


def test_a_long_backlog_of_one_stream_keeps_neither_another_nor_a_file_of_letters_waiting(world: World) -> None:
    first, second = world.writer("os"), world.writer("os")
    for txn in range(1, 1001):
        first.final(final(txn))
    second.final(final(1, "late"))
    world.turn()
    append_dead_letters(world.spool, [DeadLetter(Row(*final(2, "again")[1:-1]), "no", None)])
    os.rename(world.spool / DEAD_LETTERS, new_requeue_path(world.spool))
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    gatherer.gather(False)
    rows = [row.request_id for row in gatherer.group.batch.rows]
    assert "late" in rows
    assert [row.request_id for row in gatherer.group.requeued] == ["again"]
    gatherer.close()


def test_what_one_stream_leaves_of_its_share_is_taken_by_those_that_have_more(world: World) -> None:
    streams = [world.writer("os") for _ in range(4)]
    for txn in range(1, 301):
        streams[2].final(final(txn))
    for spool in streams:
        spool.final(final(1000))
    world.turn()
    gatherer = Gatherer(world.spool, 100, world.log, world.clock)
    gatherer.gather(False)
    assert len(gatherer.group.batch.rows) == 100
    gatherer.close()
