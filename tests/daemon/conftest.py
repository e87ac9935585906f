"""Fixtures of the process tests: scripted upstreams, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.daemon.harness import Script, Upstream
from tests.daemon.mariadb import mariadb as mariadb


@pytest.fixture
def upstream() -> Iterator[Callable[[Script], Upstream]]:
    """Makes scripted upstreams; all are closed when the test ends."""
    made: list[Upstream] = []

    def make(script: Script) -> Upstream:
        made.append(Upstream(script))
        return made[-1]

    yield make
    for one in made:
        one.close()
