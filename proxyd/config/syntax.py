"""Why a text is no TOML, in words for who wrote it.

Owns: the commonest slips, told from the offending line. Must not know: the schema.
Invariant: of a line only the part before its `=` is repeated, and never more of a header than its name: somebody will
have written a secret behind it. `diagnose` never raises.

    tomllib's reason and line -> the text around it -> one of the slips below, or the reason as it stands
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PLACE = re.compile(r"\(at line (\d+), column (\d+)\)")
_KEY = re.compile(r"""[ \t]*((?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')(?:[ \t]*\.[ \t]*[A-Za-z0-9_-]+)*)[ \t]*=(?!=)""")
_HEADER = re.compile(r"[ \t]*(\[\[?)[ \t]*([A-Za-z0-9_.-]+)[ \t]*\]")
_NUMBER_AND_WORD = re.compile(r"[0-9][0-9._]*[ \t]*[A-Za-z]+")
# What word processors and chats make out of straight quotes, dashes and spaces.
_LOOKALIKES = {
    "\u201c": "a curly quote", "\u201d": "a curly quote", "\u201e": "a curly quote", "\u2018": "a curly quote",
    "\u2019": "a curly quote", "\u00ab": "an angle quote", "\u00bb": "an angle quote",
    "\u2013": "a long dash", "\u2014": "a long dash", "\u00a0": "a no-break space", "\u200b": "a zero-width space",
}  # fmt: skip
_MAX_SHOWN = 40
# A name in quotes that needs them may be an address with its password.
_QUOTED_KEY = re.compile(r"""'[^']*[^A-Za-z0-9_'. -][^']*'(?=[,)]|$|[ \t]*\.)|"[^"]*[^A-Za-z0-9_". -][^"]*["]""")
# What helps against the rarer faults, by a word of tomllib's reason.
_REMEDIES = {
    "Unclosed array": "close the list with ]",
    "end of document": "close what is open there: a list with ], a text with its quote",
    "Expected ']": "close the table's name with ]",
    "Illegal character": "close the quote on the same line",
    "Unescaped": "in double quotes a backslash is written twice; in single quotes it stands for itself",
    "hex value": "in double quotes a backslash is written twice; in single quotes it stands for itself",
    "after a statement": "one option a line, and text in quotes",
    "'=' after a key": "write NAME = VALUE",
}
# Tables of which a configuration may have several.
_ARRAYS = ("upstream", "model")


@dataclass(frozen=True, slots=True)
class Slip:
    """What is wrong in which line, and what to write instead."""

    line: int
    message: str
    remedy: str


def diagnose(text: str, said: str) -> Slip:
    """`said`: what tomllib said about `text`."""
    if text.startswith("\ufeff"):
        return Slip(1, "not TOML: the file begins with a byte order mark", "save it as UTF-8 without BOM")
    place = _PLACE.search(said)
    lines = text.split("\n")
    number = int(place[1]) if place else text.count("\n") + (not text.endswith("\n"))
    number = min(max(1, number), len(lines))
    # Some faults are noticed at the start of the line after the one that has them.
    if place and place[2] == "1" and number > 1 and "statement" in said:
        number -= 1
    line = lines[number - 1]
    reason = re.sub(r"\s*\(at [^)]*\)$", "", said)
    if reason.startswith("Cannot declare") and _QUOTED_KEY.search(reason):
        reason = "a name twice"
    column = f" at column {place[2]}" if place else ""
    found = _lookalike(number, line) or _twice(number, lines, reason) or _unquoted(number, line, reason)
    if found is not None:
        return found
    shown = _shown(line)
    where = f" in `{shown}`" if shown else ""
    remedy = next((remedy for word, remedy in _REMEDIES.items() if word in said), "correct the syntax")
    return Slip(number, f"not TOML: {reason}{column}{where}", f"{remedy}; the rest of the file was not looked at")


def _shown(line: str) -> str:
    """What may be repeated of a line."""
    key = _KEY.match(line)
    header = _HEADER.match(line)
    if key is not None:
        # A pasted secret in base64 ends in "=" as well, with nothing behind it; and no option has so long a name.
        is_short = len(key[1]) <= _MAX_SHOWN and not _QUOTED_KEY.search(key[1])
        is_name = is_short and (line[key.end() :].strip() or key[0][-2:-1] == " ")
        return f"{key[1]} =" if is_name else ""
    if header is not None and len(header[2]) <= _MAX_SHOWN:
        return f"{header[1]}{header[2]}{']' * len(header[1])}"
    return ""


def _lookalike(number: int, line: str) -> Slip | None:
    """A character that looks like TOML's own and is another."""
    bare = re.sub(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'|#.*", "", line)
    for character in bare:
        if character in _LOOKALIKES:
            name = f"{_LOOKALIKES[character]} (U+{ord(character):04X})"
            straight = 'type straight quotes: "..."' if "quote" in name else "type it anew on a keyboard"
            shown = _shown(line)
            where = f" in `{shown}`" if shown else ""
            return Slip(number, f"not TOML: {name}{where}", straight)
    return None


def _twice(number: int, lines: list[str], reason: str) -> Slip | None:
    """A table or key that the file has already."""
    header = _HEADER.match(lines[number - 1])
    if header is not None and ("twice" in reason or "immutable namespace" in reason or "overwrite" in reason):
        name = header[2]
        first = next((at for at, line in enumerate(lines[: number - 1], 1) if _header_name(line) == name), 0)
        message = f"not TOML: [{name}] again" + (f", after line {first}" if first else "")
        if name in _ARRAYS:
            return Slip(number, message, f"write [[{name}]] for each of them")
        if first:
            return Slip(number, message, "put all its options under one of them")
    key = _KEY.match(lines[number - 1])
    if key is not None and "overwrite" in reason and _shown(lines[number - 1]):
        for at in range(number - 2, -1, -1):
            if _header_name(lines[at]):
                break
            other = _KEY.match(lines[at])
            if other is not None and other[1] == key[1]:
                return Slip(number, f"not TOML: {key[1]} again, after line {at + 1}", "keep one of them")
        return Slip(number, f"not TOML: {key[1]} again", "keep one of them")
    return None


def _header_name(line: str) -> str:
    header = _HEADER.match(line)
    return header[2] if header is not None else ""


def _unquoted(number: int, line: str, reason: str) -> Slip | None:
    """A value that misses its quotes, or one of them."""
    key = _KEY.match(line)
    if key is None:
        if re.match(r"[ \t]*[A-Za-z0-9_.-]+[ \t]*:[ \t]", line):
            return Slip(number, "not TOML: a colon behind the name", "write NAME = VALUE")
        return None
    value = re.sub(r"\s#.*", "", line[key.end() :]).strip()
    name = key[1] if _shown(line) else "NAME"
    if value[:1] in ("'", '"') and len(re.findall(rf"(?<!\\){value[0]}", value)) == 1:
        return Slip(number, f"not TOML: the quote of `{name} =` is not closed", f"end the value with {value[0]}")
    if not value:
        return Slip(number, f"not TOML: `{name} =` has no value", 'write one, "" for none')
    if value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return Slip(number, f"not TOML: `{name} =` has a word without quotes", "write true or false, in small letters")
    if _NUMBER_AND_WORD.fullmatch(value):
        return Slip(
            number, f"not TOML: the value of `{name} =` has no quotes", 'durations and sizes are strings: "30s", "8MiB"'
        )
    if re.match(r"[A-Za-z/.:~*]|[0-9]+\.[0-9]+\.", value):
        return Slip(number, f"not TOML: the value of `{name} =` has no quotes", f'put it in quotes: {name} = "..."')
    return None
