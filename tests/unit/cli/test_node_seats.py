"""How many workers of all generations there may be."""

from __future__ import annotations

import pytest

from proxyd.host import limits
from proxyd.shm.region import SEATS_MAX, SEATS_MOST, count_seats


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 8, 12])
def test_forty_renewals_in_a_row_find_room_though_every_worker_before_has_streams(workers: int) -> None:
    assert count_seats(workers) >= 41 * workers


@pytest.mark.parametrize("workers", [1, 16, 64, 512])
def test_eight_generations_always_do(workers: int) -> None:
    assert count_seats(workers) >= 8 * workers


def test_the_region_holds_them_with_telemetry_and_the_master() -> None:
    assert count_seats(512) == SEATS_MOST <= SEATS_MAX - 2


def test_a_limit_of_open_files_that_has_no_room_for_their_sockets_is_refused() -> None:
    assert limits.decide(16, 200, count_seats(1)).is_enough is False
    assert limits.decide(16, 400, count_seats(1)).is_enough
