"""OpenAI chat/completions and legacy completions, and all who speak like them: accounting, hiding, asking.

Owns: which events are worth a call, the meaning of a chunk (usage-rules.md, rules 1-11), the Hiding rule, the upstream
request of the site's route. Must not know: normalised events, sockets.

Why the watch is enough. Of a plain delta chunk the accounting needs only its choice index, and only to know whether
every seen index has finished (rule 9). An answer holds no index but 0 unless the request asked for more, and the
request is known: so with n = 1 a chunk without usage, finish_reason, error, timings changes nothing and is not
reported, and with several choices asked for (`Ask.many_choices`) every chunk is, by its `index` key. The model
comes from the first event, which is always reported; where that has none (Azure's filter results) from the next
that is. `x_groq.usage` and a usage inside anything else is found by its key: the scan knows no depth.
"""

from __future__ import annotations

from typing import Any

import orjson

from proxyd._scan import Watch
from proxyd.dialects.ask import Ask
from proxyd.dialects.errors import make_error, read_error
from proxyd.dialects.observer import Observer, listed, short
from proxyd.dialects.usage import is_placeholder, read_openai, read_timings

_REPORT = (b"usage", b"finish_reason", b"error", b"timings")
# Ends of stream, and vLLM's flat error object.
_TYPES = (b"chat.completion.done", b"error")
# "text" is legacy completions' delta; in chat it would count OpenRouter's reasoning_details a second time.
_METER_CHAT = (b"content", b"reasoning_content", b"reasoning", b"refusal", b"name", b"arguments")
_METER_TEXT = (b"text",)

_WATCH_CHAT = Watch(_REPORT, _TYPES, _METER_CHAT)
_WATCH_CHAT_MANY = Watch((*_REPORT, b"index"), _TYPES, _METER_CHAT)
_WATCH_TEXT = Watch(_REPORT, _TYPES, _METER_TEXT)
_WATCH_TEXT_MANY = Watch((*_REPORT, b"index"), _TYPES, _METER_TEXT)
_WATCH_BODY = Watch((), (), (*_METER_CHAT, *_METER_TEXT))

# The API allows n up to 128; an upstream that numbers beyond 1024 choices is not worth more memory.
_MOST_CHOICES = 1024


def watch_for(*, many: bool, legacy: bool) -> Watch:
    """The watch of a stream: `many` choices, `legacy` completions."""
    if legacy:
        return _WATCH_TEXT_MANY if many else _WATCH_TEXT
    return _WATCH_CHAT_MANY if many else _WATCH_CHAT


