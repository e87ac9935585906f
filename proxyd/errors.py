"""The failures that rooms tell each other about, as types.

Owns: what is refused to a client (`Refusal`), what an upstream did to us (`UpstreamError`), and what is wrong with a
configuration (`Finding`, `ConfigError`). Must not know: HTTP bytes, sockets, dialects; who catches decides what to do.
Invariants: no message carries a secret or a prompt; every `Refusal` has a status of 400..599.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

# The `type` word of an error body where the raiser names none; every other 4xx is the asker's mistake.
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def _type_of(status: int) -> str:
    """The error type that SDKs expect beside this status."""
    named = _TYPE_BY_STATUS.get(status)
    if named is not None:
        return named
    return "api_error" if status >= 500 else "invalid_request_error"


class Refusal(Exception):
    """What we answer to a client instead of serving it.

    `headers` are extra answer headers, names lower-cased; `retry_after_s` (seconds, 1 or more) adds `retry-after`.
    `close` ends the connection after the answer, for input whose end we cannot know. `reason` (one word, finer than the
    code) and `detail` are for our log only.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Iterable[tuple[str, str]] = (),
        close: bool = False,
        reason: str = "",
        detail: str = "",
    ) -> None:
        assert 400 <= status <= 599, status
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.type = _type_of(status) if type is None else type
        self.param = param
        self.close = close
        self.reason = reason
        self.detail = detail
        extra = tuple(headers)
        if retry_after_s is not None:
            extra += (("retry-after", str(max(1, retry_after_s))),)
        self.headers: tuple[tuple[str, str], ...] = extra

    def __str__(self) -> str:
        return f"{self.status} {self.code}: {self.message}"

    @property
    def cause(self) -> str:
        """The word in the access line: the code, and the reason behind a dot where there is one."""
        return f"{self.code}.{self.reason}" if self.reason else self.code


class UpstreamErrorKind(StrEnum):
    """What an upstream did, or did not do, in the words of the metric label `kind`."""

    RESOLVE = "resolve"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    CONNECT_TIMEOUT = "connect_timeout"
    TLS = "tls"
    RESET = "reset"
    EOF_BEFORE_HEAD = "eof_before_head"
    BAD_HEAD = "bad_head"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    POOL_FULL = "pool_full"
    POOL_TIMEOUT = "pool_timeout"
    NO_PORTS = "no_ports"
    BROKEN_BODY = "broken_body"
    NO_UPSTREAM = "no_upstream"


class UpstreamError(Exception):
    """An upstream failed us.

    `sent` is True when any byte of the request may have reached it: a retry could then bill twice.
    """

    def __init__(self, kind: UpstreamErrorKind, upstream: str, detail: str = "", *, sent: bool = False) -> None:
        super().__init__(kind, upstream, detail)
        self.kind = kind
        self.upstream = upstream
        self.detail = detail
        self.sent = sent

    def __str__(self) -> str:
        return f"upstream {self.upstream}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, or doubtful, about a configuration: where, what, and what to do about it.

    `line` counts from 1, which also stands for the file as a whole. `key` is the dotted path, elements from [0];
    `name` is what the file calls that element, where it has a name. About a kernel setting `key` is the setting, and
    `line` that of the option which makes it matter; `live` and `wanted` are the values, where there are such.
    """

    severity: Literal["error", "warning"]
    file: str
    line: int
    key: str
    message: str
    remedy: str
    name: str = ""
    live: str = ""
    wanted: str = ""

    def text(self) -> str:
        """The one line that an operator reads."""
        subject = f" {self.key}" if self.key else ""
        if self.name:
            subject += f" ({self.name})"
        advice = f"; {self.remedy}" if self.remedy else ""
        return f"{self.severity} {self.file}:{self.line}{subject}: {self.message}{advice}"


class ConfigError(Exception):
    """A configuration that may not run. `findings` holds everything found, warnings included."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings: tuple[Finding, ...] = tuple(findings)
        super().__init__(*self.findings)

    def __str__(self) -> str:
        return "\n".join(finding.text() for finding in self.findings)
