"""Every option of proxyd: its type, bounds, default, meaning and reload class. Attribute names are the TOML keys.

Owns: what one option may be, alone. Must not know: rules that cross options (rules.py), the file (load.py), secrets.
Invariants: every model is frozen and refuses unknown keys; durations are float seconds, sizes int bytes; nothing here
reads the host, except that workers = "auto" counts the cores.

Reload class of an option (`json_schema_extra["reload"]`): "reload" takes effect with a new generation of workers,
"restart" only with a new node, because its processes hold what it names (the admin address, directories, the store).
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from proxyd.config import values as v
from proxyd.config.sink import sink_url
from proxyd.config.values import EnvName, Listen, ModelName, ModelNameOrNone, Name, Path

__all__ = ["Config", "Listen", "ModelConfig", "UpstreamConfig", "option"]


def option(default: Any = ..., why: str = "", *, reload: str = "reload", lists: bool = False) -> Any:
    """A documented option; without a default it is required. A default is written as the file would write it."""
    strict = False if lists else None
    extra = {"reload": reload}
    return Field(default, description=why, json_schema_extra=extra, strict=strict, validate_default=True)  # type: ignore[arg-type]


class Section(BaseModel):
    """One table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class Server(Section):
    """Where we listen, with how many processes, and which directories are ours."""

    listen: tuple[Annotated[Listen, BeforeValidator(v.parse_listen)], ...] = option(
        ["127.0.0.1:3000"], "public addresses: host:port, [v6]:port or unix:/path", lists=True
    )
    admin: Annotated[Listen, BeforeValidator(v.parse_listen)] = option(
        "unix:/run/proxyd/admin.sock", "metrics, status and revocation: a Unix socket or loopback", reload="restart"
    )
    workers: Annotated[int, BeforeValidator(v.parse_workers)] = option(
        "auto", "worker processes; auto is one a core"
    )
    backlog: Annotated[int, v.whole(1, 65535)] = option(
        4096, "connections that may wait for accept, per listener; net.core.somaxconn caps it"
    )
    drain_timeout: Annotated[float, v.duration("0s", "24h")] = option(
        "120s", "how long running streams may go on after TERM"
    )
    state_dir: Path = option(
        "/var/lib/proxyd", "what must survive a reboot: the spool, the revocations", reload="restart"
    )
    runtime_dir: Path = option("/run/proxyd", "what need not: sockets", reload="restart")


class Http(Section):
    """Limits on what a client may send, and who may speak for a client."""

    max_head: Annotated[int, v.size("1KiB", "1MiB")] = option("32KiB", "request line and headers; more is 431")
    max_body: Annotated[int, v.size("1B", "1GiB")] = option("8MiB", "request body; more is 413")
    head_timeout: Annotated[float, v.duration("100ms", "10m")] = option(
        "10s", "first to last byte of a head; slower is 408"
    )
    body_timeout: Annotated[float, v.duration("100ms", "1h")] = option(
        "30s", "first to last byte of a body; slower is 408"
    )
    keepalive: Annotated[float, v.duration("0s", "1h")] = option("75s", "how long an idle client connection is kept")
    trusted_proxies: tuple[Annotated[str, BeforeValidator(v.parse_network)], ...] = option(
        ["127.0.0.0/8", "::1", "unix"],
        "peers whose X-Forwarded-* and X-Request-Id are believed: addresses, networks, unix",
        lists=True,
    )


