# cython: language_level=3
"""The ledger's words: users' spending, tenants' windows and permits, shared by all processes without a lock.

Owns the layout, and who may write which word in what order. Must not know names, limits, clocks (a time is an argument;
`Account.add` alone may read one) or what a token is. Long because the words of one table and all that touches them
are read together or not at all.

    | header: rows taken | overflow |                                                        a page
    | index of users   row + 1, open addressing, linear probing                              a word each
    | keys of tenants  open addressing over the rows themselves                              a word each
    | rows of users    | head: 24 words | slot 0: held running settled settled_at | 1 | ...  from a counter, never freed
    | rows of tenants  | head: 16 words | ring of requests: 256 | ring of tokens: 256 | permits |   the last: overflow

| word | writers | how |
|---|---|---|
| rows taken, overflow | all | atomic add |
| index word | all | CAS from 0, once |
| user_id of a row | who took the row | before the index word publishes it |
| held, running, settled, settled_at | the slot's process; the master zeroes the first two when it is reaped | store |
| stored, window_*, token entries | telemetry | store |
| averages | all | store, racy: a lost sample is a lost sample |
| tenant key | all | CAS from 0, once |
| newest, ring words, permits, high | all | CAS |

Invariants: no lock, so a process may die between any two instructions and no other waits for it. Every loop ends after
a number of words known beforehand, or repeats only because another process's CAS succeeded. Every pointer was checked
once, in Table, against a buffer that stays exported. Words are 64-bit; sums are signed, so that a base may be negative.
"""

from collections import namedtuple

from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from proxyd._shm cimport Cells, px_cell_add, px_cell_get, px_cell_set
from proxyd._shm cimport px_word_add, px_word_cas, px_word_load, px_word_store

Standing = namedtuple("Standing", "base at_ms free_at")
Sums = namedtuple("Sums", "held running settled")

cdef enum:
    LINE = 8
    PAGE = 512
    HEAD_TAKEN = 0
    HEAD_OVERFLOW = LINE
    # Twice as many would be walked only in a table that is far fuller than its index of two words a row can get.
    PROBES = 512

    USER_ID = 0
    STORED = 1
    WINDOW_BASE = 2
    WINDOW_AT = 3
    FREE_AT = 4
    COMPLETION = 5
    TOKENS = 6  # 4 entries of iat, base, at
    TOKEN_ENTRIES = 4
    USER_HEAD = 24
    HELD = 0
    RUNNING = 1
    SETTLED = 2
    SETTLED_AT = 3
    SLOT_WORDS = 4

    NEWEST_REQUESTS = 0
    NEWEST_TOKENS = 1
    HIGH = 2
    AVERAGE_TOKENS = 8
    AVERAGE_MS = 9
    TENANT_HEAD = 16
    RING = 256
    PERMITS = TENANT_HEAD + 2 * RING

    TICK = 250
    LIVE = 240  # ticks before the current one that count: 60 s and the part of a tick

TICK_MS = TICK
WINDOW_TICKS = LIVE + 1
PERMITS_MAX = 131_072  # a megabyte a tenant; twice the descriptors that a node of many workers has for streams

cdef uint64_t _CLOSED = 1ull << 39
cdef uint64_t _COUNT = (1ull << 39) - 1
cdef int64_t _COUNT_MAX = <int64_t> ((1ull << 39) - 1)
cdef uint64_t _LAPS = (1 << 24) - 1
cdef int64_t _NO_IAT = <int64_t> (1ull << 63)


# --- geometry --------------------------------------------------------------------------------------------------------

cdef Py_ssize_t _index_words(Py_ssize_t users) noexcept:
    cdef Py_ssize_t n = 8
    while n < 2 * users:
        n *= 2
    return n

cdef inline Py_ssize_t _up(Py_ssize_t words, Py_ssize_t unit) noexcept:
    return (words + unit - 1) & ~(unit - 1)

cdef inline Py_ssize_t _user_words(Py_ssize_t slots) noexcept:
    return _up(USER_HEAD + slots * SLOT_WORDS, LINE)

cdef inline Py_ssize_t _tenant_words(Py_ssize_t permits) noexcept:
    return _up(PERMITS + permits, LINE)

