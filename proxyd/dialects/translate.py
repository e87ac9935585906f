"""The site's route: an upstream's stream, whatever its dialect, told in normalised events (CONTRACT section 4).

Owns: what a chunk or event becomes, the ids, the one ending. Must not know: sockets, resumption, who listens.
Invariants: ids count 1, 2, 3 ... without gaps; exactly one of done and error ends a stream, nothing follows it;
usage stands before done; an upstream's `id:` never becomes ours. The accounting is the wrapped observer's, so it is
that of native routes.

    upstream event -> observer (accounting) -> document -> frames
    [DONE] | message_stop -> usage, done        error -> error        end of body -> ending(clean)

Decisions. A refusal's text is text: a reader must see it, so it comes as `delta`, and done says content_filter
where the provider did. Only choice 0 is told (the route asks for one). Tools that the provider runs itself
(Anthropic's server tools) are not told: there is nothing for the client to call. `retryable` is is_retryable(), and
True for an answer that broke off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson

from proxyd.dialects.anthropic import AnthropicObserver
from proxyd.dialects.ask import Ask
from proxyd.dialects.errors import Error, is_retryable, make_error
from proxyd.dialects.observer import Observer, listed
from proxyd.dialects.openai_chat import ChatObserver
from proxyd.dialects.tokens import Text, grown
from proxyd.dialects.usage import Usage, settle
from proxyd.wire import events

_FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "function_call": "tool_calls",
    "refusal": "content_filter",
}
_TOOL_BLOCKS = ("tool_use",)
# What was left out might have been text: half an answer must not look like a whole one.
_CUT = make_error("the upstream's answer has too many parts to be read", "api_error", "upstream_unreadable")

Payload = dict[str, Any]


def finish_word(reason: str | None) -> str:
    """A provider's finish reason in the words of `done`; an answer that gave none has simply stopped."""
    return "stop" if reason is None else _FINISH.get(reason, reason)


