"""A node under load whose processes are killed at random instants, and the bill afterwards.

Owns: the load (short streams with known counts), the killer of the node's processes, the comparison of what the client
and the upstream saw with the rows. What is done to the database is kill_database.py's.
`python -m tests.daemon.kill_rounds --rounds N [--seed S] [--store mariadb]` runs it for as long as one likes; the suite
runs a dozen rounds with SQLite and two dozen with MariaDB.

    clients --request id, known counts--> node (3 workers) --same id--> upstream
       | finished / cut                      ^ kill -9              | seen
       '------------------- one row each, the right counts ---------'
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.daemon.harness import DONE, FINISH, Daemon, Reply, Upstream, Wire, chat_chunk, node, request_bytes, wait_for
from tests.daemon.kill_database import Store, open_store

CLIENTS = 6
# What a client may see when the process that served it, or the whole node, was killed.
CUT = (ConnectionError, TimeoutError)


def counts_of(number: int) -> tuple[int, int]:
    """The tokens that request's row must hold: known to the upstream and to the bill, different for neighbours."""
    return 100 + number % 911, 1 + number % 797


def usage_of(number: int) -> bytes:
    prompt, completion = counts_of(number)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    chunk = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [], "usage": usage}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def short_stream(wire: Wire) -> None:
    """A few events, some at once and some with pauses, then the counts that belong to the request."""
    number = int(wire.seen.json["messages"][0]["content"])
    gap = (0.0, 0.002, 0.01)[number % 3]
    wire.stream(*[chat_chunk("word ")] * (1 + number % 7), FINISH, usage_of(number), DONE, gap=gap)


@dataclass
class Ledger:
    """What the clients know of every request they sent."""

    finished: set[int] = field(default_factory=set)
    cut: set[int] = field(default_factory=set)
    refused: Counter[int] = field(default_factory=Counter)
    unreachable: int = 0
    faults: list[str] = field(default_factory=list)


class Load:
    """Clients in threads that ask without a pause until they are stopped."""

    def __init__(self, daemon: Daemon) -> None:
        self.ledger = Ledger()
        self._daemon = daemon
        self._token = daemon.token()
        self._lock = threading.Lock()
        self._next = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    @property
    def done(self) -> int:
        return len(self.ledger.finished)

    def stop(self) -> Ledger:
        self._stop.set()
        for thread in self._threads:
            thread.join(40)
            assert not thread.is_alive(), "a client hangs"
        return self.ledger

    def _run(self) -> None:
        sock: socket.socket | None = None
        while not self._stop.is_set():
            with self._lock:
                self._next += 1
                number = self._next
            try:
                if sock is None:
                    sock = socket.create_connection(("127.0.0.1", self._daemon.port), 30)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            except OSError:
                self.ledger.unreachable += 1
                time.sleep(0.02)
                continue
            try:
                keep = self._ask(sock, number)
            except CUT:
                self.ledger.cut.add(number)
                keep = False
            except Exception as error:  # what a client must never see: shown by the comparison
                self.ledger.faults.append(f"{number}: {error!r}")
                keep = False
            if not keep or number % 5 == 0:
                sock.close()
                sock = None
        if sock is not None:
            sock.close()

    def _ask(self, sock: socket.socket, number: int) -> bool:
        body = {
            "model": "m",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": str(number)}],
        }
        sock.sendall(request_bytes("/v1/chat/completions", body, self._token, X_Request_Id=f"k-{number}"))
        reply = Reply(sock)
        data = reply.body()
        if reply.status != 200:
            self.ledger.refused[reply.status] += 1
            return reply.header("connection") != "close"
        if not reply.ended:
            self.ledger.cut.add(number)
            return False
        expected = chat_chunk("word ") * (1 + number % 7) + FINISH + usage_of(number) + DONE
        if data != expected:
            self.ledger.faults.append(f"{number}: a finished stream of other bytes: {data!r}")
        self.ledger.finished.add(number)
        return reply.header("connection") != "close"


