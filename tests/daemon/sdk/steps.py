"""The session every SDK goes through, step by step; data only.

Owns: what is asked with which call and options, and what the provider answers. Must not know: how SDKs are driven
(session.py, session.mjs) or compared (test_sdks.py). A step's `answer` stays in the test's process, the rest travels as
JSON to the drivers.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.corpus_cases import CORPUS
from tests.daemon.sdk import bodies as b
from tests.daemon.sdk.bodies import Answer, cut, error, in_turn, sse, usage_on_demand, whole

PYTHON = ("openai-py", "openai-py-async", "anthropic-py", "anthropic-py-async")
JAVASCRIPT = ("openai-js", "anthropic-js")
SDKS = (*PYTHON, *JAVASCRIPT)


@dataclass(frozen=True)
class Step:
    """One call of an SDK. `how`: whole, raw (with the answer's headers), stream, helper (the SDK's own assembling
    stream), break (leave the loop after two events)."""

    name: str
    dialect: str
    call: str
    how: str
    answer: Answer
    params: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # max_retries, timeout_s, key (of the run's keys)
    only: tuple[str, ...] = SDKS
    own: tuple[int, str] | None = None  # status and code, where proxyd refuses this itself

    def wire(self) -> dict[str, Any]:
        return {"name": self.name, "call": self.call, "how": self.how, "params": self.params, "options": self.options}


ASK = [{"role": "user", "content": "Hi"}]
USAGE = {"stream_options": {"include_usage": True}}
# The four ways a client can put the question.
FORMS: dict[str, dict[str, Any]] = {
    "absent": {},
    "null": {"stream_options": None},
    "false": {"stream_options": {"include_usage": False}},
    "true": USAGE,
}
FUNCTION = {"type": "object", "properties": {"city": {"type": "string"}}}
OPENAI_TOOLS = {
    "tools": [
        {"type": "function", "function": {"name": name, "description": name, "parameters": FUNCTION}}
        for name in ("get_weather", "get_time")
    ],
    "parallel_tool_calls": True,
}
ANTHROPIC_TOOLS = {"tools": [{"name": name, "input_schema": FUNCTION} for name in ("get_weather", "get_time")]}
THINK = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 2048}
# Long, of every plane, with what JSON, SSE and HTTP treat specially.
UNICODE = (
    'Grüße 你好 שלום 👩‍👩‍👧‍👦 e\u0301 \u2028\u2029\u0085 \ufeff \\ " \r\n\r\ndata: [DONE]\n\n' + "\U0001f9ea"
) * 2000
MAX_BODY_BYTES = 1024 * 1024  # of the run's proxyd
SOON = {"retry_after_ms": "5"}
RETRIED = (408, 409, 429, 500, 501, 503, 529)
REFUSED = (400, 401, 402, 403, 404, 413, 422)


def chat(name: str, how: str, answer: Answer, more: dict[str, Any] | None = None, **rest: Any) -> Step:
    return Step(name, "openai", "chat", how, answer, {"model": "gpt-4o", "messages": ASK, **(more or {})}, **rest)


def other(name: str, call: str, how: str, answer: Answer, **params: Any) -> Step:
    return Step(name, "openai", call, how, answer, {"model": "gpt-4o", **params})


def claude(name: str, how: str, answer: Answer, more: dict[str, Any] | None = None, **rest: Any) -> Step:
    params = {"model": "claude", "messages": ASK, "max_tokens": 64, **(more or {})}
    return Step(name, "anthropic", "messages", how, answer, params, **rest)


def openai_values() -> list[Step]:
    """What comes back when all is well."""
    steps = []
    for framing in ("chunked", "length"):
        for form, options in FORMS.items():
            answer = usage_on_demand(b.CHAT_COUNTED, framing)
            steps.append(chat(f"chat usage {form} {framing}", "stream", answer, options))
    responses = sse("openai", b.corpus("openai/responses-completed.sse"))
    response = whole("openai", b.corpus("json/openai-responses-200.body"))
    tools = sse("openai", b.corpus("openai/chat-tool-calls.sse"))
    completions = usage_on_demand(b.COMPLETIONS_COUNTED)
    return [
        *steps,
        chat("chat whole", "whole", whole("openai", b.corpus("json/openai-chat-200.body"))),
        chat("chat whole with headers", "raw", whole("openai", b.corpus("json/openai-chat-200.body"))),
        chat("chat whole without a request id", "raw", whole("openai", b.chat_of(), x_request_id="")),
        chat(
            "chat whole chunked",
            "whole",
            sse("openai", b.corpus("json/openai-chat-200.body"), media="application/json"),
        ),
        chat("chat helper", "helper", sse("openai", b.CHAT_COUNTED), USAGE),
        chat("chat tools stream", "stream", tools, {**OPENAI_TOOLS, **USAGE}),
        chat("chat tools helper", "helper", tools, {**OPENAI_TOOLS, **USAGE}),
        chat("chat tools whole", "whole", whole("openai", b.CHAT_TOOLS), OPENAI_TOOLS),
        chat("chat n=2 stream", "stream", sse("openai", b.corpus("openai/chat-n2.sse")), {"n": 2, **USAGE}),
        chat("chat n=2 whole", "whole", whole("openai", b.chat_of(n=2)), {"n": 2}),
        chat(
            "chat JSON to who asked for a stream",
            "stream",
            whole("openai", b.corpus("json/stream-true-but-json-200.body")),
            USAGE,
        ),
        chat("chat unicode there and back", "whole", b.echo, {"messages": [{"role": "user", "content": UNICODE}]}),
        other("completions stream", "completions", "stream", completions, prompt="Once"),
        other("completions stream usage", "completions", "stream", completions, prompt="Once", **USAGE),
        other("completions whole", "completions", "whole", whole("openai", b.COMPLETION), prompt="Once"),
        other("responses stream", "responses", "stream", responses, input="Hi"),
        other("responses helper", "responses", "helper", responses, input="Hi"),
        other("responses whole", "responses", "whole", response, input="Hi"),
        other("embeddings", "embeddings", "whole", b.embedding, input="Hi"),
        other("embeddings as numbers", "embeddings", "whole", b.embedding, input=["Hi"], encoding_format="float"),
        Step("models", "openai", "models", "whole", whole("openai", MODELS)),
        chat("usage unasked", "stream", sse("openai", b.CHAT_COUNTED)),
        chat("gzip though not asked for", "stream", usage_on_demand(b.CHAT_COUNTED, coded=True)),
        chat(
            "stream options refused",
            "stream",
            b.refuses_stream_options(b.without_usage(b.CHAT_COUNTED)),
            {"model": "old"},
        ),
    ]


WHOLE = {"openai": "openai-chat-200.body", "anthropic": "anthropic-message-200.body"}
MODELS = {"object": "list", "data": [{"id": "gpt-4o", "object": "model", "created": 1, "owned_by": "openai"}]}


def openai_wire() -> list[Step]:
    """Every stream of the corpus, and what the corpus has not."""
    steps = []
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "openai.chat": ("chat", {"messages": ASK, **USAGE}),
        "openai.completions": ("completions", {"prompt": "Hi", **USAGE}),
        "openai.responses": ("responses", {"input": "Hi"}),
    }
    for entry in json.loads((CORPUS / "index.json").read_text()):
        if entry["api"] not in calls or not entry["path"].endswith(".sse"):
            continue
        call, params = calls[entry["api"]]
        for framing in ("chunked", "length"):
            answer = sse("openai", b.corpus(entry["path"]), framing)
            steps.append(other(f"{entry['path']} {framing}", call, "stream", answer, **params))
    for kind in ("syncflush", "noflush"):
        answer = sse("openai", b.corpus(f"encoded/chat-gzip-{kind}.bin"), content_encoding="gzip")
        steps.append(chat(f"gzip {kind}", "stream", answer, USAGE))
    many = b"".join(b.chat_chunk(f"{number} 語") for number in range(300)) + b"data: [DONE]\n\n"
    return [
        *steps,
        chat("CR line ends", "stream", sse("openai", b.CHAT_COUNTED.replace(b"\n", b"\r")), USAGE),
        chat("CRLF line ends", "stream", sse("openai", b.CHAT_COUNTED.replace(b"\n", b"\r\n")), USAGE),
        chat("1 MiB event chunked", "stream", sse("openai", b.HUGE_CHAT), USAGE),
        chat("1 MiB event with a length", "stream", sse("openai", b.HUGE_CHAT, "length")),
        chat("many events", "stream", sse("openai", many)),
    ]


def errors(dialect: str) -> list[Step]:
    """Refusals, with the SDK's default retries."""
    make: Callable[..., Step] = chat if dialect == "openai" else claude
    ok = whole(dialect, b.corpus(f"json/{WHOLE[dialect]}"))
    steps = [make(f"{dialect} {status}", "whole", error(dialect, status)) for status in REFUSED]
    steps += [make(f"{dialect} {status} retried", "whole", error(dialect, status, **SOON)) for status in RETRIED]
    steps += [
        make(f"{dialect} {status} to a stream", "stream", error(dialect, status, **SOON))
        for status in (400, 422, 429, 500)
    ]
    return [
        *steps,
        make(f"{dialect} 500 without a hint", "whole", error(dialect, 500)),
        make(
            f"{dialect} retry-after in seconds",
            "whole",
            error(dialect, 429, retry_after="1"),
            options={"max_retries": 1},
        ),
        make(f"{dialect} 400 to be retried", "whole", error(dialect, 400, x_should_retry="true", **SOON)),
        make(f"{dialect} 500 not to be retried", "whole", error(dialect, 500, x_should_retry="false")),
        make(f"{dialect} 503 once", "whole", in_turn(error(dialect, 503, **SOON), ok)),
        make(
            f"{dialect} HTML 502",
            "whole",
            whole(dialect, b"<html><h1>502 Bad Gateway</h1></html>", 502, "text/html", **SOON),
        ),
        make(f"{dialect} empty 500", "whole", whole(dialect, b"", 500, **SOON)),
        make(f"{dialect} not JSON", "whole", whole(dialect, b"not json")),
    ]


