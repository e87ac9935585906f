"""Reloads and upgrades in turn under load, some of them to something broken; every end of every request is counted.

Owns: the node and its ways in (TCP, Unix socket, the shipped nginx before either), the turns, the verdict. What ends
how is counted by tests/bench/newcomers.c; what is broken, and how, is in installed.py.
`python -m tests.daemon.renew_rounds --reloads 20 --upgrades 20 --streams 1000 --rate 3000 [--nginx]`

    newcomers --new requests, kept connections, long streams--> [nginx] --> node (2 workers) --> scripted provider
                                                             HUP, USR2 ----^   good, broken file, broken program

The verdict: no request may fail in any way; no stream may have a gap, be foreign, or end before its end, except one
that is ended by a `draining` event at least drain_timeout after the first renewal that it met. A good renewal must be
noted as ok, with the new version or model served; a broken one as failed, with the same workers serving as before.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import itertools
import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.harness import config_text, free_port, model_text, upstream_text, wait_for
from tests.daemon.installed import FILES, PROGRAMS, InstalledDaemon, Renewal, broken
from tests.daemon.load import Failure, Newcomers, Scripted, build, children_of, end_on_term, total
from tests.daemon.sdk.nginx import Nginx, render
from tests.daemon.worker_loss import Kill, is_of, stop_look_kill

TITLES = (b"proxyd: worker", b"proxyd: telemetry")
WAYS = ("tcp", "unix", "nginx-tcp", "nginx-unix")
BROKEN = ("file_key", "syntax", "no_boot", "file_syntax", "missing", "exit", "file_upstream")
NGINX_MAIN = """
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/error.log error;
{user}
events {{ worker_connections 15000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000;
    {servers}
}}
"""


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    reloads: int = 20
    upgrades: int = 20
    broken: tuple[str, ...] = ("file_key", "syntax", "no_boot")
    streams: int = 1000
    rate: float = 3000
    ways: tuple[str, ...] = ("tcp",)
    workers: int = 2
    pause_s: float = 1.0
    drain_timeout_s: float = 120.0
    stream_events: tuple[int, int] = (20, 120)  # at two a second
    stream_rate: float = 2.0
    sizes: tuple[int, ...] = ()  # how many workers each reload asks for, in turn; none: always `workers`
    kills: bool = False  # a worker, of any generation, is killed while each renewal is under way (tcp only)

    def workers_of(self, number: int) -> int:
        return self.sizes[number % len(self.sizes)] if self.sizes else self.workers

    def turns(self) -> list[tuple[str, str]]:
        """(kind, how it is broken) of each turn: reloads and upgrades in turn, the broken ones spread evenly."""
        good = [
            kind
            for pair in itertools.zip_longest(["reload"] * self.reloads, ["upgrade"] * self.upgrades)
            for kind in pair
            if kind is not None
        ]
        turns = [(kind, "") for kind in good]
        for number, how in enumerate(self.broken):
            kind = "reload" if how in FILES else "upgrade"
            at = (number + 1) * (len(good) + 1) // (len(self.broken) + 1) + number
            # The image whose workers cannot boot is in place then, so a good one must follow before any reload.
            at += how == "no_boot" and turns[at : at + 1] == [("reload", "")]
            turns.insert(at, (kind, how))
        return turns


@dataclass
class Outcome:
    """What was counted, and what is wrong with it (`faults`; empty is the aim)."""

    renewals: list[Renewal] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unanswered: int = 0
    most_processes: int = 0
    ended_by_drain: int = 0
    nginx_errors: list[str] = field(default_factory=list)
    rows: int = 0
    kills: list[Kill] = field(default_factory=list)
    lost_with_killed: int = 0
    workers: int = 0  # as the last good configuration has it


class BigNginx(Nginx):
    """The nginx of the SDK tests with room for thousands of connections."""

    def __init__(self, folder: Path, port: int, sock: str) -> None:
        super().__init__(folder, port, sock)
        servers = render("by_tcp", self.tcp, unix=None, tcp=port) + render("by_unix", self.unix, unix=sock, tcp=port)
        user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
        self.conf.write_text(NGINX_MAIN.format(folder=folder, servers=servers, user=user))


def make_config(folder: Path, port: int, url: str, plan: Plan, number: int) -> str:
    """The node's file; each number gives one with another model in it, so that a reload can be seen."""
    server = f"""listen = ["127.0.0.1:{port}", "unix:{folder}/p.sock"]
workers = {plan.workers_of(number)}
drain_timeout = "{plan.drain_timeout_s:g}s"
"""
    upstream = upstream_text(url + "/v1", more="max_connections = 4096\n")
    models = model_text(f"turn-{number}", 2, '["openai"]') + model_text("*", 1, '["openai"]')
    return config_text(folder, port, upstream + models, server=server)


