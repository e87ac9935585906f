"""Workers killed with their backlogs full, under load; whose connection was whose is read in the kernel, not guessed.

Owns: the killer, the look into the kernel, the verdict. What ends how is counted by tests/bench/newcomers.c.
`python -m tests.daemon.worker_loss --seconds 60 --every 2 --rate 1000`

A connection that a worker had accepted is lost with it; one that waited in its backlog must not be. To tell them apart:

    1. SIGSTOP the worker and wait until the kernel says that it is stopped. It accepts nothing more; its backlog fills.
    2. After a while, read its descriptors (/proc/PID/fd: inodes of sockets) and the sockets of the node's port
       (/proc/net/tcp: the client's port and the inode). Inode 0: not accepted, it waits in a backlog. An inode of the
       worker's: accepted by it. Nothing changes in this set, for the worker is stopped.
    3. SIGKILL. A request that fails is the killed worker's if its port is in the set and it was open at the kill. Any
       other failure is one that must not be: refused or reset before accept, or lost with a worker that lives.

Respawn is measured in the node's own shared memory, the memfd of the master: from the kill until the seat of the killed
worker has another pid and says READY.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxyd.shm.beats import Beat, State
from proxyd.shm.region import Region
from tests.daemon.harness import Daemon, config_text, free_port, model_text, upstream_text, wait_for
from tests.daemon.load import Failure, Newcomers, Scripted, build, children_of, end_on_term, loads

RESPAWN_S = 0.3
TRIES_S = 10.0
SLACK_S = 0.05  # between the kill here and the reset as the client's clock has it


@dataclass(frozen=True)
class Plan:
    seconds: float = 60.0
    every_s: float = 2.0
    stopped_s: float = 0.4
    rate: float = 1000.0
    workers: int = 2
    seed: int = 1
    kept: float = 0.2
    respawn_s: float = RESPAWN_S


@dataclass
class Kill:
    """One kill: `accepted` are the client ports of the worker's connections, `waiting` how many nobody had accepted."""

    pid: int
    at: float
    accepted: frozenset[int]
    waiting: int
    respawn_s: float = 0.0


@dataclass
class Outcome:
    kills: list[Kill] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    lost_with_worker: int = 0
    faults: list[str] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    rows: int = 0


def node_region(master: int) -> Region:
    """The node's shared memory, through the master's own descriptor."""
    folder = Path(f"/proc/{master}/fd")
    for entry in folder.iterdir():
        try:
            if "memfd:proxyd-region" in os.readlink(entry):
                return Region.adopt(os.open(entry, os.O_RDWR))
        except FileNotFoundError:
            continue
    raise AssertionError(f"no region among the descriptors of {master}")


def seat_of(region: Region, pid: int) -> int:
    return next(seat for seat in range(region.slots) if Beat(region, seat).pid == pid)


def wait_stopped(pid: int) -> None:
    def is_stopped() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"

    wait_for(is_stopped, 10, every=0.001)


def sockets_of(pid: int) -> set[int]:
    """Inodes of a process's sockets."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            text = os.readlink(entry)
        except FileNotFoundError:
            continue
        if text.startswith("socket:["):
            found.add(int(text[8:-1]))
    return found


def connections_at(port: int) -> dict[int, int]:
    """Of established connections at a listening port: the client's port, and the inode (0: nobody has accepted it)."""
    found = {}
    ours = f":{port:04X}"
    with open("/proc/net/tcp", encoding="ascii") as file:
        next(file)
        for line in file:
            words = line.split()
            # 01 established, 08 the client has closed its side
            if words[1].endswith(ours) and words[3] in ("01", "08"):
                found[int(words[2].rpartition(":")[2], 16)] = int(words[9])
    return found


def stop_look_kill(port: int, pid: int, stopped_s: float) -> Kill:
    """The three steps above."""
    os.kill(pid, signal.SIGSTOP)
    wait_stopped(pid)
    time.sleep(stopped_s)
    owned = sockets_of(pid)
    there = connections_at(port)
    accepted = frozenset(client for client, inode in there.items() if inode in owned)
    waiting = sum(inode == 0 for inode in there.values())
    kill = Kill(pid, time.monotonic(), accepted, waiting)
    os.kill(pid, signal.SIGKILL)
    return kill


def is_of(failure: Failure, kills: list[Kill]) -> bool:
    """True if the connection was one that a killed worker had accepted."""
    return failure.kind in ("reset", "empty", "cut") and any(
        failure.port in kill.accepted and failure.asked - SLACK_S < kill.at < failure.ended + SLACK_S for kill in kills
    )


def kill_one(daemon: Daemon, region: Region, pid: int, stopped_s: float) -> Kill:
    """Kills a worker with its backlog full, and waits for its successor."""
    beat = Beat(region, seat_of(region, pid))
    kill = stop_look_kill(daemon.port, pid, stopped_s)

    def is_back() -> bool:
        return beat.pid not in (0, pid) and beat.state is State.READY

    wait_for(is_back, TRIES_S, every=0.001)
    kill.respawn_s = time.monotonic() - kill.at
    return kill


def start_node(folder: Path, url: str, workers: int) -> Daemon:
    """A node whose gauges and ledger have something to lose: permits and quotas are in use."""
    port = free_port()
    text = config_text(
        folder,
        port,
        upstream_text(url + "/v1", more="max_connections = 4096\n") + model_text("*", 1, '["openai"]'),
        server=f"workers = {workers}",
        limits="concurrent_streams = 20000",
    )
    daemon = Daemon(folder, text)
    daemon.port = port
    daemon.start()
    return daemon


