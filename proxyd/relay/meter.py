"""How much of an answer has gone by, and where to look at it again.

Owns: the counts so far, their checkpoints, the next mark of a stream whose user has a quota. Must not know: how a
stream ends, what is told to a client, who else spends.

    mark, or the wheel's look -> checkpoint in the spool -> transaction.progress(): may it go on? -> the next mark

Where nothing limits the user, marks are a kilobyte of text apart, counts are quarters of bytes, and that is all. Where
something does, counts are those that will be booked (the provider's where it told them, else by the first kilobyte of
the text), the exchange is told how many bytes of text are left until the line, and it stops at the event that crosses
it. So a stream that is alone passes its line by one event (and a few tokens in its first kilobyte, where the count may
still change its mind). Streams of one user that run side by side know of each other what those had used at their own
last looks; so each goes only half of its share of what is left before it looks again, and the last tokens are halved
until they are gone. n streams of one pace pass the line by about n events, and however they run by n marks (MARK_BYTES
of text, about 256 tokens) and n events at most.
"""

from __future__ import annotations

import math

from proxyd._relay import Exchange
from proxyd.dialects.ask import Ask
from proxyd.dialects.observer import Observer
from proxyd.dialects.tokens import O200K, SAMPLE_BYTES, Text, estimate, unescaped
from proxyd.dialects.translate import Translator
from proxyd.relay.outcome import Transaction
from proxyd.relay.tap import Tap

__all__ = ["Meter"]

# As in the compiled exchange: 256 tokens. Half writes twice the checkpoints, twice lets parallel streams pass the line
# by twice as much.
MARK_BYTES = 1024
# The first look, which learns what kind of text this is: half learns it from two words, twice lets a small quota be
# passed by as much. Also the least where the provider has told a count: text does not move it, and every event would be
# a mark with a record of its own.
FIRST_MARK_BYTES = 64
# While less than a kilobyte is known, marks are half of the way to the line, and the whole of it from here on. Half
# looks once more; twice passes the line by twice as much where the text is not what its beginning was.
FEW_TOKENS = 16
# No answer is longer, and no further does a mark lie: the exchange counts in 64 bits, a quota may be 2^63 - 1.
FAR = 1 << 40


class Meter:
    """The counts of one stream, from its start to its end."""

    __slots__ = (
        "_ask", "_exchange", "_is_counted", "_mark_at", "_observer", "_rate", "_sampled", "_seen", "_tap",
        "_transaction", "is_limited",
    )  # fmt: skip

    def __init__(self, transaction: Transaction, ask: Ask, observer: Observer | Translator, tap: Tap | None) -> None:
        self._transaction = transaction
        self._ask = ask
        self._observer = observer
        self._tap = tap
        self._exchange: Exchange | None = None
        self._seen = -1
        self._mark_at = 0
        self._sampled = 0
        self._is_counted = False
        self._rate = observer.factor / 4
        self.is_limited = transaction.tokens_left() is not None

    def start(self, exchange: Exchange) -> None:
        """The answer begins. Its prompt is spent, even if that alone is more than was left."""
        self._exchange = exchange
        if self.is_limited:
            self._transaction.progress(self._prompt())
            self._set_mark(exchange, 0)

    def close(self) -> None:
        self._exchange = None

    @property
    def text_bytes(self) -> int:
        """Text metered so far, by whichever part meters this answer."""
        seen = 0 if self._exchange is None else self._exchange.text_bytes
        return max(seen, self._observer.text_bytes, self._tap.text_bytes if self._tap is not None else 0)

    def on_text(self, text_bytes: int) -> None:
        """So much text was counted where the exchange does not see it: it hears of it at the mark."""
        if text_bytes >= self._mark_at and self._exchange is not None:
            self._exchange.mark_after(0)

    def look(self) -> bool:
        """A checkpoint, if anything came since the last; False when the user is over the line."""
        exchange, transaction = self._exchange, self._transaction
        if exchange is None:
            return True
        is_news = exchange.bytes_in != self._seen
        if not is_news and not self.is_limited:
            return True
        self._seen = exchange.bytes_in
        prompt, completion = self._prompt(), self._completion(exchange)
        if is_news:
            transaction.checkpoint(prompt, completion)
        goes_on = transaction.progress(prompt + completion)
        if self.is_limited:
            self._set_mark(exchange, completion)
        return goes_on

    # -- counts --------------------------------------------------------------------------------------------------

    def _prompt(self) -> int:
        told = self._observer.usage.prompt
        if told is not None:
            return told
        # Counted once, here or at the end; about 0.1 ms.
        return self._ask.prompt.tokens(self._observer.factor) if self.is_limited else self._transaction.prompt_estimate

    def _completion(self, exchange: Exchange) -> int:
        told = self._observer.usage.completion
        if told is not None:
            return told
        text_bytes = self.text_bytes
        if not self.is_limited:
            return estimate(text_bytes)
        self._learn_rate(exchange)
        return max(1, round(text_bytes * self._rate)) if text_bytes else 0

    def _learn_rate(self, exchange: Exchange) -> None:
        """Tokens per byte, by as much of the first kilobyte as there is: what the booked count goes by. The vocabulary
        may come later than the first looks."""
        if self._is_counted and self._sampled >= SAMPLE_BYTES:
            return
        if isinstance(self._observer, Translator):
            raw = text = self._observer.sample
        else:
            raw = exchange.splitter.sample if exchange.splitter is not None else b""
            raw = self._tap.sample if self._tap is not None else raw
            text = unescaped(raw)
        if text and (len(raw) > self._sampled or not self._is_counted):
            self._sampled = len(raw)
            self._is_counted = O200K.is_ready
            self._rate = Text(len(text), text).tokens() * self._observer.factor / len(text)

    # -- the next mark -------------------------------------------------------------------------------------------

    def _set_mark(self, exchange: Exchange, completion: int) -> None:
        """At the first byte beyond this stream's share, or a kilobyte on where that is nearer."""
        share = self._transaction.share()
        if share is None:
            return
        left = min(max(0, share), FAR)
        text_bytes = self.text_bytes
        if self._observer.usage.completion is not None:
            rate = max(self._rate, completion / max(1, text_bytes))
            ahead = max(FIRST_MARK_BYTES, math.ceil(left / rate))
        elif self._sampled == 0:
            # a token has a byte at least
            ahead = max(1, min(FIRST_MARK_BYTES, int(left / self._observer.factor)))
        else:
            if self._sampled < SAMPLE_BYTES and left > FEW_TOKENS:
                left //= 2
            # a count is rounded: half a token more than `left` is one more
            ahead = max(1, math.ceil((completion + left + 0.5) / self._rate) - text_bytes)
        ahead = min(ahead, FAR)
        self._mark_at = text_bytes + min(ahead, MARK_BYTES)
        exchange.mark_after(ahead)
