# cython: language_level=3
"""Declarations of the shared-memory cells, so that other compiled modules write them without a Python call."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint64_t

cdef extern from *:
    """
    #include <string.h>
    #include <stdint.h>

    /* Single-writer cells: a relaxed load and store is one plain add on x86 and arm64, yet a reader in another
       process never sees half a word and the compiler never splits or repeats the access. */
    static inline void px_cell_add(uint64_t *p, uint64_t n) {
        __atomic_store_n(p, __atomic_load_n(p, __ATOMIC_RELAXED) + n, __ATOMIC_RELAXED);
    }
    static inline void px_cell_set(uint64_t *p, uint64_t n) { __atomic_store_n(p, n, __ATOMIC_RELAXED); }
    static inline uint64_t px_cell_get(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

    /* Many-writer cells (beats are read by the master, the ledger is written by all): acquire and release. */
    static inline uint64_t px_word_load(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
    static inline void px_word_store(uint64_t *p, uint64_t n) { __atomic_store_n(p, n, __ATOMIC_RELEASE); }
    static inline uint64_t px_word_add(uint64_t *p, uint64_t n) { return __atomic_add_fetch(p, n, __ATOMIC_ACQ_REL); }
    static inline uint64_t px_word_sub(uint64_t *p, uint64_t n) { return __atomic_sub_fetch(p, n, __ATOMIC_ACQ_REL); }
    static inline uint64_t px_word_swap(uint64_t *p, uint64_t n) { return __atomic_exchange_n(p, n, __ATOMIC_ACQ_REL); }
    static inline int px_word_cas(uint64_t *p, uint64_t expected, uint64_t desired) {
        return __atomic_compare_exchange_n(p, &expected, desired, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }

    /* Log-linear buckets in nanoseconds: 16 equal steps in each power of two from 2^9 to 2^42, one bucket below
       (under 512 ns) and one above (over 73 minutes). A bucket is at most 1/16 of its lower edge wide, so its
       middle is at most 1/32 = 3.1 % off. shm/metrics.py states the same edges and a test compares them. */
    #define PX_HIST_BUCKETS 530
    #define PX_HIST_FIRST 9
    #define PX_HIST_LAST 41
    #define PX_HIST_HEAD 4
    #define PX_HIST_WINDOWS 8
    #define PX_HIST_STRIDE (PX_HIST_HEAD + PX_HIST_BUCKETS)
    #define PX_HIST_WORDS (PX_HIST_STRIDE * (1 + PX_HIST_WINDOWS))

    static inline uint64_t px_hist_index(uint64_t ns) {
        int e;
        if (ns < (1ull << PX_HIST_FIRST)) return 0;
        e = 63 - __builtin_clzll(ns);
        if (e > PX_HIST_LAST) return PX_HIST_BUCKETS - 1;
        return 1 + (uint64_t)(e - PX_HIST_FIRST) * 16 + ((ns >> (e - 4)) & 15);
    }
    static inline void px_hist_into(uint64_t *block, uint64_t index, uint64_t ns) {
        px_cell_add(block + 1, 1);
        px_cell_add(block + 2, ns);
        px_cell_add(block + PX_HIST_HEAD + index, 1);
    }
    /* base: PX_HIST_WORDS words; window: the id of the writer's current ten seconds. The ring entry of an older
       lap is emptied by the first record of a new window: its id is 0 meanwhile, so no reader trusts it. */
    static inline void px_hist_record(uint64_t *base, const uint64_t *window, uint64_t ns) {
        uint64_t index = px_hist_index(ns);
        uint64_t now = px_cell_get(window);
        uint64_t *ring = base + PX_HIST_STRIDE * (1 + (now % PX_HIST_WINDOWS));
        px_hist_into(base, index, ns);
        if (ring[0] != now) {
            __atomic_store_n(ring, 0, __ATOMIC_RELEASE);
            memset(ring + 1, 0, (PX_HIST_STRIDE - 1) * sizeof(uint64_t));
            __atomic_store_n(ring, now, __ATOMIC_RELEASE);
        }
        px_hist_into(ring, index, ns);
    }
    """
    void px_cell_add(uint64_t *p, uint64_t n) noexcept nogil
    void px_cell_set(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t px_cell_get(const uint64_t *p) noexcept nogil
    uint64_t px_word_load(const uint64_t *p) noexcept nogil
    void px_word_store(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t px_word_add(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t px_word_sub(uint64_t *p, uint64_t n) noexcept nogil
    uint64_t px_word_swap(uint64_t *p, uint64_t n) noexcept nogil
    bint px_word_cas(uint64_t *p, uint64_t expected, uint64_t desired) noexcept nogil
    uint64_t px_hist_index(uint64_t ns) noexcept nogil
    void px_hist_record(uint64_t *base, const uint64_t *window, uint64_t ns) noexcept nogil
    const int PX_HIST_BUCKETS
    const int PX_HIST_HEAD
    const int PX_HIST_STRIDE
    const int PX_HIST_WINDOWS
    const int PX_HIST_WORDS


cdef class Cells:
    """Holds a writable buffer exported, so that the memory a subclass points into cannot be unmapped under it."""
    cdef Py_buffer _buffer
    cdef bint _held
    cdef uint64_t* _at(self, object buffer, Py_ssize_t offset, Py_ssize_t words) except NULL


cdef class Counter(Cells):
    cdef uint64_t* p
    cdef inline void add_n(self, uint64_t n) noexcept nogil:
        px_cell_add(self.p, n)


cdef class Gauge(Cells):
    cdef int64_t* p
    cdef inline void add_n(self, int64_t n) noexcept nogil:
        px_cell_add(<uint64_t*> self.p, <uint64_t> n)
    cdef inline void set_n(self, int64_t n) noexcept nogil:
        px_cell_set(<uint64_t*> self.p, <uint64_t> n)


cdef class Histogram(Cells):
    cdef uint64_t* p
    cdef uint64_t* window
    cdef inline void record_ns(self, uint64_t ns) noexcept nogil:
        px_hist_record(self.p, self.window, ns)


cdef class Words(Cells):
    cdef uint64_t* p
    cdef Py_ssize_t count
    cdef uint64_t* _word(self, Py_ssize_t index) except NULL
