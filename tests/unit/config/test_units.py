"""Durations and sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.config.units import UnitError, format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    "text, seconds",
    [("250ms", 0.25), ("10s", 10), ("2m", 120), ("24h", 86400), ("90d", 7776000), ("0s", 0), ("1.5s", 1.5), ("5 s", 5)],
)
def test_a_duration_is_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text, size",
    [("512B", 512), ("64KiB", 65536), ("8MiB", 8388608), ("4GiB", 1 << 32), ("1TiB", 1 << 40), ("0.5KiB", 512)],
)
def test_a_size_is_bytes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "value", [30, 30.5, "30", "", "s", "-5s", "+5s", "1e3s", "5 5s", "٣s", "5s\n", "0x10s", True, None, []]
)
def test_what_is_no_duration_is_refused_with_a_remedy(value):
    with pytest.raises(UnitError) as caught:
        parse_duration(value)
    assert caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    "text, remedy",
    [("5sec", '"5s"'), ("5min", '"5m"'), ("3days", '"3d"'), ("10S", "ms, s, m, h, d"), ("1w", "ms, s, m")],
)
def test_an_unknown_duration_unit_names_the_known_one(text, remedy):
    with pytest.raises(UnitError) as caught:
        parse_duration(text)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("text, remedy", [("64KB", '"64KiB"'), ("64k", '"64KiB"'), ("8M", '"8MiB"'), ("1gb", '"1GiB"')])
def test_a_decimal_size_unit_names_the_binary_one(text, remedy):
    with pytest.raises(UnitError) as caught:
        parse_size(text)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "parse, value, told",
    [
        (parse_duration, 30, '"30s" if it is seconds, "30ms" if it is milliseconds'),
        (parse_duration, "30", '"30s" if it is seconds, "30ms" if it is milliseconds'),
        (lambda value: parse_duration(value, 0.1, 600), 15, 'unit: "15s" if it is seconds'),
        (lambda value: parse_duration(value, 0.1, 600), 15000, 'unit: "15s" if it is milliseconds'),
        (lambda value: parse_duration(value, 0.1, 600), 10**9, 'such as "250ms"'),
        (lambda value: parse_size(value, 1, 1 << 30), 20000000, 'unit: "20000000B" if it is bytes'),
        (lambda value: parse_size(value, 1, 1 << 30), 8388608, 'unit: "8MiB" if it is bytes'),
        (lambda value: parse_size(value, 1024, 1 << 20), 64, 'unit: "64KiB" if it is KiB'),
        (lambda value: parse_size(value, 1, 1 << 30), -1, 'such as "512B"'),
        (parse_duration, float("inf"), 'such as "250ms"'),
        (parse_size, float("nan"), 'such as "512B"'),
    ],
)
def test_a_bare_number_is_told_what_it_may_mean_within_the_bounds(parse, value, told):
    with pytest.raises(UnitError) as caught:
        parse(value)
    assert caught.value.remedy.endswith(told) or told in caught.value.remedy
    assert "KiB" in told or "it is KiB" not in caught.value.remedy


def test_half_a_byte_is_refused():
    with pytest.raises(UnitError):
        parse_size("0.5B")


@given(st.integers(0, 10**9))
def test_a_formatted_duration_reads_back_as_itself(milliseconds):
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@given(st.integers(0, 10**15 - 1))
def test_a_formatted_size_reads_back_as_itself(size):
    assert parse_size(format_size(size)) == size


@given(st.text(max_size=30))
def test_no_text_does_worse_than_a_unit_error(text):
    for parse in (parse_duration, parse_size):
        try:
            assert parse(text) >= 0
        except UnitError:
            pass
