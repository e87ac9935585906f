"""The compiled byte pair encoding: against its twin, on damaged files, and on pieces that are made to be slow."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd._bpe import Vocabulary
from tests.unit.dialects.bpe_twin import encode, ranks_of

FILE = Path(__file__).resolve().parents[3] / "proxyd" / "data" / "o200k_base.tiktoken"
SINGLE = [bytes((byte,)) for byte in range(256)]


def written(tokens: list[bytes]) -> bytes:
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def o200k() -> Vocabulary:
    return Vocabulary(FILE.read_bytes())


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return ranks_of(FILE.read_bytes())


def test_every_token_of_the_file_is_one_token(o200k: Vocabulary, ranks: dict[bytes, int]) -> None:
    assert len(o200k) == len(ranks) == 199_998
    assert all(o200k.encode(token) == [rank] for token, rank in ranks.items())


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda text: text.encode()))
def test_any_piece_is_told_as_the_twin_tells_it(o200k: Vocabulary, ranks: dict[bytes, int], piece: bytes) -> None:
    found = o200k.encode(piece)
    assert found == (encode(ranks, piece) if piece else [])
    assert o200k.count(piece) == len(found)


@pytest.mark.parametrize("piece", [b"a", b"ab", b"-", b" ", b"\xff", "日".encode(), b"aB", "ы".encode(), b"\0"])
def test_runs_are_told_as_the_twin_tells_them_at_every_length(
    o200k: Vocabulary, ranks: dict[bytes, int], piece: bytes
) -> None:
    for count in (2, 3, 31, 32, 33, 47, 48, 49, 95, 96, 97, 98, 193, 400):
        run = (piece * count)[: count + 1]
        assert o200k.encode(run) == encode(ranks, run), count


def test_a_small_vocabulary_of_random_tokens_is_told_as_the_twin_tells_it() -> None:
    rng = random.Random(3)
    for _ in range(30):
        more = {bytes(rng.choices(b"abc", k=rng.randint(2, 12))) for _ in range(rng.randint(0, 60))}
        tokens = SINGLE + rng.sample(sorted(more), len(more))
        data = written(tokens)
        vocabulary, ranks = Vocabulary(data), ranks_of(data)
        for _ in range(50):
            piece = bytes(rng.choices(b"abcd", k=rng.randint(1, 150)))
            assert vocabulary.encode(piece) == encode(ranks, piece)


def test_pieces_are_counted_together() -> None:
    vocabulary = Vocabulary(written([*SINGLE, b"ab", "é".encode()]))
    assert vocabulary.count_all(["ab", "", "é", "aab"]) == 1 + 0 + 1 + 2
    assert vocabulary.count_all([]) == 0
    with pytest.raises(UnicodeEncodeError):
        vocabulary.count_all(["\ud800"])


@pytest.mark.parametrize("unit", [b"a", b"ab", b" ", b"\xff", bytes(range(256)), "日本語".encode(), b"\n\t"])
def test_the_largest_piece_ends_and_a_larger_one_is_refused(o200k: Vocabulary, unit: bytes) -> None:
    largest = (unit * 65536)[:65536]
    assert 0 < o200k.count(largest) <= 65536
    with pytest.raises(ValueError, match="65536"):
        o200k.count(largest + b"x")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "1 to 262143"),
        (b"\n", "line 1.*base64"),
        (b"IQ==", "line 1.*base64"),
        (b"IQ== 0\nIg== 2\n", "line 2.*rank is not 1"),
        (b"IQ== 0\nIg== \n", "line 2.*rank is not 1"),
        (b"IQ== 0\nIg== 1x\n", "line 2.*rank is not 1"),
        (b"IQ== 0\nIg== 11111111111111111111111\n", "line 2.*rank is not 1"),
        (b"IQ== 0\nIQ== 1\n", "line 2.*before"),
        (b"IQ= 0\n", "line 1.*base64"),
        (b"IQ=== 0\n", "line 1.*base64"),
        (b"I 0\n", "line 1.*base64"),
        (b"==== 0\n", "line 1.*base64"),
        (b"I?== 0\n", "line 1.*base64"),
        (b"IQ==\0 0\n", "line 1.*base64"),
        (b"IQ== 0\n\nIg== 1\n", "line 2.*base64"),
        (b"IQ== 0", "byte 0"),
        (written(SINGLE[:255]), "byte 255"),
        (b"IQ== 0\n" * 262144, "1 to 262143"),
    ],
)
def test_what_is_no_vocabulary_is_refused_with_its_line(data: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Vocabulary(data)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_the_last_line_may_end_in_any_way(end: bytes) -> None:
    data = written(SINGLE)
    assert len(Vocabulary(data[:-1] + end)) == 256


def test_a_vocabulary_cut_or_damaged_anywhere_is_refused_or_read_whole() -> None:
    data = written([*SINGLE, b"ab", b"abc"])
    rng = random.Random(5)
    for at in range(len(data)):
        for damaged in (data[:at], data[:at] + bytes((rng.randrange(256),)) + data[at + 1 :]):
            try:
                vocabulary = Vocabulary(damaged)
            except ValueError:
                continue
            assert vocabulary.count(b"abcd" * 40) > 0
