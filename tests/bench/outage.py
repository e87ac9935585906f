"""What requests feel of a database that is frozen, stopped and back: latency, the spool's growth, the drain.

    python -m tests.bench.outage [--seconds 30] [--rate 150] [--backlog 400000] [--rounds 1]

A real node with two workers, a MariaDB sink and a ceiling for every user; short streams (three events and the counts)
at a steady rate, well below what the node can do. Phases: normal, frozen (SIGSTOP), normal, away (stopped), then, with
a backlog of --backlog rows more put into the spool, back (draining) and normal. --seconds 600 is the real thing.
Budgets: p99 with the database away at most 1.05 times the normal one's around it (the phases before and after it); 120
bytes a record; 20,000 rows/s from the store's own count. Where the cores are shared, compare the normal phases first:
what they differ by is what such a run can tell.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from proxyd.telemetry.record import Kind, find_frame
from proxyd.telemetry.segment import HEADER_BYTES, directory_bytes, parse_header, spool_dir
from tests.bench.databases import database, favour, favoured, fill_spool, mariadb, percentile, start
from tests.bench.draining import count_of, telemetry_options, watch
from tests.bench.measure import host, table
from tests.bench.tools import BenchError, rig, wait_for
from tests.daemon.harness import CHAT, Daemon, config_text, free_port, model_text, request_bytes, upstream_text

BUDGET, BUDGET_BYTES, BUDGET_ROWS = 1.05, 120, 20_000
CONNECTIONS = 16
REST_S = 3.0  # after a change, before the next phase is measured
BODY = "bench rate=1000 bytes=250 events=3"


class Load(threading.Thread):
    """Clients with kept connections, in a thread; `begin(phase)` says where what is measured belongs."""

    def __init__(self, daemon: Daemon, rate: float) -> None:
        super().__init__(daemon=True)
        self._daemon_under_test, self._rate = daemon, rate
        self.phase = ""
        self.took: dict[str, list[float]] = {}
        self.faults: Counter[str] = Counter()
        self._is_over = False

    def begin(self, phase: str) -> None:
        self.took.setdefault(phase, [])
        self.phase = phase

    def end(self) -> None:
        self._is_over = True
        self.join(30)

    def run(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._client(number) for number in range(CONNECTIONS)))

    async def _client(self, number: int) -> None:
        rng = random.Random(number)
        body = {**CHAT, "messages": [{"role": "user", "content": BODY}]}
        request = request_bytes("/v1/chat/completions", body, self._daemon_under_test.token(user=100 + number))
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        due = time.monotonic() + rng.random()
        while not self._is_over:
            due += rng.uniform(0.5, 1.5) * CONNECTIONS / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            phase = self.phase
            began = time.perf_counter()
            try:
                if streams is None:
                    streams = await asyncio.open_connection("127.0.0.1", self._daemon_under_test.port)
                streams[1].write(request)
                async with asyncio.timeout(20):
                    answer = await streams[0].readuntil(b"0\r\n\r\n")
                if not answer.startswith(b"HTTP/1.1 200"):
                    raise ConnectionError(answer[:12].decode("latin-1"))
            except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
                self.faults[f"{phase}: {type(error).__name__} {error}"] += 1
                streams = None
                continue
            if phase == self.phase and phase:
                self.took[phase].append((time.perf_counter() - began) * 1e3)


def spool_records(folder: Path) -> tuple[Counter[str], int]:
    """Records by kind in the node's segments, and their bytes."""
    kinds: Counter[str] = Counter()
    size = 0
    for path in spool_dir(folder).glob("*.spool"):
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
            header = parse_header(data)
            if header is None:
                continue
            at = HEADER_BYTES + header.carried_bytes
            while (frame := find_frame(data, at, header.seed)) is not None:
                kinds[Kind(frame.kind).name.lower()] += 1
                size += frame.end - at
                at = frame.end
    return kinds, size


def measure(load: Load, phase: str, seconds: float) -> None:
    load.begin(phase)
    time.sleep(seconds)
    load.begin("")
    took = load.took[phase]
    print(
        f"{phase:24} {len(took):6} requests, p50 {percentile(took, 0.5):.2f}, p99 {percentile(took, 0.99):.2f} ms",
        flush=True,
    )


