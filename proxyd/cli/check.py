"""`proxyd --check-config`, and the same look before a start: every finding about the file, its secrets and directories.
Only the command looks at the limit of open files as well: a start raises and judges it for itself (cli/serve).

Owns: the order of the checks, what is printed, the exit code. Must not know: how to start anything; it reads and stats.
Exit codes: 0 no errors (warnings allowed), 1 errors, 2 the file cannot be read.
Invariant: nothing printed holds a secret's value.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

from proxyd.cli.output import put
from proxyd.config.load import parse, read_text
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets, key_text, resolve
from proxyd.errors import Finding
from proxyd.host import limits

OK, ERRORS, UNREADABLE = 0, 1, 2
WHO = "proxyd --check-config"


@dataclass(frozen=True, slots=True)
class Report:
    """What a look at a configuration gave. `config` and `secrets` are None when they may not be used."""

    path: str
    config: Config | None
    secrets: Secrets | None
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> int:
        """How many findings forbid a start."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """What --check-config exits with."""
        return ERRORS if self.errors else OK


def examine(path: str, environ: Mapping[str, str]) -> Report:
    """Reads and checks what a start would need; starts nothing. Raises OSError when the file is unreadable."""
    config, findings = parse(read_text(path), path, environ)
    if config is None:
        return Report(path, None, None, tuple(findings))
    secrets, more = resolve(config, environ)
    findings += more
    findings += _host_findings(config)
    findings.sort(key=lambda finding: (finding.line, finding.key))
    failed = any(finding.severity == "error" for finding in findings)
    return Report(path, None if failed else config, None if failed else secrets, tuple(findings))


def run(path: str, *, as_json: bool, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the report on stdout; returns the exit code."""
    try:
        report = _with_open_files(examine(path, environ))
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        if as_json:
            put(WHO, json.dumps({"file": path, "unreadable": message, "errors": 1, "warnings": 0, "findings": []}))
        else:
            put(WHO, f"error {path}: cannot be read: {error.strerror}; name another file with -c")
        return UNREADABLE
    if as_json:
        text = json.dumps(
            {
                "file": path,
                "errors": report.errors,
                "warnings": len(report.findings) - report.errors,
                "findings": [asdict(finding) for finding in report.findings],
            }
        )
    else:
        text = "\n".join(finding.text() for finding in report.findings) or f"{path}: no findings"
    return put(WHO, text) or report.exit_code


def _with_open_files(report: Report) -> Report:
    """The report with a warning when the connections of the file do not fit the limit. No error: the service may have
    another limit than the shell in which this runs."""
    config = report.config
    if config is None:
        return report
    files = limits.decide(sum(one.max_connections for one in config.upstream), limits.allowed_open_files())
    if not files.problem:
        return report
    key: KeyPath = ("upstream", 0, "max_connections")
    message = f"{files.problem} (the limit of this process; the service may have another)"
    finding = Finding("warning", config.file, config.line_of(*key), key_text(key), message, files.remedy)
    found = sorted([*report.findings, finding], key=lambda one: (one.line, one.key))
    return replace(report, findings=tuple(found))


def _host_findings(config: Config) -> list[Finding]:
    """What the paths in the configuration are, on this machine."""
    found = [*_directories(config), *_access_log(config), *_certificates(config), *_unix_sockets(config)]
    return [
        Finding("error" if is_error else "warning", config.file, config.line_of(*key), key_text(key), message, remedy)
        for is_error, key, message, remedy in found
    ]


_Found = tuple[bool, KeyPath, str, str]


def _directories(config: Config) -> Iterator[_Found]:
    for name in ("state_dir", "runtime_dir"):
        path = getattr(config.server, name)
        key: KeyPath = ("server", name)
        yield from _directory(key, path, f"install -d -m 0750 {path}, or let systemd make it")
    sink = config.telemetry.sink
    if sink.startswith("sqlite:///"):
        parent = os.path.dirname(sink.removeprefix("sqlite:///")) or "."
        if parent != config.server.state_dir:
            yield from _directory(("telemetry", "sink"), parent, f"install -d -m 0750 {parent}")


def _directory(key: KeyPath, path: str, remedy: str) -> Iterator[_Found]:
    if not os.path.isdir(path):
        what = "is not a directory" if os.path.exists(path) else "does not exist"
        yield False, key, f"{path} {what}", remedy
    elif not os.access(path, os.W_OK | os.X_OK):
        yield False, key, f"{path} cannot be written by this user (uid {os.geteuid()})", "check as the daemon's user"


def _access_log(config: Config) -> Iterator[_Found]:
    path = config.log.access
    if path in ("stdout", "off"):
        return
    key: KeyPath = ("log", "access")
    if os.path.isdir(path):
        yield True, key, f"{path} is a directory", "name a file in it"
        return
    yield from _directory(key, os.path.dirname(path), "create it")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        yield False, key, f"{path} cannot be written by this user (uid {os.geteuid()})", "check as the daemon's user"


def _certificates(config: Config) -> Iterator[_Found]:
    for index, upstream in enumerate(config.upstream):
        if not upstream.ca_file:
            continue
        key: KeyPath = ("upstream", index, "ca_file")
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=upstream.ca_file)
        except ssl.SSLError:
            yield True, key, f"{upstream.ca_file} holds no certificate in PEM", "name a file of CERTIFICATE blocks"
        except OSError as error:
            yield True, key, f"cannot read {upstream.ca_file}: {error.strerror}", "correct the path or its permissions"


def _unix_sockets(config: Config) -> Iterator[_Found]:
    server = config.server
    places: list[tuple[KeyPath, str]] = [
        (("server", "listen", index), listen.path) for index, listen in enumerate(server.listen)
    ]
    places.append((("server", "admin"), server.admin.path))
    for key, path in places:
        if not path:
            continue
        if os.path.dirname(path) != server.runtime_dir:
            yield from _directory(key, os.path.dirname(path), f"create {os.path.dirname(path)}")
        if os.path.isdir(path):
            yield True, key, f"{path} is a directory", "name a path inside it"
