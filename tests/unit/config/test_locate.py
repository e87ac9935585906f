"""The locator counts lines beside tomllib, so tomllib is its oracle."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.config.locate import locate

CONF = Path(__file__).resolve().parents[3] / "conf" / "proxyd.toml"

ODD = '''# a comment with [brackets] and = signs
top = 1
"quoted key" = "# no comment"
'lit.eral' = '[not] = "a table"'
dotted . inner."x.y" = true
multi = """
[not.a.table]
a = "b" \\" # still text
quotes "" inside"""""
lit = \'\'\'
[[nor.this]]
\'\'\'
list = [ # comment ]
  "a", # one
  [1, 2,
   3],
  { x = 1, y = [ "]", "}" ] },
]
when = 1979-05-27 07:32:00Z # spaces inside a value
[table]
  indented = 0x_dead_beef
[table.sub."dotted.name"]
k = inf
[[array]]
v = 1
[array.sub]
w = 2
[[array.deep]]
z = 1
[[array.deep]]
z = 2
[[array]]
v = 2
[[array.deep]]
z = 3
'''.replace("0x_dead_beef", "0xdead_beef")


def paths_of(value: Any, path: tuple = ()) -> set[tuple]:
    """Every path of a parsed document."""
    found = {path} if path else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found |= paths_of(inner, (*path, key))
    return found


@pytest.mark.parametrize(
    "text", [ODD, CONF.read_text(), "", "\n\n", "a=1", "a = []\nb = {}\n", "a.b.c = 1\r\na.d = [1,\r\n2]\r\n"]
)
def test_every_path_of_the_document_has_a_line_and_no_other_has(text):
    assert set(locate(text)) == paths_of(tomllib.loads(text))


def test_the_line_is_the_one_where_the_key_stands():
    lines = locate(ODD)
    rows = ODD.split("\n")
    for path, line in lines.items():
        if isinstance(path[-1], str):
            assert path[-1] in rows[line - 1] or rows[line - 1].startswith("[["), (path, line)
    assert rows[lines[("list", 1, 2)] - 1].strip() == "3],"
    assert rows[lines[("list", 2, "y", 1)] - 1].strip().startswith("{ x")
    assert rows[lines[("array", 1, "deep", 0, "z")] - 1] == "z = 3"
    assert lines[("array", 1, "deep", 0, "z")] == ODD.count("\n")
    assert lines[("array", 0, "deep", 1)] == lines[("array", 0, "deep", 1, "z")] - 1


def test_a_carriage_return_before_the_line_end_does_not_move_lines():
    assert locate(ODD.replace("\n", "\r\n")) == locate(ODD)


_BARE = st.text("abcXYZ019_-", min_size=1, max_size=4)
_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=8)
_ATOM = st.one_of(st.integers(-9, 9), st.booleans(), st.floats(-9, 9), _TEXT)
_VALUE = st.recursive(
    _ATOM, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_BARE, inner, max_size=3), max_leaves=6
)
_DOCUMENT = st.dictionaries(
    _BARE, st.one_of(_VALUE, st.lists(st.dictionaries(_BARE, _VALUE, max_size=3), min_size=1, max_size=3)), max_size=4
)


def _write(value: Any, draw: Any) -> str:
    """A value in one of the spellings that TOML has for it, gaps and comments included."""
    gap = draw(st.sampled_from(["", " ", "\n", " # ]}'\"\n\t"]))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(f"\\U{ord(char):08x}" if ord(char) < 32 or char in '"\\\x7f' else char for char in value)
        return draw(st.sampled_from(['"{}"', '"""{}"""', '"""\n{}"""'])).format(escaped)
    if isinstance(value, list):
        return "[" + gap + f",{gap}".join(_write(one, draw) for one in value) + gap + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_write_flat(one)}" for key, one in value.items()) + " }"
    return repr(value)


def _write_flat(value: Any) -> str:
    """An inline table stays on its line."""
    if isinstance(value, list):
        return "[" + ", ".join(_write_flat(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_write_flat(one)}" for key, one in value.items()) + " }"
    if isinstance(value, str):
        return (
            '"'
            + "".join(f"\\U{ord(char):08x}" if ord(char) < 32 or char in '"\\\x7f' else char for char in value)
            + '"'
        )
    return str(value).lower() if isinstance(value, bool) else repr(value)


@settings(max_examples=150, deadline=None)
@given(document=_DOCUMENT, data=st.data())
def test_random_documents_are_located_completely(document, data):
    text = ""
    tables = []
    for key, value in document.items():
        if (
            isinstance(value, list)
            and value
            and all(isinstance(one, dict) for one in value)
            and data.draw(st.booleans())
        ):
            tables.append((key, value))
        else:
            text += f"{key} = {_write(value, data.draw)}\n"
    for key, rows in tables:
        for row in rows:
            text += f"[[{key}]] # x\n" + "".join(f"  {name} = {_write(one, data.draw)}\n" for name, one in row.items())
    assert set(locate(text)) == paths_of(tomllib.loads(text))
