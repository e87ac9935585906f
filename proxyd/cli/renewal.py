"""The next generation, out of the file that the daemon was started with: what the master asks for at HUP and USR2.

Owns: what is examined, what may not differ, which log is used, what the next image is told, which program was started.
Must not know processes, signals or steps (master/reload.py has them). Implements master.spec.Renewal.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import Any

from proxyd.cli import check
from proxyd.cli.fixed import differences
from proxyd.cli.listen_remedy import listen_remedy
from proxyd.cli.node import Node
from proxyd.config.schema import Config, LogOptions
from proxyd.host import limits
from proxyd.host.sockets import ListenError, Listeners
from proxyd.log import Log
from proxyd.master.spec import GenerationSpec, Program, Refused

RESTART_REMEDY = "put it back, or: systemctl restart proxyd"


class FileRenewal:
    """`fixed`: what cli.fixed told at the node's start. `log`: in use, and made from `log_options`."""

    def __init__(
        self,
        node: Node,
        path: str,
        environ: Mapping[str, str],
        program: Program,
        fixed: Mapping[str, Any],
        log: Log,
        log_options: LogOptions,
    ) -> None:
        self._node, self._path, self._environ = node, path, environ
        self._program = program
        self._fixed = dict(fixed)
        self._logs = [(log, log_options)]

    @property
    def program(self) -> Program:
        return self._program

    def examine(self) -> tuple[bool, list[str]]:
        try:
            report = check.examine(self._path, self._environ)
        except OSError as error:
            return False, [f"error {self._path}: {self._unreadable(error)}"]
        lines = [finding.text() for finding in report.findings]
        if report.config is None:
            return False, lines
        more = refusals(report.config, self._fixed, self._node.ledger.permits)
        return not more, [*more, *lines]

    def _unreadable(self, error: OSError) -> str:
        remedy = "put it back"
        if error.errno == errno.EACCES:
            remedy = f"the daemon reads it as its own user (uid {os.geteuid()}): chmod 0644 {self._path}"
        return f"cannot be read: {error.strerror}; {remedy}"

    def plan(self, listeners: Listeners, log: Log) -> GenerationSpec:
        try:
            report = check.examine(self._path, self._environ)
        except OSError as error:
            raise Refused(f"{self._path} {self._unreadable(error)}") from error
        config, secrets = report.config, report.secrets
        if config is None or secrets is None:
            raise Refused(
                f"{self._path} has errors; nothing was changed", [finding.text() for finding in report.findings]
            )
        more = refusals(config, self._fixed, self._node.ledger.permits)
        if more:
            raise Refused(f"{self._path} has errors; nothing was changed", more)
        try:
            new = listeners.renewed(config.server.listen, config.server.workers, config.server.backlog)
        except ListenError as error:
            raise Refused(f"{error.strerror}; {listen_remedy(error, config)}; nothing was changed") from error
        try:
            log = self._log_for(config.log, log)
        except OSError as error:
            new.release(listeners)
            why = f"log.access: cannot open {config.log.access}: {error.strerror}"
            raise Refused(f"{why}; nothing was changed") from error
        return self._node.generation(config, secrets, new, log)

    def hand_over(self, log: Log) -> dict[str, Any]:
        options = next(options for made, options in self._logs if made is log)
        words = {"level": options.level, "format": options.format, "access": options.access}
        return self._node.hand_over() | {"fixed": self._fixed, "log": words}

    def _log_for(self, options: LogOptions, log: Log) -> Log:
        """The log in use where it is as the options want it."""
        self._logs = [(made, wanted) for made, wanted in self._logs if made is log]
        if self._logs and self._logs[0][1] == options:
            return log
        new = Log(level=options.level, format=options.format, access=options.access, process="master")
        self._logs.append((new, options))
        return new


def refusals(config: Config, fixed: Mapping[str, Any], permits: int) -> list[str]:
    """Why a node that runs cannot go on with a configuration that a new one could start with."""
    lines = [f"{line}; {RESTART_REMEDY}" for line in differences(fixed, config)]
    if config.limits.most_streams > permits:
        lines.append(
            f"error {config.file}:{config.line_of('limits')} limits.concurrent_streams: {config.limits.most_streams} "
            f"is more than the {permits} that the running daemon has room for; lower it, or: systemctl restart proxyd"
        )
    files = limits.decide(sum(upstream.max_connections for upstream in config.upstream), limits.allowed_open_files())
    if not files.is_enough:
        lines.append(f"error {config.file}:{config.line_of('upstream')} {files.problem}; {files.remedy}")
    return lines


def find_program(
    argv: Sequence[str], orig_argv: Sequence[str], executable: str, cwd: str, environ: Mapping[str, str]
) -> Program:
    """What was started, to be started again: a script by its own path, with whatever interpreter it names by then;
    `python -m proxyd` by the interpreter's. Links are kept, for an upgrade may turn them."""
    script = os.path.join(cwd, argv[0])
    if len(orig_argv) > 1 and orig_argv[1] == argv[0] and os.path.isfile(script) and os.access(script, os.X_OK):
        return Program(script, (script, *argv[1:]), dict(environ))
    path = os.path.join(cwd, executable)
    return Program(path, (path, *orig_argv[1:]), dict(environ))
