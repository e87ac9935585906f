"""What is said of a store that fails, and of what a death or a stop leaves."""

from __future__ import annotations

from proxyd.clock import FakeClock
from proxyd.shm.beats import State
from proxyd.telemetry.trouble import REPEAT_S, RETRY_MAX_S, StoreTrouble
from tests.unit.telemetry.world import LogBook, Meters, World, final, intent


def make() -> tuple[StoreTrouble, LogBook, Meters, FakeClock, list[State]]:
    log, meters, clock = LogBook(), Meters(), FakeClock()
    states: list[State] = []
    return StoreTrouble(meters, log, clock, states.append), log, meters, clock, states


def test_the_pause_doubles_to_its_bound_and_is_the_one_that_the_line_tells() -> None:
    trouble, log, _, clock, _ = make()
    pauses = []
    for _ in range(10):
        pauses.append(trouble.on_failure(OSError("no"), None, 3, 100))
        clock.advance(REPEAT_S)
    assert pauses[:4] == [0.05, 0.1, 0.2, 0.4]
    assert pauses[-1] == RETRY_MAX_S
    assert [fields["retry_s"] for fields in log.named("store_failed")] == pauses
    assert {(fields["waiting_rows"], fields["spool_bytes"]) for fields in log.named("store_failed")} == {(3, 100)}


def test_an_outage_of_an_hour_is_a_line_a_minute_with_the_tries_and_one_at_its_end() -> None:
    trouble, log, _, clock, _ = make()
    for _ in range(720):
        trouble.on_failure(OSError("Can't connect to MySQL server (111), connection 4711"), None, 0, 0)
        clock.advance(5.0)
    lines = log.named("store_failed")
    assert len(lines) == 60
    assert [fields["tries"] for fields in lines[:3]] == [1, 13, 25]
    trouble.on_success()
    assert log.named("store_recovered") == [{"tries": 720, "failed_s": 3600.0}]


def test_another_reason_is_told_when_it_comes_up_and_not_each_time_they_take_turns() -> None:
    trouble, log, _, clock, _ = make()
    for number in range(12):
        trouble.on_failure(OSError(f"lost {number}" if number % 2 else "refused"), None, 0, 0)
        clock.advance(5.0)
    assert [fields["reason"] for fields in log.named("store_failed")] == ["refused", "lost 1"]


def test_a_store_that_fails_and_recovers_all_the_time_is_told_every_five_seconds() -> None:
    trouble, log, _, clock, states = make()
    for _ in range(100):
        trouble.on_failure(OSError("no"), None, 0, 0)
        trouble.on_success()
        clock.advance(0.5)
    assert len(log.named("store_failed")) == len(log.named("store_recovered")) == 10
    assert states == [State.FAILING, State.READY] * 100, "status sees each"


def test_a_stop_shortens_the_pause_to_its_deadline_and_then_there_is_none() -> None:
    trouble, log, _, _, _ = make()
    for _ in range(10):
        trouble.on_failure(OSError("no"), None, 0, 0)
    assert trouble.on_failure(OSError("no"), 2.5, 0, 0) == 2.5
    assert trouble.on_failure(OSError("no"), 0.0, 0, 0) is None
    assert log.named("store_failed")[-1]["retry_s"] is None


def test_status_sees_the_trouble_and_its_end() -> None:
    trouble, log, meters, clock, states = make()
    trouble.on_failure(OSError("\x07" + "/p" * 200 + ": file is not a database"), None, 0, 0)
    (name,) = meters.series
    reason = name.partition(":")[2]
    assert (len(reason), reason[:3], reason.isprintable()) == (200, "...", True)
    assert reason.endswith("file is not a database")
    assert meters.series[name].value == int(clock.wall())
    clock.advance(7.0)
    trouble.on_success()
    trouble.on_success()
    assert meters.series[name].value == 0
    assert states == [State.FAILING, State.READY]
    assert log.named("store_recovered") == [{"tries": 1, "failed_s": 7.0}]


def test_a_stop_that_gives_up_says_how_many_records_stay(world: World) -> None:
    world.database.write_bytes(b"this is not a database, " * 100)
    for count in (3, 4):
        spool = world.writer()
        for txn in range(count):
            spool.intent(intent(txn + 1))
            spool.final(final(txn + 1))
        spool.close()
    world.drain(drain_s=0.0)
    (left,) = world.log.named("rows_left_in_spool")
    assert left["records"] == 7
    assert left["bytes"] == sum(path.stat().st_size for path in world.spool.iterdir())


def test_a_stop_that_gives_up_with_nothing_to_store_has_nothing_to_say(world: World) -> None:
    world.database.write_bytes(b"this is not a database, " * 100)
    world.drain(drain_s=0.0)
    assert world.log.named("rows_left_in_spool") == []


def test_interrupted_requests_are_named_twenty_of_them_and_counted(world: World) -> None:
    spool = world.writer()
    for txn in range(1, 26):
        spool.intent(intent(txn))
    spool.flush()
    world.die(spool)
    world.drain()
    (told,) = world.log.named("transactions_interrupted")
    assert (told["rows"], told["more"]) == (25, 5)
    assert told["request_ids"] == [f"r{txn}" for txn in range(1, 21)]
