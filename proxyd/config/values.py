"""The kinds of value that options hold: durations, sizes, addresses, names, paths; each refuses with a remedy.

Owns: what one value may look like. Must not know: other options, the file, the host.
Invariants: a validator never repeats a value that may be a secret (paths to keys, URLs with passwords); every refusal
is a `PydanticCustomError` whose context carries `remedy`.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from proxyd.config.units import UnitError, format_duration, format_size, parse_duration, parse_size

# How an upstream may be called, and a tenant: it is what access/tenants.py takes of a token.
NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
# sockaddr_un.sun_path is 108 bytes and ends in a NUL: unix(7).
MAX_UNIX_PATH = 107


def refuse(message: str, remedy: str) -> NoReturn:
    """Refuses the value at hand."""
    raise PydanticCustomError("refused", "{message}", {"message": message, "remedy": remedy})


def duration(shortest: str, longest: str) -> BeforeValidator:
    """A duration within bounds, as float seconds."""
    low, high = parse_duration(shortest), parse_duration(longest)

    def check(value: Any) -> float:
        try:
            seconds = parse_duration(value, low, high)
        except UnitError as error:
            refuse(error.message, error.remedy)
        if not low <= seconds <= high:
            refuse(f"{format_duration(seconds)} is out of range", f"write {shortest} to {longest}")
        return seconds

    return BeforeValidator(check)


def size(smallest: str, largest: str) -> BeforeValidator:
    """A size within bounds, as int bytes."""
    low, high = parse_size(smallest), parse_size(largest)

    def check(value: Any) -> int:
        try:
            count = parse_size(value, low, high)
        except UnitError as error:
            refuse(error.message, error.remedy)
        if not low <= count <= high:
            refuse(f"{format_size(count)} is out of range", f"write {smallest} to {largest}")
        return count

    return BeforeValidator(check)


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to listen on: `host` (an IP address without brackets) and `port`, or the `path` of a Unix socket."""

    kind: Literal["tcp", "unix"]
    host: str = ""
    port: int = 0
    path: str = ""

    @property
    def text(self) -> str:
        """The address as the configuration writes it."""
        if self.kind == "unix":
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True when only this machine can connect: a Unix socket or a loopback address."""
        return self.kind == "unix" or ipaddress.ip_address(self.host).is_loopback


_LISTEN_REMEDY = 'write "127.0.0.1:3000", "[::1]:3000" or "unix:/run/proxyd/proxyd.sock"'


def parse_listen(value: Any) -> Listen:
    """A `Listen` out of "host:port", "[v6]:port" or "unix:/path"; port 0 lets the kernel choose."""
    if isinstance(value, Listen):
        return value
    if not isinstance(value, str):
        refuse("must be an address in a string", _LISTEN_REMEDY)
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path.startswith("/"):
            refuse(f'"{value}" has no absolute path', _LISTEN_REMEDY)
        if len(os.fsencode(path)) > MAX_UNIX_PATH:
            refuse(f"the path is longer than {MAX_UNIX_PATH} bytes", "choose a shorter one")
        return Listen("unix", path=path)
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]+)):([0-9]{1,5})", value)
    if match is None:
        refuse(f'"{value}" is not an address', _LISTEN_REMEDY)
    host, port = match[1] or match[2] or "", int(match[3])
    if host == "localhost":
        host = "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        refuse(f'"{host}" is not an IP address', 'listen on an address, "0.0.0.0" for all')
    if port > 65535:
        refuse(f"port {port} is above 65535", _LISTEN_REMEDY)
    if (address.version == 6) != (match[1] is not None):
        refuse(f'"{value}" is not an address', 'an IPv6 address is written in brackets: "[::1]:3000"')
    return Listen("tcp", host=str(address), port=port)


def parse_workers(value: Any) -> int:
    """The number of workers; "auto" is one a core that this process may run on."""
    if value == "auto":
        return len(os.sched_getaffinity(0))
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 512:
        refuse("must be a number of processes", 'write "auto" or an integer from 1 to 512')
    return value


def parse_network(value: Any) -> str:
    """A trusted peer: "unix", an address or a network, in its canonical spelling."""
    if value == "unix":
        return "unix"
    if isinstance(value, str):
        try:
            return str(ipaddress.ip_network(value))
        except ValueError:
            try:
                wider = ipaddress.ip_network(value, strict=False)
            except ValueError:
                pass
            else:
                refuse(f'"{value}" has bits set behind its prefix', f'write "{wider}"')
    refuse("is not a network", 'write "10.0.0.0/8", "::1" or "unix"')


def parse_address(value: Any) -> str:
    """A local IP address, canonical."""
    try:
        if isinstance(value, str):
            return str(ipaddress.ip_address(value))
    except ValueError:
        pass
    refuse("is not an IP address", 'write one such as "192.0.2.10"')


def absolute_path(value: Any) -> str:
    """An absolute path, or "" for none. The value is never repeated: someone will put the secret itself here."""
    if not isinstance(value, str):
        refuse("must be a path in a string", 'write it absolute, such as "/etc/proxyd/jwt.secret"')
    if value and (not value.startswith("/") or "\0" in value):
        refuse("is not an absolute path (its value is not shown)", "write the path of a file that holds it, from /")
    return value


def environment_name(value: Any) -> str:
    """The name of an environment variable, or "". The value is never repeated: someone will put the secret here."""
    if not isinstance(value, str) or (value and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,127}", value) is None):
        refuse(
            "is not the name of an environment variable (its value is not shown)", "write a name such as OPENAI_API_KEY"
        )
    return value


def parse_percentile(value: Any) -> float:
    """A share between 0 and 1, both excluded."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        refuse("is not a share between 0 and 1", "write 0.99 for the 99th percentile")
    return float(value)


