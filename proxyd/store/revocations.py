"""The revocations that outlive the daemon: a file of JSON lines in `server.state_dir`.

Owns: the file's name, its lines, its lock. Must not know: HTTP, shared memory, how a session is ended. A line:

    {"kind":"user","value":"42","at":1767225600.5,"until":null}      until null: nobody knows when its last token ends

Workers append while they serve, in a thread: `append` waits for the disk. The next start reads all, before there are
workers, and writes the file anew without what has expired or was said twice.

Invariants: a line is on disk, whole, before `append` returns. A last line without its line end was never answered for:
readers pass it over, the next append removes it. Anything else that cannot be read stops the start: a revocation that
is silently forgotten lets its token in again. Every use holds flock(2) on the file and looks whether it is still the
one by that name, so an orphan of a killed node and the start of the next do not write past each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from proxyd.access.revocations import Revocations
from proxyd.shm.region import REVOCATION_ENTRIES
from proxyd.shm.revocations import Kind, Revocation

NAME = "revocations.jsonl"
# The longest line is a jti of 256 characters, each at most six bytes in JSON, and its frame of about 90.
_TAIL_BYTES = 4096
_WITHOUT_IT = "without it revoked tokens are accepted again until they expire"


class RevocationFileError(Exception):
    """The file is there and cannot be used. The message names it and what to do."""


class Loaded(NamedTuple):
    """What `load` found. `not_compacted` says why the file could not be written anew, "" when all is well."""

    entries: list[Revocation]
    not_compacted: str


class RevocationFile:
    """The file of one state directory. Holds nothing open."""

    __slots__ = ("path",)

    def __init__(self, state_dir: str | Path) -> None:
        self.path = Path(state_dir) / NAME

    def append(self, entry: Revocation) -> None:
        """Returns when the line is on disk. OSError: it may or may not be; nothing else of the file has changed."""
        line = _line(entry)
        with self._locked(os.O_CREAT) as fd:
            end = _end_of_lines(fd)
            os.ftruncate(fd, end)
            try:
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(fd)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, end)
                raise
            if end == 0:
                self._sync_directory()

    def load(self, now: float) -> Loaded:
        """What is in force at `now` (wall s), and the file written anew with just that. Raises RevocationFileError."""
        try:
            with self._locked(0) as fd:
                data = os.pread(fd, os.fstat(fd).st_size, 0)
                entries = _in_force(self._parse(data), now)
                wanted = b"".join(map(_line, entries))
                return Loaded(entries, "" if wanted == data else self._replace(wanted))
        except FileNotFoundError:
            return Loaded([], "")
        except OSError as error:
            raise RevocationFileError(
                f"{self.path} cannot be read: {error.strerror}; it must be readable and writable for the user that"
                f" runs proxyd, and {_WITHOUT_IT}"
            ) from error

    def check(self, now: float) -> None:
        """Raises RevocationFileError for what a load would refuse. Changes nothing and waits for nobody; a file that is
        not there, or not this user's to read, is no fault."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return
        _in_force(self._parse(data), now)

    def _parse(self, data: bytes) -> list[Revocation]:
        entries = []
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            try:
                entries.append(_entry(orjson.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise RevocationFileError(
                    f"{self.path}:{number} is no revocation; correct the line, or take it out: {_WITHOUT_IT}"
                ) from error
        return entries

    def _replace(self, data: bytes) -> str:
        """Puts `data` in the file's place; returns why not. The old file serves as well, it is only longer."""
        new = f"{self.path}.new"
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, self.path)
            self._sync_directory()
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(new)
            return error.strerror or str(error)
        return ""

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | flags, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                if self._is_current(fd):
                    yield fd
                    return
            finally:
                os.close(fd)

    def _is_current(self, fd: int) -> bool:
        """False when a start has put another file in its place while we waited for the lock."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _sync_directory(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _in_force(entries: Iterable[Revocation], now: float) -> list[Revocation]:
    """Each name once, with its latest times, and only while one of its tokens may live. Those that expire first come
    first: the ring gives an entry's room away in the order in which they were put in."""
    latest: dict[tuple[Kind, str], Revocation] = {}
    for entry in entries:
        known = latest.get((entry.kind, entry.value), entry)
        latest[entry.kind, entry.value] = entry._replace(
            at=max(entry.at, known.at), until=max(entry.until, known.until)
        )
    found = sorted((one for one in latest.values() if one.until > now), key=lambda one: (one.until, one.at))
    if len(found) > REVOCATION_ENTRIES:
        raise RevocationFileError(
            f"{NAME} in server.state_dir holds {len(found)} revocations, {REVOCATION_ENTRIES} can be in force;"
            f" take lines out: {_WITHOUT_IT}"
        )
    return found


def _line(entry: Revocation) -> bytes:
    until = None if math.isinf(entry.until) else entry.until
    document = {"kind": entry.kind.name.lower(), "value": entry.value, "at": entry.at, "until": until}
    return orjson.dumps(document) + b"\n"


def _entry(document: Any) -> Revocation:
    """Raises ValueError, KeyError or TypeError for anything that no `_line` gave."""
    kind, value = Kind[document["kind"].upper()], document["value"]
    at = float(document["at"])
    until = math.inf if document["until"] is None else float(document["until"])
    if not isinstance(value, str):
        raise TypeError("value is no string")
    Revocations(max_entries=1).revoke(document["kind"], value, at)  # in the words of those who will apply it
    return Revocation(kind, value, at, until)


def _end_of_lines(fd: int) -> int:
    """Where the last whole line ends. OSError when no line end is near: then the file is not ours to go on with."""
    size = os.fstat(fd).st_size
    start = max(0, size - _TAIL_BYTES)
    end = start + os.pread(fd, _TAIL_BYTES, start).rfind(b"\n") + 1
    if end == start > 0:
        raise OSError(errno.EBADMSG, "its end is damaged")
    return end