class Translator:
    """An observer whose on_event answers with frames. It needs every event: `watch` is None."""

    __slots__ = (
        "_ask",
        "_carry",
        "_counted",
        "_ended",
        "_epoch",
        "_inner",
        "_n",
        "_pending",
        "_request_id",
        "_sample",
        "_tools",
        "watch",
    )

    def __init__(self, inner: Observer, ask: Ask, *, request_id: str, epoch: int) -> None:
        self.watch = None
        self._inner = inner
        self._ask = ask.without_body()
        self._request_id = request_id
        self._epoch = epoch
        self._n = 0
        self._ended = False
        self._counted = 0
        self._sample = b""
        self._pending = b""  # the frames of a JSON answer, until ending()
        self._carry: dict[str, str] = {}  # half a surrogate pair, by kind, until its other half comes
        self._tools: dict[int, int] = {}  # Anthropic: content block index -> tool index

    # --- the observer's face --------------------------------------------------------------------------------------

    @property
    def usage(self) -> Usage:
        return self._inner.usage

    @property
    def usage_source(self) -> str:
        return self._inner.usage_source

    @property
    def outcome(self) -> str:
        return self._inner.outcome

    @property
    def refused(self) -> bool:
        return self._inner.refused

    @property
    def model(self) -> str | None:
        return self._inner.model

    @property
    def finish_reason(self) -> str | None:
        return self._inner.finish_reason

    @property
    def error(self) -> Error | None:
        return self._inner.error

    @property
    def raw_usage(self) -> dict[str, Any] | None:
        return self._inner.raw_usage

    @property
    def done_seen(self) -> bool:
        return self._inner.done_seen

    @property
    def parse_errors(self) -> int:
        return self._inner.parse_errors

    @property
    def sample(self) -> bytes:
        """The first kilobyte of the text told so far."""
        return self._sample

    @property
    def text(self) -> Text:
        return self._inner.text

    @property
    def factor(self) -> float:
        return self._inner.factor

    @property
    def terminal(self) -> bool:
        """Whether done or error was told."""
        return self._ended

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of text told so far, reasoning and arguments included."""
        return self._counted

    @property
    def head(self) -> int:
        """The number of the last frame with an id."""
        return self._n

    # --- entries --------------------------------------------------------------------------------------------------

    def preamble(self) -> bytes:
        """The first frames of the stream: `retry:`, then start."""
        # the epoch is random; reconnecting clients of one node spread over three seconds
        retry_ms = 1000 + self._epoch % 3001
        return events.start(
            request_id=self._request_id,
            model=self._ask.model or "",
            epoch=self._epoch,
            first=1,
            head=0,
            state="running",
            retry_ms=retry_ms,
        )

    def on_event(self, name: bytes, data: bytes, flags: int) -> bytes:
        """One upstream event; the frames that take its place."""
        self._inner.on_event(name, data, flags)
        if self._ended:
            return b""
        if self._inner.cut:
            self._inner.fail(_CUT)
        frames = b"".join(self._frames(self._payloads(self._inner.document)))
        if self._inner.error is not None:
            self.finish(True, self._counted)
            return frames + self.error_event(self._inner.error)
        if self._inner.terminal:
            return frames + self._end(True)
        return frames

    def on_tail(self, data: bytes) -> None:
        """Accounted, not told: no client would have seen it."""
        self._inner.on_tail(data)

    def on_body(self, content_type: str, status: int, body: bytes) -> None:
        """A JSON answer to the stream that was asked for: told by `ending()`."""
        self._inner.on_body(content_type, status, body)
        document = self._inner.document
        if self._inner.cut:
            self._inner.fail(_CUT)
        if document is None and self._inner.error is None:
            self._inner.fail(make_error("the upstream's answer cannot be read", "api_error", "upstream_unreadable"))
        elif document is not None and self._inner.error is None:
            self._pending = b"".join(self._frames(self._body_payloads(document)))

    def finish(self, clean: bool, text_bytes: int, sample: bytes = b"") -> None:
        """Settle the accounting; the relay's meter saw nothing, the text was metered here."""
        if self._counted > self._inner.body_text_bytes:
            self._inner.body_text_bytes, self._inner.body_sample = self._counted, self._sample
        self._inner.finish(clean, text_bytes, sample)

    def ending(self, clean: bool) -> bytes:
        """The frames that end the stream, once: usage and done, or error. b"" when it ended already."""
        return b"" if self._ended else self._pending + self._end(clean)

    def error_event(self, error: Error) -> bytes:
        """The error frame that ends the stream; b"" when it ended already. `error` may hold `retryable`."""
        if self._ended:
            return b""
        self._ended = True
        retryable = error.get("retryable")
        told = {name: error.get(name) for name in ("message", "type", "code")}
        told["request_id"] = self._request_id
        return events.error(told, retryable=is_retryable(error) if retryable is None else bool(retryable))

    def _end(self, clean: bool) -> bytes:
        self.finish(clean, self._counted)
        if self.error is not None:
            return self.error_event(self.error)
        if self.outcome != "completed":
            broken: Error = make_error("the upstream's answer broke off", "api_error", "upstream_truncated")
            return self._flush() + self.error_event({**broken, "retryable": True})
        frames = self._flush()
        self._ended = True
        tally = settle(self, self._ask, self._counted, True)
        self._n += 2
        usage = events.usage(
            self._epoch,
            self._n - 1,
            prompt_tokens=tally.prompt_tokens,
            completion_tokens=tally.completion_tokens,
            cached_tokens=tally.cached_tokens,
            reasoning_tokens=tally.reasoning_tokens,
            estimated=tally.estimated,
        )
        return frames + usage + events.done(self._epoch, self._n, finish_word(self.finish_reason))

    # --- payloads -------------------------------------------------------------------------------------------------

    def _frames(self, payloads: Iterator[Payload]) -> Iterator[bytes]:
        for payload in payloads:
            self._n += 1
            yield events.content(self._epoch, self._n, payload)

    def _payloads(self, document: dict[str, Any] | None) -> Iterator[Payload]:
        if document is None:
            return
        if isinstance(self._inner, AnthropicObserver):
            yield from self._anthropic(document)
            return
        for choice in listed(document.get("choices")):
            if isinstance(choice, dict) and choice.get("index") in (0, None) and isinstance(choice.get("delta"), dict):
                yield from self._delta(choice["delta"])

    def _body_payloads(self, document: dict[str, Any]) -> Iterator[Payload]:
        if isinstance(self._inner, ChatObserver):
            for choice in listed(document.get("choices"))[:1]:
                if isinstance(choice, dict) and isinstance(choice.get("message"), dict):
                    yield from self._delta(choice["message"])
            return
        for index, block in enumerate(listed(document.get("content"))):
            if isinstance(block, dict):
                yield from self._block(index, block)

    def _delta(self, delta: dict[str, Any]) -> Iterator[Payload]:
        """A chat delta, or a whole message, which has the same members."""
        reasoning = next((delta[key] for key in ("reasoning_content", "reasoning", "thinking") if delta.get(key)), None)
        yield from self._text("reasoning", reasoning)
        content = delta.get("content")
        for part in listed(content):  # Mistral's reasoning models
            if isinstance(part, dict):
                inner = part.get("thinking")
                yield from self._text("reasoning", inner if isinstance(inner, str) else _joined(inner))
                yield from self._text("delta", part.get("text"))
        yield from self._text("delta", content)
        yield from self._text("delta", delta.get("refusal"))
        for at, call in enumerate(listed(delta.get("tool_calls"))):
            if isinstance(call, dict):
                index = call.get("index")
                yield from self._tool(index if type(index) is int else at, call.get("id"), call.get("function"))
        if isinstance(delta.get("function_call"), dict):
            yield from self._tool(0, None, delta["function_call"])

    def _anthropic(self, document: dict[str, Any]) -> Iterator[Payload]:
        kind, index = document.get("type"), document.get("index")
        at = index if type(index) is int else 0
        if kind == "content_block_start" and isinstance(document.get("content_block"), dict):
            yield from self._block(at, document["content_block"])
        elif kind == "content_block_delta" and isinstance(document.get("delta"), dict):
            delta = document["delta"]
            yield from self._text("delta", delta.get("text"))
            yield from self._text("reasoning", delta.get("thinking"))
            if at in self._tools:
                yield from self._tool(self._tools[at], None, {"arguments": delta.get("partial_json")})

    def _block(self, at: int, block: dict[str, Any]) -> Iterator[Payload]:
        """A content block: empty at its start in a stream, whole in a JSON answer."""
        if block.get("type") in _TOOL_BLOCKS:
            tool = self._tools.setdefault(at, len(self._tools))
            arguments = _compact(block["input"]) if block.get("input") else ""
            yield from self._tool(tool, block.get("id"), {"name": block.get("name"), "arguments": arguments})
        elif block.get("type") in ("text", "thinking"):
            yield from self._text("delta", block.get("text"))
            yield from self._text("reasoning", block.get("thinking"))

    def _text(self, kind: str, text: Any) -> Iterator[Payload]:
        whole = self._whole(kind, text) if isinstance(text, str) and text else ""
        if whole:
            yield {"delta": whole} if kind == "delta" else {"kind": kind, "delta": whole}

    def _tool(self, index: int, id: Any, function: Any) -> Iterator[Payload]:
        function = function if isinstance(function, dict) else {}
        payload: Payload = {"kind": "tool", "index": index}
        for name, value in (("id", id), ("name", function.get("name"))):
            if isinstance(value, str) and value:
                payload[name] = self._whole("", value) if name == "name" else _mended(value)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = self._whole(f"tool{index}", arguments) if arguments else ""
            if arguments or len(payload) > 2:
                payload["arguments"] = arguments
        if len(payload) > 2:
            yield payload

    def _whole(self, kind: str, text: str) -> str:
        """`text` without half pairs: one at the end waits for the next text of its kind, others become U+FFFD.
        It is metered."""
        text = self._carry.pop(kind, "") + text
        if kind and "\ud800" <= text[-1] <= "\udbff":
            self._carry[kind] = text[-1]
            text = text[:-1]
        text = _mended(text)
        self._counted += len(text) if text.isascii() else len(text.encode())
        self._sample = grown(self._sample, text)
        return text

    def _flush(self) -> bytes:
        """Halves whose other half never came."""
        kinds, self._carry = list(self._carry), {}
        payloads = ({"delta": "\ufffd"} if kind == "delta" else {"kind": kind, "delta": "\ufffd"} for kind in kinds)
        return b"".join(self._frames(payload for payload in payloads if payload.get("kind") in (None, "reasoning")))


def _mended(text: str) -> str:
    """`text` with U+FFFD for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _joined(parts: Any) -> str:
    return "".join(
        part["text"] for part in listed(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)
    )


def _compact(value: Any) -> str:
    """An object as JSON text; arguments travel as text."""
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return json.dumps(value, separators=(",", ":"))
