"""Log lines: their form, their limit, and sinks that take nothing."""

import contextlib
import json
import os
import pty
import resource

import pytest

from proxyd.clock import FakeClock
from proxyd.config.secrets import Secret
from proxyd.log import LINES_PER_WINDOW, LOSS_REPEAT_S, MAX_BUFFER_BYTES, WINDOW_S, Log, Sink


class Target:
    """A log whose events go to one file and whose access log goes to another."""

    def __init__(self, path, **options):
        self.clock = FakeClock(wall=1_700_000_000.123)
        self.events_path, self.access_path = path / "events", path / "access"
        self.log = Log(
            clock=self.clock,
            events=Sink(path=str(self.events_path)),
            access=str(self.access_path),
            process="w",
            **options,
        )

    def events(self):
        self.log.flush()
        return [json.loads(line) for line in self.events_path.read_text().splitlines()]

    def access(self):
        self.log.flush()
        return [json.loads(line) for line in self.access_path.read_text().splitlines()]


@pytest.fixture
def target(tmp_path):
    return Target(tmp_path)


def test_an_event_is_one_json_object_a_line(target):
    target.log.warning("upstream_down", upstream="a", count=3, text="two\nlines")
    assert target.events() == [
        {
            "time": "2023-11-14T22:13:20.123Z",
            "level": "warning",
            "event": "upstream_down",
            "process": "w",
            "upstream": "a",
            "count": 3,
            "text": "two\nlines",
        }
    ]


def test_nothing_is_written_before_the_flush(target):
    target.log.info("a")
    assert target.events_path.read_bytes() == b""
    target.log.flush()
    assert target.events_path.read_bytes().endswith(b"\n")


def test_events_below_the_level_are_left_out(tmp_path):
    target = Target(tmp_path, level="warning")
    for write in (target.log.debug, target.log.info, target.log.warning, target.log.error):
        write("x")
    assert [line["level"] for line in target.events()] == ["warning", "error"]


def test_a_secret_is_stars_in_every_place(target):
    target.log.info("x", a=Secret(b"hush"), b=[Secret(b"hush")], c={"d": Secret(b"hush")})
    target.log.access({"key": Secret(b"hush")})
    assert target.access()[0]["key"] == "***"
    assert (target.events()[0]["a"], target.events()[0]["b"], target.events()[0]["c"]) == ("***", ["***"], {"d": "***"})


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", [b"\xff\x00", "\ud800", 10**40, float("nan"), Unprintable(), {1: object()}, "x" * 10_000, None, {1, 2}]
)
def test_no_value_is_too_odd_for_a_line(target, value):
    target.log.error("odd", value=value)
    line = target.events()[0]
    assert line["event"] == "odd"
    assert len(json.dumps(line)) < 5000


def test_a_text_line_is_for_people(tmp_path):
    target = Target(tmp_path, format="text")
    target.log.info("start", port=80, name="plain", said='a "b"\n', empty="")
    target.log.flush()
    expected = '2023-11-14T22:13:20.123Z info start process=w port=80 name=plain said="a \\"b\\"\\n" empty=""\n'
    assert target.events_path.read_text() == expected


def test_one_kind_of_event_is_limited_and_the_rest_is_counted(target):
    for number in range(LINES_PER_WINDOW + 7):
        target.log.error("flood", number=number)
    target.log.error("other")
    target.clock.advance(WINDOW_S)
    target.log.error("flood", number=-1)
    lines = target.events()
    assert [line["event"] for line in lines].count("flood") == LINES_PER_WINDOW + 1
    assert [(line["of"], line["dropped"]) for line in lines if line["event"] == "log_limited"] == [("flood", 7)]
    assert any(line["event"] == "other" for line in lines)


