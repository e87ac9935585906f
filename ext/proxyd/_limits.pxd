# cython: language_level=3
"""A tenant's row and an average's word, as the ledger's table hands them out."""

from libc.stdint cimport int64_t, uint64_t
from proxyd._shm cimport px_cell_get, px_cell_set, px_word_load


cdef inline int64_t signed_word(uint64_t *p) noexcept nogil:
    return <int64_t> px_word_load(p)

cdef inline void learn(uint64_t *p, uint64_t n) noexcept nogil:
    """EWMA of 1/8. p: 0, or the average x 256, x 2, + 1. The first sample is the average. Plain loads and stores: of
    two that learn at once one is lost, which an average survives."""
    cdef int64_t old = <int64_t> px_cell_get(p)
    cdef int64_t sample = <int64_t> (min(n, 1ull << 40) << 8)
    if old:
        sample = (old >> 1) + ((sample - (old >> 1)) >> 3)
    px_cell_set(p, <uint64_t> (sample << 1 | 1))

cdef inline object average(uint64_t *p):
    cdef uint64_t word = px_cell_get(p)
    return ((word >> 1) + 128) >> 8 if word else None


cdef Py_ssize_t tenant_words(Py_ssize_t permits) noexcept nogil
cdef uint64_t permit_mark(Py_ssize_t slot, uint64_t epoch) noexcept nogil
cdef Py_ssize_t count_permits(uint64_t *row, Py_ssize_t permits) noexcept nogil
cdef Py_ssize_t free_permits(uint64_t *row, Py_ssize_t permits, Py_ssize_t slot) noexcept nogil
cdef Tenant make_tenant(object owner, Py_ssize_t number, bint is_own, uint64_t *row, Py_ssize_t permits, uint64_t mark)


cdef class Window:
    cdef object owner
    cdef uint64_t *newest
    cdef uint64_t *ring
    cdef int64_t _open(self, int64_t now, uint64_t *word) noexcept nogil
    cdef int64_t _sum(self, int64_t first, int64_t end) noexcept nogil


cdef class Tenant:
    cdef object owner
    cdef Py_ssize_t number, permits, hint
    cdef bint own
    cdef uint64_t *p
    cdef uint64_t mark, sequence
    cdef readonly Window requests
    cdef readonly Window tokens
    cdef Py_ssize_t _bound(self, uint64_t limit) noexcept nogil
