# cython: language_level=3
"""Cells of shared memory: counters, gauges, histograms and checked atomic words.

Owns the layout of one cell and of one histogram block, and the atomic operations on them. Must not know which
metric or slot a cell belongs to, nor the clock: the writer's current window arrives as a cell of its own.

Invariants: every pointer was checked once, at construction, against the length of a buffer that stays exported for
the object's life, and is 8-byte aligned. Counters, gauges and histograms have one writing process; any process
reads them. Words may be written by all.

A histogram block, in 64-bit words:

    | id=0 count sum_ns - | bucket 0 .. 529 |   since the start
    | id   count sum_ns - | bucket 0 .. 529 |   x 8: the ring of ten-second windows, at id % 8
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint64_t

HISTOGRAM_BUCKETS = PX_HIST_BUCKETS
HISTOGRAM_HEAD = PX_HIST_HEAD
HISTOGRAM_STRIDE = PX_HIST_STRIDE
HISTOGRAM_WINDOWS = PX_HIST_WINDOWS
HISTOGRAM_WORDS = PX_HIST_WORDS

# The largest double that still converts to nanoseconds below 2^63; beyond it the C conversion is undefined.
cdef double _max_seconds = 9.0e9


cdef class Cells:
    def __dealloc__(self):
        if self._held:
            PyBuffer_Release(&self._buffer)

    cdef uint64_t* _at(self, object buffer, Py_ssize_t offset, Py_ssize_t words) except NULL:
        if not self._held:
            PyObject_GetBuffer(buffer, &self._buffer, PyBUF_WRITABLE)
            self._held = True
        if offset < 0 or words < 1 or words > (self._buffer.len - offset) // 8:
            raise ValueError("cell outside the buffer")
        if (<size_t> self._buffer.buf + <size_t> offset) % 8:
            raise ValueError("cell not aligned to 8 bytes")
        return <uint64_t*> (<char*> self._buffer.buf + offset)


cdef class Counter(Cells):
    """One unsigned 64-bit count, written by one process."""

    def __cinit__(self, object buffer, Py_ssize_t offset):
        self.p = self._at(buffer, offset, 1)

    def add(self, uint64_t n=1):
        px_cell_add(self.p, n)

    @property
    def value(self):
        return px_cell_get(self.p)


cdef class Gauge(Cells):
    """One signed 64-bit level, written by one process."""

    def __cinit__(self, object buffer, Py_ssize_t offset):
        self.p = <int64_t*> self._at(buffer, offset, 1)

    def add(self, int64_t n=1):
        self.add_n(n)

    def set(self, int64_t n):
        self.set_n(n)

    @property
    def value(self):
        return <int64_t> px_cell_get(<uint64_t*> self.p)


cdef class Histogram(Cells):
    """A log-linear histogram of durations with a ring of ten-second windows, written by one process.

    `offset` is the block's, `window_offset` that of the cell with the writer's current window id.
    """

    def __cinit__(self, object buffer, Py_ssize_t offset, Py_ssize_t window_offset):
        self.p = self._at(buffer, offset, PX_HIST_WORDS)
        self.window = self._at(buffer, window_offset, 1)

    def record(self, double seconds):
        # A negative or NaN duration (a clock that stepped) counts as zero rather than as an enormous one.
        if not seconds > 0.0:
            self.record_ns(0)
        elif seconds > _max_seconds:
            self.record_ns(<uint64_t> (_max_seconds * 1e9))
        else:
            self.record_ns(<uint64_t> (seconds * 1e9))

    @property
    def count(self):
        return px_cell_get(self.p + 1)


cdef class Words(Cells):
    """Checked access to consecutive 64-bit words that several processes write. Values are modulo 2^64."""

    def __cinit__(self, object buffer, Py_ssize_t offset, Py_ssize_t count):
        self.p = self._at(buffer, offset, count)
        self.count = count

    cdef uint64_t* _word(self, Py_ssize_t index) except NULL:
        if index < 0 or index >= self.count:
            raise IndexError("word outside the range")
        return self.p + index

    def __len__(self):
        return self.count

    def load(self, Py_ssize_t index):
        return px_word_load(self._word(index))

    def store(self, Py_ssize_t index, uint64_t value):
        px_word_store(self._word(index), value)

    def add(self, Py_ssize_t index, uint64_t n):
        """The new value."""
        return px_word_add(self._word(index), n)

    def sub(self, Py_ssize_t index, uint64_t n):
        """The new value; below zero it wraps, as all values here do."""
        return px_word_sub(self._word(index), n)

    def swap(self, Py_ssize_t index, uint64_t value):
        """The value that was there before."""
        return px_word_swap(self._word(index), value)

    def compare_swap(self, Py_ssize_t index, uint64_t expected, uint64_t desired):
        """True if the word was `expected` and now is `desired`."""
        return bool(px_word_cas(self._word(index), expected, desired))


def bucket_index(uint64_t ns):
    """The bucket a duration falls in (0 .. HISTOGRAM_BUCKETS - 1)."""
    return px_hist_index(ns)


# --- sums over seats -------------------------------------------------------------------------------------------------

def sum_series(object memory, Py_ssize_t offset, Py_ssize_t stride, object indexes, object sums, object tops):
    """Adds the word at offset + i * stride to sums[indexes[i]], modulo 2^64, for each i, and keeps in tops[indexes[i]]
    the largest, signed. A negative index is passed over. `indexes` are int32, `sums` and `tops` 64 bits each."""
    cdef Py_buffer cells, index, total, top
    cdef Py_ssize_t i, count, series
    cdef int32_t k
    cdef uint64_t value
    PyObject_GetBuffer(memory, &cells, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(indexes, &index, PyBUF_SIMPLE)
        try:
            PyObject_GetBuffer(sums, &total, PyBUF_WRITABLE)
            try:
                PyObject_GetBuffer(tops, &top, PyBUF_WRITABLE)
                try:
                    count = index.len // 4
                    series = min(total.len, top.len) // 8
                    if offset < 0 or offset % 8 or stride < 8 or stride % 8 or (<size_t> cells.buf) % 8:
                        raise ValueError("series not aligned to 8 bytes")
                    if count and (count - 1 > (cells.len - 8 - offset) // stride or offset > cells.len - 8):
                        raise ValueError("series outside the buffer")
                    for i in range(count):
                        k = (<int32_t*> index.buf)[i]
                        if k < 0:
                            continue
                        if k >= series:
                            raise IndexError("series without a sum")
                        value = px_cell_get(<uint64_t*> (<char*> cells.buf + offset + i * stride))
                        (<uint64_t*> total.buf)[k] += value
                        if <int64_t> value > (<int64_t*> top.buf)[k]:
                            (<int64_t*> top.buf)[k] = <int64_t> value
                finally:
                    PyBuffer_Release(&top)
            finally:
                PyBuffer_Release(&total)
        finally:
            PyBuffer_Release(&index)
    finally:
        PyBuffer_Release(&cells)


cdef void _merge(const uint64_t *block, uint64_t *into) noexcept nogil:
    """Count, sum and buckets; a block has its id before and a spare word between."""
    cdef Py_ssize_t i
    into[0] += px_cell_get(block + 1)
    into[1] += px_cell_get(block + 2)
    for i in range(PX_HIST_BUCKETS):
        into[2 + i] += px_cell_get(block + PX_HIST_HEAD + i)


def merge_histogram(object memory, Py_ssize_t offset, uint64_t first, uint64_t last, object whole, object recent):
    """Adds the block at `offset` to `whole`, and its windows with an id from first to last to `recent`: count, sum_ns
    and buckets, 64 bits each."""
    cdef Py_buffer cells, all_of_it, part
    cdef Py_ssize_t lap
    cdef const uint64_t *block
    cdef uint64_t number
    PyObject_GetBuffer(memory, &cells, PyBUF_SIMPLE)
    try:
        PyObject_GetBuffer(whole, &all_of_it, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(recent, &part, PyBUF_WRITABLE)
            try:
                if offset < 0 or PX_HIST_WORDS > (cells.len - offset) // 8:
                    raise ValueError("histogram outside the buffer")
                if (<size_t> cells.buf + <size_t> offset) % 8:
                    raise ValueError("histogram not aligned to 8 bytes")
                if min(all_of_it.len, part.len) < 8 * (2 + PX_HIST_BUCKETS):
                    raise ValueError("no room for a histogram's sum")
                block = <uint64_t*> (<char*> cells.buf + offset)
                _merge(block, <uint64_t*> all_of_it.buf)
                for lap in range(1, 1 + PX_HIST_WINDOWS):
                    number = px_word_load(block + lap * PX_HIST_STRIDE)
                    if number and first <= number <= last:
                        _merge(block + lap * PX_HIST_STRIDE, <uint64_t*> part.buf)
            finally:
                PyBuffer_Release(&part)
        finally:
            PyBuffer_Release(&all_of_it)
    finally:
        PyBuffer_Release(&cells)
