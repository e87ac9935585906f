"""The grammar of `monitoring.alert_on`: METRIC > NUMBER, with a unit for times and a rate for counters.

Owns: which quantities there are, what may be compared with what, the words for what may not. Must not know: how a
quantity is measured (telemetry/quantities.py), nor the rest of the configuration. docs/monitoring.md says what each
quantity is; a test holds the two together.

    condition = quantity op number [unit | "/" rate]      op = > | >= | < | <=
    quantity  = name | "p" digits "_" latency             p99_relay_lag: digits are what follows "0."
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Final

__all__ = ["LATENCIES", "MAX_CONDITIONS", "MAX_TEXT", "QUANTITIES", "Condition", "ConditionError", "Kind", "parse"]

# Each is a label of a metric, of which a process has 256 at most, and is measured each second.
MAX_CONDITIONS = 64
# A series has 240 bytes for its name and labels.
MAX_TEXT = 100


class Kind(Enum):
    """What a quantity is, and so what it may be compared with."""

    LEVEL = "a number now"
    RATIO = "a share of 1"
    BYTES = "bytes now"
    COUNT = "what happened in a time"
    TIME = "a latency"


QUANTITIES: Final[dict[str, Kind]] = {
    "queue_depth": Kind.LEVEL,
    "backpressure_events": Kind.COUNT,
    "requests": Kind.COUNT,
    "streams_active": Kind.LEVEL,
    "client_aborts": Kind.COUNT,
    "upstream_errors": Kind.COUNT,
    "upstream_connections": Kind.LEVEL,
    "upstream_reuse_ratio": Kind.RATIO,
    "breaker_state": Kind.LEVEL,
    "telemetry_lag": Kind.TIME,
    "telemetry_spool_bytes": Kind.BYTES,
    "worker_restarts": Kind.COUNT,
    "loop_lag": Kind.TIME,
    "sockets_time_wait": Kind.LEVEL,
    "tokens": Kind.COUNT,
}
# What a percentile may be taken of.
LATENCIES: Final = ("latency", "relay_lag", "time_to_first_event", "task_ack", "loop_lag", "telemetry_lag")
# A name of a time without a percentile means this one.
DEFAULT_QUANTILE = 0.99

_CONDITION = re.compile(r"([a-z0-9_]+) *(>=|>|<=|<) *([0-9]+(?:[.][0-9]+)?)(?:(ms|s|m|h|%)|/(s|min|h))?", re.ASCII)
_PERCENTILE = re.compile(rf"p([0-9]{{2,4}})_({'|'.join(LATENCIES)})", re.ASCII)
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_RATES = {"s": 1.0, "min": 60.0, "h": 3600.0}
_OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}


class ConditionError(ValueError):
    """No condition: what is wrong, and what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition.

    text: as it was written. quantity: the name, of a time without its percentile. threshold: in the unit. unit: as it
    was written, "" for none, with its slash for a rate. quantile: of a time, else None. per_s: of a count, over how
    many seconds it is counted; a rate of a second is counted over a minute as well, or it would be noise.
    """

    text: str
    kind: Kind
    quantity: str
    operator: str
    threshold: float
    unit: str
    quantile: float | None = None

    def holds(self, value: float | None) -> bool:
        """Whether a value in the condition's own unit fulfils it. What nobody knows does not."""
        return value is not None and _OPERATORS[self.operator](value, self.threshold)

    @property
    def is_share(self) -> bool:
        return self.unit == "%"

    @property
    def window_s(self) -> float:
        """Over how long a count is taken: a minute; an hour for a rate of an hour."""
        return 3600.0 if self.unit == "/h" else 60.0

    def in_unit(self, value: float) -> float:
        """A measured value (seconds, a share of 1, a count in `window_s`) as the condition is written."""
        if self.is_share:
            return value * 100
        if self.kind is Kind.TIME:
            return value / _SECONDS[self.unit]
        if self.kind is Kind.COUNT and self.unit:
            return value * _RATES[self.unit[1:]] / self.window_s
        return value


def parse(text: str) -> Condition:
    """Raises ConditionError."""
    match = _CONDITION.fullmatch(text)
    if match is None or len(text) > MAX_TEXT:
        raise ConditionError(
            "is not a condition" if match is None else f"is longer than {MAX_TEXT} characters",
            'write METRIC > NUMBER, as in "p99_latency > 200ms" or "requests > 100/min"',
        )
    name, how, number, unit, rate = match.groups()
    quantile: float | None = None
    percentile = _PERCENTILE.fullmatch(name)
    if percentile is not None:
        if re.fullmatch("10+|0+", percentile[1]) and len(percentile[1]) > 2:
            raise ConditionError(f'"{name}" is no percentile', f"p99 is 0.99, p999 is 0.999: write p99_{percentile[2]}")
        kind, quantity, quantile = Kind.TIME, percentile[2], float(f"0.{percentile[1]}")
    elif name in QUANTITIES:
        kind, quantity = QUANTITIES[name], name
        if kind is Kind.TIME:
            quantile = DEFAULT_QUANTILE
    else:
        close = get_close_matches(name, QUANTITIES, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"name one of: {', '.join(QUANTITIES)}, or p99_latency"
        raise ConditionError(f'there is no quantity "{name}"', remedy)
    _check_unit(name, kind, unit, rate)
    written = unit or (f"/{rate}" if rate else "")
    return Condition(text, kind, quantity, how, float(number), written, quantile)


def _check_unit(name: str, kind: Kind, unit: str | None, rate: str | None) -> None:
    """Raises ConditionError where a value of this kind cannot have it."""
    if kind is Kind.TIME:
        if unit is None or unit == "%":
            raise ConditionError(f"{name} is a time and needs a unit", f'write "{name} > 200ms"')
    elif kind is Kind.COUNT:
        if unit is not None:
            raise ConditionError(f"{name} is counted, {unit} is no unit for it", f'write "{name} > 100/min"')
    elif rate is not None:
        raise ConditionError(f"{name} is what there is now and has no rate", f'write "{name} > 100"')
    elif unit is not None and (unit != "%" or kind is Kind.LEVEL):
        what = ", or a share such as 80%" if kind is not Kind.LEVEL else ""
        raise ConditionError(f"{name} has no unit {unit}", f"write a number{what}")