cdef inline uint64_t _mix(uint64_t x) noexcept nogil:
    """splitmix64's end: neighbours among user ids land far apart."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull
    return x ^ (x >> 31)

cdef inline int64_t _int(uint64_t *p) noexcept nogil:
    return <int64_t> px_word_load(p)

cdef inline void _learn(uint64_t *p, uint64_t n) noexcept nogil:
    """p: 0, or the average x 256, x 2, + 1. The first sample is the average."""
    cdef int64_t old = <int64_t> px_cell_get(p)
    cdef int64_t sample
    if n > (1ull << 40):
        n = 1ull << 40
    sample = <int64_t> (n << 8)
    if old:
        sample = (old >> 1) + ((sample - (old >> 1)) >> 3)
    px_cell_set(p, <uint64_t> (sample << 1 | 1))

cdef inline object _average(uint64_t *p):
    cdef uint64_t word = px_cell_get(p)
    return ((word >> 1) + 128) >> 8 if word else None


cdef class Table(Cells):
    """The whole mapping. Any process reads it, finds users and tenants, and counts."""

    cdef uint64_t *p
    cdef uint64_t *index
    cdef uint64_t *keys
    cdef uint64_t *user_rows
    cdef uint64_t *tenant_rows
    cdef bint is_shared
    cdef Py_ssize_t slots, max_users, max_tenants, permits, index_words, probes, user_words, tenant_words

    def __cinit__(self, object buffer, Py_ssize_t slots, Py_ssize_t users, Py_ssize_t tenants, Py_ssize_t permits,
                  bint is_shared=True):
        cdef Py_ssize_t size = Table.measure(slots, users, tenants, permits)
        self.p = self._at(buffer, 0, size // 8)
        self.is_shared = is_shared
        self.slots, self.max_users, self.max_tenants, self.permits = slots, users, tenants, permits
        self.index_words = _index_words(users)
        self.probes = min(self.index_words, <Py_ssize_t> PROBES)
        self.user_words = _user_words(slots)
        self.tenant_words = _tenant_words(permits)
        self.index = self.p + PAGE
        self.keys = self.index + _up(self.index_words, PAGE)
        self.user_rows = self.keys + _up(tenants, PAGE)
        self.tenant_rows = self.user_rows + _up(users * self.user_words, PAGE)

    @staticmethod
    def measure(Py_ssize_t slots, Py_ssize_t users, Py_ssize_t tenants, Py_ssize_t permits):
        if not (1 <= slots <= 4096 and 1 <= users <= 1 << 24 and 1 <= tenants <= 1 << 16 and 0 <= permits <= PERMITS_MAX):
            raise ValueError("ledger: slots, users, tenants or permits out of range")
        return 8 * (
            PAGE
            + _up(_index_words(users), PAGE)
            + _up(tenants, PAGE)
            + _up(users * _user_words(slots), PAGE)
            + _up((tenants + 1) * _tenant_words(permits), PAGE)
        )

    cdef inline uint64_t* user_row(self, Py_ssize_t row) noexcept nogil:
        return self.user_rows + row * self.user_words

    cdef inline uint64_t* tenant_row(self, Py_ssize_t row) noexcept nogil:
        return self.tenant_rows + row * self.tenant_words

    cdef inline Py_ssize_t taken(self) noexcept nogil:
        cdef uint64_t n = px_word_load(self.p + HEAD_TAKEN)
        return self.max_users if n > <uint64_t> self.max_users else <Py_ssize_t> n

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

    def find(self, uint64_t user_id):
        cdef Py_ssize_t i, at = <Py_ssize_t> (_mix(user_id) & <uint64_t> (self.index_words - 1))
        cdef uint64_t word
        for i in range(self.probes):
            word = px_word_load(self.index + ((at + i) & (self.index_words - 1)))
            if not word:
                return None
            if px_cell_get(self.user_row(<Py_ssize_t> word - 1) + USER_ID) == user_id:
                return _account(self, <Py_ssize_t> word - 1, -1)
        return None

    def reclaim(self, Py_ssize_t slot):
        """Frees what the dead process of `slot` held: its words in every user's row, its permits, whatever its epoch.
        The number of permits. Before: the process is reaped and its successor not forked yet, so nobody writes these
        words meanwhile; other slots' processes may do what they like. Cost: rows and tenants in use, not the table.
        """
        cdef Py_ssize_t i, k, high, freed = 0
        cdef uint64_t *cells
        cdef uint64_t *row
        cdef uint64_t word
        if slot < 0 or slot >= self.slots:
            raise IndexError("ledger: no such slot")
        for i in range(self.taken()):
            cells = self.user_row(i) + USER_HEAD + slot * SLOT_WORDS
            if px_cell_get(cells + HELD):
                px_word_store(cells + HELD, 0)
            if px_cell_get(cells + RUNNING):
                px_word_store(cells + RUNNING, 0)
        for i in range(self.max_tenants + 1):
            if i < self.max_tenants and not px_word_load(self.keys + i):
                continue
            row = self.tenant_row(i)
            high = min(<Py_ssize_t> px_word_load(row + HIGH), self.permits)
            for k in range(high):
                word = px_word_load(row + PERMITS + k)
                if word >> 48 == <uint64_t> slot + 1 and px_word_cas(row + PERMITS + k, word, 0):
                    freed += 1
        return freed

    def totals(self):
        cdef Py_ssize_t i, k, high, permits = 0
        cdef int64_t held = 0, running = 0
        cdef uint64_t *row
        for i in range(self.taken()):
            row = self.user_row(i) + USER_HEAD
            for k in range(self.slots):
                held += _int(row + k * SLOT_WORDS + HELD)
                running += _int(row + k * SLOT_WORDS + RUNNING)
        for i in range(self.max_tenants + 1):
            if i < self.max_tenants and not px_word_load(self.keys + i):
                continue
            row = self.tenant_row(i)
            high = min(<Py_ssize_t> px_word_load(row + HIGH), self.permits)
            for k in range(high):
                permits += px_word_load(row + PERMITS + k) != 0
        return held, running, permits


cdef class Writer:
    """One slot's process. Invariant: made and used by that process alone, after the fork, for it keeps a spare row."""

    cdef Table table
    cdef Py_ssize_t slot, spare
    cdef uint64_t mark

    def __cinit__(self, Table table not None, Py_ssize_t slot, uint64_t epoch):
        if slot < 0 or slot >= table.slots:
            raise IndexError("ledger: no such slot")
        self.table = table
        self.slot = slot
        self.spare = -1
        self.mark = (<uint64_t> slot + 1) << 48 | (epoch & 0xFFFF) << 32

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
                    return _tenant(t, at, self.mark)
                word = px_word_load(t.keys + at)
            if word == key:
                return _tenant(t, at, self.mark)
            at += 1
            if at == t.max_tenants:
                at = 0
        return _tenant(t, t.max_tenants, self.mark)