@contextlib.contextmanager
def stage(folder: Path, plan: Plan) -> Iterator[tuple[InstalledDaemon, Scripted, list[Newcomers], Nginx | None]]:
    """The provider, the node, nginx if a way needs it, and the loads, whose streams are open."""
    with contextlib.ExitStack() as ends:
        build(folder)
        provider = Scripted(folder)
        ends.callback(provider.close)
        port = free_port()
        daemon = InstalledDaemon(folder, make_config(folder, port, provider.url, plan, 0))
        daemon.port = port
        ends.callback(daemon.kill)
        daemon.start()
        nginx = None
        if any(way.startswith("nginx") for way in plan.ways):
            (folder / "nginx").mkdir()
            nginx = BigNginx(folder / "nginx", port, f"{folder}/p.sock")
            ends.callback(nginx.kill)
            nginx.start()
        share = len(plan.ways)
        made = []
        for way in plan.ways:
            target: str | int = f"{folder}/p.sock" if way == "unix" else port
            if nginx is not None and way.startswith("nginx"):
                target = nginx.tcp if way == "nginx-tcp" else nginx.unix
            load = Newcomers(
                folder, target, daemon.token(), way, rate=plan.rate / share, streams=plan.streams // share,
                stream_rate=plan.stream_rate, min=plan.stream_events[0], max=plan.stream_events[1], cap=4000 // share,
            )  # fmt: skip
            ends.callback(load.close)
            made.append(load)
        for load in made:
            load.wait("ready", 60)
        yield daemon, provider, made, nginx


def run(folder: Path, plan: Plan, *, say: bool = False) -> Outcome:
    outcome = Outcome(workers=plan.workers_of(0))
    with stage(folder, plan) as (daemon, provider, made, nginx):
        for load in made:
            load.go()
        began = time.monotonic()
        time.sleep(plan.pause_s)
        for number, (kind, how) in enumerate(plan.turns(), 1):
            renewal = take_turn(daemon, provider, plan, outcome, number, kind, how)
            outcome.renewals.append(renewal)
            assert daemon.process is not None
            outcome.most_processes = max(outcome.most_processes, len(children_of(daemon.process.pid)))
            if say:
                now = total([load.report() for load in made], "requests")
                bad = {name: count for name, count in now["failed"].items() if count}
                print(f"{number:3} {renewal}; {now['whole']} whole, failed {bad}", flush=True)
            time.sleep(plan.pause_s)
        for load in made:
            load.stop()
        outcome.seconds = time.monotonic() - began
        longest_s = plan.stream_events[1] / plan.stream_rate
        for load in made:
            load.wait("stopped", longest_s + 60)
        outcome.reports = [load.report() for load in made]
        outcome.failures = [failure for load in made for failure in load.failures]
        outcome.unanswered = len(daemon.unanswered)
        outcome.faults += [f"admin socket: {text}" for text in daemon.unanswered[:5]]
        if nginx is not None:
            outcome.nginx_errors = nginx.errors().splitlines()
        judge_ends(outcome, plan)
        judge_rest(outcome, daemon, plan)
    return outcome


