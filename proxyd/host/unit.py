"""The systemd unit of proxyd as it is on this machine: what it sets that a check must know.

Owns: where units and drop-ins lie and which line counts (systemd.unit(5)), the few values we read. Must not know: what
they are compared with. Reads files; nothing is asked of systemd, so it works for every user and in a chroot.
Bound: a unit is a page; FILE_BYTES are read of each file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NAME = "proxyd.service"
# systemd.unit(5), in the order in which they win; /lib is /usr/lib where /usr is merged.
FOLDERS = ("etc/systemd/system", "run/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system",
           "lib/systemd/system")  # fmt: skip
# systemd 240 and later, where neither the unit nor system.conf says otherwise: systemd-system.conf(5).
DEFAULT_OPEN_FILES = 524288
DEFAULT_STOP_S = 90.0
FILE_BYTES = 65536
_SPAN = re.compile(r"(\d+(?:\.\d+)?) *(us|ms|s|sec|seconds?|m|min|minutes?|h|hr|hours?|)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "m": 60.0, "h": 3600.0}
_SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True, slots=True)
class Unit:
    """`path`: the unit's own file; `open_files` the hard limit; `memory_bytes` 0 and `stop_s` infinity: no bound."""

    path: str
    starts: str
    user: str
    open_files: int
    stop_s: float
    memory_bytes: int

    def runs(self, config: str, default: str) -> bool:
        """Whether it starts the daemon with this configuration; `default`: the one that -c may be left off for."""
        words = self.starts.split()
        if "-c" in words[:-1]:
            return words[words.index("-c") + 1] == config
        named = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
        return config == (named[0] if named else default)


def find(root: str = "/") -> Unit | None:
    """The installed unit with its drop-ins; None where there is none, or none that may be read."""
    for folder in FOLDERS:
        path = os.path.join(root, folder, NAME)
        text = _read(path)
        if text:
            values: dict[str, str] = {}
            for part in (text, *_drop_ins(root)):
                values |= _settings(part)
            return _unit("/" + os.path.relpath(path, root), values)
    return None


def started_this(environ: Mapping[str, str], pid: int) -> bool:
    """Whether systemd itself started this process: its limits are then the unit's. systemd.exec(5), 248 and later."""
    return environ.get("SYSTEMD_EXEC_PID", "") == str(pid)


def _unit(path: str, values: Mapping[str, str]) -> Unit:
    return Unit(
        path=path,
        starts=values.get("ExecStart", ""),
        user=values.get("User", "root"),
        open_files=_limit(values.get("LimitNOFILE", "")),
        stop_s=_span(values.get("TimeoutStopSec", values.get("TimeoutSec", ""))),
        memory_bytes=_size(values.get("MemoryMax", "")),
    )


def _drop_ins(root: str) -> Iterator[str]:
    """Their texts, in the order in which they are applied: by name, whatever folder each lies in."""
    named: dict[str, str] = {}
    for folder in FOLDERS:
        place = os.path.join(root, folder, f"{NAME}.d")
        try:
            found = os.listdir(place)
        except OSError:
            continue
        for name in found:
            if name.endswith(".conf"):
                named.setdefault(name, os.path.join(place, name))
    for name in sorted(named):
        yield _read(named[name])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(FILE_BYTES)
    except OSError:
        return ""


def _settings(text: str) -> dict[str, str]:
    """The last value of each setting of [Service]."""
    found: dict[str, str] = {}
    section = ""
    for line in text.replace("\\\n", " ").splitlines():
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and line[0] not in "#;":
            name, _, value = line.partition("=")
            found[name.strip()] = value.strip()
    return found


def _limit(text: str) -> int:
    """systemd.exec(5): "131072", "1024:524288" (soft and hard), "infinity"."""
    hard = text.rpartition(":")[2]
    if hard == "infinity":
        return 1 << 30
    return int(hard) if hard.isdigit() else DEFAULT_OPEN_FILES


def _span(text: str) -> float:
    """Seconds of systemd.time(7): "150", "150s", "2min 30s", "infinity"."""
    if text == "infinity":
        return float("inf")
    parts = _SPAN.findall(text)
    if not parts:
        return DEFAULT_STOP_S
    return sum(float(number) * _SECONDS.get(unit if unit in ("us", "ms") else unit[:1], 1.0) for number, unit in parts)


def _size(text: str) -> int:
    """Bytes of MemoryMax=; a percentage, "infinity" or nothing is no number of bytes that we know."""
    match = re.fullmatch(r"(\d+)([KMGT]?)", text)
    return int(match[1]) * _SIZES[match[2]] if match else 0
