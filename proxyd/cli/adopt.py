"""The new image after an upgrade: takes over what the one before it left, and the master goes on.

Owns: mapping it again, and what stands for the generation that serves until ours does. Must not know execve. The check
(cli/upgrade_check.py) has read the same state in this program a moment ago; what is refused here ends the daemon, so
everything that could be wrong with the file is left to the renewal, whose failures leave the old workers serving.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from proxyd import __version__
from proxyd.cli import check
from proxyd.cli.node import Node
from proxyd.cli.output import fail
from proxyd.cli.renewal import FileRenewal
from proxyd.config.schema import LogOptions
from proxyd.host import limits
from proxyd.host.child import EXIT_CANNOT_BOOT, Birth, ChildSpec
from proxyd.host.sockets import Listeners
from proxyd.host.systemd import Notifier
from proxyd.log import Log
from proxyd.master.handover import Handed, HandoverError
from proxyd.master.main import Master
from proxyd.master.spec import GenerationSpec, MasterSpec, Program


def run(
    handed: Handed,
    path: str,
    environ: MutableMapping[str, str],
    find_program: Callable[[Mapping[str, str]], Program],
) -> int:
    """Serves on until a signal ends it; returns the exit code."""
    notifier = Notifier(environ)
    notifier.watchdog()  # the first sign of life since execve: the imports before it may take seconds on a busy machine
    own = dict(environ)
    for fd in handed.fds:
        os.set_inheritable(fd, False)
    limits.raise_open_files()
    try:
        node = Node.adopt(handed.node)
        listeners = Listeners.from_state(handed.listeners)
        fixed = handed.node["fixed"]
        log, options = _make_log(handed.node["log"])
    except (HandoverError, ValueError, KeyError, TypeError, OSError) as error:
        return fail("proxyd", 1, f"cannot go on from the program before: {type(error).__name__}: {error}")
    renewal = FileRenewal(node, path, own, find_program(own), fixed, log, options)
    spec = MasterSpec(
        region=node.region,
        first=_stand_in(node, path, own, listeners, log),
        notifier=notifier,
        on_worker_gone=lambda seat: node.reclaim(seat, log),
        renewal=renewal,
        handed=handed,
        version=__version__,
    )
    return Master(spec, log).run()


def _make_log(options: dict[str, Any]) -> tuple[Log, LogOptions]:
    """By path: the descriptor of the one before is not inherited."""
    wanted = LogOptions.model_validate(options)
    try:
        return Log(level=wanted.level, format=wanted.format, access=wanted.access, process="master"), wanted
    except OSError as error:
        log = Log(level=wanted.level, format=wanted.format, access="off", process="master")
        log.error("log_reopen_failed", detail=f"{wanted.access}: {error.strerror}")
        return log, LogOptions(access="off", format=wanted.format, level=wanted.level)


def _stand_in(
    node: Node, path: str, environ: Mapping[str, str], listeners: Listeners, log: Log
) -> GenerationSpec:
    """The generation that serves was made by another program, and its configuration was in that one's memory. A
    worker of it that dies before ours serve has a successor of this program's, from the file as it is then."""

    def make() -> GenerationSpec | None:
        try:
            report = check.examine(path, environ)
        except OSError as error:
            log.error("cannot_boot", detail=f"{path} cannot be read: {error.strerror}")
            return None
        if report.config is None or report.secrets is None:
            log.error("cannot_boot", detail=f"{path} has errors; proxyd --check-config tells")
            return None
        return node.generation(report.config, report.secrets, listeners, log)

    def worker(birth: Birth) -> int:
        made = make()
        return EXIT_CANNOT_BOOT if made is None else made.run_worker(birth)

    def telemetry(birth: Birth) -> int:
        made = make()
        return EXIT_CANNOT_BOOT if made is None or made.telemetry is None else made.telemetry.run(birth)

    # Workers and time to drain are the adopted generation's own, and the master has them from its state.
    return GenerationSpec(listeners, 0, worker, ChildSpec("telemetry", telemetry), 0.0, log)
