"""Bodies made to be dear: what is refused, what is read in part, and that real bodies of the same size pass."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from proxyd.dialects.ask import MOST_STRUCTURE
from proxyd.dialects.base import Route, parse_ask
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
