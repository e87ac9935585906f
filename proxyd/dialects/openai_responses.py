"""OpenAI Responses: accounting of its typed events.

Owns: which events end a response and where usage stands. Must not know: hiding or injecting (there is no
include_usage here), normalised events. Invariant: no event is ever changed or dropped: `sequence_number` is part of
the payload.

The watch needs the terminal events (they carry usage and reason), the errors, and the first event (it names the model);
`"usage":null` and `"error":null` of response.created and response.in_progress are not reported. A tool call is, by its
`type`: its name is text of the answer, yet `name` stands in the request's tools too, which these events repeat.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxyd._scan import Watch
from proxyd.dialects.errors import make_error, read_error_value
from proxyd.dialects.observer import Observer, listed, short, text_length
from proxyd.dialects.tokens import grown
from proxyd.dialects.usage import read_openai

_TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
# Deltas only: the `*.done` events repeat the text whole.
_CALLS = ("function_call", "custom_tool_call")
_WATCH = Watch((b"usage", b"error"), tuple(name.encode() for name in (*_TERMINAL, "error", *_CALLS)), (b"delta",))
# Of all tools' names together: 100 calls. Nothing that a provider repeats without end may grow.
_NAMES_CHARS = 4096
_WATCH_BODY = Watch((), (), (b"text", b"refusal", b"arguments"))


class ResponsesObserver(Observer):
    """A Responses answer, streamed or JSON."""

    body_watch = _WATCH_BODY

    __slots__ = ("_names",)

    def __init__(self) -> None:
        super().__init__(_WATCH)
        self._names = ""  # of the tools that were called

    def _on_document(self, name: bytes, document: dict[str, Any]) -> bytes | None:
        kind = document.get("type")
        kind = kind if isinstance(kind, str) else name.decode("utf-8", "replace")
        response = document.get("response")
        if kind == "error" or name == b"error" or (document.get("error") and not isinstance(response, dict)):
            nested = document.get("error")
            if nested:
                self.fail(read_error_value(nested))
            else:  # the documented, flat form; its `type` is the event's
                self.fail(make_error(document.get("message"), None, document.get("code"), document.get("param")))
        if isinstance(response, dict):
            self._on_response(response, kind)
            if kind in _TERMINAL:
                self.terminal = True
        elif kind == "response.output_item.added":
            item = document.get("item")
            if isinstance(item, dict) and item.get("type") in _CALLS:
                self._names = (self._names + (short(item.get("name")) or ""))[:_NAMES_CHARS]
        return None

    def finish(self, clean: bool, text_bytes: int, sample: bytes = b"") -> None:
        if self._names:
            text_bytes += text_length(self._names)
            sample = orjson.dumps(grown(b"", self._names).decode("utf-8", "ignore"))[1:-1] + sample
        super().finish(clean, text_bytes, sample)

    def _on_answer(self, document: dict[str, Any]) -> None:
        status = document.get("status")
        self._on_response(document, f"response.{status}" if isinstance(status, str) else "response.completed")
        self.terminal = True
        for item in listed(document.get("output")):
            if isinstance(item, dict):
                self._take_item(item)

    def _take_item(self, item: dict[str, Any]) -> None:
        """Meters an output item of a JSON answer."""
        if item.get("type") in _CALLS:
            self.take_text(item.get("name"))
        self.take_text(item.get("arguments") or item.get("input"))
        for part in listed(item.get("content")):
            if isinstance(part, dict):
                self.take_text(part.get("text"))
                self.take_text(part.get("refusal"))

    def _on_response(self, response: dict[str, Any], kind: str) -> None:
        self._name_model(response.get("model"))
        usage = response.get("usage")
        if isinstance(usage, dict):
            self.usage.merge(read_openai(usage))
            self.raw_usage = usage
        if kind == "response.completed":
            self.finish_reason = "completed"
        elif kind == "response.incomplete":
            details = response.get("incomplete_details")
            self.finish_reason = (short(details.get("reason")) if isinstance(details, dict) else None) or "incomplete"
        elif kind == "response.cancelled":
            self.finish_reason = "cancelled"
        elif kind == "response.failed":
            self.fail(read_error_value(response.get("error") or {"message": "the response failed"}))
