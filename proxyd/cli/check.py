"""`proxyd --check-config`, and the same look before a start: every finding about the file, its secrets and directories.
Only the command looks at the machine (check_host), into the store and, with `--probe`, at those whom the configuration
names (probe) as well: a start meets them itself (cli/serve). What would refuse a start is an error; what may be
otherwise for the user or the unit that starts it is a warning.

Owns: the order of the checks, what is printed, the exit code. Must not know: how to start anything; it reads and stats.
Exit codes: 0 no errors (warnings allowed), 1 errors, 2 the file cannot be read.
Invariant: nothing printed holds a secret's value.
"""

from __future__ import annotations

import json
import os
import ssl
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from proxyd.cli.check_found import Found, to_findings
from proxyd.cli.check_host import host_findings
from proxyd.cli.output import printable, put
from proxyd.config.load import parse, read_text
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.secrets import Secrets, key_text, resolve
from proxyd.config.sink import ca_file, has_password, is_mysql
from proxyd.errors import Finding
from proxyd.host.look import Host, look
from proxyd.store.revocations import RevocationFile, RevocationFileError
from proxyd.store.schema import StoreError
from proxyd.store.sink import sqlite_path

if TYPE_CHECKING:
    from proxyd.cli.probe import Note

OK, ERRORS, UNREADABLE = 0, 1, 2
WHO = "proxyd --check-config"
DEFAULT_FILE = "/etc/proxyd/proxyd.toml"
# StateDirectory= and RuntimeDirectory= of the unit: they exist once it starts.
_MADE_BY_SYSTEMD = ("/var/lib/proxyd", "/run/proxyd")
# The first bytes of every SQLite 3 file: sqlite.org/fileformat.html, 1.2.1. A new one is empty.
_SQLITE_MAGIC = b"SQLite format 3\0"

