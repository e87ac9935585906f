"""Which characters reach a terminal, and that no text makes a command end in a traceback."""

from __future__ import annotations

import io
import json
import sys

import pytest

from proxyd.cli.output import fail, printable, put
from proxyd.cli.tables import table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("acme", "acme"),
        ("Zürich 日本語 🦀", "Zürich 日本語 🦀"),
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("one\ntwo\r\t\0\x7f\x9b", "one\\x0atwo\\x0d\\x09\\x00\\x7f\\x9b"),
        ("a\udcff", "a\\xff"),
        ("\u202egnp.exe\u2028\ud800", "\\u202egnp.exe\\u2028\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("", ""),
    ],
)
def test_what_is_not_to_be_seen_is_shown_as_its_number(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_cells_and_messages_are_made_printable(capsys: pytest.CaptureFixture[str]) -> None:
    assert table(["name", "count"], [["a\x1b[2J", "1"]]) == ["name      count", "a\\x1b[2J      1"]
    assert fail("proxyd x", 1, "bad \x1b]0;title\x07\nsecond") == 1
    assert capsys.readouterr().err == "proxyd x: bad \\x1b]0;title\\x07\nproxyd x: second\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_text_is_printed_whatever_the_encoding_of_stdout_and_json_stays_json(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = '"Zürich 日本語 🦀 \udcff"'
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert put("proxyd x", text) == 0
    said = raw.getvalue().decode(encoding)
    assert json.loads(said) == json.loads(text)
    assert ("日本語" in said) == (encoding == "utf-8")
