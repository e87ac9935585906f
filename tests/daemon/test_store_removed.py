"""telemetry.db is taken away from a running daemon: what ends from then on is in the file at the path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon.harness import CHAT, DONE, Daemon, Upstream, ask, node, wait_for
from tests.daemon.test_spool_faults import Paced, events

PATH = "/v1/chat/completions"
Make = Callable[..., Upstream]


def remove(folder: Path) -> None:
    for one in folder.glob("telemetry.db*"):
        one.unlink()


def rename(folder: Path) -> None:
    (folder / "telemetry.db").rename(folder / "old.db")


def shoot(daemon: Daemon, name: str, count: int) -> list[str]:
    names = [f"{name}-{n}" for n in range(count)]
    for one in names:
        assert DONE in ask(daemon, PATH, CHAT, X_Request_Id=one).body()
    return names


@pytest.mark.parametrize("take", [remove, rename])
def test_rows_go_on_into_a_new_file_and_the_operator_is_told(
    upstream: Make, tmp_path: Path, take: Callable[[Path], None]
) -> None:
    with node(tmp_path, upstream(Paced())) as daemon:
        shoot(daemon, "before", 3)
        daemon.wait_rows(3)
        take(tmp_path)
        expected = Counter(shoot(daemon, "after", 5))
        wait_for(lambda: Counter(row["request_id"] for row in daemon.rows()) == expected)
        assert any("removed or replaced while in use" in one["reason"] for one in events(daemon, "store_failed"))
        wait_for(lambda: events(daemon, "store_recovered"))
