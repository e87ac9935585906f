"""What /status and /readyz say of limits and quotas: the ledger's totals, and each limited tenant's figures.

Owns: their shape. Must not know HTTP, nor how the ledger counts. The ledger knows tenants by a hash only, so the caller
names those to tell of: the configured ones, and who has streams now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from proxyd.access.tenants import DEFAULT_TENANT
from proxyd.config.schema import Limits
from proxyd.shm.ledger import Ledger, SlotLedger

__all__ = ["MAX_TENANTS", "TotalsCache", "limits_status"]

# As many as a metric has tenants. Each is one row of the ledger, made here if it was not there yet.
MAX_TENANTS = 256
# A probe each second walks the rows of all users, 10 ms for 131,072 of them: not more often, whoever asks.
KEEP_S = 1.0


class TotalsCache:
    """The totals of the ledger, at most KEEP_S old."""

    __slots__ = ("_at", "_found", "_ledger")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._at = -KEEP_S
        self._found: dict[str, int] = {}

    def read(self, monotonic_s: float) -> dict[str, int]:
        """users: known since the start. held, running: tokens set aside for requests under way, and used by them so
        far. permits: requests under way that hold one. overflow: how often a user or tenant found no room."""
        if monotonic_s - self._at >= KEEP_S or not self._found:
            totals = self._ledger.totals()
            self._at = monotonic_s
            self._found = {
                "users": totals.users,
                "held": totals.held,
                "running": totals.running,
                "permits": totals.permits,
                "overflow": totals.overflow,
            }
        return self._found


def limits_status(
    totals: dict[str, int], share: SlotLedger, limits: Limits, streaming: Iterable[str], monotonic_s: float
) -> dict[str, Any]:
    """The member `limits` of /status. `streaming`: tenants with streams now."""
    names = list(dict.fromkeys([*limits.tenants, DEFAULT_TENANT, *streaming]))[:MAX_TENANTS]
    now_ms = int(monotonic_s * 1000)
    tenants: dict[str, dict[str, dict[str, int]]] = {}
    for name in names:
        streams, requests, tokens = limits.for_tenant(name)
        found: dict[str, dict[str, int]] = {}
        tenant = share.tenant(name) if streams or requests or tokens else None
        if tenant is not None and streams:
            found["concurrent_streams"] = {"used": tenant.in_use(streams), "limit": streams}
        if tenant is not None and requests:
            found["requests_per_minute"] = {"used": tenant.requests.total(now_ms), "limit": requests}
        if tenant is not None and tokens:
            found["tokens_per_minute"] = {"used": tenant.tokens.total(now_ms), "limit": tokens}
        if found:
            tenants[name] = found
    return {**totals, "tenants": tenants}
