# cython: language_level=3
"""The ledger's table: users' rows and the index to them, tenants' rows, in memory that all processes share, lock-free.

Owns the layout, and who may write which word in what order (a tenant's row: _limits.pyx). Must not know names, limits,
the store or what a token is; no clock but for `Account.add`. It is long because a row's words, their one writer and the
order of their stores are to be read in one place.

    | rows taken | overflow | planes in use | ... at byte 2048 what shm/ledger.py writes there       a page
    | index of users      row + 1, open addressing, linear probing                                   a word each
    | keys of tenants     open addressing, over the rows themselves; behind them the shared rows'    a word each
    | rows of users       32 words                                                                   taken in order
    | rows of tenants     _limits.pyx; SHARED_TENANTS more, the last, for all that found no room, by their keys
    | plane 0             held running settled settled_at of row 0, of row 1, ...                    the last slot's
    | plane 1 ...         the same                                                                   slot 0's, slot 1's ...

A plane that nobody used touches no page, and sums walk the planes in use: those up to the highest whose slot ever had a
process. The last slot's, telemetry's, comes first, so that a node of four workers with a hundred free slots has five.

| word | who writes it | how |
|---|---|---|
| rows taken, overflow | all | atomic add |
| planes in use | all | CAS, it only grows: before the first store to a plane |
| index word, tenant key | all | CAS from 0, once and for ever |
| user_id of a row | who took the row | store, before the CAS that publishes it |
| held, running, settled, settled_at | the slot's process; the master zeroes the first two once it is reaped | store |
| stored, window_base, window_at, free_at, 4 x (iat, token_base, at, first base) | telemetry | store |
| average of completions | all | store: of two at once one is lost |
| first seen: 8 x (token, whether it was new, settled then), and which goes next | all | CAS |
| a tenant's row | all | CAS |

Loads acquire and stores release. Invariants: no lock, so a process may die between any two instructions and no other
waits for it; no loop without a bound. An index word never changes once it is set, so a user has one row: two that make
the same one both want the first free word of its walk, and one gets it. Every pointer was checked once, in Table,
against a buffer that stays exported. Words are 64-bit; sums are signed, for a base may be negative.
"""

from collections import namedtuple

from proxyd._limits import PERMITS_MAX, TICK_MS

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from proxyd._limits cimport average, count_permits, free_permits, learn, make_tenant, permit_mark, signed_word
from proxyd._limits cimport tenant_words
from proxyd._shm cimport Cells, px_cell_add, px_cell_get, px_cell_set
from proxyd._shm cimport px_word_add, px_word_cas, px_word_load, px_word_store

Standing = namedtuple("Standing", "base at_ms free_at first", defaults=(0,))
Sums = namedtuple("Sums", "held running settled")

cdef enum:
    LINE = 8
    PAGE = 512
    SHARED_TENANTS = 64
    HEAD_TAKEN = 0
    HEAD_OVERFLOW = LINE
    HEAD_PLANES = 2 * LINE
    SLOTS_MAX = 8_190  # a permit's mark has 13 bits for its slot
    PROBES = 512  # the index is at most half full: a walk of more than a hundred is a bug, and may not be endless

    USER_ID = 0
    STORED = 1
    WINDOW_BASE = 2
    WINDOW_AT = 3
    FREE_AT = 4
    COMPLETION = 5
    TOKENS = 6  # 4 entries of iat, base, at, first base
    TOKEN_ENTRIES = 4
    TOKEN_WORDS = 4
    NEXT_SEEN = 22
    SEEN = 23  # 31 bits of the token, 1 whether it was new, 32 of what was settled
    SEEN_ENTRIES = 8
    USER_HEAD = 32
    HELD = 0
    RUNNING = 1
    SETTLED = 2
    SETTLED_AT = 3
    SLOT_WORDS = 4

# Each try that fails is another token's note that came first.
cdef enum:
    SEEN_TRIES = 64

cdef int64_t _NO_IAT = <int64_t> (1ull << 63)


# --- geometry --------------------------------------------------------------------------------------------------------

cdef Py_ssize_t _index_words(Py_ssize_t users) noexcept:
    cdef Py_ssize_t n = 8
    while n < 2 * users:
        n *= 2
    return n

cdef inline Py_ssize_t _up(Py_ssize_t words, Py_ssize_t unit) noexcept:
    return (words + unit - 1) & ~(unit - 1)