class Auth(Section):
    """Who may ask: the session token and the key that proves it."""

    mode: Literal["required", "off"] = option("required", "off serves anybody, and only on loopback or Unix listeners")
    cookie: Annotated[str, v.named(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}", "a cookie name (RFC 6265 token)")] = option(
        "ai_session_jwt", "the cookie that carries the token"
    )
    algorithms: tuple[Literal["HS256", "RS256", "ES256"], ...] = option(
        ["HS256"], "accepted signatures; HS256 stands alone, RS256 and ES256 take their keys from a JWKS", lists=True
    )
    secret_file: Path = option("/etc/proxyd/jwt.secret", "the HS256 secret, at least 32 bytes, not readable by others")
    secret_env: EnvName = option("", "instead: the environment variable that holds it")
    jwks_file: Path = option("", "the public keys for RS256 and ES256, a JWK set")
    jwks_url: Annotated[str, BeforeValidator(v.http_url_or_none)] = option(
        "", "instead: where to fetch them: at start, every ten minutes, and for an unknown kid"
    )
    allowed_origins: tuple[Annotated[str, BeforeValidator(v.web_origin)], ...] = option(
        [], "origins whose pages may use the cookie (CORS with credentials); empty is same origin only", lists=True
    )
    issuer: str = option("", "iss that a token must carry; empty is unchecked")
    audience: str = option("", "aud that a token must carry; empty is unchecked")
    leeway: Annotated[float, v.duration("0s", "5m")] = option("5s", "clock skew forgiven on exp, nbf and iat")

    @model_validator(mode="before")
    @classmethod
    def _one_key_source(cls, data: Any) -> Any:
        """The default secret_file stands back when another key source is configured."""
        others = ("secret_env", "jwks_file", "jwks_url")
        if isinstance(data, dict) and "secret_file" not in data and any(data.get(key) for key in others):
            return {**data, "secret_file": ""}
        return data


class Quota(Section):
    """What a user may spend in a rolling window."""

    window: Annotated[float, v.duration("1s", "90d")] = option("24h", "the rolling window")
    tokens: Annotated[int, v.whole(0, 2**53)] = option(0, "a user's ceiling in it; 0 leaves only the token's own quota")
    refresh: Annotated[float, v.duration("100ms", "1h")] = option("30s", "how often the store's sum is read again")


# Each permit is a word of shared memory, and a request looks for a free one: half as many would be too few for a whole
# site's tenant on 16 workers; ten times more would make that look cost more than the request.
MAX_STREAMS = 65536
Streams = Annotated[int, v.whole(0, MAX_STREAMS, "no limit")]
# What 250 ms of a window count to, in 40 bits of a word.
Limit = Annotated[int, v.whole(0, 10**12, "no limit")]


# A name that no token can have (access/tenants.py) would be a limit for nobody.
TENANT_NAMES = "1 to 64 letters, digits, dots, underscores and hyphens, the first a letter or digit, as in a token"


class TenantLimits(Section):
    """What differs for one tenant; an option left out keeps the general value."""

    concurrent_streams: Streams | None = option(None, "streams at once; 0 is no limit")
    requests_per_minute: Limit | None = option(None, "requests in any 60 seconds; 0 is no limit")
    tokens_per_minute: Limit | None = option(None, "tokens in any 60 seconds; 0 is no limit")


class Limits(Section):
    """How much one tenant may ask for at once and a minute."""

    concurrent_streams: Streams = option(0, "streams at once; 0 is no limit")
    requests_per_minute: Limit = option(0, "requests in any 60 seconds; 0 is no limit")
    tokens_per_minute: Limit = option(0, "tokens in any 60 seconds; 0 is no limit")
    tenants: dict[Annotated[str, v.named(v.NAME_PATTERN, TENANT_NAMES)], TenantLimits] = option(
        {}, "[limits.tenants.NAME] overrides any of them for one tenant"
    )

    @property
    def most_streams(self) -> int:
        """The largest concurrent_streams of any tenant: what the shared table of permits has room for."""
        own = (tenant.concurrent_streams or 0 for tenant in self.tenants.values())
        return max(self.concurrent_streams, *own, 0)

    def for_tenant(self, name: str) -> tuple[int, int, int]:
        """(concurrent_streams, requests_per_minute, tokens_per_minute) of a tenant; 0 is no limit."""
        own = self.tenants.get(name, TenantLimits())
        return (
            self.concurrent_streams if own.concurrent_streams is None else own.concurrent_streams,
            self.requests_per_minute if own.requests_per_minute is None else own.requests_per_minute,
            self.tokens_per_minute if own.tokens_per_minute is None else own.tokens_per_minute,
        )


