"""The event stream splitter, in Python: the twin and the oracle of the compiled ``proxyd._sse``.

Owns: lines, fields and blocks of WHATWG HTML 9.2.5 and 9.2.6, and the bytes of the one unfinished block.
Must not know: JSON, providers, sockets; what an event means is the callback's affair.

    feed:   | block | block | :comment | unfinished block or line |
              forwarded after the callback's verdict      held

A *unit* is what is forwarded or held as one: a comment or blank line between blocks, or a block, which is all lines
from its first field line through its blank line (comments among them included).

Invariants
- No result depends on how the bytes were cut: sizes that decide are counted through the first byte of the blank line's
  end, so that the LF of a CRLF, which may come later, changes nothing.
- At most `hold_bytes` of an unfinished unit are kept from the client; at most `max_event_bytes` of it are kept at all.
- Without verdicts, the bytes out are the bytes in. Each byte is looked at a bounded number of times.
"""
from __future__ import annotations

import re
from collections.abc import Callable

from proxyd.wire.scan import Watch, scan

FLAG_FIRST = 1
FLAG_DONE = 2
FLAG_ERROR_FIELD = 4
FLAG_OVERSIZE = 8

MAX_EVENT_BYTES = 4 * 1024 * 1024
"""Larger events pass unread. A base64 image is 1 to 3 MiB: half would lose its usage, twice is memory per stream."""

HOLD_BYTES = 64 * 1024
"""A usage chunk, the one we hide, is under 2 KiB. Twice doubles what a hostile upstream makes every stream hold."""

MAX_RETRY_DIGITS = 4000
"""Python refuses to read integers of more than 4,300 digits."""

OnEvent = Callable[[bytes, bytes, int], bytes | None]

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


