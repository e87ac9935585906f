"""The spool of a running daemon when the disk or the store refuses, and when files in it are not as they were written.

The disk's faults come through SpoolIO: a `sitecustomize` in each process of the daemon looks into a control file before
each call, so a fault begins and ends when the test says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxyd.telemetry.record import Final, Intent
from proxyd.telemetry.segment import ensure_spool_dir, segment_name
from proxyd.telemetry.spool import SpoolWriter
from tests.daemon.harness import (
    CHAT,
    DONE,
    FINISH,
    ROOT,
    USAGE,
    Daemon,
    Script,
    Upstream,
    Wire,
    ask,
    chat_chunk,
    node,
    wait_for,
)

Make = Callable[[Script], Upstream]
PATH = "/v1/chat/completions"
NOT_A_DATABASE = b"this is not a database, " * 100

FAULTS = """
import errno, os, sys

if os.environ.get("SPOOL_FAULTS") and "proxyd" in " ".join(sys.orig_argv):
    from proxyd.telemetry.spoolio import SpoolIO

    def failing(name):
        real = getattr(SpoolIO, name)
        def call(self, *given):
            try:
                with open(os.environ["SPOOL_FAULTS"]) as control:
                    faults = dict(word.split("=") for word in control.read().split())
            except FileNotFoundError:
                faults = {}
            if name in faults:
                code = getattr(errno, faults[name])
                raise OSError(code, os.strerror(code))
            return real(self, *given)
        setattr(SpoolIO, name, call)

    for name in ("write", "fdatasync", "reserve", "create"):
        failing(name)
"""


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """faults("write=ENOSPC fdatasync=EIO") from now on; faults("") ends them."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(FAULTS)
    control = tmp_path / "faults"
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    monkeypatch.setenv("SPOOL_FAULTS", str(control))

    def have(text: str) -> None:
        new = control.with_suffix(".new")
        new.write_text(text)
        new.rename(control)

    return have


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    """What was logged under this name, once there is any: lines are written in a thread."""
    return wait_for(lambda: logged(daemon, name), 30)


