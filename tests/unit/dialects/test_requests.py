"""Reading requests and building the upstream's: what is refused, what is spliced, and that nothing else changes.

This file is long because every field of every route is a case of the same few questions.
"""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd._scan import members
from proxyd.dialects.base import Ask, Route, build, dialects_of, parse_ask
from proxyd.dialects.splice import wants_usage
from proxyd.errors import Refusal

NATIVE = [route for route in Route if route is not Route.STREAM]


def refusal_of(route: Route, body: bytes) -> Refusal:
    with pytest.raises(Refusal) as caught:
        parse_ask(route, body)
    assert caught.value.status == 400
    return caught.value


def built(body: bytes, *, route: Route = Route.CHAT, model: str = "", inject: bool = True) -> bytes:
    return build(parse_ask(route, body), route.dialect or "openai", model, inject).body


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", NATIVE)
def test_a_native_body_is_kept_as_the_identical_object(route: Route) -> None:
    body = b' {"model": "m",\n "whatever": [1, 2]} '
    ask = parse_ask(route, body)
    assert ask.body is body
    assert build(ask, route.dialect or "openai", "m", False).body is body
    assert build(ask, route.dialect or "openai", "", True).body is body
    assert (ask.model, ask.stream) == ("m", False)


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nope", b"{} {}", b'{"model":NaN}', b"[1]", b'"text"', b"null", b'\xff{"model":"m"}', b"[" * 5000,
     b'{"model":"m","a":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"a":"\\ud83d","b":NaN}', b'\xef\xbb\xbf{"model":"m"}'],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(route: Route, body: bytes) -> None:
    assert refusal_of(route, body).code == "invalid_json"


@pytest.mark.parametrize("route", NATIVE)
@pytest.mark.parametrize("model", [None, "", " ", 7, ["m"], {}, True])
def test_a_model_that_is_no_name_is_refused_by_name(route: Route, model: Any) -> None:
    assert refusal_of(route, orjson.dumps({"model": model})).param == "model"
    assert refusal_of(route, b"{}").param == "model"


@pytest.mark.parametrize("stream", [0, 1, "true", [], {}])
def test_a_stream_that_is_no_boolean_is_refused_by_name(stream: Any) -> None:
    assert refusal_of(Route.CHAT, orjson.dumps({"model": "m", "stream": stream})).param == "stream"


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (Route.CHAT, b'{"model":"a","model":"b"}', "model"),
        (Route.CHAT, b'{"model":"a","\\u006dodel":"b"}', "model"),
        (Route.CHAT, b'{"model":"a","stream":true,"stream":false}', "stream"),
        (Route.CHAT, b'{"model":"a","stream_options":{},"stream_options":null}', "stream_options"),
        (Route.CHAT, b'{"model":"a","messages":[],"messages":[]}', "messages"),
        (Route.MESSAGES, b'{"model":"a","system":"","system":""}', "system"),
        (Route.STREAM, b'{"prompt":"a","prompt":"b"}', "prompt"),
    ],
)
def test_a_member_that_we_read_may_stand_once_only(route: Route, body: bytes, param: str) -> None:
    assert refusal_of(route, body).param == param


def test_members_that_we_do_not_read_pass_however_often_they_stand() -> None:
    body = b'{"model":"m","user":"a","user":"b","x":{"model":1,"model":2}}'
    assert built(body) is body


@pytest.mark.parametrize("extra", [b"", b',"\\u0061":1', b',"model ":"model"'])
def test_a_body_of_endless_members_is_refused(extra: bytes) -> None:
    body = b'{"model":"m","stream":true' + b',"":0' * 2000 + extra + b"}"
    with pytest.raises(Refusal, match="members") as caught:
        built(body, model="other")
    assert caught.value.status == 400


def test_a_name_may_stand_as_a_value_too() -> None:
    body = b'{"model":"model","stream":true,"user":"stream","x":["messages","messages"],"y":{"model":1}}'
    assert orjson.loads(built(body, inject=False, model="b")) == {**orjson.loads(body), "model": "b"}


def test_a_lone_surrogate_escape_passes_as_the_providers_take_it() -> None:
    body = b'{"model":"m","messages":[{"role":"user","content":"cut \\ud83d"}]}'
    ask = parse_ask(Route.CHAT, body)
    assert ask.body is body
    assert ask.prompt_text_bytes == 4 + 3 + 12


# --- injecting ---------------------------------------------------------------------------------------------------

