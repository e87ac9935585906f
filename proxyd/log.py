"""Log lines: one JSON object (or one text line) each, buffered, written once a loop turn, never an exception.

Owns: the format of a line, the rate limit per event kind, two sinks (events on stderr, the access log where it should).
Must not know: requests, configuration models, processes.
Invariants:
- Writing never blocks and never raises. A sink that takes nothing (full disk, closed or stalled pipe) costs at most
  MAX_BUFFER_BYTES of memory; what did not fit is counted, told once a minute while it lasts and when it is over.
- Lines of several processes on one pipe never mix: a pipe gets whole lines in pieces of at most PIPE_BUF bytes. A file
  that was full in the middle of a line has its line end before the next one.
- A value whose `str()` is "***" (config.secrets.Secret) is printed so: unknown types go through `str()`.

     info() -> rate limit -> encode -> [ sink buffer ] -> flush(): one write
"""

from __future__ import annotations

import errno
import os
import select
import stat
import sys
import time
from typing import Any, Literal

import orjson

from proxyd.clock import SYSTEM, Clock

Level = Literal["debug", "info", "warning", "error"]
_RANK: dict[str, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}

# What waits for a sink that takes nothing. Half: a short disk stall loses lines; twice: memory for a broken sink only.
MAX_BUFFER_BYTES = 256 * 1024
# Flushed early at this size, so that one busy turn is a few writes and not one huge one.
EARLY_FLUSH_BYTES = 64 * 1024
# POSIX: a write of at most PIPE_BUF bytes to a pipe is not interleaved with another process's (pipe(7); 4096 on Linux).
PIPE_BUF = select.PIPE_BUF
# A burst of one kind of event is a picture of the fault, the rest of it is noise: this many lines of a kind a window.
LINES_PER_WINDOW = 50
WINDOW_S = 10.0
# Between two lines about one sink that takes nothing.
LOSS_REPEAT_S = 60.0
# A text value is cut here: a peer may put what it likes into what we quote.
MAX_TEXT = 2000


class Sink:
    """A buffered writer on a descriptor or a file that it opened itself.

    States: open (`fd` >= 0) or closed. Errors end in `dropped_lines`, never in an exception after construction.
    `reason` is the system's word for what keeps it from taking lines, "" when it took the last ones.
    """

    __slots__ = ("_buffer", "_bytes", "_may_nowait", "_path", "_poll", "dropped_lines", "fd", "reason", "told_s")

    def __init__(self, fd: int = -1, path: str = "") -> None:
        """Takes `fd` as it is, or opens `path` for appending; raises OSError when that cannot be done."""
        self._path = path
        self._buffer: list[bytes] = []
        self._bytes = 0
        self.dropped_lines = 0
        self.reason = ""
        self.told_s: float | None = None
        self._may_nowait = True
        self.fd = self._open() if path else fd
        self._poll = self._make_poll()

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)

    def _make_poll(self) -> select.poll | None:
        """A poll object for what may stall (pipe, socket, terminal); None for files, which cannot be polled."""
        try:
            if self.fd < 0 or stat.S_ISREG(os.fstat(self.fd).st_mode):
                return None
            poll = select.poll()
            poll.register(self.fd, select.POLLOUT)
        except OSError:
            return None
        return poll

    def put(self, line: bytes) -> None:
        """Queues one line, newline included."""
        if self._bytes + len(line) > MAX_BUFFER_BYTES:
            self.dropped_lines += 1
            self.reason = self.reason or "its reader takes nothing"
            return
        self._buffer.append(line)
        self._bytes += len(line)
        if self._bytes >= EARLY_FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what waits, as far as the other side takes it at once."""
        if not self._buffer or self.fd < 0:
            return
        try:
            if self._poll is None:
                if self.reason and self._is_mid_line():
                    self._buffer.insert(0, b"\n")
                    self._bytes += 1
                self._write(len(self._buffer))
            else:
                while self._buffer and self._is_writable():
                    self._write(self._lines_for_pipe())
        except BlockingIOError:
            return
        except OSError as error:
            self.reason = error.strerror or str(error)
            self.dropped_lines += sum(piece.count(b"\n") for piece in self._buffer if piece != b"\n")
            self._buffer.clear()
            self._bytes = 0
            return
        if not self._buffer:
            self.reason = ""

    def _is_mid_line(self) -> bool:
        """Whether a file that was full ends within a line, ours or another process's."""
        try:
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            size = os.fstat(fd).st_size
            return size > 0 and os.pread(fd, 1, size - 1) != b"\n"
        except OSError:
            return False
        finally:
            os.close(fd)

    def _is_writable(self) -> bool:
        assert self._poll is not None
        return any(flags & select.POLLOUT for _, flags in self._poll.poll(0)) or self._is_broken()

    def _is_broken(self) -> bool:
        """True when the reader is gone: the write must happen, to fail and empty the buffer."""
        assert self._poll is not None
        return any(flags & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, flags in self._poll.poll(0))

    def _lines_for_pipe(self) -> int:
        """How many whole lines fit into one atomic write; at least one."""
        size = 0
        for count, line in enumerate(self._buffer):
            size += len(line)
            if size > PIPE_BUF:
                return max(1, count)
        return len(self._buffer)

    def _write(self, lines: int) -> None:
        data = b"".join(self._buffer[:lines])
        written = self._write_now(data)
        rest = [data[written:]] if written < len(data) else []
        self._buffer[:lines] = rest
        self._bytes -= written

    def _write_now(self, data: bytes) -> int:
        """Never waits: who shares a pipe or a socket with us may have filled it since the poll said that there is
        room. RWF_NOWAIT is pwritev2(2)'s; who does not know it (a terminal, an old filter of
        system calls) is written to as it is."""
        if self._poll is not None and self._may_nowait:
            try:
                return os.pwritev(self.fd, [data], -1, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE, errno.ENOSYS, errno.EPERM):
                    raise
                self._may_nowait = False
        return os.write(self.fd, data)

    def close(self) -> None:
        """Closes what it opened itself."""
        if self._path and self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def reopen(self) -> str | None:
        """Opens the path anew (after logrotate moved the file); on failure the old file stays. Returns what failed."""
        if not self._path:
            return None
        self.flush()
        try:
            fresh = self._open()
        except OSError as error:
            return f"{self._path}: {error.strerror}"
        os.close(self.fd)
        self.fd = fresh
        self._poll = self._make_poll()
        return None

    def twin(self) -> Sink:
        """The same target with an empty buffer, for a forked child: the parent's lines stay the parent's to write."""
        other = Sink.__new__(Sink)
        other.fd, other._path, other._poll = self.fd, self._path, self._poll
        other._buffer, other._bytes, other.dropped_lines = [], 0, 0
        other.reason, other.told_s, other._may_nowait = "", None, self._may_nowait
        return other