def one_or_list(value: Any) -> Any:
    """A string stands for a list of one; "" for the empty list."""
    if isinstance(value, str):
        return [value] if value else []
    return value


def upstream_groups(value: Any) -> Any:
    """["a", ["b", "c"]] as (("a",), ("b", "c")): each group is tried in turn, its members share by weight."""
    if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value):
        refuse("must be a list of upstream names", f'write ["{value}"]')
    if not isinstance(value, list | tuple) or not value:
        refuse("must be a list of upstream names", 'write ["a"], or [["a", "b"], "c"]')
    groups: list[tuple[str, ...]] = []
    for group in value:
        members = (group,) if isinstance(group, str) else group
        if not isinstance(members, list | tuple) or not members or not all(isinstance(name, str) for name in members):
            refuse("must hold names of upstreams, or lists of names", 'write ["a"], or [["a", "b"], "c"]')
        groups.append(tuple(members))
    return tuple(groups)


def http_url(value: Any) -> str:
    """An http or https URL without user, query and fragment; a trailing slash is dropped."""
    example = 'write one such as "https://api.openai.com/v1"'
    if not isinstance(value, str):
        refuse("must be a URL in a string", example)
    if re.search(r"[\x00-\x20\x7f-\U0010ffff]", value):
        refuse("holds a space, a control or a non-ASCII character", example)
    try:
        parts = urlsplit(value)
        host, port = parts.hostname, parts.port
    except ValueError:
        refuse("is not a URL", example)
    if parts.scheme not in ("http", "https"):
        refuse(f'scheme "{parts.scheme}" is not http or https', example)
    if "@" in parts.netloc:
        refuse("holds a user or password (not shown)", "give the key with api_key_file or api_key_env")
    if not host:
        refuse("names no host", example)
    if port == 0:
        refuse("port 0 cannot be connected to", example)
    if "?" in value or "#" in value:
        refuse("has a query or a fragment", "leave off everything from ? or # on")
    return value.rstrip("/")


def http_url_or_none(value: Any) -> str:
    """An `http_url`, or "" for none."""
    return "" if value == "" else http_url(value)


def web_origin(value: Any) -> str:
    """An origin as a browser sends it: scheme://host[:port], lower-cased."""
    if isinstance(value, str) and re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?", value):
        return value.lower()
    refuse("is not an origin", 'write scheme and host without a path: "https://www.example.com"')


def access_target(value: Any) -> str:
    """Where the access log goes."""
    if isinstance(value, str) and (value in ("stdout", "off") or value.startswith("/")):
        return value
    refuse("is not a target", 'write "stdout", "off" or an absolute path')


def named(pattern: str, what: str) -> BeforeValidator:
    """A name that fits `pattern`; `what` describes it to whoever wrote another."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            refuse("is not a usable name", f"write {what}")
        return value

    return BeforeValidator(check)


def whole(low: int, high: int, zero: str = "") -> BeforeValidator:
    """An integer within bounds; `zero` is what 0 stands for, where that is worth telling."""
    lowest = f"{low} ({zero})" if zero else f"{low}"

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            refuse("must be an integer", f"write a number from {lowest} to {high}, without quotes")
        if not low <= value <= high:
            refuse(f"{value} is out of range", f"write a number from {lowest} to {high}")
        return value

    return BeforeValidator(check)


Name = Annotated[str, named(NAME_PATTERN, "1 to 64 letters, digits, '.', '_' or '-'")]
ModelName = Annotated[str, named(r"\*|[!-~]{1,128}", '1 to 128 visible ASCII characters, or "*"')]
ModelNameOrNone = Annotated[str, named(r"[!-~]{0,128}", "up to 128 visible ASCII characters")]
Path = Annotated[str, BeforeValidator(absolute_path)]
EnvName = Annotated[str, BeforeValidator(environment_name)]
Percentile = Annotated[float, BeforeValidator(parse_percentile)]
