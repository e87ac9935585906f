"""What an operator is told of one upstream that fails: once, then seldom, and when it is over.

Owns: since when and how often an upstream has failed in a row, and when the next line about it is due. Must not know:
breakers, pools, who asked; time comes in as seconds. Invariant: a recovery is told if and only if its failure was.

    fails -> upstream_unreachable or upstream_failing -> again after REPEAT_S ... -> answers -> upstream_recovered
"""

from __future__ import annotations

from typing import Any

from proxyd.errors import UpstreamErrorKind
from proxyd.log import Log

# Between two lines of one trouble. Half: 120 lines an hour for each worker; twice: a tail of the log looks healthy.
REPEAT_S = 30.0
# Between a recovery and the next trouble's line: an upstream that fails every other request is not a line each.
FLAPPING_S = 5.0
KEY_REPEAT_S = 60.0

_Kind = UpstreamErrorKind
_UNREACHABLE = frozenset((_Kind.RESOLVE, _Kind.REFUSED, _Kind.UNREACHABLE, _Kind.CONNECT_TIMEOUT, _Kind.TLS))
# Ends of bodies whose head was fine: an upstream with those is not down (the event upstream_failed tells each).
_OF_BODIES = frozenset((_Kind.BROKEN_BODY, _Kind.IDLE_TIMEOUT, _Kind.TOTAL_TIMEOUT))


class Trouble:
    """One upstream's failures in a row, in one worker. `kind` is the last one's, "" when there is none."""

    __slots__ = ("_address", "_failures", "_is_told", "_key_told_s", "_keys_refused", "_log", "_name", "_since_s",
                 "_told_s", "has_answered", "kind")  # fmt: skip

    def __init__(self, name: str, address: str, log: Log) -> None:
        self._name, self._address, self._log = name, address, log
        self.kind = ""
        self.has_answered = False  # since whoever looks put it down
        self._failures = 0
        self._since_s = self._told_s = 0.0
        self._is_told = False
        self._key_told_s: dict[str, float] = {}
        self._keys_refused: dict[str, int] = {}

    def on_failure(self, kind: UpstreamErrorKind | int, detail: str, now: float) -> bool:
        """Counts a failed attempt; True when it was the first. `now` is monotonic."""
        if kind in _OF_BODIES:
            return False
        is_first = not self._failures
        if is_first:
            self._since_s = now
        self._failures += 1
        self.kind = f"status_{kind:d}" if isinstance(kind, int) else kind.value
        gap_s = REPEAT_S if self._is_told else FLAPPING_S
        if self._told_s and now - self._told_s < gap_s:
            return is_first
        self._told_s, self._is_told = now, True
        fields: dict[str, Any] = {
            "upstream": self._name,
            "kind": self.kind,
            "address": self._address,
            "detail": detail,
            "failures": self._failures,
            "failing_s": round(now - self._since_s, 1),
        }
        if kind in _UNREACHABLE:
            self._log.error("upstream_unreachable", **fields)
        else:
            self._log.warning("upstream_failing", **fields)
        return is_first

    def on_answer(self, now: float) -> bool:
        """It answered as it should; True when that ended a trouble."""
        self.has_answered = True
        if not self._failures:
            return False
        if self._is_told:
            self._log.info(
                "upstream_recovered",
                upstream=self._name,
                address=self._address,
                failures=self._failures,
                failed_s=round(now - self._since_s, 1),
            )
            self._told_s = now
        self._failures, self._is_told, self.kind = 0, False, ""
        return True

    def on_key_refused(self, status: int, key: str, now: float) -> None:
        """401 or 403 to our own key, which only its number names."""
        count = self._keys_refused[key] = self._keys_refused.get(key, 0) + 1
        told = self._key_told_s.get(key)
        if told is None or now - told >= KEY_REPEAT_S:
            self._key_told_s[key] = now
            self._keys_refused[key] = 0
            self._log.error("upstream_refuses_key", upstream=self._name, status=status, key=key, refusals=count)
