"""The room's face: one object per worker that knows every configured upstream.

Owns: origins, their keepers, the resolver, breakers, the error metrics, and that failures are told. Must not know:
HTTP, requests, clients.
Made after the fork (it opens trust stores and belongs to one loop). The relay's use of it:

    plan = upstreams.plan(model, {"openai"})
    while origin := plan.next():
        conn = await upstreams.acquire(origin, timeout_s=...)     raises UpstreamError
        ... conn.send, conn.recv ...
        conn.release(reusable)
        upstreams.report(origin, ok, kind, detail)                once per attempt, also for what acquire raised

Invariants: `acquire` never reports, whoever gets its error does: nothing is counted twice. No key leaves but in
`Origin.auth_headers`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection, Mapping
from typing import Any

from proxyd.clock import Clock
from proxyd.config.schema import Config, ModelConfig
from proxyd.config.secrets import Secrets
from proxyd.errors import UpstreamErrorKind
from proxyd.log import Log
from proxyd.shm.metrics import Metrics
from proxyd.upstream.balance import Balancer, BreakerState, RetryBudget, Verdict, is_upstream_error, verdict
from proxyd.upstream.connection import Connection
from proxyd.upstream.dial import Dialer
from proxyd.upstream.keeper import Keeper, Surroundings
from proxyd.upstream.origin import Origin
from proxyd.upstream.ports import Neighbours, Ports, read_port_range
from proxyd.upstream.resolve import Resolver
from proxyd.upstream.tls import OriginTls
from proxyd.upstream.trouble import Trouble


class Plan:
    """One request's walk through its upstreams: the first choice, then each fail-over, then None."""

    __slots__ = ("_model", "_names", "_tried", "_upstreams")

    def __init__(self, upstreams: Upstreams, model: ModelConfig, names: Collection[str]) -> None:
        self._upstreams = upstreams
        self._model = model
        self._names = names
        self._tried: list[str] = []

    def next(self) -> Origin | None:
        """The next upstream to try; the choice and its share are made now, not when the plan was."""
        origin = self._upstreams._choose(self._model, self._names, self._tried)
        if origin is not None:
            self._tried.append(origin.name)
        return origin


