"""The compiled unframer against its pure twin, on good and bad chunks."""

from __future__ import annotations

import random
from typing import Any

from proxyd._frame import BODY_CHUNKED, Unframer
from proxyd.wire.framing import Dechunker, FramingError


def test_the_unframer_and_its_twin_agree_on_good_and_bad_framing() -> None:
    rng = random.Random(3)
    alphabet = [
        b"0\r\n",
        b"5\r\n",
        b"hello",
        b"\r\n",
        b"\n",
        b"\r",
        b"A;x=y\r\n",
        b"0123456789",
        b"zz",
        b"-1\r\n",
        b" ",
        b"T: v\r\n",
    ]
    good = bad = 0
    for _ in range(20_000):
        data = b"".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9)))
        compiled, twin = Unframer(BODY_CHUNKED), Dechunker()
        try:
            got: Any = (compiled.feed(data), compiled.done)
        except ValueError:
            got = None
        try:
            wanted: Any = (twin.feed(data), twin.done)
        except FramingError:
            wanted = None
        if got is None:
            # The twin looks at whole lines: it may not have seen the fault yet, but it is not content either.
            assert wanted is None or not wanted[1], data
            bad += 1
        else:
            assert got == wanted, data
            good += 1
    assert good > 1000
    assert bad > 1000
