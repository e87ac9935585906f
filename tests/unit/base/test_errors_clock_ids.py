"""Refusals, findings, clocks and ids."""

import pytest

from proxyd.clock import SYSTEM, FakeClock
from proxyd.errors import ConfigError, Finding, Refusal, UpstreamError, UpstreamErrorKind
from proxyd.ids import is_request_id, is_same_life, new_epoch, new_request_id


@pytest.mark.parametrize(
    "status, type",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (405, "invalid_request_error"),
        (408, "invalid_request_error"),
        (413, "invalid_request_error"),
        (422, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (502, "api_error"),
        (503, "overloaded_error"),
        (504, "api_error"),
    ],
)
def test_the_type_of_a_refusal_follows_its_status(status, type):
    assert Refusal(status, "c", "m").type == type


def test_a_refusal_may_name_its_own_type():
    assert Refusal(400, "c", "m", type="other").type == "other"


@pytest.mark.parametrize("given, sent", [(0, "1"), (1, "1"), (30, "30")])
def test_retry_after_is_at_least_a_second(given, sent):
    refusal = Refusal(429, "c", "m", retry_after_s=given, headers=[("x-a", "b")])
    assert refusal.headers == (("x-a", "b"), ("retry-after", sent))


def test_a_success_is_no_refusal():
    with pytest.raises(AssertionError):
        Refusal(200, "c", "m")


def test_an_upstream_error_says_whether_anything_was_sent():
    error = UpstreamError(UpstreamErrorKind.RESET, "a", "in the body", sent=True)
    assert error.sent
    assert str(error) == "upstream a: reset (in the body)"


def test_a_config_error_shows_every_finding():
    one = Finding("error", "f", 3, "a.b", "is bad", "mend it")
    other = Finding("warning", "f", 1, "", "odd", "")
    assert str(ConfigError([one, other])) == "error f:3 a.b: is bad; mend it\nwarning f:1: odd"


def test_a_fake_clock_moves_only_when_told():
    clock = FakeClock(monotonic=5.0, wall=100.0)
    assert (clock.monotonic(), clock.wall()) == (5.0, 100.0)
    clock.advance(2.5)
    assert (clock.monotonic(), clock.wall()) == (7.5, 102.5)
    clock.step_wall(-50)
    assert (clock.monotonic(), clock.wall()) == (7.5, 52.5)
    with pytest.raises(ValueError, match="forward"):
        clock.advance(-1)


def test_the_system_clock_goes_forward():
    assert SYSTEM.monotonic() <= SYSTEM.monotonic()
    assert SYSTEM.wall() > 1_600_000_000


def test_request_ids_are_fresh_and_acceptable():
    ids = {new_request_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) == 32 and is_request_id(one.encode()) for one in ids)


@pytest.mark.parametrize("value", [b"a", b"A.b_c-9", b"x" * 64])
def test_a_proxys_id_may_be_up_to_64_plain_bytes(value):
    assert is_request_id(value)


@pytest.mark.parametrize("value", [b"", b"x" * 65, b"a b", b"a\n", b"a\r\nx: y", b"\xff", b"a/b", b'"'])
def test_anything_else_is_no_id(value):
    assert not is_request_id(value)


def test_an_epoch_is_a_nonzero_word():
    assert all(0 < new_epoch() < 1 << 32 for _ in range(100))


def test_the_epochs_of_one_life_differ_and_go_together_and_with_no_others():
    for life in (new_epoch(), 1, 0xFFFF0000, 0xFFFFFFFF):
        epochs = {new_epoch(life) for _ in range(20)}
        assert len(epochs) > 10
        assert all(0 < epoch < 1 << 32 and is_same_life(epoch, life) for epoch in epochs)
        assert not any(is_same_life(epoch ^ 0x10000, life) for epoch in epochs)