def breaks(dialect: str) -> list[Step]:
    """Answers that break off, and a client that leaves."""
    make: Callable[..., Step]
    if dialect == "openai":
        make, more, body, huge, again = chat, USAGE, b.CHAT_COUNTED, b.HUGE_CHAT, b.chat_chunk("more")
    else:
        make, more, body, huge = claude, {}, b.ANTHROPIC, b.HUGE_MESSAGE
        again = b.events({"type": "content_block_delta", "index": 0, "delta": b.text_delta("more")})
    full = b.corpus(f"json/{WHOLE[dialect]}")
    two = b.first_events(body, 4)
    half = two + body.split(b"\n\n")[4][:40]
    huge = b.first_events(body, 2) + huge[:300_000]
    return [
        make(f"{dialect} cut between events", "stream", cut(dialect, two, "eof"), more),
        make(f"{dialect} cut within an event", "stream", cut(dialect, half, "eof"), more),
        make(f"{dialect} cut short of its length", "stream", cut(dialect, two, "short"), more),
        make(f"{dialect} cut by a reset", "stream", cut(dialect, two, "reset"), more),
        make(f"{dialect} cut before any event", "stream", cut(dialect, b"", "eof"), more),
        make(f"{dialect} cut within a large event", "stream", cut(dialect, huge, "eof"), more),
        make(f"{dialect} whole answer cut", "whole", cut(dialect, full[:60], "short", "application/json")),
        make(f"{dialect} closed without an answer", "whole", b.no_answer, options={"max_retries": 1}),
        make(f"{dialect} client leaves", "break", b.endless(dialect, two, again), more),
    ]


