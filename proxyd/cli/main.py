"""argv to action: the one place that knows which commands there are.

Owns: the arguments, `--version`, which module runs a command. Must not know: how a command works. A command's module
is imported when it is asked for: `proxyd --version` needs no event loop and `proxyd status` no JWT library.
Exit codes: 0 done, 1 the configuration has errors (or the command failed), 2 the arguments or the file cannot be read.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from proxyd import __version__
from proxyd.cli.output import fail, put
from proxyd.config.units import UnitError, parse_duration

if TYPE_CHECKING:
    from proxyd.master.spec import Program

DEFAULT_FILE = "/etc/proxyd/proxyd.toml"
# Commands that share a module; every other one has its own name's.
_MODULES = {"reload": "renew", "upgrade": "renew"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the process's exit code."""
    parser = _parser()
    args = parser.parse_args(argv, argparse.Namespace(config=None))
    _refuse_strays(parser, args)
    if args.config is None:
        args.config = DEFAULT_FILE
    if args.version:
        return put("proxyd", version_text())
    if args.command is not None:
        return _command(f"proxyd.cli.{_MODULES.get(args.command, args.command)}")(args)
    if args.demo:
        return _command("proxyd.cli.demo")(args)
    if args.check_config:
        return _check(args)
    if args.check_upgrade:
        return _command("proxyd.cli.upgrade_check")(args)
    code = _go_on(args) if "PROXYD_ADOPT" in os.environ else None
    return _serve(args.config, os.environ) if code is None else code


def version_text() -> str:
    """One line: proxyd and what it stands on."""
    return (
        f"proxyd {__version__} (uvloop {_version('uvloop')}, aiohttp {_version('aiohttp')}, "
        f"{ssl.OPENSSL_VERSION}, Python {platform.python_version()})"
    )


def _version(package: str) -> str:
    """A package's version without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _parser() -> argparse.ArgumentParser:
    file = argparse.ArgumentParser(add_help=False)
    # SUPPRESS: a command's own parser must not put the default over a -c that stood before the command.
    file.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help=f"default: {DEFAULT_FILE}")

    parser = argparse.ArgumentParser(
        prog="proxyd",
        description="A streaming proxy daemon for language-model APIs. Without a command it runs in the foreground.",
        parents=[file],
    )
    parser.add_argument("--version", action="store_true", help="print the versions of proxyd and what it stands on")
    parser.add_argument("--demo", action="store_true", help="run without a file, a key or a server, with a chat page")
    parser.add_argument("--port", type=_port, metavar="N", help="with --demo: the page's port")
    parser.add_argument("--check-config", action="store_true", help="check the file, its secrets, the machine")
    parser.add_argument("--json", action="store_true", help="with --check-config: print JSON")
    parser.add_argument("--probe", action="store_true", help="with --check-config: ask upstreams and the store")

    # What a running master asks of the program that it would become (master/upgrade.py).
    parser.add_argument("--check-upgrade", action="store_true", help=argparse.SUPPRESS)

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    status = commands.add_parser("status", parents=[file], help="the state of the running daemon")
    status.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")

    top = commands.add_parser("top", parents=[file], help="the same, live; q ends it")
    top.add_argument("--interval", type=_interval, default="2s", metavar="D", help="of the looks; default: %(default)s")
    top.add_argument("--count", type=_looks, metavar="N", help="end after so many looks; default: never")

    commands.add_parser("reload", parents=[file], help="have the running daemon read its file again; waits for that")
    commands.add_parser(
        "upgrade", parents=[file], help="have the running daemon become the installed program; waits for that"
    )

    token = commands.add_parser("token", parents=[file], help="mint a session token with the configured secret")
    token.add_argument("--user", type=_count, required=True, metavar="ID", help="the user's number: the claim sub")
    token.add_argument("--tenant", default="default", metavar="T", help="default: %(default)s")
    token.add_argument("--quota", type=_count, metavar="N", help="tokens it may spend; default: no limit")
    token.add_argument("--ttl", type=_duration, default="1h", metavar="D", help="lifetime; default: %(default)s")

    usage = commands.add_parser("usage", parents=[file], help="token totals out of the telemetry store")
    usage.add_argument("--user", type=_count, metavar="ID", help="of a user: the user's number")
    usage.add_argument("--tenant", metavar="T", help="of a tenant")
    usage.add_argument("--model", metavar="M", help="of a model: its name in the file, or its id")
    usage.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    when = usage.add_mutually_exclusive_group()
    when.add_argument("--window", type=_duration, default="24h", metavar="D", help="default: %(default)s")
    when.add_argument("--since", type=_moment, metavar="TIME", help="such as 2026-01-31 or 2026-01-31T12:00+01:00")

    spool = commands.add_parser("spool", parents=[file], help="what waits in the spool, and what the store refused")
    spool.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    spool.add_argument("--retry", action="store_true", help="give the refused rows to the store once more")

    schema = commands.add_parser("schema", parents=[file], help="the tables of the telemetry store")
    schema.add_argument("--apply", action="store_true", help="create what is missing")
    return parser


def _refuse_strays(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with exit 2 where options were given that mean nothing together; silence would promise an effect."""
    modes = [name for name in ("version", "demo", "check_config") if getattr(args, name)]
    if len(modes) > 1 or (modes and args.command is not None):
        named = [f"--{name.replace('_', '-')}" for name in modes] + ([args.command] if args.command else [])
        parser.error(f"{' and '.join(named)} do not go together")
    if args.demo and args.config is not None:
        parser.error("--demo and --config do not go together: the demo has a configuration of its own")
    if args.port is not None and not args.demo:
        parser.error("--port needs --demo; the ports of a configuration are in server.listen")
    if args.probe and not args.check_config:
        parser.error("--probe needs --check-config")
    if args.json and not args.check_config and args.command not in ("status", "usage", "spool"):
        parser.error("--json needs --check-config, status, usage or spool")
    if args.command == "usage" and args.user is args.tenant is args.model is None:
        parser.error("usage needs --user ID, --tenant T or --model M, or several of them")