def take_turn(
    daemon: InstalledDaemon, provider: Scripted, plan: Plan, outcome: Outcome, number: int, kind: str, how: str
) -> Renewal:
    """One renewal, and what must be true after it."""
    assert daemon.process is not None
    before = daemon.status()
    pids = daemon.worker_pids()
    name = f"turn {number} ({kind}{', ' + how if how else ''})"
    with contextlib.ExitStack() as mending:
        if how:
            mending.enter_context(broken(daemon, how))
        elif kind == "upgrade":
            daemon.installed.install(f"9.{number}.0")
        else:
            daemon.config.write_text(make_config(daemon.folder, daemon.port, provider.url, plan, number))
        within_s = 0.6 if kind == "reload" else 4.0
        killing = threading.Thread(target=kill_some, args=(daemon, outcome, within_s), daemon=True)
        if plan.kills:
            killing.start()
        renewal = daemon.renew(kind, how)
        if plan.kills:
            killing.join(30)
    after = daemon.status()
    faults = []
    if kind == "reload" and renewal.ok:
        outcome.workers = plan.workers_of(number)
    if plan.kills:
        is_ok_wrong = renewal.ok and bool(how)  # one whose workers are killed may fail, or not
        pids, how = set(), how or ("" if renewal.ok else "killed")
    else:
        is_ok_wrong = renewal.ok == bool(how)
    if after["pid"] != before["pid"] or daemon.process.poll() is not None:
        faults.append(f"the master's pid was {before['pid']}, is {after['pid']}")
    if renewal.result.get("kind") != kind:
        faults.append(f"noted as {renewal.result.get('kind')}")
    if is_ok_wrong:
        faults.append(f"noted as ok={renewal.ok}: {renewal.result}")
    if how and not pids <= set(children_of(daemon.process.pid)):
        faults.append(f"workers of before are gone: {pids}")
    if how and how != "no_boot" and not plan.kills and daemon.worker_pids() != pids:
        faults.append(f"other workers serve: {pids} before, {daemon.worker_pids()} now")
    if not how and pids & daemon.worker_pids():
        faults.append(f"workers of before still serve: {pids & daemon.worker_pids()}")
    if not how and kind == "upgrade" and after["version"] != daemon.installed.version:
        faults.append(f"version {after['version']} serves, not {daemon.installed.version}")
    if not how and kind == "reload" and any(f"turn-{number}" not in served_models(daemon) for _ in range(4)):
        faults.append("the new configuration is not served")
    outcome.faults += [f"{name}: {text}" for text in faults]
    return renewal


def kill_some(daemon: InstalledDaemon, outcome: Outcome, within_s: float) -> None:
    """One of the children there are at some instant of a renewal: one that serves, starts or retires, or telemetry."""
    time.sleep(random.random() * within_s)
    assert daemon.process is not None
    with contextlib.suppress(OSError):  # it may end meanwhile, for it may retire
        titles = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children_of(daemon.process.pid)}
        pid = random.choice([pid for pid, title in titles.items() if title.startswith(TITLES)])
        outcome.kills.append(stop_look_kill(daemon.port, pid, 0.05))


def served_models(daemon: InstalledDaemon) -> list[str]:
    """Empty, and noted, if nobody answered."""
    try:
        status, body = daemon.get("/v1/models", Authorization=f"Bearer {daemon.token()}")
    except OSError as error:
        daemon.unanswered.append(f"GET /v1/models: {type(error).__name__}: {error}")
        return []
    assert status == 200, body
    return [one["id"] for one in json.loads(body)["data"]]


def judge_ends(outcome: Outcome, plan: Plan) -> None:
    """A stream may be ended by a drain, drain_timeout after the first renewal it met; all else is a fault."""
    good = [renewal for renewal in outcome.renewals if renewal.ok]
    for failure in outcome.failures:
        met = next((renewal for renewal in good if renewal.noted >= failure.asked), None)
        if is_of(failure, outcome.kills):
            outcome.lost_with_killed += 1
        elif (
            failure.is_stream
            and failure.kind == "error_event"
            and "draining" in failure.detail
            and met is not None
            and failure.ended >= met.asked + plan.drain_timeout_s - 0.1
        ):
            outcome.ended_by_drain += 1
        else:
            near = min(outcome.renewals, key=lambda one: abs(one.asked - failure.ended), default=None)
            when = "" if near is None else f" ({failure.ended - near.asked:+.2f} s of a {near.kind} {near.how})"
            outcome.faults.append(f"{failure}{when}")
    counted = sum(sum(total(outcome.reports, who)["failed"].values()) for who in ("requests", "streams"))
    if counted != len(outcome.failures):
        outcome.faults.append(f"{counted} failures counted, {len(outcome.failures)} told")


def judge_rest(outcome: Outcome, daemon: InstalledDaemon, plan: Plan) -> None:
    """After the load: old generations go, each request has its row, the node ends as one that nothing happened to."""
    try:
        wait_for(lambda: not daemon.draining(), 15)
        assert daemon.process is not None
        wait_for(lambda: len(children_of(daemon.process.pid)) == outcome.workers + 1, 15)  # type: ignore[union-attr]
    except AssertionError:
        outcome.faults.append(f"old generations stay: {daemon.draining()}, {children_of(daemon.process.pid)}")  # type: ignore[union-attr]
    code = daemon.stop(seconds=plan.drain_timeout_s + 20)
    if code != 0:
        outcome.faults.append(f"exit code {code}")
    # One within a line is what the check of a broken program said, and belongs there.
    outcome.faults += re.findall(r"^Traceback[^{]{0,600}", daemon.log(), re.MULTILINE)
    died = re.findall(r'"event":"(child_died|child_killed|child_silent)"[^\n]*', daemon.log())
    expected_deaths = any(renewal.how == "no_boot" for renewal in outcome.renewals)
    if died and not expected_deaths and not plan.kills:
        outcome.faults.append(f"children died: {len(died)}")
    outcome.rows = len(daemon.rows())
    whole = sum(total(outcome.reports, who)["whole"] for who in ("requests", "streams"))
    if not whole <= outcome.rows <= whole + len(outcome.failures):
        outcome.faults.append(f"{whole} whole answers and {len(outcome.failures)} others have {outcome.rows} rows")


