"""OpenAI Responses: accounting of its typed events.

Owns: which events end a response and where usage stands. Must not know: hiding or injecting (there is no
include_usage here), normalised events. Invariant: no event is ever changed or dropped: `sequence_number` is part of
the payload.

The watch needs the terminal events (they carry usage and reason), the errors, and the first event (it names the model);
`"usage":null` and `"error":null` of response.created and response.in_progress are not reported.
"""

from __future__ import annotations

from typing import Any

from proxyd._scan import Watch
from proxyd.dialects.errors import make_error, read_error_value
from proxyd.dialects.observer import Observer, listed, short, text_length
from proxyd.dialects.usage import read_openai

_TERMINAL = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")
# Deltas only: the `*.done` events repeat the text whole.
_WATCH = Watch((b"usage", b"error"), (*(name.encode() for name in _TERMINAL), b"error"), (b"delta",))


class ResponsesObserver(Observer):
    """A Responses answer, streamed or JSON."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(_WATCH)

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
        return None

    def _on_answer(self, document: dict[str, Any]) -> None:
        status = document.get("status")
        self._on_response(document, f"response.{status}" if isinstance(status, str) else "response.completed")
        self.terminal = True
        for item in listed(document.get("output")):
            if isinstance(item, dict):
                self.body_text_bytes += _item_length(item)

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


def _item_length(item: dict[str, Any]) -> int:
    """Text bytes of an output item of a JSON answer."""
    total = text_length(item.get("arguments"))
    for part in listed(item.get("content")):
        if isinstance(part, dict):
            total += text_length(part.get("text")) + text_length(part.get("refusal"))
    return total
