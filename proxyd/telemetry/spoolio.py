"""What the spool's writer needs of the world outside: system calls that may fail, a thread for syncs, a log.

Owns: nothing. Must not know: records, segments. Tests hand the writer others of the same shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol


class SpoolLog(Protocol):
    """What we need of log.Log."""

    def info(self, event: str, /, **fields: Any) -> None: ...
    def warning(self, event: str, /, **fields: Any) -> None: ...
    def error(self, event: str, /, **fields: Any) -> None: ...


_libc = ctypes.CDLL(None, use_errno=True)
_fallocate: Any = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of fallocate(2): os.posix_fallocate would lengthen the file


class SpoolIO:
    """The system calls whose failures matter. Tests pass one that fails."""

    __slots__ = ()

    def write(self, fd: int, data: bytes) -> int:
        return os.write(fd, data)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def reserve(self, fd: int, start: int, length: int) -> None:
        """Takes blocks for these bytes of a file, whose size stays as it is. Raises OSError."""
        if _fallocate is None:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        while _fallocate(fd, _KEEP_SIZE, ctypes.c_int64(start), ctypes.c_int64(length)):
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))

    def release(self, fd: int) -> None:
        """Gives back the blocks behind a file's end: a truncation to the size it has."""
        with contextlib.suppress(OSError):
            os.ftruncate(fd, os.fstat(fd).st_size)

    def sync_directory(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def create(self, path: Path) -> int:
        """A new append-only file of mode 0600, locked by us."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        return fd


# Runs work in a thread, then calls back on the loop with the OSError it raised, or None.
InThread = Callable[[Callable[[], None], Callable[[OSError | None], None]], None]


def sync_thread(loop: asyncio.AbstractEventLoop) -> InThread:
    """One thread beside the loop, for one sync at a time."""
    pool = ThreadPoolExecutor(1, "spool-sync")

    def in_thread(work: Callable[[], None], done: Callable[[OSError | None], None]) -> None:
        def run() -> None:
            error: OSError | None = None
            try:
                work()
            except OSError as failure:
                error = failure
            try:
                loop.call_soon_threadsafe(done, error)
            except RuntimeError:
                return  # the loop is closed: close() has synced, or the process is dying

        pool.submit(run)

    return in_thread
