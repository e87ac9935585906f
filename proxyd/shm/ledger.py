"""The node's ledger: what users hold and have spent, tenants' windows and permits, in memory that all workers share.

Owns the mapping, its size, and what becomes of users and tenants that found no room. Must not know quotas, limits or
the store: they are arguments, or numbers that others put here (ext _ledger, _limits: layout and atomic steps).

    master: Ledger.create(slots) ... fork ... reclaim(slot) when a worker is reaped, before its successor is forked
    worker: ledger.at(slot, epoch) after the fork -> account(user_id), tenant(name)
    telemetry: ledger.find(user_id, slot), with a slot behind the workers', which nobody reclaims
    the image after execve: Ledger.adopt(fd)

A slot here is a seat: each generation's workers have their own (shm/region.py).

Invariants: nothing here waits for another process, whatever state it died in. Rows are never freed: the memory that is
in use grows with the users and tenants that were seen since the node started, and with the slots that ever had a
process, not with the mapping. It has no name and dies with its last process (shm/memory.py).
Bounds: `users` rows; one user more has a row in a table of this process alone, which telemetry does not see and which
starts anew when it is full, too. `tenants` rows; all tenants beyond share 64, limits included, by their names' hash.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from typing import NamedTuple

from proxyd._ledger import Account, Standing, Sums, Table, Writer
from proxyd._limits import PERMITS_MAX, Tenant, Window
from proxyd.shm.memory import Memory

__all__ = ["Account", "Ledger", "SlotLedger", "Standing", "Sums", "Tenant", "Totals", "Window"]

USERS = 1_048_576
TENANTS = 32_768
# Address space that each of the two parts may take. Untouched pages cost nothing, so this bounds what `ps` shows, not
# memory. All users have rows with up to 247 slots (30 workers); 4,098 slots (512 workers) have 65,000 users'.
_USERS_BYTES = 8 << 30
_TENANTS_BYTES = 512 << 20
_TENANTS_LEAST = 256
_TENANTS_SHARED = 64  # rows behind them, for those that found none
_PERMITS_LEAST = 1_024  # a reload may bring a limit where there was none
_PRIVATE_USERS = 65_536  # 20 MB of this process's own when full
_NAMES = 8_192  # tenants that a process knows by name; looked up anew beyond, for 2 us
_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from 3.13 on

MAGIC = 0x70726F7879640001
VERSION = 2  # of what Table.geometry does not say: the meaning of words. Another: a program refuses the memory
_HEADER = struct.Struct("=QIIIII7I")
_HEADER_AT = 2048  # of the first page; the table uses its first words


class Totals(NamedTuple):
    """The whole table. `users`, `tenants`: rows in use. `overflow`: how often a user or tenant found no room."""

    users: int
    tenants: int
    held: int
    running: int
    permits: int
    overflow: int


class Ledger:
    """The mapping, as the master makes it and every process of the node has it."""

    __slots__ = ("_memory", "_table")

    def __init__(self, table: Table, memory: Memory) -> None:
        self._table = table
        self._memory = memory

    @classmethod
    def create(cls, slots: int, *, permits: int = 0, users: int = USERS, tenants: int = TENANTS) -> Ledger:
        """`slots`: processes that spend; `permits`: the largest concurrent_streams of any tenant. Fewer rows than asked
        for when rows are very large. Errors: ValueError for counts out of range, OSError when there is no memory."""
        permits = min(max(permits, _PERMITS_LEAST), PERMITS_MAX)
        users = max(1, min(users, _USERS_BYTES // (256 + 32 * slots)))
        most = _TENANTS_BYTES // (4_224 + 8 * permits) - _TENANTS_SHARED
        tenants = max(min(tenants, _TENANTS_LEAST), min(tenants, most))
        memory = Memory.create("proxyd-ledger", Table.measure(slots, users, tenants, permits))
        table = Table(memory.map, slots, users, tenants, permits)
        _HEADER.pack_into(
            memory.map, _HEADER_AT, MAGIC, VERSION, slots, users, tenants, permits, *Table.geometry().values()
        )
        return cls(table, memory)

    @classmethod
    def adopt(cls, fd: int) -> Ledger:
        """The ledger that an earlier image of this process made; owns `fd` from then on. Raises ValueError, with what
        differs, when its layout is another; `fd` is then still the caller's."""
        memory = Memory.adopt(fd)
        try:
            return cls(Table(memory.map, *_check(memory.map)), memory)
        except ValueError:
            memory.disown()
            raise

    @property
    def fd(self) -> int:
        """For `adopt` in the image after execve, once it is inheritable. Stays this object's."""
        return self._memory.fd

    @property
    def permits(self) -> int:
        """How many a tenant's row has: no limit of concurrent streams can be told apart from this one beyond."""
        return self._table.permits

    def at(self, slot: int, epoch: int) -> SlotLedger:
        """What the worker of `slot` writes through. Call it in that worker, once: it keeps state of its own."""
        return SlotLedger(self._table, slot, epoch)

    def reclaim(self, slot: int) -> int:
        """Frees what a dead worker held; the number of permits. Called by the master after reaping it and before
        forking its successor: both write the same words."""
        return self._table.reclaim(slot)

    def find(self, user_id: int, slot: int = -1) -> Account | None:
        """The user's row if it was ever seen. Its `add` is for the one process of `slot`; without: for none."""
        return self._table.find(user_id, slot)

    def totals(self) -> Totals:
        """A walk over the rows in use: for status and tests. Each number is right by itself."""
        table = self._table
        held, running, permits = table.totals()
        return Totals(table.users, table.tenants, held, running, permits, table.overflow)


