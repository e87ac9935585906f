"""Processes that meet at one instant and then race, for tests of what they share."""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from proxyd._shm import Words

SLOTS = 8
GO, INSIDE, WRONG, STOP = range(4)  # words that the test's processes share
PATIENCE_S = 120.0


def shared_words() -> Words:
    return Words(mmap.mmap(-1, 4096), 0, 512)


class Process:
    """A fork that runs `work` and sends back what it returns. It ends with PATIENCE_S, whatever becomes of us."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._end, end = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(end)
            return
        try:
            os.close(self._end)
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGALRM):
                signal.signal(number, signal.SIG_DFL)
            signal.alarm(int(PATIENCE_S))
            with os.fdopen(end, "wb") as file:
                file.write(pickle.dumps(work()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def result(self) -> Any:
        with os.fdopen(self._end, "rb", closefd=False) as file:
            data = file.read()
        self._close()
        assert data, "a process of the test failed, or did not end"
        return pickle.loads(data)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self._close()

    def _close(self) -> None:
        os.close(self._end)
        os.waitpid(self.pid, 0)


def meet(words: Words, turn: int, count: int) -> None:
    """Returns when `count` processes are at this turn: within a fraction of a microsecond, if each has a core."""
    words.add(GO, 1)
    spins = 0
    while words.load(GO) < count * (turn + 1):
        spins += 1
        if spins > 300:
            os.sched_yield()
        if spins > 10**7:
            raise AssertionError("the others do not come")


def together(words: Words, slot: int) -> Iterator[int]:
    """Turns that two processes begin at the same instant: 10,000, or on a busy machine what they manage in 5 s."""
    until = time.monotonic() + 5
    for turn in range(10_000):
        if slot == 0 and turn and time.monotonic() > until:
            words.store(STOP, turn)
        meet(words, turn, 2)
        if turn and words.load(STOP) == turn:
            return
        yield turn


def all_at_once(work: Callable[[int], Any], count: int = SLOTS) -> list[Any]:
    """work(slot), each in a process of its own; they begin when all are there."""
    words = shared_words()

    def run(slot: int) -> Any:
        meet(words, 0, count)
        return work(slot)

    processes = [Process(functools.partial(run, slot)) for slot in range(count)]
    return [process.result() for process in processes]
