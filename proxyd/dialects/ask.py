"""What a client asked for: one of our relay routes and the few members of its JSON body that we read.

Owns: `Route`, `Ask`, `Outgoing`, `parse_ask`, how much text a prompt has. Must not know: sockets, upstreams,
configuration, what an answer looks like. Invariants: `Ask.body` is the identical bytes object that the
client sent; what we do not read is neither checked nor touched; a top-level member that we read occurs once (two
parsers that disagree on which one counts would meter one model and bill another).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import accumulate
from typing import Any, Literal, NoReturn

import orjson

from proxyd._scan import members, mend, structure
from proxyd.dialects.tokens import NOTHING, SAMPLE_BYTES, Text
from proxyd.errors import Refusal

Dialect = Literal["openai", "anthropic"]

# Three tokens a message (token-estimation.md), in the bytes/4 currency of our estimates.
_BYTES_PER_MESSAGE = 12
# How deep we follow lists and objects for text; content parts of tool results nest three levels, a hostile body a
# thousand.
_TEXT_DEPTH = 6
_TEXT_KEYS = (
    "name", "content", "text", "input", "output", "arguments", "thinking", "instructions", "tool_calls", "function",
)  # fmt: skip
# What stands around the text of a message (token-estimation.md): three tokens and its role; once for all, the start of
# the answer. A message that names its speaker has one more.
_TOKENS_PER_MESSAGE = 4
_TOKENS_OF_PRIMING = 3
# Of a longer prompt windows are kept, evenly spread: it may begin in one language and go on in another.
_WINDOWS = 4
_WINDOW_BYTES = SAMPLE_BYTES // _WINDOWS
# No API has 50 members; half of this would still do, a multiple lets one body hold the loop for tens of milliseconds.
_MOST_MEMBERS = 1000
# Longer than any name we read with all its letters escaped.
_LONGEST_KEY = 128
# orjson needs up to 60 ns for a unit of structure, and 20 to 60 bytes: 50 ms and 50 MB at most. A history of 2,000
# messages with parts has 60,000, token arrays one a token. Twice it holds the loop for more than 100 ms.
MOST_STRUCTURE = 800_000
# The site's route has its messages checked and built anew besides, which costs as much again.
MOST_STRUCTURE_REBUILT = 400_000
# How many values of a prompt are looked at, 0.1 us each; a prompt that has more is taken for text all through.
_MOST_VALUES = 100_000
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))


class Route(StrEnum):
    """The relay routes; the value is the public path."""

    STREAM = "/api/v1/stream"
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    EMBEDDINGS = "/v1/embeddings"
    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"

    @property
    def dialect(self) -> Dialect | None:
        """The dialect that the bytes of this route are in; None for the site's own route, which any upstream can
        serve."""
        if self is Route.STREAM:
            return None
        return "anthropic" if self in (Route.MESSAGES, Route.COUNT_TOKENS) else "openai"


# Their prompt is bare text, in no message.
_WITHOUT_TURNS = (Route.COMPLETIONS, Route.EMBEDDINGS)
# The members we read, thus check and want once.
_READ: dict[Route, tuple[str, ...]] = {
    Route.STREAM: ("prompt", "messages", "model", "system", "max_tokens", "temperature"),
    Route.CHAT: ("model", "stream", "stream_options", "n", "messages", "max_tokens", "max_completion_tokens"),
    Route.COMPLETIONS: ("model", "stream", "stream_options", "n", "best_of", "prompt", "max_tokens"),
    Route.RESPONSES: ("model", "stream", "input", "instructions", "max_output_tokens"),
    Route.EMBEDDINGS: ("model", "input"),
    Route.MESSAGES: ("model", "stream", "messages", "system", "max_tokens"),
    Route.COUNT_TOKENS: ("model", "messages", "system"),
}
# What bounds one answer's tokens: the first of them that is given.
_BOUNDS: dict[Route, tuple[str, ...]] = {
    Route.STREAM: ("max_tokens",),
    Route.CHAT: ("max_completion_tokens", "max_tokens"),
    Route.COMPLETIONS: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
    Route.MESSAGES: ("max_tokens",),
}
# How many answers are made; of `best_of` those that are not shown are paid for, too.
_WITH_CHOICES: dict[Route, tuple[str, ...]] = {Route.CHAT: ("n",), Route.COMPLETIONS: ("n", "best_of")}
# No provider makes more.
_MOST_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Ask:
    """A request body, read. `model` is None only on STREAM: then the first configured model answers. `document` is
    whole only there; of a native body it holds what is read later. A repr shows nothing of the prompt."""

    route: Route
    model: str | None
    stream: bool
    body: bytes = field(repr=False)
    document: dict[str, Any] = field(repr=False)
    prompt_text_bytes: int
    asked_usage: bool
    max_tokens: int | None = None
    """The most tokens that all its answers together may have, where the client said so; 1 or more."""
    prompt: Text = NOTHING
    """What is counted where the provider does not tell; `prompt_text_bytes` is the quick look before."""

    def without_body(self) -> Ask:
        """What is kept of it while its answer runs: the body may be megabytes."""
        return replace(self, body=b"", document={})

    @property
    def many_choices(self) -> bool:
        """Whether the answer may hold more than choice index 0: `n` above one, or a list of legacy prompts."""
        n = self.document.get("n")
        if isinstance(n, int) and not isinstance(n, bool) and n > 1:
            return True
        prompt = self.document.get("prompt")
        return (
            self.route is Route.COMPLETIONS and isinstance(prompt, list) and len(prompt) > 1 and not _is_tokens(prompt)
        )


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What goes upstream: `path` below the upstream's base, `body`, and whether the answer needs hiding or
    translating."""

    path: str
    body: bytes = field(repr=False)
    injected: bool
    translate: bool


