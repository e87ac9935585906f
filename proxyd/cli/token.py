"""`proxyd token`: prints a session token made with the configured secret, and nothing else, on stdout.

Owns: the exit codes of this command; cli/main owns its arguments. Must not know: claims (access/mint does).
It reads [auth] and the secret named there: neither the rest of the file nor another key has to be in order.
Exit codes: 0 printed, 1 the configuration or the arguments make no token, 2 the file cannot be read or the
arguments are not understood.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from proxyd.access.mint import MintError, mint
from proxyd.cli.output import fail, fail_all, put
from proxyd.cli.part import read_part
from proxyd.config.secrets import resolve_hmac

WHO = "proxyd token"


def run(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> int:
    """Prints the token; returns the exit code. Messages go to stderr and hold no secret."""
    part = read_part(WHO, args.config, {"auth": ()}, environ)
    if isinstance(part, int):
        return part
    secrets, findings = resolve_hmac(part.config, environ)
    if secrets is None:
        return fail_all(WHO, 1, findings)
    try:
        token = mint(part.config.auth, secrets, args.user, args.tenant, args.quota, args.ttl)
    except MintError as error:
        return fail(WHO, 1, f"no token: {error}")
    return put(WHO, token)
