"""Numbers of a process out of /proc, and tables. Owns: what "CPU time" and "memory" mean in these benchmarks.

CPU: the scheduler's run time in nanoseconds (schedstat, all threads) is the total. The kernel samples user and system
at its tick, so the split of the total is by utime : stime of the same window, and coarser: about 7 % of the user part
over 10 s at half a core and 250 Hz. Softirq work done in the process's own calls (loopback delivery) is in its system
time, for every proxy alike.
Memory: PSS of smaps_rollup; the kernel's socket buffers are not in it.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """Microseconds."""

    total: float
    user: float
    system: float

    @classmethod
    def of(cls, pid: int) -> Cpu:
        """What the process has used until now."""
        run_ns = 0
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                run_ns += int((task / "schedstat").read_text().split()[0])
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return cls(run_ns / 1e3, int(fields[11]) * 1e6 / TICKS_PER_S, int(fields[12]) * 1e6 / TICKS_PER_S)

    def since(self, before: Cpu) -> Cpu:
        """Used between the two, the ticks scaled to the precise total."""
        total = self.total - before.total
        user, system = self.user - before.user, self.system - before.system
        ticked = user + system
        if not ticked:
            return Cpu(total, 0.0, total)
        return Cpu(total, total * user / ticked, total * system / ticked)

    def per(self, events: int) -> Cpu:
        events = max(events, 1)
        return Cpu(self.total / events, self.user / events, self.system / events)


def pss_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise OSError("no Pss line")


def median_cpu(rounds: list[Cpu]) -> Cpu:
    return Cpu(
        median(one.total for one in rounds), median(one.user for one in rounds), median(one.system for one in rounds)
    )


def host() -> str:
    """The kind of machine, without its name."""
    model = "unknown CPU"
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    usable = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    kernel = platform.release().split("-")[0]
    return f"{model}, {usable} cores, Linux {kernel}, Python {platform.python_version()}, load {load:.1f}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: list[str]) -> str:
        sized = zip(cells, widths, strict=True)
        return "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(sized))

    return "\n".join([line(heads), *(line(row) for row in rows)])