def test_a_flood_that_ended_is_reported_by_a_later_flush(target):
    for _ in range(LINES_PER_WINDOW + 1):
        target.log.error("flood")
    assert not [line for line in target.events() if line["event"] == "log_limited"]
    target.clock.advance(WINDOW_S)
    target.log.flush()
    assert [line["dropped"] for line in target.events() if line["event"] == "log_limited"] == [1]


def test_the_end_of_a_process_tells_what_was_held_back(target):
    for _ in range(LINES_PER_WINDOW + 3):
        target.log.error("flood")
    target.log.end()
    assert [line["dropped"] for line in target.events() if line["event"] == "log_limited"] == [3]


def test_the_access_log_is_never_limited(target):
    for number in range(LINES_PER_WINDOW * 3):
        target.log.access({"number": number})
    assert [line["number"] for line in target.access()] == list(range(LINES_PER_WINDOW * 3))


def test_the_access_log_may_be_off(tmp_path):
    log = Log(access="off", events=Sink(path=str(tmp_path / "e")))
    log.access({"a": 1})
    log.flush()
    assert (tmp_path / "e").read_bytes() == b""


def test_a_file_that_cannot_be_opened_is_said_at_once(tmp_path):
    with pytest.raises(OSError, match="No such file"):
        Log(access=str(tmp_path / "none" / "access.log"))


def test_a_full_disk_costs_lines_and_no_exception():
    with open("/dev/full", "wb", buffering=0) as full:
        sink = Sink(full.fileno())
        sink.put(b"one\n")
        sink.put(b"two\n")
        sink.flush()
        assert sink.dropped_lines == 2


def test_a_closed_reader_costs_lines_and_no_exception():
    reader, writer = os.pipe()
    os.close(reader)
    sink = Sink(writer)
    sink.put(b"one\n")
    sink.flush()
    os.close(writer)
    assert sink.dropped_lines == 1


def test_a_closed_descriptor_costs_lines_and_no_exception():
    reader, writer = os.pipe()
    sink = Sink(writer)
    os.close(writer)
    os.close(reader)
    sink.put(b"one\n")
    sink.flush()
    assert sink.dropped_lines == 1


def test_lost_lines_are_reported_when_lines_get_through_again(tmp_path):
    target = Target(tmp_path)
    target.log._events.dropped_lines = 5
    target.log.flush()
    assert [(line["event"], line["lines"]) for line in target.events()] == [("log_lines_lost", 5)]


def test_a_reader_that_stalls_never_blocks_us_and_loses_no_order():
    """The pipe is a blocking one, as a service manager gives it: a plain write would hang here."""
    reader, writer = os.pipe()
    sink = Sink(writer)
    line = b"%06d" + b"x" * 93 + b"\n"
    for number in range(2000):
        sink.put(line % number)
    sink.flush()
    assert sink.dropped_lines == 0
    received = b""
    while len(received) < 2000 * 100:
        received += os.read(reader, 65536)
        sink.flush()
    assert received == b"".join(line % number for number in range(2000))
    os.close(reader)
    os.close(writer)


