"""What all tests of this room begin with."""

from __future__ import annotations

import pytest

from proxyd.dialects.tokens import O200K


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> None:
    """Loaded before the first count, so that none is a quarter of bytes by chance."""
    O200K.load()
    assert O200K.is_ready, O200K.take_trouble()
