"""What is said about a text that is no TOML."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd.config.syntax import diagnose
from tests.unit.config.texts import only


@pytest.mark.parametrize(
    "text, line, message, remedy",
    [
        ("a = 1\nurl = https://x\n", 2, "`url =` has no quotes", 'url = "..."'),
        ("[s]\nheartbeat = 15s # c\n", 2, "`heartbeat =` has no quotes", '"30s", "8MiB"'),
        ("[s]\nmax_body = 8MiB\n", 2, "`max_body =` has no quotes", '"30s", "8MiB"'),
        ("a = 127.0.0.1:3000\n", 1, "`a =` has no quotes", 'a = "..."'),
        ("a = True\n", 1, "a word without quotes", "true or false, in small letters"),
        ("a = \n", 1, "`a =` has no value", '"" for none'),
        ("a: 3\n", 1, "a colon", "NAME = VALUE"),
        ('a = "x\n', 1, "the quote of `a =` is not closed", 'end the value with "'),
        ("[s]\na=1\nb=2\na=3\n", 4, "a again, after line 2", "keep one"),
        ("[http]\na=1\n[log]\n[http]\n", 4, "[http] again, after line 1", "under one of them"),
        ('[upstream]\nname="a"\n[upstream]\nname="b"\n', 3, "[upstream] again, after line 1", "[[upstream]]"),
        ('[[model]]\nname="a"\n\n[model]\nname="b"\n', 4, "[model] again, after line 1", "[[model]]"),
        ("\ufeff[a]\nb=1\n", 1, "byte order mark", "without BOM"),
        ("name = \u201ca\u201d\n", 1, "a curly quote (U+201C) in `name =`", "straight quotes"),
        ('a = "\u2014" \u2014\n', 1, "a long dash (U+2014) in `a =`", "type it anew"),
        ('a = [ "x"\nb = 3\n', 2, "Unclosed array", "close the list with ]"),
        ("[a\nb=1\n", 1, "Expected ']'", "close the table's name"),
        ('a = "\\q"\n', 1, "Unescaped", "a backslash is written twice"),
        ("\n\nx = [1,\n", 3, "`x =`", "close what is open"),
    ],
)
def test_the_common_slips_have_their_own_words(text, line, message, remedy):
    found = only(text)
    assert found.line == line
    assert found.message.startswith("not TOML: ")
    assert message in found.message
    assert remedy in found.remedy


def test_a_tab_is_a_space():
    assert tomllib.loads("\ta\t=\t1\n[b]\n\tc = 2\n") == {"a": 1, "b": {"c": 2}}


@pytest.mark.parametrize(
    "text",
    [
        "PaStEd0secret\n",
        "PaStEd0secret=\n",
        "PaStEd0secret==\n",
        'a = "PaStEd0secret\n',
        "a = PaStEd0secret\n",
        "a = \u201cPaStEd0secret\u201d\n",
        "PaStEd0secret" * 9 + "= x\n",
        'b = "x" PaStEd0secret\n',
        "c = [PaStEd0secret]\n",
    ],
)
def test_nothing_of_a_value_or_of_a_pasted_secret_is_repeated(text):
    assert "PaStEd0secret" not in only(text).text()


@given(st.text(alphabet="a=[]\"'\n. \ufeff\u201c1#:{}", max_size=30))
def test_every_text_that_is_no_toml_has_a_line_and_a_remedy(text):
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        slip = diagnose(text, str(error))
        assert 1 <= slip.line <= text.count("\n") + 1
        assert slip.message
        assert slip.remedy