def parse_ask(route: Route, body: bytes) -> Ask:
    """Read a request body; raises Refusal 400 that names the field at fault. Linear in the body."""
    document, mended = _load(body, MOST_STRUCTURE_REBUILT if route is Route.STREAM else MOST_STRUCTURE)
    _refuse_duplicates(route, body)
    if route is Route.STREAM:
        return _site_ask(body, document, mended)
    model = document.get("model")
    if model is None:
        _refuse("model", "you must provide a model", "missing_required_parameter")
    if not isinstance(model, str) or not model.strip():
        _refuse("model", "model must be a non-empty string", "invalid_type")
    stream = document.get("stream") if "stream" in _READ[route] else None
    if stream is not None and not isinstance(stream, bool):
        _refuse("stream", "stream must be true or false", "invalid_type")
    options = document.get("stream_options")
    asked = isinstance(options, dict) and options.get("include_usage") is True
    text_bytes, prompt = read_prompt(route, document, len(body))
    most = _max_tokens(route, document)
    return Ask(route, model, stream is True, body, _kept(route, document, asked), text_bytes, asked, most, prompt)


def _max_tokens(route: Route, document: dict[str, Any]) -> int | None:
    """The bound that the upstream goes by: another route's name for it means nothing there, and 0 is none to some.
    Times the answers that are asked for. What is no count is the upstream's to refuse."""
    name = next((name for name in _BOUNDS.get(route, ()) if document.get(name) is not None), "")
    most = document.get(name)
    if type(most) is not int or most < 1:
        return None
    if route in _WITH_CHOICES:
        given = [document.get(name) for name in _WITH_CHOICES[route]]
        most *= min(max([1, *(count for count in given if type(count) is int)]), _MOST_CHOICES)
    prompts = document.get("prompt")
    if route is Route.COMPLETIONS and isinstance(prompts, list) and not _is_tokens(prompts):
        most *= max(1, len(prompts))
    return most