# --- a user ----------------------------------------------------------------------------------------------------------

cdef Account _account(Table table, Py_ssize_t row, Py_ssize_t slot):
    cdef Account one = Account.__new__(Account)
    one.table = table
    one.number = row
    one.p = table.user_row(row)
    one.mine = NULL if slot < 0 else one.p + USER_HEAD + slot * SLOT_WORDS
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
        cdef uint64_t *cells = self.p + USER_HEAD
        for k in range(self.table.slots):
            total += _int(cells + k * SLOT_WORDS + word)
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
        for k in range(self.table.slots):
            at = _int(self.p + USER_HEAD + k * SLOT_WORDS + SETTLED_AT)
            if at > last:
                last = at
        return last

    def sums(self):
        cdef Py_ssize_t k
        cdef int64_t held = 0, running = 0, settled = 0
        cdef uint64_t *cells = self.p + USER_HEAD
        for k in range(self.table.slots):
            held += _int(cells + HELD)
            running += _int(cells + RUNNING)
            settled += _int(cells + SETTLED)
            cells += SLOT_WORDS
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
        return _int(self.p + STORED)

    def add_stored(self, int64_t n):
        px_cell_add(self.p + STORED, <uint64_t> n)

    def heal(self):
        px_cell_set(self.p + STORED, <uint64_t> self._sum(SETTLED))

    @property
    def window(self):
        # `at` is written last and read first: a base is as new as its `at` says, or newer.
        cdef int64_t at = _int(self.p + WINDOW_AT)
        cdef int64_t base
        if at == 0:
            return None
        base = _int(self.p + WINDOW_BASE)
        return Standing(base, at, _int(self.p + FREE_AT))

    def set_window(self, int64_t base, int64_t at_ms, int64_t free_at):
        px_word_store(self.p + FREE_AT, <uint64_t> free_at)
        px_word_store(self.p + WINDOW_BASE, <uint64_t> base)
        px_word_store(self.p + WINDOW_AT, <uint64_t> max(at_ms, 1))

    def token(self, int64_t iat):
        cdef Py_ssize_t k
        cdef uint64_t *entry
        cdef int64_t at, base
        if iat == _NO_IAT:
            return None
        for k in range(TOKEN_ENTRIES):
            entry = self.p + TOKENS + 3 * k
            at = _int(entry + 2)
            if at == 0 or _int(entry) != iat:
                continue
            base = _int(entry + 1)
            if _int(entry) == iat:  # else it was given to another token meanwhile
                return Standing(base, at, 0)
        return None

    def set_token(self, int64_t iat, int64_t base, int64_t at_ms):
        """An entry that changes its token says so first, and names the new one only when its base is there."""
        cdef Py_ssize_t k, oldest = 0
        cdef uint64_t *entry
        cdef int64_t at, least = 0x7FFFFFFFFFFFFFFF
        if iat == _NO_IAT:
            raise ValueError("ledger: no token is issued then")
        for k in range(TOKEN_ENTRIES):
            entry = self.p + TOKENS + 3 * k
            at = _int(entry + 2)
            if at and _int(entry) == iat:
                oldest = k
                break
            if at < least:
                least, oldest = at, k
        entry = self.p + TOKENS + 3 * oldest
        if _int(entry) != iat or not _int(entry + 2):
            px_word_store(entry + 2, 0)
            px_word_store(entry, <uint64_t> _NO_IAT)
            px_word_store(entry + 1, <uint64_t> base)
            px_word_store(entry, <uint64_t> iat)
        else:
            px_word_store(entry + 1, <uint64_t> base)
        px_word_store(entry + 2, <uint64_t> max(at_ms, 1))

    @property
    def average_completion(self):
        return _average(self.p + COMPLETION)

    def learn_completion(self, uint64_t tokens):
        _learn(self.p + COMPLETION, tokens)


