"""Anthropic messages: accounting of its typed events, and the upstream request of the site's route.

Owns: which events carry usage, ends and errors; OpenAI-shaped messages turned into Anthropic's. Must not know:
normalised events, sockets. Invariants: message_start's output count is a placeholder and is never booked;
message_delta is cumulative.

The watch reports message_start, message_delta, message_stop and errors by type (an event may lack its `event:`
line) and anything with a usage; content blocks and pings pass unseen, their text metered by the scan.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxyd._scan import Watch
from proxyd.dialects.ask import Ask
from proxyd.dialects.errors import make_error, read_error_value
from proxyd.dialects.observer import Observer, listed, short
from proxyd.dialects.usage import AnthropicCounts

_WATCH = Watch(
    (b"usage", b"error"),
    (b"message_start", b"message_delta", b"message_stop", b"error"),
    (b"text", b"partial_json", b"thinking", b"name"),
)
# The API has no default; half of it cuts ordinary answers short, twice it is more than the oldest models can give.
DEFAULT_MAX_TOKENS = 4096


class AnthropicObserver(Observer):
    """A messages answer, streamed or JSON; also count_tokens, which costs nothing."""

    # Claude's vocabulary is not published; 33 recordings had 1.3 times o200k's count (token-estimation.md).
    factor = 1.3
    body_watch = _WATCH

    __slots__ = ("_counts",)

    def __init__(self, watch: Watch | None = _WATCH) -> None:
        super().__init__(watch)
        self._counts = AnthropicCounts()

    def _on_document(self, name: bytes, document: dict[str, Any]) -> bytes | None:
        kind = document.get("type")
        kind = kind if isinstance(kind, str) else name.decode("utf-8", "replace")
        if kind == "error" or name == b"error" or document.get("error"):
            nested = document.get("error")
            if nested:
                self.fail(read_error_value(nested))
            else:
                self.fail(make_error(document.get("message", document), None, document.get("code")))
        elif kind == "message_start":
            message = document.get("message")
            if isinstance(message, dict):
                self._name_model(message.get("model"))
                self._on_usage(message.get("usage"), book_output=False)
        elif kind == "message_delta":
            delta = document.get("delta")
            if isinstance(delta, dict):
                self.finish_reason = short(delta.get("stop_reason")) or self.finish_reason
            self._on_usage(document.get("usage"), book_output=True)
        elif kind == "message_stop":
            self.terminal = True
        return None

    def _on_answer(self, document: dict[str, Any]) -> None:
        self._name_model(document.get("model"))
        self.finish_reason = short(document.get("stop_reason"))
        self._on_usage(document.get("usage"), book_output=True)
        for block in listed(document.get("content")):
            if isinstance(block, dict):
                self.take_text(block.get("thinking"))
                self.take_text(block.get("text"))
                if isinstance(block.get("input"), dict):
                    self.take_text(block.get("name"))
                    self.take_text(_dumps(block["input"]))
        self.terminal = True

    def _on_usage(self, usage: Any, *, book_output: bool) -> None:
        if isinstance(usage, dict):
            self._counts.merge(usage, book_output=book_output)
            self.usage.merge(self._counts.usage())
            self.raw_usage = usage


def _dumps(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return ""


# --- the site's route -------------------------------------------------------------------------------------------------


def site_request(ask: Ask, model: str) -> bytes:
    """The messages request of the site's route: system texts lifted out, neighbours of one role merged."""
    document = ask.document
    system = [document["system"]] if document.get("system") else []
    turns: list[dict[str, Any]] = []
    for message in document.get("messages") or [{"role": "user", "content": document.get("prompt")}]:
        if message["role"] in ("system", "developer"):
            system.append(_plain(message.get("content")))
            continue
        role, blocks = _turn(message)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        if len(turn["content"]) == 1 and turn["content"][0]["type"] == "text":
            turn["content"] = turn["content"][0]["text"]
    request: dict[str, Any] = {"model": model, "max_tokens": document.get("max_tokens") or DEFAULT_MAX_TOKENS}
    if any(system):
        request["system"] = "\n\n".join(text for text in system if text)
    request["messages"] = turns
    if document.get("temperature") is not None:
        # OpenAI's range ends at 2, Anthropic's at 1
        request["temperature"] = min(document["temperature"], 1)
    request["stream"] = True
    return orjson.dumps(request)


def _turn(message: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    role, content = message["role"], message.get("content")
    if role in ("tool", "function"):
        result = {"type": "tool_result", "tool_use_id": str(message.get("tool_call_id") or message.get("name") or "")}
        return "user", [{**result, "content": _plain(content)}]
    blocks = _blocks(content)
    if role == "assistant":
        for call in listed(message.get("tool_calls")):
            function = call.get("function")
            if isinstance(function, dict):
                blocks.append(
                    {
                        "type": "tool_use",
                        "id": str(call.get("id") or ""),
                        "name": str(function.get("name") or ""),
                        "input": _arguments(function.get("arguments")),
                    }
                )
    return role, blocks


def _blocks(content: Any) -> list[dict[str, Any]]:
    """Content parts; an empty text is left out, Anthropic refuses it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    blocks = []
    for part in listed(content):
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            if isinstance(part.get("text"), str) and part["text"]:
                blocks.append({"type": "text", "text": part["text"]})
        elif kind == "image_url":
            picture = _picture(part.get("image_url"))
            if picture is not None:
                blocks.append(picture)
        elif kind in ("image", "document", "tool_use", "tool_result", "thinking", "redacted_thinking"):
            blocks.append(part)  # Anthropic's own shapes, as they are
    return blocks


def _picture(image: Any) -> dict[str, Any] | None:
    """An `image_url` part: a data URL becomes base64, anything else stays a URL."""
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str) or not url:
        return None
    head, comma, data = url.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        media_type = head[5:-7].split(";", 1)[0] or "image/png"
        return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
    return {"type": "image", "source": {"type": "url", "url": url}}


def _plain(content: Any) -> str:
    """The text of a content, parts joined."""
    if isinstance(content, str):
        return content
    return "".join(
        part["text"] for part in listed(content) if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def _arguments(arguments: Any) -> dict[str, Any]:
    try:
        value = orjson.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
