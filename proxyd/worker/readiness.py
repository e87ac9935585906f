"""Whether this node should get new requests, as one worker sees it: the answer to /readyz.

Owns the reasons and their order, and the loop's lateness. Must not know HTTP. A worker that retires says of the node
what it was: its successors serve.

    starting, draining     what the process says of itself
    spool_unavailable      rows cannot be written, or the spool is full: billable requests get 503, too
    overloaded             out of descriptors, or the loop late (overload.UNREADY); later still (REFUSING): 503, too
"""

from __future__ import annotations

from collections.abc import Callable

from proxyd.clock import Clock
from proxyd.front.acceptor import Acceptor
from proxyd.log import Log
from proxyd.shm.beats import Beat, Standing, State
from proxyd.shm.metrics import read
from proxyd.shm.region import Region
from proxyd.telemetry.spool import SpoolWriter
from proxyd.web.app import Readiness
from proxyd.web.limits_status import TotalsCache
from proxyd.web.status import store_trouble
from proxyd.worker.beat import PULSE_S
from proxyd.worker.overload import LagWatch

__all__ = ["NodeReadiness"]


class NodeReadiness:
    """One a worker; `pulse()` in each pulse, `read()` for each question."""

    __slots__ = (
        "_acceptor", "_clock", "_lag", "_log", "_pulsed_at", "_region", "_spool", "_standing", "_totals",
        "_was_overloaded",
    )  # fmt: skip

    def __init__(
        self,
        region: Region,
        standing: Standing,
        spool: SpoolWriter,
        totals: TotalsCache,
        acceptor: Callable[[], Acceptor],
        clock: Clock,
        log: Log,
    ) -> None:
        """`acceptor` is asked when needed: it is made after us."""
        self._region, self._standing, self._spool, self._totals = region, standing, spool, totals
        self._acceptor, self._clock, self._log = acceptor, clock, log
        self._lag = LagWatch()
        self._pulsed_at: float | None = None
        self._was_overloaded = False

    @property
    def is_refusing(self) -> bool:
        """Whether a new request would only make all others wait longer."""
        return self._lag.is_refusing

    def pulse(self, now: float) -> None:
        """Looks how late it is. What the pulse itself does is not counted: the next is due from its end."""
        if self._pulsed_at is not None:
            self._lag.see(now - self._pulsed_at - PULSE_S, now)
        self._pulsed_at = now
        if self._lag.is_overloaded is not self._was_overloaded:
            self._was_overloaded = self._lag.is_overloaded
            if self._was_overloaded:
                self._log.warning("overloaded", late_ms=round(self._lag.lag_s * 1000))
            else:
                self._log.info("overload_over")

    def read(self) -> Readiness:
        state = self._standing.state
        if state is not State.READY:
            return Readiness(False, state.name.lower())
        broken = self._spool.broken_reason
        if broken is not None:
            return Readiness(False, "spool_unavailable", details={"spool": broken})
        if self._acceptor().is_starved:
            return Readiness(False, "overloaded", details={"overload": "no file descriptor is left"})
        if self._lag.is_overloaded:
            late_ms = round(self._lag.lag_s * 1000)
            return Readiness(False, "overloaded", details={"overload": f"the event loop was {late_ms} ms late"})
        return Readiness(True, details=self._telemetry())

    def _telemetry(self) -> dict[str, object]:
        """Whether rows flow: a store that is down keeps nobody from being served, but should be seen."""
        seat = self._region.telemetry
        gauges = read(self._region, self._clock.monotonic(), [seat]).gauges
        waiting = sum(gauges.get("proxyd_telemetry_spool_bytes", {}).values())
        details: dict[str, object] = {
            "telemetry": Beat(self._region, seat).state.name.lower(),
            "spool_bytes": waiting,
            "limits": self._totals.read(self._clock.monotonic()),
        }
        trouble = store_trouble(gauges)
        if trouble is not None:
            # The admin listener tells the path as well; this route is public.
            reason = trouble["reason"].rpartition(": ")[2]
            details["store"] = {"state": "failing", "reason": reason, "failing_since": trouble["failing_since"]}
        return details
