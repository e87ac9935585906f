"""Every difference there may be between an SDK's session directly and through proxyd; docs/compatibility.md tells why.

Owns: the table, and the comparison that allows nothing else. Must not know: how the two outcomes were made.
A difference is a path into an outcome (list positions as []), with the values on both sides. It is allowed when a row
of the table names its step, its path and its way, and the row's own condition holds for the two values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.daemon.harness import KEY

MISSING = "(missing)"
Holds = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Row:
    """One documented difference. `anchor` is its heading in docs/compatibility.md."""

    anchor: str
    path: str
    holds: Holds
    steps: str = ".*"
    ways: str = ".*"

    def allows(self, step: str, way: str, path: str, direct: Any, via: Any) -> bool:
        return bool(
            re.fullmatch(self.path, path)
            and re.fullmatch(self.steps, step)
            and re.fullmatch(self.ways, way)
            and self.holds(direct, via)
        )


def added(value: Any) -> Holds:
    return lambda direct, via: direct == MISSING and via == value


def is_new_text(direct: Any, via: Any) -> bool:
    return direct in (MISSING, None) and isinstance(via, str) and via not in ("", MISSING)


def is_removed(direct: Any, via: Any) -> bool:
    return via == MISSING


def anything(direct: Any, via: Any) -> bool:
    return True


def is_one_more(direct: Any, via: Any) -> bool:
    return bool(via == direct + 1)


def is_one_less(direct: Any, via: Any) -> bool:
    return bool(via == direct - 1)


HEADERS = r"(raised\.)?headers\."
SEEN = r"attempts\[\]\.headers\."
UNASKED = "chat usage (absent|null|false) .*|completions stream|gzip though not asked for|many events|1 MiB .* length"
CUT = r".* cut (between events|within an event|short of its length|by a reset|before any event)"
REFUSES = ".* refuses .*"

TABLE = (
    Row("Request ids", HEADERS + "x-proxyd-request-id", is_new_text),
    Row("Request ids", HEADERS + "x-request-id", is_new_text),
    Row("Request ids", "request_id", is_new_text, steps="chat whole without a request id"),
    Row("Headers of a stream", HEADERS + "cache-control", added("no-cache")),
    Row("Headers of a stream", HEADERS + "x-accel-buffering", added("no")),
    Row("Framing of a stream", HEADERS + "content-length", is_removed, steps=".* length"),
    Row("Framing of a stream", HEADERS + "transfer-encoding", added("chunked"), steps=".* length"),
    Row(
        "The provider's own site",
        HEADERS + "(set-cookie|alt-svc|strict-transport-security|access-control-.*)",
        is_removed,
    ),
    Row("The provider's own site", SEEN + "cookie", is_removed),
    Row("nginx's headers", HEADERS + "(date|server|connection)", anything, ways="nginx .*"),
    Row(
        "Usage",
        r"attempts\[\]\.body\.stream_options(\.include_usage)?",
        lambda d, v: v in (True, {"include_usage": True}),
        steps=UNASKED + "|stream options refused|usage unasked|.* to a stream",
    ),
    Row("Usage", r"events\[\]\.usage", added(None), steps=UNASKED),
    Row("Usage nobody asked for", r"count|events\.length", is_one_less, steps="usage unasked"),
    Row("Usage under a coding", r"count|events\.length", is_one_more, steps="gzip though not asked for"),
    Row("Servers without stream_options", r"attempts\.length", is_one_more, steps="stream options refused"),
    Row("What the provider sees", SEEN + "accept-encoding", lambda d, v: v == "identity"),
    Row("What the provider sees", SEEN + "authorization", lambda d, v: v in (MISSING, f"Bearer {KEY}")),
    Row("What the provider sees", SEEN + "x-api-key", added(KEY)),
    Row("What the provider sees", SEEN + "x-request-id", is_new_text),
    Row("What the provider sees", SEEN + "(connection|sec-fetch-mode|host)", anything),
    Row("Models", r"value.*|attempts\.length", anything, steps="models"),
    Row("Broken streams", r"raised\..*", anything, steps=CUT),
    Row(
        "No answer",
        r"raised\..*|attempts\.length|attempts\[\]\.headers\.x-stainless-retry-count",
        anything,
        steps=".* closed without an answer",
    ),
    Row("Refusals", r"raised\..*|attempts\.length", anything, steps=REFUSES),
)

# What the SDKs raise when an upstream breaks off: (directly, through proxyd). The documentation has the same table.
BROKEN = {
    "openai-py": ("openai.APIConnectionError", "openai.APIError"),
    "openai-py-async": ("openai.APIConnectionError", "openai.APIError"),
    "openai-js": ("TypeError", "APIError"),
    "anthropic-py": ("httpx2.RemoteProtocolError", "anthropic.APIStatusError"),
    "anthropic-py-async": ("httpx2.RemoteProtocolError", "anthropic.APIStatusError"),
    "anthropic-js": ("TypeError", "APIError"),
}
RESET = {**BROKEN, "anthropic-py": ("httpx2.ReadError", BROKEN["anthropic-py"][1])}
RESET["anthropic-py-async"] = RESET["anthropic-py"]
CLOSED = ("APIConnectionError", "InternalServerError")


def differences(direct: Any, via: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, direct, via) for every leaf that is not the same on both sides."""
    if isinstance(direct, dict) and isinstance(via, dict):
        for key in sorted({*direct, *via}):
            below = f"{path}.{key}" if path else key
            yield from differences(direct.get(key, MISSING), via.get(key, MISSING), below)
    elif isinstance(direct, list) and isinstance(via, list):
        if len(direct) != len(via):
            yield f"{path}.length", len(direct), len(via)
        for one, other in zip(direct, via, strict=False):
            yield from differences(one, other, f"{path}[]")
    elif direct != via:
        yield path, direct, via


def decide(step: str, way: str, direct: Any, via: Any) -> tuple[list[str], set[Row]]:
    """What is not documented, told in words, and the rows that were needed."""
    unknown, used = [], set()
    for path, one, other in differences(direct, via):
        rows = [row for row in TABLE if row.allows(step, way, path, one, other)]
        used.update(rows[:1])
        if not rows:
            unknown.append(f"{step!r}, {way}: {path} is {str(other)[:300]!r}, directly {str(one)[:300]!r}")
    return unknown, used