cdef inline uint64_t _mix(uint64_t x) noexcept nogil:
    """splitmix64's end: neighbours among user ids land far apart."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull
    return x ^ (x >> 31)


cdef class Table(Cells):
    """The whole mapping. Any process reads it, finds users and tenants, and counts."""

    cdef uint64_t *p
    cdef uint64_t *index
    cdef uint64_t *keys
    cdef uint64_t *user_rows
    cdef uint64_t *tenant_rows
    cdef uint64_t *planes
    cdef bint is_shared
    cdef readonly Py_ssize_t max_users, max_tenants, slots, permits
    cdef Py_ssize_t index_words, probes, tenant_words, plane_words

    def __cinit__(self, object buffer, Py_ssize_t slots, Py_ssize_t users, Py_ssize_t tenants, Py_ssize_t permits,
                  bint is_shared=True):
        cdef Py_ssize_t size = Table.measure(slots, users, tenants, permits)
        self.p = self._at(buffer, 0, size // 8)
        self.is_shared = is_shared
        self.slots, self.max_users, self.max_tenants, self.permits = slots, users, tenants, permits
        self.index_words = _index_words(users)
        self.probes = min(self.index_words, <Py_ssize_t> PROBES)
        self.plane_words = _up(users * SLOT_WORDS, PAGE)
        self.tenant_words = tenant_words(permits)
        self.index = self.p + PAGE
        self.keys = self.index + _up(self.index_words, PAGE)
        self.user_rows = self.keys + _up(tenants + SHARED_TENANTS, PAGE)
        self.tenant_rows = self.user_rows + _up(users * USER_HEAD, PAGE)
        self.planes = self.tenant_rows + _up((tenants + SHARED_TENANTS) * self.tenant_words, PAGE)

    @staticmethod
    def measure(Py_ssize_t slots, Py_ssize_t users, Py_ssize_t tenants, Py_ssize_t permits):
        for name, n, least, most in (
            ("slots", slots, 1, SLOTS_MAX),
            ("users", users, 1, 1 << 24),
            ("tenants", tenants, 1, 1 << 16),
            ("permits", permits, 0, PERMITS_MAX),
        ):
            if not least <= n <= most:
                raise ValueError(f"ledger: {name} out of range: {n}, not {least} to {most}")
        return 8 * (
            PAGE
            + _up(_index_words(users), PAGE)
            + _up(tenants + SHARED_TENANTS, PAGE)
            + _up(users * USER_HEAD, PAGE)
            + _up((tenants + SHARED_TENANTS) * tenant_words(permits), PAGE)
            + slots * _up(users * SLOT_WORDS, PAGE)
        )

    @staticmethod
    def geometry():
        return {
            "user words": USER_HEAD,
            "slot words": SLOT_WORDS,
            "tokens": TOKEN_ENTRIES,
            "first seen": SEEN_ENTRIES,
            "shared tenants": SHARED_TENANTS,
            "tenant words": tenant_words(0),
            "tick ms": TICK_MS,
        }

    cdef inline uint64_t* user_row(self, Py_ssize_t row) noexcept nogil:
        return self.user_rows + row * USER_HEAD

    cdef inline uint64_t* cells(self, Py_ssize_t plane, Py_ssize_t row) noexcept nogil:
        """Plane's words of a row. A slot's plane: (slot + 1) % slots."""
        return self.planes + plane * self.plane_words + row * SLOT_WORDS

    cdef inline Py_ssize_t used(self) noexcept nogil:
        """Planes that sums walk: read anew for each sum, for a note of another process's may be of a newer one."""
        cdef uint64_t n = px_word_load(self.p + HEAD_PLANES)
        return self.slots if n > <uint64_t> self.slots else <Py_ssize_t> n

    cdef Py_ssize_t use(self, Py_ssize_t slot) noexcept nogil:
        """The slot's plane, from now on within every sum."""
        cdef Py_ssize_t plane = (slot + 1) % self.slots
        cdef uint64_t n = px_word_load(self.p + HEAD_PLANES)
        while n <= <uint64_t> plane and not px_word_cas(self.p + HEAD_PLANES, n, <uint64_t> plane + 1):
            n = px_word_load(self.p + HEAD_PLANES)  # it only grows: at most `slots` times
        return plane

    cdef inline uint64_t* tenant_row(self, Py_ssize_t row) noexcept nogil:
        return self.tenant_rows + row * self.tenant_words

    cdef inline Py_ssize_t taken(self) noexcept nogil:
        cdef uint64_t n = px_word_load(self.p + HEAD_TAKEN)
        return self.max_users if n > <uint64_t> self.max_users else <Py_ssize_t> n

    cdef inline bint is_in_use(self, Py_ssize_t tenant) noexcept nogil:
        return px_word_load(self.keys + tenant) != 0

    @property
    def users(self):
        return self.taken()

    @property
    def tenants(self):
        cdef Py_ssize_t i, n = 0
        for i in range(self.max_tenants):
            n += px_word_load(self.keys + i) != 0
        return n

    @property
    def overflow(self):
        return px_word_load(self.p + HEAD_OVERFLOW)

    def count_overflow(self):
        px_word_add(self.p + HEAD_OVERFLOW, 1)

    def find(self, uint64_t user_id, Py_ssize_t slot=-1):
        cdef Py_ssize_t i, at = <Py_ssize_t> (_mix(user_id) & <uint64_t> (self.index_words - 1))
        cdef uint64_t word
        if slot < -1 or slot >= self.slots:
            raise IndexError("ledger: no such slot")
        for i in range(self.probes):
            word = px_word_load(self.index + ((at + i) & (self.index_words - 1)))
            if not word:
                return None
            if px_cell_get(self.user_row(<Py_ssize_t> word - 1) + USER_ID) == user_id:
                return _account(self, <Py_ssize_t> word - 1, slot)
        return None

    def reclaim(self, Py_ssize_t slot):
        """Frees what the dead process of `slot` held: its words in every user's row, its permits, whatever its epoch.
        The number of permits. Before: the process is reaped and its successor not forked yet, so nobody writes these
        words meanwhile; other slots' processes may do what they like. Cost: rows and tenants in use, not the table.
        """
        cdef Py_ssize_t i, freed = 0
        cdef uint64_t *cells
        if slot < 0 or slot >= self.slots:
            raise IndexError("ledger: no such slot")
        cdef Py_ssize_t plane = (slot + 1) % self.slots
        # Of a slot that nobody used not even a page is read: that would make it.
        for i in range(self.taken() if plane < self.used() else 0):
            cells = self.cells(plane, i)
            if px_cell_get(cells + HELD):
                px_word_store(cells + HELD, 0)
            if px_cell_get(cells + RUNNING):
                px_word_store(cells + RUNNING, 0)
        for i in range(self.max_tenants + SHARED_TENANTS):
            if self.is_in_use(i):
                freed += free_permits(self.tenant_row(i), self.permits, slot)
        return freed

    def totals(self):
        cdef Py_ssize_t i, k, permits = 0
        cdef int64_t held = 0, running = 0
        cdef Py_ssize_t taken = self.taken()
        for k in range(self.used()):
            for i in range(taken):
                held += signed_word(self.cells(k, i) + HELD)
                running += signed_word(self.cells(k, i) + RUNNING)
        for i in range(self.max_tenants + SHARED_TENANTS):
            if self.is_in_use(i):
                permits += count_permits(self.tenant_row(i), self.permits)
        return held, running, permits