# --- a tenant --------------------------------------------------------------------------------------------------------

cdef Tenant _tenant(Table table, Py_ssize_t row, uint64_t mark):
    cdef Tenant one = Tenant.__new__(Tenant)
    one.table = table
    one.number = row
    one.p = table.tenant_row(row)
    one.mark = mark
    one.requests = _window(table, one.p + NEWEST_REQUESTS, one.p + TENANT_HEAD)
    one.tokens = _window(table, one.p + NEWEST_TOKENS, one.p + TENANT_HEAD + RING)
    return one


cdef class Tenant:
    """One tenant's row, seen from one process."""

    cdef Table table
    cdef Py_ssize_t number, hint
    cdef uint64_t *p
    cdef uint64_t mark
    cdef readonly Window requests
    cdef readonly Window tokens

    @property
    def row(self):
        return self.number

    @property
    def is_shared(self):
        return self.number < self.table.max_tenants

    cdef inline Py_ssize_t _bound(self, uint64_t limit) noexcept:
        return self.table.permits if limit > <uint64_t> self.table.permits else <Py_ssize_t> limit

    def acquire(self, uint64_t limit, uint64_t now_s):
        """Walks all of them once, from the lowest that this process has not seen taken, and round: a permit that is
        free all along is met. What is given back moves the hint down, so low ones fill first and the rest of the
        table stays untouched. `high` grows before a permit is taken: who reclaims up to it misses none.
        """
        cdef Py_ssize_t i, at, bound = self._bound(limit)
        cdef uint64_t *permits = self.p + PERMITS
        cdef uint64_t high, mine = self.mark | (now_s & 0xFFFFFFFF)
        at = self.hint if self.hint < bound else 0
        for i in range(bound):
            if not px_word_load(permits + at):
                high = px_word_load(self.p + HIGH)
                while high <= <uint64_t> at and not px_word_cas(self.p + HIGH, high, <uint64_t> at + 1):
                    high = px_word_load(self.p + HIGH)  # it only grows: at most `bound` times
                if px_word_cas(permits + at, 0, mine):
                    self.hint = at + 1
                    return at
            at += 1
            if at == bound:
                at = 0
        return -1

    def release(self, Py_ssize_t permit):
        cdef uint64_t word
        if permit < 0 or permit >= self.table.permits:
            raise IndexError("ledger: no such permit")
        word = px_word_load(self.p + PERMITS + permit)
        if word >> 32 == self.mark >> 32 and px_word_cas(self.p + PERMITS + permit, word, 0) and permit < self.hint:
            self.hint = permit

    def in_use(self, uint64_t limit):
        cdef Py_ssize_t i, n = 0
        for i in range(min(self._bound(limit), <Py_ssize_t> px_word_load(self.p + HIGH))):
            n += px_word_load(self.p + PERMITS + i) != 0
        return n

    def oldest_start(self, uint64_t limit):
        cdef Py_ssize_t i
        cdef uint64_t word, oldest = 0
        for i in range(min(self._bound(limit), <Py_ssize_t> px_word_load(self.p + HIGH))):
            word = px_word_load(self.p + PERMITS + i)
            if word and (not oldest or (word & 0xFFFFFFFF) < oldest):
                oldest = word & 0xFFFFFFFF
        return oldest

    @property
    def average_tokens(self):
        return _average(self.p + AVERAGE_TOKENS)

    def learn_tokens(self, uint64_t n):
        _learn(self.p + AVERAGE_TOKENS, n)

    @property
    def average_ms(self):
        return _average(self.p + AVERAGE_MS)

    def learn_ms(self, uint64_t n):
        _learn(self.p + AVERAGE_MS, n)


