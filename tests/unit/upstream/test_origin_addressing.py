"""Origin: targets, host header and keys out of [[upstream]]."""

from __future__ import annotations

from typing import Any

import pytest

from proxyd.config.schema import Config
from proxyd.config.secrets import Secret
from proxyd.upstream.origin import Origin


def origin(url: str, keys: tuple[bytes, ...] = (), dialect: str = "openai", **options: Any) -> Origin:
    section = {"name": "up", "url": url, "dialect": dialect, **options}
    config = Config.model_validate({"upstream": [section], "model": [{"name": "m", "id": 1, "upstreams": ["up"]}]})
    return Origin(config.upstream[0], tuple(Secret(key) for key in keys))


@pytest.mark.parametrize(
    ("dialect", "url", "path", "target"),
    [
        ("openai", "https://api.openai.com/v1", "/chat/completions", b"/v1/chat/completions"),
        ("openai", "https://api.openai.com/v1/", "/chat/completions", b"/v1/chat/completions"),
        ("openai", "http://127.0.0.1:9", "/chat/completions", b"/chat/completions"),
        ("openai", "https://gate/openai/v1", "/embeddings", b"/openai/v1/embeddings"),
        ("openai", "https://gate/v1", "/v1/odd", b"/v1/v1/odd"),
        ("anthropic", "https://api.anthropic.com", "/v1/messages", b"/v1/messages"),
        ("anthropic", "https://api.anthropic.com/v1", "/v1/messages", b"/v1/messages"),
        ("anthropic", "https://gate/anthropic/v1/", "/v1/messages?beta=true", b"/anthropic/v1/messages?beta=true"),
        ("anthropic", "https://gate/anthropic", "/v1/messages", b"/anthropic/v1/messages"),
        ("anthropic", "https://gate/xv1", "/v1/messages", b"/xv1/v1/messages"),
    ],
)
def test_the_base_path_joins_the_dialects_path(dialect: str, url: str, path: str, target: bytes) -> None:
    assert origin(url, dialect=dialect).target(path) == target


@pytest.mark.parametrize(
    ("url", "header", "host", "port", "tls"),
    [
        ("https://api.openai.com/v1", b"api.openai.com", "api.openai.com", 443, True),
        ("https://API.openai.com:443/v1", b"api.openai.com", "api.openai.com", 443, True),
        ("http://api.example:80", b"api.example", "api.example", 80, False),
        ("http://api.example:443", b"api.example:443", "api.example", 443, False),
        ("https://api.example:8443", b"api.example:8443", "api.example", 8443, True),
        ("http://[::1]:8000/v1", b"[::1]:8000", "::1", 8000, False),
    ],
)
def test_the_host_header_has_the_port_only_when_it_is_not_the_schemes(
    url: str, header: bytes, host: str, port: int, tls: bool
) -> None:
    made = origin(url)
    assert (made.host_header, made.host, made.port, made.tls) == (header, host, port, tls)


def test_several_keys_take_turns() -> None:
    made = origin("https://a/v1", (b"one", b"two"))
    values = [made.auth_headers() for _ in range(3)]
    assert values == [[(b"authorization", b"Bearer one")], [(b"authorization", b"Bearer two")], values[0]]


def test_anthropic_takes_its_key_in_x_api_key() -> None:
    assert origin("https://a", (b"k",), dialect="anthropic").auth_headers() == [(b"x-api-key", b"k")]


def test_an_origin_without_a_key_sends_none() -> None:
    assert origin("http://a").auth_headers() == []


def test_no_key_is_in_the_repr() -> None:
    made = origin("https://a/v1", (b"sk-hidden",))
    assert "hidden" not in repr(made) + str(made)


@pytest.mark.parametrize("key", [b"", b"a b", b"a\r\nx: y", b"\xff"])
def test_a_key_that_is_no_header_value_is_refused_without_being_shown(key: bytes) -> None:
    with pytest.raises(ValueError, match="a key is empty or has bytes") as caught:
        origin("https://a/v1", (key,))
    assert "x: y" not in str(caught.value)


def test_callers_may_change_the_list_they_got() -> None:
    made = origin("https://a/v1", (b"one",))
    made.auth_headers().clear()
    assert made.auth_headers() == [(b"authorization", b"Bearer one")]
