"""A copy of an answer that is no plain event stream, for the accountant only.

Owns: collecting JSON and NDJSON bodies up to a bound, and inflating encoded event streams. Must not know sockets. The
client gets the upstream's bytes whatever happens here.

Invariants: at most MAX_BODY_BYTES are kept; a body beyond that is relayed and its usage is unknown (estimated). What
one feed() inflates is bounded in bytes and events; a stream that holds more than that in one piece is not read on.
"""

from __future__ import annotations

from collections.abc import Callable

from proxyd._sse import Splitter
from proxyd.dialects.media import JSON, NDJSON, OPAQUE, SSE, Inflater, Media, inflater, is_identity
from proxyd.dialects.observer import Observer
from proxyd.dialects.translate import Translator

__all__ = ["MAX_BODY_BYTES", "Tap"]

# A chat answer rarely passes 1 MB. 8 MiB, as much as a request may have: half would lose the usage of large embeddings
# answers, twice lets 1,000 answers at once hold 16 GB.
MAX_BODY_BYTES = 8 * 1024 * 1024
PREFIX_BYTES = 4096
# Of an encoded event stream in one piece. Events compress 30 to 1 at best and a piece has at most 64 KiB, so 2 MiB and
# 8,000 events of 250 bytes are the most that is meant; the events of a bomb cost 1.3 us each.
MAX_INFLATED_EVENTS = 10_000
MAX_INFLATED_BYTES = 4 * 1024 * 1024


class Tap:
    """feed() every piece of payload, finish() once."""

    __slots__ = (
        "_body", "_content_type", "_inflater", "_is_bomb", "_is_coded", "_media", "_out", "_overflow", "_splitter",
        "_status", "is_opaque",
    )  # fmt: skip

    def __init__(
        self, observer: Observer | Translator, media: Media, content_type: str, status: int, coding: str | None
    ) -> None:
        self._media = media
        self._content_type = content_type
        self._status = status
        self._is_coded = not is_identity(coding)
        self._inflater: Inflater | None = inflater(coding) if self._is_coded else None
        self._body = bytearray()
        self._overflow = False
        self._is_bomb = False
        self.is_opaque = status < 400 and (media is OPAQUE or (self._is_coded and self._inflater is None))
        self._splitter: Splitter | None = None
        if media is SSE and status == 200:
            self._splitter = Splitter(observer.on_event, observer.watch)
        self._out: Callable[[bytes], object] | None = None

    @property
    def text_bytes(self) -> int:
        """Text metered in an encoded event stream."""
        return 0 if self._splitter is None else self._splitter.text_bytes

    @property
    def sample(self) -> bytes:
        """The first kilobyte of that text, as the splitter keeps it."""
        return b"" if self._splitter is None else self._splitter.sample

    @property
    def is_stream(self) -> bool:
        """Whether this is an event stream, which may be cut; anything else is whole or nothing."""
        return self._splitter is not None

    def divert(self, out: Callable[[bytes], object]) -> None:
        """Wants the frames that a translator makes of an encoded event stream."""
        self._out = out

    def feed(self, payload: bytes) -> None:
        """One piece of payload, as it was relayed."""
        if not self._is_coded:
            self._take(payload)
        elif self._inflater is not None:
            self._inflate(self._inflater, payload)

    def finish(self, observer: Observer | Translator) -> None:
        """The body is over: what was collected is read."""
        if self._splitter is not None:
            self._splitter.finish()
            if self._is_bomb and isinstance(observer, Observer):
                # The client got all of it, whatever it was.
                observer.unread = True
                return
            if self._splitter.tail_data is not None:
                observer.on_tail(self._splitter.tail_data)
            return
        if self._status >= 400 or (self._media in (JSON, NDJSON) and self._body):
            observer.on_body(self._content_type, self._status, bytes(self._body))
        self._body.clear()

    def _inflate(self, inflater: Inflater, payload: bytes) -> None:
        most_bytes = inflater.total + MAX_INFLATED_BYTES
        most_events = MAX_INFLATED_EVENTS + (0 if self._splitter is None else self._splitter.events)
        self._take(inflater.feed(payload))
        while inflater.more:
            if self._splitter is None:
                is_bomb = self._overflow or self.is_opaque
            else:
                is_bomb = inflater.total > most_bytes or self._splitter.events > most_events
            if is_bomb:
                self._inflater = None
                self._is_bomb = True
                return
            self._take(inflater.feed(b""))

    def _take(self, data: bytes) -> None:
        if not data:
            return
        if self._splitter is not None:
            frames = self._splitter.feed(data)
            if self._out is not None:
                self._out(frames)
            return
        if self._overflow or self.is_opaque:
            return
        if len(self._body) + len(data) > MAX_BODY_BYTES:
            # A prefix of it: enough for the accountant to see that an answer came, and that it cannot be read.
            self._overflow = True
            del self._body[PREFIX_BYTES:]
            return
        self._body += data