# --- sixty seconds ---------------------------------------------------------------------------------------------------

cdef Window _window(Table table, uint64_t *newest, uint64_t *ring):
    cdef Window one = Window.__new__(Window)
    one.table = table
    one.newest = newest
    one.ring = ring
    return one

cdef inline int64_t _tick(int64_t now_ms) noexcept nogil:
    return now_ms // TICK if now_ms > 0 else 0

cdef inline uint64_t _lap(int64_t tick) noexcept nogil:
    return <uint64_t> tick >> 8 & _LAPS

cdef inline bint _is_of(uint64_t word, int64_t tick) noexcept nogil:
    return word >> 40 == _lap(tick)

cdef inline uint64_t _grown(int64_t tick, int64_t count, int64_t n) noexcept nogil:
    """The tick's open word with n more; it stops at what 39 bits hold."""
    return _lap(tick) << 40 | <uint64_t> (_COUNT_MAX if n > _COUNT_MAX - count else count + n)


cdef class Window:
    """Counts of the last 60 s in ticks of 250 ms: tick t is word t % 256 of the ring.

        word   | lap, t / 256: 24 bits | closed: 1 | count: 39 |        another lap's word counts as 0
        newest   the tick that takes additions now; it only grows

    An addition goes to `newest` and nowhere else, by one CAS of that tick's word from the value that was read before
    the sum was taken. When the clock has moved on, the tick is closed by a CAS first, and only then `newest` grows.

    Exact. Say P took its sum with tick v newest, and its CAS succeeds. Then v was still open and its word is the one
    that P read, so no addition came in between: not to v, its word would differ; not to another tick, for that one
    would be newer and v closed before. Older ticks are closed, they only shrink (what is given back). So the sum
    that P saw is the sum, or more than it. A caller whose clock reading is older than `newest` adds there too, and counts from
    its own 60 s on: any 60 s of `now_ms` hold at most `limit` of what try_add let in. A refusal is never wrong by more than
    the rest of a tick: what it counted was added within the last 60.25 s. The one hole: a caller that was stopped for
    more than 3.75 s between its clock and this call sees the ring's 64 s only, so less than its own 60.
    Lock-free: a CAS fails only when another's succeeded.
    """

    cdef Table table
    cdef uint64_t *newest
    cdef uint64_t *ring

    cdef int64_t _open(self, int64_t now, uint64_t *word) noexcept nogil:
        """The tick that takes additions at `now` or later, and its word: open, or of an older lap."""
        cdef int64_t tick
        cdef uint64_t found, age
        cdef bint is_own
        while True:
            tick = _int(self.newest)
            found = px_word_load(self.ring + (tick & 255))
            is_own = _is_of(found, tick)
            age = ((found >> 40) - _lap(tick)) & _LAPS
            if not is_own and age < _LAPS >> 1:
                continue  # a newer lap: we slept for a minute between the two loads, and `newest` has grown
            if not (is_own and found & _CLOSED):
                if now <= tick:
                    word[0] = found
                    return tick
                if not px_word_cas(self.ring + (tick & 255), found, (found if is_own else _lap(tick) << 40) | _CLOSED):
                    continue
            # If it fails, another has moved it on. A tick closed by one who died before this line moves on here, too.
            px_word_cas(self.newest, <uint64_t> tick, <uint64_t> (now if now > tick else tick + 1))

    cdef int64_t _sum(self, int64_t first, int64_t end) noexcept nogil:
        """Of ticks first .. end - 1, at most the 255 before `end`."""
        cdef int64_t tick, total = 0
        cdef uint64_t word
        for tick in range(max(first, end - RING + 1, 0), end):
            word = px_word_load(self.ring + (tick & 255))
            if _is_of(word, tick):
                total += <int64_t> (word & _COUNT)
        return total

    def try_add(self, int64_t n, int64_t limit, int64_t now_ms):
        cdef int64_t now = _tick(now_ms), tick, count, total
        cdef uint64_t word
        if n < 0:
            raise ValueError("ledger: a negative n is for add")
        while True:
            tick = self._open(now, &word)
            count = <int64_t> (word & _COUNT) if _is_of(word, tick) else 0
            total = count + self._sum(now - LIVE, tick)
            if total and n > limit - total:
                return False
            if n == 0 or px_word_cas(self.ring + (tick & 255), word, _grown(tick, count, n)):
                return True

    def add(self, int64_t n, int64_t now_ms):
        """What is given back leaves the tick of `now_ms` and, where a late caller's addition went to a newer one, the
        15 after it; it is never moved to an older tick, so what stays counts no shorter than it should."""
        cdef int64_t now = _tick(now_ms), tick, count, taken
        cdef uint64_t word
        if n < 0:
            n = -max(n, -_COUNT_MAX)
            for tick in range(now, min(now + RING - LIVE, _int(self.newest) + 1)):
                while n:
                    word = px_word_load(self.ring + (tick & 255))
                    if not _is_of(word, tick):
                        break
                    taken = min(n, <int64_t> (word & _COUNT))
                    if taken == 0:
                        break
                    if px_word_cas(self.ring + (tick & 255), word, word - <uint64_t> taken):
                        n -= taken
            return
        while n:
            tick = self._open(now, &word)
            count = <int64_t> (word & _COUNT) if _is_of(word, tick) else 0
            if px_word_cas(self.ring + (tick & 255), word, _grown(tick, count, n)):
                return

    def total(self, int64_t now_ms):
        return self._sum(_tick(now_ms) - LIVE, _int(self.newest) + 1)

    def wait_ms(self, int64_t n, int64_t limit, int64_t now_ms):
        cdef int64_t tick, total = 0, end = _int(self.newest) + 1
        cdef int64_t first = max(_tick(now_ms) - LIVE, end - RING, 0)
        cdef int64_t counts[RING]
        cdef uint64_t word
        for tick in range(first, end):
            word = px_word_load(self.ring + (tick & 255))
            counts[tick - first] = <int64_t> (word & _COUNT) if _is_of(word, tick) else 0
            total += counts[tick - first]
        for tick in range(first, end):
            if total == 0 or n <= limit - total:
                return 0 if tick == first else (tick + LIVE) * TICK - max(now_ms, 0)
            total -= counts[tick - first]
        # Nothing is left of it, once the last tick is over.
        return 0 if first >= end else (end + LIVE) * TICK - max(now_ms, 0)
