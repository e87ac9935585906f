"""Where an upstream is and how it is addressed: url, host header, paths, keys.

Owns: what [[upstream]] says about the address, cut into the parts that a request needs; the turn of the keys.
Must not know: sockets, pools, bodies. Invariant: no key is in `repr`, `str` or an error.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from proxyd.config.schema import UpstreamConfig
from proxyd.config.secrets import Secret

_DEFAULT_PORTS = {"http": 80, "https": 443}


class Origin:
    """One [[upstream]]. `base_path` has no slash at its end; `host` has no brackets; `host_header` is ready to send."""

    __slots__ = (
        "_header_sets",
        "_turn",
        "base_path",
        "config",
        "dialect",
        "host",
        "host_header",
        "name",
        "port",
        "tls",
    )

    def __init__(self, config: UpstreamConfig, keys: tuple[Secret, ...] = ()) -> None:
        """Raises ValueError for a url that is none of ours, or a key that cannot be a header value."""
        url = urlsplit(str(config.url))
        if url.scheme not in _DEFAULT_PORTS or not url.hostname:
            raise ValueError(f"upstream {config.name}: the url must be http://host or https://host")
        self.config = config
        self.name: str = config.name
        self.dialect = config.dialect
        self.host: str = _ascii_host(url.hostname)
        self.port: int = url.port or _DEFAULT_PORTS[url.scheme]
        self.tls: bool = url.scheme == "https"
        self.base_path: str = url.path.rstrip("/")
        self.host_header: bytes = _host_header(self.host, self.port, _DEFAULT_PORTS[url.scheme])
        self._header_sets = tuple([_auth_header(self.dialect, self.name, key)] for key in keys)
        self._turn = 0

    def __repr__(self) -> str:
        return f"<Origin {self.name} {self.dialect} {self.host}:{self.port}{self.base_path} tls={self.tls}>"

    def target(self, path: str) -> bytes:
        """The request target for a dialect's `path` (which may carry a query).

        openai: base path and path as they are (the SDKs' base_url ends in /v1, their paths do not begin with it).
        anthropic: its paths begin with /v1, and a base path that ends in /v1 means the same one, not a second.
        """
        base = self.base_path
        if (
            self.dialect == "anthropic"
            and base.endswith("/v1")
            and (path == "/v1" or path.startswith(("/v1/", "/v1?")))
        ):
            base = base[: -len("/v1")]
        return (base + path).encode("ascii")

    @property
    def next_key(self) -> str:
        """Which key `auth_headers` gives next, for the log: "2 of 3", never the key; "none" without one."""
        return f"{self._turn + 1} of {len(self._header_sets)}" if self._header_sets else "none"

    def auth_headers(self) -> list[tuple[bytes, bytes]]:
        """The credentials for one request; several keys take turns. Empty without a key. A new list each time."""
        if not self._header_sets:
            return []
        chosen = self._header_sets[self._turn]
        self._turn = (self._turn + 1) % len(self._header_sets)
        return list(chosen)


def _ascii_host(host: str) -> str:
    """Lower case; an international name in its IDNA form."""
    if host.isascii():
        return host.lower()
    return host.encode("idna").decode("ascii")


def _host_header(host: str, port: int, default_port: int) -> bytes:
    """RFC 9110, 7.2: the authority, without the scheme's own port; an IPv6 literal in brackets."""
    name = f"[{host}]" if ":" in host else host
    return (name if port == default_port else f"{name}:{port}").encode("ascii")


def _auth_header(dialect: str, upstream: str, key: Secret) -> tuple[bytes, bytes]:
    value = key.reveal()
    if not value or any(byte <= 0x20 or byte >= 0x7F for byte in value):
        raise ValueError(f"upstream {upstream}: a key is empty or has bytes that no header may carry")
    if dialect == "anthropic":
        return (b"x-api-key", value)
    return (b"authorization", b"Bearer " + value)