cdef class Writer:
    """One slot's process. Invariant: made and used by that process alone, after the fork, for it keeps a spare row."""

    cdef Table table
    cdef Py_ssize_t slot, spare
    cdef uint64_t mark

    def __cinit__(self, Table table not None, Py_ssize_t slot, uint64_t epoch):
        if slot < 0 or slot >= table.slots:
            raise IndexError("ledger: no such slot")
        table.use(slot)
        self.table = table
        self.slot = slot
        self.spare = -1
        self.mark = permit_mark(slot, epoch)

    @property
    def taken(self):
        return self.table.taken()

    def account(self, uint64_t user_id):
        cdef Table t = self.table
        cdef Py_ssize_t i, mask = t.index_words - 1, at = <Py_ssize_t> (_mix(user_id) & <uint64_t> mask)
        cdef uint64_t word
        cdef uint64_t *place
        for i in range(t.probes):
            place = t.index + ((at + i) & mask)
            word = px_word_load(place)
            if not word:
                if self.spare < 0:
                    # Not a CAS loop: the counter may run past the end by one a process, and `taken` knows.
                    if t.taken() >= t.max_users:
                        return None
                    self.spare = <Py_ssize_t> px_word_add(t.p + HEAD_TAKEN, 1) - 1
                    if self.spare >= t.max_users:
                        self.spare = -1
                        return None
                px_word_store(t.user_row(self.spare) + USER_ID, user_id)
                if px_word_cas(place, 0, <uint64_t> self.spare + 1):
                    word = <uint64_t> self.spare + 1
                    self.spare = -1
                    return _account(t, <Py_ssize_t> word - 1, self.slot)
                # Another user took this place, or another process made this very user: its row counts, ours is kept.
                word = px_word_load(place)
            if px_cell_get(t.user_row(<Py_ssize_t> word - 1) + USER_ID) == user_id:
                return _account(t, <Py_ssize_t> word - 1, self.slot)
        return None

    cdef object _tenant(self, Py_ssize_t row):
        cdef Table t = self.table
        return make_tenant(t, row, row < t.max_tenants, t.tenant_row(row), t.permits, self.mark)

    def tenant(self, uint64_t key):
        cdef Table t = self.table
        cdef Py_ssize_t i, at
        cdef uint64_t word
        if key == 0:
            key = 1
        at = <Py_ssize_t> (_mix(key) % <uint64_t> t.max_tenants)
        for i in range(t.max_tenants):
            word = px_word_load(t.keys + at)
            if word == 0:
                if px_word_cas(t.keys + at, 0, key):
                    return self._tenant(at)
                word = px_word_load(t.keys + at)
            if word == key:
                return self._tenant(at)
            at += 1
            if at == t.max_tenants:
                at = 0
        at = t.max_tenants + <Py_ssize_t> (_mix(key) % SHARED_TENANTS)
        px_word_store(t.keys + at, 1)
        return self._tenant(at)


