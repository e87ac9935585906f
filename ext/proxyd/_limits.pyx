# cython: language_level=3
"""A tenant's limits: what it did in the last 60 s, and the permits of what it has under way, for all processes at once.

Owns the layout of a tenant's row and its atomic steps. Must not know the table that the row is in, the tenant's name,
its limits or the clock: the limits and the time are arguments.

    | newest of requests | of tokens | high | ...       a cache line
    | average tokens | average ms | ...                 a cache line
    | ring of requests: 256 | ring of tokens: 256 |     class Window
    | permit 0 | 1 | ...    0: free, or slot + 1: 13 bits | epoch: 8 | sequence: 11 | start second: 32

Every word is written by every process, the averages with plain stores (a lost sample is a lost sample), all others by
CAS alone. Invariants: no lock, so a process may die between any two instructions and no other waits for it. A loop
ends after a number of words known beforehand, or repeats because another process's CAS succeeded. `owner` keeps the
memory mapped; the pointers were checked by the table.
"""

from libc.stdint cimport int64_t, uint64_t
from proxyd._shm cimport px_word_cas, px_word_load

cdef enum:
    NEWEST_REQUESTS = 0
    NEWEST_TOKENS = 1
    HIGH = 2  # one more than the largest permit ever taken: nobody looks at the pages beyond
    AVERAGE_TOKENS = 8
    AVERAGE_MS = 9
    HEAD = 16
    RING = 256
    PERMITS = HEAD + 2 * RING

    TICK = 250
    LIVE = 240  # ticks before the current one that count: 60 s and the part of a tick
    WALK = 65_536  # words that a refusal may cost while permits change hands: 50 us

TICK_MS = TICK
WINDOW_TICKS = LIVE + 1
PERMITS_MAX = 131_072  # a megabyte a tenant; a node has no descriptors for as many streams

cdef uint64_t _CLOSED = 1ull << 39
cdef uint64_t _COUNT = (1ull << 39) - 1
cdef int64_t _COUNT_MAX = <int64_t> ((1ull << 39) - 1)
cdef uint64_t _LAPS = (1 << 24) - 1


# --- sixty seconds ---------------------------------------------------------------------------------------------------

cdef Window _window(object owner, uint64_t *newest, uint64_t *ring):
    cdef Window one = Window.__new__(Window)
    one.owner = owner
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

    Exact. Say P took its sum while tick v was newest, and its CAS succeeded. Then v's word was still the one that P
    had read before, and open. So nothing was added in between: not to v, or the word would differ; not to a newer tick,
    for v is closed before there is one; not to an older one, they are closed. Those only shrink (what is given back).
    What P saw was the sum, or more. A caller whose clock reading is behind `newest` adds there too, and counts all from
    its own 60 s on. Hence:
      - any 60 s of `now_ms` hold at most `limit` of what try_add let in, unless one request was larger than `limit`;
      - what is refused would not have fitted with what was added in the 60.25 s before `now_ms`.
    The hole that is left: a caller that was stopped for more than 3.75 s between its clock and this call finds the end
    of its own 60 s overwritten, and counts the last 64 s of the others instead.

    A kill between a CAS and what it was for leaves an addition that nobody gives back: it is gone after 60.25 s. One
    between closing a tick and moving `newest`: the next caller, whatever its clock, moves it on by one.
    """

    cdef int64_t _open(self, int64_t now, uint64_t *word) noexcept nogil:
        """The tick that takes additions at `now` or later, and its word: open, or of an older lap."""
        cdef int64_t tick
        cdef uint64_t found
        cdef bint is_own
        while True:
            tick = signed_word(self.newest)
            found = px_word_load(self.ring + (tick & 255))
            is_own = _is_of(found, tick)
            if not is_own and signed_word(self.newest) != tick:
                continue  # we slept between the two loads, for a minute it may be: this could be a newer lap's word
            if not (is_own and found & _CLOSED):
                if now <= tick:
                    word[0] = found
                    return tick
                if not px_word_cas(self.ring + (tick & 255), found, (found if is_own else _lap(tick) << 40) | _CLOSED):
                    continue
            # If it fails, another has moved it on. A tick closed by one who died before this line moves on here, too.
            px_word_cas(self.newest, <uint64_t> tick, <uint64_t> (now if now > tick else tick + 1))

    cdef int64_t _sum(self, int64_t first, int64_t end) noexcept nogil:
        """Of ticks first .. end - 1, which are 256 at most."""
        cdef int64_t tick, total = 0
        cdef uint64_t word
        for tick in range(max(first, 0), end):
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
            total = count + self._sum(max(now - LIVE, tick - RING + 1), tick)
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
            tick = max(now, signed_word(self.newest) - RING + 1)
            # `newest` anew each time: what one gives back may be another's, whose own went to a tick that is newer still.
            while n and tick <= min(now + RING - LIVE - 1, signed_word(self.newest)):
                word = px_word_load(self.ring + (tick & 255))
                taken = min(n, <int64_t> (word & _COUNT)) if _is_of(word, tick) else 0
                if taken == 0:
                    tick += 1
                elif px_word_cas(self.ring + (tick & 255), word, word - <uint64_t> taken):
                    n -= taken
            return
        while n:
            tick = self._open(now, &word)
            count = <int64_t> (word & _COUNT) if _is_of(word, tick) else 0
            if px_word_cas(self.ring + (tick & 255), word, _grown(tick, count, n)):
                return

    def total(self, int64_t now_ms):
        cdef int64_t end = signed_word(self.newest) + 1
        return self._sum(max(_tick(now_ms) - LIVE, end - RING), end)

    def wait_ms(self, int64_t n, int64_t limit, int64_t now_ms):
        cdef int64_t tick, total = 0, end = signed_word(self.newest) + 1
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


# --- permits ---------------------------------------------------------------------------------------------------------

cdef Py_ssize_t tenant_words(Py_ssize_t permits) noexcept nogil:
    return (PERMITS + permits + 7) & ~7

cdef uint64_t permit_mark(Py_ssize_t slot, uint64_t epoch) noexcept nogil:
    return (<uint64_t> slot + 1) << 51 | (epoch & 0xFF) << 43

cdef Py_ssize_t count_permits(uint64_t *row, Py_ssize_t permits) noexcept nogil:
    """Those taken."""
    cdef Py_ssize_t i, n = 0
    for i in range(min(permits, <Py_ssize_t> px_word_load(row + HIGH))):
        n += px_word_load(row + PERMITS + i) != 0
    return n

cdef Py_ssize_t free_permits(uint64_t *row, Py_ssize_t permits, Py_ssize_t slot) noexcept nogil:
    """Frees the slot's, whatever the epoch, and counts them."""
    cdef Py_ssize_t i, n = 0
    cdef uint64_t word
    for i in range(min(permits, <Py_ssize_t> px_word_load(row + HIGH))):
        word = px_word_load(row + PERMITS + i)
        if word >> 51 == <uint64_t> slot + 1 and px_word_cas(row + PERMITS + i, word, 0):
            n += 1
    return n

