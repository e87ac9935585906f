"""The lexical look at JSON, in both builds, against orjson where there is an answer."""
from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxyd._scan as compiled
from proxyd.wire import scan as pure

BUILDS = {"pure": pure, "compiled": compiled}
WATCH = ([b"usage", b"error"], [b"message_stop", b"error"], [b"content", b"text"])


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Any:
    return BUILDS[request.param]


@pytest.mark.parametrize(
    ("data", "report", "text_bytes"),
    [
        (b'{"content":"abc"}', False, 3),
        (b'{"delta":{"content" :\n "abc"},"text":"d"}', False, 4),
        (b'{"usage":null}', False, 0),
        (b'{"usage" : null , "x":1}', False, 0),
        (b'{"usage":{}}', True, 0),
        (b'{"a":[{"usage": 1}]}', True, 0),
        (b'{"usage":nul}', True, 0),
        (b'{"usage":', True, 0),
        (b'{"usage"}', False, 0),
        (b'{"x":"usage"}', False, 0),
        (b'{"x":"\\"usage\\":1"}', False, 0),
        (b'{"\\u0075sage":1}', False, 0),
        (b'{"Usage":1}', False, 0),
        (b'{"type":"message_stop"}', True, 0),
        (b'{"object" : "error"}', True, 0),
        (b'{"type":"message_stopped"}', False, 0),
        (b'{"type":["error"]}', False, 0),
        (b'{"content":null,"text":7,"x":"y"}', False, 0),
        (b'{"content":"a\\nb\\"c\\\\"}', False, 6),
        (b'{"content":"\\u0041\\u00e9\\u20ac\\ud83c\\udf88"}', False, 1 + 2 + 3 + 4),
        (b'{"content":"\\ud83c"}', False, 2),
        (b'{"content":"\\u12G4"}', False, 5),
        ('{"content":"é🎈"}'.encode(), False, 6),
        (b'{"content":"abc', False, 0),
        (b'{"content":"abc","text":"d', False, 3),
        (b'{"usage":1,"content":"abc\\"', True, 0),
        (b'"', False, 0),
        (b'\\"usage":1"', True, 0),
        (b"", False, 0),
        (b"[DONE]", False, 0),
        (b'"usage":1', True, 0),
    ],
)
def test_keys_and_values_are_found(build: Any, data: bytes, report: bool, text_bytes: int) -> None:
    assert build.scan(build.Watch(*WATCH), data) == (report, text_bytes)


@pytest.mark.parametrize(
    "keys",
    [([b""], [], []), ([], [], [b"x" * 64]), ([b"%d" % i for i in range(30)], [], [b"m%d" % i for i in range(17)]),
     ([], [b"v%d" % i for i in range(49)], [])],
)
def test_a_watch_that_is_too_large_is_refused(build: Any, keys: tuple[list[bytes], list[bytes], list[bytes]]) -> None:
    with pytest.raises(ValueError, match=r"a Watch holds|a watched key has"):
        build.Watch(*keys)


def test_a_full_watch_finds_its_last_key(build: Any) -> None:
    keys = [b"%d" % i for i in range(46)]
    watch = build.Watch(keys, [b"v"], [])
    assert build.scan(watch, b'{"45":1}') == (True, 0)
    assert build.scan(watch, b'{"type":"v"}') == (True, 0)
    assert build.scan(watch, b'{"46":1}') == (False, 0)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (b"{}", []),
        (b" [1] ", []),
        (b'"a"', []),
        (b"", []),
        (b'{"a":1}', [(b"a", b"1")]),
        (
            b' {\n "a" : "b,}" ,\t"c":[1,{"d":2}] , "e":{ } }\n',
            [(b"a", b'"b,}"'), (b"c", b'[1,{"d":2}]'), (b"e", b"{ }")],
        ),
        (b'{"a\\"b":"\\\\","a":null}', [(b'a\\"b', b'"\\\\"'), (b"a", b"null")]),
        (b'{"stream":true,"stream":false}', [(b"stream", b"true"), (b"stream", b"false")]),
    ],
)
def test_an_object_s_own_members_are_cut_out(build: Any, data: bytes, parts: list[tuple[bytes, bytes]]) -> None:
    assert [(data[a:b], data[c:d]) for a, b, c, d in build.members(data)] == parts


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SPACES = st.sampled_from([b"", b" ", b"\n\t", b"\r\n  "])
SOUP = st.lists(
    st.sampled_from([
        b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b" ", b"\n", b'"usage"', b'"content":"', b'"type":',
        b'"error"', b"null", b"\\u00e9", b"\\ud83c", b"\\u", b"\xc3", b"\x00", b"x", b'"text" : ', b"1",
    ]) | st.binary(max_size=3),
    max_size=30,
).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(), JSON, max_size=6), st.booleans(), SPACES)
def test_members_agree_with_orjson_on_every_object(value: dict[str, Any], pretty: bool, space: bytes) -> None:
    data = space + orjson.dumps(value, option=orjson.OPT_INDENT_2 if pretty else 0) + space
    spans = pure.members(data)
    assert spans == compiled.members(data)
    read = [(orjson.loads(data[a - 1:b + 1]), orjson.loads(data[c:d])) for a, b, c, d in spans]
    assert read == list(orjson.loads(data).items())


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_measured_text_agrees_with_orjson(text: str) -> None:
    data = orjson.dumps({"content": text})
    expected = (False, len(text.encode()))
    assert pure.scan(pure.Watch(*WATCH), data) == expected
    assert compiled.scan(compiled.Watch(*WATCH), data) == expected


