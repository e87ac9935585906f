"""`proxyd status` and `proxyd top`: what is shown, at which width and height, and what a pipe gets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from proxyd.cli.board import Now, blocks, short_count
from proxyd.cli.grid import STYLES, Block, cut, fit, grid, note, plain
from proxyd.cli.screen import LOOKS, text_of
from proxyd.cli.status import page
from proxyd.cli.top import View, frame
from proxyd.config.values import Listen

ADMIN = Listen("unix", path="/run/proxyd/admin.sock")
FINDING = "error /etc/proxyd/proxyd.toml:12 server.worker: there is no such key; did you mean workers? " + "x" * 200


def process(pid: int, **more: Any) -> dict[str, Any]:
    return {
        "pid": pid,
        "epoch": 7,
        "state": "ready",
        "streams": 30_000,
        "restarts": 12,
        "age_s": 260_000.0,
        "silent_s": 0.05,
        **more,
    }


def latency() -> dict[str, Any]:
    return {"count": 12_345_678, "mean": 0.001, "p50": 0.00012345, "p95": 0.123, "p99": 1.5, "p99.9": 12.3}


def document(workers: int = 2, upstreams: int = 1, **more: Any) -> dict[str, Any]:
    """A node that is busy and in trouble."""
    return {
        "version": "0.1.0",
        "pid": 4_194_303,
        "state": "ready",
        "uptime_s": 260_000.0,
        "workers": [process(4_000_000 + slot, slot=slot, seat=slot, generation=12) for slot in range(workers)],
        "generations": [
            {
                "generation": 12,
                "state": "serving",
                "since_s": 40.0,
                "ends_in_s": None,
                "workers": workers,
                "streams": 30_000,
                "version": "0.1.0",
            }
        ],
        "last_reload": None,
        "alerts": [],
        "requests": {"answered": 1_234_567_890, "per_s": 1234.5, "by_status": {}, "client_aborts": 1_234_567},
        "streams": {
            "active": 60_000,
            "by_tenant": {},
            "events": 1_234_567_890_123,
            "events_per_s": 123_456.7,
            "bytes": 5 * 2**40,
            "bytes_per_s": 31_000_000.0,
            "backpressure": {},
        },
        "latency": {
            f"proxyd_{name}_seconds": {"last_minute": latency(), "since_start": latency()}
            for name in ("time_to_first_event", "relay_lag", "telemetry_lag", "loop_lag")
        },
        "tokens": {},
        "upstreams": {
            f"a-provider-with-a-long-name-{number}": {
                "breaker": "half_open",
                "connections": {"idle": 2560, "busy": 16_000, "connecting": 400},
                "pool": {"idle": 2560, "active": 16_000, "connecting": 400},
                "connects": 12_345_678,
                "reuse_ratio": 0.99987,
                "errors": {f"status_5{kind:02}": 1000 + kind for kind in range(20)},
                "failing_since": 1_800_000_000,
                "failing_kind": "connect_timeout",
            }
            for number in range(upstreams)
        },
        "telemetry": process(4_100_000)
        | {
            "rows": {"stored": 1_234_567_890, "interrupted": 12, "dead": 3},
            "store": {"failing_since": 1_800_000_000, "reason": "mysql proxyd@db/proxyd: gone away " * 12},
            "spool_bytes": 123_456_789,
            "spool_used": 4 * 2**30 - 1,
            "spool_max": 4 * 2**30,
            "spool_share": 0.99,
            "dead_letters": 3,
            "requeue_bytes": 2048,
            "groups": 123_456,
            "groups_per_s": 48.05,
            "group_rows": 987.6,
            "lag": latency(),
        },
        "spool": {},
        "sockets": {"time_wait": 28_000},
        **more,
    }


def trouble() -> dict[str, Any]:
    """Everything at once: an alert, a reload that was refused, a generation that drains, a worker that is silent."""
    found = document(
        alerts=[
            {
                "alert": "p99_latency > 200ms",
                "active": True,
                "since": 1_800_000_000,
                "value": 312.4,
                "threshold": 200.0,
                "unit": "ms",
            },
            {
                "alert": "queue_depth > 800",
                "active": False,
                "since": None,
                "value": 0.0,
                "threshold": 800.0,
                "unit": "",
            },
        ],
        last_reload={
            "kind": "reload",
            "ok": False,
            "at": 1_800_000_000.5,
            "took_s": 0.42,
            "generation": 12,
            "detail": "2 errors in /etc/proxyd/proxyd.toml",
            "findings": [FINDING, "error 2", "error 3", "error 4", "error 5"],
        },
    )
    found["generations"].append(
        {
            "generation": 11,
            "state": "draining",
            "since_s": 32.0,
            "ends_in_s": 88.0,
            "workers": 2,
            "streams": 1,
            "version": "0.0.9",
        }
    )
    found["workers"].append(process(3_900_000, slot=0, seat=9, generation=11, state="draining", silent_s=12.0))
    return found


def screenful(status: dict[str, Any], width: int = 80, height: int = 24) -> list[str]:
    view = View(lambda: status, ADMIN)
    view.look(1000.0)
    return [plain(line) for line in frame(view, width, height, 1000.0, 1_800_000_000.0, 2.0)]


def rendered(status: dict[str, Any], width: int, height: int) -> list[str]:
    """As rich puts it on a terminal of this size, without the codes."""
    view = View(lambda: status, ADMIN)
    view.look(1000.0)
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, highlight=False, markup=False, emoji=False, no_color=True)
    console.print(text_of(frame(view, width, height, 1000.0, 1_800_000_000.0, 2.0)))
    return out.getvalue().removesuffix("\n").split("\n")


# --- 80 columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [document, trouble])
def test_top_at_80_by_24_keeps_to_its_size_and_cuts_no_figure(make: Any) -> None:
    lines = screenful(make())
    assert len(lines) == 24
    assert max(map(len, lines)) <= 80
    assert rendered(make(), 80, 24) == lines
    heads = [line for line in lines if line.startswith(("process", "last minute", "upstream "))]
    assert [line.split()[-1] for line in heads] == ["up", "p99.9", "errors"]
    for line in lines:
        if "…" in line:  # only a name or a sentence may be cut, and says so
            assert line.startswith(("a-provider", "store failing", "  ")), line
    text = "\n".join(lines)
    for whole in ("4194303", "30000", "half_open", "16000", "12.3M", "100.0%", "1.5 s", "12.3 s", "123 us"):
        assert whole in text, whole


def test_what_is_wrong_comes_first_and_stays_when_there_is_no_room() -> None:
    lines = screenful(trouble())
    text = "\n".join(lines)
    assert "ALERT: p99_latency > 200ms since 2027-01-15 08:00:00 UTC, now 312.4ms" in text
    assert "queue_depth" not in text
    assert "last reload: FAILED at 2027-01-15 08:00:00 UTC, took 420 ms: 2 errors in" in text
    assert "generation 11: draining for 32s, 1 stream, 2 workers, ends within 1m 28s" in text
    assert "draining, silent 12s" in text
    assert text.index("ALERT") < text.index("last reload") < text.index("generation 11") < text.index("worker 0")


def test_a_calm_node_s_page_has_blank_lines_and_no_word_of_trouble() -> None:
    calm = document()
    calm["upstreams"] = {"openai": next(iter(calm["upstreams"].values())) | {"errors": {}, "failing_since": None}}
    calm["telemetry"] |= {"store": None, "dead_letters": 0, "requeue_bytes": 0}
    lines = screenful(calm, height=30)
    assert "" in lines[:-1]
    assert not any(word in "\n".join(lines) for word in ("ALERT", "FAILED", "generation 12:", "... and", "…"))
    assert lines[-1] == "q quits  08:00:00 UTC  every 2 s"


def test_many_workers_leave_room_for_the_rest_and_say_how_many_are_missing() -> None:
    lines = screenful(document(workers=64, upstreams=12))
    text = "\n".join(lines)
    assert len(lines) == 24
    assert "telemetry" in text
    assert text.count("... and ") >= 2
    shown = sum(line.startswith("worker ") for line in lines)
    more = next(line for line in lines if line.startswith("... and"))  # the workers' is the first
    assert int(more.split()[2]) + shown == 64


@pytest.mark.parametrize("width", [20, 40, 60, 79, 80, 81, 120, 250])
@pytest.mark.parametrize("height", [3, 10, 24, 100])
def test_no_line_is_longer_and_no_screen_taller_than_the_terminal(width: int, height: int) -> None:
    for status in (document(), trouble(), document(workers=40, upstreams=20)):
        lines = screenful(status, width, height)
        assert len(lines) == height
        assert max(map(len, lines)) <= width


# --- a pipe --------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_whole_lines_of_plain_text() -> None:
    text = page(trouble())
    assert text.isprintable() or set(text) - set(map(chr, range(32, 127))) <= {"\n"}
    assert f"  {FINDING}" in text.splitlines()
    assert "error 5" in text
    assert "mysql proxyd@db/proxyd: gone away " * 11 in text
    assert "1234567890 answered" in text
    assert not any(box in text for box in "│─┌…\x1b")
    assert any(len(line) > 250 for line in text.splitlines())


def test_a_pipe_s_columns_are_never_cut() -> None:
    text = page(document(workers=40))
    assert "a-provider-with-a-long-name-0" in text
    assert sum(line.startswith("worker ") for line in text.splitlines()) == 40
    assert "12345678" in text


def test_text_of_others_cannot_write_on_the_terminal() -> None:
    last = {"kind": "reload", "ok": False, "at": 1.0, "detail": "\x1b[2Jgone\r\n", "findings": []}
    status = document(last_reload=last)
    for text in (page(status), "\n".join(screenful(status))):
        assert "\x1b" not in text
        assert "\\x1b[2Jgone\\x0d\\x0a" in text


def test_a_good_reload_is_one_line() -> None:
    last = {"kind": "upgrade", "ok": True, "at": 1.0, "took_s": 1.25, "generation": 13, "detail": "", "findings": []}
    lines = page(document(last_reload=last)).splitlines()
    assert "last upgrade: done at 1970-01-01 00:00:01 UTC, generation 13, took 1.25 s" in lines


def test_a_daemon_of_the_version_before_can_be_shown() -> None:
    """During an upgrade the command is newer than the daemon."""
    old = document()
    for key in ("generations", "last_reload", "alerts", "spool"):
        del old[key]
    del old["requests"]["per_s"], old["streams"]["events_per_s"], old["streams"]["bytes_per_s"]
    for worker in old["workers"]:
        del worker["seat"], worker["generation"]
    for upstream in old["upstreams"].values():
        del upstream["pool"]
    assert "16000" in page(old)
    assert max(map(len, screenful(old))) <= 80


# --- top: looks ----------------------------------------------------------------------------------------------------


class Daemon:
    """What is answered, one after the other."""

    def __init__(self, *answers: dict[str, Any] | Exception) -> None:
        self.answers: Iterator[dict[str, Any] | Exception] = iter(answers)

    def __call__(self) -> dict[str, Any]:
        answer = next(self.answers)
        if isinstance(answer, Exception):
            raise answer
        return answer


def counted(answered: int, events: int, pid: int = 1) -> dict[str, Any]:
    found = document(pid=pid)
    found["requests"]["answered"] = answered
    found["streams"] |= {"events": events, "bytes": events * 100}
    return found


def test_rates_are_of_what_happened_between_two_looks_at_one_daemon() -> None:
    view = View(Daemon(counted(10, 100), counted(20, 1100), counted(5, 0, pid=2), counted(7, 0, pid=2)), ADMIN)
    found = []
    for now in (1000.0, 1002.0, 1004.0, 1006.0):
        assert view.look(now)
        found.append(view.now())
    assert found == [None, Now(5.0, 500.0, 50_000.0), None, Now(1.0, 0.0, 0.0)]


def test_a_daemon_that_restarts_is_waited_for_and_what_is_old_says_so() -> None:
    view = View(Daemon(document(), ConnectionRefusedError(), TimeoutError(), document()), ADMIN)
    assert view.look(1000.0)
    assert not view.look(1002.0)
    assert not view.look(1009.0)
    lines = [plain(line) for line in frame(view, 80, 24, 1010.0, 0.0, 2.0)]
    assert lines[0].startswith("waiting for unix:/run/proxyd/admin.sock (8s): ")
    assert "what follows is 10s old" in lines
    assert any(line.startswith("proxyd 0.1.0: ready") for line in lines)
    assert [plain(line) for line in fit(view.blocks(None, 1010.0), None)] == [
        "waiting for unix:/run/proxyd/admin.sock (8s): unix:/run/proxyd/admin.sock does not answer in time: every"
        " worker is busy or stuck"
    ]
    assert view.look(1011.0)
    assert view.why == ""
    assert not any("waiting" in plain(line) for line in frame(view, 80, 24, 1010.0, 0.0, 2.0))


def test_nothing_but_the_waiting_is_shown_before_the_first_answer() -> None:
    view = View(Daemon(FileNotFoundError()), ADMIN)
    assert not view.look(1000.0)
    lines = [plain(line) for line in frame(view, 80, 24, 1000.0, 0.0, 2.0)]
    assert "".join(lines[:3]).startswith("waiting for unix:/run/proxyd/admin.sock (0s): not running: nothing")
    assert set(lines[3:-1]) == {""}


# --- lines ---------------------------------------------------------------------------------------------------------


def test_columns_that_do_not_fit_shorten_the_name_and_then_leave_out_the_last() -> None:
    rows = [["a-name-of-some-length", "1", "22"], ["b", "333", "4"]]
    assert [plain(line) for line in grid(["name", "x", "longer"], rows, None)] == [
        "name                     x  longer",
        "a-name-of-some-length    1      22",
        "b                      333       4",
    ]
    assert [plain(line) for line in grid(["name", "x", "longer"], rows, 24)] == [
        "name           x  longer",
        "a-name-of-…    1      22",
        "b            333       4",
    ]
    assert plain(grid(["name", "x", "longer"], rows, 17)[0]) == "name            x"
    assert [plain(line) for line in grid(["name", "x"], [], 80)] == ["name  x"]


def test_a_sentence_is_wrapped_whole_or_ends_in_an_ellipsis() -> None:
    assert [plain(line) for line in note("one two three", 8)] == ["one two", "  three"]
    assert [plain(line) for line in note("one two three", None)] == ["one two three"]
    assert [plain(line) for line in note("one two three four five", 8, "", 2)] == ["one two", "  three…"]
    assert cut("abcdef", 4) == "abc…"
    assert cut("abc", 3) == "abc"


def test_blocks_shrink_from_the_longest_and_say_so() -> None:
    many, few = Block([((str(n), ""),) for n in range(9)], 3), Block([(("x", ""),)], 1)
    assert [plain(line) for line in fit([many, few], None)][9:] == ["", "x"]
    assert [plain(line) for line in fit([many, few], 10)] == [*"012345678", "x"]
    assert [plain(line) for line in fit([many, few], 6)] == ["0", "1", "2", "3", "... and 5 more", "x"]
    assert [plain(line) for line in fit([many, few], 2)] == ["0", "1"]
    lone = Block(many.lines, 0)
    assert [plain(line) for line in fit([lone, few], 2)] == ["0", "x"]
    assert [plain(line) for line in fit([lone, few], 1)] == ["x"]


def test_every_style_has_a_look_and_none_is_used_that_has_not() -> None:
    assert set(LOOKS) == set(STYLES)
    used = {style for block in blocks(trouble(), 80) for line in block.lines for _, style in line}
    assert used <= set(STYLES)
    assert {"good", "warn", "bad", "head"} <= used


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999_999, "999999"), (1_000_000, "1M"), (999_500_000, "1G"), (12_345_678, "12.3M")]
)
def test_a_large_count_is_short_on_a_terminal(count: int, text: str) -> None:
    assert short_count(count, 80) == text
    assert short_count(count, None) == str(count)