class UpstreamConfig(Section):
    """One origin that answers for us."""

    name: Name = option(..., "what models, metrics and rows call it")
    dialect: Literal["openai", "anthropic"] = option("openai", "the API it speaks")
    url: Annotated[str, BeforeValidator(v.http_url)] = option(..., "its base, as the provider's SDK takes it")
    api_key_file: Annotated[tuple[Path, ...], BeforeValidator(v.one_or_list)] = option(
        [], "the file that holds its key, not readable by others; a list gives several keys, used in turn", lists=True
    )
    api_key_env: Annotated[tuple[EnvName, ...], BeforeValidator(v.one_or_list)] = option(
        [], "instead: the environment variable that holds it, or a list", lists=True
    )
    weight: Annotated[int, v.whole(1, 1000)] = option(1, "its share among the upstreams of one group")
    max_connections: Annotated[int, v.whole(1, 65535)] = option(1024, "connections at once, per worker")
    max_idle: Annotated[int, v.whole(0, 65535)] = option(256, "idle connections kept, per worker")
    idle_expiry: Annotated[float, v.duration("0s", "1h")] = option("60s", "how long an idle connection is kept")
    max_age: Annotated[float, v.duration("100ms", "24h")] = option(
        "1h", "a connection older than this is not used again"
    )
    connect_timeout: Annotated[float, v.duration("10ms", "5m")] = option("3s", "name, TCP and TLS together")
    first_byte_timeout: Annotated[float, v.duration("10ms", "1h")] = option(
        "60s", "request sent to the answer's first byte"
    )
    idle_timeout: Annotated[float, v.duration("10ms", "1h")] = option("60s", "the longest silence within an answer")
    total_timeout: Annotated[float, v.duration("10ms", "24h")] = option("10m", "request sent to the answer's last byte")
    source_addresses: tuple[Annotated[str, BeforeValidator(v.parse_address)], ...] = option(
        [], "local addresses to spread connections over; each gives 55,000 more ports", lists=True
    )
    congestion_control: Annotated[str, v.named(r"[a-z0-9_]{0,15}", 'the name of a kernel algorithm, or ""')] = option(
        "bbr", "TCP congestion control towards it; empty leaves the system's"
    )
    ca_file: Path = option("", "certificates to trust for it (PEM); empty is the system's store")


class ModelConfig(Section):
    """One model that a client may ask for."""

    name: ModelName = option(..., 'what a client asks for; "*" takes any name that no other entry has')
    id: Annotated[int, v.whole(0, 65535)] = option(..., "sys_ai_transactions.model_id")
    upstreams: Annotated[tuple[tuple[str, ...], ...], BeforeValidator(v.upstream_groups)] = option(
        ..., "tried in this order; an inner list shares by weight"
    )
    upstream_model: ModelNameOrNone = option("", "the name the upstream knows it by; empty is the name asked for")
    fallback: ModelNameOrNone = option("", "a configured model to answer instead when none of these can")


class Stream(Section):
    """How one answer is relayed."""

    heartbeat: Annotated[float, v.duration("100ms", "10m")] = option(
        "15s", "a comment line when the upstream is silent this long"
    )
    buffer: Annotated[int, v.size("1KiB", "64MiB")] = option(
        "256KiB", "held for a client that does not read; then its upstream waits"
    )
    turn_bytes: Annotated[int, v.size("1KiB", "1MiB")] = option(
        "64KiB", "what one stream may relay before others get their turn"
    )
    slow_client_timeout: Annotated[float, v.duration("100ms", "1h")] = option(
        "60s", "a client that takes nothing for this long is dropped"
    )


