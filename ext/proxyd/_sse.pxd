# cython: language_level=3
from libc.stdint cimport uint64_t
from proxyd._scan cimport Sample, Watch

cdef struct Span:
    const unsigned char* start
    Py_ssize_t length

cdef class Splitter:
    cdef object on_event
    cdef readonly Watch watch
    cdef Py_ssize_t max_event
    cdef Py_ssize_t hold_bytes
    # the unfinished block: raw bytes [0, held), of which [0, released) went downstream already
    cdef unsigned char* block
    cdef Py_ssize_t held
    cdef Py_ssize_t room
    cdef Py_ssize_t released
    cdef Py_ssize_t line_start
    # blocks whose bytes the spans may still point into, freed by recycle(): one that became complete, and one that was
    # cut off by finish() or discard() in the same turn
    cdef unsigned char* spent
    cdef unsigned char* orphan
    cdef list kept
    cdef Span* spans
    cdef int span_count
    cdef int span_room
    # parser state
    cdef int mode
    cdef int pending_cr
    cdef bint first_line
    cdef bint fields_seen
    cdef bint oversize_line_empty
    cdef bint torn              # the stream ended inside a unit of which bytes went downstream
    cdef Py_ssize_t data_at, data_length, data_lines
    cdef Py_ssize_t name_at, name_length
    cdef Py_ssize_t id_at, id_length
    cdef Py_ssize_t error_at, error_length
    # results
    cdef readonly uint64_t events
    cdef readonly uint64_t comments
    cdef uint64_t metered
    cdef Sample taken           # of the metered text
    cdef readonly bytes last_event_id
    cdef readonly object retry
    cdef readonly bytes tail_data

    cdef int consume(self, const unsigned char* text, Py_ssize_t length) except -1
    cdef void recycle(self) noexcept
    cdef bint boundary(self) noexcept
    cdef int emit(self, const unsigned char* start, Py_ssize_t length) except -1
    cdef int retain(self, const unsigned char* start, Py_ssize_t length) except -1
    cdef int take_field(self, const unsigned char* base, Py_ssize_t at, Py_ssize_t end) except -1
    cdef void forget_block(self) noexcept
    cdef object dispatch(self, const unsigned char* base, Py_ssize_t length)
    cdef bytes join_data(self, const unsigned char* base, Py_ssize_t length)
    cdef int emit_comments(self, const unsigned char* base, Py_ssize_t length) except -1
    cdef int settle_held(self) except -1
    cdef int refuse_unseen(self, Py_ssize_t size) except -1
    cdef int report_oversize(self) except -1
    cdef int close_block(self, verdict) except -1
    cdef int keep(self, verdict) except -1