# Is it an error, about which option, what is wrong, what to do.
_Found = tuple[bool, KeyPath, str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What a look at a configuration gave. `config` and `secrets` are None when they may not be used; `parsed` is there
    as soon as the file itself is in order, whatever secrets or directories are like."""

    path: str
    config: Config | None
    secrets: Secrets | None
    findings: tuple[Finding, ...]
    parsed: Config | None = None

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
    return Report(path, None if failed else config, None if failed else secrets, tuple(findings), config)


def run(
    path: str,
    *,
    as_json: bool,
    probe: bool = False,
    environ: Mapping[str, str] = os.environ,
    see: Callable[[Mapping[str, str]], Host] = look,
) -> int:
    """Prints the report on stdout; returns the exit code. `see`: how the machine is looked at."""
    try:
        report = _with_surroundings(examine(path, environ), lambda: see(environ))
        report, in_order = _with_probes(report) if probe else (report, [])
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        if as_json:
            put(WHO, json.dumps({"file": path, "unreadable": message, "errors": 1, "warnings": 0, "findings": []}))
        else:
            put(WHO, f"error {path}: cannot be read: {error.strerror}; name another file with -c")
        return UNREADABLE
    if as_json:
        document = {
            "file": path,
            "errors": report.errors,
            "warnings": len(report.findings) - report.errors,
            "findings": [asdict(finding) for finding in report.findings],
        }
        if probe:
            document["in_order"] = [_in_order(report, note) for note in in_order]
        text = json.dumps(document)
    else:
        lines = [_line(**_in_order(report, note)) for note in in_order]
        lines += [finding.text() for finding in report.findings] or [f"{path}: no findings"]
        text = "\n".join(map(printable, lines))
    return put(WHO, text) or report.exit_code


def _in_order(report: Report, note: Note) -> dict[str, Any]:
    """What --probe found in order, in the shape of a finding."""
    config = report.parsed
    assert config is not None, "nothing is probed without"
    place = {"file": config.file, "line": config.line_of(*note.key), "key": key_text(note.key)}
    return {**place, "message": note.text, "name": config.name_of(*note.key)}


def _line(file: str, line: int, key: str, message: str, name: str) -> str:
    return f"ok {file}:{line} {key}{f' ({name})' if name else ''}: {message}"


def _with_probes(report: Report) -> tuple[Report, list[Note]]:
    """The report with what those say whom the file names. A file in error names nobody for certain."""
    config = report.parsed
    if config is None:
        return report, []
    # Imported where it is asked for: certificates and threads are nothing that a start needs.
    from proxyd.cli.probe import probe

    found, notes = probe(config, report.secrets)
    return _added(report, to_findings(config, found)), notes


def _with_surroundings(report: Report, see: Callable[[], Host]) -> Report:
    """The report with what does not hold a start up, or what a start judges for itself."""
    config = report.parsed
    if config is None:
        return report
    more = _findings(config, [*_store(config), *_revocations(config)])
    more += to_findings(config, host_findings(config, see(), default_file=DEFAULT_FILE))
    return _added(report, more)


def _added(report: Report, more: list[Finding]) -> Report:
    return replace(report, findings=tuple(sorted([*report.findings, *more], key=lambda one: (one.line, one.key))))


def _store(config: Config) -> Iterator[_Found]:
    """A daemon would start beside such a file, and its rows would wait in the spool for another."""
    key: KeyPath = ("telemetry", "sink")
    if is_mysql(config.telemetry.sink):
        yield from _certificate(key, ca_file(config.telemetry.sink))
        return
    try:
        path = sqlite_path(config.telemetry.sink)
        if path.is_dir():
            yield True, key, f"{path} is a directory", "name a file in it"
            return
        with path.open("rb") as file:
            head = file.read(len(_SQLITE_MAGIC))
    except (OSError, StoreError):
        return  # not there yet, or another user's
    if head and head != _SQLITE_MAGIC:
        yield True, key, f"{path} is not an SQLite database", "name another file, or move this one away"


def _revocations(config: Config) -> Iterator[_Found]:
    """A start refuses without them; a reload does not look."""
    try:
        RevocationFile(config.server.state_dir).check(time.time())
    except RevocationFileError as error:
        message, _, remedy = str(error).partition("; ")
        yield True, ("server", "state_dir"), f"{message}; a start is refused", remedy


def _host_findings(config: Config) -> list[Finding]:
    """What the paths in the configuration are, on this machine."""
    found = [*_directories(config), *_access_log(config), *_certificates(config), *_unix_sockets(config)]
    found += _password_in_the_file(config)
    return _findings(config, found)


def _findings(config: Config, found: Iterable[_Found]) -> list[Finding]:
    return to_findings(config, (Found(*one) for one in found))


def _directories(config: Config) -> Iterator[_Found]:
    server = config.server
    yield from _directory(("server", "state_dir"), server.state_dir, 0o700, is_needed=True, is_made=True)
    if os.path.isdir(server.state_dir):
        mode = stat.S_IMODE(os.stat(server.state_dir).st_mode)
        if mode & 0o007:
            message = f"{server.state_dir} is open to every user (mode {mode:04o})"
            yield False, ("server", "state_dir"), message, f"chmod 0700 {server.state_dir}"
        spool = os.path.join(server.state_dir, "spool")
        if os.path.exists(spool) and not os.path.isdir(spool):
            yield True, ("server", "state_dir"), f"{spool} is not a directory", "move that file away"
    addresses = (*server.listen, server.admin)
    is_needed = any(os.path.dirname(one.path) == server.runtime_dir for one in addresses if one.path)
    yield from _directory(("server", "runtime_dir"), server.runtime_dir, 0o750, is_needed=is_needed, is_made=True)
    sink = config.telemetry.sink
    if sink.startswith("sqlite:///"):
        parent = os.path.dirname(sink.removeprefix("sqlite:///")) or "."
        if parent != server.state_dir:
            yield from _directory(("telemetry", "sink"), parent, 0o700, is_needed=False, is_made=True)


def _directory(key: KeyPath, path: str, mode: int, *, is_needed: bool, is_made: bool = False) -> Iterator[_Found]:
    """`is_needed`: without it the daemon does not start. `is_made`: a start makes it where it may."""
    make = f"install -d -m {mode:04o} {path}, for the user that runs proxyd"
    if os.path.isdir(path):
        if not os.access(path, os.W_OK | os.X_OK):
            yield False, key, f"{path} cannot be written by this user (uid {os.geteuid()})", _to_be_written(path)
    elif os.path.lexists(path):
        yield is_needed, key, f"{path} is not a directory", "name a directory"
    elif path in _MADE_BY_SYSTEMD:
        yield False, key, f"{path} does not exist", f"systemd makes it when the unit starts; without systemd: {make}"
    elif is_made and _may_make(path):
        yield False, key, f"{path} does not exist", "a start makes it, for the user that runs proxyd"
    else:
        yield is_needed, key, f"{path} does not exist", make


def _to_be_written(path: str) -> str:
    if os.statvfs(path).f_flag & os.ST_RDONLY:  # so ProtectSystem=strict shows everything but the unit's directories
        return f"it is mounted read-only; in the unit: systemctl edit proxyd: [Service] ReadWritePaths={path}"
    return "check as the daemon's user, whose it must be"


def _may_make(path: str) -> bool:
    """Whether this user could make it: the nearest folder above it that exists may be written."""
    above = os.path.dirname(os.path.abspath(path))
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    return os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)


def _access_log(config: Config) -> Iterator[_Found]:
    path = config.log.access
    if path in ("stdout", "off"):
        return
    key: KeyPath = ("log", "access")
    if os.path.isdir(path):
        yield True, key, f"{path} is a directory", "name a file in it"
        return
    yield from _directory(key, os.path.dirname(path), 0o750, is_needed=True)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        yield False, key, f"{path} cannot be written by this user (uid {os.geteuid()})", _to_be_written(path)


def _certificates(config: Config) -> Iterator[_Found]:
    for index, upstream in enumerate(config.upstream):
        yield from _certificate(("upstream", index, "ca_file"), upstream.ca_file)


def _certificate(key: KeyPath, path: str) -> Iterator[_Found]:
    """`path`: "" for none."""
    try:
        if path:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        yield True, key, f"{path} holds no certificate in PEM", "name a file of CERTIFICATE blocks"
    except OSError as error:
        yield True, key, f"cannot read {path}: {error.strerror}", "correct the path or its permissions"


def _password_in_the_file(config: Config) -> Iterator[_Found]:
    """The group may read the file: root:proxyd 0640 is how a daemon that is not root is given one."""
    if not has_password(config.telemetry.sink):
        return
    try:
        mode = stat.S_IMODE(os.stat(config.file).st_mode)
    except OSError:
        return
    if mode & stat.S_IROTH:
        message = f"holds a password (not shown), and every user may read {config.file} (mode {mode:04o})"
        yield False, ("telemetry", "sink"), message, "put the password into a file and name it: telemetry.password_file"


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
            yield from _directory(key, os.path.dirname(path), 0o750, is_needed=True)
        if os.path.isdir(path):
            yield True, key, f"{path} is a directory", "name a path inside it"
        elif os.path.exists(path) and not stat.S_ISSOCK(os.stat(path).st_mode):
            yield True, key, f"{path} is there and is not a socket", "name another path, or move that file away"
