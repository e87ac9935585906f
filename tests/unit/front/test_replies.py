"""The bytes of answers."""

from __future__ import annotations

import pytest

from proxyd.errors import Refusal
from proxyd.front.replies import Framing, http_date, refusal_headers, relay_head, reply_bytes
from proxyd.wire.head import Headers, Version, parse_response_head


def relayed(
    upstream: Headers,
    *,
    status: int = 200,
    version: Version = (1, 1),
    framing: Framing = "chunked",
    keep_alive: bool = True,
    is_stream: bool = True,
    date: bytes = b"",
    extra: Headers | None = None,
) -> Headers:
    data = relay_head(
        status, b"OK", upstream, request_id="ours", version=version, framing=framing, keep_alive=keep_alive,
        is_stream=is_stream, date=date, extra=extra or [],
    )  # fmt: skip
    return parse_response_head(data).headers


def values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for have, value in headers if have == name]


def test_what_is_the_clients_business_travels_untouched_and_in_order() -> None:
    upstream = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"retry-after", b"2"),
        (b"retry-after-ms", b"1500.5"),
        (b"x-ratelimit-remaining-tokens", b"17"),
        (b"anthropic-ratelimit-requests-limit", b"50"),
        (b"content-encoding", b"gzip"),
        (b"request-id", b"req_1"),
        (b"openai-processing-ms", b"12"),
        (b"x-should-retry", b"false"),
    ]
    assert relayed(upstream)[: len(upstream)] == upstream


@pytest.mark.parametrize(
    "name",
    [
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-connection", b"te", b"trailer",
        b"transfer-encoding", b"upgrade", b"content-length", b"set-cookie", b"alt-svc", b"strict-transport-security",
        b"access-control-allow-origin", b"access-control-expose-headers", b"clear-site-data", b"nel",
    ],
)  # fmt: skip
def test_what_is_a_hops_or_the_providers_own_ends_here(name: bytes) -> None:
    headers = relayed([(name, b"upstreams"), (b"x-other", b"1")])
    assert b"upstreams" not in [value for _, value in headers]
    assert values(headers, b"x-other") == [b"1"]


def test_what_connection_names_ends_here() -> None:
    headers = relayed([(b"connection", b"keep-alive, X-Secret-Hop"), (b"x-secret-hop", b"1")])
    assert values(headers, b"x-secret-hop") == []


def test_the_upstreams_request_id_stays_and_ours_stands_beside_it() -> None:
    headers = relayed([(b"x-request-id", b"req_theirs"), (b"x-proxyd-request-id", b"forged")])
    assert values(headers, b"x-request-id") == [b"req_theirs"]
    assert values(headers, b"x-proxyd-request-id") == [b"ours"]


def test_without_an_upstreams_request_id_both_are_ours() -> None:
    headers = relayed([])
    assert values(headers, b"x-request-id") == values(headers, b"x-proxyd-request-id") == [b"ours"]


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        ([], b"no-cache"),
        ([(b"cache-control", b"no-cache, must-revalidate")], b"no-cache, must-revalidate"),
        ([(b"cache-control", b"public, max-age=60")], b"no-cache"),
        ([(b"cache-control", b"no-cache"), (b"cache-control", b"no-cache")], b"no-cache"),
    ],
)
def test_a_stream_is_not_cached_and_says_so_once(upstream: Headers, expected: bytes) -> None:
    headers = relayed([*upstream, (b"x-accel-buffering", b"yes")])
    assert values(headers, b"cache-control") == [expected]
    assert values(headers, b"x-accel-buffering") == [b"no"]


def test_an_answer_that_is_no_stream_keeps_its_cache_control() -> None:
    headers = relayed([(b"cache-control", b"private")], is_stream=False, framing=3)
    assert values(headers, b"cache-control") == [b"private"]
    assert values(headers, b"x-accel-buffering") == []


