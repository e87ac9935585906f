"""Origins: whose pages may use a session, and what CORS says to them."""

from __future__ import annotations

import pytest

from proxyd.access.origin import MAX_AGE_S, Origin, OriginPolicy, forwarded_scheme, is_preflight, parse_origin
from proxyd.errors import Refusal

ALLOWED = ("https://app.example.com", "http://localhost:5173", "https://[2001:db8::1]:8443", "capacitor://localhost")
POLICY = OriginPolicy(ALLOWED)


def request(host: str | None = "site.example", **headers: str) -> list[tuple[bytes, bytes]]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return [(name.encode(), value.encode()) for name, value in {**({"host": host} if host else {}), **named}.items()]


@pytest.mark.parametrize(
    "origin, host",
    [
        ("http://site.example", "site.example"), ("https://site.example", "site.example"), ("https://site.example",
        "site.example:443"),
        ("http://site.example", "site.example:80"), ("https://site.example:443", "site.example"),
        ("http://site.example:8080", "site.example:8080"),
        ("https://SITE.example", "Site.Example"), ("http://127.0.0.1:3000", "127.0.0.1:3000"), ("http://[::1]:3000",
        "[::1]:3000"),
        ("http://localhost:3000", "localhost:3000"),
    ],
)  # fmt: skip
def test_the_requests_own_host_is_allowed(origin: str, host: str) -> None:
    assert POLICY.decide(request(host, origin=origin), cookie_used=True).allowed


@pytest.mark.parametrize(
    "origin, host",
    [
        ("https://evil.example", "site.example"), ("https://site.example.evil.example", "site.example"),
        ("https://evilsite.example", "site.example"),
        ("https://sub.site.example", "site.example"), ("https://site.example:8443", "site.example"),
        ("http://site.example", "site.example:443"),
        ("https://site.example", "site.example:80"), ("http://site.example:3000", "site.example:3001"), ("null",
        "site.example"), ("null", "null"),
        ("", "site.example"), ("site.example", "site.example"), ("https://site.example/", "site.example"),
        ("https://user@site.example", "site.example"),
        ("https://site.example https://evil.example", "site.example"), ("https://site.example, https://evil.example",
        "site.example"),
        ("file://", "site.example"), ("ftp://site.example", "site.example"), ("chrome-extension://site.example",
        "site.example"),
        ("https://site.example.", "site.example"), ("https://site.example:0", "site.example"),
        ("https://site.example:99999", "site.example:99999"),
        ("https://site.example\\.evil.example", "site.example"), ("https://ſite.example", "site.example"),
        ("http://127.0.0.1:3000", "localhost:3000"),
        ("https://site.example", "site.example, evil.example"), ("https://site.example", ""), ("https://", ""),
    ],
)  # fmt: skip
def test_any_other_page_may_not_use_the_cookie(origin: str, host: str) -> None:
    verdict = POLICY.decide(request(host, origin=origin), cookie_used=True)
    with pytest.raises(Refusal) as refused:
        verdict.enforce()
    assert (refused.value.status, refused.value.code) == (403, "origin_not_allowed")
    assert verdict.cors_headers == [(b"vary", b"Origin")]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.example.com"])
def test_a_page_that_has_to_hold_the_token_itself_is_not_checked(origin: str) -> None:
    assert POLICY.decide(request(origin=origin), cookie_used=False).allowed


@pytest.mark.parametrize(
    "headers", [[(b"origin", b"http://a"), (b"host", b"a"), (b"host", b"b")], [(b"origin", b"http://a")]]
)
def test_a_request_whose_own_host_is_unclear_is_nobodys_own(headers: list[tuple[bytes, bytes]]) -> None:
    assert not POLICY.decide(headers, cookie_used=True).allowed


def test_two_origins_are_foreign_even_when_both_are_allowed() -> None:
    headers = [*request(origin=ALLOWED[0]), (b"origin", ALLOWED[0].encode())]
    verdict = POLICY.decide(headers, cookie_used=True)
    assert not verdict.allowed
    assert verdict.cors_headers == [(b"vary", b"Origin")]


@pytest.mark.parametrize("origin", [*ALLOWED, "https://app.example.com:443"])
@pytest.mark.parametrize("cookie_used", [True, False])
def test_an_allowed_origin_gets_cors_answers(origin: str, cookie_used: bool) -> None:
    verdict = POLICY.decide(request(origin=origin, sec_fetch_site="cross-site"), cookie_used=cookie_used)
    assert verdict.allowed
    answer = dict(verdict.cors_headers)
    assert answer[b"access-control-allow-origin"] == origin.encode()
    assert answer[b"access-control-allow-credentials"] == b"true"
    assert answer[b"vary"] == b"Origin"
    assert b"X-Proxyd-Request-Id" in answer[b"access-control-expose-headers"]


