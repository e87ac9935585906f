"""The name of this node: who owns which spool positions in a database that several nodes share.

Owns: in `server.state_dir` the file `node.id`, 16 hex digits and a line end, made once, and `node.owner`, the tokens
by which a copy of the directory is told from it (mysql.py). Must not know: databases.
Invariants: the file is whole and on disk before its name is visible, so a kill leaves none or all of it; of two
processes that make it at once, both get the same; it goes with the spool, because the positions are about that.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from proxyd.store.schema import StoreError, StoreMisfit

NAME = "node.id"
OWNER_NAME = "node.owner"
# A database that was restored, or lost its last commits in a failover, shows an older one: of as many starts.
MAX_TOKENS = 64
_ID = re.compile(r"[0-9a-f]{16}")


def node_id(state_dir: str | Path) -> str:
    """16 hex digits, the same for ever. StoreMisfit: the file holds something else; StoreError: the disk fails."""
    path = Path(state_dir) / NAME
    try:
        if not path.exists():
            _make(path)
        text = path.read_text(errors="replace").strip()
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; it names this node to the database") from error
    if not _ID.fullmatch(text):
        raise StoreMisfit(
            f"{path}: does not hold 16 hex digits; put the old ones back, or, when the spool beside it is empty,"
            " remove the file: a new one is made"
        )
    return text


class Owner:
    """The tokens that this state_dir has put into the store, the newest in force; a new one with each process.

    A copy of the directory has the tokens up to the copying and none of later ones. Without a directory nothing is
    known of earlier processes: the first token that is met is taken for theirs.
    """

    __slots__ = ("_earlier", "_path", "is_kept", "token")

    def __init__(self, state_dir: str | Path | None = None) -> None:
        """Raises OSError."""
        self._path = None if state_dir is None else Path(state_dir) / OWNER_NAME
        self.token = int.from_bytes(os.urandom(8)) >> 1
        self.is_kept = False
        text = ""
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                text = self._path.read_text(errors="replace")
        self._earlier = [int(line, 16) for line in text.split("\n") if _ID.fullmatch(line)][-MAX_TOKENS:]

    def holds(self, token: int) -> bool:
        """True for a token that this state_dir made."""
        if self._path is None and not self.is_kept:
            return True
        return token == self.token or token in self._earlier

    def keep(self, found: int) -> int:
        """Puts the token on disk, before it is in the store, where `found` is now; the one that is to be there. Raises
        StoreError."""
        if not self.is_kept and self._path is not None:
            tokens = [*self._earlier[1 - MAX_TOKENS :], self.token]
            try:
                new = _write(self._path, "".join(f"{token:016x}\n" for token in tokens))
                os.replace(new, self._path)
                _sync(self._path.parent)
            except OSError as error:
                if found == self.token:
                    raise StoreError(f"{self._path}: {error.strerror}; it tells this node from a copy") from error
                self.token = found  # on a full disk, which is to be emptied, the old one stays
        self.is_kept = True
        return self.token


def _make(path: Path) -> None:
    new = _write(path, f"{os.urandom(8).hex()}\n")
    try:
        with contextlib.suppress(FileExistsError):  # another process was first: its name counts
            os.link(new, path)
    finally:
        os.unlink(new)
    _sync(path.parent)


def _write(path: Path, text: str) -> Path:
    """A new file beside `path`, whole and on disk; its path."""
    new = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        os.unlink(new)
        raise
    return new


def _sync(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
