"""The workers' questions to the telemetry process about what a user has spent: the sockets, and what goes over them.

Owns: one socketpair a worker seat, and the two messages. Must not know: ledgers, stores, loops.

    seat 0    o------ SOCK_SEQPACKET ------o  telemetry       question  number u64, user_id u64, window_since f64 (nan:
    seat 1    o----------------------------o                            not asked), token_iat i64 (-1: not asked)
                                                              answer    number u64, ok u8

An answer says nothing but that the ledger has been written (ok) or could not be. Made before the fork and kept by the
master, so that the successor of either side finds the same sockets, as does the image after execve (`fds`, `adopt`).
What a dead one left in them is told by the number.

Invariants: nothing here ever waits; a message is whole or not there at all (SOCK_SEQPACKET). The kernel holds about 270
questions a socket, and then a send says so.

Wiring (cli/serve.py):
    channel = Channel.create(seats)                    in the master, before the first fork
    channel.keep_asking(seat)                          in a worker: its end, for worker.asking.Asker
    writer.run(..., ledger=ledger, questions=channel, epoch=birth.epoch)      in the telemetry process
"""

from __future__ import annotations

import math
import socket
import struct
from collections.abc import Sequence
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
    """All seats' socketpairs. Every process that is forked has a copy; closing one closes it in that process alone."""

    __slots__ = ("_answering", "_asking")

    def __init__(self, asking: list[socket.socket], answering: list[socket.socket]) -> None:
        self._asking, self._answering = asking, answering

    @classmethod
    def create(cls, seats: int) -> Self:
        """One pair for each of the seats 0 to seats - 1. Raises OSError when the kernel gives none."""
        channel = cls([], [])
        try:
            for _ in range(seats):
                asking, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                channel._asking.append(asking)
                channel._answering.append(answering)
        except OSError:
            channel.close()
            raise
        return channel

    @classmethod
    def adopt(cls, fds: Sequence[int]) -> Self:
        """The channel whose `fds` these are, in the image after execve; owns them from then on. Raises ValueError for
        other descriptors, and leaves them to the caller."""
        ends: list[socket.socket] = []
        try:
            for fd in fds:
                ends.append(socket.socket(fileno=fd))
                if (ends[-1].family, ends[-1].type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
                    raise ValueError(f"descriptor {fd} is no end of a channel")
            if not ends or len(ends) % 2:
                raise ValueError(f"{len(ends)} descriptors are no pairs")
        except (OSError, ValueError) as error:
            for end in ends:
                end.detach()
            raise ValueError(f"the questions' sockets cannot be taken over: {error}") from error
        for end in ends:
            end.set_inheritable(False)
            end.setblocking(False)
        return cls(ends[::2], ends[1::2])

    def fds(self) -> list[int]:
        """Asking and answering end of seat 0, of seat 1, and so on: for `adopt`, once they are inheritable."""
        return [end.fileno() for pair in zip(self._asking, self._answering, strict=True) for end in pair]

    def keep_asking(self, seat: int) -> socket.socket:
        """In a worker: the seat's own end; all the others are closed here."""
        kept = self._asking[seat]
        for other in (*self._asking, *self._answering):
            if other is not kept:
                other.close()  # 128 seats: 0.2 ms; close_range(2) is no faster for what Python does around it
        return kept

    def keep_answering(self) -> list[socket.socket]:
        """In the telemetry process: its ends, by seat; the workers' are closed here."""
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
