"""Byte pair encoding in Python, the slow and plain way: the oracle of the compiled ``proxyd._bpe``."""

from __future__ import annotations

import base64
import itertools


def ranks_of(data: bytes) -> dict[bytes, int]:
    """The tokens of a .tiktoken text."""
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def encode(ranks: dict[bytes, int], piece: bytes) -> list[int]:
    """The ranks of a piece's tokens: of all neighbours that make a token those of the lowest rank are joined first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[at : at + 1] for at in range(len(piece))]
    while True:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        if not joined or min(joined) == len(ranks):
            return [ranks[part] for part in parts]
        at = joined.index(min(joined))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