def _command(module: str) -> Callable[[argparse.Namespace], int]:
    """The `run` of a command's module."""
    run: Callable[[argparse.Namespace], int] = importlib.import_module(module).run
    return run


def _check(args: argparse.Namespace) -> int:
    from proxyd.cli import check

    return check.run(args.config, as_json=args.json, probe=args.probe)


def _serve(path: str, environ: Mapping[str, str]) -> int:
    """The daemon itself, in the foreground."""
    from proxyd.cli import check

    try:
        report = check.examine(path, environ)
    except OSError as error:
        remedy = "name a file: -c FILE, or try --demo"
        if isinstance(error, PermissionError):
            remedy = f"this user (uid {os.geteuid()}) must be let in: chmod 0644 {path}, and its directories 0755"
        return fail("proxyd", check.UNREADABLE, f"cannot read {path}: {error.strerror}; {remedy}")
    for finding in report.findings:
        fail("proxyd", 0, finding.text())
    if report.config is None or report.secrets is None:
        count = f"{report.errors} error{'s' if report.errors > 1 else ''}"
        return fail("proxyd", check.ERRORS, f"not started: {count} in {path}")

    from proxyd.cli.serve import run
    from proxyd.log import Log

    config = report.config
    try:
        log = Log(level=config.log.level, format=config.log.format, access=config.log.access, process="master")
    except OSError as error:
        message = f"cannot open {config.log.access}: {error.strerror}; log.access must be writable for this user"
        return fail("proxyd", check.ERRORS, f"{message} (uid {os.geteuid()}); name another path or stdout")
    return run(config, report.secrets, log, find_program=_program)


def _go_on(args: argparse.Namespace) -> int | None:
    """In the image that an upgrade put in place: serves on. None where there is nothing to go on from."""
    from proxyd.master import handover

    try:
        fd = handover.take(os.environ)
        if fd is None:
            return None
        handed = handover.read(fd)
    except handover.HandoverError as error:
        return fail("proxyd", 1, f"cannot go on from the program before: {error}")
    if handed.pid != os.getpid():
        return None
    from proxyd.cli import adopt

    return adopt.run(handed, args.config, os.environ, _program)


def _program(environ: Mapping[str, str]) -> Program:
    from proxyd.cli.renewal import find_program

    return find_program(sys.argv, sys.orig_argv, sys.executable, os.getcwd(), environ)


def _port(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError("write a number from 0 to 65535")


def _count(text: str) -> int:
    """A whole number that fits BIGINT UNSIGNED."""
    if text.isascii() and text.isdigit() and int(text) < 2**64:
        return int(text)
    raise argparse.ArgumentTypeError("write a whole number up to 2^64-1, without a sign")


def _looks(text: str) -> int:
    count = _count(text)
    if not count:
        raise argparse.ArgumentTypeError("write a number above 0")
    return count


def _interval(text: str) -> float:
    seconds = _duration(text)
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError("write a duration from 100ms to 1h")
    return seconds


def _moment(text: str) -> float:
    """Seconds since the epoch; without an offset the time is UTC, as the rows' is."""
    try:
        moment = datetime.fromisoformat(text)
        return max(0.0, (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError("write 2026-01-31, 2026-01-31T12:00 (UTC) or 2026-01-31T12:00+01:00") from None


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(f"{error.message}; {error.remedy}") from None
