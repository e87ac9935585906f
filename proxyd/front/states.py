"""The states of a client connection and the only moves between them.

Owns: the table. Must not know sockets, time or bytes.

                 +------------------------- keep-alive --------------------------+
                 v                                                               |
    accept -> IDLE -> HEAD -> BODY -> SERVING -+-> REPLYING ---------------------+
                                               +-> STREAMING (the relay's) ------+
                                               +-> HANDED    (aiohttp's) --------+
              IDLE, HEAD, BODY -(refused)-> REPLYING -> LINGERING -> CLOSED

Every state may end in CLOSED: the peer is gone, or a deadline passed. CLOSED absorbs.
"""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["EDGES", "State", "check_edge"]


class State(Enum):
    """Who owns the connection now, and what it waits for."""

    IDLE = auto()
    """Waits for a request's first byte. Deadline: keepalive (a fresh connection: head_timeout)."""
    HEAD = auto()
    """A head has begun. Deadline: head_timeout in total."""
    BODY = auto()
    """A body has begun. Deadline: body_timeout in total."""
    SERVING = auto()
    """The handler has the request; we watch for the client going away. No deadline of ours."""
    REPLYING = auto()
    """A complete answer is being written. Deadline: send_timeout between two writes."""
    STREAMING = auto()
    """The relay owns the descriptor's readiness. No deadline of ours."""
    HANDED = auto()
    """aiohttp owns the descriptor. No deadline of ours."""
    LINGERING = auto()
    """Answered and half-closed: what still comes is thrown away so that no RST overtakes the answer. Bounded."""
    CLOSED = auto()


EDGES: dict[State, frozenset[State]] = {
    State.IDLE: frozenset((State.HEAD, State.BODY, State.SERVING, State.REPLYING, State.CLOSED)),
    State.HEAD: frozenset((State.BODY, State.SERVING, State.REPLYING, State.CLOSED)),
    State.BODY: frozenset((State.SERVING, State.REPLYING, State.CLOSED)),
    State.SERVING: frozenset((State.REPLYING, State.STREAMING, State.HANDED, State.CLOSED)),
    State.REPLYING: frozenset((State.IDLE, State.LINGERING, State.CLOSED)),
    State.STREAMING: frozenset((State.IDLE, State.LINGERING, State.CLOSED)),
    State.HANDED: frozenset((State.IDLE, State.LINGERING, State.CLOSED)),
    State.LINGERING: frozenset((State.CLOSED,)),
    State.CLOSED: frozenset((State.CLOSED,)),
}


def check_edge(old: State, new: State) -> None:
    """Raises RuntimeError for a move that is not in the table: a bug of ours, never a peer's doing."""
    if new not in EDGES[old]:
        raise RuntimeError(f"a client connection cannot go from {old.name} to {new.name}")
