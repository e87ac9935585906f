"""The relay's metrics of one worker, by the names of the contract.

Owns: which counter belongs to what happened. Must not know shared memory or rendering; handles come from shm.metrics.
Series with labels are made on first use and kept: the label values are routes, statuses, tenants and model names, and
the region bounds how many there can be.
"""

from __future__ import annotations

from proxyd._shm import Counter, Gauge
from proxyd.shm.metrics import Metrics

__all__ = ["Instruments"]


class Instruments:
    """Counters, gauges and histograms that a relayed request touches."""

    __slots__ = (
        "_gauges", "_made", "_metrics", "aborts", "active_streams", "bytes", "events", "first_event", "lag", "stalls",
    )  # fmt: skip

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._made: dict[tuple[str, str, str], Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self.active_streams = 0
        """What the gauge proxyd_streams_active says of this worker, all tenants together."""
        self.events = metrics.counter("proxyd_events_relayed_total")
        self.bytes = metrics.counter("proxyd_bytes_relayed_total")
        self.aborts = metrics.counter("proxyd_client_aborts_total")
        self.stalls = metrics.counter("proxyd_backpressure_events_total", kind="slow_reader")
        self.first_event = metrics.histogram("proxyd_time_to_first_event_seconds")
        self.lag = metrics.histogram("proxyd_relay_lag_seconds")

    def request(self, route: str, status: int) -> None:
        """One answered request; status 499 is a client that left before an answer, as in nginx's logs."""
        key = ("request", route, str(status))
        counter = self._made.get(key)
        if counter is None:
            counter = self._made[key] = self._metrics.counter("proxyd_requests_total", route=route, status=str(status))
        counter.add(1)

    def tokens(self, model: str, kind: str, count: int) -> None:
        """Tokens booked for a configured model; kind prompt, completion, cached or reasoning."""
        if count <= 0:
            return
        key = ("tokens", model, kind)
        counter = self._made.get(key)
        if counter is None:
            counter = self._made[key] = self._metrics.counter("proxyd_tokens_total", kind=kind, model=model)
        counter.add(count)

    def streams(self, tenant: str, change: int) -> None:
        """One more or one less of a tenant's admitted requests that asked for a stream and are not over."""
        self.active_streams += change
        gauge = self._gauges.get(tenant)
        if gauge is None:
            gauge = self._gauges[tenant] = self._metrics.gauge("proxyd_streams_active", tenant=tenant)
        gauge.add(change)
