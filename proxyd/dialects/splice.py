"""Changing a request body in place: the model's name, and `stream_options.include_usage`.

Owns: the byte splices of usage-rules.md ("Injecting"). Must not know: routes' answers, upstreams.
Invariants: every byte outside the spliced spans is the client's own, whitespace included; with nothing to change the
identical bytes object comes back; what results parses to the same document but for the intended change.

    {"model": "a", "stream": true}            body
             ^^^                              rename: only the value's text
                                 ^            injection without stream_options: behind the last member
"""

from __future__ import annotations

import orjson

from proxyd._scan import members
from proxyd.dialects.ask import Ask, Route, key_name, top_members

_OPTIONS = b'{"include_usage":true}'
_ASKING = (Route.CHAT, Route.COMPLETIONS)

Edit = tuple[int, int, bytes]  # start, end, replacement
Span = tuple[int, int, int, int]  # key start, key end, value start, value end; spans of a key exclude its quotes


def wants_usage(ask: Ask) -> bool:
    """Whether usage may be injected: one of two routes, `stream` literally true, and the client did not ask itself.

    `stream_options` of another type than object or null is the upstream's to refuse, so it is left alone.
    """
    if ask.route not in _ASKING or ask.document.get("stream") is not True:
        return False
    options = ask.document.get("stream_options")
    return options is None or (isinstance(options, dict) and options.get("include_usage") is not True)


def spliced(ask: Ask, upstream_model: str, inject: bool) -> bytes:
    """`ask.body` with the model renamed (when `upstream_model` is another name) and usage asked for (when `inject`)."""
    rename = bool(upstream_model) and upstream_model != ask.model
    if not rename and not inject:
        return ask.body
    body = ask.body
    top = top_members(body)
    named = {key_name(body[span[0] : span[1]]): span for span in top}
    edits: list[Edit] = []
    if rename:
        _, _, start, end = named["model"]
        edits.append((start, end, orjson.dumps(upstream_model)))
    if inject:
        edits.extend(_usage_edits(body, top, named.get("stream_options")))
    return _apply(body, edits)


def _usage_edits(body: bytes, top: list[Span], options: Span | None) -> list[Edit]:
    if options is None:
        end = top[-1][3]
        return [(end, end, b',"stream_options":' + _OPTIONS)]
    start, end = options[2], options[3]
    if body[start:end] == b"null":
        return [(start, end, _OPTIONS)]
    inner = [(a + start, b + start, c + start, d + start) for a, b, c, d in members(body[start:end])]
    if not inner:
        return [(start + 1, start + 1, _OPTIONS[1:-1])]
    return _merge_edits(body, inner)


def _merge_edits(body: bytes, inner: list[Span]) -> list[Edit]:
    """Turn include_usage on among the members of an object, and take `continuous_usage_stats` out.

    It was without effect while include_usage was off, and would now give the client a usage on every chunk that it
    never asked for.
    """
    names = [key_name(body[span[0] : span[1]]) for span in inner]
    kept = [at for at, name in enumerate(names) if name != "continuous_usage_stats"]
    if not kept:
        return [(inner[0][0] - 1, inner[-1][3], _OPTIONS[1:-1])]
    edits: list[Edit] = []
    if kept[0] > 0:
        edits.append((inner[0][0] - 1, inner[kept[0]][0] - 1, b""))
    edits.extend(
        (inner[at - 1][3], inner[at][3], b"")
        for at in range(kept[0], len(inner))
        if names[at] == "continuous_usage_stats"
    )
    present = [at for at in kept if names[at] == "include_usage"]
    if present:
        edits.extend((inner[at][2], inner[at][3], b"true") for at in present)
    else:
        end = inner[kept[-1]][3]
        edits.append((end, end, b"," + _OPTIONS[1:-1]))
    return edits


def _apply(body: bytes, edits: list[Edit]) -> bytes:
    """Edits do not overlap; an insertion at the start of a removal comes out before it."""
    pieces: list[bytes] = []
    at = 0
    for start, end, text in sorted(edits, key=lambda edit: edit[:2]):
        pieces += (body[at:start], text)
        at = end
    pieces.append(body[at:])
    return b"".join(pieces)
