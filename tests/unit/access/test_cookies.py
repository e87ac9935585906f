"""Where a token may be, and what two of them mean."""

from __future__ import annotations

import time

import pytest

from proxyd.access.cookies import Headers, Via, find_cookie, find_credential
from proxyd.errors import Refusal

NAME = b"ai_session_jwt"


def cookie(value: bytes) -> list[tuple[bytes, bytes]]:
    return [(b"cookie", value)]


@pytest.mark.parametrize(
    "value, found",
    [
        (b"ai_session_jwt=a.b.c", b"a.b.c"),
        (b"x=1; ai_session_jwt=a.b.c; y=2", b"a.b.c"),
        (b"x=1;ai_session_jwt=a.b.c;y=2", b"a.b.c"),
        (b" \t ai_session_jwt \t=\t a.b.c \t ;", b"a.b.c"),
        (b"ai_session_jwt=a=b=c", b"a=b=c"),
        (b'ai_session_jwt="a.b.c"', b'"a.b.c"'),
        (b"ai_session_jwt=a.b.c; ai_session_jwt=a.b.c", b"a.b.c"),
        (b"broken; =; ;;; \"unclosed; x=\xff\x00; ai_session_jwt=a.b.c", b"a.b.c"),
        (b"ai_session_jwt=", b""),
        (b"ai_session_jwt", None),
        (b"AI_SESSION_JWT=a.b.c", None),
        (b"xai_session_jwt=a.b.c", None),
        (b"ai_session_jwtx=a.b.c", None),
        (b"x=ai_session_jwt=a.b.c", None),
        (b"$ai_session_jwt=a.b.c", None),
        (b"\x0bai_session_jwt=a.b.c", None),
        (b"", None),
    ],
)  # fmt: skip
def test_the_session_cookie_is_found_by_its_exact_name(value: bytes, found: bytes | None) -> None:
    assert find_cookie(cookie(value), NAME) == found


@pytest.mark.parametrize(
    "headers",
    [
        cookie(b"ai_session_jwt=a; ai_session_jwt=b"),
        cookie(b"ai_session_jwt=a; ai_session_jwt="),
        cookie(b"ai_session_jwt=; x=1; ai_session_jwt=a"),
        cookie(b"ai_session_jwt=a") + cookie(b"ai_session_jwt=b"),
        [*cookie(b"ai_session_jwt=a"), (b"authorization", b"Bearer b")],
        [*cookie(b"ai_session_jwt=a"), (b"x-api-key", b"b")],
        [(b"authorization", b"Bearer a"), (b"x-api-key", b"b")],
        [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")],
        [(b"x-api-key", b"a"), (b"x-api-key", b"b")],
    ],
)
def test_two_different_tokens_are_refused(headers: Headers) -> None:
    with pytest.raises(Refusal) as refused:
        find_credential(headers, NAME)
    assert (refused.value.status, refused.value.code) == (403, "ambiguous_token")


@pytest.mark.parametrize(
    "headers, found",
    [
        ([], None),
        (cookie(b"x=1"), None),
        (cookie(b"ai_session_jwt="), None),
        ([(b"authorization", b"Bearer")], None),
        ([(b"authorization", b"Bearer  ")], None),
        ([(b"authorization", b"Bearera.b.c")], None),
        ([(b"authorization", b"a.b.c")], None),
        ([(b"x-api-key", b"")], None),
        (cookie(b"ai_session_jwt=a"), (b"a", Via.COOKIE)),
        ([(b"authorization", b"Bearer a")], (b"a", Via.BEARER)),
        ([(b"authorization", b"bEARER \t a ")], (b"a", Via.BEARER)),
        ([(b"x-api-key", b" a ")], (b"a", Via.API_KEY)),
        ([(b"authorization", b"Bearer a"), (b"x-api-key", b"a")], (b"a", Via.BEARER)),
        ([(b"authorization", b"Basic dXNlcjpwYXNz"), *cookie(b"ai_session_jwt=a")], (b"a", Via.COOKIE)),
        ([(b"authorization", b"Basic dXNlcjpwYXNz"), (b"x-api-key", b"a")], (b"a", Via.API_KEY)),
        ([(b"authorization", b"Basic dXNlcjpwYXNz")], None),
        ([*cookie(b"x=1"), *cookie(b"ai_session_jwt=a"), *cookie(b"y=2")], (b"a", Via.COOKIE)),
        ([*cookie(b"ai_session_jwt="), (b"authorization", b"Bearer a")], (b"a", Via.BEARER)),
    ],
)  # fmt: skip
def test_the_token_is_taken_from_where_it_is(headers: Headers, found: tuple[bytes, Via] | None) -> None:
    assert find_credential(headers, NAME) == found


def test_a_cookie_and_an_equal_bearer_token_count_as_the_cookie_so_that_the_origin_is_checked() -> None:
    headers = [(b"authorization", b"Bearer a"), *cookie(b"ai_session_jwt=a")]
    assert find_credential(headers, NAME) == (b"a", Via.COOKIE)


def test_cookie_headers_too_long_to_search_are_refused() -> None:
    with pytest.raises(Refusal) as refused:
        find_cookie(cookie(b"x=" + b"y" * 40_000) * 2, NAME)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    "value",
    [
        b"ai_session_jwt" + b";" * 60_000,
        b"ai_session_jwt" + b"=" * 60_000,
        b'ai_session_jwt="' + b"\\" * 60_000,
        b'ai_session_jwt="' + b'\\"' * 30_000,
        b"ai_session_jwt=a;" * 3_500,
        b" " * 60_000 + b"ai_session_jwt",
    ],
)
def test_hostile_cookies_cost_linear_time(value: bytes) -> None:
    begun = time.thread_time()
    for _ in range(10):
        find_cookie(cookie(value), NAME)
    # a few milliseconds here; http.cookies takes 3 s for one of these
    assert time.thread_time() - begun < 2.0