class _Rate:
    """Lines of one event kind in the window that began at `since`."""

    __slots__ = ("count", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.count = 0


class Log:
    """The log of one process. Events go to stderr; the access log to stdout, a file or nowhere."""

    def __init__(
        self,
        *,
        level: Level = "info",
        format: Literal["json", "text"] = "json",
        access: str = "stdout",
        process: str = "",
        clock: Clock = SYSTEM,
        events: Sink | None = None,
    ) -> None:
        """Raises OSError when `access` names a file that cannot be opened; nothing raises afterwards."""
        self._threshold = _RANK[level]
        self._text = format == "text"
        self._clock = clock
        self._process = process
        self._events = events if events is not None else Sink(2)
        self._access: Sink | None = None
        if access != "off":
            self._access = Sink(1) if access == "stdout" else Sink(path=access)
        self._rates: dict[str, _Rate] = {}

    def child(self, process: str) -> Log:
        """A log for a forked process: same sinks and settings, empty buffers, its own name in every line."""
        other = Log.__new__(Log)
        other._threshold, other._text, other._clock = self._threshold, self._text, self._clock
        other._process = process
        other._events = self._events.twin()
        other._access = self._access.twin() if self._access is not None else None
        other._rates = {}
        return other

    def debug(self, event: str, /, **fields: Any) -> None:
        """What only someone who looks for a fault wants."""
        self._event("debug", event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """What an operator wants to have happened."""
        self._event("info", event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """What works, yet should be looked at."""
        self._event("warning", event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """What did not work."""
        self._event("error", event, fields)

    def access(self, fields: dict[str, Any]) -> None:
        """One line of the access log: never limited, since each one is a request that somebody may ask about."""
        if self._access is not None:
            self._put(self._access, {"time": _stamp(self._clock.wall()), **fields})

    def flush(self) -> None:
        """Writes what waits; called once a loop turn, and before a process ends."""
        now = self._clock.monotonic()
        for event, rate in self._rates.items():
            if now - rate.since >= WINDOW_S:
                self._close_window(event, rate, now)
        self._events.flush()
        if self._access is not None:
            self._access.flush()
            self._report_loss(self._access, "access", now)
        self._report_loss(self._events, "events", now)

    def end(self) -> None:
        """The last flush of a process: what the rate limit holds back is told now."""
        now = self._clock.monotonic()
        for event, rate in self._rates.items():
            self._close_window(event, rate, now)
        self.flush()

    def close(self) -> None:
        """The end of a log that another one has replaced."""
        self.end()
        if self._access is not None:
            self._access.close()

    def reopen(self) -> None:
        """Opens log files anew (USR1); one that cannot be opened keeps its descriptor, and the event log says so."""
        if self._access is not None:
            failed = self._access.reopen()
            if failed is not None:
                self.error("log_reopen_failed", detail=failed)

    def _event(self, level: Level, event: str, fields: dict[str, Any]) -> None:
        if _RANK[level] < self._threshold or not self._may_pass(event):
            return
        line: dict[str, Any] = {"time": _stamp(self._clock.wall()), "level": level, "event": event}
        if self._process:
            line["process"] = self._process
        line.update(fields)
        self._put(self._events, line)

    def _may_pass(self, event: str) -> bool:
        """The rate limit: LINES_PER_WINDOW lines of a kind in each window; kinds are names in our code, so few."""
        now = self._clock.monotonic()
        rate = self._rates.get(event)
        if rate is None:
            rate = self._rates[event] = _Rate(now)
        elif now - rate.since >= WINDOW_S:
            self._close_window(event, rate, now)
        rate.count += 1
        return rate.count <= LINES_PER_WINDOW

    def _close_window(self, event: str, rate: _Rate, now: float) -> None:
        """Starts a new window, reporting what the last one held back."""
        dropped = rate.count - LINES_PER_WINDOW
        rate.since, rate.count = now, 0
        if dropped > 0:
            self._put(
                self._events,
                {
                    "time": _stamp(self._clock.wall()),
                    "level": "warning",
                    "event": "log_limited",
                    "process": self._process,
                    "of": event,
                    "dropped": dropped,
                },
            )

    def _report_loss(self, sink: Sink, name: str, now: float) -> None:
        """Says how many lines a sink could not take: of the access log at once and then each minute, of both when it
        takes lines again. One that does not take them cannot tell of itself."""
        lost, reason, told_s = sink.dropped_lines, sink.reason, sink.told_s
        if not lost and (reason or told_s is None):
            return
        if reason and (sink is self._events or (told_s is not None and now - told_s < LOSS_REPEAT_S)):
            return
        sink.dropped_lines = 0
        sink.told_s = now if reason else None
        self._event("error", "log_lines_lost", {"sink": name, "lines": lost, "reason": reason or "over"})

    def _put(self, sink: Sink, line: dict[str, Any]) -> None:
        sink.put(_text_line(line) if self._text else _json_line(line))


def _stamp(wall: float) -> str:
    """RFC 3339 in UTC with milliseconds."""
    whole, milliseconds = divmod(round(wall * 1000), 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{milliseconds:03d}Z"


def _plain(value: Any) -> str:
    """What orjson does not know, as text; never raises."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value[:MAX_TEXT]).decode("utf-8", "replace")
    try:
        return str(value)[:MAX_TEXT]
    except Exception:  # noqa: BLE001 a value that cannot be printed must not end a request
        return f"<{type(value).__name__}>"


def _json_line(line: dict[str, Any]) -> bytes:
    """One JSON object and a newline."""
    for key, value in line.items():
        if isinstance(value, str) and len(value) > MAX_TEXT:
            line[key] = value[:MAX_TEXT] + "..."
    try:
        return orjson.dumps(line, default=_plain, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_NON_STR_KEYS)
    except (TypeError, ValueError):  # a lone surrogate or a number past 64 bits
        safe = {str(key): _plain(value).encode("utf-8", "replace").decode() for key, value in line.items()}
        return orjson.dumps(safe, option=orjson.OPT_APPEND_NEWLINE)


def _text_line(line: dict[str, Any]) -> bytes:
    """`time level event key=value ...`, values quoted as JSON where they hold a space, a quote or a control byte."""
    parts = []
    for key, value in line.items():
        text = value if isinstance(value, str) else _json_line({"v": value})[5:-2].decode()
        if key in ("time", "level", "event"):
            parts.append(text)
            continue
        if isinstance(value, str) and (not text or any(c <= " " or c in '"=\x7f' for c in text)):
            text = _json_line({"v": value})[5:-2].decode()
        parts.append(f"{key}={text}")
    return " ".join(parts).encode("utf-8", "replace") + b"\n"


def standard_log(process: str) -> Log:
    """The log before any configuration is read: events at level info on stderr, no access log."""
    sys.stderr.flush()
    return Log(access="off", process=process)
