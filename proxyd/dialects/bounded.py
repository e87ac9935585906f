"""Reading JSON that a provider sent, at a cost that has a bound.

Owns: how much of an answer or an event is parsed. Must not know: what its members mean, sockets.
Invariants: what costs more than MOST_STRUCTURE is never parsed whole: the members that some observer reads are cut out
and parsed one by one as far as the bound goes, the others are not looked at; what had to be left out is None (an
`error` stays one), so its name is still there.

    {"usage":{...},"choices":[1 MiB of text],"logprobs":[1,000,000 parts]}  ->  {"usage":{...},"choices":[...]}
"""

from __future__ import annotations

import json
from typing import Any

import orjson

from proxyd._scan import members, mend, structure

# At 60 ns a unit 20 ms, and the observers need as much again for a list of small objects. 2,000 tool calls are 60,000;
# half of it would cut ordinary answers with logprobs, twice holds the loop for 100 ms.
MOST_STRUCTURE = 300_000
# What is parsed without being weighed: nothing in it can take longer than 10 ms.
_SMALL_BYTES = 32 * 1024
# Python's own parser takes 0.15 us a byte at worst.
_LENIENT_BYTES = 256 * 1024
# response.output, choices[0].message: deeper than that no count or reason lies.
_DEEPEST = 3
_SPACE = b" \t\r\n"

# All that the observers, the translator and the readers of errors look at.
_READ = frozenset(
    b"arguments choices code content content_block delta detail done done_reason error eval_count finish_reason "
    b"function function_call incomplete_details index message model msg name object output param prompt_eval_count "
    b"prompt_filter_results reasoning reasoning_content refusal response status stop_reason text thinking timings "
    b"tool_calls type usage x_groq".split()
)
_HOLDERS = (b"response", b"message", b"delta")
_INSTEAD: dict[bytes, Any] = {b"error": "an error with too many parts to be read", b"prompt_filter_results": True}


def read_json(data: bytes, *, lenient: bool = True) -> tuple[Any, bool]:
    """The document, and whether members of it were left out. Raises ValueError for what is no JSON.

    `lenient`: half a surrogate pair, escaped, is read; it is legal and a provider may cut an emoji there.
    """
    if len(data) <= _SMALL_BYTES or structure(data, MOST_STRUCTURE) <= MOST_STRUCTURE:
        return _loads(data, lenient), False
    spans = members(data)
    if not spans or data[spans[-1][3] :].strip(_SPACE) != b"}":
        raise ValueError("too many parts, and no object that came whole")
    return _picked(data, spans, 1, lenient), True


def _picked(data: bytes, spans: list[tuple[int, int, int, int]], depth: int, lenient: bool) -> dict[str, Any]:
    room = MOST_STRUCTURE
    picked: dict[str, Any] = {}
    for key_start, key_end, start, end in spans:
        name = data[key_start:key_end]
        if name not in _READ:
            continue
        value = data[start:end]
        cost = structure(value, room)
        if cost <= room:
            room -= cost
            picked[name.decode()] = _loads(value, lenient)
        else:
            picked[name.decode()] = _instead(name, value, depth, lenient)
    return picked


def _instead(name: bytes, value: bytes, depth: int, lenient: bool) -> Any:
    """What stands for a value that is too dear: the same without its dear members; of a list of choices the first."""
    if depth < _DEEPEST and name in _HOLDERS:
        return _picked(value, members(value), depth + 1, lenient)
    if depth < _DEEPEST and name == b"choices" and value.startswith(b"["):
        first = value[1:]
        return [_picked(first, members(first), depth + 1, lenient)]
    return _INSTEAD.get(name)


def _loads(data: bytes, lenient: bool) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:
        if not lenient or b"\\u" not in data:
            raise
    if len(data) > _LENIENT_BYTES:
        return orjson.loads(mend(data))
    try:
        return json.loads(data.decode())  # the halves are kept: two events may make a pair
    except RecursionError:
        raise ValueError("nested too deeply") from None