class Splitter:
    """Splits one response body; `on_event(name, data, flags)` says None (forward), or the bytes to send instead.

    With a `watch` only events that may matter are reported: the first, `[DONE]`, the name `error`, data that is no JSON
    object, and what the watch finds. A block with an `error` field is always reported, with that field's value as data.

    What on_event raises leaves feed(), and the splitter must not be used after that. Where hold_bytes is not under
    max_event_bytes no byte may pass unseen (a translation), so a larger event raises ValueError.
    """

    __slots__ = (
        "_block_comments", "_data", "_error", "_event_name", "_fields_seen", "_first_line", "_held", "_id", "_line",
        "_line_bytes", "_line_is_comment", "_on_event", "_out", "_pending_cr", "_released", "_sample", "_unit_bytes",
        "comments", "events", "hold_bytes", "last_event_id", "max_event_bytes", "retry", "tail_data", "text_bytes",
        "watch",
    )

    def __init__(
        self,
        on_event: OnEvent,
        watch: Watch | None = None,
        max_event_bytes: int = MAX_EVENT_BYTES,
        hold_bytes: int = HOLD_BYTES,
    ) -> None:
        self._on_event = on_event
        self.watch = watch
        self.max_event_bytes = max_event_bytes
        self.hold_bytes = hold_bytes
        self.events = 0
        self.comments = 0
        self.text_bytes = 0
        self._sample = bytearray()
        self.last_event_id = b""
        self.retry: int | None = None
        self.tail_data: bytes | None = None
        self._out: list[bytes] = []
        self._first_line = True
        self._released = False
        self._pending_cr: bytes | None = None  # what to forward for a LF that follows the CR we just took: b"\n" or b""
        self._start_unit()

    @property
    def at_boundary(self) -> bool:
        """Has no byte of an unfinished unit been released? Then a heartbeat or an error event may be inserted."""
        return not self._released

    @property
    def sample(self) -> bytes:
        """The first kilobyte of the metered text as it stands between the quotes; it may end in half a character."""
        return bytes(self._sample)

    def feed(self, data: bytes) -> bytes:
        """The bytes that may go downstream now."""
        at = 0
        if data and self._pending_cr is not None:
            if data.startswith(b"\n"):
                self._take_late_lf(self._pending_cr)
                at = 1
            self._pending_cr = None
        for end in _LINE_END.finditer(data, at):
            self._take_part(data[at:end.start()])
            forwarded = self._end_line(end[0])
            at = end.end()
            if at == len(data) and end[0] == b"\r":
                self._pending_cr = b"\n" if forwarded else b""
        self._take_part(data[at:])
        self._refuse_unseen()
        if self._released or len(self._held) > self.hold_bytes or self._is_oversize():
            self._release()
        out = b"".join(self._out)
        self._out.clear()
        return out

    def finish(self) -> bytes:
        """The body ended: the bytes still held; nothing is dispatched. `tail_data` is what the last block had."""
        held = bytes(self._held)
        if self._data and not self._is_oversize():
            self.tail_data = b"\n".join(self._data)
        released = self._released or bool(held)
        self._start_unit()
        self._released = released
        return held

    def discard(self) -> int:
        """The body broke: drops the bytes still held; how many there were."""
        dropped = len(self._held)
        released = self._released
        self._start_unit()
        self._released = released
        return dropped

    def _start_unit(self) -> None:
        self._held = bytearray()  # raw bytes of the unit that were not forwarded
        self._unit_bytes = 0
        self._released = False
        self._line = bytearray()  # the unfinished line; once the unit is oversize, its first bytes only
        self._line_bytes = 0
        self._line_is_comment = False
        self._fields_seen = False
        self._block_comments = bytearray()
        self._data: list[bytes] = []
        self._event_name = b""
        self._id: bytes | None = None
        self._error: bytes | None = None

    def _is_oversize(self) -> bool:
        return self._unit_bytes > self.max_event_bytes

    def _refuse_unseen(self) -> None:
        if self._is_oversize() and self.hold_bytes >= self.max_event_bytes:
            raise ValueError(f"an event of more than {self.max_event_bytes} bytes, none of which may pass unseen")

    def _release(self) -> None:
        if self._held:
            self._out.append(bytes(self._held))
            self._held.clear()
            self._released = True
        self._block_comments.clear()

    def _take_part(self, part: bytes) -> None:
        """Bytes of a line, without its end."""
        if not part:
            return
        self._held += part
        self._unit_bytes += len(part)
        self._line_bytes += len(part)
        self._line += part
        if self._is_oversize():
            del self._line[len(_BOM) + 1:]
            self._data.clear()

    def _take_late_lf(self, forward: bytes) -> None:
        """The LF of a CRLF that was cut between its bytes."""
        if self._unit_bytes:
            self._held += b"\n"
            self._unit_bytes += 1
            if self._line_is_comment:
                self._block_comments += b"\n"
        elif forward:
            self._out.append(forward)

    def _end_line(self, end: bytes) -> bool:
        """A line is complete. False when its bytes were replaced."""
        line = bytes(self._line)
        length = self._line_bytes
        self._line.clear()
        self._line_bytes = 0
        self._unit_bytes += 1
        self._held += end
        self._refuse_unseen()
        if self._first_line:
            self._first_line = False
            if line.startswith(_BOM):
                line = line[len(_BOM):]
                length -= len(_BOM)
        if length == 0:
            return self._end_block()
        self._line_is_comment = line.startswith(b":")
        if self._line_is_comment:
            self.comments += 1
            if not self._fields_seen:
                self._forward_unit()
                return True
            self._block_comments += line + end
        else:
            self._fields_seen = True
            if not self._is_oversize():
                self._take_field(line)
        self._unit_bytes += len(end) - 1
        return True

    def _forward_unit(self) -> None:
        self._out.append(bytes(self._held))
        self._start_unit()

    def _end_block(self) -> bool:
        """A blank line: dispatches the block that it ends, if there is one. False when the block was replaced."""
        verdict = None
        if self._fields_seen:
            if self._is_oversize():
                self.events += 1
                self._on_event(b"", b"", FLAG_OVERSIZE | (FLAG_FIRST if self.events == 1 else 0))
            else:
                verdict = self._dispatch()
        if verdict is None or self._unit_bytes > self.hold_bytes:
            self._forward_unit()
            return True
        self._out.append(bytes(self._block_comments))
        self._out.append(verdict)
        self._start_unit()
        return False

    def _take_field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._event_name = value
        elif name == b"error":
            self._error = value
        elif name == b"id":
            if b"\0" not in value:
                self._id = value
        elif name == b"retry":
            if value.isdigit() and len(value) <= MAX_RETRY_DIGITS:
                self.retry = int(value)

    def _dispatch(self) -> bytes | None:
        """The verdict on a complete block; None when nobody needs to be asked."""
        if self._id is not None:
            self.last_event_id = self._id
        flags = 0
        report = self.watch is None
        data = b"\n".join(self._data)
        if self._data:
            self.events += 1
            if self.events == 1:
                flags |= FLAG_FIRST
                report = True
            if data.startswith(b"[DONE]"):
                flags |= FLAG_DONE
                report = True
            elif self.watch is not None:
                found, text_bytes = scan(self.watch, data, self._sample)
                self.text_bytes += text_bytes
                report = report or found or not data.lstrip(b" ").startswith(b"{")
            report = report or self._event_name == b"error"
        if self._error is not None:
            flags |= FLAG_ERROR_FIELD
            return self._on_event(self._event_name, self._error, flags)
        if self._data and report:
            return self._on_event(self._event_name, data, flags)
        # Of a translation nothing passes as it came: an upstream's lone `id:` would become the client's cursor.
        return b"" if not self._data and self.hold_bytes >= self.max_event_bytes else None
