"""What of a client's request travels to the upstream."""

from __future__ import annotations

import pytest

from proxyd.relay.upstream_head import query_without_credentials

JWT = b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI3In0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    "query",
    [
        b"",
        b"beta=true",
        b"api-version=2024-10-21&x=1",
        b"monkey=1",
        b"max_tokens=5",
        b"a&b=&=c",
        b"keys=a",
        b"t=eyJhbGc",
    ],
)
def test_a_query_without_credentials_travels_as_it_is(query: bytes) -> None:
    assert query_without_credentials(query) == query


@pytest.mark.parametrize(
    "part",
    [b"api_key=s", b"API-KEY=s", b"apikey=s", b"key=s", b"token=" + JWT, b"access_token=s", b"Authorization=Bearer%20s",
     b"ai_session_jwt=" + JWT, b"jwt=" + JWT.replace(b".", b"%2E"), b"x-api-key=s"],
)  # fmt: skip
def test_a_credential_in_the_query_ends_here_and_its_neighbours_travel(part: bytes) -> None:
    assert query_without_credentials(part) == b""
    assert query_without_credentials(b"beta=true&" + part + b"&b=2") == b"beta=true&b=2"
