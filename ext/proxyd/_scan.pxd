# cython: language_level=3
from libc.stdint cimport uint64_t

cdef enum:
    MAX_KEYS = 48
    SAMPLE_BYTES = 1024

cdef struct Sample:             # the first SAMPLE_BYTES of metered text as it stands between the quotes, one behind the other
    unsigned char* text         # NULL until there is any; whoever has the Sample frees it
    Py_ssize_t length
    Py_ssize_t room

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
    cdef bint scan(self, const unsigned char* text, Py_ssize_t length, uint64_t* text_bytes, Sample* sample) noexcept nogil
    cdef add_key(self, bytes key, int kind)