ON = '{"include_usage":true}'


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ("null", ON),
        ("{}", ON),
        ("{ }", '{"include_usage":true }'),
        ('{"include_usage":false}', ON),
        ('{"include_usage":null}', ON),
        ('{"include_usage":"yes"}', ON),
        ('{"include_obfuscation":false}', '{"include_obfuscation":false,"include_usage":true}'),
        ('{ "a" : 1 , "include_usage" : false , "b" : 2 }', '{ "a" : 1 , "include_usage" : true , "b" : 2 }'),
        ('{"continuous_usage_stats":true}', ON),
        ('{ "continuous_usage_stats":true }', '{ "include_usage":true }'),
        ('{"continuous_usage_stats":true,"include_usage":false}', ON),
        ('{"include_usage":false,"continuous_usage_stats":true}', ON),
        ('{"a":1,"continuous_usage_stats":true}', '{"a":1,"include_usage":true}'),
        ('{"a":1,"continuous_usage_stats":true,"b":2}', '{"a":1,"b":2,"include_usage":true}'),
        ('{"continuous_usage_stats":1,"continuous_usage_stats":2,"a":1}', '{"a":1,"include_usage":true}'),
        ('{"include_usage":false,"include_usage":null}', '{"include_usage":true,"include_usage":true}'),
        ('{"include_us\\u0061ge":false}', '{"include_us\\u0061ge":true}'),
        ('{"a":{"include_usage":false}}', '{"a":{"include_usage":false},"include_usage":true}'),
    ],
)
def test_usage_is_asked_for_inside_the_options_that_are_there(options: str, after: str) -> None:
    frame = '{{"model":"m", "stream_options": {} ,"stream":true, "z": 1.50}}'
    assert built(frame.format(options).encode()) == frame.format(after).encode()


@pytest.mark.parametrize(
    "options", ['{"include_usage":true}', '"x"', "7", "[]", "true", '{"include_usage":true,"a":1}']
)
def test_options_that_ask_already_or_are_no_object_are_left_alone(options: str) -> None:
    body = f'{{"model":"m","stream":true,"stream_options":{options}}}'.encode()
    assert built(body) is body


@pytest.mark.parametrize("stream", ["false", "null", None])
def test_nothing_is_injected_unless_a_stream_is_asked_for(stream: str | None) -> None:
    body = b'{"model":"m"}' if stream is None else f'{{"model":"m","stream":{stream}}}'.encode()
    assert built(body) is body


def test_absent_options_come_behind_the_last_member() -> None:
    body = b'{ "stream" : true , "model":"m" \n}\n'
    assert built(body) == b'{ "stream" : true , "model":"m","stream_options":{"include_usage":true} \n}\n'


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.EMBEDDINGS, Route.MESSAGES, Route.COUNT_TOKENS])
def test_other_routes_are_never_injected(route: Route) -> None:
    ask = parse_ask(route, b'{"model":"m","stream":true}')
    outgoing = build(ask, route.dialect or "openai", "", True)
    assert not outgoing.injected
    assert outgoing.body is ask.body


@pytest.mark.parametrize("inject", [True, False])
@pytest.mark.parametrize(("asked", "options"), [(True, {"include_usage": True}), (False, {"include_usage": False})])
def test_an_outgoing_request_says_whether_usage_was_injected(inject: bool, asked: bool, options: Any) -> None:
    ask = parse_ask(Route.COMPLETIONS, orjson.dumps({"model": "m", "stream": True, "stream_options": options}))
    assert ask.asked_usage is asked
    assert build(ask, "openai", "", inject).injected is (inject and not asked)


# --- renaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "after"),
    [
        (b'{"model":"a"}', b'{"model":"up/x"}'),
        (b'{ "x" : {"model":"a"} , "model" : "a" }', b'{ "x" : {"model":"a"} , "model" : "up/x" }'),
        (b'{"\\u006dodel":"a"}', b'{"\\u006dodel":"up/x"}'),
        (b'{"model":"\\u0061","y":"model"}', b'{"model":"up/x","y":"model"}'),
    ],
)
def test_only_the_text_of_the_top_level_model_is_renamed(body: bytes, after: bytes) -> None:
    assert built(body, model="up/x") == after


def test_a_name_that_needs_escapes_is_written_as_json() -> None:
    assert orjson.loads(built(b'{"model":"a"}', model='q"\\ü'))["model"] == 'q"\\ü'