cdef Tenant make_tenant(object owner, Py_ssize_t number, bint is_own, uint64_t *row, Py_ssize_t permits, uint64_t mark):
    cdef Tenant one = Tenant.__new__(Tenant)
    one.owner = owner
    one.number = number
    one.own = is_own
    one.p = row
    one.permits = permits
    one.mark = mark
    one.requests = _window(owner, row + NEWEST_REQUESTS, row + HEAD)
    one.tokens = _window(owner, row + NEWEST_TOKENS, row + HEAD + RING)
    return one


cdef class Tenant:
    """One tenant's row, seen from one process."""

    @property
    def row(self):
        return self.number

    @property
    def is_own(self):
        return self.own

    cdef Py_ssize_t _bound(self, uint64_t limit) noexcept nogil:
        return self.permits if limit > <uint64_t> self.permits else <Py_ssize_t> limit

    def acquire(self, uint64_t limit, uint64_t now_s):
        """Walks all of them, from the lowest that this process has not seen taken, and round, so it meets a permit that
        is free all along. What is given back moves that hint down: low ones fill first, and the rest of the table stays
        untouched. `high` grows before a permit is taken: who reclaims up to it misses none.

        One walk is no proof that all were taken: a permit may come free behind it and another go before it. -1 comes
        after two walks that saw the same words, none free: all were taken at the instant between them (one given
        back and taken again has another sequence). While permits change hands it walks again: WALK words, or 8 walks.
        """
        cdef Py_ssize_t i, at, bound = self._bound(limit), walked = 0
        cdef uint64_t *permits = self.p + PERMITS
        cdef uint64_t word, high, seen, before = 0
        cdef bint is_full, was_full = False
        if bound == 0:
            return -1
        self.sequence = self.sequence + 1 & 0x7FF  # the same process's next permit is another word
        at = self.hint if self.hint < bound else 0
        while True:
            seen = 0
            is_full = True
            for i in range(bound):
                word = px_word_load(permits + at)
                if not word:
                    high = px_word_load(self.p + HIGH)
                    while high <= <uint64_t> at and not px_word_cas(self.p + HIGH, high, <uint64_t> at + 1):
                        high = px_word_load(self.p + HIGH)  # it only grows: at most `bound` times
                    if px_word_cas(permits + at, 0, self.mark | self.sequence << 32 | (now_s & 0xFFFFFFFF)):
                        self.hint = at + 1
                        return at
                    is_full = False
                seen += word * (<uint64_t> at * 0x9E3779B97F4A7C15ull | 1)
                at += 1
                if at == bound:
                    at = 0
            walked += bound
            if was_full and is_full and seen == before or walked >= max(8 * bound, <Py_ssize_t> WALK):
                return -1
            was_full, before = is_full, seen

    def release(self, Py_ssize_t permit):
        cdef uint64_t word
        if permit < 0 or permit >= self.permits:
            raise IndexError("ledger: no such permit")
        word = px_word_load(self.p + PERMITS + permit)
        if word >> 43 == self.mark >> 43 and px_word_cas(self.p + PERMITS + permit, word, 0) and permit < self.hint:
            self.hint = permit

    def in_use(self, uint64_t limit):
        return count_permits(self.p, self._bound(limit))

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
        return average(self.p + AVERAGE_TOKENS)

    def learn_tokens(self, uint64_t n):
        learn(self.p + AVERAGE_TOKENS, n)

    @property
    def average_ms(self):
        return average(self.p + AVERAGE_MS)

    def learn_ms(self, uint64_t n):
        learn(self.p + AVERAGE_MS, n)
