"""A limit a minute under a load just below and just above it, for some minutes.

Owns: the load and the judgement. `python -m tests.daemon.limit_rates [--minutes 2.5]` runs both limits at 95 % and at
105 % of their rate, one after the other on one node each, and prints what passed. Nothing waits in CI for this: the
arithmetic of the window is in the unit tests.

At 95 % nothing may be refused. At 105 % what passes in any minute, counted here by the seconds at which the upstream
was asked, may not be more than 2 % above the limit; and once the window is full, not less than 2 % below it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.daemon.harness import CHAT, DONE, FINISH, USAGE, Upstream, Wire, chat_chunk, node
from tests.daemon.limit_stage import SPENT, request

# Requests a minute; tokens a minute that are as many requests.
REQUESTS = 1200
CLIENTS = 8
MINUTE_S = 60.0
MARGIN = 0.02


@dataclass
class Result:
    """Of one load: when each request that passed came to the upstream, when each that was refused was."""

    name: str
    share: float
    passed: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    other: int = 0
    minutes: float = 0.0

    def most_in_a_minute(self) -> int:
        """The fullest minute, wherever it begins."""
        most = first = 0
        for at, moment in enumerate(self.passed):
            while self.passed[first] <= moment - MINUTE_S:
                first += 1
            most = max(most, at - first + 1)
        return most

    def last_minute(self) -> int:
        end = self.passed[-1]
        return sum(moment > end - MINUTE_S for moment in self.passed)

    def judge(self) -> list[str]:
        """What is wrong."""
        wrong = []
        if self.other:
            wrong.append(f"{self.other} answers were neither 200 nor 429")
        if self.most_in_a_minute() > REQUESTS * (1 + MARGIN):
            wrong.append("more passed in a minute than the limit and 2 %")
        if self.share < 1 and self.refused:
            wrong.append("refused below the limit")
        if self.share > 1 and self.minutes >= 2 and self.last_minute() < REQUESTS * (1 - MARGIN):
            wrong.append("less passed in the last minute than the limit less 2 %")
        if self.share > 1 and self.minutes >= 1.5 and not self.refused:
            wrong.append("nothing was refused above the limit")
        return wrong

    def text(self) -> str:
        return (
            f"{self.name} at {self.share:.0%}: {len(self.passed)} passed, {len(self.refused)} refused; fullest minute "
            f"{self.most_in_a_minute()}, last minute {self.last_minute()} of {REQUESTS}"
        )


def load(folder: Path, name: str, limits: str, share: float, minutes: float) -> Result:
    """A steady load of `share` times the limit's rate."""
    result = Result(name, share, minutes=minutes)
    lock = threading.Lock()

    def script(wire: Wire) -> None:
        with lock:
            result.passed.append(time.monotonic())
        wire.stream(chat_chunk("hello"), FINISH, USAGE, DONE)

    upstream = Upstream(script)
    try:
        with node(folder, upstream, server="workers = 8", limits=limits) as daemon:
            began = time.monotonic()
            every = MINUTE_S / (REQUESTS * share)
            total = int(minutes * REQUESTS * share)

            def client(number: int) -> None:
                token = daemon.token(1 + number)
                for at in range(number, total, CLIENTS):
                    time.sleep(max(0.0, began + at * every - time.monotonic()))
                    answer = request(daemon, token, {**CHAT, "max_tokens": 5})
                    with lock:
                        if answer.status == 429:
                            result.refused.append(answer.ended_at - began)
                        elif answer.status != 200:
                            result.other += 1

            threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        upstream.close()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.daemon.limit_rates", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.5)
    args = parser.parse_args()
    loads = [
        ("requests_per_minute", f"requests_per_minute = {REQUESTS}"),
        ("tokens_per_minute", f"tokens_per_minute = {REQUESTS * SPENT}"),
    ]
    wrong = 0
    for name, limits in loads:
        for share in (0.95, 1.05):
            with tempfile.TemporaryDirectory() as folder:
                result = load(Path(folder), name, limits, share, args.minutes)
            found = result.judge()
            wrong += len(found)
            print(f"{result.text()}: {'; '.join(found) or 'right'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
