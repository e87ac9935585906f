# cython: language_level=3
from libc.stdint cimport uint64_t

cdef enum:
    MAX_KEYS = 48

cdef struct Key:
    const unsigned char* text
    Py_ssize_t length
    int kind

cdef class Watch:
    cdef readonly tuple report_keys
    cdef readonly tuple type_values
    cdef readonly tuple meter_keys
    cdef Key keys[MAX_KEYS]
    cdef int key_count
    cdef uint64_t key_lengths
    cdef Key values[MAX_KEYS]
    cdef int value_count
    cdef bint scan(self, const unsigned char* text, Py_ssize_t length, uint64_t* text_bytes) noexcept nogil
    cdef add_key(self, bytes key, int kind)
