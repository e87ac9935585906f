"""`proxyd --check-config --probe`: whether those whom the configuration names can be reached, and take our keys.

Owns: what is asked of whom, what is an error. Must not know: how a step is done (probe_http, store/probe).

    each upstream     name -> all addresses over TCP, and the first of them from each source address -> TLS
                      -> one GET of the models' list for each key
    auth.jwks_url     fetched and understood
    telemetry.sink    connected, schema, durability

All at once, each step within STEP_S, everything within ALL_S: what has not ended then is an error that names it.
Invariants: nothing is started or changed; a key is named by where it comes from, never shown.
"""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from proxyd.access.jwks import KeyMaterialError, parse_jwks
from proxyd.cli import probe_http as net
from proxyd.cli.check_found import Found
from proxyd.cli.probe_http import STEP_S, Certificate, ProbeError
from proxyd.cli.probe_upstream import FEW_DAYS, Note, Outcome, UpstreamProbe
from proxyd.config.locate import KeyPath
from proxyd.config.schema import Config
from proxyd.config.secrets import Secret, Secrets
from proxyd.config.sink import is_mysql
from proxyd.store import probe as store

ALL_S = 15.0


def probe(config: Config, secrets: Secrets | None) -> tuple[list[Found], list[Note]]:
    """Everything found, and everything in order. `secrets` None: keys and passwords are in error, the rest is asked."""
    outcomes: list[Outcome] = []
    now = time.time()

    def begin(key: KeyPath, step: str, run: Callable[[Outcome], None]) -> None:
        outcome = Outcome(key)
        outcome.step = step

        def work() -> None:
            try:
                run(outcome)
            except (OSError, ValueError, ProbeError) as error:
                outcome.error(key, f"cannot be probed: {error}", "see the message")
            finally:
                outcome.is_done.set()

        outcomes.append(outcome)
        threading.Thread(target=work, daemon=True).start()

    for index, upstream in enumerate(config.upstream):
        keys = () if secrets is None else secrets.upstream_keys.get(upstream.name, ())
        target = UpstreamProbe(index, upstream, keys, secrets is not None, now)
        begin(("upstream", index, "url"), "resolving its name", target.run)
    if config.auth.mode == "required" and config.auth.jwks_url:
        begin(("auth", "jwks_url"), "fetching it", lambda outcome: _jwks(config, outcome, now))
    if secrets is not None:
        password = secrets.telemetry_password
        begin(("telemetry", "sink"), "connecting", lambda outcome: _store(config, password, outcome))
    deadline = time.monotonic() + ALL_S
    for outcome in outcomes:
        if not outcome.is_done.wait(max(0.0, deadline - time.monotonic())):
            message = f"not done within {ALL_S:.0f} s, still {outcome.step}"
            outcome.error(outcome.key, message, "it is too slow to be used, or something on the way swallows packets")
    found = [one for outcome in outcomes for one in tuple(outcome.found)]
    return found, [one for outcome in outcomes for one in tuple(outcome.notes)]


def _jwks(config: Config, outcome: Outcome, now: float) -> None:
    """As the workers fetch it: no redirect, the system's trust store."""
    key: KeyPath = ("auth", "jwks_url")
    parts = urlsplit(config.auth.jwks_url)
    host, is_tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)

    def fetch() -> tuple[int, bytes, Certificate | None]:
        sock = net.connect(net.resolve(host, port)[0])
        certificate = None
        if is_tls:
            sock, certificate = net.handshake(sock, ssl.create_default_context(), host)
        return *net.get(sock, parts.path or "/", [("Host", parts.netloc.rpartition("@")[2])]), certificate

    (found,) = net.gather([fetch], STEP_S)
    if isinstance(found, Exception):
        text = str(found) if isinstance(found, ProbeError) else net.words(found)
        outcome.error(key, f"cannot be fetched: {text}", "without it no token is accepted")
        return
    status, body, certificate = found
    if status != 200:
        message = f"is answered {status}; a redirect is not followed"
        outcome.error(key, message, "name the address of the key set itself")
        return
    try:
        keys, problems = parse_jwks(body, config.auth.algorithms)
    except KeyMaterialError as error:
        outcome.error(key, f"gives no usable keys: {error}", "it must be a JWK set with keys for auth.algorithms")
        return
    for problem in problems:
        outcome.warn(key, problem, "the other keys are used")
    if certificate is not None and certificate.days(now) < FEW_DAYS:
        outcome.warn(key, f"its certificate ends in {certificate.days(now)} days", "see that it is renewed")
    outcome.notes.append(Note(key, f"{len(keys)} usable key{'s' if len(keys) > 1 else ''}"))


def _store(config: Config, password: Secret | None, outcome: Outcome) -> None:
    key: KeyPath = ("telemetry", "sink")
    linger = config.telemetry.linger
    rate = f"at most {1 / linger:.0f} a second" if linger else "one for each group of rows"
    commits = f"of which proxyd makes {rate}"
    seen = store.look(config.telemetry.sink, password, STEP_S, commits)
    outcome.found += [Found(one.is_error, key, one.message, one.remedy, one.live, one.wanted) for one in seen.troubles]
    if seen.words:
        outcome.notes.append(Note(key, seen.words))
    if is_mysql(config.telemetry.sink) and not urlsplit(config.telemetry.sink).username and os.geteuid() == 0:
        # Without a name the asking user's own is taken, and the server lets root in where it lets nobody else.
        message = "names no user, so this was asked as root; the daemon asks as its own user"
        outcome.warn(key, message, "ask as that one, too: runuser -u proxyd -- proxyd usage --user 1")