class SlotLedger:
    """One worker's hand on the ledger."""

    __slots__ = ("_private", "_table", "_tenants", "_writer")

    def __init__(self, table: Table, slot: int, epoch: int) -> None:
        self._table = table
        self._writer = Writer(table, slot, epoch)
        self._private: Writer | None = None
        self._tenants: dict[str, Tenant] = {}

    def account(self, user_id: int) -> Account:
        """The user's row; a private one (`is_shared` false) when the table is full. user_id: below 2^64."""
        account = self._writer.account(user_id)
        return self._alone(user_id) if account is None else account

    def tenant(self, name: str) -> Tenant:
        """The tenant's row; one that late-comers share (`is_own` false) when the table is full."""
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._writer.tenant(_key(name))
            if not tenant.is_own:
                self._table.count_overflow()
            if len(self._tenants) >= _NAMES:
                self._tenants.clear()  # what is under way keeps its Tenant
            self._tenants[name] = tenant
        return tenant

    def _alone(self, user_id: int) -> Account:
        if self._private is None:
            self._private = _private_writer()
        before = self._private.taken
        account = self._private.account(user_id)
        if account is None:
            self._private = _private_writer()
            before = 0
            account = self._private.account(user_id)
            assert account is not None
        if self._private.taken > before:
            self._table.count_overflow()
        return account


def _check(memory: mmap.mmap) -> tuple[int, int, int, int]:
    """Slots, users, tenants and permits of a mapping with this layout. Raises ValueError."""
    if len(memory) < _HEADER_AT + _HEADER.size:
        raise ValueError(f"the ledger: {len(memory)} bytes hold no header of proxyd's; restart the service instead")
    magic, version, slots, users, tenants, permits, *numbers = _HEADER.unpack_from(memory, _HEADER_AT)
    if magic != MAGIC:
        raise ValueError("the ledger: the header is not proxyd's; restart the service instead")
    differences = [] if version == VERSION else [f"version {version}, this program's is {VERSION}"]
    if version == VERSION:
        differences += [
            f"{name} {there}, this program's are {here}"
            for (name, here), there in zip(Table.geometry().items(), numbers, strict=True)
            if there != here
        ]
        if not differences and len(memory) != Table.measure(slots, users, tenants, permits):
            differences.append(f"{len(memory)} bytes for {slots} slots and {users} users")
    if differences:
        raise ValueError(f"the ledger has another layout ({'; '.join(differences)}); restart the service instead")
    return slots, users, tenants, permits


def _private_writer() -> Writer:
    size = Table.measure(1, _PRIVATE_USERS, 1, 0)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return Writer(Table(memory, 1, _PRIVATE_USERS, 1, 0, is_shared=False), 0, 0)


def _key(name: str) -> int:
    """64 bits that are the same in every process; surrogates of a hostile name are no error."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
