"""The last moment in which a worker that ends reads what its newest connections sent."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from proxyd.worker.services import WorkerServices


class Loop:
    """Keeps timers instead of running them."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay: float, callback: Callable[..., None], *given: Any) -> Timer:
        self.timers.append(Timer(callback, given))
        return self.timers[-1]


class Timer:
    def __init__(self, callback: Callable[..., None], given: tuple[Any, ...]) -> None:
        self._callback, self._given = callback, given
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True

    def fire(self) -> None:
        if not self.is_cancelled:
            self._callback(*self._given)


def test_who_is_accepted_at_the_end_has_all_of_it_though_it_began_for_others_before() -> None:
    loop, drained = Loop(), list[bool]()
    services: Any = object.__new__(WorkerServices)
    services._last_read = None
    services._blueprint = SimpleNamespace(keeps_listeners=False)
    services._context = SimpleNamespace(loop=loop)
    services._door = SimpleNamespace(drain=lambda fresh_only: drained.append(fresh_only))
    services._begin_last_read()  # refuse()
    services._begin_last_read()  # stop_accepting(), a moment later
    first, second = loop.timers
    first.fire()
    assert drained == []
    assert services._last_read is second
    second.fire()
    assert drained == [True]
    assert services._last_read is None
