"""What crosses options: references, exclusions, and options that this version accepts without acting on them.

Owns: rules that need two options or more. Must not know: the file's text, secrets' contents, the host.
Invariant: a rule is a pure generator over a valid `Config`; it finds, it never repairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from ipaddress import ip_address
from typing import Any, Literal
from urllib.parse import urlsplit

from proxyd.config.conditions import MAX_CONDITIONS, ConditionError, parse
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config, Listen, UpstreamConfig
from proxyd.config.sink import has_password, is_mysql
from proxyd.config.units import format_duration

Severity = Literal["error", "warning"]

# How load.py names an entry whose own name is missing or unusable, so that the rules still see the rest of it.
UNNAMED = "unnamed.in.the.file-"


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding before it has a file and a line."""

    severity: Severity
    key: KeyPath
    message: str
    remedy: str
    # What else it was concluded from: where that is in error, this says nothing.
    rests_on: tuple[KeyPath, ...] = ()


def check(config: Config, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Every problem of every rule."""
    yield from _listeners(config)
    yield from _auth(config)
    for rule in (_upstreams, _models, _fallbacks, _streams, _quota, _telemetry, _monitoring, _not_yet):
        yield from rule(config)


def check_part(config: Config) -> Iterator[Problem]:
    """The problems that can be seen when sections other than the one in question have their defaults."""
    yield from _auth(config)
    yield from _telemetry(config)
    yield from _not_yet(config)


def _listeners(config: Config) -> Iterator[Problem]:
    server = config.server
    if not server.listen:
        yield Problem("error", ("server", "listen"), "is empty", 'name at least one address: ["127.0.0.1:3000"]')
    seen: dict[Listen, int] = {}
    for index, listen in enumerate(server.listen):
        first = seen.setdefault(listen, index)
        is_one_place = listen.kind == "unix" or listen.port != 0  # port 0 is another one each time
        if first != index and is_one_place:
            yield Problem("error", ("server", "listen", index), f"{listen.text} is listed twice", "remove one of them")
        if listen == server.admin and is_one_place:
            yield Problem("error", ("server", "admin"), f"{listen.text} is a public address, too", "give it its own")
        if config.auth.mode == "off" and not listen.is_local:
            yield Problem(
                "error",
                ("server", "listen", index),
                f'auth.mode = "off" would serve everybody who reaches {listen.text}',
                'listen on loopback or a Unix socket, or set auth.mode = "required"',
            )
    if not server.admin.is_local:
        yield Problem(
            "error",
            ("server", "admin"),
            f"{server.admin.text} can be reached from other machines, and the admin address asks for no token",
            'use "unix:/run/proxyd/admin.sock" or an address on loopback',
        )
    for name in ("state_dir", "runtime_dir"):
        if not getattr(server, name):
            yield Problem("error", ("server", name), "is empty", "name an absolute path")


def _auth(config: Config) -> Iterator[Problem]:
    auth = config.auth
    if auth.mode == "off":
        return
    where: KeyPath = ("auth", "algorithms")
    if not auth.algorithms:
        yield Problem("error", where, "is empty", 'name the algorithm of your tokens: ["HS256"]')
        return
    families = {name[:2] == "HS" for name in auth.algorithms}
    if len(families) == 2:
        yield Problem(
            "error",
            where,
            "mixes secret and public-key algorithms, which lets a public key be used as a secret",
            'choose ["HS256"], or ["RS256", "ES256"]',
        )
        return
    if len(set(auth.algorithms)) != len(auth.algorithms):
        yield Problem("error", where, "names an algorithm twice", "remove one of them")
    sources = {name: getattr(auth, name) for name in ("secret_file", "secret_env", "jwks_file", "jwks_url")}
    fitting = ("secret_file", "secret_env") if families == {True} else ("jwks_file", "jwks_url")
    given = [name for name in fitting if sources[name]]
    if not given:
        names = ", ".join(auth.algorithms)
        yield Problem("error", where, f"{names} has no key", f"set auth.{fitting[0]} or auth.{fitting[1]}")
    if len(given) == 2:
        yield Problem("error", ("auth", given[1]), f"auth.{given[0]} is set, too", "keep one of them")
    for name, value in sources.items():
        if value and name not in fitting:
            yield Problem(
                "error",
                ("auth", name),
                f"does not fit the algorithms ({', '.join(auth.algorithms)})",
                f"remove it, or choose {'RS256 or ES256' if name.startswith('jwks') else 'HS256'}",
            )


def _upstreams(config: Config) -> Iterator[Problem]:
    if not config.upstream:
        yield Problem(
            "error", ("upstream",), "there is no [[upstream]]", "add one with name, dialect, url and api_key_file"
        )
    seen: set[str] = set()
    for index, upstream in enumerate(config.upstream):
        place: KeyPath = ("upstream", index)
        if upstream.name in seen:
            yield Problem("error", (*place, "name"), f'"{upstream.name}" is taken', "give each upstream its own name")
        seen.add(upstream.name)
        if upstream.api_key_file and upstream.api_key_env:
            yield Problem("error", (*place, "api_key_env"), "api_key_file is set, too", "keep one of them")
        if any(_is_same_place(upstream, listen) for listen in (*config.server.listen, config.server.admin)):
            yield Problem("error", (*place, "url"), "is this proxyd's own address", "name the provider's")
        if upstream.url.startswith("http:") and (upstream.api_key_file or upstream.api_key_env):
            if not _is_loopback(urlsplit(upstream.url).hostname or ""):
                yield Problem("warning", (*place, "url"), "sends the key and every prompt unencrypted", "use https")
        if upstream.max_idle > upstream.max_connections:
            yield Problem(
                "warning", (*place, "max_idle"), "is above max_connections", "lower it; the excess is never used"
            )
        if upstream.first_byte_timeout > upstream.total_timeout:
            yield Problem(
                "warning", (*place, "first_byte_timeout"), "is above total_timeout, which ends first", "lower it"
            )
        if upstream.dialect == "anthropic" and re.search(r"/v1/messages$", upstream.url):
            yield Problem("error", (*place, "url"), "names a route, not the base", "end it at the host or at /v1")
        if upstream.dialect == "openai" and re.search(r"/(chat/completions|completions|responses)$", upstream.url):
            yield Problem("error", (*place, "url"), "names a route, not the base", "end it at /v1")
        if upstream.dialect == "openai" and not urlsplit(upstream.url).path:
            yield Problem(
                "warning",
                (*place, "url"),
                "has no path: requests will go to /chat/completions, and the base of the SDKs ends in /v1",
                f'write "{upstream.url}/v1", unless the server wants it so',
            )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _is_same_place(upstream: UpstreamConfig, listen: Listen) -> bool:
    """True when the upstream's address is this listener, as far as one can tell without resolving names."""
    if listen.kind == "unix" or listen.port == 0:
        return False
    parts = urlsplit(upstream.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    if port != listen.port:
        return False
    own = ip_address(listen.host)
    if own.is_unspecified:
        return _is_loopback(host) or host in ("0.0.0.0", "::")  # noqa: S104 compared, not bound
    if host in ("localhost", listen.host):
        return host == listen.host or own.is_loopback
    return False


def _models(config: Config) -> Iterator[Problem]:
    if not config.model:
        yield Problem("error", ("model",), "there is no [[model]]", "add one with name, id and upstreams")
    known = [upstream.name for upstream in config.upstream]
    choices = ", ".join(name for name in known if not name.startswith(UNNAMED))
    names: set[str] = set()
    ids: dict[int, str] = {}
    for index, model in enumerate(config.model):
        place: KeyPath = ("model", index)
        if model.name in names:
            yield Problem("error", (*place, "name"), f'"{model.name}" is taken', "give each model one entry")
        names.add(model.name)
        owner = ids.setdefault(model.id, model.name)
        if owner != model.name:
            yield Problem(
                "error",
                (*place, "id"),
                f'{model.id} is the id of "{owner}"',
                "rows could not be told apart: choose another",
            )
        used: set[str] = set()
        for group_index, group in enumerate(model.upstreams):
            for name in group:
                if name not in known:
                    close = get_close_matches(name, known, n=1)
                    remedy = f'did you mean "{close[0]}"?' if close else f"name one of: {choices or 'none exist'}"
                    yield Problem("error", (*place, "upstreams", group_index), f'there is no upstream "{name}"', remedy)
                if name in used:
                    yield Problem(
                        "error", (*place, "upstreams", group_index), f'"{name}" is listed twice', "list it once"
                    )
                used.add(name)


def _fallbacks(config: Config) -> Iterator[Problem]:
    by_name = {model.name: model for model in config.model}
    for index, model in enumerate(config.model):
        if not model.fallback:
            continue
        place: KeyPath = ("model", index, "fallback")
        if model.fallback not in by_name or model.fallback == "*":
            close = get_close_matches(model.fallback, [name for name in by_name if name != "*"], n=1)
            remedy = f'did you mean "{close[0]}"?' if close else "name a model that has its own [[model]]"
            yield Problem("error", place, f'there is no model "{model.fallback}"', remedy)
            continue
        chain = [model.name]
        following = model.fallback
        while following in by_name and following not in chain:
            chain.append(following)
            following = by_name[following].fallback
        if following == model.name:
            yield Problem(
                "error", place, f"goes round: {' -> '.join([*chain, following])}", "let one of them end the chain"
            )


def _streams(config: Config) -> Iterator[Problem]:
    stream = config.stream
    if stream.turn_bytes > stream.buffer:
        yield Problem("error", ("stream", "turn_bytes"), "is above stream.buffer, which must hold a turn", "lower it")


def _quota(config: Config) -> Iterator[Problem]:
    quota, retention = config.quota, config.telemetry.retention
    if quota.tokens and config.auth.mode == "off":
        yield Problem(
            "warning",
            ("quota", "tokens"),
            'has no effect with auth.mode = "off", which knows no users',
            "remove it, or limit the tenant `default` in [limits]",
        )
    if quota.tokens and 0 < retention < quota.window:
        yield Problem(
            "warning",
            ("quota", "window"),
            f"is longer than telemetry.retention ({format_duration(retention)}): deleted rows are not counted",
            "keep rows for as long as the window is",
        )


def _telemetry(config: Config) -> Iterator[Problem]:
    telemetry = config.telemetry
    key: KeyPath = ("telemetry", "password_file")
    if not telemetry.password_file:
        return
    if not is_mysql(telemetry.sink):
        yield Problem("warning", key, "has no effect: SQLite has no password", "remove it", (("telemetry", "sink"),))
    elif has_password(telemetry.sink):
        yield Problem("error", key, "telemetry.sink holds a password, too (not shown)", "take it out of the URL")


def _monitoring(config: Config) -> Iterator[Problem]:
    monitoring = config.monitoring
    if not monitoring.percentiles:
        yield Problem("error", ("monitoring", "percentiles"), "is empty", "name at least one, such as 0.99")
    if len(set(monitoring.percentiles)) != len(monitoring.percentiles):
        yield Problem("error", ("monitoring", "percentiles"), "names one twice", "remove one of them")
    where: KeyPath = ("monitoring", "alert_on")
    if len(monitoring.alert_on) > MAX_CONDITIONS:
        yield Problem("error", where, f"has more than {MAX_CONDITIONS} conditions", "keep those that wake somebody")
    for index, text in enumerate(monitoring.alert_on):
        try:
            parse(text)
        except ConditionError as error:
            yield Problem("error", (*where, index), error.message, error.remedy)
        if text in monitoring.alert_on[:index]:
            yield Problem("error", (*where, index), "is listed twice", "remove one of them")


# Options that are read and do not do in this version what they promise. An entry goes when they do.
NOT_YET: dict[KeyPath, str] = {}


def _not_yet(config: Config) -> Iterator[Problem]:
    for key, consequence in NOT_YET.items():
        section: Any = getattr(config, str(key[0]))
        value = getattr(section, str(key[1]))
        if value != getattr(type(section)(), str(key[1])):
            yield Problem("warning", key, consequence, "do not rely on it")