def test_added_headers_replace_and_vary_adds_up() -> None:
    extra = [(b"Access-Control-Allow-Origin", b"https://a"), (b"Vary", b"Origin"), (b"X-Same", b"new")]
    headers = relayed([(b"vary", b"Accept-Encoding"), (b"x-same", b"old")], extra=extra)
    assert values(headers, b"access-control-allow-origin") == [b"https://a"]
    assert values(headers, b"vary") == [b"Accept-Encoding", b"Origin"]
    assert values(headers, b"x-same") == [b"new"]


@pytest.mark.parametrize(
    ("version", "framing", "keep_alive", "connection", "coding", "length"),
    [
        ((1, 1), "chunked", True, [], [b"chunked"], []),
        ((1, 1), "chunked", False, [b"close"], [b"chunked"], []),
        ((1, 1), 7, True, [], [], [b"7"]),
        ((1, 0), 7, True, [b"keep-alive"], [], [b"7"]),
        ((1, 0), "close", True, [b"close"], [], []),
        ((1, 1), "close", True, [b"close"], [], []),
    ],
)
def test_there_is_one_framing_and_the_connection_header_fits_it(
    version: Version,
    framing: Framing,
    keep_alive: bool,
    connection: list[bytes],
    coding: list[bytes],
    length: list[bytes],
) -> None:
    headers = relayed([], version=version, framing=framing, keep_alive=keep_alive)
    assert values(headers, b"connection") == connection
    assert values(headers, b"transfer-encoding") == coding
    assert values(headers, b"content-length") == length


@pytest.mark.parametrize("status", [200, 204, 304, 413, 429, 529])
@pytest.mark.parametrize("head_only", [False, True])
def test_a_complete_reply_has_the_body_its_status_and_method_allow(status: int, head_only: bool) -> None:
    data = reply_bytes(
        status,
        [(b"content-type", b"text/plain"), (b"content-length", b"99")],
        b"hello",
        request_id="r",
        version=(1, 1),
        keep_alive=True,
        date=http_date(0),
        head_only=head_only,
    )
    head, _, body = data.partition(b"\r\n\r\n")
    headers = parse_response_head(head + b"\r\n\r\n").headers
    assert body == (b"" if head_only or status in (204, 304) else b"hello")
    assert values(headers, b"content-length") == ([] if status in (204, 304) else [b"5"])
    assert values(headers, b"date") == [b"Thu, 01 Jan 1970 00:00:00 GMT"]
    assert values(headers, b"x-proxyd-request-id") == values(headers, b"x-request-id") == [b"r"]


DATED = b"Fri, 20 Nov 2026 00:00:00 GMT"


@pytest.mark.parametrize(
    ("upstream", "date", "dates"),
    [
        ([], b"", []),
        ([], http_date(0), [http_date(0)]),
        ([(b"date", DATED)], http_date(0), [DATED]),
        ([(b"connection", b"date"), (b"date", DATED)], http_date(0), [http_date(0)]),
    ],
)
def test_a_relayed_answer_is_dated_by_the_upstream_where_it_did(
    upstream: Headers, date: bytes, dates: list[bytes]
) -> None:
    assert values(relayed(upstream, date=date), b"date") == dates


@pytest.mark.parametrize(
    ("headers", "dates"),
    [([], [http_date(0)]), ([(b"date", b"Fri, 20 Nov 2026 00:00:00 GMT")], [b"Fri, 20 Nov 2026 00:00:00 GMT"])],
)
def test_a_complete_reply_is_dated_once_by_the_upstream_where_it_did(headers: Headers, dates: list[bytes]) -> None:
    data = reply_bytes(400, headers, b"{}", request_id="r", version=(1, 1), keep_alive=True, date=http_date(0))
    assert values(parse_response_head(data[:-2]).headers, b"date") == dates


def test_a_refusal_carries_its_id_under_anthropics_name_on_anthropics_routes_only() -> None:
    refusal = Refusal(403, "invalid_token", "no")
    assert (b"request-id", b"abc") in refusal_headers(refusal, "abc")
    assert all(name != b"request-id" for name, _ in refusal_headers(refusal))