def print_phases(load: Load, rounds: int) -> None:
    rows, verdicts = [], []
    p99 = {phase: percentile(took, 0.99) for phase, took in load.took.items()}
    for phase, took in load.took.items():
        if phase:
            shares = [f"{percentile(took, share):.2f}" for share in (0.5, 0.9, 0.99, 0.999)]
            rows.append([phase, f"{len(took):,}", *shares, f"{max(took, default=0):.1f}"])
    print("\n" + table(["phase", "requests", "p50 ms", "p90", "p99", "p99.9", "longest"], rows))
    pooled = [value for phase, took in load.took.items() if phase.startswith("normal") for value in took]
    normals = [value for phase, value in p99.items() if phase.startswith("normal")]
    for name in ("frozen", "away"):
        took = [value for phase, values in load.took.items() if phase.startswith(name) for value in values]
        ratio = percentile(took, 0.99) / max(percentile(pooled, 0.99), 1e-9)
        half = percentile(took, 0.5) / max(percentile(pooled, 0.5), 1e-9)
        word = "within" if ratio <= BUDGET else "OVER"
        verdicts.append(f"{name}: p99 {ratio:.3f} times normal ({word} the budget of {BUDGET}), p50 {half:.3f} times")
    verdicts.append(f"the normal phases' own p99s: {min(normals):.2f} to {max(normals):.2f} ms")
    print("\n".join(verdicts))
    for fault, count in load.faults.most_common(10):
        print(f"FAULT {count} x {fault}")


def make_node(folder: Path, upstream_port: int, sink: str) -> Daemon:
    text = upstream_text(f"http://127.0.0.1:{upstream_port}/v1") + model_text("*", 1, '["openai"]')
    port = free_port()
    quota = f"tokens = {10**15}\n"
    config = config_text(
        folder, port, text, server="workers = 2\n", telemetry=sink, quota=quota, log='access = "off"\n'
    )
    daemon = Daemon(folder, config)
    daemon.port = port
    daemon.start()
    for pid in [daemon.process.pid if daemon.process else 0, *daemon.children()]:
        favour(pid)
    return daemon


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="outage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="of each phase")
    parser.add_argument("--rate", type=float, default=150, help="requests a second")
    parser.add_argument(
        "--backlog", type=int, default=400_000, help="rows more in the spool before the database is back"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of normal, frozen, normal, away")
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        stack.enter_context(favoured())
        made_rig = stack.enter_context(rig())
        print(f"host: {host()}", flush=True)
        _, upstream_port = made_rig.start_listener("upstream", core=made_rig.cores.load)
        server = stack.enter_context(mariadb())
        made = database(server)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="proxyd-bench-")))
        waiting = 0
        daemon = make_node(folder, upstream_port, telemetry_options(made))
        stack.callback(daemon.kill)
        load = Load(daemon, options.rate)
        load.start()
        stack.callback(load.end)
        time.sleep(REST_S)
        for number in range(1, options.rounds + 1):
            measure(load, f"normal {number}a", options.seconds)
            server.freeze()
            time.sleep(REST_S)
            measure(load, f"frozen {number}", options.seconds)
            server.thaw()
            time.sleep(REST_S)
            measure(load, f"normal {number}b", options.seconds)
            server.stop()
            time.sleep(REST_S)
            kinds, size = spool_records(folder)
            measure(load, f"away {number}", options.seconds)
            later, later_size = spool_records(folder)
            later.subtract(kinds)
            is_last = number == options.rounds
            if is_last:
                fill_spool(folder, options.backlog)
                waiting = directory_bytes(spool_dir(folder))
            start(server)
            if not is_last:
                time.sleep(REST_S)
        load.begin("back, draining")
        drained = watch(made, count_of(made)(), options.backlog, daemon.child("telemetry"), server.pid)
        load.begin("")
        time.sleep(REST_S)
        measure(load, "normal, afterwards", options.seconds)
        load.end()
        print_phases(load, options.rounds)
        records, grown = sum(later.values()), later_size - size
        each = ", ".join(f"{count / max(later['final'], 1):.2f} {kind}s" for kind, count in sorted(later.items()))
        per = grown / max(records, 1)
        word = "within" if per <= BUDGET_BYTES else "OVER"
        print(
            f"the spool grew by {per:.1f} bytes a record ({word} the budget of {BUDGET_BYTES}),"
            f" {grown / max(later['final'], 1):.0f} a transaction ({each})"
        )
        word = "within" if drained.rows_per_s >= BUDGET_ROWS else "UNDER"
        print(
            f"drained at {drained.rows_per_s:,.0f} rows/s, with the load beside it, of {waiting / 1e6:.0f} MB"
            f" ({word} the budget of {BUDGET_ROWS:,}); telemetry {drained.telemetry_us:.1f} us/row,"
            f" server {drained.server_us:.1f} us/row"
        )
        wait_for(lambda: _is_drained(daemon), 60, "the spool's end")
        stored, accepted = (
            int(made.query("SELECT COUNT(*) FROM sys_ai_transactions")[0][0]),
            daemon.metric("proxyd_telemetry_rows_total", state="stored"),
        )
        print(f"rows in the store {stored:,}, by the node's count {accepted:,.0f}")
        code = daemon.stop()
        print(f"exit code {code}; at the end: {host()}")
    return 0


def _is_drained(daemon: Daemon) -> bool:
    return int(json.loads(daemon.admin("/status")[1])["telemetry"]["spool_bytes"]) == 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
