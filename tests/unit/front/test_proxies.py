"""Who is believed about whom."""

from __future__ import annotations

import pytest

from proxyd.front.proxies import UNIX_PEER, Identity, identify, trusted_from
from proxyd.front.request import choose_request_id
from proxyd.wire.head import Headers, parse_request_head

PROXIES = trusted_from(["127.0.0.0/8", "::1", "10.0.0.0/8", "unix"])


def ask(peer: str, headers: Headers) -> Identity:
    return identify(peer, PROXIES.trusts(peer), headers, PROXIES)


def test_a_stranger_is_not_believed() -> None:
    headers = [(b"x-forwarded-for", b"1.2.3.4"), (b"x-forwarded-proto", b"https")]
    assert ask("203.0.113.9", headers) == Identity("203.0.113.9", False, False)


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ([b"203.0.113.9"], "203.0.113.9"),
        ([b"6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        ([b"6.6.6.6", b"203.0.113.9, 10.1.2.3"], "203.0.113.9"),
        ([b"10.1.2.3, 10.1.2.4"], "10.1.2.3"),
        ([b"203.0.113.9:4711"], "203.0.113.9"),
        ([b"[2001:db8::1]:4711"], "2001:db8::1"),
        ([b"2001:db8::1"], "2001:db8::1"),
        ([b"::ffff:203.0.113.9"], "203.0.113.9"),
        ([b"unknown"], "127.0.0.1"),
        ([b"203.0.113.9, unknown"], "127.0.0.1"),
        ([b"unknown, 10.1.2.3"], "10.1.2.3"),
        ([b""], "127.0.0.1"),
        ([b", ,"], "127.0.0.1"),
        ([b"\xff\xfe"], "127.0.0.1"),
        ([b"1.2.3.4, " * 2000 + b"203.0.113.9"], "203.0.113.9"),
        ([], "127.0.0.1"),
    ],
)
def test_the_client_is_the_rightmost_address_that_is_no_proxy(forwarded: list[bytes], client: str) -> None:
    assert ask("127.0.0.1", [(b"x-forwarded-for", value) for value in forwarded]).peer == client


def test_a_unix_peer_is_believed_when_it_is_listed_only() -> None:
    headers = [(b"x-forwarded-for", b"203.0.113.9")]
    assert ask(UNIX_PEER, headers).peer == "203.0.113.9"
    closed = trusted_from(["127.0.0.1"])
    assert identify(UNIX_PEER, closed.trusts(UNIX_PEER), headers, closed).peer == UNIX_PEER


def test_a_mapped_address_is_the_address_it_maps() -> None:
    assert PROXIES.trusts("::ffff:127.0.0.1")
    assert not PROXIES.trusts("::ffff:203.0.113.9")


@pytest.mark.parametrize(
    ("value", "secure"), [(b"https", True), (b"HTTPS", True), (b"http", False), (b"https, http", False), (b"", False)]
)
def test_a_proxy_says_whether_it_was_tls(value: bytes, secure: bool) -> None:
    assert ask("127.0.0.1", [(b"x-forwarded-proto", value)]).secure is secure


@pytest.mark.parametrize(
    ("given", "trusted", "taken"),
    [
        (b"abc-DEF_1.2", True, True),
        (b"abc-DEF_1.2", False, False),
        (b"a" * 65, True, False),
        (b"a b", True, False),
        (b'"', True, False),
    ],
)
def test_a_request_id_is_taken_from_trusted_proxies_if_it_is_one(given: bytes, trusted: bool, taken: bool) -> None:
    head = parse_request_head(b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + given + b"\r\n\r\n", 32768)
    chosen = choose_request_id(head, trusted)
    assert (chosen == given.decode()) is taken
    assert taken or len(chosen) == 32


def test_what_is_no_network_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not appear"):
        trusted_from(["everybody"])
