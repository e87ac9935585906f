"""The phases of one relayed request, and how each kind of end is booked.

Owns: the table of phases and the table of causes. Pure. Must not know sockets, clocks, dialects.

    ADMITTED -> CHOOSING -> CONNECTING -> SENDING -> AWAITING -> COLLECTING ---.
                   ^            |            |          |  '---> STREAMING -> ENDING
                   '------------'------------'----------'            |          |
        (another upstream, before a byte was relayed)                v          v
        every phase ------------------------------------------->  FINISHED (absorbs)

Invariants: a missing edge raises; FINISHED is entered once, and only there is the row written.
"""

from __future__ import annotations

from enum import Enum, StrEnum

__all__ = ["Cause", "Phase", "row_status", "transition"]


class Phase(Enum):
    """Where a request is. What each phase waits for has a deadline: see `deadlines`."""

    ADMITTED = "admitted"  # its intent is written
    CHOOSING = "choosing"  # which upstream
    CONNECTING = "connecting"  # waiting for a connection: pool, dial, TLS
    SENDING = "sending"  # the request goes out
    AWAITING = "awaiting"  # its head is awaited
    COLLECTING = "collecting"  # a body that is answered as a whole is read
    STREAMING = "streaming"  # the exchange relays
    ENDING = "ending"  # nothing more is read; the client takes the rest
    FINISHED = "finished"


_EDGES: dict[Phase, frozenset[Phase]] = {
    Phase.ADMITTED: frozenset({Phase.CHOOSING, Phase.FINISHED}),
    # to itself: a model without a reachable upstream, and then its fallback
    Phase.CHOOSING: frozenset({Phase.CHOOSING, Phase.CONNECTING, Phase.FINISHED}),
    Phase.CONNECTING: frozenset({Phase.SENDING, Phase.CHOOSING, Phase.CONNECTING, Phase.FINISHED}),
    Phase.SENDING: frozenset({Phase.AWAITING, Phase.CHOOSING, Phase.CONNECTING, Phase.FINISHED}),
    Phase.AWAITING: frozenset(
        {Phase.COLLECTING, Phase.STREAMING, Phase.CHOOSING, Phase.CONNECTING, Phase.ENDING, Phase.FINISHED}
    ),
    Phase.COLLECTING: frozenset({Phase.CONNECTING, Phase.CHOOSING, Phase.ENDING, Phase.FINISHED}),
    Phase.STREAMING: frozenset({Phase.ENDING, Phase.FINISHED}),
    Phase.ENDING: frozenset({Phase.FINISHED}),
    Phase.FINISHED: frozenset({Phase.FINISHED}),
}


def transition(old: Phase, new: Phase) -> Phase:
    """`new`, where the table has the edge; anything else is a bug of ours and raises."""
    if new not in _EDGES[old]:
        raise RuntimeError(f"no edge from {old.name} to {new.name}")
    return new


class Cause(StrEnum):
    """Why a request ended; the word in the log line's `cause`."""

    COMPLETE = "complete"  # the upstream's framing said so
    REFUSED_BY_UPSTREAM = "refused_by_upstream"  # its 4xx or 5xx was passed on
    CLIENT_GONE = "client_gone"
    SLOW_CLIENT = "slow_client"
    UPSTREAM_BROKEN = "upstream_broken"  # cut, reset, bad framing
    UPSTREAM_UNREACHABLE = "upstream_unreachable"  # no connection: refused, no route, DNS, all of ours busy
    UPSTREAM_TLS = "upstream_tls"  # no secure connection
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    TOTAL_TIMEOUT = "total_timeout"
    CONNECT_TIMEOUT = "connect_timeout"
    DRAINED = "drained"  # drain_timeout was over
    REVOKED = "revoked"  # the session was revoked
    QUOTA_EXCEEDED = "quota_exceeded"  # the user's tokens ran out within the stream
    INTERNAL = "internal"  # our own bug


_ROW_STATUS = {
    Cause.COMPLETE: "completed",
    Cause.REFUSED_BY_UPSTREAM: "upstream_error",
    Cause.CLIENT_GONE: "client_aborted",
    Cause.SLOW_CLIENT: "client_aborted",
    Cause.UPSTREAM_BROKEN: "upstream_error",
    Cause.UPSTREAM_UNREACHABLE: "upstream_error",
    Cause.UPSTREAM_TLS: "upstream_error",
    Cause.FIRST_BYTE_TIMEOUT: "timeout",
    Cause.IDLE_TIMEOUT: "timeout",
    Cause.TOTAL_TIMEOUT: "timeout",
    Cause.CONNECT_TIMEOUT: "timeout",
    Cause.DRAINED: "interrupted",
    Cause.REVOKED: "interrupted",
    Cause.QUOTA_EXCEEDED: "interrupted",
    Cause.INTERNAL: "interrupted",
}


def row_status(cause: Cause, answer: str) -> str:
    """The `status` of the transaction's row.

    `answer` is what the dialect says of the answer's content: completed, truncated, error. A body whose framing was
    whole but whose content was not is the upstream's error; a client that left after the terminal event had all of it.
    """
    if cause is Cause.COMPLETE and answer != "completed":
        return "upstream_error"
    return _ROW_STATUS[cause]
