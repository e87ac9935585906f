"""The room's front door: read a request, build the upstream's, watch the answer, settle.

Owns: which observer and which body a route and a dialect get; everything else is re-exported from the files that
own it. Must not know: sockets, upstream choice, who pays. The relay imports this and `errors`.
"""

from __future__ import annotations

from proxyd.dialects import anthropic, openai_chat
from proxyd.dialects.anthropic import AnthropicObserver
from proxyd.dialects.ask import Ask, Dialect, Outgoing, Route, parse_ask
from proxyd.dialects.media import JSON, NDJSON, OPAQUE, SSE, Inflater, Media, inflater, is_identity, media_kind
from proxyd.dialects.observer import Observer
from proxyd.dialects.openai_chat import ChatObserver, EmbeddingsObserver, watch_for
from proxyd.dialects.openai_responses import ResponsesObserver
from proxyd.dialects.splice import spliced, wants_usage
from proxyd.dialects.tokens import O200K, estimate
from proxyd.dialects.translate import Translator
from proxyd.dialects.usage import Tally, Usage, settle

_OPENAI_PATHS = {
    Route.STREAM: "/chat/completions",
    Route.CHAT: "/chat/completions",
    Route.COMPLETIONS: "/completions",
    Route.RESPONSES: "/responses",
    Route.EMBEDDINGS: "/embeddings",
}
_ANTHROPIC_PATHS = {
    Route.STREAM: "/v1/messages",
    Route.MESSAGES: "/v1/messages",
    Route.COUNT_TOKENS: "/v1/messages/count_tokens",
}


def dialects_of(route: Route) -> frozenset[Dialect]:
    """The upstream dialects that can serve a route."""
    return frozenset(("openai", "anthropic")) if route.dialect is None else frozenset((route.dialect,))


def build(ask: Ask, dialect: Dialect, upstream_model: str, inject_usage: bool) -> Outgoing:
    """What to send upstream. `upstream_model` "" keeps the client's name (the site's route needs one).

    Native routes keep the client's bytes but for the splices; with none the body is the identical object. Build
    again with `inject_usage=False` for the one resend after is_usage_rejection(); the site's route is asked for
    usage, and resent without, in the same way. With the first request the vocabulary begins to be loaded: any answer
    may end uncounted.
    """
    O200K.prepare()
    path = (_OPENAI_PATHS if dialect == "openai" else _ANTHROPIC_PATHS)[ask.route]
    if ask.route is Route.STREAM:
        model = upstream_model or ask.model
        assert model, "the site's route is built with a model's name"
        if dialect == "anthropic":
            return Outgoing(path, anthropic.site_request(ask, model), injected=False, translate=True)
        body = openai_chat.site_request(ask, model, ask_usage=inject_usage)
        return Outgoing(path, body, injected=inject_usage, translate=True)
    inject = inject_usage and wants_usage(ask)
    return Outgoing(path, spliced(ask, upstream_model, inject), injected=inject, translate=False)


def prompt_tokens(ask: Ask, dialect: Dialect) -> int:
    """Our count of a request that was sent and not answered."""
    if ask.route is Route.COUNT_TOKENS:
        return 0
    return ask.prompt.tokens(AnthropicObserver.factor if dialect == "anthropic" else Observer.factor)


def make_observer(
    ask: Ask, dialect: Dialect, outgoing: Outgoing, *, request_id: str, epoch: int
) -> Observer | Translator:
    """The observer of one answer to `outgoing`."""
    if outgoing.translate:
        inner: Observer = ChatObserver(None, hides=False) if dialect == "openai" else AnthropicObserver(None)
        return Translator(inner, ask, request_id=request_id, epoch=epoch)
    if dialect == "anthropic":
        return AnthropicObserver()
    if ask.route is Route.RESPONSES:
        return ResponsesObserver()
    if ask.route is Route.EMBEDDINGS:
        return EmbeddingsObserver()
    watch = watch_for(many=ask.many_choices, legacy=ask.route is Route.COMPLETIONS)
    return ChatObserver(watch, hides=outgoing.injected)


__all__ = [
    "JSON",
    "NDJSON",
    "OPAQUE",
    "SSE",
    "Ask",
    "Dialect",
    "Inflater",
    "Media",
    "Observer",
    "Outgoing",
    "Route",
    "Tally",
    "Translator",
    "Usage",
    "build",
    "dialects_of",
    "estimate",
    "inflater",
    "is_identity",
    "make_observer",
    "media_kind",
    "parse_ask",
    "prompt_tokens",
    "settle",
]
