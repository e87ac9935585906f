"""`proxyd token`: prints a session token made with the configured secret, and nothing else, on stdout.

Owns: the exit codes of this command; cli/main owns its arguments. Must not know: claims (access/mint does).
Exit codes: 0 printed, 1 the configuration or the arguments make no token, 2 the file cannot be read or the
arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from proxyd.access.mint import MintError, mint
from proxyd.config.load import load
from proxyd.config.secrets import resolve
from proxyd.errors import ConfigError


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the token; returns the exit code. Messages go to stderr and hold no secret."""
    try:
        config = load(args.config, environ)
    except OSError as error:
        return _fail(2, f"cannot read {args.config}: {error.strerror}")
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


def _fail(code: int, message: str) -> int:
    print(f"proxyd token: {message}", file=sys.stderr)
    return code
