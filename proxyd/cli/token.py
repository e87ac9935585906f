"""`proxyd token`: prints a session token made with the configured secret, and nothing else, on stdout.

Owns: the arguments and exit codes of this command. Must not know: claims (access/mint does).
Exit codes: 0 printed, 1 the configuration or the arguments make no token, 2 the file cannot be read or the
arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from proxyd.access.mint import MintError, mint
from proxyd.access.tenants import DEFAULT_TENANT
from proxyd.config.load import load
from proxyd.config.secrets import resolve
from proxyd.config.units import UnitError, parse_duration
from proxyd.errors import ConfigError

DEFAULT_CONFIG = "/etc/proxyd/proxyd.toml"
DEFAULT_TTL = "1h"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what `run` reads. `-c` may also stand before the command: then the parser's owner has set it."""
    parser.add_argument("-c", "--config", default=argparse.SUPPRESS, metavar="FILE", help="the configuration")
    parser.add_argument("--user", required=True, type=int, metavar="ID", help="the user's number: the claim sub")
    parser.add_argument("--tenant", default=DEFAULT_TENANT, metavar="T", help="default: %(default)s")
    parser.add_argument("--quota", type=int, default=None, metavar="N", help="tokens it may spend; default: no limit")
    parser.add_argument("--ttl", type=_ttl, default=DEFAULT_TTL, metavar="D", help="lifetime; default: %(default)s")


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the token; returns the exit code. Messages go to stderr and hold no secret."""
    path = getattr(args, "config", None) or DEFAULT_CONFIG
    try:
        config = load(path, environ)
    except OSError as error:
        return _fail(2, f"cannot read {path}: {error.strerror}")
    except ConfigError as error:
        return _fail(1, str(error))
    secrets, findings = resolve(config, environ)
    if secrets is None:
        return _fail(1, "\n".join(finding.text() for finding in findings if finding.severity == "error"))
    try:
        token = mint(config.auth, secrets, args.user, args.tenant, args.quota, args.ttl)
    except MintError as error:
        return _fail(1, f"no token: {error}")
    print(token)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command alone, as `proxyd token` runs it."""
    parser = argparse.ArgumentParser(prog="proxyd token", description="Mints a session token.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _ttl(text: str) -> float:
    try:
        return parse_duration(text)
    except UnitError as error:
        raise argparse.ArgumentTypeError(f"{error.message}; {error.remedy}") from None


def _fail(code: int, message: str) -> int:
    print(f"proxyd token: {message}", file=sys.stderr)
    return code