class Upstreams:
    """See the head of the file. `retries` is the worker's retry budget over all upstreams."""

    __slots__ = (
        "_answered_gauges",
        "_balancer",
        "_breaker_gauges",
        "_clock",
        "_keepers",
        "_log",
        "_metrics",
        "_resolver",
        "_since_gauges",
        "_troubles",
        "origins",
        "retries",
    )

    def __init__(
        self,
        config: Config,
        secrets: Secrets,
        metrics: Metrics,
        log: Log,
        clock: Clock,
        loop: asyncio.AbstractEventLoop,
        node_ports: Callable[[], Mapping[str, int]] | None = None,
    ) -> None:
        """Raises OSError naming the upstream when its ca_file cannot be used, ValueError for a url or key that
        cannot. `node_ports`: local ports in use by all workers, by upstream; None where there is one worker."""
        self._metrics, self._log, self._clock = metrics, log, clock
        self._resolver = Resolver(loop, clock)
        self.retries = RetryBudget()
        around = Surroundings(loop, clock, metrics, log)
        self.origins: dict[str, Origin] = {}
        self._keepers: dict[str, Keeper] = {}
        self._breaker_gauges = {}
        self._troubles: dict[str, Trouble] = {}
        # For status only, in wall seconds: when the trouble began, by the kind it has now (zeroed when it is over), and
        # when it last answered.
        self._since_gauges: dict[str, dict[str, Any]] = {}
        self._answered_gauges = {}
        neighbours, ports = Neighbours(node_ports, clock.monotonic), read_port_range()
        places: dict[tuple[str, int], list[str]] = {}
        for section in config.upstream:
            origin = Origin(section, secrets.upstream_keys.get(section.name, ()))
            self.origins[origin.name] = origin
            siblings = places.setdefault((origin.host, origin.port), [])
            siblings.append(origin.name)
            dialer = Dialer(origin, self._resolver, loop, log)
            sources = len(section.source_addresses)
            budget = Ports(origin.name, ports, sources, siblings, neighbours, metrics, log)
            self._keepers[origin.name] = Keeper(origin, dialer, _tls_of(origin), around, budget)
            self._breaker_gauges[origin.name] = metrics.gauge("proxyd_breaker_state", upstream=origin.name)
            address = f"[{origin.host}]:{origin.port}" if ":" in origin.host else f"{origin.host}:{origin.port}"
            self._troubles[origin.name] = Trouble(origin.name, address, log)
            self._since_gauges[origin.name] = {}
            self._answered_gauges[origin.name] = metrics.gauge("_answered_at", upstream=origin.name)
        self._balancer = Balancer(
            {section.name: section.weight for section in config.upstream}, [model.upstreams for model in config.model]
        )

    def plan(self, model: ModelConfig, dialects: Collection[str]) -> Plan:
        """The walk for one request; only upstreams that speak one of `dialects`."""
        names = {name for tier in model.upstreams for name in tier if self.origins[name].dialect in dialects}
        return Plan(self, model, names)

    async def acquire(self, origin: Origin, *, timeout_s: float, fresh: bool = False) -> Connection:
        """A connection for one exchange; see `Keeper.acquire`. `fresh`: one that never carried a request."""
        return await self._keepers[origin.name].acquire(timeout_s, fresh)

    def report(
        self, origin: Origin, ok: bool, kind: UpstreamErrorKind | int | None = None, detail: str = ""
    ) -> None:
        """How an attempt ended: `ok` (the upstream answered as it should), or with which error kind or HTTP status.
        `detail` is for the log: the address and the system's own words.

        A status may be given with either `ok`; what counts as the upstream's failure is the table in `balance`. A
        client's own 4xx is not counted among the upstream's errors.
        """
        if isinstance(kind, int):
            outcome = verdict(kind)
        elif ok:
            outcome = Verdict.GOOD
        else:
            outcome = verdict(kind) if kind is not None else Verdict.BAD
        if not ok and (not isinstance(kind, int) or is_upstream_error(kind)):
            label = f"status_{kind}" if isinstance(kind, int) else str(kind or "unknown")
            self._metrics.counter("proxyd_upstream_errors_total", upstream=origin.name, kind=label).add(1)
        now = self._clock.monotonic()
        if self._balancer.record(origin.name, outcome, now):
            ends_s = self._balancer.breaker(origin.name).until_s() - now
            self._log.warning("upstream_ejected", upstream=origin.name, kind=str(kind), seconds=round(ends_s))
        self._show_breaker(origin.name, now)
        self._tell(origin.name, outcome, kind, detail, now)

    def report_refused_key(self, origin: Origin, status: int, key: str) -> None:
        """401 or 403: the upstream does not take the key that `key` names by its number, as `Origin.next_key` does."""
        self._troubles[origin.name].on_key_refused(status, key, self._clock.monotonic())

    def tick(self) -> None:
        """Once a second: expiry and age of idle connections, breaker gauges."""
        now = self._clock.monotonic()
        for name, keeper in self._keepers.items():
            keeper.tick()
            self._show_breaker(name, now)
            trouble = self._troubles[name]
            if trouble.has_answered:
                trouble.has_answered = False
                self._answered_gauges[name].set(int(self._clock.wall()))

    async def close(self) -> None:
        """Idle connections close, waiters are refused, dials and lookups end; busy connections close on release."""
        for keeper in self._keepers.values():
            await keeper.close()
        await self._resolver.close()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Per upstream: connection counts and the breaker, for `/status`."""
        now = self._clock.monotonic()
        return {
            name: keeper.stats() | {"breaker": self._balancer.breaker(name).state(now).name.lower()}
            for name, keeper in self._keepers.items()
        }

    def _choose(self, model: ModelConfig, names: Collection[str], tried: Collection[str]) -> Origin | None:
        name = self._balancer.choose(model.upstreams, names, tried, self._clock.monotonic())
        return None if name is None else self.origins[name]

    def _tell(
        self, name: str, outcome: Verdict, kind: UpstreamErrorKind | int | None, detail: str, now: float
    ) -> None:
        """The events about an upstream that fails or works again, and since when, for status."""
        trouble, gauges = self._troubles[name], self._since_gauges[name]
        if outcome is Verdict.BAD and kind is not None:
            before = trouble.kind
            is_first = trouble.on_failure(kind, detail, now)
            if trouble.kind != before:
                since = gauges[before].value if before else 0
                for gauge in gauges.values():
                    gauge.set(0)
                if trouble.kind not in gauges:
                    gauges[trouble.kind] = self._metrics.gauge("_failing_since", upstream=name, kind=trouble.kind)
                gauges[trouble.kind].set(int(self._clock.wall()) if is_first else since)
        elif outcome is Verdict.GOOD and trouble.on_answer(now):
            for gauge in gauges.values():
                gauge.set(0)

    def _show_breaker(self, name: str, now: float) -> None:
        state: BreakerState = self._balancer.breaker(name).state(now)
        self._breaker_gauges[name].set(state.value)


def _tls_of(origin: Origin) -> OriginTls | None:
    if not origin.tls:
        return None
    ca_file = str(origin.config.ca_file)
    try:
        return OriginTls(origin.host, ca_file)
    except (OSError, ssl.SSLError) as error:
        raise OSError(f"upstream {origin.name}: ca_file {ca_file}: {error.strerror or error}") from error
