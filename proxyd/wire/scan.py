"""Lexical look at JSON text, in Python: the twin and the oracle of the compiled ``proxyd._scan``.

Owns: which string tokens of a text are keys, which of them matter to a Watch, how much text they carry; where an
object's own members lie.
Must not know: what a key means, providers, event streams.
It is no JSON parser: what it reports is read by orjson afterwards, what it cuts was validated by orjson before. Any
input, valid or not, ends in one pass.

    { "choices" : [ { "delta" : { "content" : "Hi\\n" } } ] , "usage" : null }
      key              key         key         3 bytes        key      not reported: null
"""
from __future__ import annotations

import re
from collections.abc import Sequence

MAX_KEYS = 46
"""The compiled Watch has room for 48 keys, two of them `type` and `object`."""

MAX_TYPE_VALUES = 48

MAX_KEY_BYTES = 63
"""The compiled Watch keeps the lengths it looks for as bits of one word."""

TYPE_KEYS = (b"type", b"object")

SAMPLE_BYTES = 1024
"""Of metered text, kept for counting its tokens. Half is off by more on long texts, twice is memory per stream."""

_INSIDE = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
_STRING = re.compile(rb'"(' + _INSIDE + rb')"', re.DOTALL)
_COLON = re.compile(rb"[ \t\n\r]*+:[ \t\n\r]*+")
_ESCAPE = re.compile(rb"\\(?:u([0-9A-Fa-f]{4})|.)", re.DOTALL)
_MEMBER_KEY = re.compile(rb'[ \t\n\r]*+"(' + _INSIDE + rb')"[ \t\n\r]*+:[ \t\n\r]*+', re.DOTALL)
_STRUCTURE = re.compile(rb'["{}\[\],]')
_COST = re.compile(rb'["{\[,:]')
_COSTS = {b"{": 5, b"[": 5, b":": 2, b",": 1, b'"': 1}
_PAIR_OR_ESCAPE = re.compile(
    rb"\\u[Dd][89ABab][0-9A-Fa-f]{2}\\u[Dd][C-Fc-f][0-9A-Fa-f]{2}|(\\u[Dd][89A-Fa-f][0-9A-Fa-f]{2})|\\.", re.DOTALL
)
_SPACE = b" \t\n\r"


class Watch:
    """What to look for: keys to report, values of `type` and `object` to report, keys whose text is measured.

    Keys are raw bytes between the quotes. At most 46 keys of 1 to 63 bytes and 48 type values, else ValueError.
    """

    __slots__ = ("meter_keys", "report_keys", "type_values")

    def __init__(
        self,
        report_keys: Sequence[bytes] = (),
        type_values: Sequence[bytes] = (),
        meter_keys: Sequence[bytes] = (),
    ) -> None:
        self.report_keys = tuple(report_keys)
        self.type_values = tuple(type_values)
        self.meter_keys = tuple(meter_keys)
        if len(self.report_keys) + len(self.meter_keys) > MAX_KEYS or len(self.type_values) > MAX_TYPE_VALUES:
            raise ValueError(f"a Watch holds at most {MAX_KEYS} keys and {MAX_TYPE_VALUES} type values")
        if not all(0 < len(key) <= MAX_KEY_BYTES for key in self.report_keys + self.meter_keys):
            raise ValueError(f"a watched key has 1 to {MAX_KEY_BYTES} bytes")


