"""`proxyd reload` and `proxyd upgrade`: signal the running daemon, wait for what became of it, print that.

Owns: finding the daemon, its signal, the wait, the words. Must not know how a reload is done. Of the file it needs
`server.admin` alone, and finds that in a file that is broken, too: then the daemon refuses it and says why, and so do
`proxyd status` and the journal. Exit codes: 0 the new generation serves, 1 refused or failed (findings are printed),
2 the daemon cannot be reached, or may not be signalled.

Which result is ours: renewals are numbered. What was begun after we asked for the number has seen the file as it is;
an upgrade that worked has read the file, too.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxyd.cli.output import fail, printable, put
from proxyd.cli.status import fetch, why_not
from proxyd.config.load import load_part, read_text
from proxyd.config.values import Listen, parse_listen
from proxyd.errors import ConfigError

UNREACHABLE = 2
# The check's 30 s, the boot's 30 s, once more for another one that is under way, and the program's own start.
WAIT_S = 150.0
LOOK_S = 0.1
_SIGNALS = {"reload": signal.SIGHUP, "upgrade": signal.SIGUSR2}
_ADMIN = re.compile(r'^\s*admin\s*=\s*"([^"\n]+)"', re.MULTILINE)
WHY = "; its log says why: journalctl -u proxyd"
_DEFAULT = "unix:/run/proxyd/admin.sock"


@dataclass(frozen=True, slots=True)
class _Daemon:
    """Whom we signalled: the pid stays over an upgrade, so another one has had no part in this."""

    pid: int
    begun: int
    ask: Callable[[], dict[str, Any]]
    has_ended: Callable[[], bool]


def run(
    args: argparse.Namespace,
    environ: Mapping[str, str] = os.environ,
    ask: Callable[[Listen], dict[str, Any]] = fetch,
    kill: Callable[[int, int], None] = os.kill,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Prints the result on stdout, and what is wrong on stderr."""
    kind: str = args.command
    who = f"proxyd {kind}"
    try:
        admin = find_admin(args.config, environ)
    except OSError as error:
        return fail(who, UNREACHABLE, f"cannot read {args.config}: {error.strerror}; name the daemon's file: -c FILE")
    try:
        before = ask(admin)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return fail(who, UNREACHABLE, why_not(admin, error))
    pid, renewal = before.get("pid"), before.get("renewal")
    if not isinstance(pid, int) or pid < 2 or not isinstance(renewal, dict) or "results" not in renewal:
        return fail(who, UNREACHABLE, f"the daemon at {admin.text} knows no {kind}: restart it once with this version")
    if renewal.get("unavailable"):
        return fail(who, 1, f"not for this daemon: {renewal['unavailable']}")
    if before.get("state") == "draining":
        return fail(who, 1, f"the daemon, process {pid}, is stopping: start it again when it has ended")
    try:
        kill(pid, _SIGNALS[kind])
    except ProcessLookupError:
        return fail(who, UNREACHABLE, f"process {pid} is gone: the daemon has ended, or runs in another container")
    except PermissionError:
        return fail(who, UNREACHABLE, f"may not signal process {pid}: ask as root or as the daemon's user")

    def has_ended() -> bool:
        try:
            kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    daemon = _Daemon(pid, int(renewal.get("begun", 0)), lambda: ask(admin), has_ended)
    return _wait(who, kind, admin, daemon, clock, sleep)


def _wait(
    who: str,
    kind: str,
    admin: Listen,
    daemon: _Daemon,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> int:
    until = clock() + WAIT_S
    trouble = ""
    while clock() < until:
        sleep(LOOK_S)
        try:
            status = daemon.ask()
            if status["pid"] != daemon.pid:
                other_pid = f"and process {status['pid']} serves"
                return fail(who, 1, f"the daemon, process {daemon.pid}, ended meanwhile, {other_pid}{WHY}")
            results = status["renewal"]["results"]
        except (KeyError, TypeError):
            continue
        except (OSError, http.client.HTTPException, ValueError) as error:
            trouble = why_not(admin, error)  # while an image is replaced by the next, too
            if daemon.has_ended():
                return fail(who, UNREACHABLE, f"the daemon, process {daemon.pid}, ended meanwhile{WHY}")
            continue
        trouble = ""
        own, other = results.get(kind), results.get("upgrade")
        if own is not None and own["number"] > daemon.begun:
            return _tell(who, own)
        if other is not None and other["number"] > daemon.begun and other["ok"]:
            return _tell(who, other)
    if trouble:
        return fail(who, UNREACHABLE, f"asked, and now {trouble}")
    return fail(who, 1, f"no result within {WAIT_S:g} s; `proxyd status` shows it when it is there")


def _tell(who: str, last: Mapping[str, Any]) -> int:
    findings = [printable(str(line)) for line in last.get("findings", [])]
    if not last.get("ok"):
        return fail(who, 1, "\n".join([*findings, f"failed: {last.get('detail')}"]))
    return put(who, "\n".join([*findings, f"done in {last.get('took_s')} s: {last.get('detail')}"]))


def find_admin(path: str, environ: Mapping[str, str]) -> Listen:
    """Where the daemon of this file answers. Of a file that is no TOML, by the line that says so. Raises OSError."""
    try:
        return load_part(path, {"server": ("admin",)}, environ).config.server.admin
    except ConfigError:
        found = _ADMIN.search(read_text(path))
    try:
        return parse_listen(found[1] if found else _DEFAULT)
    except ValueError:
        return parse_listen(_DEFAULT)
