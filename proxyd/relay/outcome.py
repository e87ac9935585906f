"""The one end of a request: row, ledger, metrics and log line, exactly once.

Owns: what is written where when a request ends, whatever ended it. Must not know sockets, dialects or how it got here.

    Transaction.begin()  -> intent in the spool, before any upstream is contacted
    .checkpoint(...)     -> counts so far, while it streams
    .progress(tokens)    -> may it go on: the user's tokens, all workers together
    .release()           -> the concurrency permit is given back: nothing more is asked of an upstream
    .secure(tally, ...)  -> how it is about to end, written before its last bytes are sent
    .finish(cause, ...)  -> ticket settled or refunded, final record, metrics, access log; later calls do nothing

Invariant: after begin() there is exactly one finish(), or the process died and the spool's reader writes the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from proxyd.access.admission import Ticket
from proxyd.access.session import Session
from proxyd.clock import Clock
from proxyd.dialects.usage import Tally
from proxyd.log import Log
from proxyd.relay.book import Book
from proxyd.relay.instruments import Instruments
from proxyd.relay.states import Cause, Phase, row_status, transition

__all__ = ["CLIENT_LEFT", "NOTHING_SPENT", "Transaction", "error_words"]

# The status in log and metric of a request whose client left before any answer, as in nginx's logs.
CLIENT_LEFT = 499
NOTHING_SPENT = Tally(0, 0, 0, 0, True)
# A provider's own word for an error. Prose, which may quote the prompt, is none.
_WORD = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")


def error_words(error: Mapping[str, Any] | None) -> str:
    """The type and code of a provider's error object for the log: `type=... code=...`; never its message."""
    found = []
    for name in ("type", "code"):
        value = (error or {}).get(name)
        if type(value) is int:
            value = str(value)
        if isinstance(value, str) and _WORD.fullmatch(value):
            found.append(f"{name}={value}")
    return " ".join(found)


