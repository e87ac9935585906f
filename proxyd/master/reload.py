"""A reload or an upgrade on its way: one at a time, and nothing that serves is touched before the next one is READY.

Owns the steps and the result. Must not know the node's phases, configurations, or how a program is replaced.

    IDLE --HUP--> CHECKING --bad, crash, 30 s--> IDLE           a child examines the file; nothing was touched
         --USR2->    |
                     |-- reload: the next generation is planned and begun --> STARTING
                     '-- upgrade: execve --fails--> IDLE
                             '-- in the new image: PLANNING -- begun --> STARTING
    STARTING -- every worker READY --> SETTLING  promoted; the generation before it drains
    SETTLING -- that one has left the listeners, SETTLE_S --> IDLE      who has the result is served by the new one
             -- one died, boot_timeout_s --> IDLE     discarded; the generation before it goes on

A HUP or USR2 while one is under way, or while the node starts, is remembered: one more of each follows, however many
came, the upgrade first. Every result is a notice in shared memory, a log line,
and READY=1 to the service manager, which would end a service that reloads for ever.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from proxyd.host.sockets import Listeners
from proxyd.log import Log
from proxyd.master.crew import Crew
from proxyd.master.generations import Generation, NoSeats, tell_no_seats
from proxyd.master.handover import YES
from proxyd.master.inquiry import FINDINGS_BYTES, Answer, Inquiry
from proxyd.master.roster import Roster
from proxyd.master.slots import Phase
from proxyd.master.spec import MasterSpec, Refused, Renewal
from proxyd.shm.beats import Beat, State
from proxyd.shm.notice import Notices

SETTLE_S = 1.0  # workers look for orders each 0.1 s; one whose loop is held does not hold up the result
FINDINGS_MAX, FINDINGS_BRIEF = 8, 3  # eight lines, and three in each kind's last result, fit a notice of 8 KiB
LINE_MAX = 400
TRACEBACK_END = 4  # the file and line of a syntax error, its text, the mark, the error: what is above it are imports
CHECK_FAILED = 1  # the exit code of a check that found errors; any other says that it did not get so far


class Kind(Enum):
    RELOAD = "reload"
    UPGRADE = "upgrade"


class Step(Enum):
    """The values are what `status` shows of one under way."""

    IDLE = "idle"
    CHECKING = "checking"
    PLANNING = "planning"
    STARTING = "starting"
    SETTLING = "settling"


_EDGES: dict[Step, frozenset[Step]] = {
    Step.IDLE: frozenset({Step.CHECKING, Step.PLANNING}),
    Step.CHECKING: frozenset({Step.IDLE, Step.STARTING}),
    Step.PLANNING: frozenset({Step.IDLE, Step.STARTING}),
    Step.STARTING: frozenset({Step.SETTLING, Step.IDLE}),
    Step.SETTLING: frozenset({Step.IDLE}),
}


class Renewer:
    """`turn` is called in each turn of the master's loop. `replace` puts the next image in place and returns why that
    could not be; `check_program` makes what runs in a child and checks it; `on_promoted` gets the listeners that are in
    use now and those that were."""

    def __init__(
        self,
        spec: MasterSpec,
        crew: Crew,
        roster: Roster,
        ask: Callable[[str, Callable[[], int]], Inquiry],
        check_program: Callable[[], Callable[[], int]],
        replace: Callable[[], str],
        on_promoted: Callable[[Listeners, Listeners], None],
    ) -> None:
        self._spec, self._crew, self._roster = spec, crew, roster
        self._ask, self._check_program, self._replace, self._on_promoted = ask, check_program, replace, on_promoted
        self._notices = Notices(spec.region)
        self._step = Step.IDLE
        self.kind = Kind.RELOAD
        self.begun = 0  # how many there were; the number of the last one
        self.wanted: set[Kind] = set()  # what is remembered
        self._began_at = 0.0
        self._inquiry: Inquiry | None = None
        self._new: Generation | None = None
        self._old: Generation | None = None
        self._deadline = 0.0
        self._findings: list[str] = []
        self.last: dict[str, Any] | None = None
        self._results: dict[str, dict[str, Any]] = {}  # the last of each kind

    @property
    def is_idle(self) -> bool:
        return self._step is Step.IDLE

    @property
    def began_at(self) -> float:
        return self._began_at

    def deadline(self) -> float | None:
        """When `turn` has something to do though nothing happens."""
        if self._step is Step.CHECKING and self._inquiry is not None:
            return self._inquiry.deadline
        if self._step is Step.PLANNING or (self.is_idle and self.wanted):
            return time.monotonic()
        return self._deadline if self._step in (Step.STARTING, Step.SETTLING) else None

    # --- the wish ------------------------------------------------------------------------------------------------

    def want_reload(self) -> None:
        if self._spec.renewal is None:
            self._crew.log.warning("reload_unavailable", detail=self._spec.no_renewal)
            return
        if not self.is_idle and Kind.RELOAD not in self.wanted:
            self._crew.log.info("reload_waits", detail=f"{self.kind.value} {self.begun} is under way; it follows")
        self.wanted.add(Kind.RELOAD)

    def want_upgrade(self) -> None:
        if self._spec.renewal is None:
            self._crew.log.warning("upgrade_unavailable", detail=self._spec.no_renewal)
            return
        if not self.is_idle and Kind.UPGRADE not in self.wanted:
            self._crew.log.info("upgrade_waits", detail=f"{self.kind.value} {self.begun} is under way; it follows")
        self.wanted.add(Kind.UPGRADE)

    def resume(self, kind: Kind, number: int, began_at: float, wanted: set[Kind], last: dict[str, Any] | None) -> None:
        """In a new image: what the one before it began."""
        self.kind, self.begun, self._began_at = kind, number, began_at
        self.wanted, self.last = wanted, last
        if last is not None:
            self._results[last["kind"]] = last
        self._move(Step.PLANNING)

    # --- the steps -----------------------------------------------------------------------------------------------

    def turn(self, readable: set[int], now: float) -> None:
        """Only while the node serves."""
        if self._step is Step.IDLE and self.wanted:
            kind = Kind.UPGRADE if Kind.UPGRADE in self.wanted else Kind.RELOAD
            self.wanted.remove(kind)
            self._begin(kind, self._check_program if kind is Kind.UPGRADE else self._check_file)
        elif self._step is Step.CHECKING:
            answer = self._inquiry.look(readable, now) if self._inquiry is not None else None
            if answer is not None:
                self._inquiry = None
                self._on_answer(answer)
        elif self._step is Step.PLANNING:
            self._start()
        elif self._step is Step.STARTING:
            self._maybe_promote(now)
        elif self._step is Step.SETTLING:
            self._maybe_finish(now)

    def end(self) -> None:
        """However the loop was left: no check stays behind."""
        if self._inquiry is not None:
            self._inquiry.end()
            self._inquiry = None

    def cancel(self) -> None:
        """The node ends: nobody waits for a result any more. A generation that starts is ended with the others."""
        self.end()
        self.wanted.clear()
        if not self.is_idle:
            self._move(Step.IDLE)
            self._new = self._old = None
            self._note(ok=False, detail="the daemon was stopped meanwhile")

    def _begin(self, kind: Kind, make_check: Callable[[], Callable[[], int]]) -> None:
        self.kind = kind
        self.begun += 1
        self._began_at = time.monotonic()
        self._findings = []
        self._spec.notifier.reloading(f"{kind.value}: the check runs")
        if kind is Kind.RELOAD:
            self._crew.log.info("reload_begun", number=self.begun)
        else:
            self._crew.log.info("upgrade_begun", number=self.begun)
        self._move(Step.CHECKING)
        try:
            self._inquiry = self._ask("check", make_check())
        except OSError as error:
            self._fail(f"no process for the check: {error.strerror}; nothing was changed")
            return
        except Exception as error:  # noqa: BLE001  a bug in what is told must not end a node that serves
            self._fail(f"the check cannot be made: {type(error).__name__}: {error}; report it")
            return
        self.publish()

    def _check_file(self) -> Callable[[], int]:
        renewal = self._spec.renewal
        assert renewal is not None
        return lambda: _examine(renewal)

    def _on_answer(self, answer: Answer) -> None:
        what = "the configuration" if self.kind is Kind.RELOAD else "the new program or its configuration"
        if answer.code == CHECK_FAILED and answer.findings:
            self._fail(f"{what} has errors; nothing was changed", answer.findings)
        elif answer.code != 0 or (self.kind is Kind.UPGRADE and not any(YES in line for line in answer.findings)):
            runner = "the check" if self.kind is Kind.RELOAD else "the new program"
            why = f": {answer.errors[-1]}" if answer.errors else ""
            lines = [*answer.errors[-TRACEBACK_END:], *answer.findings]
            self._fail(f"{runner} cannot run: {answer.end}{why}; nothing was changed", lines)
        elif self.kind is Kind.RELOAD:
            self._findings = answer.findings
            self._start()
        else:
            why = self._replace()
            if not self.is_idle:  # it is after a signal that came meanwhile and ends the node
                self._fail(f"{why}; nothing was changed")

    def _start(self) -> None:
        renewal = self._spec.renewal
        assert renewal is not None
        serving = self._roster.serving
        now = time.monotonic()
        try:
            plan = renewal.plan(serving.spec.listeners, serving.spec.log)
        except Refused as error:
            self._fail(error.detail, error.findings)
            return
        except Exception as error:  # noqa: BLE001  a bug in reading a file must not end a node that serves
            self._fail(f"the next generation cannot be made: {type(error).__name__}: {error}; report it")
            return
        # The next workers share what was loaded, as the first ones do; a collection later would write into it.
        gc.collect()
        gc.freeze()
        try:
            self._new = self._roster.begin(plan, now)
        except NoSeats as error:
            plan.listeners.release(serving.spec.listeners)
            _close(plan.log, serving.spec.log)
            self._fail(tell_no_seats(error, self._roster.seats.count, self._roster.generations, now))
            return
        self._deadline = now + self._spec.boot_timeout_s
        self._move(Step.STARTING)
        self.publish()

    def _maybe_promote(self, now: float) -> None:
        new = self._new
        assert new is not None
        failed = new.find_failed()
        if failed is None and not new.is_ready and now < self._deadline:
            return
        if failed is None and new.is_ready:
            self._old = old = self._roster.serving
            self._on_promoted(new.spec.listeners, old.spec.listeners)
            self._roster.promote(new, now)
            self._crew.log = new.spec.log
            _close(old.spec.log, new.spec.log)
            self._deadline = now + SETTLE_S
            self._move(Step.SETTLING)
            self.publish()
            return
        self._new = None
        self._roster.discard(new, now)
        _close(new.spec.log, self._crew.log)
        if failed is not None:
            why = f"{failed.spec.name} of generation {new.number} did not start: {failed.end}"
        else:
            late = [slot.spec.name for slot in new.slots if not slot.is_ready]
            why = f"{', '.join(late)} of generation {new.number} not ready within {self._spec.boot_timeout_s:g} s"
        self._fail(f"{why}; the workers before it go on serving; the log has its reason (cannot_boot, child_died)")

    def _maybe_finish(self, now: float) -> None:
        new, old = self._new, self._old
        assert new is not None
        assert old is not None
        seats = [slot.seat for slot in old.slots if slot.phase is not Phase.GONE]
        if now < self._deadline and any(Beat(self._spec.region, seat).state is State.READY for seat in seats):
            return
        self._new = self._old = None
        fields: dict[str, Any] = {"number": self.begun, "generation": new.number, "workers": len(new.slots)}
        fields["took_s"] = round(time.monotonic() - self._began_at, 3)
        if self.kind is Kind.RELOAD:
            self._crew.log.info("reloaded", **fields)
        else:
            self._crew.log.info("upgraded", **fields, version=new.version, before=old.version)
        self._move(Step.IDLE)
        detail = f"generation {new.number} serves" + (f", version {new.version}" if self.kind is Kind.UPGRADE else "")
        self._note(ok=True, detail=detail, findings=self._findings, generation=new.number)
        self._spec.notifier.ready("serving")

    def _fail(self, detail: str, findings: Sequence[str] = ()) -> None:
        fields = {"number": self.begun, "detail": detail, "findings": [line[:LINE_MAX] for line in findings[:5]]}
        if self.kind is Kind.RELOAD:
            self._crew.log.error("reload_failed", **fields)
        else:
            self._crew.log.error("upgrade_failed", **fields)
        self._move(Step.IDLE)
        self._note(ok=False, detail=detail, findings=findings)
        self._spec.notifier.ready(f"serving; the last {self.kind.value} failed: {detail}"[:LINE_MAX])

    # --- words ---------------------------------------------------------------------------------------------------

    def _note(self, *, ok: bool, detail: str, findings: Sequence[str] = (), generation: int | None = None) -> None:
        shown = [line[:LINE_MAX] for line in findings[:FINDINGS_MAX]]
        if len(findings) > FINDINGS_MAX:
            shown.append(f"and {len(findings) - FINDINGS_MAX} more")
        self.last = {
            "number": self.begun,
            "kind": self.kind.value,
            "ok": ok,
            "at": round(time.time(), 3),
            "took_s": round(time.monotonic() - self._began_at, 3),
            "generation": self._roster.serving.number if generation is None else generation,
            "detail": detail[: LINE_MAX * 2],
            "findings": shown,
        }
        self._results[self.kind.value] = self.last
        self.publish()

    def publish(self) -> None:
        """What all processes may know: results, what is under way, the generations."""
        under_way = None if self.is_idle else {"kind": self.kind.value, "step": self._step.value}
        self._notices.put(
            {
                "last_reload": self.last,
                "renewal": {
                    "begun": self.begun,
                    "under_way": under_way,
                    "waits": sorted(kind.value for kind in self.wanted),
                    "results": {kind: _brief(result) for kind, result in self._results.items()},
                    "unavailable": self._spec.no_renewal if self._spec.renewal is None else None,
                },
                "generations": self._roster.tell(),
            }
        )

    def _move(self, step: Step) -> None:
        if step not in _EDGES[self._step]:
            raise RuntimeError(f"no way from {self._step.value} to {step.value}")
        self._step = step


def _close(log: Log, used: Log) -> None:
    """A log that nobody here writes to any more; children have their own hold on the file."""
    if log is not used:
        log.close()


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    """A result as somebody who waits for it needs it, though another one came behind."""
    told = {name: result[name] for name in ("number", "ok", "took_s", "detail")}
    return told | {"findings": result["findings"][:FINDINGS_BRIEF]}


def _examine(renewal: Renewal) -> int:
    """In the child: lines on stdout."""
    ok, lines = renewal.examine()
    os.write(1, "\n".join(lines).encode("utf-8", "replace")[:FINDINGS_BYTES])
    return 0 if ok else CHECK_FAILED
