"""The node's name: made once, whole, the same for ever."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from proxyd.store.node import NAME, node_id
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
