from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.telemetry.world import Disk, World


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


@pytest.fixture
def disk() -> Disk:
    return Disk()