@pytest.mark.parametrize(
    ("data", "kept"),
    [
        (b'{"x":"a","delta":{"content" : "b\\n\\u00e9"},"text":"c"}', b"b\\n\\u00e9c"),
        (b'{"content":null,"text":"","usage":"d"}', b""),
        (b'{"content":"abc","text":"d', b"abc"),
        (b'{"content":"' + b"a" * 1000 + b'","text":"' + b"b" * 50 + b'","content":"c"}', b"a" * 1000 + b"b" * 24),
        (b'{"content":"' + b"a" * 5000 + b'"}', b"a" * 1024),
        (b"", b""),
    ],
)
def test_a_kilobyte_of_the_measured_text_is_kept_as_it_stands(build: Any, data: bytes, kept: bytes) -> None:
    assert build.sample(build.Watch(*WATCH), data) == kept


@settings(max_examples=1500, deadline=None)
@given(SOUP)
def test_both_builds_agree_on_any_bytes(data: bytes) -> None:
    assert pure.sample(pure.Watch(*WATCH), data) == compiled.sample(compiled.Watch(*WATCH), data)
    assert pure.scan(pure.Watch(*WATCH), data) == compiled.scan(compiled.Watch(*WATCH), data)
    spans = compiled.members(data)
    assert pure.members(data) == spans
    assert all(0 <= a <= b <= c <= d <= len(data) for a, b, c, d in spans)


def test_long_texts_cost_linear_time(build: Any) -> None:
    watch = build.Watch(*WATCH)
    many = 400_001
    for data in (b"\\" * many, b'"' * many, b'"' + b"\\" * many, b'"' + b'\\"' * many, b'{"a":' + b"[" * many):
        build.scan(watch, data)
        build.members(data)


@pytest.mark.parametrize(
    ("data", "cost"),
    [
        (b"", 0),
        (b"17", 0),
        (b"[1,2,3]", 7),
        (b'{"a":1}', 8),
        (b'{"a,[{:":"[[\\"[["}', 9),
        (b"[[[]]]", 15),
        (b'["a', 6),
        (b'"', 1),
    ],
)
def test_structure_weighs_what_stands_outside_strings(build: Any, data: bytes, cost: int) -> None:
    assert build.structure(data, 1000) == cost


def test_structure_stops_counting_once_the_bound_is_passed(build: Any) -> None:
    assert 100 < build.structure(b"[" * 10_000, 100) <= 105


@pytest.mark.parametrize(
    ("data", "mended"),
    [
        (b'"\\ud83c"', b'"\\ufffd"'),
        (b'"\\uDF88x"', b'"\\ufffdx"'),
        (b'"\\ud83c\\uDf88"', b'"\\ud83c\\uDf88"'),
        (b'"\\ud83c\\ud83c\\udf88"', b'"\\ufffd\\ud83c\\udf88"'),
        (b'"\\\\ud83c"', b'"\\\\ud83c"'),
        (b'"\\\\ud83c\\udf88"', b'"\\\\ud83c\\ufffd"'),
        (b'"\\u12', b'"\\u12'),
        (b"\\", b"\\"),
    ],
)
def test_half_a_surrogate_pair_is_mended_and_a_whole_one_kept(build: Any, data: bytes, mended: bytes) -> None:
    assert build.mend(data) == mended


_COSTLY = st.lists(
    st.sampled_from(
        [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\\ud83c", b"\\udf88", b"\\u00e9", b"\\u", b"d", b"8", b"\n"]
    )
    | st.binary(max_size=2),
    max_size=40,
).map(b"".join)


@settings(max_examples=2000, deadline=None)
@given(_COSTLY, st.integers(0, 60))
def test_both_builds_weigh_and_mend_any_bytes_alike(data: bytes, most: int) -> None:
    assert compiled.structure(data, most) == pure.structure(data, most)
    assert compiled.mend(data) == pure.mend(data)
