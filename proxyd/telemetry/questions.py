"""The workers' questions to the telemetry process about what a user has spent: the sockets, and what goes over them.

Owns: one socketpair a worker slot, and the two messages. Must not know: ledgers, stores, loops.

    worker 0  o------ SOCK_SEQPACKET ------o  telemetry       question  number u64, user_id u64, window_since f64 (nan:
    worker 1  o----------------------------o                            not asked), token_iat i64 (-1: not asked)
                                                              answer    number u64, ok u8

An answer says nothing but that the ledger has been written (ok) or could not be. Made before the fork and kept by the
master, so that the successor of either side finds the same sockets. What a dead one left in them is told by the number.

Invariants: nothing here ever waits; a message is whole or not there at all (SOCK_SEQPACKET). The kernel holds about 270
questions a socket, and then a send says so.

Wiring (cli/serve.py):
    channel = Channel.create(workers)                  in the master, before the first fork
    channel.keep_asking(slot)                          in a worker: its end, for worker.asking.Asker
    writer.run(..., ledger=ledger, questions=channel, epoch=birth.epoch)      in the telemetry process
"""

from __future__ import annotations

import math
import socket
import struct
from typing import NamedTuple, Self

__all__ = ["ANSWER_BYTES", "QUESTION_BYTES", "Channel", "Question", "pack_answer", "pack_question", "unpack_answer",
           "unpack_question"]  # fmt: skip

_QUESTION = struct.Struct("<QQdq")
_ANSWER = struct.Struct("<QB")
QUESTION_BYTES = _QUESTION.size
ANSWER_BYTES = _ANSWER.size


class Question(NamedTuple):
    """What one worker wants to know. `window_since` is wall seconds; None of either: that is not asked."""

    number: int
    user_id: int
    window_since: float | None
    token_iat: int | None


class Channel:
    """All slots' socketpairs. Every process that is forked has a copy; closing one closes it in that process alone."""

    __slots__ = ("_answering", "_asking")

    def __init__(self, asking: list[socket.socket], answering: list[socket.socket]) -> None:
        self._asking, self._answering = asking, answering

    @classmethod
    def create(cls, slots: int) -> Self:
        """One pair for each of the worker slots 0 to slots - 1. Raises OSError when the kernel gives none."""
        channel = cls([], [])
        try:
            for _ in range(slots):
                asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                channel._asking.append(asking)
                channel._answering.append(answering)
                asking.setblocking(False)
                answering.setblocking(False)
        except OSError:
            channel.close()
            raise
        return channel

    def keep_asking(self, slot: int) -> socket.socket:
        """In a worker: the slot's own end; all the others are closed here."""
        kept = self._asking[slot]
        for other in (*self._asking, *self._answering):
            if other is not kept:
                other.close()
        return kept

    def keep_answering(self) -> list[socket.socket]:
        """In the telemetry process: its ends, by slot; the workers' are closed here."""
        for other in self._asking:
            other.close()
        return self._answering

    def close(self) -> None:
        for end in (*self._asking, *self._answering):
            end.close()


def pack_question(question: Question) -> bytes:
    """Raises struct.error for a number that no column of the store holds either."""
    since = math.nan if question.window_since is None else question.window_since
    iat = -1 if question.token_iat is None else question.token_iat
    return _QUESTION.pack(question.number, question.user_id, since, iat)


def unpack_question(data: bytes) -> Question | None:
    """None when the bytes are none."""
    if len(data) != QUESTION_BYTES:
        return None
    number, user_id, since, iat = _QUESTION.unpack(data)
    return Question(number, user_id, since if math.isfinite(since) else None, iat if iat >= 0 else None)


def pack_answer(number: int, ok: bool) -> bytes:
    return _ANSWER.pack(number, ok)


def unpack_answer(data: bytes) -> tuple[int, bool] | None:
    """(number, ok); None when the bytes are none."""
    if len(data) != ANSWER_BYTES:
        return None
    number, ok = _ANSWER.unpack(data)
    return (number, bool(ok)) if ok <= 1 else None