def _kept(route: Route, document: dict[str, Any], asked: bool) -> dict[str, Any]:
    """What is asked of a native document later. The rest, up to ten times its body, is let go before the upstream is
    asked."""
    kept: dict[str, Any] = {name: document[name] for name in ("model", "stream") if name in document}
    if isinstance(document.get("n"), int):
        kept["n"] = document["n"]
    options = document.get("stream_options")
    if options is not None:
        kept["stream_options"] = {"include_usage": asked} if isinstance(options, dict) else False
    prompt = document.get("prompt")
    if route is Route.COMPLETIONS and isinstance(prompt, list):
        kept["prompt"] = prompt[:2]
    return kept


def _load(body: bytes, most: int) -> tuple[dict[str, Any], bool]:
    """The document, and whether it had to be mended: JavaScript escapes half a surrogate pair where it cuts an emoji,
    which is legal JSON that providers take and orjson does not."""
    if structure(body, most) > most:
        raise Refusal(
            400,
            "request_too_complex",
            f"the body has too many parts: {most} are allowed, where a list or an object counts 5, "
            "a member's colon 2, a comma and a string 1",
        )
    document: Any
    mended = body
    try:
        try:
            document = orjson.loads(body)
        except ValueError:
            mended = mend(body)
            if mended is body:
                raise
            document = orjson.loads(mended)
    except ValueError:
        raise Refusal(400, "invalid_json", "the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise Refusal(400, "invalid_json", "the body must be a JSON object")
    return document, mended is not body


def key_name(raw: bytes) -> str:
    """The name that a key's raw text means: `\\u006dodel` is `model`."""
    if b"\\" not in raw:
        return raw.decode()
    if len(raw) > _LONGEST_KEY:
        return ""
    try:
        name = json.loads(b'"' + raw + b'"')
    except ValueError:
        return ""
    return name if isinstance(name, str) else ""


def _refuse_duplicates(route: Route, body: bytes) -> None:
    read = _READ[route]
    seen: set[str] = set()
    for key_start, key_end, _, _ in top_members(body):
        name = key_name(body[key_start:key_end])
        if name in read:
            if name in seen:
                _refuse(name, f"{name} is given more than once", "duplicate_parameter")
            seen.add(name)


def top_members(body: bytes) -> list[tuple[int, int, int, int]]:
    """The spans of the body's members; raises Refusal 400 for more than anyone means to send."""
    spans = members(body)
    if len(spans) > _MOST_MEMBERS:
        raise Refusal(400, "too_many_members", f"the body has more than {_MOST_MEMBERS} members")
    return spans


def _refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise Refusal(400, code, message, param=param)


# --- the site's own route -----------------------------------------------------------------------------------------


def _site_ask(body: bytes, document: dict[str, Any], mended: bool) -> Ask:
    """`prompt` or `messages`, checked through because we build the upstream's request from them; unknown members are
    ignored, so a page that sends one of its own is not broken by us."""
    prompt, messages, model = document.get("prompt"), document.get("messages"), document.get("model")
    if prompt is None and messages is None:
        _refuse("prompt", "give prompt (a string) or messages", "missing_required_parameter")
    if prompt is not None and messages is not None:
        _refuse("prompt", "give prompt or messages, not both")
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        _refuse("prompt", "prompt must be a non-empty string", "invalid_type")
    if messages is not None:
        _check_messages(messages)
    if model is not None and (not isinstance(model, str) or not model.strip()):
        _refuse("model", "model must be a non-empty string", "invalid_type")
    if not isinstance(document.get("system"), str | None):
        _refuse("system", "system must be a string", "invalid_type")
    most = document.get("max_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        _refuse("max_tokens", "max_tokens must be a whole number of at least 1", "invalid_type")
    heat = document.get("temperature")
    if heat is not None and (isinstance(heat, bool) or not isinstance(heat, int | float) or not 0 <= heat <= 2):
        _refuse("temperature", "temperature must be a number from 0 to 2", "invalid_type")
    if mended:
        raise Refusal(400, "invalid_json", "the body holds half a surrogate pair")
    text_bytes, prompt = read_prompt(Route.STREAM, document, len(body))
    most = _max_tokens(Route.STREAM, document)
    return Ask(Route.STREAM, model, True, body, document, text_bytes, False, most, prompt)


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "messages must be a non-empty list", "invalid_type")
    spoken = False
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            _refuse(where, f"{where} must be an object", "invalid_type")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if role not in _ROLES if isinstance(role, str) else True:
            _refuse(f"{where}.role", f"{where}.role must be one of {', '.join(sorted(_ROLES))}")
        spoken = spoken or role not in ("system", "developer")
        if content is None and role != "assistant":
            _refuse(f"{where}.content", f"{where}.content is missing", "missing_required_parameter")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict):
                    _refuse(
                        f"{where}.content", f"{where}.content must be a string or a list of objects", "invalid_type"
                    )
        elif content is not None and not isinstance(content, str):
            _refuse(f"{where}.content", f"{where}.content must be a string or a list of objects", "invalid_type")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            _refuse(f"{where}.tool_calls", f"{where}.tool_calls must be a list of objects", "invalid_type")
    if not spoken:
        _refuse("messages", "messages holds nothing but system messages")


