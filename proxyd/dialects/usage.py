"""Token counts: reading them out of a provider's objects, merging them, and settling what a request cost.

Owns: `Usage`, the per-provider field names, rule 8 (reasoning on top), estimates, `Tally`. Must not know: events,
streams. Invariants: None is unknown, never 0; merging is field by field and the last known value wins, sums are
never made; `prompt` is all input (cache reads and writes included), `completion` all output (reasoning included).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from proxyd.dialects.ask import Ask, Route
from proxyd.dialects.tokens import Text

# The columns are INT UNSIGNED: a larger count is a lie, and would be refused by the store with the whole row.
_MOST_TOKENS = 4_294_967_295

FIELDS = ("prompt", "completion", "cached", "cache_write", "reasoning")


@dataclass(slots=True)
class Usage:
    """What is known of one answer, in tokens."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None

    @property
    def total(self) -> int | None:
        """Recomputed; a provider's own total may count something else."""
        return None if self.prompt is None or self.completion is None else self.prompt + self.completion

    @property
    def known(self) -> bool:
        """Whether either side is known."""
        return self.prompt is not None or self.completion is not None

    def merge(self, later: Usage) -> None:
        """Take every field that `later` knows."""
        for name in FIELDS:
            value = getattr(later, name)
            if value is not None:
                setattr(self, name, value)


@dataclass(frozen=True, slots=True)
class Tally:
    """What is booked for a request. `estimated`: one of the two sides is a count of our own."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    estimated: bool


def count(value: Any) -> int | None:
    """A token count, or None when it is not one."""
    if type(value) is int and value >= 0:
        return min(value, _MOST_TOKENS)
    if type(value) is float and value >= 0 and value.is_integer():
        return min(int(value), _MOST_TOKENS)
    return None


def _first(*values: Any) -> int | None:
    for value in values:
        number = count(value)
        if number is not None:
            return number
    return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_openai(usage: dict[str, Any]) -> Usage:
    """A `usage` object of chat/completions, completions, embeddings or responses, whoever serves them.

    Rule 8: where total is more than prompt + completion, the gap is reasoning that the provider left out of completion,
    unless it names another reasoning count (then that is inside already).
    """
    inputs = _object(usage.get("prompt_tokens_details") or usage.get("input_tokens_details"))
    outputs = _object(usage.get("completion_tokens_details") or usage.get("output_tokens_details"))
    found = Usage(
        prompt=_first(usage.get("prompt_tokens"), usage.get("input_tokens")),
        completion=_first(usage.get("completion_tokens"), usage.get("output_tokens")),
        cached=_first(inputs.get("cached_tokens"), usage.get("prompt_cache_hit_tokens"), usage.get("cached_tokens")),
        cache_write=count(inputs.get("cache_write_tokens")),
        reasoning=_first(outputs.get("reasoning_tokens"), usage.get("reasoning_tokens")),
    )
    total = count(usage.get("total_tokens"))
    if total is not None and found.prompt is not None and found.completion is not None:
        gap = total - found.prompt - found.completion
        if gap > 0 and found.reasoning in (None, gap):
            found.reasoning = gap
            found.completion += gap
    return found


def is_placeholder(usage: dict[str, Any]) -> bool:
    """Whether all counts are 0, which no answer costs (rule 3: Ollama's interim chunks)."""
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return any(value is not None for value in counts) and not any(counts)


def read_timings(timings: dict[str, Any]) -> Usage:
    """llama.cpp's `timings`, for an answer without usage: prompt = cache_n + prompt_n."""
    cached, fresh = count(timings.get("cache_n")), count(timings.get("prompt_n"))
    prompt = None if fresh is None else fresh + (cached or 0)
    return Usage(prompt=prompt, completion=count(timings.get("predicted_n")), cached=cached)


def read_ollama(line: dict[str, Any]) -> Usage:
    """Ollama's own last line; `prompt_eval_count` is absent when the whole prompt was cached: unknown."""
    return Usage(prompt=count(line.get("prompt_eval_count")), completion=count(line.get("eval_count")))


class AnthropicCounts:
    """Anthropic's raw fields, merged before they are added up: input_tokens excludes both cache counts."""

    __slots__ = ("output", "read", "reasoning", "uncached", "write")

    def __init__(self) -> None:
        self.uncached: int | None = None
        self.read: int | None = None
        self.write: int | None = None
        self.output: int | None = None
        self.reasoning: int | None = None

    def merge(self, usage: dict[str, Any], *, book_output: bool) -> None:
        """Last known value wins. `book_output` is False for message_start, whose output count is a placeholder."""
        self.uncached = _first(usage.get("input_tokens"), self.uncached)
        self.read = _first(usage.get("cache_read_input_tokens"), self.read)
        self.write = _first(usage.get("cache_creation_input_tokens"), self.write)
        if book_output:
            self.output = _first(usage.get("output_tokens"), self.output)
            details = _object(usage.get("output_tokens_details"))
            self.reasoning = _first(details.get("thinking_tokens"), self.reasoning)

    def usage(self) -> Usage:
        """The canonical record."""
        prompt = None if self.uncached is None else self.uncached + (self.read or 0) + (self.write or 0)
        return Usage(prompt, self.output, self.read, self.write, self.reasoning)


class Observed(Protocol):
    """What settling needs of an observer."""

    @property
    def usage(self) -> Usage: ...
    @property
    def outcome(self) -> str: ...
    @property
    def refused(self) -> bool: ...
    @property
    def text_bytes(self) -> int: ...
    @property
    def text(self) -> Text: ...
    @property
    def factor(self) -> float: ...


def settle(observer: Observed, ask: Ask, text_bytes: int, delivered: bool) -> Tally:
    """What to book: the provider's numbers field by field, our counts of the texts where it gave none.

    `delivered`: the upstream answered with a 2xx head. Nothing is booked when it did not, when it answered 4xx/5xx,
    or when the only thing it sent was an error. Hidden reasoning cannot be estimated: a completion of ours is a
    lower bound.
    """
    usage = observer.usage
    if ask.route is Route.COUNT_TOKENS:
        return Tally(0, 0, 0, 0, False)
    text_bytes = max(text_bytes, observer.text_bytes)
    if not delivered or observer.refused or (observer.outcome == "error" and not usage.known and text_bytes == 0):
        return Tally(0, 0, 0, 0, True)
    prompt, completion = usage.prompt, usage.completion
    if ask.route is Route.EMBEDDINGS:
        completion = 0
    estimated = prompt is None or completion is None
    if prompt is None:
        prompt = max(ask.prompt.tokens(observer.factor), usage.cached or 0)
    if completion is None:
        text = observer.text
        completion = (text if text_bytes <= text.size else Text(text_bytes, text.sample)).tokens(observer.factor)
    return Tally(
        min(prompt, _MOST_TOKENS),
        min(completion, _MOST_TOKENS),
        min(usage.cached or 0, prompt, _MOST_TOKENS),
        min(usage.reasoning or 0, completion, _MOST_TOKENS),
        estimated,
    )