def patience(dialect: str) -> list[Step]:
    """Clients that lose it. The last steps, when the machine has nothing else to do: a request must reach the provider
    before its client gives up, or another number of attempts is counted."""
    make: Callable[..., Step] = chat if dialect == "openai" else claude
    body, more = (b.CHAT_COUNTED, USAGE) if dialect == "openai" else (b.ANTHROPIC, {})
    sent = b.then_silence(dialect, b.first_events(body, 4))
    once_more = {"timeout_s": 3.0, "max_retries": 1}
    return [
        make(f"{dialect} no answer in time", "whole", b.silence, options=once_more),
        make(f"{dialect} silent stream", "stream", sent, more, options={"timeout_s": 3.0}, only=PYTHON),
    ]


def refusals(dialect: str) -> list[Step]:
    """What proxyd refuses itself. Directly the provider refuses it, with the status that it would have."""
    make = chat if dialect == "openai" else claude
    long = {"messages": [{"role": "user", "content": "x" * (MAX_BODY_BYTES + 500_000)}]}
    unknown = {"model": "nobody-serves-this"}
    return [
        make(
            f"{dialect} refuses a bad key",
            "whole",
            error(dialect, 401),
            options={"key": "bad"},
            own=(403, "invalid_token"),
        ),
        make(
            f"{dialect} refuses a spent session",
            "stream",
            error(dialect, 429, x_should_retry="false"),
            options={"key": "spent"},
            own=(429, "quota_exceeded"),
        ),
        make(
            f"{dialect} refuses an unknown model", "whole", error(dialect, 404), unknown, own=(404, "model_not_found")
        ),
        make(f"{dialect} refuses a large body", "whole", error(dialect, 413), long, own=(413, "body_too_large")),
    ]


