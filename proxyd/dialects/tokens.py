"""Counting a text's tokens by the o200k vocabulary, where a provider told none.

Owns: the vocabulary's file and its loading, the pattern that cuts a text into pieces, counting from a sample.
Must not know: sockets, what is billed, whose text it is. Invariants: nothing is fetched; a worker that never has to
count never loads; until the vocabulary is there, or for ever where its file is missing or damaged, a text has a quarter
as many tokens as UTF-8 bytes, rounded up. No text is in a repr, a message or a file.

    prepare() -> a thread reads, checks and builds (20 ms, mostly without the GIL; 3.2 MB) -> count() gives numbers
                              '-- file missing or damaged: take_trouble() says so once, count() gives None
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import orjson
import regex

from proxyd._bpe import Vocabulary
from proxyd._scan import mend

# Of a text, kept for counting: 0.1 ms at the end of a request. Half is off by more on long texts, twice is memory per
# stream. The splitter keeps as much (wire/scan.py).
SAMPLE_BYTES = 1024

# tiktoken_ext/openai_public.py, o200k_base (tiktoken 0.14.0)
_PIECE = regex.compile(
    "|".join(
        (
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )
)
# The whole escapes and characters at the start of a JSON string's inside.
_WHOLE_ESCAPES = re.compile(rb"[^\\]*+(?:\\(?:u[0-9A-Fa-f]{4}|[^u])[^\\]*+)*+")


class Encoding:
    """A vocabulary in a file, loaded when it is first needed. For one thread, but for the loading."""

    __slots__ = ("_has_begun", "_path", "_sha256", "_trouble", "_vocabulary", "is_loading")

    def __init__(self, path: Path, sha256: str) -> None:
        self._path = path
        self._sha256 = sha256
        self._has_begun = False
        self.is_loading = False
        self._trouble = ""
        self._vocabulary: Vocabulary | None = None

    @property
    def is_ready(self) -> bool:
        return self._vocabulary is not None

    def prepare(self) -> None:
        """Has the vocabulary loaded in a thread, the first time."""
        if self._has_begun:
            return
        self._has_begun = self.is_loading = True
        try:
            threading.Thread(target=self.load, name="vocabulary", daemon=True).start()
        except RuntimeError as error:
            self.is_loading = False
            self._trouble = f"no thread to load it in: {error}"

    def load(self) -> None:
        """Loads the vocabulary now; what is wrong with its file is told by take_trouble()."""
        self._has_begun = True
        try:
            data = self._path.read_bytes()
            found = hashlib.sha256(data).hexdigest()
            if found != self._sha256:
                raise ValueError(f"{self._path} is damaged (sha256 {found}, not {self._sha256})")
            self._vocabulary = Vocabulary(data)
        except OSError as error:
            self._trouble = f"{self._path}: {error.strerror}"
        except (ValueError, MemoryError) as error:
            self._trouble = str(error) or "not enough memory"
        finally:
            self.is_loading = False

    def take_trouble(self) -> str:
        """Why tokens are counted as quarters of bytes; "" when they are not, and from the second time on."""
        trouble, self._trouble = self._trouble, ""
        return trouble

    def count(self, text: str) -> int | None:
        """Tokens of a text, by bytes of UTF-8: about 0.1 us each. None: the vocabulary is not there."""
        if self._vocabulary is None:
            return None
        try:
            return self._vocabulary.count_all(_PIECE.findall(text))
        except UnicodeEncodeError:  # half a surrogate pair
            return self._vocabulary.count_all(_PIECE.findall(text.encode("utf-8", "replace").decode()))


O200K = Encoding(
    Path(__file__).parents[1] / "data" / "o200k_base.tiktoken",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
)


def estimate(text_bytes: int) -> int:
    """Tokens of a text by its UTF-8 length: a quarter, rounded up (token-estimation.md)."""
    return (max(0, text_bytes) + 3) // 4


def count_text(text: str) -> int:
    """Tokens of a text, counted where the vocabulary is there, else a quarter of its bytes."""
    counted = O200K.count(text)
    return estimate(len(text.encode("utf-8", "replace"))) if counted is None else counted


class Text:
    """A text of which at most a kilobyte is known: `size`, its UTF-8 bytes; `sample`, a part of it (parts that do not
    stand next to each other have a NUL between them); `extra`, tokens that stand around it."""

    __slots__ = ("_counted", "extra", "sample", "size")

    def __init__(self, size: int, sample: bytes, extra: int = 0) -> None:
        self.size = size
        self.sample = sample
        self.extra = extra
        self._counted: float | None = None

    def tokens(self, factor: float = 1.0) -> int:
        """How many tokens it has, of a vocabulary whose texts have `factor` times as many as o200k's. Counted once:
        two records of one request never differ."""
        if self._counted is None:
            self._counted = self._count()
        return (max(1, round(self._counted * factor)) if self._counted else 0) + self.extra

    def _count(self) -> float:
        sample = self.sample.decode("utf-8", "ignore")
        parts = [part for part in sample.split("\0") if part]
        known = sum(len(part.encode()) for part in parts)
        counts = [O200K.count(part) for part in parts]
        if not known or None in counts:
            return estimate(self.size)
        return sum(count or 0 for count in counts) * max(1.0, self.size / known)


NOTHING = Text(0, b"")


def grown(sample: bytes, text: str) -> bytes:
    """`sample` with as much of `text` behind it as there is room for."""
    room = SAMPLE_BYTES - len(sample)
    return sample + text[:room].encode("utf-8", "replace")[:room] if room > 0 and text else sample


def unescaped(raw: bytes) -> bytes:
    """The UTF-8 of the inside of a JSON string, which may be cut anywhere and need not be valid."""
    found = _WHOLE_ESCAPES.match(raw)
    text = (raw if found is None else found[0]).decode("utf-8", "ignore")
    if "\\" not in text:
        return text.encode()
    quoted = mend(b'"%b"' % text.encode())
    value: Any
    try:
        value = orjson.loads(quoted)
    except ValueError:
        try:
            value = json.loads(quoted, strict=False)  # a bare control character
        except ValueError:
            value = text
    return value.encode("utf-8", "replace") if isinstance(value, str) else text.encode()