def describe(outcome: Outcome) -> str:
    requests, streams = total(outcome.reports, "requests"), total(outcome.reports, "streams")
    good = [renewal for renewal in outcome.renewals if renewal.ok]
    took = sorted(renewal.noted - renewal.asked for renewal in good) or [0.0]
    lines = [
        f"{len(outcome.renewals)} renewals in {outcome.seconds:.1f} s: {len(good)} good in {took[len(took) // 2]:.2f}, "
        f"at most {took[-1]:.2f} s; at most {outcome.most_processes} processes",
        f"requests: {requests['begun']} begun ({requests['begun'] / (outcome.seconds or 1):.0f}/s), "
        f"{requests['whole']} whole, failed {requests['failed']}, by status {requests['statuses']}",
        f"streams: {streams['begun']} begun, {streams['whole']} whole, failed {streams['failed']}, "
        f"by status {streams['statuses']}; {outcome.ended_by_drain} ended by drain_timeout",
    ]
    codes = Counter(re.sub(r'.*"code":"(\w+)".*', r"\1", one.detail)[:40] for one in outcome.failures)
    lines += [f"  codes of failures: {dict(codes.most_common(8))}"] if codes else []
    for report in outcome.reports:
        first, whole = ({name: us / 1e3 for name, us in report[key].items()} for key in ("first_byte", "took"))
        lines.append(
            f"  {report['via']}: {report['connects']} connects, {report['held_back']} held back, {report['slow']} "
            f"over 1 s; kept ones: {report['idle_closed']} closed idle, {report['said_close']} by Connection: close; "
            f"first byte p50 {first['p50_us']:.1f} p99 {first['p99_us']:.1f} max {first['max_us']:.0f} ms, "
            f"whole at most {whole['max_us']:.0f} ms"
        )
    others = f"admin unanswered {outcome.unanswered}, nginx errors {len(outcome.nginx_errors)}"
    lines.append(f"rows {outcome.rows}, {others}")
    lines += [f"  nginx: {line}" for line in outcome.nginx_errors[:5]]
    if outcome.kills:
        lines.append(f"{len(outcome.kills)} workers killed, {outcome.lost_with_killed} connections lost with them")
    lines.append(f"faults: {len(outcome.faults)}")
    lines += [f"  {fault}" for fault in outcome.faults[:40]]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.daemon.renew_rounds")
    parser.add_argument("--reloads", type=int, default=20)
    parser.add_argument("--upgrades", type=int, default=20)
    parser.add_argument("--broken", default="file_key,syntax,no_boot", help=",".join((*FILES, *PROGRAMS)))
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pause", type=float, default=1.0)
    parser.add_argument("--drain", type=float, default=120.0)
    parser.add_argument("--events", default="20,120", help="of a long stream, at two a second: least,most")
    parser.add_argument("--via", default="tcp", help=",".join(WAYS))
    parser.add_argument("--sizes", default="", help="numbers of workers that the reloads ask for in turn: 2,4,1")
    parser.add_argument("--kills", action="store_true", help="kill a worker during each renewal")
    parser.add_argument("--nginx", action="store_true", help="as --via nginx-tcp,nginx-unix")
    given = parser.parse_args()
    end_on_term()
    least, most = (int(word) for word in given.events.split(","))
    breaks = tuple(word for word in given.broken.split(",") if word)
    ways = ("nginx-tcp", "nginx-unix") if given.nginx else tuple(given.via.split(","))
    plan = Plan(
        given.reloads, given.upgrades, breaks, given.streams, given.rate, ways, given.workers, given.pause,
        given.drain, (least, most), 2.0, tuple(int(word) for word in given.sizes.split(",") if word), given.kills,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="renew-") as folder:
        outcome = run(Path(folder), plan, say=True)
    print(describe(outcome))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
