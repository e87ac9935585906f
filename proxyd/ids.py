"""Names that we give to requests and to process lives.

Owns: request ids and epochs. Must not know: where they travel.
"""

from __future__ import annotations

import os
import re

# An id that a trusted proxy may send: it lands in log lines, headers and rows, so nothing that needs quoting anywhere.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")

_WITHIN = 0xFFFF  # of an epoch: what tells the processes of one node's life from each other


def new_request_id() -> str:
    """A fresh id of 32 hex digits (128 random bits: no two requests of a node's life share one)."""
    return os.urandom(16).hex()


def is_request_id(value: bytes) -> bool:
    """True for 1 to 64 bytes of `A-Za-z0-9._-`, the only ids that we take over from a trusted proxy."""
    return _REQUEST_ID.fullmatch(value) is not None


def new_epoch(life: int = 0) -> int:
    """A random nonzero 32-bit number that tells one life of a process or stream from the next; 0 means none.

    `life`: an epoch of the same node's life, its master's; they share the upper half, which tells them from those of
    another life (but once in 65,536 lives).
    """
    while True:
        epoch = int.from_bytes(os.urandom(4), "little")
        if life:
            epoch = life & ~_WITHIN | epoch & _WITHIN
        if epoch:
            return epoch


def is_same_life(epoch: int, other: int) -> bool:
    """True when both are of one node's life, that of the master that drew them."""
    return epoch | _WITHIN == other | _WITHIN