@pytest.mark.parametrize(
    ("route", "path"),
    [
        (Route.CHAT, "/chat/completions"), (Route.COMPLETIONS, "/completions"), (Route.RESPONSES, "/responses"),
        (Route.EMBEDDINGS, "/embeddings"), (Route.MESSAGES, "/v1/messages"),
        (Route.COUNT_TOKENS, "/v1/messages/count_tokens"),
    ],
)  # fmt: skip
def test_each_route_goes_to_its_path_below_the_base(route: Route, path: str) -> None:
    ask = parse_ask(route, b'{"model":"m"}')
    (dialect,) = dialects_of(route)
    assert build(ask, dialect, "", False).path == path


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_options = st.none() | st.dictionaries(
    st.sampled_from(["include_usage", "continuous_usage_stats", "include_obfuscation", "x"]),
    st.none() | st.booleans() | st.integers(0, 3),
)


@settings(max_examples=300, deadline=None)
@given(
    extra=st.dictionaries(st.text(max_size=6), _json, max_size=4),
    options=_options,
    there=st.booleans(),
    rename=st.booleans(),
    inject=st.booleans(),
    order=st.randoms(use_true_random=False),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_a_splice_changes_what_it_means_to_and_nothing_else(
    extra: Any, options: Any, there: bool, rename: bool, inject: bool, order: Any, indent: Any, ascii_only: bool
) -> None:
    document = {**extra, "model": "m", "stream": True}
    if there:
        document["stream_options"] = options
    items = list(document.items())
    order.shuffle(items)
    body = json.dumps(dict(items), indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        ask = parse_ask(Route.CHAT, body)
    except Refusal:
        return  # prompt text may be anything but valid for `n`, `messages` and so on; those are other tests
    after = build(ask, "openai", "other" if rename else "m", inject).body
    injected = inject and wants_usage(ask)

    wanted = dict(items)
    if rename:
        wanted["model"] = "other"
    if injected:
        merged = {name: value for name, value in (options or {}).items() if name != "continuous_usage_stats"}
        wanted["stream_options"] = {**merged, "include_usage": True} if there else {"include_usage": True}
    assert json.loads(after) == wanted
    if not rename and not injected:
        assert after is body
    assert _outside(after) == _outside(body)


def _outside(body: bytes) -> list[bytes]:
    """The text of every member but those that may change, with what stands around it."""
    pieces, at = [], 0
    for key_start, key_end, start, end in members(body):
        pieces.append(body[at:start] if body[key_start:key_end] != b"stream_options" else b"")
        pieces.append(b"" if body[key_start:key_end] in (b"model", b"stream_options") else body[start:end])
        at = end
    return [piece for piece in pieces if piece] + [body[at:]]


# --- the site's route --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "param"),
    [
        ({}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 7}, "prompt"),
        ({"prompt": "a", "messages": []}, "prompt"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"), ({"messages": ["a"]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "king", "content": "a"}]}, "messages[1].role"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "tool_calls": {}}]}, "messages[0].tool_calls"),
        ({"prompt": "a", "model": ""}, "model"), ({"prompt": "a", "model": 7}, "model"),
        ({"prompt": "a", "system": 7}, "system"), ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"), ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "temperature": 2.1}, "temperature"), ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ],
)  # fmt: skip
def test_a_site_request_is_refused_by_the_name_of_what_is_wrong(document: Any, param: str) -> None:
    assert refusal_of(Route.STREAM, orjson.dumps(document)).param == param


def site(document: dict[str, Any]) -> Ask:
    return parse_ask(Route.STREAM, orjson.dumps(document))


def test_a_site_request_without_a_model_leaves_the_choice_open_and_always_streams() -> None:
    ask = site({"prompt": "hi", "stream": False, "unknown": 1})
    assert ask.model is None
    assert ask.stream
    assert ask.prompt_text_bytes == 2


def test_a_site_prompt_becomes_a_chat_request_that_asks_for_usage() -> None:
    ask = site({"prompt": "hi", "system": "be brief", "max_tokens": 9, "temperature": 0.5, "model": "m"})
    outgoing = build(ask, "openai", "up", True)
    assert (outgoing.path, outgoing.translate, outgoing.injected) == ("/chat/completions", True, True)
    assert orjson.loads(outgoing.body) == {
        "model": "up",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0.5,
    }


def test_a_site_request_can_be_sent_again_without_asking_for_usage() -> None:
    outgoing = build(site({"prompt": "hi"}), "openai", "up", False)
    assert not outgoing.injected
    assert "stream_options" not in orjson.loads(outgoing.body)


def test_a_site_prompt_becomes_an_anthropic_request() -> None:
    outgoing = build(site({"prompt": "hi", "system": "be brief", "temperature": 1.7}), "anthropic", "claude", True)
    assert (outgoing.path, outgoing.translate) == ("/v1/messages", True)
    assert orjson.loads(outgoing.body) == {
        "model": "claude",
        "max_tokens": 4096,
        "system": "be brief",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 1,
        "stream": True,
    }


def test_openai_messages_become_anthropic_turns() -> None:
    picture = "data:image/jpeg;base64,AAAA"
    messages = [
        {"role": "system", "content": "one"},
        {"role": "user", "content": [
            {"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": picture}}]},
        {"role": "user", "content": "and"},
        {"role": "developer", "content": [{"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "broken"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "43"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": "https://example.org/x.png"}]},
        {"role": "assistant", "content": ""},
    ]  # fmt: skip
    request = orjson.loads(build(site({"messages": messages, "max_tokens": 5}), "anthropic", "claude", True).body)
    assert request["system"] == "one\n\ntwo"
    assert request["max_tokens"] == 5
    assert request["messages"] == [
        {"role": "user", "content": [
            {"type": "text", "text": "look"},
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "AAAA"}},
            {"type": "text", "text": "and"}]},
        {"role": "assistant", "content": [
            {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            {"type": "tool_use", "id": "c2", "name": "g", "input": {}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "c1", "content": "42"},
            {"type": "tool_result", "tool_use_id": "c2", "content": "43"},
            {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}]},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "given", "most"),
    [
        (Route.CHAT, {}, None),
        (Route.CHAT, {"max_tokens": 20}, 20),
        (Route.CHAT, {"max_tokens": 20, "max_completion_tokens": 7}, 7),
        (Route.CHAT, {"max_tokens": 7, "max_completion_tokens": 20}, 20),
        (Route.CHAT, {"max_tokens": 7, "max_completion_tokens": None}, 7),
        (Route.CHAT, {"max_tokens": 7, "max_completion_tokens": 0}, None),
        (Route.CHAT, {"max_output_tokens": 0}, None),
        (Route.CHAT, {"max_output_tokens": 1, "max_tokens": 20}, 20),
        (Route.CHAT, {"max_tokens": 0}, None),
        (Route.CHAT, {"max_tokens": -1}, None),
        (Route.CHAT, {"max_tokens": True}, None),
        (Route.CHAT, {"max_tokens": "5"}, None),
        (Route.CHAT, {"max_tokens": 1, "n": 50}, 50),
        (Route.CHAT, {"max_tokens": 1, "n": 2, "best_of": 50}, 2),
        (Route.CHAT, {"max_tokens": 5, "n": 0}, 5),
        (Route.CHAT, {"max_tokens": 5, "n": -3}, 5),
        (Route.CHAT, {"max_tokens": 5, "n": True}, 5),
        (Route.CHAT, {"max_tokens": 5, "n": 2**60}, 5 * 128),
        (Route.CHAT, {"n": 50}, None),
        (Route.COMPLETIONS, {"max_tokens": 3, "max_completion_tokens": 1}, 3),
        (Route.COMPLETIONS, {"max_tokens": 3, "n": 2, "best_of": 20}, 60),
        (Route.COMPLETIONS, {"max_tokens": 3, "n": 2, "prompt": ["a", "b"]}, 12),
        (Route.COMPLETIONS, {"max_tokens": 3, "prompt": [1, 2]}, 3),
        (Route.COMPLETIONS, {"max_tokens": 3, "prompt": []}, 3),
        (Route.RESPONSES, {"max_output_tokens": 9}, 9),
        (Route.RESPONSES, {"max_output_tokens": 9, "max_tokens": 1, "n": 2}, 9),
        (Route.RESPONSES, {"max_tokens": 1}, None),
        (Route.MESSAGES, {"max_tokens": 12, "max_completion_tokens": 1, "n": 3}, 12),
        (Route.MESSAGES, {"max_tokens": 0}, None),
        (Route.EMBEDDINGS, {"max_tokens": 5}, None),
        (Route.STREAM, {"max_tokens": 3, "max_output_tokens": 1, "n": 9}, 3),
    ],
)
def test_the_most_tokens_that_a_client_wants_are_read_under_the_route_s_own_name(route, given, most):
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "input": "hi", **given}
    assert parse_ask(route, json.dumps(body).encode()).max_tokens == most
