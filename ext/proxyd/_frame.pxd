# cython: language_level=3
from libc.stdint cimport uint64_t

cdef enum:
    LENGTH = 0
    CHUNKED = 1
    CLOSE = 2
    WHOLE = 10
    BAD = 13

cdef class Unframer:
    cdef readonly int kind
    cdef int state
    cdef int digits
    cdef uint64_t left
    cdef Py_ssize_t line
    cdef Py_ssize_t extensions
    cdef readonly Py_ssize_t leftover
    cdef Py_ssize_t take(self, unsigned char* text, Py_ssize_t size, unsigned char** out) noexcept nogil
    cdef int step(self, unsigned char byte) noexcept nogil
