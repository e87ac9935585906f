"""A piece of memory that processes share: it has a descriptor, so that a program put in place by execve maps it again.

Owns making and mapping it. Must not know what lies in it. Memory of a memfd has no name that another process could
open, needs no clean-up, and is gone with the last process that maps it or holds its descriptor, as an anonymous
mapping would be. Its size is sealed: nobody can cut off pages that another process is about to touch (SIGBUS).

Invariants: the descriptor lives as long as the object and is closed by execve unless someone makes it inheritable.
Pages are accounted when they are touched, whatever the size of the mapping.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3; earlier kernels answer EINVAL, and some later ones refuse to go without it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memory:
    """`map`: the bytes, shared and writable. `fd`: whose they are."""

    __slots__ = ("fd", "map")

    def __init__(self, fd: int) -> None:
        """Maps what `fd` holds and owns `fd` from then on. Raises OSError or ValueError; `fd` is the caller's then."""
        self.map = mmap.mmap(fd, 0, flags=mmap.MAP_SHARED)
        self.map.madvise(mmap.MADV_DONTDUMP)  # a stuck worker's core would be gigabytes of mostly nothing
        self.fd = fd

    @classmethod
    def adopt(cls, fd: int) -> Memory:
        """What an earlier image of this process made. Raises ValueError for a descriptor without memory."""
        try:
            memory = cls(fd)
            os.set_inheritable(fd, False)
        except OSError as error:
            raise ValueError(f"descriptor {fd} is no shared memory: {error.strerror}") from error
        return memory

    @classmethod
    def create(cls, name: str, size: int) -> Memory:
        """Zeroed. `name` is what /proc/PID/maps shows. Raises OSError."""
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        try:
            fd = os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def disown(self) -> None:
        """Leaves the descriptor to the caller."""
        self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)
