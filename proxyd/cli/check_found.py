"""What the parts of `--check-config` hand to each other: a thing found, and what the configuration asks of a machine.

Owns: `Found` and how it becomes a Finding; `Load`, the sums over the configuration that findings about the host compute
with. Must not know: the host, files, what is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.secrets import key_text
from proxyd.errors import Finding
from proxyd.host.ports import Egress


class Found(NamedTuple):
    """Is it an error, about which option, what is wrong, what to do. `setting`: of the kernel, which then is the key of
    the finding, and the option is the one that makes it matter; `live` and `wanted` are its values."""

    is_error: bool
    key: KeyPath
    message: str
    remedy: str
    live: str = ""
    wanted: str = ""
    setting: str = ""


def to_findings(config: Config, found: Iterable[Found]) -> list[Finding]:
    """With the line, the key and the name that the file has for each."""
    return [
        Finding(
            "error" if one.is_error else "warning",
            config.file,
            config.line_of(*one.key),
            one.setting or key_text(one.key),
            one.message,
            one.remedy,
            "" if one.setting else config.name_of(*one.key),
            one.live,
            one.wanted,
        )
        for one in found
    ]


@dataclass(frozen=True, slots=True)
class Load:
    """What the configuration may have at once, at most. `per_worker` and `streams`: connections to upstreams, of one
    worker and of all. `egress`: by destination, each with the index of an upstream that goes there."""

    workers: int
    per_worker: int
    streams: int
    egress: tuple[tuple[int, Egress], ...]
    listen_ports: frozenset[int]
    tcp_listeners: int
    is_public: bool

    @property
    def busiest(self) -> Egress:
        """The destination that needs most ports of one source address."""
        return max((egress for _, egress in self.egress), key=lambda one: one.connections / one.sources)


def load_of(config: Config) -> Load:
    """The sums. A configuration without an upstream never gets here: it has errors."""
    server, workers = config.server, config.server.workers
    destinations: dict[str, tuple[int, Egress]] = {}
    for index, upstream in enumerate(config.upstream):
        parts = urlsplit(upstream.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        name = f"{parts.hostname}:{port}"
        first, before = destinations.get(name, (index, Egress(name, 0, 1 << 16)))
        # Where two upstreams share a destination, the one with fewer addresses runs out first.
        sources = min(before.sources, max(1, len(upstream.source_addresses)))
        destinations[name] = (first, Egress(name, before.connections + upstream.max_connections * workers, sources))
    per_worker = sum(upstream.max_connections for upstream in config.upstream)
    tcp = [one for one in server.listen if one.kind != "unix"]
    own = {one.port for one in (*tcp, server.admin) if one.kind != "unix" and one.port}
    return Load(
        workers=workers,
        per_worker=per_worker,
        streams=per_worker * workers,
        egress=tuple(destinations.values()),
        listen_ports=frozenset(own),
        tcp_listeners=len(tcp),
        is_public=not all(one.is_local for one in tcp),
    )
