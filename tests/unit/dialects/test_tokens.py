"""Counting texts: against tiktoken with the same ranks, from samples, and without a vocabulary."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import orjson
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from proxyd.dialects import tokens
from proxyd.dialects.tokens import O200K, SAMPLE_BYTES, Encoding, Text, count_text, estimate, grown, unescaped
from tests.unit.dialects.bpe_twin import ranks_of

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "proxyd" / "data" / "o200k_base.tiktoken"

PATTERN = [
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
]

SCRIPTS = {
    "english": "It's 9 o'clock; they've gone, WE'LL stay. McDonald's iPhone costs $1,234.50 (12.5% off)!\n\nSo?  ",
    "code": "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # \\n\nif (a&&b||!c) { arr[i++] = 0xFF; }\r\n\r\n//////\n",
    "json": '{"id":"chatcmpl-9x","choices":[{"index":0,"delta":{"content":null}}],"created":1735689600}',
    "german": "Fünf Straßenbahnen überqueren den Platz, während Jürgen Äpfel und Öl für 3,50 € kauft.",
    "chinese": "今天天气很好，我们去公园散步吧。价格是１２３元！",
    "japanese": "今日はとても良い天気です。カタカナとひらがな、ＡＢＣも。",
    "korean": "오늘은 날씨가 아주 좋습니다. 공원에 산책하러 갑시다.",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. ЭТО ВАЖНО",
    "arabic": "الطقس جميل اليوم، هيا بنا إلى الحديقة. ١٢٣",
    "hindi": "आज मौसम बहुत अच्छा है, चलो पार्क में घूमने चलते हैं। १२३",
    "emoji": "🙂👍🏽👨‍👩‍👧‍👦🇩🇪❤️ ok 🎉🎉🎉",
    "control": "\x00\x01\x02\x1b[0m\x7f\x85\xa0\u2028\u200b\ufeff\r\r\n\n \t \v\f",
    "special": "<|endoftext|><|endofprompt|> <|im_start|>",
}


@pytest.fixture(scope="module")
def oracle() -> tiktoken.Encoding:
    ranks = ranks_of(FILE.read_bytes())
    return tiktoken.Encoding("o200k", pat_str=tokens._PIECE.pattern, mergeable_ranks=ranks, special_tokens={})


def test_the_pattern_is_tiktokens() -> None:
    source = Path(tiktoken.__file__).parents[1] / "tiktoken_ext" / "openai_public.py"
    function = source.read_text().partition("def o200k_base")[2]
    assert all(f'r"""{line}"""' in function for line in PATTERN)
    assert "|".join(PATTERN) == tokens._PIECE.pattern


def test_the_golden_vector(oracle: tiktoken.Encoding) -> None:
    golden = "Hello, proxyd! Grüße 日本語 🙂"
    assert oracle.encode_ordinary(golden) == [13225, 11, 56591, 3859, 0, 99720, 17428, 40909, 26192]
    assert count_text(golden) == 9


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_counted_as_tiktoken_counts_it(script: str, oracle: tiktoken.Encoding) -> None:
    text = SCRIPTS[script]
    rng = random.Random(script)
    for _ in range(200):
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        part = text[start:end] * rng.choice((1, 1, 3))
        assert count_text(part) == len(oracle.encode_ordinary(part)), part


def test_our_own_sources_are_counted_as_tiktoken_counts_them(oracle: tiktoken.Encoding) -> None:
    for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("proxyd/dialects/*.py"), *ROOT.glob("proxyd/web/page/*.html")):
        text = path.read_text()
        assert count_text(text) == len(oracle.encode_ordinary(text)), path.name


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_counted_as_tiktoken_counts_it(oracle: tiktoken.Encoding, text: str) -> None:
    assert count_text(text) == len(oracle.encode_ordinary(text))


def test_half_a_surrogate_pair_counts_as_what_replaces_it() -> None:
    assert count_text("a\ud83d b") == count_text("a? b")


# --- samples -----------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.booleans())
def test_the_inside_of_a_json_string_is_read_wherever_it_is_cut(text: str, ascii_only: bool) -> None:
    raw = (json.dumps(text) if ascii_only else orjson.dumps(text).decode()).encode()[1:-1]
    assert unescaped(raw).decode() == text
    whole = text.encode()
    for at in range(len(raw)):
        cut = unescaped(raw[:at])
        # an escaped pair that was cut in its middle leaves one replaced half
        assert whole.startswith(cut.removesuffix(b"\xef\xbf\xbd"))
        assert len(whole) - len(cut) <= len(raw) - at + 12


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", ""),
        (b"tab\tand\x01", "tab\tand\x01"),
        (b"\\n\x01", "\n\x01"),
        (b"a\\ud83c\\udf88b", "a🎈b"),
        (b"a\\ud83cb", "a\ufffdb"),
        (b"ok\\u12G4 no", "ok"),
        (b"ok\\x no", "ok\\x no"),
        (b"\xff\xfea", "a"),
        (b"a\xf0\x9f", "a"),
        (b"a\\", "a"),
    ],
)
def test_what_is_no_json_string_is_read_as_far_as_it_goes(raw: bytes, text: str) -> None:
    assert unescaped(raw).decode() == text


def test_a_sample_grows_to_a_kilobyte_and_no_further() -> None:
    sample = b""
    for piece in ("", "Grüße ", "🙂" * 500, "more"):
        sample = grown(sample, piece)
    assert sample == ("Grüße " + "🙂" * 500).encode()[:SAMPLE_BYTES]


def test_a_text_that_is_known_whole_is_counted_exactly_and_only_once() -> None:
    text = Text(11, b"Hello world", extra=3)
    assert text.tokens() == 2 + 3
    assert text.tokens(1.3) == 3 + 3
    text.sample = b"something else that has more"
    assert text.tokens() == 2 + 3


def test_a_longer_text_has_as_many_tokens_a_byte_as_its_sample() -> None:
    assert Text(1100, b"Hello world").tokens() == 200
    assert Text(12, b"Hello\0 world").tokens() == 2
    assert Text(1, b"a").tokens() == 1
    assert Text(0, b"").tokens(1.3) == 0


def test_a_text_of_which_nothing_is_known_is_a_quarter_of_its_bytes() -> None:
    assert Text(9, b"").tokens() == 3
    assert Text(9, b"\xff").tokens() == 3


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (-1, 0)])
def test_an_estimate_is_a_quarter_rounded_up(size: int, count: int) -> None:
    assert estimate(size) == count


# --- loading -----------------------------------------------------------------------------------------------------


def test_a_damaged_or_missing_file_is_told_once_and_counts_nothing(tmp_path: Path) -> None:
    damaged = tmp_path / "o200k_base.tiktoken"
    damaged.write_bytes(FILE.read_bytes()[:-1])
    for path, word in ((damaged, "is damaged"), (tmp_path / "none", "No such file")):
        encoding = Encoding(path, O200K._sha256)
        encoding.load()
        assert not encoding.is_ready
        assert encoding.count("text") is None
        trouble = encoding.take_trouble()
        assert word in trouble
        assert str(path) in trouble
        assert encoding.take_trouble() == ""


def test_a_file_that_is_no_vocabulary_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"IQ== 7\n")
    encoding = Encoding(path, hashlib.sha256(b"IQ== 7\n").hexdigest())
    encoding.load()
    assert "line 1" in encoding.take_trouble()


def test_the_text_of_a_count_is_in_no_repr() -> None:
    assert "secret" not in repr(Text(6, b"secret"))
