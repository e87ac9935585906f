"""Errors in the words of each dialect: those we send, and those that providers send.

Owns: error bodies, in-stream error events, reading every known error shape, the "does not know stream_options"
test, and the models page. Must not know: which connection, which upstream. Invariants: what is sent makes the real
SDKs raise (openai: a data object with a truthy `error`; anthropic: `event: error`, read in openai-python 3.52.0 and
anthropic-python 2.11.0 `_streaming.py`); nothing read here raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import orjson

from proxyd.dialects.ask import Route
from proxyd.dialects.bounded import read_json
from proxyd.errors import Refusal

Error = dict[str, Any]  # message: str, type: str|None, code: str|int|None, param: str|None

_ANTHROPIC_TYPE = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}

_RETRYABLE_TYPES = frozenset(
    ("overloaded_error", "rate_limit_error", "api_error", "server_error", "timeout_error", "internal_server_error")
)
_REJECTIONS = (
    b"stream_options",
    b"include_usage",
    b"extra_forbidden",
    b"Unknown parameter",
    b"Unrecognized request argument",
)
# What is kept of a body that is no JSON; enough for a title, and no page in a log line.
_TEXT_KEPT = 300
# The title and the first words of a page lie in it, behind a style sheet of the usual size.
_PAGE_READ = 16 * 1024
_MOST_DETAILS = 20


class Named(Protocol):
    """A configured model, as far as its page goes."""

    @property
    def name(self) -> str: ...


def is_anthropic(route_or_path: Route | str) -> bool:
    """Whether errors on this path are told Anthropic's way."""
    path = str(route_or_path)
    return path == "/v1/messages" or path.startswith(("/v1/messages/", "/v1/messages?"))


def anthropic_type(status: int) -> str:
    """Anthropic's error type by status (docs: api/errors)."""
    named = _ANTHROPIC_TYPE.get(status)
    if named is not None:
        return named
    return "api_error" if status >= 500 else "invalid_request_error"


def error_body(route_or_path: Route | str, refusal: Refusal, request_id: str) -> bytes:
    """The JSON body of our own refusal."""
    error: Error
    if is_anthropic(route_or_path):
        error = {"type": anthropic_type(refusal.status), "message": refusal.message}
        return orjson.dumps({"type": "error", "error": error, "request_id": request_id})
    error = {"message": refusal.message, "type": refusal.type, "code": refusal.code, "param": refusal.param}
    return orjson.dumps({"error": {**error, "request_id": request_id}})


def error_event(dialect: Route | str, type: str, message: str, code: str | None, request_id: str) -> bytes:
    """One SSE block that ends a native stream. `dialect`: a Route, or "openai", "responses", "anthropic".

    Only to be put at an event boundary.
    """
    if dialect in ("anthropic", Route.MESSAGES):
        event: Error = {"type": "error", "error": {"type": type, "message": message}, "request_id": request_id}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    error = {"message": message, "type": type, "code": code, "param": None, "request_id": request_id}
    if dialect in ("responses", Route.RESPONSES):
        # the documented event is flat; the SDKs raise on a truthy `error`, as OpenAI's own wire has it: both
        event = {"type": "error", "code": code, "message": message, "param": None, "error": error}
        return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"
    return b"data: " + orjson.dumps({"error": error}) + b"\n\n"


def is_usage_rejection(status: int, body: bytes) -> bool:
    """Whether an upstream refused the injected `stream_options`: the original is then sent once more."""
    return status in (400, 422) and any(word in body for word in _REJECTIONS)


# --- reading ----------------------------------------------------------------------------------------------------------


def make_error(message: Any, type: Any = None, code: Any = None, param: Any = None) -> Error:
    """The one shape that errors have inside; a message that is an object (Mistral) becomes its JSON text."""
    if message is not None and not isinstance(message, str):
        message = _json_text(message)
    return {
        "message": _whole(message or ""),
        "type": _whole(type) if isinstance(type, str) else None,
        "code": _code(code),
        "param": _whole(param) if isinstance(param, str) else None,
    }


