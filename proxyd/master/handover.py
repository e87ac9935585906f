"""What one image of the master leaves to the next over execve: a JSON document in a memfd, named by PROXYD_ADOPT.

Owns the document's shape and its reading. Must not know what the descriptors are for, nor the node's part of it, which
is `cli`'s. Process ids, children and descriptors stay over an execve, and CLOCK_MONOTONIC goes on; nothing else does.

Invariants: a document of another format is refused before anything is touched (the check of an upgrade reads it in the
new program); keys that this program does not know are passed over, so a later one may add some. Bound: STATE_MAX bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

ENV = "PROXYD_ADOPT"
FORMAT = 1
YES = "can go on from the daemon that runs"  # what the check of a new program says: another program exits with 0, too
STATE_MAX = 4 * 1024 * 1024
T = TypeVar("T")


class HandoverError(ValueError):
    """A document that this program cannot go on from."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """A slot as slots.Slot has it; `pid` 0 for one without a child. Times are monotonic."""

    number: int
    seat: int
    phase: str
    pid: int
    born_at: float
    due_at: float | None
    failures: int
    exit_code: int | None
    is_ready: bool
    was_ready: bool


@dataclass(frozen=True, slots=True)
class GenerationState:
    number: int
    stage: str
    version: str
    since: float
    ends_at: float | None
    drain_timeout_s: float
    slots: tuple[SlotState, ...]


@dataclass(frozen=True, slots=True)
class Handed:
    """All of it. `signals`: that came too late for the image before. `node`: cli's own. `listeners`: those of the
    generation that serves, as host.sockets tells them."""

    pid: int
    version: str
    lifelines: tuple[int, ...]
    news: int
    last_number: int
    generations: tuple[GenerationState, ...]
    telemetry: SlotState | None
    telemetry_succeeds: bool
    renewals: int
    began_at: float
    wanted: tuple[str, ...]
    last: dict[str, Any] | None
    keeps_listeners: bool
    signals: tuple[int, ...]
    listeners: dict[str, Any]
    node: dict[str, Any]
    fds: tuple[int, ...] = field(default=())

    def document(self) -> dict[str, Any]:
        return {"format": FORMAT} | {name: _plain(getattr(self, name)) for name in self.__slots__}


def _plain(value: Any) -> Any:
    if isinstance(value, SlotState | GenerationState):
        return {name: _plain(getattr(value, name)) for name in value.__slots__}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def write(document: dict[str, Any]) -> int:
    """The memfd that holds it, close-on-exec. Raises OSError."""
    fd = os.memfd_create("proxyd-state", os.MFD_CLOEXEC)
    try:
        data = json.dumps(document).encode()
        os.truncate(fd, len(data))
        os.pwrite(fd, data, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def take(environ: MutableMapping[str, str]) -> int | None:
    """The descriptor that the variable names, which is removed; None without one. Raises HandoverError."""
    text = environ.pop(ENV, None)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise HandoverError(f"{ENV} is no descriptor")
    return int(text)


def read(fd: int) -> Handed:
    """Closes `fd`. Raises HandoverError."""
    try:
        size = os.fstat(fd).st_size
        data = os.pread(fd, STATE_MAX, 0) if size <= STATE_MAX else b""
        os.close(fd)
    except OSError as error:
        raise HandoverError(f"the state cannot be read: {error.strerror}") from error
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise HandoverError(f"the state ({size} bytes) is no JSON document") from None
    return parse(document)


def parse(document: Any) -> Handed:
    """Raises HandoverError, and names what is wrong."""
    source = _Reader("the state", document)
    form = source.get("format", int)
    if form != FORMAT:
        raise HandoverError(f"the state has format {form}, this program reads {FORMAT}: restart instead")
    telemetry = source.maybe("telemetry", dict)
    return Handed(
        pid=source.get("pid", int),
        version=source.get("version", str),
        lifelines=source.numbers("lifelines", 4),
        news=source.get("news", int),
        last_number=source.get("last_number", int),
        generations=tuple(_generation(one) for one in source.get("generations", list)),
        telemetry=None if telemetry is None else _slot(telemetry),
        telemetry_succeeds=source.get("telemetry_succeeds", bool),
        renewals=source.get("renewals", int),
        began_at=source.number("began_at"),
        wanted=source.words("wanted"),
        last=source.maybe("last", dict),
        keeps_listeners=source.get("keeps_listeners", bool),
        signals=source.numbers("signals"),
        listeners=source.get("listeners", dict),
        node=source.get("node", dict),
        fds=source.numbers("fds"),
    )


def _generation(value: Any) -> GenerationState:
    source = _Reader("a generation", value)
    return GenerationState(
        number=source.get("number", int),
        stage=source.get("stage", str),
        version=source.get("version", str),
        since=source.number("since"),
        ends_at=source.maybe_number("ends_at"),
        drain_timeout_s=source.number("drain_timeout_s"),
        slots=tuple(_slot(one) for one in source.get("slots", list)),
    )


def _slot(value: Any) -> SlotState:
    source = _Reader("a slot", value)
    return SlotState(
        number=source.get("number", int),
        seat=source.get("seat", int),
        phase=source.get("phase", str),
        pid=source.get("pid", int),
        born_at=source.number("born_at"),
        due_at=source.maybe_number("due_at"),
        failures=source.get("failures", int),
        exit_code=source.maybe("exit_code", int),
        is_ready=source.get("is_ready", bool),
        was_ready=source.get("was_ready", bool),
    )


class _Reader:
    """Typed looks into a JSON object."""

    __slots__ = ("_name", "_values")

    def __init__(self, name: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise HandoverError(f"{name} is no object")
        self._name, self._values = name, values

    def get(self, key: str, kind: type[T]) -> T:
        value = self._values.get(key)
        if type(value) is not kind:
            raise HandoverError(f"{self._name}: {key} is {'missing' if value is None else 'of another kind'}")
        return value

    def maybe(self, key: str, kind: type[T]) -> T | None:
        return None if self._values.get(key) is None else self.get(key, kind)

    def number(self, key: str) -> float:
        return float(self.get(key, int)) if type(self._values.get(key)) is int else self.get(key, float)

    def maybe_number(self, key: str) -> float | None:
        return None if self._values.get(key) is None else self.number(key)

    def words(self, key: str) -> tuple[str, ...]:
        values = self.get(key, list)
        if any(type(one) is not str for one in values):
            raise HandoverError(f"{self._name}: {key} is of another kind")
        return tuple(values)

    def numbers(self, key: str, count: int | None = None) -> tuple[int, ...]:
        values = self.get(key, list)
        if any(type(one) is not int for one in values) or count not in (None, len(values)):
            raise HandoverError(f"{self._name}: {key} is of another kind")
        return tuple(values)
