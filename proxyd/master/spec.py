"""What a master is given: what lives as long as the node, and what one generation of workers is made of.

Owns the seam between the rooms `master` and `cli`. Must not know HTTP, configurations or files: whoever makes the
workers knows them, and the master asks it for the next generation (Renewal).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from proxyd.host.child import Birth, ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.host.systemd import Notifier
from proxyd.log import Log
from proxyd.master.handover import Handed
from proxyd.master.slots import BEAT_TIMEOUT_S, BOOT_TIMEOUT_S
from proxyd.shm.region import Region


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One generation, made from one configuration. `log` is how the master writes while it serves."""

    listeners: Listeners
    workers: int
    run_worker: Callable[[Birth], int]
    telemetry: ChildSpec | None
    drain_timeout_s: float
    log: Log


class Refused(Exception):
    """A reload or upgrade that cannot be. `detail` is one line with the remedy, `findings` are lines for people."""

    def __init__(self, detail: str, findings: Sequence[str] = ()) -> None:
        super().__init__(detail)
        self.detail = detail
        self.findings = tuple(findings)


@dataclass(frozen=True, slots=True)
class Program:
    """What was started, as it can be started again. `path` is absolute and not resolved: a link may lead to a newer
    one by now. `environ`: without what the service manager's notifier took."""

    path: str
    argv: tuple[str, ...]
    environ: dict[str, str]


class Renewal(Protocol):
    """Where the next generation comes from. Made by the command line."""

    @property
    def program(self) -> Program: ...

    def examine(self) -> tuple[bool, list[str]]:
        """In a child of the master: whether the configuration may be used, and lines for people. No secrets."""
        ...

    def plan(self, listeners: Listeners, log: Log) -> GenerationSpec:
        """In the master: the next generation, on `listeners` renewed. Raises Refused; nothing was made then. `log` is
        the one in use, and is in the plan again unless the configuration wants another."""
        ...

    def hand_over(self, log: Log) -> dict[str, Any]:
        """What its successor in another image of the program needs: plain JSON. "fds": all descriptors in it;
        "memory": those that the check of the new program looks into."""
        ...


@dataclass(frozen=True, slots=True)
class MasterSpec:
    """Everything a master needs, made by the command line. `region` has a seat per worker, one for telemetry and one
    for the master. `on_worker_gone`: a seat whose worker is reaped, not yet replaced. Without `renewal` a HUP or
    USR2 only logs `no_renewal`. `handed`: what the image before this one left; `first` then stands for the generation
    that serves, for as long as it does. `stored`: names under which the service manager gave
    descriptors. `version`: of the program that runs here."""

    region: Region
    first: GenerationSpec
    extra_children: tuple[ChildSpec, ...] = ()
    beat_timeout_s: float = BEAT_TIMEOUT_S
    telemetry_timeout_s: float = 60.0  # a commit on a slow disk may hold its loop; killing it then helps nobody
    check_timeout_s: float = 30.0  # a check takes a second, on a busy machine five; an operator waits for it
    boot_timeout_s: float = BOOT_TIMEOUT_S  # of a generation that a reload begins
    notifier: Notifier = field(default_factory=lambda: Notifier({}))
    stored: tuple[str, ...] = ()
    on_ready: Callable[[], None] = lambda: None
    on_worker_gone: Callable[[int], None] = lambda seat: None
    renewal: Renewal | None = None
    handed: Handed | None = None
    no_renewal: str = "there is no configuration file to read again"
    version: str = ""
