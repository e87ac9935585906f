"""How an upstream's answer is handed to the client: relayed as a stream, or answered whole.

Owns: the client's head, the framing on its side, the translation of a body that came whole. Must not know: how the
upstream was chosen, retries. Each function ends with the answer begun (stream) or given (whole).
"""

from __future__ import annotations

from dataclasses import dataclass

from proxyd._frame import BODY_CHUNKED, BODY_CLOSE, BODY_LENGTH
from proxyd._relay import Exchange
from proxyd._sse import Splitter
from proxyd.dialects.ask import Ask, Outgoing
from proxyd.dialects.errors import upstream_error_body
from proxyd.dialects.media import SSE
from proxyd.dialects.observer import Observer
from proxyd.dialects.translate import Translator
from proxyd.dialects.usage import settle
from proxyd.front.connection import ClientConnection
from proxyd.front.replies import Framing, relay_head
from proxyd.relay.answer import Answer, Way, relayable, site_headers
from proxyd.relay.deadlines import Limits
from proxyd.relay.exchange import Shared, Stream, tls_of
from proxyd.relay.outcome import Transaction, error_words
from proxyd.relay.states import Cause, Phase
from proxyd.relay.tap import Tap
from proxyd.upstream.connection import Connection
from proxyd.wire.head import Headers

__all__ = ["Asker", "begin_stream", "reply_whole"]

# What one translated event may hold: nothing of it may pass before it is whole. A tool call with a file in it may have
# 1 MiB; twice this bound is twice the time that one event of escapes holds the loop.
MAX_TRANSLATED_BYTES = 2 * 1024 * 1024

_EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class Asker:
    """The client's side of a request."""

    client: ClientConnection
    ask: Ask
    cors: Headers
    version: tuple[int, int]
    transaction: Transaction


def begin_stream(
    asker: Asker,
    shared: Shared,
    answer: Answer,
    way: Way,
    observer: Observer | Translator,
    outgoing: Outgoing,
    connection: Connection,
    limits: Limits,
    max_head: int,
) -> tuple[Stream, Exchange, bytes]:
    """The stream, its exchange and the client's head, ready for `stream.start(exchange, head, ...)`."""
    ask, client, transaction = asker.ask, asker.client, asker.transaction
    is_sse = way is Way.EVENTS
    kind = answer.body_kind
    assert kind is not None
    length = answer.head.content_length or 0
    media = answer.media(streaming=ask.stream)
    tap: Tap | None = None
    if not is_sse:
        tap = Tap(observer, media, answer.content_type, answer.head.status, answer.coding)
    framing, out_kind = _framing(asker.version, kind, length, is_sse)
    keep_alive = client.may_keep_alive and framing != "close"
    headers = answer.head.headers
    if outgoing.translate:
        headers = [_EVENT_STREAM[0], *site_headers(headers)]
    elif outgoing.injected:
        headers = relayable(headers, shortened=True)
    head = relay_head(
        answer.head.status,
        answer.head.reason,
        headers,
        request_id=transaction.request_id,
        version=asker.version,
        framing=framing,
        keep_alive=keep_alive,
        is_stream=media is SSE,
        date=client.date,
        extra=asker.cors,
    )
    if isinstance(observer, Translator):
        preamble = observer.preamble()
        head += b"%x\r\n%b\r\n" % (len(preamble), preamble) if out_kind == BODY_CHUNKED else preamble
    transaction.http_status = answer.head.status
    stream = Stream(
        shared,
        client,
        connection,
        transaction,
        observer,
        ask.without_body(),
        tap,
        limits,
        is_sse=is_sse,
        keep_alive=keep_alive,
        upstream_keeps=answer.head.keep_alive and kind != BODY_CLOSE,
    )
    splitter: Splitter | None = None
    if is_sse and outgoing.translate:
        on_event = stream.on_limited_event if stream.meter.is_limited else observer.on_event
        splitter = Splitter(on_event, None, MAX_TRANSLATED_BYTES, MAX_TRANSLATED_BYTES)
    elif is_sse:
        splitter = Splitter(observer.on_event, observer.watch)
    fd = client.begin_stream()
    tls = tls_of(connection)
    exchange = Exchange(
        shared.engine, stream, fd, connection.fd, tls, kind, length, out_kind, splitter, tap is not None, max_head
    )
    return stream, exchange, head


def reply_whole(asker: Asker, answer: Answer, body: bytes, observer: Observer | Translator) -> None:
    """Answers with a body that was read wholly, and ends the transaction."""
    ask, transaction, status = asker.ask, asker.transaction, answer.head.status
    tap = Tap(observer, answer.media(streaming=ask.stream), answer.content_type, status, answer.coding)
    headers = relayable(answer.head.headers, shortened=False)
    out = body
    if not isinstance(observer, Translator):
        tap.feed(body)
        tap.finish(observer)
        observer.finish(True, tap.text_bytes, tap.sample)
    elif status == 200:
        headers = site_headers(answer.head.headers) + _EVENT_STREAM
        out = observer.preamble() + _translated(tap, body, observer)
        observer.finish(True, observer.text_bytes)
        out += observer.ending(True)
    else:
        # A status that is no error cannot be told on this route: the upstream did not do what it was asked.
        status = status if status >= 400 else 502
        headers = [*site_headers(answer.head.headers), (b"content-type", b"application/json")]
        out = upstream_error_body(status, body, transaction.request_id)
        tap.feed(body)
        tap.finish(observer)
        observer.finish(True, observer.text_bytes)
    transaction.move(Phase.ENDING)
    transaction.http_status = status
    transaction.bytes_out = len(out)
    transaction.first_event()
    tally = settle(observer, ask, observer.text_bytes, status < 400)
    answered = "completed" if tap.is_opaque or (status < 400 and not body) else observer.outcome
    transaction.secure(tally, answered)
    transaction.release()
    asker.client.reply(status, headers + asker.cors, out)
    cause = Cause.COMPLETE if status < 400 else Cause.REFUSED_BY_UPSTREAM
    transaction.finish(cause, answered, tally, detail=error_words(observer.error))


def _framing(version: tuple[int, int], kind: int, length: int, is_sse: bool) -> tuple[Framing, int]:
    """How the client gets the body: an event stream may grow or shrink, so it never has a length."""
    if kind == BODY_LENGTH and not is_sse:
        return length, BODY_LENGTH
    if version >= (1, 1):
        return "chunked", BODY_CHUNKED
    return "close", BODY_CLOSE


def _translated(tap: Tap, body: bytes, observer: Translator) -> bytes:
    """The frames of a body that came as a whole: JSON, or an event stream that was encoded."""
    frames: list[bytes] = []
    tap.divert(frames.append)
    tap.feed(body)
    tap.finish(observer)
    return b"".join(frames)