class ChatObserver(Observer):
    """A chat or completions answer. `hides` when usage was injected and the client did not ask for it."""

    body_watch = _WATCH_BODY

    __slots__ = ("_per_index", "_timings", "_whole_usage", "finish_reasons", "hides")

    def __init__(self, watch: Watch | None, *, hides: bool) -> None:
        super().__init__(watch)
        self.hides = hides
        self.finish_reasons: dict[int, str | None] = {}
        self._per_index: dict[int, int] | None = None  # vLLM's running completion count of each choice (rule 7)
        self._whole_usage = False  # a usage that covers all choices was seen
        self._timings: dict[str, Any] | None = None

    def _on_document(self, name: bytes, document: dict[str, Any]) -> bytes | None:
        error = read_error(document)
        if error is None and name == b"error":
            error = make_error(
                document.get("message", document), document.get("type"), document.get("code"), document.get("param")
            )
        if error is not None:
            self.fail(error)
        self._name_model(document.get("model"))
        choices = listed(document.get("choices"))
        indices = [self._on_choice(choice) for choice in choices if isinstance(choice, dict)]
        if document.get("object") == "chat.completion.done":
            self.terminal = True
        usage = document.get("usage")
        reported = usage if isinstance(usage, dict) else _groq_usage(document)
        if reported is not None:
            self._on_usage(reported, indices)
        if isinstance(document.get("timings"), dict):
            self._timings = document["timings"]
        return b"" if self.hides and _is_usage_only(document) else None

    def _on_answer(self, document: dict[str, Any]) -> None:
        self._on_document(b"", document)
        for choice in listed(document.get("choices")):
            if isinstance(choice, dict):
                self._take_choice(choice)
        # a document that parsed has arrived whole, finish reasons or not
        self.terminal = True

    def _take_choice(self, choice: dict[str, Any]) -> None:
        """Meters a choice of a JSON answer."""
        self.take_text(choice.get("text"))
        message = choice.get("message")
        if isinstance(message, dict):
            self.take_text(message.get("reasoning_content") or message.get("reasoning"))
            self.take_text(message.get("content"))
            self.take_text(message.get("refusal"))
            calls = [call.get("function") for call in listed(message.get("tool_calls")) if isinstance(call, dict)]
            for function in (*calls, message.get("function_call")):
                if isinstance(function, dict):
                    self.take_text(function.get("name"))
                    self.take_text(function.get("arguments"))

    def _on_choice(self, choice: dict[str, Any]) -> int:
        index = choice.get("index")
        at = index if type(index) is int and index >= 0 else 0
        reason = short(choice.get("finish_reason"))
        seen = at in self.finish_reasons
        # a reason once given stays: it may come twice, and later chunks may lack it (rule 9)
        if (reason is not None) if seen else len(self.finish_reasons) < _MOST_CHOICES:
            self.finish_reasons[at] = reason
            if at == min(self.finish_reasons):
                self.finish_reason = reason
        return at

    def _on_usage(self, reported: dict[str, Any], indices: list[int]) -> None:
        if indices and is_placeholder(reported):
            return
        found = read_openai(reported)
        self.usage.merge(found)
        self.raw_usage = reported
        if not indices:
            self._whole_usage = True
        elif len(indices) == 1 and found.completion is not None:
            self._per_index = {} if self._per_index is None else self._per_index
            if len(self._per_index) < _MOST_CHOICES:
                self._per_index[indices[0]] = found.completion

    def _is_whole(self) -> bool:
        return bool(self.finish_reasons) and all(self.finish_reasons.values())

    def _settle_usage(self) -> None:
        if self.outcome != "completed" and not self._whole_usage and self._per_index and len(self._per_index) > 1:
            self.usage.completion = sum(self._per_index.values())
        if self._timings is not None:
            timed = read_timings(self._timings)
            if self.raw_usage is None:
                self.usage.merge(timed)
            elif self.usage.cached is None:
                self.usage.cached = timed.cached

    def _source(self) -> str:
        if self.raw_usage is None and self._timings is not None:
            return "provider_timings"
        return super()._source()


class EmbeddingsObserver(ChatObserver):
    """An embeddings answer: JSON with a usage of prompt tokens only."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(_WATCH_CHAT, hides=False)

    def _is_full(self) -> bool:
        return self.usage.prompt is not None


def _groq_usage(document: dict[str, Any]) -> dict[str, Any] | None:
    """Older Groq: the usage only in `x_groq`; when it is in both places it is the same one."""
    holder = document.get("x_groq")
    usage = holder.get("usage") if isinstance(holder, dict) else None
    return usage if isinstance(usage, dict) else None


def _is_usage_only(document: dict[str, Any]) -> bool:
    """The Hiding rule: a usage object, no choices, no error, no filter results."""
    return (
        isinstance(document.get("usage"), dict)
        and ("choices" not in document or document["choices"] == [])
        and not document.get("error")
        and document.get("prompt_filter_results") is None
    )


def site_request(ask: Ask, model: str, *, ask_usage: bool) -> bytes:
    """The chat request of the site's route; `model` is the upstream's name for it.

    `ask_usage` is off for an upstream that refused `stream_options` (Mistral answers 422).
    """
    document = ask.document
    messages: list[Any] = []
    if document.get("system"):
        messages.append({"role": "system", "content": document["system"]})
    if document.get("messages") is not None:
        messages.extend(document["messages"])
    else:
        messages.append({"role": "user", "content": document["prompt"]})
    request: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
    if ask_usage:
        request["stream_options"] = {"include_usage": True}
    for name in ("max_tokens", "temperature"):
        if document.get(name) is not None:
            request[name] = document[name]
    return orjson.dumps(request)