# --- a user ----------------------------------------------------------------------------------------------------------

cdef Account _account(Table table, Py_ssize_t row, Py_ssize_t slot):
    cdef Account one = Account.__new__(Account)
    one.table = table
    one.number = row
    one.p = table.user_row(row)
    one.mine = NULL if slot < 0 else table.cells(table.use(slot), row)
    return one


cdef class Account:
    """One user's row. Within a slot a token goes to `settled` before it leaves `held`, and readers read `held` first:
    a sum that is taken meanwhile may have it twice, never not at all."""

    cdef Table table
    cdef Py_ssize_t number
    cdef uint64_t *p
    cdef uint64_t *mine

    cdef int64_t _sum(self, Py_ssize_t word) noexcept nogil:
        cdef Py_ssize_t k
        cdef int64_t total = 0
        for k in range(self.table.used()):
            total += signed_word(self.table.cells(k, self.number) + word)
        return total

    @property
    def user_id(self):
        return px_cell_get(self.p + USER_ID)

    @property
    def row(self):
        return self.number

    @property
    def is_shared(self):
        return self.table.is_shared

    @property
    def held(self):
        return self._sum(HELD)

    @property
    def running(self):
        return self._sum(RUNNING)

    @property
    def settled(self):
        return self._sum(SETTLED)

    @property
    def settled_at(self):
        cdef Py_ssize_t k
        cdef int64_t at, last = 0
        for k in range(self.table.used()):
            at = signed_word(self.table.cells(k, self.number) + SETTLED_AT)
            if at > last:
                last = at
        return last

    def sums(self):
        cdef Py_ssize_t k
        cdef int64_t held = 0, running = 0, settled = 0
        cdef uint64_t *cells
        for k in range(self.table.used()):
            cells = self.table.cells(k, self.number)
            held += signed_word(cells + HELD)
            running += signed_word(cells + RUNNING)
            settled += signed_word(cells + SETTLED)
        return Sums(held, running, settled)

    def add(self, int64_t held=0, int64_t running=0, int64_t settled=0, int64_t at_ms=0):
        cdef timespec now
        if self.mine == NULL:
            raise ValueError("ledger: found accounts are for reading and for telemetry's own words")
        if settled:
            if at_ms <= 0:
                clock_gettime(CLOCK_MONOTONIC, &now)
                at_ms = <int64_t> now.tv_sec * 1000 + now.tv_nsec // 1_000_000
            px_word_store(self.mine + SETTLED_AT, <uint64_t> at_ms)
            px_word_store(self.mine + SETTLED, px_cell_get(self.mine + SETTLED) + <uint64_t> settled)
        if running:
            px_word_store(self.mine + RUNNING, px_cell_get(self.mine + RUNNING) + <uint64_t> running)
        if held:
            px_word_store(self.mine + HELD, px_cell_get(self.mine + HELD) + <uint64_t> held)

    @property
    def stored(self):
        return signed_word(self.p + STORED)

    def add_stored(self, int64_t n):
        px_cell_add(self.p + STORED, <uint64_t> n)

    def heal(self):
        px_cell_set(self.p + STORED, <uint64_t> self._sum(SETTLED))

    @property
    def window(self):
        # `at` is written last and read first: a base is as new as its `at` says, or newer.
        cdef int64_t at = signed_word(self.p + WINDOW_AT)
        cdef int64_t base
        if at == 0:
            return None
        base = signed_word(self.p + WINDOW_BASE)
        return Standing(base, at, signed_word(self.p + FREE_AT))

    def set_window(self, int64_t base, int64_t at_ms, int64_t free_at):
        px_word_store(self.p + FREE_AT, <uint64_t> free_at)
        px_word_store(self.p + WINDOW_BASE, <uint64_t> base)
        px_word_store(self.p + WINDOW_AT, <uint64_t> max(at_ms, 1))

    def token(self, int64_t iat):
        cdef Py_ssize_t k
        cdef uint64_t *entry
        cdef int64_t at, base, first
        if iat == _NO_IAT:
            return None
        for k in range(TOKEN_ENTRIES):
            entry = self.p + TOKENS + TOKEN_WORDS * k
            at = signed_word(entry + 2)
            if at == 0 or signed_word(entry) != iat:
                continue
            base = signed_word(entry + 1)
            first = signed_word(entry + 3)
            if signed_word(entry) == iat:  # else it was given to another token meanwhile
                return Standing(base, at, 0, first)
        return None

    def set_token(self, int64_t iat, int64_t base, int64_t at_ms):
        """An entry that changes its token says so first, and names the new one only when its base is there."""
        cdef Py_ssize_t k, oldest = 0
        cdef uint64_t *entry
        cdef int64_t at, least = 0x7FFFFFFFFFFFFFFF
        if iat == _NO_IAT:
            raise ValueError("ledger: no token is issued then")
        for k in range(TOKEN_ENTRIES):
            entry = self.p + TOKENS + TOKEN_WORDS * k
            at = signed_word(entry + 2)
            if at and signed_word(entry) == iat:
                oldest = k
                break
            if at < least:
                least, oldest = at, k
        entry = self.p + TOKENS + TOKEN_WORDS * oldest
        if signed_word(entry) != iat or not signed_word(entry + 2):
            px_word_store(entry + 2, 0)
            px_word_store(entry, <uint64_t> _NO_IAT)
            px_word_store(entry + 1, <uint64_t> base)
            px_word_store(entry + 3, <uint64_t> base)
            px_word_store(entry, <uint64_t> iat)
        else:
            px_word_store(entry + 1, <uint64_t> base)
        px_word_store(entry + 2, <uint64_t> max(at_ms, 1))

    def first_seen(self, uint64_t token, bint is_new):
        """The first worker that sees a token notes what was settled then and whether it `is_new`; the others find it.

        The note is one word, so it is there or not. It goes where `next` says, and only if that place holds what the
        walk before saw there, so of two that see one token first one finds its place changed and then the other's
        note. A place that another took is skipped for it (its process may have died before it moved `next`). The sum
        is taken after the notes were read, so it is never less than a note's, which has its low half only.
        """
        cdef Py_ssize_t k
        cdef uint64_t seen[SEEN_ENTRIES]
        cdef uint64_t n, mark, word
        cdef int64_t settled = 0
        mark = _mix(token) >> 33 or 1
        for _ in range(SEEN_TRIES):
            n = px_word_load(self.p + NEXT_SEEN)
            for k in range(SEEN_ENTRIES):
                seen[k] = px_word_load(self.p + SEEN + k)
            settled = self._sum(SETTLED)
            for k in range(SEEN_ENTRIES):
                word = seen[k]
                if word >> 33 == mark:
                    return settled - <int64_t> ((<uint64_t> settled - word) & 0xFFFFFFFF), bool(word >> 32 & 1)
            k = <Py_ssize_t> (n % SEEN_ENTRIES)
            word = mark << 33 | <uint64_t> is_new << 32 | (<uint64_t> settled & 0xFFFFFFFF)
            if px_word_cas(self.p + SEEN + k, seen[k], word):
                px_word_cas(self.p + NEXT_SEEN, n, n + 1)
                return settled, bool(is_new)
            px_word_cas(self.p + NEXT_SEEN, n, n + 1)
        return settled, bool(is_new)

    @property
    def average_completion(self):
        return average(self.p + COMPLETION)

    def learn_completion(self, uint64_t tokens):
        learn(self.p + COMPLETION, tokens)
