"""One attempt at one upstream, on a connection that was acquired: send, read the head, read a whole body.

Owns: waiting for an upstream's bytes with deadlines, before anything is relayed. Must not know: which upstream comes
next, clients. Each function raises UpstreamError; what it was given is then good for nothing but to be closed.

Deadlines: `first_byte_timeout` for the first byte, `idle_timeout` for the rest of the head and between two reads of a
body, `total_timeout` over all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proxyd._frame import BODY_CLOSE, Unframer
from proxyd.dialects.ask import Outgoing
from proxyd.dialects.tokens import O200K
from proxyd.errors import UpstreamError, UpstreamErrorKind
from proxyd.relay.answer import Answer
from proxyd.relay.tap import MAX_BODY_BYTES
from proxyd.relay.upstream_head import query_without_credentials, request_head
from proxyd.upstream.connection import Connection
from proxyd.wire.head import HeadError, Headers, find_head_end, parse_response_head

__all__ = ["Patience", "collect_body", "read_head", "send_request", "vocabulary_ready"]

# Providers send 1 to 2 KB of head. Half would refuse Azure's with long policies; twice lets a broken one eat memory.
MAX_ANSWER_HEAD_BYTES = 64 * 1024
READ_BYTES = 16 * 1024
# Loading takes 20 ms of a processor. Half: on a busy machine the first answers that break off are booked by their
# bytes; twice: a first answer waits for what it may not need.
LOAD_WAIT_S = 0.1


class Patience:
    """How long one attempt may still take; times are seconds on the monotonic clock."""

    __slots__ = ("_kind", "_monotonic", "_name", "_until")

    def __init__(
        self,
        monotonic: Callable[[], float],
        until: float,
        name: str,
        kind: UpstreamErrorKind = UpstreamErrorKind.TOTAL_TIMEOUT,
    ) -> None:
        self._kind = kind
        self._monotonic = monotonic
        self._until = until
        self._name = name

    def within(self, timeout_s: float) -> float:
        """`timeout_s`, or what is left of the whole if that is less. Raises TOTAL_TIMEOUT when nothing is."""
        left = self._until - self._monotonic()
        if left <= 0:
            raise UpstreamError(self._kind, self._name, sent=True)
        return min(timeout_s, left)

    def part(self, timeout_s: float) -> Patience:
        """One thing that must be over `timeout_s` from now, however it goes on; late is IDLE_TIMEOUT."""
        until = self._monotonic() + timeout_s
        return Patience(self._monotonic, until, self._name, UpstreamErrorKind.IDLE_TIMEOUT)


async def vocabulary_ready(monotonic: Callable[[], float]) -> None:
    """Holds a worker's first answers until tokens can be counted, for LOAD_WAIT_S at most: the loading began with the
    first request, an upstream rarely answers sooner, and an answer that breaks off at once has its count."""
    until = monotonic() + LOAD_WAIT_S
    while O200K.is_loading and monotonic() < until:  # noqa: ASYNC110 - the thread that loads knows no loop
        await asyncio.sleep(0.002)


async def send_request(
    connection: Connection,
    outgoing: Outgoing,
    client_headers: Headers,
    query: bytes,
    request_id: str,
    patience: Patience,
) -> None:
    """Sends head and body. An upstream that answers before it has read everything is let: its answer counts."""
    origin = connection.origin
    path = outgoing.path
    kept = query_without_credentials(query) if query and not outgoing.translate else b""
    if kept:
        path += "?" + kept.decode("latin-1")
    head = request_head(
        origin.target(path),
        origin.host_header,
        origin.auth_headers(),
        client_headers,
        len(outgoing.body),
        request_id=request_id,
        dialect=origin.dialect,
        translate=outgoing.translate,
    )
    try:
        await connection.send(head + outgoing.body, patience.within(origin.config.first_byte_timeout))
    except UpstreamError as error:
        if error.kind is not UpstreamErrorKind.RESET or not connection.pending():
            raise


async def read_head(connection: Connection, patience: Patience) -> Answer:
    """The final head with what came behind it; 1xx heads are skipped, but for 101: nobody asked for another protocol.

    A head has one `idle_timeout` from its first byte to its last, however often a byte of it comes.
    """
    name = connection.origin.name
    config = connection.origin.config
    pace: Patience | None = None
    data = b""
    interim = 0
    while True:
        wait_s = config.first_byte_timeout if pace is None else pace.within(config.idle_timeout)
        more = await connection.recv(READ_BYTES, patience.within(wait_s))
        if not more:
            kind = UpstreamErrorKind.BAD_HEAD if data else UpstreamErrorKind.EOF_BEFORE_HEAD
            raise UpstreamError(kind, name, "closed within the head" if data else "", sent=True)
        searched = len(data)
        data += more
        while (end := find_head_end(data, max(0, searched - 3))) >= 0:
            try:
                head = parse_response_head(data[:end])
            except HeadError as error:
                raise UpstreamError(UpstreamErrorKind.BAD_HEAD, name, error.reason, sent=True) from None
            data = data[end:]
            searched = 0
            if head.status >= 200:
                return Answer(head, data)
            if head.status == 101:
                raise UpstreamError(UpstreamErrorKind.BAD_HEAD, name, "switches protocols unasked", sent=True)
            pace = None
            interim += end
        if pace is None and data:
            pace = patience.part(config.idle_timeout)
        if len(data) + interim > MAX_ANSWER_HEAD_BYTES:
            raise UpstreamError(UpstreamErrorKind.BAD_HEAD, name, "head too large", sent=True)
        if data and not b"HTTP/".startswith(data[:5]):
            raise UpstreamError(UpstreamErrorKind.BAD_HEAD, name, "not HTTP", sent=True)


async def collect_body(connection: Connection, answer: Answer, patience: Patience) -> tuple[bytes, bool]:
    """The whole body, and whether the connection ended where the body did, so that it may be used again."""
    name = connection.origin.name
    kind = answer.body_kind
    if kind is None:
        return b"", not answer.initial
    unframer = Unframer(kind, answer.head.content_length or 0)
    body = bytearray()
    data = answer.initial
    while True:
        if data:
            try:
                body += unframer.feed(data)
            except ValueError:
                raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, name, "bad framing", sent=True) from None
        if unframer.done:
            return bytes(body), unframer.leftover == 0
        if len(body) > MAX_BODY_BYTES:
            raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, name, "body too large", sent=True)
        data = await connection.recv(READ_BYTES, patience.within(connection.origin.config.idle_timeout))
        if not data:
            if kind == BODY_CLOSE:
                return bytes(body), False
            raise UpstreamError(UpstreamErrorKind.BROKEN_BODY, name, "closed within the body", sent=True)
