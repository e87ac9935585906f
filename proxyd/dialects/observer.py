"""Watching one answer go by: what every dialect's observer has in common.

Owns: the accounting state of one answer, the never-raising event entry, JSON bodies, the outcome. Must not know:
sockets, the relay's phases, who pays. Subclasses say what an event's document means. Invariants: `on_event`,
`on_tail`, `on_body` never raise, whatever the bytes; the first error stays the error; `finish` may be called again
(it computes from what was seen, it consumes nothing).

    events / body  ->  accounting state  ->  finish(clean)  ->  outcome, usage, usage_source  ->  usage.settle()
"""

from __future__ import annotations

from typing import Any

from proxyd._scan import Watch, sample, scan
from proxyd.dialects.bounded import read_json
from proxyd.dialects.errors import Error, make_error, read_error, read_error_body
from proxyd.dialects.media import NDJSON, media_kind
from proxyd.dialects.tokens import NOTHING, Text, grown, unescaped
from proxyd.dialects.usage import Usage, read_ollama

FLAG_DONE = 2
FLAG_ERROR_FIELD = 4
FLAG_OVERSIZE = 8

_SPACE = b" \t\r\n"
# Model names and finish reasons are kept for the log; longer ones are no names.
_NAME_CHARS = 256
# How much of an answer in lines is read line by line; the shortest lines cost 0.5 us a byte.
_LINES_BYTES = 64 * 1024
_LINE_TEXT = Watch((), (), (b"response", b"content", b"thinking"))
# Where in a large body the text is sampled; a kilobyte of it stands in less.
_SAMPLED_BYTES = 16 * 1024


