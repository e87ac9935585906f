"""The node's name: made once, whole, the same for ever."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from proxyd.store.node import MAX_TOKENS, NAME, OWNER_NAME, Owner, node_id
from proxyd.store.schema import StoreError, StoreMisfit


def test_a_name_is_made_once_and_kept(tmp_path: Path) -> None:
    first = node_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert node_id(str(tmp_path)) == first
    assert os.listdir(tmp_path) == [NAME]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_two_directories_are_two_nodes(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert node_id(tmp_path) != node_id(tmp_path / "other")


def test_of_two_makers_at_once_the_first_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = "00112233445566aa"
    real = os.link

    def overtaken(source: str, target: str) -> None:
        (tmp_path / NAME).write_text(f"{other}\n")
        real(source, target)

    monkeypatch.setattr(os, "link", overtaken)
    assert node_id(tmp_path) == other
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize("text", ["", "short", "00112233445566AA", "00112233445566aa77", "\ufffd" * 16])
def test_a_file_with_something_else_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(StoreMisfit, match=r"node\.id: does not hold 16 hex digits"):
        node_id(tmp_path)


def test_a_name_without_a_line_end_serves(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("00112233445566aa")
    assert node_id(tmp_path) == "00112233445566aa"


def test_a_missing_directory_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory"):
        node_id(tmp_path / "nowhere")


def test_an_owner_knows_its_own_tokens_and_no_other(tmp_path: Path) -> None:
    first = Owner(tmp_path)
    assert os.listdir(tmp_path) == []  # a token that is in no store needs no file
    assert first.holds(first.token)
    assert not first.holds(first.token + 1)
    assert first.keep(first.token) == first.token
    assert os.listdir(tmp_path) == [OWNER_NAME]
    second = Owner(tmp_path)
    assert second.holds(first.token)
    assert second.keep(first.token) == second.token != first.token
    assert not first.holds(second.token)


def test_the_tokens_of_an_owner_are_bounded_and_junk_among_them_is_none(tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text("junk\n0000000000000007\n00000000")
    owner = Owner(tmp_path)
    assert (owner.holds(7), owner.holds(0)) == (True, False)
    for _ in range(MAX_TOKENS + 3):
        owner = Owner(tmp_path)
        owner.keep(0)
    assert not owner.holds(7)
    assert len((tmp_path / OWNER_NAME).read_text().splitlines()) == MAX_TOKENS
    assert (tmp_path / OWNER_NAME).stat().st_mode & 0o777 == 0o600


def test_on_a_full_disk_the_token_in_force_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Owner(tmp_path).keep(5)
    (tmp_path / OWNER_NAME).write_text("0000000000000005\n")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    owner = Owner(tmp_path)
    assert owner.keep(5) == owner.token == 5
    fresh = Owner(tmp_path)
    with pytest.raises(StoreError, match="No space left"):
        fresh.keep(fresh.token)
    assert os.listdir(tmp_path) == [OWNER_NAME]


def test_an_owner_without_a_directory_takes_the_first_token_for_its_own(tmp_path: Path) -> None:
    owner = Owner()
    assert owner.holds(5)
    assert owner.keep(5) == owner.token
    assert not owner.holds(5)