class Killer:
    """Knows every process that the node ever had, and kills them."""

    def __init__(self, daemon: Daemon, rng: random.Random) -> None:
        self._daemon = daemon
        self._rng = rng
        self.family: set[int] = set()
        self.restarts = 0
        self.note()

    def note(self) -> None:
        self.family.update(self._daemon.children())

    def strike(self, what: str) -> None:
        """`what`: worker, telemetry, both (one of each) or master, which is started again as systemd would."""
        if what in ("worker", "both"):
            self._kill(f"worker {self._rng.randrange(3)}")
        if what in ("telemetry", "both"):
            self._kill("telemetry")
        if what == "master":
            process = self._daemon.process
            assert process is not None
            self.note()
            process.kill()
            process.wait()
            self.revive()

    def revive(self) -> None:
        """Restart=always: another start while the addresses are not free yet."""
        until = time.monotonic() + 30
        while True:
            self.restarts += 1
            try:
                self._daemon.start()
                break
            except AssertionError:
                assert time.monotonic() < until, self._daemon.log()[-3000:]
        self.note()

    def _kill(self, title: str) -> None:
        # A slot may be empty for a moment: its last process was killed a round ago.
        pid = wait_for(lambda: self._find(title), 20)
        self.family.add(pid)
        os.kill(pid, signal.SIGKILL)

    def _find(self, title: str) -> int | None:
        with contextlib.suppress(AssertionError):
            return self._daemon.child(title, 0)
        return None

    def wait_gone(self) -> None:
        """Until nothing of the family lives: only then the spools are closed."""
        assert self._daemon.process is not None
        mine = {pid for pid in self.family if _is_proxyd(pid)} - set(self._daemon.children())
        wait_for(lambda: not any(_is_proxyd(pid) for pid in mine), 30)


def _is_proxyd(pid: int) -> bool:
    """A living process of ours: a zombie has no command line, a stranger with the same number another one."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"proxyd: ")
    except OSError:
        return False


def counters(daemon: Daemon) -> dict[tuple[str, str], float]:
    """Everything on /metrics that may only grow."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(daemon.admin("/metrics")[1].decode()):
        if family.type not in ("counter", "histogram"):
            continue
        for sample in family.samples:
            found[sample.name, json.dumps(sample.labels, sort_keys=True)] = sample.value
    return found


def fallen(before: dict[tuple[str, str], float], after: dict[tuple[str, str], float]) -> list[str]:
    """The counters that went down or away."""
    return [f"{key}: {value} -> {after.get(key)}" for key, value in before.items() if after.get(key, -1) < value]


# A strike at two places: the master dies while the database is away, telemetry while it is frozen.
DOUBLE = {"master_without_db": ("kill_db", "master"), "telemetry_without_db": ("freeze_db", "telemetry")}


def plan(rounds: int, rng: random.Random, store: tuple[str, ...] = ()) -> list[str]:
    """Of each dozen rounds seven kill a worker, two telemetry, one both and two the master; and a database is struck in
    each of its ways."""
    dozen = ["worker"] * 7 + ["telemetry"] * 2 + ["both"] + ["master"] * 2 + [*store, *(DOUBLE if store else ())]
    strikes: list[str] = []
    while len(strikes) < rounds:
        rng.shuffle(dozen)
        strikes += dozen
    return strikes[:rounds]


def strike(what: str, killer: Killer, store: Store) -> None:
    """One round's blow, wherever it goes. Of two the first lasts until the second is done."""
    if what in DOUBLE:
        first, second = DOUBLE[what]
        blow = threading.Thread(target=store.strike, args=(first,))
        blow.start()
        killer.strike(second)
        blow.join()
    elif what in store.strikes:
        store.strike(what)
    else:
        killer.strike(what)