class Observer:
    """The accounting of one answer. `watch` chooses the events that are worth a call."""

    # How many tokens the provider's vocabulary makes of a text, over those of o200k.
    factor = 1.0
    # The text in a body that cannot be parsed.
    body_watch = Watch()

    __slots__ = (
        "body_sample",
        "body_text_bytes",
        "cut",
        "document",
        "done_seen",
        "error",
        "finish_reason",
        "model",
        "outcome",
        "parse_errors",
        "raw_usage",
        "refused",
        "tail_usage",
        "terminal",
        "text",
        "text_bytes",
        "unread",
        "usage",
        "usage_source",
        "watch",
    )

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.usage = Usage()
        self.usage_source = "none"
        self.outcome = "truncated"
        self.model: str | None = None
        self.finish_reason: str | None = None
        self.error: Error | None = None
        self.raw_usage: dict[str, Any] | None = None
        self.document: dict[str, Any] | None = None  # of the last event, for a translator
        self.parse_errors = 0
        self.text_bytes = 0
        self.text = NOTHING
        self.body_text_bytes = 0
        self.body_sample = b""
        self.done_seen = False
        self.terminal = False
        self.refused = False
        self.tail_usage = False
        self.unread = False
        self.cut = False  # something had too many parts to be read whole

    # --- entries --------------------------------------------------------------------------------------------------

    def on_event(self, name: bytes, data: bytes, flags: int) -> bytes | None:
        """One dispatched event; the answer is the splitter's: None forwards the block, b"" drops it."""
        self.document = None
        if flags & FLAG_ERROR_FIELD:
            self._on_error_field(data)
            return None
        if flags & FLAG_DONE or data.startswith(b"[DONE]"):
            self.done_seen = self.terminal = True
            return None
        if flags & FLAG_OVERSIZE:
            self.parse_errors += 1
            return None
        return self._on_data(name, data)

    def on_tail(self, data: bytes) -> None:
        """The complete `data:` lines of a last block that was never dispatched (rule 10). A `[DONE]` there is none: no
        SDK sees it, so whether the answer is whole is rule 9's question."""
        self.document = None
        if not data or data.startswith(b"[DONE]"):
            return
        before = self.raw_usage
        self._on_data(b"", data)
        self.tail_usage = self.raw_usage is not before

    def on_body(self, content_type: str, status: int, body: bytes) -> None:
        """A whole answer that is no event stream: JSON, NDJSON, or a refusal of any kind.

        JSON that cannot be read (cut at a cap, or none) is an answer all the same: complete when its framing was, its
        usage unknown.
        """
        if status >= 400:
            self.refused = True
            self.fail(read_error_body(status, body))
            return
        if media_kind(content_type) is NDJSON:
            self._on_lines(body)
            return
        document = self._parse(body.strip(_SPACE))
        if document is None:
            self.unread = True
            self._meter(self.body_watch, body.rstrip(b"\\") + b'"')  # the string in which it was cut
            return
        self.document = document
        error = read_error(document)
        if error is not None:
            self.fail(error)
        if "done" in document and "choices" not in document:
            self._on_ollama(document)
        else:
            self._on_answer(document)

    def finish(self, clean: bool, text_bytes: int, sample: bytes = b"") -> None:
        """The body ended: `clean` when its framing was complete. Sets outcome, usage, usage_source and text.
        `sample` is the splitter's, of the text whose length is `text_bytes`."""
        self.text_bytes = max(text_bytes, self.body_text_bytes)
        if self.error is not None:
            self.outcome = "error"
        elif self.terminal or (clean and (self.unread or self._is_whole())):
            self.outcome = "completed"
        else:
            self.outcome = "truncated"
        self._settle_usage()
        if self.usage.completion is None and self.text.size != self.text_bytes:
            kept = unescaped(sample) if text_bytes > self.body_text_bytes else self.body_sample
            self.text = Text(self.text_bytes, kept)
        if not self.usage.known:
            self.usage_source = "none"
        elif self.outcome != "completed" or not self._is_full():
            self.usage_source = "provider_partial"
        else:
            self.usage_source = self._source()

    # --- for subclasses -------------------------------------------------------------------------------------------

    def _on_document(self, name: bytes, document: dict[str, Any]) -> bytes | None:
        """One event's JSON object."""
        raise NotImplementedError

    def _on_answer(self, document: dict[str, Any]) -> None:
        """A JSON answer of this dialect, status 2xx."""
        raise NotImplementedError

    def _is_whole(self) -> bool:
        """Whether an answer that ended cleanly, without a terminal event, is complete."""
        return False

    def _is_full(self) -> bool:
        """Whether the provider gave all the counts that this kind of answer has."""
        return self.usage.total is not None

    def _settle_usage(self) -> None:
        """Bring `usage` to its final value; `outcome` is known."""

    def _source(self) -> str:
        """Where the numbers of a completed answer came from."""
        return "provider_tail" if self.tail_usage else "provider"

    def fail(self, error: Error) -> None:
        """Keep the first error."""
        if self.error is None:
            self.error = error

    def take_text(self, text: Any) -> None:
        """Meters a text of a JSON body; anything else is none."""
        if isinstance(text, str) and text:
            self.body_text_bytes += text_length(text)
            self.body_sample = grown(self.body_sample, text)

    def _meter(self, watch: Watch, body: bytes) -> None:
        """Meters the text in a body that is not parsed."""
        self.body_text_bytes = scan(watch, body)[1]
        self.body_sample = unescaped(sample(watch, body[:_SAMPLED_BYTES]))

    def _name_model(self, model: Any) -> None:
        """The first event that has a non-empty one names the model."""
        if self.model is None and isinstance(model, str) and model:
            self.model = model[:_NAME_CHARS]

    # --- the common part ------------------------------------------------------------------------------------------

    def _on_data(self, name: bytes, data: bytes) -> bytes | None:
        if not data.strip(_SPACE):
            return None
        document = self._parse(data)
        if document is None:
            if name == b"error":
                self.fail(make_error(data[:1024].decode("utf-8", "replace")))
            return None
        self.document = document
        return self._on_document(name, document)

    def _on_error_field(self, value: bytes) -> None:
        """llama.cpp's `error:` field, which every SSE parser ignores."""
        document = self._parse(value)
        error = None if document is None else read_error(document)
        if error is None and document is not None:
            error = make_error(
                document.get("message"), document.get("type"), document.get("code"), document.get("param")
            )
        self.fail(error or make_error(value[:1024].decode("utf-8", "replace")))

    def _on_lines(self, body: bytes) -> None:
        """Ollama's lines. Of many only the first and the last are read, for the error and the counts; the text of the
        others is measured."""
        if len(body) <= _LINES_BYTES:
            for line in body.split(b"\n"):
                self._on_line(line)
            return
        body = body.strip(_SPACE)
        last = body.find(b"\n", max(0, len(body) - _LINES_BYTES))
        if last < 0:
            last = body.rfind(b"\n")
        if last >= 0:
            self._on_line(body[: body.index(b"\n")])
        for line in body[last + 1 :].split(b"\n"):
            self._on_line(line)
        self._meter(_LINE_TEXT, body)

    def _on_line(self, line: bytes) -> None:
        line = line.strip(_SPACE)
        if not line:
            return
        document = self._parse(line)
        if document is None:
            return
        error = read_error(document)
        if error is not None:
            self.fail(error)
        else:
            self._on_ollama(document)

    def _on_ollama(self, line: dict[str, Any]) -> None:
        """A line of Ollama's own API; the last has `done: true`."""
        self._name_model(line.get("model"))
        message = line.get("message")
        for holder in (line, message if isinstance(message, dict) else {}):
            for key in ("response", "content", "thinking"):
                self.take_text(holder.get(key))
        if line.get("done") is True:
            self.terminal = True
            self.usage.merge(read_ollama(line))
            reason = line.get("done_reason")
            if isinstance(reason, str):
                self.finish_reason = reason[:_NAME_CHARS]

    def _parse(self, data: bytes) -> dict[str, Any] | None:
        """The JSON object in `data`; anything else counts as a parse error (rule 11)."""
        document: Any = None
        try:
            document, cut = read_json(data)
            self.cut = self.cut or cut
        except ValueError:
            pass
        if isinstance(document, dict):
            return document
        if isinstance(document, list) and document and isinstance(document[0], dict):
            return document[0]  # Gemini's errors come in an array
        self.parse_errors += 1
        return None


def text_length(value: Any) -> int:
    """UTF-8 bytes of a text, 0 for anything else."""
    return len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else 0


def listed(value: Any) -> list[Any]:
    """A list, or an empty one for anything else."""
    return value if isinstance(value, list) else []


def short(value: Any) -> str | None:
    """A name worth keeping, or None."""
    return value[:_NAME_CHARS] if isinstance(value, str) and value else None