def anthropic_values() -> list[Step]:
    thinking = [
        {"type": "thinking", "thinking": "27 × 453", "signature": "EqQBCgIYAhIM1gbc"},
        {"type": "redacted_thinking", "data": "EmwKAhgBEgy3va3p"},
        {"type": "text", "text": "12,231"},
    ]
    used = [{"type": "tool_use", "id": f"toolu_{n}", "name": "get_time", "input": {"n": n}} for n in (1, 2)]
    basic = b.corpus("json/anthropic-message-200.body")
    return [
        claude("messages stream", "stream", sse("anthropic", b.ANTHROPIC)),
        claude("messages stream with a length", "stream", sse("anthropic", b.ANTHROPIC, "length")),
        claude("messages helper", "helper", sse("anthropic", b.ANTHROPIC)),
        claude("messages whole", "whole", whole("anthropic", basic)),
        claude("messages whole with headers", "raw", whole("anthropic", basic)),
        claude("messages whole without a request id", "raw", whole("anthropic", basic, request_id="")),
        claude("messages tools stream", "stream", sse("anthropic", b.TOOLS), ANTHROPIC_TOOLS),
        claude("messages tools helper", "helper", sse("anthropic", b.TOOLS), ANTHROPIC_TOOLS),
        claude(
            "messages tools whole", "whole", whole("anthropic", b.message_of(*used, stop="tool_use")), ANTHROPIC_TOOLS
        ),
        claude("thinking stream", "stream", sse("anthropic", b.THINKING), THINK),
        claude("thinking helper", "helper", sse("anthropic", b.THINKING), THINK),
        claude("thinking whole", "whole", whole("anthropic", b.message_of(*thinking, stop="end_turn")), THINK),
        Step(
            "count tokens",
            "anthropic",
            "count_tokens",
            "whole",
            whole("anthropic", {"input_tokens": 14}),
            {"model": "claude", "messages": ASK},
        ),
    ]


def anthropic_wire() -> list[Step]:
    steps = []
    for entry in json.loads((CORPUS / "index.json").read_text()):
        if entry["api"] == "anthropic.messages" and entry["path"].endswith(".sse"):
            for framing in ("chunked", "length"):
                answer = sse("anthropic", b.corpus(entry["path"]), framing)
                steps.append(claude(f"{entry['path']} {framing}", "stream", answer))
    long = b.message(b.block(0, b.TEXT, *(b.text_delta(UNICODE[at : at + 97]) for at in range(0, 20_000, 97))))
    return [
        *steps,
        claude(
            "messages gzip", "stream", sse("anthropic", gzip.compress(b.ANTHROPIC, mtime=0), content_encoding="gzip")
        ),
        claude("messages CR line ends", "stream", sse("anthropic", b.ANTHROPIC.replace(b"\n", b"\r"))),
        claude("messages 1 MiB event", "stream", sse("anthropic", b.HUGE_MESSAGE)),
        claude("messages unicode", "stream", sse("anthropic", long)),
        claude(
            "messages named by a beta",
            "stream",
            sse("anthropic", b.ANTHROPIC),
            {"extra_headers": {"anthropic-beta": "a-1,b-2"}},
        ),
    ]


STEPS: tuple[Step, ...] = (
    *openai_values(),
    *openai_wire(),
    *errors("openai"),
    *breaks("openai"),
    *refusals("openai"),
    *patience("openai"),
    *anthropic_values(),
    *anthropic_wire(),
    *errors("anthropic"),
    *breaks("anthropic"),
    *refusals("anthropic"),
    *patience("anthropic"),
)


def steps_of(sdk: str) -> list[Step]:
    return [step for step in STEPS if step.dialect == sdk.partition("-")[0] and sdk in step.only]