def run(folder: Path, rounds: int, seed: int, say: bool = False, kind: str = "sqlite") -> Counter[str]:
    """The whole trial; raises AssertionError with every broken promise. Returns what was counted."""
    rng = random.Random(seed)
    with open_store(kind, rng) as store:
        return _run(folder, rounds, seed, rng, store, say)


def _run(folder: Path, rounds: int, seed: int, rng: random.Random, store: Store, say: bool) -> Counter[str]:
    upstream = Upstream(short_stream)
    problems: list[str] = []
    try:
        with node(folder, upstream, server="workers = 3", **store.telemetry()) as daemon:
            store.prepare(daemon.config)
            killer = Killer(daemon, rng)
            load = Load(daemon)
            try:
                wait_for(lambda: load.done > 20, 20)
                for number, what in enumerate(plan(rounds, rng, store.strikes)):
                    before = {} if what.startswith("master") else counters(daemon)
                    done = load.done
                    strike(what, killer, store)
                    wait_for(lambda: load.done >= done + 30, 40)  # noqa: B023  the node serves on
                    killer.note()
                    if before:
                        problems += fallen(before, counters(daemon))
                    time.sleep(rng.random() * 0.2)
                    if say:
                        print(f"round {number + 1}: {what}, {load.done} finished", flush=True)
            finally:
                ledger = load.stop()
            store.heal()
            killer.wait_gone()
            wait_for(lambda: daemon.metric("proxyd_streams_active") == 0, 20)
            wait_for(lambda: daemon.metric("proxyd_upstream_connections", state="busy") == 0, 20)
            reached = {int(seen.json["messages"][0]["content"]) for seen in list(upstream.requests)}
            wait_for(lambda: len(store.rows(daemon)) >= len(reached | ledger.finished), 60)
            assert daemon.stop() == 0
        found = store.rows(daemon)
        problems += compare(found, ledger, reached)
    finally:
        upstream.close()
    statuses = Counter(row["status"] for row in found)
    assert not problems, f"seed {seed}: {len(problems)} broken promises\n" + "\n".join(problems[:20])
    return Counter(
        finished=len(ledger.finished),
        cut=len(ledger.cut),
        unreachable=ledger.unreachable,
        master_starts=killer.restarts,
        **{f"rows_{status}": count for status, count in statuses.items()},
        **{f"refused_{status}": count for status, count in ledger.refused.items()},
    )


def compare(found: list[dict[str, Any]], ledger: Ledger, reached: set[int]) -> list[str]:
    """Every broken promise in words. A stream that the client saw end is completed, with the provider's counts, whoever
    died in the turn that would have written its row; a cut one may be either."""
    problems = list(ledger.faults)
    rows: dict[int, dict[str, Any]] = {}
    for row in found:
        number = int(row["request_id"].removeprefix("k-"))
        if number in rows:
            problems.append(f"{number}: a second row: {row}, first {rows[number]}")
        rows[number] = row
    for number in sorted(ledger.finished | reached):
        row = rows.get(number)
        if row is None:
            problems.append(f"{number}: no row; finished {number in ledger.finished}, upstream {number in reached}")
        elif number in ledger.finished:
            if (row["prompt_tokens"], row["completion_tokens"]) != counts_of(number):
                problems.append(f"{number}: wrong counts, expected {counts_of(number)}: {row}")
            if (row["status"], row["estimated"]) != ("completed", 0):
                problems.append(f"{number}: finished, yet {row}")
    for number in sorted(ledger.cut & rows.keys()):
        if rows[number]["status"] not in ("interrupted", "completed"):
            problems.append(f"{number}: cut, yet {rows[number]}")
    for number in sorted(rows.keys() - ledger.finished - ledger.cut):
        problems.append(f"{number}: a row of a request that was refused or never sent: {rows[number]}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--store", choices=["sqlite", "mariadb"], default="sqlite")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="proxyd-kill-") as folder:
        for key, value in sorted(run(Path(folder), args.rounds, args.seed, True, args.store).items()):
            print(f"{key:>20} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