def _code(code: Any) -> str | int | None:
    if isinstance(code, str):
        return _whole(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and abs(code) < 1 << 53 else None


def _whole(text: str) -> str:
    """Without halves of surrogate pairs, which no encoder of ours could write again."""
    return text.encode("utf-8", "replace").decode()


def _json_text(value: Any) -> str:
    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return str(value)


def read_error_value(error: Any) -> Error:
    """What stood under `error`: an object (OpenAI, Anthropic, OpenRouter, Gemini), or a text (Ollama)."""
    if isinstance(error, dict):
        kind = error.get("type")
        return make_error(
            error.get("message", error.get("msg", error)),
            kind if kind is not None else error.get("status"),
            error.get("code"),
            error.get("param"),
        )
    return make_error(error)


def read_error(document: Any) -> Error | None:
    """The error in a JSON document, or None when it holds none: nested, flat (vLLM), `detail` (FastAPI), array
    (Gemini)."""
    if isinstance(document, list):
        return read_error(document[0]) if document else None
    if not isinstance(document, dict):
        return None
    if document.get("error"):
        return read_error_value(document["error"])
    if document.get("object") == "error":
        return make_error(document.get("message"), document.get("type"), document.get("code"), document.get("param"))
    return None


def read_error_body(status: int, body: bytes) -> Error:
    """The error of a 4xx/5xx answer, whatever it is: JSON of any known shape, or a page of HTML or text."""
    try:
        document, _ = read_json(body.strip(b" \t\r\n"), lenient=False)
    except ValueError:
        text = _visible(body[:_PAGE_READ].decode("utf-8", "replace"))
        return make_error(" ".join(text.split())[:_TEXT_KEPT] or f"the upstream answered {status}")
    found = read_error(document)
    if found is not None:
        return found
    if isinstance(document, dict):
        if "detail" in document:
            return make_error(_detail(document["detail"]), document.get("type"), document.get("code"))
        if "message" in document:
            return make_error(document["message"], document.get("type"), document.get("code"), document.get("param"))
    return make_error(document if document else f"the upstream answered {status}")


def _visible(page: str) -> str:
    """The text between the tags of a page, scripts and styles left out. Linear: each end is searched from its start."""
    lower = page.lower()
    if len(lower) != len(page):
        lower = page  # a letter whose small form is two: tags are ASCII, those in capitals are then missed
    pieces: list[str] = []
    at = 0
    while (start := page.find("<", at)) >= 0:
        pieces.append(page[at:start])
        end = page.find(">", start)
        for hidden in ("script", "style"):
            if end >= 0 and lower.startswith(hidden, start + 1) and not lower[start + 1 + len(hidden)].isalnum():
                end = lower.find(f"</{hidden}", end)
                end = page.find(">", end) if end >= 0 else -1
        if end < 0:
            return " ".join(pieces)
        at = end + 1
    return " ".join((*pieces, page[at:]))


def _detail(detail: Any) -> Any:
    if isinstance(detail, list) and detail and isinstance(detail[0], dict) and isinstance(detail[0].get("msg"), str):
        return "; ".join(str(entry.get("msg")) for entry in detail[:_MOST_DETAILS] if isinstance(entry, dict))
    return detail


def translate_json_error(status: int, body: bytes) -> Error:
    """What an upstream's refusal becomes on the site's route: the same error object, its type never missing."""
    error = read_error_body(status, body)
    if error["type"] is None:
        error["type"] = Refusal(status, "", "").type if 400 <= status <= 599 else "api_error"
    if error["code"] is None:
        error["code"] = status
    return error


def upstream_error_body(status: int, body: bytes, request_id: str) -> bytes:
    """The JSON answer of the site's route to an upstream's refusal."""
    return orjson.dumps({"error": {**translate_json_error(status, body), "request_id": request_id}})


def is_retryable(error: Error) -> bool:
    """Whether asking again may help: by status where the code is one, else by type."""
    code = error.get("code")
    if isinstance(code, int):
        return code in (408, 409, 429) or code >= 500
    return error.get("type") in _RETRYABLE_TYPES and code not in ("insufficient_quota", "quota_exceeded")


def models_page(models: Iterable[Named]) -> bytes:
    """`GET /v1/models`, OpenAI's shape; the `*` that takes any name is no name."""
    page = [
        {"id": model.name, "object": "model", "created": 0, "owned_by": "proxyd"}
        for model in models
        if model.name != "*"
    ]
    return orjson.dumps({"object": "list", "data": page})