class Transaction:
    """The accounting of one admitted request."""

    __slots__ = (
        "_book",
        "_clock",
        "_instruments",
        "_log",
        "_on_finished",
        "_ticket",
        "_txn",
        "attempts",
        "bytes_in",
        "bytes_out",
        "created_at",
        "events",
        "http_status",
        "is_stream",
        "model_id",
        "model_name",
        "peer",
        "phase",
        "prompt_estimate",
        "request_bytes",
        "request_id",
        "reused",
        "route",
        "session",
        "started",
        "ttft_ms",
        "upstream",
        "upstream_status",
    )  # fmt: skip

    def __init__(
        self,
        *,
        request_id: str,
        route: str,
        session: Session,
        model_name: str,
        model_id: int,
        is_stream: bool,
        peer: str,
        started: float,
        prompt_estimate: int,
        ticket: Ticket,
        clock: Clock,
        book: Book,
        instruments: Instruments,
        log: Log,
        on_finished: Callable[[Transaction], None],
    ) -> None:
        self.request_id = request_id
        self.route = route
        self.session = session
        self.model_name = model_name
        self.model_id = model_id
        self.is_stream = is_stream
        self.peer = peer
        self.started = started
        self.prompt_estimate = prompt_estimate
        self.phase = Phase.ADMITTED
        self.created_at = clock.wall()
        self.upstream = ""
        self.upstream_status = 0
        self.http_status = 0
        self.attempts = 0
        self.reused = False
        self.ttft_ms = 0
        self.events = 0
        self.request_bytes = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._ticket = ticket
        self._clock = clock
        self._book = book
        self._instruments = instruments
        self._log = log
        self._on_finished = on_finished
        self._txn = book.new_txn()

    def begin(self) -> None:
        """Writes the intent. The spool flushes at the end of this loop turn, so before anything is sent upstream."""
        self._book.intent(
            self._txn,
            self.request_id,
            self.session.user_id,
            self.session.tenant,
            self.model_id,
            self.created_at,
            self.prompt_estimate,
        )
        if self.is_stream:
            self._instruments.streams(self.session.tenant, 1)

    def move(self, phase: Phase) -> None:
        """Enters `phase`; raises for an edge that the table does not have."""
        self.phase = transition(self.phase, phase)

    @property
    def is_finished(self) -> bool:
        return self.phase is Phase.FINISHED

    def first_event(self) -> None:
        """The first event (or byte) of the answer was relayed."""
        waited = self._clock.monotonic() - self.started
        self.ttft_ms = max(1, round(waited * 1000))
        if self.is_stream:
            self._instruments.first_event.record(waited)

    def checkpoint(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Counts so far, estimated where the provider has told none."""
        self._book.checkpoint(
            self._txn,
            prompt_tokens,
            completion_tokens,
            attempts=self.attempts,
            ttft_ms=self.ttft_ms,
            duration_ms=self._duration_ms(),
            upstream=self.upstream,
        )

    def progress(self, tokens: int) -> bool:
        """Tells what the request has used so far. False: the user is over the line, so a stream ends here."""
        return self._ticket.progress(tokens)

    def tokens_left(self) -> int | None:
        """How many more tokens the user has until the line; None without one."""
        return self._ticket.tokens_left()

    def share(self) -> int | None:
        """How many tokens it may use until it is looked at again: of what is left, where others of the user are under
        way, a part. None without a line."""
        return self._ticket.share()

    def release(self) -> None:
        """The upstream's part is over: another request of the tenant may begin, before a client can see this one's end.
        Later calls do nothing."""
        self._ticket.release()

    def secure(self, tally: Tally, answer: str) -> None:
        """Writes the end before the answer's last bytes leave: a client that has them may take it for billed, and a
        kill -9 between that send and finish() would leave an interruption with an estimate. Cost: one write(2)."""
        cause = Cause.REFUSED_BY_UPSTREAM if self.upstream_status >= 400 else Cause.COMPLETE
        self._book.checkpoint(
            self._txn,
            tally.prompt_tokens,
            tally.completion_tokens,
            attempts=self.attempts,
            ttft_ms=self.ttft_ms,
            duration_ms=self._duration_ms(),
            upstream=self.upstream,
            cached_tokens=tally.cached_tokens,
            reasoning_tokens=tally.reasoning_tokens,
            ending=(row_status(cause, answer), tally.estimated),
        )
        self._book.flush()

    def finish(self, cause: Cause, answer: str, tally: Tally, *, detail: str = "") -> None:
        """Ends the request. `answer`: completed, truncated or error, the dialect's word for the content."""
        if self.phase is Phase.FINISHED:
            return
        self.phase = transition(self.phase, Phase.FINISHED)
        status = row_status(cause, answer)
        duration_ms = self._duration_ms()
        # The ticket first: what telemetry counts as stored must have been settled before, or a kill between the two
        # leaves a row that the shared ledger takes off the user's spending. This way round it counts twice, until the
        # ledger is mended: a user is refused a little early, never let through. Both are of one turn of the loop, and
        # the record is written at its end.
        spent = tally.prompt_tokens + tally.completion_tokens
        if spent:
            self._ticket.settle(spent)
        else:
            self._ticket.refund()
        self._book.final(
            self._txn,
            self.session.user_id,
            self.model_id,
            tally.prompt_tokens,
            tally.completion_tokens,
            self.created_at,
            tenant=self.session.tenant,
            request_id=self.request_id,
            status=status,
            estimated=tally.estimated,
            cached_tokens=tally.cached_tokens,
            reasoning_tokens=tally.reasoning_tokens,
            upstream=self.upstream,
            attempts=self.attempts,
            ttft_ms=self.ttft_ms,
            duration_ms=duration_ms,
        )
        self._measure(cause, status, tally)
        self._write_log(cause, status, tally, duration_ms, detail)
        self._on_finished(self)

    def _measure(self, cause: Cause, status: str, tally: Tally) -> None:
        instruments = self._instruments
        instruments.request(self.route, self.http_status or CLIENT_LEFT)
        if self.is_stream:
            instruments.streams(self.session.tenant, -1)
        if status == "client_aborted":
            instruments.aborts.add(1)
        for kind, count in (
            ("prompt", tally.prompt_tokens),
            ("completion", tally.completion_tokens),
            ("cached", tally.cached_tokens),
            ("reasoning", tally.reasoning_tokens),
        ):
            instruments.tokens(self.model_name, kind, count)

    def _write_log(self, cause: Cause, status: str, tally: Tally, duration_ms: int, detail: str) -> None:
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "peer": self.peer,
            "route": self.route,
            "status": self.http_status or CLIENT_LEFT,
            "user": self.session.user_id,
            "tenant": self.session.tenant,
            "model": self.model_name,
            "stream": self.is_stream,
            "upstream": self.upstream,
            "upstream_status": self.upstream_status,
            "attempts": self.attempts,
            "reused": self.reused,
            "outcome": status,
            "cause": cause.value,
            "prompt_tokens": tally.prompt_tokens,
            "completion_tokens": tally.completion_tokens,
            "cached_tokens": tally.cached_tokens,
            "reasoning_tokens": tally.reasoning_tokens,
            "estimated": tally.estimated,
            "ttft_ms": self.ttft_ms,
            "duration_ms": duration_ms,
            "events": self.events,
            "request_bytes": self.request_bytes,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }
        if detail:
            fields["detail"] = detail
        self._log.access(fields)

    def _duration_ms(self) -> int:
        return max(0, round((self._clock.monotonic() - self.started) * 1000))
