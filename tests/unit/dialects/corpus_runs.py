"""Running a corpus case through the real splitter and the observer of its route; shared by the tests of this room."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import orjson

from proxyd.dialects.base import Observer, Route, build, make_observer, parse_ask
from tests.corpus_cases import load_cases

REQUEST_ID = "0123456789abcdef0123456789abcdef"

_ROUTES = {
    "openai.chat": Route.CHAT,
    "openai.completions": Route.COMPLETIONS,
    "openai.responses": Route.RESPONSES,
    "anthropic.messages": Route.MESSAGES,
    "ollama.chat": Route.CHAT,
    "ollama.generate": Route.COMPLETIONS,
}


@dataclass(frozen=True)
class Case:
    name: str
    body: bytes
    expected: dict[str, Any]

    @property
    def route(self) -> Route:
        return _ROUTES[self.expected["api"].removesuffix(".json")]

    @property
    def is_sse(self) -> bool:
        return self.name.endswith((".sse", ".bin"))


@cache
def api_cases() -> tuple[Case, ...]:
    """Every case that speaks a provider's API (the syntax cases are the splitter's)."""
    cases = []
    for case in load_cases():
        if case.expected["api"] == "sse":
            continue
        body = zlib.decompress(case.body, 47) if "content_encoding" in case.expected else case.body
        cases.append(Case(case.path, body, case.expected))
    return tuple(cases)


def case_named(name: str) -> Case:
    return next(case for case in api_cases() if case.name == name)


def request_body(route: Route, *, n: int | None = None, stream: bool = True, **more: Any) -> bytes:
    document: dict[str, Any] = {"model": "m"}
    if route not in (Route.EMBEDDINGS, Route.COUNT_TOKENS):
        document["stream"] = stream
    if n is not None:
        document["n"] = n
    return orjson.dumps(document | more)


def observer_for(case: Case, *, hide: bool = False) -> Observer:
    """As the relay makes it: the request's `n` is that of the case."""
    n = 2 if "finish_reasons" in case.expected else None
    ask = parse_ask(case.route, request_body(case.route, n=n))
    dialect = case.route.dialect or "openai"
    outgoing = build(ask, dialect, "", hide)
    observer = make_observer(ask, dialect, outgoing, request_id=REQUEST_ID, epoch=7)
    assert isinstance(observer, Observer)
    return observer


def run(
    splitter_class: Any, observer: Any, chunks: list[bytes], *, clean: bool, watched: bool = True
) -> tuple[bytes, Any]:
    """Feed the chunks, end the body, settle; the forwarded bytes and the splitter."""
    splitter = splitter_class(observer.on_event, observer.watch if watched else None)
    out = b"".join([bytes(splitter.feed(chunk)) for chunk in chunks])
    out += bytes(splitter.finish())
    if splitter.tail_data is not None:
        observer.on_tail(splitter.tail_data)
    observer.finish(clean, splitter.text_bytes, splitter.sample)
    return out, splitter


def accounting(observer: Any) -> dict[str, Any]:
    """What expected.json holds, of an observer."""
    usage = observer.usage
    return {
        "usage": {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "cached_tokens": usage.cached,
            "cache_write_tokens": usage.cache_write,
            "reasoning_tokens": usage.reasoning,
            "total_tokens": usage.total,
        },
        "usage_source": observer.usage_source,
        "model": observer.model,
        "finish_reason": observer.finish_reason,
        "outcome": observer.outcome,
    }


def assert_accounting(observer: Any, expected: dict[str, Any]) -> None:
    found = accounting(observer)
    assert found == {name: expected[name] for name in found}
    assert (observer.error is None) == (expected["error"] is None)
    if expected["error"] is not None:
        assert {name: observer.error[name] for name in expected["error"]} == expected["error"]
    if "done_seen" in expected:
        assert observer.done_seen is expected["done_seen"]
    if "finish_reasons" in expected:
        assert {str(at): reason for at, reason in observer.finish_reasons.items()} == expected["finish_reasons"]