def test_a_stalled_sink_holds_a_bounded_buffer():
    reader, writer = os.pipe()
    sink = Sink(writer)
    line = b"x" * 999 + b"\n"
    for _ in range(2 * MAX_BUFFER_BYTES // len(line)):
        sink.put(line)
    assert sink.dropped_lines > 0
    assert sum(map(len, sink._buffer)) <= MAX_BUFFER_BYTES
    os.close(reader)
    os.close(writer)


def test_pieces_for_a_pipe_are_whole_lines_of_at_most_pipe_buf():
    """Two workers on one pipe: the kernel keeps a write of up to 4096 bytes in one piece, and no more (pipe(7))."""
    reader, writer = os.pipe()
    sink = Sink(writer)
    for _ in range(10):
        sink.put(b"x" * 999 + b"\n")
    assert sink._lines_for_pipe() == 4
    sink.put(b"y\n")
    sink.flush()
    assert os.read(reader, 65536).count(b"\n") == 11
    os.close(reader)
    os.close(writer)


def test_a_child_does_not_write_its_parents_lines_again(target):
    target.log.info("before")
    child = target.log.child("worker 1")
    child.info("own")
    child.flush()
    target.log.flush()
    assert [(line["event"], line["process"]) for line in target.events()] == [("own", "worker 1"), ("before", "w")]


def test_reopen_follows_a_rotated_file(target):
    target.log.access({"n": 1})
    target.log.flush()
    target.access_path.rename(target.access_path.with_suffix(".1"))
    target.log.reopen()
    target.log.access({"n": 2})
    assert [line["n"] for line in target.access()] == [2]
    assert json.loads(target.access_path.with_suffix(".1").read_text())["n"] == 1


def test_a_failing_reopen_keeps_the_old_file_and_says_so(target):
    target.log.flush()
    moved = target.access_path.with_suffix(".1")
    target.access_path.rename(moved)
    target.access_path.mkdir()
    target.log.reopen()
    target.log.access({"n": 1})
    assert [line["event"] for line in target.events()] == ["log_reopen_failed"]
    assert json.loads(moved.read_text())["n"] == 1


@contextlib.contextmanager
def files_of_at_most(size):
    """What a full disk does to a file, for one that is no disk: a short write, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_line_that_was_cut_by_a_full_disk_ends_before_the_next_one(target):
    target.log.access({"n": 1})
    target.log.flush()
    size = target.access_path.stat().st_size
    with files_of_at_most(size + 7):
        target.log.access({"n": 2})
        for _ in range(3):
            target.log.flush()
    target.log.access({"n": 3})
    target.log.flush()
    first, cut, last = target.access_path.read_bytes().splitlines()
    assert (json.loads(first)["n"], len(cut), json.loads(last)["n"]) == (1, 7, 3)


def test_another_process_ends_the_line_that_was_cut(target):
    other = target.log.child("other")
    other.access({"n": 0})
    other.flush()
    with files_of_at_most(target.access_path.stat().st_size + 7):
        for log in (target.log, other):
            log.access({"n": 1})
            log.flush()
            log.flush()
    other.access({"n": 2})
    other.flush()
    target.log.access({"n": 3})
    target.log.flush()
    lines = target.access_path.read_bytes().splitlines()
    assert [json.loads(line)["n"] for line in (lines[0], *lines[2:])] == [0, 2, 3]


def test_a_full_disk_under_the_access_log_is_told_at_once_each_minute_and_when_it_is_over(target):
    with files_of_at_most(0):
        # What tells of it must not be full itself; so it is on a pipe here.
        reader, writer = os.pipe()
        target.log._events = Sink(writer)
        for _ in range(10):
            target.log.access({"n": 1})
            target.log.flush()
        target.clock.advance(LOSS_REPEAT_S)
        target.log.access({"n": 1})
        target.log.flush()
        target.log.access({"n": 1})
        target.log.flush()
    target.log.access({"n": 2})
    target.log.flush()
    target.log.flush()
    told = [json.loads(line) for line in os.read(reader, 65536).splitlines()]
    assert [(line["sink"], line["lines"], line["reason"]) for line in told] == [
        ("access", 1, "File too large"),
        ("access", 10, "File too large"),
        ("access", 1, "over"),
    ]
    assert [line["n"] for line in target.access()] == [2]
    os.close(reader)
    os.close(writer)


def test_a_pipe_that_somebody_else_filled_after_the_look_at_it_is_not_waited_for():
    reader, writer = os.pipe()
    sink = Sink(writer)
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    with pytest.raises(BlockingIOError):
        sink._write_now(b"line\n")
    os.close(reader)
    os.close(writer)


def test_a_terminal_is_written_to_as_it_is():
    master, slave = pty.openpty()
    sink = Sink(slave)
    sink.put(b"line\n")
    sink.flush()
    assert os.read(master, 100) == b"line\r\n"
    os.close(master)
    os.close(slave)