# --- the size of a prompt -------------------------------------------------------------------------------------------


def read_prompt(route: Route, document: dict[str, Any], most: int) -> tuple[int, Text]:
    """UTF-8 bytes of the prompt's text plus 12 for each message, a quarter of which is the quick estimate; and what to
    count its tokens from. Pictures count nothing. `most`: what is answered for a prompt of more values than are looked
    at, the body's length."""
    size = ids = listed = turns = speakers = 0
    values: list[Any] = []
    texts: list[str] = []
    for name in ("prompt", "input", "system", "instructions", "messages"):
        value = document.get(name)
        if value is None:
            continue
        values.append(value)
        if name in ("messages", "input") and isinstance(value, list):
            entries = [entry for entry in value if isinstance(entry, dict)]
            listed += len(entries)
            speakers += sum("name" in entry for entry in entries)
        elif route not in _WITHOUT_TURNS:
            turns += 1
    looked_at = 0
    for depth in range(_TEXT_DEPTH + 1):
        looked_at += len(values)
        if looked_at > _MOST_VALUES:
            return most, Text(most, b"")
        inner: list[Any] = []
        for value in values:
            if isinstance(value, str):
                if value:
                    texts.append(value)
                    size += len(value) if value.isascii() else len(value.encode())
            elif depth == _TEXT_DEPTH:
                continue
            elif isinstance(value, list):
                if _is_tokens(value):
                    ids += len(value)
                else:
                    inner += value
            elif isinstance(value, dict):
                inner += [value[key] for key in _TEXT_KEYS if key in value]
        values = inner
    turns += listed
    around = _TOKENS_PER_MESSAGE * turns + speakers + _TOKENS_OF_PRIMING if turns else 0
    return size + 4 * ids + _BYTES_PER_MESSAGE * listed, Text(size, _sample(texts, size), around + ids)


def _sample(texts: list[str], size: int) -> bytes:
    """At most a kilobyte of texts that have `size` bytes together."""
    if size <= SAMPLE_BYTES:
        return "\0".join(texts).encode("utf-8", "replace")
    parts: list[bytes] = []
    ends = list(accumulate(map(len, texts)))
    for window in range(_WINDOWS):
        start = max(0, ends[-1] - _WINDOW_BYTES) * window // (_WINDOWS - 1)
        at = bisect_right(ends, start)
        skip = start - (ends[at] - len(texts[at]))
        room = _WINDOW_BYTES
        while room > 0 and at < len(texts):
            parts.append(texts[at][skip : skip + room].encode("utf-8", "replace")[:room])
            room -= len(parts[-1])
            at, skip = at + 1, 0
    return b"\0".join(parts)


def _is_tokens(value: list[Any]) -> bool:
    """A prompt already in token ids."""
    return set(map(type, value)) == {int}
