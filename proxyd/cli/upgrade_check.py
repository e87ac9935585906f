"""`proxyd --check-upgrade`: run by a master that was sent USR2, as the program that it would become.

Owns: importing all that the daemon runs, the look at the file, the look at the state that would be taken over, and a
worker's boot apart from it all (trial.py). Must not know how to start a node. Prints findings on stdout.
Exit codes: 0 this program can go on from there, 1 it cannot and the lines say why. Anything else (a crash at an import,
a signal, silence) tells the master the same.
"""

from __future__ import annotations

import argparse
import os

from proxyd import __version__
from proxyd.cli import adopt, check, serve
from proxyd.cli.output import fail, put
from proxyd.cli.renewal import refusals
from proxyd.cli.trial import boot_a_worker
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets
from proxyd.master import handover
from proxyd.master.succession import verify
from proxyd.shm.ledger import Ledger
from proxyd.shm.region import Region
from proxyd.store.sink import load

WHO = "proxyd --check-upgrade"
# Importing them is the check: they hold everything that an upgraded master runs.
_NEEDED = (adopt, serve)


def run(args: argparse.Namespace) -> int:
    """Looks; returns the exit code."""
    environ = dict(os.environ)
    lines: list[str] = []
    fixed, permits = {}, 0
    try:
        fd = handover.take(environ)
        if fd is None:
            return fail(WHO, 2, "only a running daemon asks for this check: send USR2 to it, or: proxyd upgrade")
        handed = handover.read(fd)
        verify(handed)
        Region.adopt(handed.node["region"])
        permits = Ledger.adopt(handed.node["ledger"]).permits
        fixed = handed.node["fixed"]
    except (handover.HandoverError, ValueError) as error:
        lines.append(f"error: version {__version__} cannot take over: {error}")
    except (KeyError, TypeError, OSError) as error:
        lines.append(f"error: version {__version__} cannot take over: the state lacks {error}")
    try:
        report = check.examine(args.config, environ)
    except OSError as error:
        lines.append(f"error {args.config}: cannot be read: {error.strerror}")
    else:
        lines += [finding.text() for finding in report.findings if finding.severity == "error"]
        if report.config is not None and not lines:
            lines += refusals(report.config, fixed, permits)
            load(report.config.telemetry.sink)  # telemetry would import it too late for a refusal
        if report.config is not None and report.secrets is not None and not lines:
            lines += _try(report.config, report.secrets)
    put(WHO, "\n".join(lines) or f"version {__version__} {handover.YES}")
    return 1 if lines else 0


def _try(config: Config, secrets: Secrets) -> list[str]:
    try:
        code = boot_a_worker(config, secrets)
    except OSError as error:
        return [f"error: a worker of version {__version__} cannot be tried: {error.strerror}"]
    if code:
        return [f"error: a worker of version {__version__} cannot boot with this file (exit code {code})"]
    return []