def run(folder: Path, plan: Plan, *, say: bool = False) -> Outcome:
    outcome = Outcome()
    chance = random.Random(plan.seed)
    build(folder)
    provider = Scripted(folder)
    daemon = None
    try:
        daemon = start_node(folder, provider.url, plan.workers)
        assert daemon.process is not None
        region = node_region(daemon.process.pid)
        token = daemon.token(quota_remaining=10**12)
        load = Newcomers(folder, daemon.port, token, rate=plan.rate, kept=plan.kept, pool=100)
        with loads(load):
            load.wait("ready")
            load.go()
            end = time.monotonic() + plan.seconds
            due = time.monotonic() + plan.every_s / 2
            while due < end:
                time.sleep(max(0.0, due - time.monotonic()))
                due += plan.every_s
                pids = [one["pid"] for one in json.loads(daemon.admin("/status")[1])["workers"] if one["pid"]]
                kill = kill_one(daemon, region, chance.choice(pids), plan.stopped_s)
                outcome.kills.append(kill)
                if say:
                    print(
                        f"killed {kill.pid}: {len(kill.accepted)} accepted, {kill.waiting} waiting, successor ready "
                        f"after {kill.respawn_s * 1000:.0f} ms",
                        flush=True,
                    )
            time.sleep(max(0.0, end - time.monotonic()))
            load.stop()
            load.wait("stopped")
            outcome.report = load.report()
            judge(outcome, load.failures, plan)
        judge_node(outcome, daemon, plan)
    finally:
        if daemon is not None:
            daemon.kill()
        provider.close()
    return outcome


def judge(outcome: Outcome, failures: list[Failure], plan: Plan) -> None:
    for failure in failures:
        if is_of(failure, outcome.kills):
            outcome.lost_with_worker += 1
        else:
            near = min(outcome.kills, key=lambda kill: abs(kill.at - failure.ended), default=None)
            when = "" if near is None else f" ({failure.ended - near.at:+.3f} s of the kill of {near.pid})"
            outcome.faults.append(f"not of a killed worker: {failure}{when}")
    for kill in outcome.kills:
        if kill.respawn_s > plan.respawn_s:
            outcome.faults.append(f"the successor of {kill.pid} was ready after {kill.respawn_s * 1000:.0f} ms")
        if not kill.waiting:
            outcome.faults.append(f"nobody waited in the backlog of {kill.pid}: the round proves nothing")


def judge_node(outcome: Outcome, daemon: Daemon, plan: Plan) -> None:
    """What the dead held has come back."""

    def look() -> bool:
        limits = json.loads(daemon.admin("/status")[1])["limits"]
        outcome.limits = {name: limits[name] for name in ("held", "running", "permits")}
        outcome.gauges = {
            "streams": daemon.metric("proxyd_streams_active"),
            "busy": daemon.metric("proxyd_upstream_connections", state="busy"),
            "connecting": daemon.metric("proxyd_upstream_connections", state="connecting"),
        }
        return not any(outcome.limits.values()) and not any(outcome.gauges.values())

    try:
        wait_for(look, 10, every=0.2)
    except AssertionError:
        outcome.faults.append(f"not back at zero: {outcome.limits} {outcome.gauges}")
    restarts = daemon.metric("proxyd_worker_restarts_total")
    if restarts != len(outcome.kills):
        outcome.faults.append(f"{len(outcome.kills)} kills, {restarts:g} restarts")
    assert daemon.process is not None
    if len(children_of(daemon.process.pid)) != plan.workers + 1:
        outcome.faults.append(f"{len(children_of(daemon.process.pid))} children")
    code = daemon.stop()
    if code:
        outcome.faults.append(f"exit code {code}")
    if "Traceback" in daemon.log():
        outcome.faults.append("Traceback: " + daemon.log()[daemon.log().index("Traceback") :][:600])
    outcome.rows = len(daemon.rows())
    whole = outcome.report["requests"]["whole"]
    if not whole <= outcome.rows <= whole + outcome.lost_with_worker:
        outcome.faults.append(f"{whole} whole and {outcome.lost_with_worker} lost requests have {outcome.rows} rows")


def describe(outcome: Outcome) -> str:
    requests = outcome.report["requests"]
    respawns = sorted(kill.respawn_s * 1000 for kill in outcome.kills)
    waiting, accepted = [kill.waiting for kill in outcome.kills], [len(kill.accepted) for kill in outcome.kills]
    lines = [
        f"{len(outcome.kills)} kills; waiting in backlogs {sum(waiting)} in all, at most {max(waiting)}; "
        f"accepted by the killed {sum(accepted)}, at most {max(accepted)}",
        f"requests {requests['begun']}, whole {requests['whole']}, failed {requests['failed']}; accepted by a killed "
        f"worker {outcome.lost_with_worker}, all others {len(outcome.faults)}",
        f"respawn: median {respawns[len(respawns) // 2]:.0f} ms, at most {respawns[-1]:.0f} ms",
        f"at the end: {outcome.limits} {outcome.gauges}; rows {outcome.rows}",
        f"answers: over 1 s {outcome.report['slow']}, at most {outcome.report['took']['max_us'] / 1000:.0f} ms",
        f"faults: {len(outcome.faults)}",
    ]
    return "\n".join([*lines, *(f"  {fault}" for fault in outcome.faults[:40])])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.daemon.worker_loss")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=2.0)
    parser.add_argument("--stopped", type=float, default=0.4)
    parser.add_argument("--rate", type=float, default=1000.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    given = parser.parse_args()
    end_on_term()
    plan = Plan(given.seconds, given.every, given.stopped, given.rate, given.workers, given.seed)
    print(f"seed {given.seed}")
    with tempfile.TemporaryDirectory(prefix="loss-") as folder:
        outcome = run(Path(folder), plan, say=True)
    print(describe(outcome))
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