def scan(watch: Watch, data: bytes, sample: bytearray | None = None) -> tuple[bool, int]:
    """(report, text_bytes): does the event matter, and the UTF-8 length of the measured values once unescaped.

    A string whose next byte that is not space is `:` is a key, at any depth. A reported key whose value starts with
    `null` does not count. A measured or typed value is consumed with its key; an unterminated string ends the scan.
    `sample` gets the measured text as it stands between the quotes, until it has SAMPLE_BYTES.
    """
    report = False
    text_bytes = 0
    at = 0
    while (quote := data.find(b'"', at)) >= 0:
        token = _STRING.match(data, quote)
        if token is None:
            break
        at = token.end()
        colon = _COLON.match(data, at)
        if colon is None:
            continue
        key = token[1]
        measured = key in watch.meter_keys
        typed = key in TYPE_KEYS and bool(watch.type_values)
        value_at = colon.end()
        if key in watch.report_keys and not data.startswith(b"null", value_at):
            report = True
        if (measured or typed) and data.startswith(b'"', value_at):
            value = _STRING.match(data, value_at)
            if value is None:
                break
            if measured:
                text_bytes += unescaped_length(value[1])
                if sample is not None:
                    sample += value[1][: SAMPLE_BYTES - len(sample)]
            if typed and value[1] in watch.type_values:
                report = True
            at = value.end()
    return report, text_bytes


def sample(watch: Watch, data: bytes) -> bytes:
    """The first kilobyte of the text that scan() meters, as it stands between the quotes; it may end in half a
    character."""
    found = bytearray()
    scan(watch, data, found)
    return bytes(found)


def unescaped_length(raw: bytes) -> int:
    """UTF-8 bytes of a JSON string's text; half a surrogate pair counts 2, so that a pair counts 4."""
    total = len(raw)
    for escape in _ESCAPE.finditer(raw):
        total += 1 - len(escape[0])
        if escape[1] is not None:
            code = int(escape[1], 16)
            if 0xD800 <= code <= 0xDFFF or 0x80 <= code < 0x800:
                total += 1
            elif code >= 0x800:
                total += 2
    return total


def members(data: bytes, most: int = 1001) -> list[tuple[int, int, int, int]]:
    """At most `most` spans (key_start, key_end, value_start, value_end): a validated JSON object's members, in order.

    The key's span leaves out its quotes, the value's is its exact text. Not an object: []. On text that is not valid
    JSON the spans mean nothing, yet lie inside `data`.
    """
    found: list[tuple[int, int, int, int]] = []
    start = len(data) - len(data.lstrip(_SPACE))
    if not data.startswith(b"{", start):
        return found
    at = start + 1
    while (key := _MEMBER_KEY.match(data, at)) is not None:
        value_at = key.end()
        value_end = _value_end(data, value_at)
        if value_end < 0:
            break
        if len(found) == most:
            break
        text = data[value_at:value_end].rstrip(_SPACE)
        found.append((key.start(1), key.end(1), value_at, value_at + len(text)))
        if not data.startswith(b",", value_end):
            break
        at = value_end + 1
    return found


def structure(data: bytes, most: int) -> int:
    """What it costs to parse `data`, in units of some 40 ns: a list or object 5, a colon 2, a string or comma 1.

    Counting ends once the sum is above `most`; an unterminated string ends it too.
    """
    total = 0
    at = 0
    while total <= most and (token := _COST.search(data, at)) is not None:
        total += _COSTS[token[0]]
        at = token.end()
        if token[0] == b'"':
            string = _STRING.match(data, token.start())
            if string is None:
                break
            at = string.end()
    return total


def mend(data: bytes) -> bytes:
    """`data` with `\\ufffd` in place of every escaped half of a surrogate pair; the identical object without any."""
    return _PAIR_OR_ESCAPE.sub(lambda found: b"\\ufffd" if found[1] else found[0], data)


def _value_end(data: bytes, at: int) -> int:
    """Index of the comma or bracket that ends the value at `at`, or of the end of data; -1: an endless string."""
    depth = 0
    while (token := _STRUCTURE.search(data, at)) is not None:
        byte = token[0]
        at = token.end()
        if byte == b'"':
            string = _STRING.match(data, token.start())
            if string is None:
                return -1
            at = string.end()
        elif byte in b"{[":
            depth += 1
        elif depth == 0:
            return token.start()
        elif byte != b",":
            depth -= 1
    return len(data)
