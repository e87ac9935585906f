"""Records: what goes in comes out, and nothing damaged comes out at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.telemetry.record import (
    MAX_FRAME_BYTES,
    STATUSES,
    Checkpoint,
    Final,
    Intent,
    Kind,
    decode_checkpoint,
    decode_final,
    decode_intent,
    encode_checkpoint,
    encode_final,
    encode_intent,
    ending_of,
    find_frame,
    read_ending,
)
from tests.unit.telemetry.world import checkpoint, final, intent

SEED = 0xDEADBEEF
U32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=70)


def frame_of(data: bytes):
    frame = find_frame(data, 0, SEED)
    assert frame is not None
    assert frame.end == len(data) <= MAX_FRAME_BYTES
    return frame


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), U32, TEXT, TEXT, TEXT)
def test_an_intent_survives_the_disk(
    txn: int, user: int, prompt: int, tenant: str, request_id: str, upstream: str
) -> None:
    record = Intent(txn, request_id, user, tenant, 65535, upstream, 1_700_000_000.25, prompt)
    frame = frame_of(encode_intent(record, SEED))
    assert frame.kind == Kind.INTENT
    expected = record._replace(tenant=cut(tenant), request_id=cut(request_id), upstream=cut(upstream))
    assert decode_intent(frame.txn, frame.payload) == expected


def cut(text: str) -> str:
    data = text[:64].encode()
    return text[:64] if len(data) <= 255 else data[:252].decode()


@given(st.lists(U32, min_size=6, max_size=6), st.sampled_from(STATUSES), st.booleans(), st.integers(0, 255))
def test_a_final_survives_the_disk(counts: list[int], status: str, estimated: bool, attempts: int) -> None:
    record = Final(
        7,
        2**64 - 1,
        0,
        *counts[:2],
        1_700_000_000.5,
        "t",
        "r",
        status,
        int(estimated),
        *counts[2:4],
        "u",
        attempts,
        *counts[4:],
    )
    frame = frame_of(encode_final(record, SEED, 1_700_000_002.5))
    assert decode_final(frame.txn, frame.payload) == record._replace(accepted_at=1_700_000_002.5)


def test_a_checkpoint_survives_the_disk() -> None:
    record = Checkpoint(9, 1, 2, 3, 4, 5, 6, 7, "other", ending_of("upstream_error", True))
    frame = frame_of(encode_checkpoint(record, SEED))
    assert decode_checkpoint(frame.txn, frame.payload) == record


def test_numbers_beyond_their_column_are_clamped_to_it() -> None:
    frame = frame_of(encode_final(final(1, prompt_tokens=2**40, completion_tokens=-1, attempts=300), SEED, 0.0))
    back = decode_final(1, frame.payload)
    assert (back.prompt_tokens, back.completion_tokens, back.attempts) == (2**32 - 1, 0, 255)


def test_a_string_that_utf8_cannot_hold_does_not_lose_the_record() -> None:
    frame = frame_of(encode_intent(intent(1, tenant="a\ud800b"), SEED))
    assert decode_intent(1, frame.payload).tenant == "a?b"


def test_the_longest_strings_fit() -> None:
    wide = "\U0001f600" * 64
    frame = frame_of(encode_final(final(1, wide, tenant=wide, upstream=wide), SEED, 0.0))
    assert decode_final(1, frame.payload).tenant == wide[:63]


@pytest.mark.parametrize("tenant", ["default", "t" * 12])
def test_a_record_with_realistic_names_takes_at_most_120_bytes_of_the_spool(tenant: str) -> None:
    """Whatever its counts are: they have a fixed width."""
    names = {"tenant": tenant, "upstream": "openai"}
    request_id, most = "0123456789abcdef" * 2, {"user_id": 2**64 - 1, "model_id": 2**16 - 1}
    counts = {"prompt_tokens": 2**32 - 1, "completion_tokens": 2**32 - 1, "duration_ms": 2**32 - 1, "attempts": 255}
    sizes = {
        "intent": len(encode_intent(intent(2**64 - 1, request_id, **names, **most, prompt_estimate=2**32 - 1), SEED)),
        "checkpoint": len(encode_checkpoint(checkpoint(2**64 - 1, 5)._replace(**counts, upstream="openai"), SEED)),
        "final": len(encode_final(final(2**64 - 1, request_id, **names, **most, **counts), SEED, 1.7e9)),
    }
    assert max(sizes.values()) <= 120, sizes
    assert sum(sizes.values()) <= 3 * 90, sizes


def test_typical_records_are_small() -> None:
    assert len(encode_checkpoint(checkpoint(1, 5), SEED)) <= 48


def test_a_record_cut_anywhere_is_not_found() -> None:
    data = encode_final(final(1), SEED, 0.0)
    assert all(find_frame(data[:length], 0, SEED) is None for length in range(len(data)))


def test_a_record_with_any_byte_changed_is_not_found() -> None:
    data = encode_final(final(1), SEED, 0.0)
    for place in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= flip
            assert find_frame(bytes(damaged) + b"\0" * 300, 0, SEED) is None


def test_a_record_of_another_stream_is_not_found() -> None:
    assert find_frame(encode_final(final(1), SEED, 0.0), 0, SEED + 1) is None


def test_zeros_are_not_a_record() -> None:
    assert find_frame(bytes(4096), 0, SEED) is None


@given(st.binary(max_size=200))
def test_garbage_is_never_a_record_and_never_raises(data: bytes) -> None:
    assert find_frame(data, 0, SEED) is None


@pytest.mark.parametrize("decode", [decode_intent, decode_checkpoint, decode_final])
def test_a_payload_of_the_wrong_shape_is_a_value_error(decode) -> None:
    for payload in (b"", b"x", b"\xff" * 60, bytes(200)):
        with pytest.raises(ValueError):
            decode(1, payload)


def test_an_announced_end_is_read_back_and_an_unknown_one_is_none():
    for status in STATUSES:
        for estimated in (False, True):
            assert read_ending(ending_of(status, estimated)) == (status, int(estimated))
    assert read_ending(0) is None
    assert read_ending(0x80) is None
    assert read_ending(0x7F) is None
