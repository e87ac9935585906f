"""`proxyd spool`: what it tells of a spool that somebody writes, that nobody writes, and that is damaged."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
from pathlib import Path

import pytest

from proxyd.cli.main import _parser
from proxyd.cli.spool import SHOWN, run
from proxyd.clock import FakeClock
from proxyd.store.schema import Row
from proxyd.telemetry import survey as module
from proxyd.telemetry.deadletter import DeadLetter, append_dead_letters
from proxyd.telemetry.segment import DEAD_LETTERS, segment_name
from tests.unit.telemetry.world import World, final, intent

CONFIG = """
[server]
listen = ["127.0.0.1:0"]
state_dir = "{state}"
[auth]
mode = "off"
[telemetry]
sink = "sqlite:///{state}/telemetry.db"
spool_max = "1MiB"
[[upstream]]
name = "a"
dialect = "openai"
url = "http://127.0.0.1:9/v1"
[[model]]
name = "m"
id = 1
upstreams = ["a"]
"""


def command(state: Path, *arguments: str) -> int:
    config = state / "proxyd.toml"
    config.write_text(CONFIG.format(state=state))
    args = _parser().parse_args(["-c", str(config), "spool", *arguments], argparse.Namespace(config=None))
    return run(args, {}, FakeClock())


def told(world: World, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert command(world.state_dir, "--json", *arguments) == 0
    return json.loads(capsys.readouterr().out)


def letter(n: int, reason: str = "IntegrityError: no") -> DeadLetter:
    return DeadLetter(Row(*final(n)[1:-1]), reason, None)


def test_a_live_stream_is_told_from_one_whose_writer_is_gone_and_its_lock_stays_its_own(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, live = world.writer("os"), world.writer("os")
    for spool in (gone, live):
        spool.intent(intent(1))
        spool.intent(intent(2))
        spool.final(final(1))
    world.turn()
    world.die(gone)
    document = told(world, capsys)
    by_name = {one["stream"]: one for one in document["streams"]}
    assert {name: one["state"] for name, one in by_name.items()} == {live.stream: "live", gone.stream: "ended"}
    assert {(one["rows"], one["open"], one["segments"]) for one in by_name.values()} == {(1, 1, 1)}
    assert document["rows"] == 2
    assert document["bytes"] == sum(path.stat().st_size for path in world.spool.iterdir())
    assert (document["spool_max"], document["reader_pid"]) == (1024 * 1024, None)
    with (world.spool / segment_name(live.stream, 1)).open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_lock_is_taken_while_it_looks(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.writer("os")

    def refuse(*arguments: object) -> None:
        raise AssertionError("a probing lock")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert told(world, capsys)["streams"][0]["state"] == "live"


def test_rows_that_the_store_has_are_not_counted_though_their_segment_is_there(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = world.writer("os")
    for txn in (1, 2):
        spool.final(final(txn))
    world.turn()
    world.gather_once()
    spool.final(final(3))
    world.turn()
    (stream,) = told(world, capsys)["streams"]
    assert (stream["rows"], stream["state"]) == (1, "live")


def test_a_store_that_cannot_be_asked_is_told_and_all_rows_of_the_files_are_counted(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.database.write_bytes(b"this is not a database, " * 100)
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    document = told(world, capsys)
    assert document["rows"] == 1
    assert "not a database" in document["store_not_asked"]
    assert command(world.state_dir) == 0
    assert "the store cannot be asked" in capsys.readouterr().out


def test_the_telemetry_process_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    with (world.state_dir / "telemetry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert told(world, capsys)["reader_pid"] == os.getpid()
        assert command(world.state_dir) == 0
        assert f"process {os.getpid()} stores them" in capsys.readouterr().out


def test_where_the_kernel_tells_no_locks_the_state_is_unknown(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LOCKS", Path("nowhere/locks"))
    world.writer("os")
    assert told(world, capsys)["streams"][0]["state"] == "unknown"


def test_files_that_are_not_read_are_named_with_their_kind(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.spool / "notes.txt").write_text("mine")
    (world.spool / "003-00000001-0000000000000002-000001.spool.damaged").write_bytes(b"x" * 50)
    (world.spool / "003-00000001-0000000000000003-000001.spool").write_bytes(b"x" * 500)
    (world.spool / ".new-003-00000001-0000000000000004-000001.spool").write_bytes(b"x")
    (world.spool / "requeue-0123456789abcdef.jsonl.bad").write_bytes(b"x\n")
    document = told(world, capsys)
    assert {(one["kind"], one["bytes"]) for one in document["files"]} == {
        ("foreign", 4),
        ("damaged", 50),
        ("no segment, or its header is damaged", 500),
        ("unfinished", 1),
        ("bad lines", 2),
    }
    assert document["streams"] == []
    assert command(world.state_dir) == 0
    assert "notes.txt" in capsys.readouterr().out


def test_a_segment_that_may_not_be_read_does_not_hide_the_others(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    (world.spool / "003-00000001-0000000000000003-000001.spool").mkdir()
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    document = told(world, capsys)
    assert document["rows"] == 1
    assert document["files"][0]["kind"].startswith("unreadable")


def test_dead_letters_are_told_newest_first_and_how_many_more_there_are(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    append_dead_letters(world.spool, [letter(n, f"reason {n} " + "x" * 500) for n in range(1, 31)])
    dead = told(world, capsys)["dead_letters"]
    assert (dead["rows"], dead["more"], len(dead["newest"])) == (30, 30 - SHOWN, SHOWN)
    assert [one["row"]["request_id"] for one in dead["newest"][:2]] == ["r30", "r29"]
    assert max(len(one["reason"]) for one in dead["newest"]) <= 200
    assert command(world.state_dir) == 0
    page = capsys.readouterr().out
    assert "dead letters: 30" in page
    assert "2023-11-14 22:13:20 user 42 acme r30" in page
    assert "and 10 more in dead-letter.jsonl" in page
    assert "--retry" in page


def test_a_line_that_is_no_row_is_told_as_such(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.spool / DEAD_LETTERS).write_text("scribble\n")
    assert "not JSON" in told(world, capsys)["dead_letters"]["newest"][0]["reason"]


def test_retry_renames_and_what_waits_is_listed_until_it_is_stored(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    append_dead_letters(world.spool, [letter(1), letter(2)])
    answer = told(world, capsys, "--retry")
    assert (answer["rows"], answer["reader_pid"]) == (2, None)
    assert world.files() == [answer["requeued"]]
    (stream,) = told(world, capsys)["streams"]
    assert (stream["state"], stream["rows"], stream["slot"]) == ("re-queue", 2, None)
    assert command(world.state_dir) == 0
    assert "re-queue" in capsys.readouterr().out
    world.drain()
    assert [row[0] for row in world.rows()] == ["r1", "r2"]
    assert told(world, capsys)["rows"] == 0


def test_retry_without_dead_letters_says_so_and_is_no_failure(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world.state_dir, "--retry") == 0
    assert capsys.readouterr().out == "no dead letters: nothing to store again\n"
    assert told(world, capsys, "--retry") == {"requeued": None, "rows": 0}


def test_a_spool_that_is_not_there_is_a_plain_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--retry",)):
        assert command(tmp_path, *arguments) == 1
        assert "there is no spool yet" in capsys.readouterr().err


def test_an_empty_spool_is_told_on_a_short_page(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world.state_dir) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["0 B of 1 MiB (0.0%), 0 rows wait; no process stores them now", "", "dead letters: none"]


def test_a_spool_too_large_to_be_counted_is_told_in_bytes(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_COUNTED_BYTES", 100)
    spool = world.writer("os")
    spool.final(final(1))
    world.turn()
    document = told(world, capsys)
    assert (document["rows"], document["streams"][0]["rows"]) == (None, None)
    assert document["streams"][0]["bytes"] > 0


def test_what_a_dead_letter_holds_moves_no_cursor_of_a_terminal(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row(*final(1)[1:-1])._replace(tenant="a\x1b[2J", request_id="r\r\x9b1A")
    append_dead_letters(world.spool, [DeadLetter(row, "no\x1b]0;title\x07", None)])
    (world.spool / "odd\x1b[31m").write_text("mine")
    assert command(world.state_dir) == 0
    page = capsys.readouterr().out
    assert not {"\x1b", "\r", "\x9b", "\x07"} & set(page)
    assert "a\\x1b[2J r\\x0d\\x9b1A" in page


def test_all_lines_are_counted_however_long_the_file_is(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.spool / DEAD_LETTERS
    path.write_bytes((b"x" * 1023 + b"\n") * 20_000 + b"the last has no end")
    assert told(world, capsys)["dead_letters"]["rows"] == 20_001
    assert told(world, capsys, "--retry")["rows"] == 20_001