def logged(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    found = []
    for line in daemon.log().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if entry.get("event") == name:
                found.append(entry)
    return found


def telemetry(daemon: Daemon) -> dict[str, Any]:
    return json.loads(daemon.admin("/status")[1])["telemetry"]


def spool(daemon: Daemon, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "proxyd", "-c", str(daemon.config), "spool", *arguments],
        cwd=ROOT,
        env=daemon.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


class Paced:
    """An upstream whose answers of the model `slow` end when told; all others end at once."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __call__(self, wire: Wire) -> None:
        if wire.seen.json["model"] != "slow":
            wire.stream(chat_chunk("a"), FINISH, USAGE, DONE)
            return
        wire.head(transfer_encoding="chunked")
        wire.chunk(chat_chunk("a"))
        self.go.wait(60)
        for piece in (chat_chunk("b"), FINISH, USAGE, DONE):
            wire.chunk(piece)
        wire.send(b"0\r\n\r\n")


def begin_slow(daemon: Daemon, count: int = 1) -> list[Any]:
    replies = [ask(daemon, PATH, {**CHAT, "model": "slow"}, X_Request_Id=f"slow-{n}") for n in range(count)]
    for reply in replies:
        assert reply.status == 200
    return replies


def is_refused(daemon: Daemon) -> bool:
    reply = ask(daemon, PATH, CHAT)
    body = reply.body()
    if reply.status != 503:
        assert reply.status == 200
        return False
    assert json.loads(body)["error"]["code"] == "spool_unavailable"
    assert reply.header("retry-after") is not None
    return True


def completed(daemon: Daemon) -> Counter[str]:
    return Counter(row["request_id"] for row in daemon.rows() if row["status"] == "completed")


def test_at_spool_max_new_requests_are_refused_and_those_that_run_finish_and_are_kept(
    upstream: Make, tmp_path: Path
) -> None:
    (tmp_path / "telemetry.db").write_bytes(NOT_A_DATABASE)
    paced = Paced()
    up = upstream(paced)
    with node(tmp_path, up, telemetry='spool_max = "64KiB"') as daemon:
        replies = begin_slow(daemon, 5)
        served = 0
        while not is_refused(daemon):
            served += 1
            assert served < 2000
        ready, body = daemon.get("/readyz")
        assert ready == 503
        assert "telemetry.spool_max" in body.decode()
        (line,) = events(daemon, "spool_broken")
        assert "the spool is full: telemetry.spool_max is 65536 bytes" in line["reason"]
        assert len(events(daemon, "spool_nearly_full")) == 1
        wait_for(lambda: telemetry(daemon)["spool_share"] >= 1)
        assert telemetry(daemon)["store"]["reason"].endswith("not a database")
        paced.go.set()
        assert all(DONE in reply.body() for reply in replies)
        (tmp_path / "telemetry.db").unlink()
        wait_for(lambda: not is_refused(daemon), 30, 0.2)
        assert events(daemon, "spool_mended")
        expected = {f"slow-{n}" for n in range(5)}
        wait_for(lambda: expected <= completed(daemon).keys(), 20)
        rows = daemon.wait_rows(len(up.requests), 30)
        assert {row["status"] for row in rows} == {"completed"}
        assert max(Counter(row["request_id"] for row in rows).values()) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("reserve=ENOSPC create=ENOSPC", "reserve: No space left on device"),
        ("reserve=EOPNOTSUPP write=ENOSPC", "write: No space left on device"),
        ("write=EIO create=EIO", "new segment: Input/output error"),
    ],
)
def test_a_disk_that_takes_no_more_refuses_new_requests_and_keeps_those_that_run(
    upstream: Make, tmp_path: Path, faults: Callable[[str], None], fault: str, reason: str
) -> None:
    paced = Paced()
    up = upstream(paced)
    faults("reserve=EOPNOTSUPP" if "EOPNOTSUPP" in fault else "")
    # Segments of 64 KiB have a reserve of as much, which a dozen requests use an eighth of.
    with node(tmp_path, up, telemetry='spool_max = "1MiB"') as daemon:
        replies = begin_slow(daemon, 5)
        faults(fault)
        served = 0
        while not is_refused(daemon):
            served += 1
            assert served < 500
        wait_for(lambda: reason in [line["reason"] for line in events(daemon, "spool_broken")])
        assert daemon.get("/readyz")[0] == 503
        paced.go.set()
        assert all(DONE in reply.body() for reply in replies)
        faults("")
        wait_for(lambda: not is_refused(daemon), 30, 0.2)
        assert events(daemon, "spool_mended")
        rows = daemon.wait_rows(len(up.requests), 30)
        assert {f"slow-{n}" for n in range(5)} <= completed(daemon).keys()
        assert max(Counter(row["request_id"] for row in rows).values()) == 1


def test_a_sync_that_fails_is_told_and_its_records_are_in_the_next_segment(
    upstream: Make, tmp_path: Path, faults: Callable[[str], None]
) -> None:
    up = upstream(Paced())
    with node(tmp_path, up, telemetry='durability = "second"') as daemon:
        before = set(os.listdir(tmp_path / "spool"))
        faults("fdatasync=EIO")
        assert DONE in ask(daemon, PATH, CHAT).body()
        line = events(daemon, "spool_sync_failed")[0]
        assert (line["reason"], line["segment"]) == ("Input/output error", 1)
        wait_for(lambda: set(os.listdir(tmp_path / "spool")) - before)
        assert "fsync: Input/output error" in daemon.get("/readyz")[1].decode()
        faults("")
        wait_for(lambda: not is_refused(daemon), 60, 0.2)
        assert "fsync: Input/output error" in [line["reason"] for line in events(daemon, "spool_mended")]
        rows = daemon.wait_rows(len(up.requests), 30)
        assert max(Counter(row["request_id"] for row in rows).values()) == 1


class Quiet:
    def info(self, event: str, /, **fields: Any) -> None: ...

    warning = error = info


def write_stream(state_dir: Path, slot: int, prefix: str, count: int) -> str:
    """What a worker of an earlier life left: `count` segments of one ended request each, and one that never ended."""
    turns: list[Callable[[], None]] = []
    writer = SpoolWriter(ensure_spool_dir(state_dir), slot, 7, "os", Quiet(), turns.append, segment_bytes=100)
    for n in range(1, count + 1):
        name = f"{prefix}-{n}"
        writer.intent(Intent(n, name, 7, "default", 1, "openai", 1.7e9, 3))
        if n < count:
            writer.final(Final(n, 7, 1, 3, 5, 1.7e9, "default", name, "completed", 0, 0, 0, "openai", 1, 10, 20))
        writer.flush()
    writer.close()
    return writer.stream


def test_a_missing_segment_a_damaged_header_garbage_and_a_foreign_file_cost_no_other_row(
    upstream: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "spool"
    whole = write_stream(tmp_path, 0, "whole", 4)
    gap = write_stream(tmp_path, 1, "gap", 4)
    damaged = write_stream(tmp_path, 2, "damaged", 4)
    garbage = write_stream(tmp_path, 3, "garbage", 4)
    assert len({whole, gap, damaged, garbage}) == 4
    (folder / segment_name(gap, 2)).unlink()
    with (folder / segment_name(damaged, 2)).open("r+b") as segment:
        segment.write(b"not a segment")
    with (folder / segment_name(garbage, 2)).open("ab") as segment:
        segment.write(os.urandom(5000))
    (folder / "notes.txt").write_text("mine")
    with node(tmp_path, upstream(Paced())) as daemon:
        rows = daemon.wait_rows(4 + 3 + 3 + 4, 20)
        found = {row["request_id"]: row["status"] for row in rows}
        expected = {f"{prefix}-{n}" for prefix in ("whole", "gap", "damaged", "garbage") for n in range(1, 5)}
        assert expected - found.keys() == {"gap-2", "damaged-2"}
        assert {name for name, status in found.items() if status == "interrupted"} == {
            f"{prefix}-4" for prefix in ("whole", "gap", "damaged", "garbage")
        }
        assert DONE in ask(daemon, PATH, CHAT).body()
        daemon.wait_rows(15)
        assert [line["file"] for line in events(daemon, "spool_foreign_file")] == ["notes.txt"]
        assert [line["file"] for line in events(daemon, "spool_segment_damaged")] == [segment_name(damaged, 2)]
        (missing,) = events(daemon, "spool_segments_missing")
        assert (missing["stream"], missing["first"], missing["segments"]) == (gap, 2, 1)
        (cut,) = events(daemon, "spool_tail_cut")
        assert (cut["level"], cut["stream"], cut["bytes"]) == ("error", garbage, 5000)
        document = json.loads(spool(daemon, "--json"))
        assert {(one["file"], one["kind"]) for one in document["files"]} == {
            ("notes.txt", "foreign"),
            (segment_name(damaged, 2) + ".damaged", "damaged"),
            (segment_name(garbage, 2) + ".damaged", "damaged"),
        }
        assert document["reader_pid"] == daemon.child("telemetry")
        (live,) = document["streams"]
        assert (live["state"], live["rows"], live["open"]) == ("live", 0, 0)
        assert "file that is not read" in spool(daemon)


def execute(folder: Path, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "telemetry.db", timeout=30)) as database:
        database.execute(sql)
        database.commit()


def test_a_row_that_the_store_refuses_is_listed_and_stored_by_a_retry_once_whoever_is_killed(
    upstream: Make, tmp_path: Path
) -> None:
    with node(tmp_path, upstream(Paced())) as daemon:
        assert DONE in ask(daemon, PATH, CHAT).body()
        daemon.wait_rows(1)
        execute(
            tmp_path,
            "CREATE TRIGGER refuse BEFORE INSERT ON sys_ai_transactions WHEN NEW.request_id LIKE 'bad-%'"
            " BEGIN SELECT RAISE(ABORT, 'no such tenant'); END",
        )
        for n in range(3):
            for name in (f"bad-{n}", f"good-{n}"):
                assert DONE in ask(daemon, PATH, CHAT, X_Request_Id=name).body()
        daemon.wait_rows(4)
        assert events(daemon, "rows_refused")
        assert wait_for(lambda: telemetry(daemon)["dead_letters"]) == 3
        assert telemetry(daemon)["rows"]["dead"] == 3
        dead = json.loads(spool(daemon, "--json"))["dead_letters"]
        assert [one["row"]["request_id"] for one in dead["newest"]] == ["bad-2", "bad-1", "bad-0"]
        assert "no such tenant" in dead["newest"][0]["reason"]
        # Still refused: they come back. Nobody is there to read them at first.
        os.kill(daemon.child("telemetry"), signal.SIGKILL)
        assert "3 rows re-queued" in spool(daemon, "--retry")
        assert events(daemon, "requeue_ended")
        assert wait_for(lambda: telemetry(daemon)["dead_letters"]) == 3
        execute(tmp_path, "DROP TRIGGER refuse")
        assert "3 rows re-queued" in spool(daemon, "--retry")
        with contextlib.suppress(AssertionError, ProcessLookupError):
            os.kill(daemon.child("telemetry"), signal.SIGKILL)
        rows = daemon.wait_rows(7, 20)
        assert max(Counter(row["request_id"] for row in rows).values()) == 1
        assert {f"bad-{n}" for n in range(3)} <= {row["request_id"] for row in rows}
        assert "nothing to store again" in spool(daemon, "--retry")
        wait_for(lambda: telemetry(daemon)["requeue_bytes"] == telemetry(daemon)["dead_letters"] == 0)
        assert not [name for name in os.listdir(tmp_path / "spool") if "requeue" in name or "dead" in name]


def test_letters_re_queued_while_the_daemon_is_stopped_are_stored_by_the_next_start(
    upstream: Make, tmp_path: Path
) -> None:
    refuse = (
        "CREATE TRIGGER refuse BEFORE INSERT ON sys_ai_transactions WHEN NEW.request_id LIKE 'bad%'"
        " BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    with node(tmp_path, upstream(Paced())) as daemon:
        ask(daemon, PATH, CHAT).body()
        daemon.wait_rows(1)
        execute(tmp_path, refuse)
        ask(daemon, PATH, CHAT, X_Request_Id="bad").body()
        assert events(daemon, "rows_refused")
        daemon.close_clients()
        assert daemon.stop() == 0
        execute(tmp_path, "DROP TRIGGER refuse")
        assert "the next start of proxyd stores them" in spool(daemon, "--retry")
        assert "no process stores them now" in spool(daemon)
        daemon.start()
        rows = daemon.wait_rows(2)
        assert [row["request_id"] for row in rows][1] == "bad"