@pytest.mark.parametrize("scheme, allowed", [(None, True), ("https", True), ("http", False)])
def test_the_scheme_counts_where_a_trusted_proxy_states_it(scheme: str | None, allowed: bool) -> None:
    headers = request(origin="https://site.example")
    assert POLICY.decide(headers, cookie_used=True, scheme=scheme).allowed is allowed


@pytest.mark.parametrize(
    "value, trusted, scheme",
    [("https", True, "https"), ("HTTP", True, "http"), ("http, https", True, "https"), ("https", False, None),
    ("wss", True, None),
     ("", True, None), (None, True, None)],
)  # fmt: skip
def test_the_forwarded_scheme_is_believed_of_trusted_peers_only(
    value: str | None, trusted: bool, scheme: str | None
) -> None:
    headers = request() if value is None else request(x_forwarded_proto=value)
    assert forwarded_scheme(headers, trusted) == scheme


def test_a_forwarded_host_is_not_read() -> None:
    assert not POLICY.decide(
        request(origin="https://evil.example", x_forwarded_host="evil.example"), cookie_used=True
    ).allowed


@pytest.mark.parametrize(
    "site, allowed", [(None, True), ("none", True), ("same-origin", True), ("cross-site", False), ("same-site",
    False), ("Cross-Site", False)]
)  # fmt: skip
def test_without_an_origin_the_fetch_metadata_decides(site: str | None, allowed: bool) -> None:
    headers = request() if site is None else request(sec_fetch_site=site)
    assert POLICY.decide(headers, cookie_used=True).allowed is allowed
    assert POLICY.decide(headers, cookie_used=False).allowed


def test_without_configured_origins_no_cors_header_is_sent() -> None:
    assert OriginPolicy(()).decide(request(origin="https://site.example"), cookie_used=True)[:2] == (True, [])


@pytest.mark.parametrize("entry", ["*", "null", "", "https://*.example.com", "example.com", "https://a.example/path"])
def test_an_entry_that_is_no_origin_allows_nobody(entry: str) -> None:
    policy = OriginPolicy([entry])
    for origin in (entry, "null", "https://x.example.com", "https://a.example"):
        assert not policy.decide(request(origin=origin), cookie_used=True).allowed


def test_a_preflight_is_told_from_other_options() -> None:
    asked = request(origin=ALLOWED[0], access_control_request_method="POST")
    assert is_preflight("OPTIONS", asked)
    assert not is_preflight("POST", asked)
    assert not is_preflight("OPTIONS", request(origin=ALLOWED[0]))


@pytest.mark.parametrize("origin", [ALLOWED[0], "https://site.example"])
def test_a_preflight_of_an_allowed_page_grants_what_it_asks_for(origin: str) -> None:
    asked = request(
        origin=origin,
        access_control_request_method="POST",
        access_control_request_headers="authorization,content-type, x-stainless-os",
    )
    answer = dict(POLICY.preflight(asked))
    assert answer[b"access-control-allow-origin"] == origin.encode()
    assert answer[b"access-control-allow-headers"] == b"authorization,content-type, x-stainless-os"
    assert answer[b"access-control-allow-methods"] == b"GET, POST, DELETE"
    assert answer[b"access-control-max-age"] == str(MAX_AGE_S).encode()
    assert b"Origin" in answer[b"vary"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://app.example.com.evil.example"])
def test_a_preflight_of_another_page_is_a_403_without_cors(origin: str) -> None:
    with pytest.raises(Refusal) as refused:
        POLICY.preflight(request(origin=origin, access_control_request_method="POST"))
    assert refused.value.status == 403
    assert all(not name.startswith("access-control") for name, _ in refused.value.headers)


@pytest.mark.parametrize("names", ["a\r\nset-cookie: x", "a b", "a:b", ",", "x" * 5000, "ü"])
def test_header_names_that_are_none_are_not_echoed(names: str) -> None:
    asked = request(origin=ALLOWED[0], access_control_request_headers=names)
    assert b"access-control-allow-headers" not in dict(POLICY.preflight(asked))


def test_an_origin_has_one_spelling() -> None:
    assert (
        parse_origin("HTTPS://A.example") == parse_origin("https://a.example:443") == Origin("https", "a.example", 443)
    )
