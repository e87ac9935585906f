"""What to do about an address that cannot be had, at a start and at a reload alike.

Owns: the words. Must not know: how one binds.
"""

from __future__ import annotations

import errno
import os

from proxyd.config.schema import Config
from proxyd.host.sockets import ListenError


def listen_remedy(error: ListenError, config: Config) -> str:
    """Which option it is, and what to do."""
    option = "server.admin" if error.address == config.server.admin.text else "server.listen"
    if error.errno == errno.EADDRINUSE:
        show = "ss -lxp" if error.address.startswith("unix:") else "ss -ltnp"
        return f"another process has the address of {option}: `{show}` names it; end it, or change {option}"
    if error.errno == errno.ENOENT:
        return f"the directory in {option} is missing: create it, or let systemd (RuntimeDirectory=)"
    if error.errno == errno.EACCES:
        return f"this user (uid {os.geteuid()}) may not: choose a port above 1023 or a writable directory in {option}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"no interface of this machine has the address of {option}: `ip address` lists them"
    return f"change {option}"