class Telemetry(Section):
    """Where the row of each transaction goes."""

    sink: Annotated[str, BeforeValidator(sink_url)] = option(
        "sqlite:////var/lib/proxyd/telemetry.db",
        "sqlite:////path/file.db, mysql://user@host:port/database or mysql:///database?unix_socket=/path",
        reload="restart",
    )
    password_file: Path = option("", "the password of a mysql:// sink, not readable by others")
    linger: Annotated[float, v.duration("0s", "10s")] = option("20ms", "how long a group of rows waits for company")
    batch_rows: Annotated[int, v.whole(1, 100_000)] = option(1000, "rows in one group at most")
    durability: Literal["row", "second", "os"] = option(
        "second", "when a spooled row is on disk: each row, each second, when the kernel likes"
    )
    spool_max: Annotated[int, v.size("64KiB", "64TiB")] = option(
        "4GiB", "bytes that may wait; at it billable requests get 503"
    )
    retention: Annotated[float, v.duration("0s", "3650d")] = option(
        "90d", "how long rows are kept; 0s keeps them for ever"
    )


class Monitoring(Section):
    """What /status computes."""

    percentiles: tuple[v.Percentile, ...] = option([0.5, 0.95, 0.99, 0.999], "of every latency, in /status", lists=True)
    alert_on: tuple[str, ...] = option(
        ["queue_depth > 800", "p99_latency > 200ms", "backpressure_events > 100/min"],
        "alerts: METRIC > NUMBER with a unit or a rate",
        lists=True,
    )


class LogOptions(Section):
    """What is written, where, in which form."""

    access: Annotated[str, BeforeValidator(v.access_target)] = option(
        "stdout", "the access log: stdout, off or an absolute path"
    )
    format: Literal["json", "text"] = option("json", "one JSON object a line, or text for people")
    level: Literal["debug", "info", "warning", "error"] = option("info", "the least important event that is written")


class Demo(Section):
    """Extras for trying it out."""

    page: bool = option(False, "serve the chat page at /")


def _default(section: type[Section]) -> Any:
    """A section that the file leaves out."""
    return Field(default_factory=section)


class Config(Section):
    """A whole configuration that passed its own checks; the rules that cross options are in rules.py."""

    server: Server = _default(Server)
    http: Http = _default(Http)
    auth: Auth = _default(Auth)
    quota: Quota = _default(Quota)
    limits: Limits = _default(Limits)
    upstream: tuple[UpstreamConfig, ...] = Field((), strict=False)
    model: tuple[ModelConfig, ...] = Field((), strict=False)
    stream: Stream = _default(Stream)
    telemetry: Telemetry = _default(Telemetry)
    monitoring: Monitoring = _default(Monitoring)
    log: LogOptions = _default(LogOptions)
    demo: Demo = _default(Demo)

    _origin: tuple[str, dict[tuple[str | int, ...], int]] = PrivateAttr(default=("", {}))

    @cached_property
    def upstream_by_name(self) -> dict[str, UpstreamConfig]:
        """Upstreams by their names."""
        return {upstream.name: upstream for upstream in self.upstream}

    @cached_property
    def _model_by_name(self) -> dict[str, ModelConfig]:
        return {model.name: model for model in self.model}

    def find_model(self, name: str) -> ModelConfig | None:
        """The model that answers to `name`: its own entry, else "*", else None."""
        return self._model_by_name.get(name) or self._model_by_name.get("*")

    @property
    def file(self) -> str:
        """The file that it was read from, for messages."""
        return self._origin[0]

    def line_of(self, *path: str | int) -> int:
        """The line of an option in its file, or of what encloses it; 1 when the file does not mention it."""
        lines = self._origin[1]
        for length in range(len(path), 0, -1):
            line = lines.get(path[:length])
            if line is not None:
                return line
        return 1

    def name_of(self, *path: str | int) -> str:
        """What the upstream or model that holds an option is called; "" for the others."""
        if len(path) > 1 and isinstance(path[1], int):
            names: dict[str | int, list[str]] = {
                "upstream": [one.name for one in self.upstream],
                "model": [one.name for one in self.model],
            }
            entries = names.get(path[0], [])
            return entries[path[1]] if path[1] < len(entries) else ""
        return ""

    def remember_origin(self, file: str, lines: dict[tuple[str | int, ...], int]) -> None:
        """Called once, by load.py: where each key path stands."""
        self._origin = (file, lines)
