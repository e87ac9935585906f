"""Requests that end in every way there is, workers killed among them, and what the ledger holds afterwards: nothing.

Owns: the ways to end, the load, the killer. `python -m tests.daemon.limit_ends --requests 10000 --kills 40` runs it for
as long as one likes; the suite runs a thousand.

    clients --number--> node (8 workers, all limits set) --number--> upstream, which ends as the number says
       '- leave, as it says        ^ kill -9, now and then
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon.harness import CHAT, DONE, FINISH, USAGE, Daemon, Reply, Upstream, Wire, chat_chunk, node, wait_for
from tests.daemon.limit_stage import PATH, House, finish, request, send, side_by_side, wait_until_nothing_is_held

PLACES = 24
CLIENTS = 16
WAYS = (
    "whole", "json", "refused", "failed", "cut", "broken", "closed before the head", "silent", "no end",
    "client leaves at once", "client leaves before the head", "client leaves within", "count_tokens",
)  # fmt: skip


def end_as_asked(wire: Wire) -> object:
    """The upstream's script."""
    number = int(wire.seen.json["messages"][0]["content"])
    match WAYS[number % len(WAYS)]:
        case "json":
            usage = {"prompt_tokens": 11, "completion_tokens": 5}
            wire.json({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}], "usage": usage})
        case "refused":
            wire.json({"error": {"message": "no", "type": "invalid_request_error"}}, 400)
        case "failed":
            wire.json({"error": {"message": "no", "type": "api_error"}}, 500)
        case "cut":
            wire.stream(chat_chunk("half "), end=False)
            wire.reset()
            return False
        case "broken":
            wire.head(transfer_encoding="chunked")
            wire.chunk(chat_chunk("half "))
            wire.send(b"no chunk\r\n")
            return False
        case "closed before the head":
            return False
        case "silent":
            wire.stream(chat_chunk("half "), end=False)
            wire.wait_closed(10)
            return False
        case "no end":
            wire.stream(chat_chunk("hello"), end=True)
        case "client leaves before the head":
            wire.wait_closed(10)
            return False
        case "client leaves within":
            with contextlib.suppress(OSError):
                wire.head(transfer_encoding="chunked")
                for _ in range(500):
                    wire.chunk(chat_chunk("word "))
                    time.sleep(0.01)
            return False
        case "count_tokens":
            wire.json({"input_tokens": 3})
        case _:
            wire.stream(*[chat_chunk("word ")] * (1 + number % 5), FINISH, USAGE, DONE)
    return None


@dataclass
class Load:
    """`clients` threads that make `count` requests together. `told`: how often each status came, 0 for no answer."""

    daemon: Daemon
    count: int
    seed: int
    told: Counter[int] = field(default_factory=Counter)
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        side_by_side(CLIENTS, self._client)

    def _client(self, number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        tokens = [self.daemon.token(user, quota_remaining=10**9) for user in range(1 + number, 60, CLIENTS)]
        for at in range(number, self.count, CLIENTS):
            status = 0
            with contextlib.suppress(OSError):
                status = self._ask(at, rng, rng.choice(tokens))
            with self._lock:
                self.told[status] += 1
                self.done += 1

    def _ask(self, number: int, rng: random.Random, token: str) -> int:
        way = WAYS[number % len(WAYS)]
        body = {**CHAT, "stream": way != "json", "messages": [{"role": "user", "content": str(number)}]}
        path = PATH
        if way == "count_tokens":
            path, body = "/v1/messages/count_tokens", {**body, "model": "claude"}
            body.pop("stream")
        with send(self.daemon, token, body, path) as sock:
            if way == "client leaves at once":
                return 0
            if way == "client leaves before the head":
                time.sleep(rng.random() * 0.05)
                return 0
            if way != "client leaves within":
                return finish(sock).status
            reply = Reply(sock)
            next(reply.pieces(), b"")
            return reply.status


@dataclass
class Killer:
    """Kills random workers `kills` times, spread over the load."""

    load: Load
    kills: int
    killed: int = 0

    def run(self) -> None:
        rng = random.Random(self.load.seed)
        while self.killed < self.kills and self.load.done < self.load.count:
            due = self.load.count * (self.killed + 1) // (self.kills + 1)
            if self.load.done >= due:
                with contextlib.suppress(AssertionError, ProcessLookupError):
                    os.kill(self.load.daemon.child(f"worker {rng.randrange(8)}", 0), signal.SIGKILL)
                    self.killed += 1
            time.sleep(0.005)


def run(folder: Path, count: int, kills: int, seed: int) -> Counter[int]:
    """The load, then the proof: nothing is held, and all places are free. Raises AssertionError otherwise."""
    upstream, other = Upstream(end_as_asked), Upstream(end_as_asked)
    limits = f"concurrent_streams = {PLACES}\nrequests_per_minute = 10000000\ntokens_per_minute = 1000000000"
    try:
        with node(
            folder,
            upstream,
            anthropic=other,
            server="workers = 8",
            limits=limits,
            quota="tokens = 1000000000",
            more='idle_timeout = "300ms"\nfirst_byte_timeout = "2s"',
        ) as daemon:
            load = Load(daemon, count, seed)
            killer = Killer(load, kills)
            thread = threading.Thread(target=killer.run, daemon=True)
            thread.start()
            load.run()
            thread.join(30)
            assert load.done == count
            assert killer.killed == kills, f"{killer.killed} of {kills} workers were killed"
            wait_for(lambda: daemon.get("/readyz")[0] == 200, 30)
            wait_until_nothing_is_held(daemon, 60)
            house = House(every=0.05)
            upstream.script = house
            token = daemon.token(99)
            streams = [send(daemon, token) for _ in range(PLACES)]
            wait_for(lambda: house.inside == PLACES, 30)
            assert request(daemon, token).code == "concurrency_limit_exceeded"
            house.open.set()
            assert {finish(sock).status for sock in streams} == {200}
            wait_until_nothing_is_held(daemon, 60)
            return load.told
    finally:
        upstream.close()
        other.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.daemon.limit_ends", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        told = run(Path(folder), args.requests, args.kills, args.seed)
    by_status = ", ".join(f"{status}: {count}" for status, count in sorted(told.items()))
    print(f"{args.requests} requests, {args.kills} workers killed, {time.monotonic() - began:.0f} s")
    print(f"by status (0: no answer): {by_status}")
    print("held 0, running 0, permits 0, streams 0; all places free")
    return 0


if __name__ == "__main__":
    sys.exit(main())
