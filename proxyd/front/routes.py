"""Which door a request goes through, from its method and its exact path.

Owns: the decision. Pure. Must not know sockets, aiohttp or who is asking.

The relay's routes are served from raw sockets; everything else, known or not, is the web application's, which has the
one table of its own routes and answers 404 and 405 for them.

Invariants: paths match byte for byte after the query is cut: `/v1/messages/`, `/v1%2Fmessages`, `//v1/messages` and
`/V1/messages` are other paths, because a proxy in front may have applied rules to the text it saw.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyd.dialects.ask import Route
from proxyd.errors import Refusal

__all__ = ["Decision", "Preflight", "Relay", "Web", "decide_route"]

ALLOW_RELAY = "POST, OPTIONS"

_ROUTES: dict[str, Route] = {str(route.value): route for route in Route}


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay route, asked for with POST."""

    route: Route


@dataclass(frozen=True, slots=True)
class Preflight:
    """OPTIONS on a relay route: a browser asks whether another site's page may call it."""

    route: Route


@dataclass(frozen=True, slots=True)
class Web:
    """Everything else."""


Decision = Relay | Preflight | Web

_WEB = Web()
_RELAY = {path: Relay(route) for path, route in _ROUTES.items()}
_PREFLIGHT = {path: Preflight(route) for path, route in _ROUTES.items()}


def decide_route(method: str, path: str) -> Decision:
    """The door for one request. Raises Refusal 405 with `Allow` for another method on a relay route."""
    relay = _RELAY.get(path)
    if relay is None:
        return _WEB
    if method == "POST":
        return relay
    if method == "OPTIONS":
        return _PREFLIGHT[path]
    raise Refusal(
        405,
        "method_not_allowed",
        f"{path} takes POST, not {method}.",
        headers=(("Allow", ALLOW_RELAY),),
    )
