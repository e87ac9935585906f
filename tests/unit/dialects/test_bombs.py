"""Bodies made to be dear: what is refused, what is read in part, and that real bodies of the same size pass."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxyd.dialects.ask import MOST_STRUCTURE
from proxyd.dialects.base import Dialect, Route, build, make_observer, parse_ask
from proxyd.dialects.errors import read_error_body
from proxyd.errors import Refusal

# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("part", [b"[]", b"[1]", b"{}", b'""', b"1", b'{"content":[]}', b"[[[[[]]]]]"])
def test_a_body_of_a_million_parts_is_refused_before_it_is_parsed(route: Route, part: bytes) -> None:
    many = b",".join([part] * (MOST_STRUCTURE // (1 + part.count(b"["))))
    for member in (b'"messages":[%b]', b'"y":"\\ud83d","unread":[%b]'):
        with pytest.raises(Refusal) as caught:
            parse_ask(route, b'{"model":"m",' + member % many + b"}")
        refusal = caught.value
        assert refusal.code == "request_too_complex"
        assert str(400_000 if route is Route.STREAM else MOST_STRUCTURE) in refusal.message


@pytest.mark.parametrize(
    ("route", "member"),
    [
        (Route.CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}] * 3}] * 4000}),
        (Route.CHAT, {"messages": [{"role": "user", "content": "[{,:" * 500_000}]}),
        (Route.EMBEDDINGS, {"input": ["hello"] * 2048}),
        (Route.EMBEDDINGS, {"input": [[123456] * 150] * 2048}),
        (Route.EMBEDDINGS, {"input": [123456] * 300_000}),
    ],
)
def test_the_largest_of_real_requests_pass(route: Route, member: dict[str, Any]) -> None:
    assert parse_ask(route, orjson.dumps({"model": "m", **member})).prompt_text_bytes > 0


def test_a_prompt_of_more_values_than_are_looked_at_is_taken_for_text() -> None:
    body = orjson.dumps({"model": "m", "input": ["a"] * 150_000})
    assert parse_ask(Route.EMBEDDINGS, body).prompt_text_bytes == len(body)


def test_of_a_native_document_only_what_is_asked_later_is_kept() -> None:
    many = list(range(1000))
    body = {"model": "m", "n": many, "stream": True, "stream_options": {"x": many}, "messages": many, "prompt": many}
    kept = {"model": "m", "stream": True, "stream_options": {"include_usage": False}}
    assert parse_ask(Route.CHAT, orjson.dumps(body)).document == kept
    assert parse_ask(Route.COMPLETIONS, orjson.dumps(body)).document == {**kept, "prompt": [0, 1]}


# --- answers ----------------------------------------------------------------------------------------------------------

USAGE = b'"usage":{"prompt_tokens":3,"completion_tokens":4,"input_tokens":3,"output_tokens":4,"total_tokens":7}'
MANY = b"[" + b",".join([b"[]"] * 200_000) + b"]"
ASKED = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"a"}],"input":"x"}'


def observed(route: Route, dialect: Dialect = "openai") -> Any:
    ask = parse_ask(route, ASKED)
    return make_observer(ask, dialect, build(ask, dialect, "m", False), request_id="r", epoch=7)


@pytest.mark.parametrize(
    ("route", "dialect", "body"),
    [
        (Route.CHAT, "openai", b'{"choices":[{"finish_reason":"stop"}],"x":%b,%b}' % (MANY, USAGE)),
        (Route.CHAT, "openai", b'{%b,"choices":[{"logprobs":%b,"finish_reason":"stop"}]}' % (USAGE, MANY)),
        (Route.CHAT, "openai", b' {%b , "choices" : %b } \n' % (USAGE, MANY)),
        (Route.EMBEDDINGS, "openai", b'{"data":%b,"model":"m",%b}' % (MANY, USAGE)),
        (Route.RESPONSES, "openai", b'{"status":"completed","output":%b,%b}' % (MANY, USAGE)),
        (Route.MESSAGES, "anthropic", b'{"content":%b,"stop_reason":"end_turn",%b}' % (MANY, USAGE)),
    ],
)
def test_the_usage_of_an_answer_with_too_many_parts_is_cut_out(route: Route, dialect: Dialect, body: bytes) -> None:
    observer = observed(route, dialect)
    observer.on_body("application/json", 200, body)
    observer.finish(True, 0)
    assert (observer.cut, observer.outcome, observer.usage_source) == (True, "completed", "provider")
    assert observer.usage.prompt == 3
    assert observer.error is None


def test_the_usage_of_an_event_with_too_many_parts_is_cut_out_at_any_depth() -> None:
    observer = observed(Route.RESPONSES)
    event = b'{"type":"response.completed","response":{"model":"big","output":%b,%b}}' % (MANY, USAGE)
    assert observer.on_event(b"", event, 0) is None
    observer.finish(True, 0)
    assert (observer.model, observer.usage.prompt, observer.outcome) == ("big", 3, "completed")


def test_an_event_with_too_many_parts_is_not_hidden_for_the_choices_that_were_left_out() -> None:
    ask = parse_ask(Route.CHAT, ASKED)
    observer = make_observer(ask, "openai", build(ask, "openai", "m", True), request_id="r", epoch=7)
    for rest in (b'"choices":%b' % MANY, b'"choices":[],"prompt_filter_results":%b' % MANY):
        assert observer.on_event(b"", b"{%b,%b}" % (USAGE, rest), 0) is None
    assert observer.on_event(b"", b'{%b,"choices":[],"x":%b}' % (USAGE, MANY), 0) == b""


def test_an_error_with_too_many_parts_is_an_error_all_the_same() -> None:
    for status, body in ((200, b'{"error":%b}' % MANY), (400, b'{"error":%b}' % MANY), (400, MANY)):
        observer = observed(Route.CHAT)
        observer.on_body("application/json", status, body)
        observer.finish(True, 0)
        assert observer.outcome == "error"


@pytest.mark.parametrize("end", [b"", b"}}", b"]", b"} {}", b",}"])
def test_an_answer_with_too_many_parts_that_did_not_come_whole_is_not_read(end: bytes) -> None:
    observer = observed(Route.CHAT)
    observer.on_body("application/json", 200, b'{%b,"choices":%b' % (USAGE, MANY) + end)
    observer.finish(True, 0)
    assert (observer.outcome, observer.usage_source, observer.parse_errors) == ("completed", "none", 1)


def test_the_site_never_takes_an_event_that_was_cut_for_a_whole_one() -> None:
    translator = observed(Route.STREAM)
    told = translator.on_event(b"", b'{"choices":[{"delta":{"content":"a"},"logprobs":%b}]}' % MANY, 0)
    assert b"event: error\n" in told
    assert b"upstream_unreadable" in told
    assert translator.ending(True) == b""


def test_many_lines_are_read_at_both_ends_and_measured_between() -> None:
    line, last = (
        b'{"response":"ab"}\n',
        b'{"model":"m","done":true,"eval_count":5,"prompt_eval_count":6,"context":[%b]}\n',
    )
    for context in (b"1", b",".join([b"1"] * 60_000)):
        observer = observed(Route.CHAT)
        observer.on_body("application/x-ndjson", 200, line * 50_000 + last % context)
        observer.finish(True, 0)
        assert (observer.usage.prompt, observer.usage.completion, observer.outcome) == (6, 5, "completed")
        assert observer.text_bytes == 100_000
    observer.on_body("application/x-ndjson", 200, b'{"error":"no"}\n' + b"{}\n" * 50_000)
    assert observer.error["message"] == "no"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (b"<title>Bad <b>Gateway</b></title><STYLE>a{}</Style><script src=x>1<2</script >nginx", "Bad Gateway nginx"),
        (b"a <scripture>b</scripture>", "a b"),
        (b"no <tag", "no"),
        (b"<script>never ends", "the upstream answered 502"),
        (b"<script" * 10_000, "the upstream answered 502"),
        (b"<" * 70_000, "the upstream answered 502"),
        ("<title>\u0130\u0130 no</title><SCRIPT>1</SCRIPT>".encode(), "\u0130\u0130 no 1"),
        (b"x<script", "x"),
    ],
)
def test_the_words_of_a_page_are_found_in_one_pass(page: bytes, message: str) -> None:
    assert read_error_body(502, page)["message"] == message
