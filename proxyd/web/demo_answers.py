"""What the demo model says, in both dialects: JSON answers and event streams as the providers shape them.

Owns: the text, the token counts, the JSON of every answer. Pure and deterministic: the same question, the same bytes.
Must not know: sockets, pace, scenarios.

It says in every answer that it is no AI. Counts are words, so that a person can check the accounting by eye.
Sources: platform.openai.com/docs/api-reference (chat/streaming, completions, responses-streaming, embeddings),
docs.anthropic.com/en/api/messages-streaming; field by field as in tests/corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson

__all__ = ["Question", "chat", "completion", "embeddings", "message", "models", "read_question", "response", "say"]

NAME = "proxyd-demo"
CREATED = 1_700_000_000
ECHO_WORDS = 60

_TOOL_ARGUMENTS = '{"city": "Berlin", "unit": "celsius"}'

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked, in either dialect. `words`: the answer, each with its leading space but the first."""

    model: str
    prompt: str
    words: tuple[str, ...]
    prompt_tokens: int
    tool: str
    is_usage_wanted: bool
    max_tokens: int

    @property
    def said(self) -> tuple[str, ...]:
        """The words within the limit that was asked for."""
        return self.words[: self.max_tokens] if self.max_tokens else self.words

    @property
    def text(self) -> str:
        """The answer as one text."""
        return "".join(self.said)

    @property
    def is_cut(self) -> bool:
        """Whether `max_tokens` ended the answer."""
        return len(self.said) < len(self.words)

    @property
    def completion_tokens(self) -> int:
        """What the answer costs."""
        return 12 if self.tool else len(self.said)

    @property
    def ident(self) -> str:
        """A part of ids that depends on the question alone."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:16]


def read_question(document: dict[str, Any], extra_words: int = 0) -> Question:
    """The question in a request body of any dialect; `extra_words` lengthens the answer."""
    texts = [_text_of(document.get(key)) for key in ("system", "instructions")]
    asked = ""
    messages = document.get("messages", document.get("input", document.get("prompt", "")))
    for message in messages if isinstance(messages, list) else [messages]:
        content = message.get("content", message.get("text", "")) if isinstance(message, dict) else message
        text = _text_of(content)
        texts.append(text)
        if not isinstance(message, dict) or message.get("role", "user") == "user":
            asked = text
    everything = " ".join(text for text in texts if text)
    options = document.get("stream_options")
    limits = (document.get(key) for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
    limit = next((value for value in limits if isinstance(value, int) and value > 0), 0)
    return Question(
        model=str(document.get("model", NAME)),
        prompt=asked,
        words=_answer(asked, extra_words),
        prompt_tokens=max(1, len(everything.split())),
        tool=_tool_name(document.get("tools"), asked),
        is_usage_wanted=isinstance(options, dict) and options.get("include_usage") is True,
        max_tokens=limit,
    )


def say(question: Question, text: str) -> Question:
    """The same question with `text` for an answer."""
    return replace(question, words=_spaced(text.split()), tool="")


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def _tool_name(tools: Any, asked: str) -> str:
    if not isinstance(tools, list) or not tools or "tool" not in asked.lower():
        return ""
    first = tools[0] if isinstance(tools[0], dict) else {}
    function = first.get("function")
    return str(function.get("name", "")) if isinstance(function, dict) else str(first.get("name", ""))


def _answer(asked: str, extra_words: int) -> tuple[str, ...]:
    echoed = asked.split()
    text = (
        "This is proxyd's demo model, not an AI: it answers word by word, so that you can watch a stream arrive. "
        f"You wrote {len(echoed)} word{'' if len(echoed) == 1 else 's'}: {' '.join(echoed[:ECHO_WORDS])}"
    ).split()
    if len(echoed) > ECHO_WORDS:
        text.append("...")
    text += [f"word{n}" for n in range(1, extra_words + 1)]
    return _spaced(text)


def _spaced(words: list[str]) -> tuple[str, ...]:
    return tuple(word if n == 0 else f" {word}" for n, word in enumerate(words))


# --- OpenAI -----------------------------------------------------------------------------------------------------------


def _data(event: Event | str) -> bytes:
    return b"data: " + (event.encode() if isinstance(event, str) else orjson.dumps(event)) + b"\n\n"


def _named(event: Event) -> bytes:
    return b"event: " + str(event["type"]).encode() + b"\n" + _data(event)


def _openai_usage(question: Question) -> Event:
    return {
        "prompt_tokens": question.prompt_tokens,
        "completion_tokens": question.completion_tokens,
        "total_tokens": question.prompt_tokens + question.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def chat(question: Question, stream: bool) -> Event | list[bytes]:
    """`/chat/completions`: the answer, or its events."""
    finish = "tool_calls" if question.tool else "length" if question.is_cut else "stop"
    call = {"name": question.tool, "arguments": _TOOL_ARGUMENTS}
    head: Event = {"id": f"chatcmpl-{question.ident}", "created": CREATED, "model": question.model}
    if not stream:
        said: Event = {"role": "assistant", "content": None if question.tool else question.text}
        if question.tool:
            said["tool_calls"] = [{"id": f"call_{question.ident}", "type": "function", "function": call}]
        choice = {"index": 0, "message": said, "finish_reason": finish}
        return {**head, "object": "chat.completion", "choices": [choice], "usage": _openai_usage(question)}

    null_usage: Event = {"usage": None} if question.is_usage_wanted else {}

    def chunk(delta: Event, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return _data({**head, "object": "chat.completion.chunk", "choices": [choice], **null_usage})

    events = [chunk({"role": "assistant", "content": None if question.tool else ""})]
    if question.tool:
        first = {"index": 0, "id": f"call_{question.ident}", "type": "function", "function": {**call, "arguments": ""}}
        events.append(chunk({"tool_calls": [first]}))
        events += [
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]}) for part in _pieces(_TOOL_ARGUMENTS)
        ]
    else:
        events += [chunk({"content": word}) for word in question.said]
    events.append(chunk({}, finish))
    if question.is_usage_wanted:
        usage = {**head, "object": "chat.completion.chunk", "choices": [], "usage": _openai_usage(question)}
        events.append(_data(usage))
    events.append(_data("[DONE]"))
    return events


def completion(question: Question, stream: bool) -> Event | list[bytes]:
    """`/completions`: the answer, or its events."""
    head: Event = {"id": f"cmpl-{question.ident}", "object": "text_completion", "created": CREATED}
    head["model"] = question.model
    finish = "length" if question.is_cut else "stop"
    if not stream:
        choice = {"index": 0, "text": question.text, "logprobs": None, "finish_reason": finish}
        return {**head, "choices": [choice], "usage": _openai_usage(question)}

    def chunk(text: str, reason: str | None = None) -> bytes:
        return _data({**head, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}]})

    events = [chunk(word) for word in question.said] + [chunk("", finish)]
    if question.is_usage_wanted:
        events.append(_data({**head, "choices": [], "usage": _openai_usage(question)}))
    events.append(_data("[DONE]"))
    return events


def response(question: Question, stream: bool) -> Event | list[bytes]:
    """`/responses`: the answer, or its events, numbered as the API numbers them."""
    status = "incomplete" if question.is_cut else "completed"
    if question.tool:
        item: Event = {
            "type": "function_call", "id": f"fc_{question.ident}", "call_id": f"call_{question.ident}",
            "name": question.tool, "arguments": _TOOL_ARGUMENTS, "status": "completed",
        }  # fmt: skip
    else:
        part = {"type": "output_text", "text": question.text, "annotations": []}
        item = {"type": "message", "id": f"msg_{question.ident}", "role": "assistant", "content": [part]}
        item["status"] = status
    whole: Event = {
        "id": f"resp_{question.ident}", "object": "response", "created_at": CREATED, "model": question.model,
        "status": status, "error": None, "output": [item],
        "incomplete_details": {"reason": "max_output_tokens"} if question.is_cut else None,
        "usage": {
            "input_tokens": question.prompt_tokens, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": question.completion_tokens, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": question.prompt_tokens + question.completion_tokens,
        },
    }  # fmt: skip
    if not stream:
        return whole
    begun = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    events: list[Event] = [{"type": "response.created", "response": begun}]
    events.append({"type": "response.in_progress", "response": begun})
    events += _response_item(question, item)
    events.append({"type": f"response.{status}", "response": whole})
    return [_named({**event, "sequence_number": number}) for number, event in enumerate(events)]


def _response_item(question: Question, item: Event) -> Iterator[Event]:
    place: Event = {"item_id": item["id"], "output_index": 0}
    if question.tool:
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**item, "arguments": ""}}
        for piece in _pieces(_TOOL_ARGUMENTS):
            yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
        yield {"type": "response.function_call_arguments.done", **place, "arguments": _TOOL_ARGUMENTS}
    else:
        empty = {"type": "output_text", "text": "", "annotations": []}
        place["content_index"] = 0
        opened = {**item, "content": [], "status": "in_progress"}
        yield {"type": "response.output_item.added", "output_index": 0, "item": opened}
        yield {"type": "response.content_part.added", **place, "part": empty}
        for word in question.said:
            yield {"type": "response.output_text.delta", **place, "delta": word}
        yield {"type": "response.output_text.done", **place, "text": question.text}
        yield {"type": "response.content_part.done", **place, "part": item["content"][0]}
    yield {"type": "response.output_item.done", "output_index": 0, "item": item}


def embeddings(document: dict[str, Any]) -> Event:
    """`/embeddings`: eight numbers a text, from its digest."""
    texts = document.get("input", "")
    listed = texts if isinstance(texts, list) else [texts]
    rows = [
        {"object": "embedding", "index": n, "embedding": [round(byte / 127.5 - 1, 6) for byte in _digest(text)]}
        for n, text in enumerate(listed)
    ]
    count = max(1, sum(len(str(text).split()) for text in listed))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": rows, "model": str(document.get("model", NAME)), "usage": usage}


def _digest(text: Any) -> bytes:
    return hashlib.sha256(str(text).encode()).digest()[:8]


def models() -> Event:
    """`GET /models`."""
    return {"object": "list", "data": [{"id": NAME, "object": "model", "created": CREATED, "owned_by": "proxyd"}]}


# --- Anthropic --------------------------------------------------------------------------------------------------------


def message(question: Question, stream: bool) -> Event | list[bytes]:
    """`/v1/messages`: the answer, or its events."""
    reason = "tool_use" if question.tool else "max_tokens" if question.is_cut else "end_turn"
    usage = {
        "input_tokens": question.prompt_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
        "output_tokens": question.completion_tokens,
    }  # fmt: skip
    whole: Event = {
        "id": f"msg_{question.ident}", "type": "message", "role": "assistant", "model": question.model,
        "stop_reason": reason, "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    use: Event = {"type": "tool_use", "id": f"toolu_{question.ident}", "name": question.tool}
    if not stream:
        tool_block = {**use, "input": orjson.loads(_TOOL_ARGUMENTS)}
        return {**whole, "content": [tool_block if question.tool else {"type": "text", "text": question.text}]}
    begun = {**whole, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    events: list[Event] = [{"type": "message_start", "message": begun}]
    block: Event = {**use, "input": {}} if question.tool else {"type": "text", "text": ""}
    events.append({"type": "content_block_start", "index": 0, "content_block": block})
    events.append({"type": "ping"})
    if question.tool:
        deltas: list[Event] = [{"type": "input_json_delta", "partial_json": part} for part in _pieces(_TOOL_ARGUMENTS)]
    else:
        deltas = [{"type": "text_delta", "text": word} for word in question.said]
    events += [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
    events.append({"type": "content_block_stop", "index": 0})
    ended = {"stop_reason": reason, "stop_sequence": None}
    spent = {"output_tokens": question.completion_tokens}
    events.append({"type": "message_delta", "delta": ended, "usage": spent})
    events.append({"type": "message_stop"})
    return [_named(event) for event in events]


def _pieces(text: str, size: int = 9) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]
