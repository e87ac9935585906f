"""Who works for the node, for status: its workers by seat, and the generations they belong to.

Owns: which seats are in use, what a generation's state is. Must not know: the rest of the document, how the master
comes to a new generation. Two sources: the beats, which every process writes for itself, and the master's notice
(shm/notice.py), which has what beats cannot tell: since when, which version, how the last reload ended.

A seat is listed while a process has it, and in the serving generation also between a death and the successor: a slot
nobody works in must be seen. What a retired generation leaves behind is not listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from proxyd import __version__
from proxyd.shm.beats import Beat, State
from proxyd.shm.region import Region

__all__ = ["generations", "last_reload", "process", "serving_generation", "worker_seats"]

SERVING, DRAINING, STARTING = "serving", "draining", "starting"


def process(region: Region, seat: int, monotonic_s: float) -> dict[str, Any]:
    """A process as its beats have it."""
    beat = Beat(region, seat)
    is_alive = beat.pid != 0
    return {
        "pid": beat.pid or None,
        "epoch": beat.epoch,
        "state": beat.state.name.lower(),
        "streams": beat.streams,
        "restarts": beat.restarts,
        "age_s": round(beat.age_s(monotonic_s), 1) if is_alive else None,
        "silent_s": round(beat.silent_s(monotonic_s), 1) if is_alive else None,
    }


def worker_seats(region: Region, notice: Mapping[str, Any] | None = None) -> list[int]:
    """The seats of workers that are there or should be: the newest generation first, each by slot."""
    beats = {seat: Beat(region, seat) for seat in range(region.telemetry)}
    serving = serving_generation(region, notice)
    found = [
        seat
        for seat, beat in beats.items()
        if beat.pid or (beat.epoch and beat.generation == serving and (serving or beat.is_vacant))
    ]
    return sorted(found, key=lambda seat: (-beats[seat].generation, beats[seat].slot, seat))


def serving_generation(region: Region, notice: Mapping[str, Any] | None = None) -> int:
    """The one that new connections go to: as the master says, else the newest with a process that is not retiring."""
    for told in _told(notice):
        if told.get("state") == SERVING:
            return int(told["generation"])
    beats = [Beat(region, seat) for seat in range(region.telemetry)]
    stays = [beat.generation for beat in beats if beat.pid and beat.retire_by_s is None]
    return max(stays or [beat.generation for beat in beats])


def generations(
    region: Region, seats: Sequence[int], notice: Mapping[str, Any] | None, monotonic_s: float
) -> list[dict[str, Any]]:
    """Each generation that has a process, or that the master tells of; the newest first."""
    told = {int(one["generation"]): one for one in _told(notice)}
    members: dict[int, list[Beat]] = {number: [] for number in told}
    for seat in seats:
        beat = Beat(region, seat)
        if beat.pid:
            members.setdefault(beat.generation, []).append(beat)
    return [
        _generation(number, members[number], told.get(number, {}), monotonic_s)
        for number in sorted(members, reverse=True)
    ]


def _generation(number: int, beats: Sequence[Beat], told: Mapping[str, Any], monotonic_s: float) -> dict[str, Any]:
    deadlines = [beat.retire_by_s for beat in beats if beat.retire_by_s is not None]
    state = told.get("state") or _state(beats)
    if deadlines and state == SERVING:
        state = DRAINING
    since = told.get("since")
    if isinstance(since, int | float):
        since_s = monotonic_s - since
    else:
        since_s = max((beat.age_s(monotonic_s) for beat in beats), default=0.0)
    ends = max(deadlines) if deadlines else told.get("ends")
    return {
        "generation": number,
        "state": state,
        "since_s": round(max(0.0, since_s), 1),
        "ends_in_s": round(max(0.0, ends - monotonic_s), 1) if isinstance(ends, int | float) else None,
        "workers": len(beats),
        "streams": sum(beat.streams for beat in beats),
        "version": told.get("version") or __version__,
    }


def _state(beats: Sequence[Beat]) -> str:
    """As the processes say, where the master says nothing."""
    states = {beat.state for beat in beats}
    if any(beat.retire_by_s is not None for beat in beats) or states == {State.DRAINING}:
        return DRAINING
    return STARTING if states == {State.STARTING} else SERVING


def last_reload(notice: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How the last reload or upgrade ended; None when there was none."""
    told = (notice or {}).get("last_reload")
    return told if isinstance(told, dict) and told else None


def _told(notice: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The master's entries. A notice of another version may hold other things."""
    found = (notice or {}).get("generations")
    entries = found if isinstance(found, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("generation"), int)]
