# cython: language_level=3
"""Byte pair encoding: how many tokens of a vocabulary a piece of text has.

Owns: the table of token bytes to ranks, and merging by rank. Must not know: the pattern that cuts a text into pieces,
where the vocabulary came from, what is billed. The oracle is in ``tests/unit/dialects/bpe_twin.py``.

    data   "IQ== 0\\nIg== 1\\n..."          the .tiktoken text: base64 of a token, its rank, lines in the ranks' order
    arena  [ token 0 | token 1 | ... ]      their bytes, one behind the other
    ends   [ end of 0, end of 1, ... ]
    table  open addressing, linear probing: rank + 1 in the low 18 bits, 14 bits of the hash above; 0 is empty

Invariants
- A Vocabulary never changes after it was made, so any thread may count with it.
- Memory is what the tokens need (3.2 MB for 200,000); nothing is kept between two counts.
- A piece of n bytes costs at most 3 n heap operations, whatever it holds; more than 64 KiB are refused.
- The lowest rank is merged first, of equal ones the leftmost: the result is tiktoken's.
"""
from libc.stdint cimport int32_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy
from cpython.unicode cimport PyUnicode_AsUTF8AndSize

cdef enum:
    RANK_BITS = 18
    MAX_TOKENS = (1 << RANK_BITS) - 1
    MOST_BYTES = 65536      # of a piece
    ON_STACK = 96           # bytes of a piece whose merging needs no allocation: nearly all
    NO_MEMORY = -1
    BAD_BASE64 = -2
    BAD_RANK = -3
    DUPLICATE = -4
    TOO_MANY = -5

cdef struct Pair:           # two neighbours that make a token: [left, end) in the piece
    uint64_t key            # rank above, left below: the order of merging
    int32_t end


cdef inline int base64_value(unsigned char byte) noexcept nogil:
    if c'A' <= byte <= c'Z':
        return byte - c'A'
    if c'a' <= byte <= c'z':
        return byte - c'a' + 26
    if c'0' <= byte <= c'9':
        return byte - c'0' + 52
    if byte == c'+':
        return 62
    if byte == c'/':
        return 63
    return -1


cdef inline uint64_t hash_of(const unsigned char* text, Py_ssize_t length) noexcept nogil:
    cdef uint64_t mixed = <uint64_t> length * 0x9E3779B97F4A7C15ULL
    cdef uint64_t word
    cdef Py_ssize_t i
    while length >= 8:
        memcpy(&word, text, 8)
        mixed = (mixed ^ word) * 0xD6E8FEB86659FD93ULL
        mixed ^= mixed >> 32
        text += 8
        length -= 8
    word = 0
    for i in range(length):
        word = (word << 8) | text[i]
    mixed = (mixed ^ word) * 0xD6E8FEB86659FD93ULL
    mixed ^= mixed >> 32
    mixed *= 0xD6E8FEB86659FD93ULL
    return mixed ^ (mixed >> 32)


cdef void push(Pair* heap, Py_ssize_t* size, uint64_t key, int32_t end) noexcept nogil:
    cdef Py_ssize_t at = size[0], above
    size[0] += 1
    while at > 0:
        above = (at - 1) >> 1
        if heap[above].key <= key:
            break
        heap[at] = heap[above]
        at = above
    heap[at].key = key
    heap[at].end = end


cdef Pair pop(Pair* heap, Py_ssize_t* size) noexcept nogil:
    """Takes the smallest out of a heap that is not empty."""
    cdef Pair least = heap[0]
    cdef Pair last
    cdef Py_ssize_t at = 0, below
    size[0] -= 1
    last = heap[size[0]]
    while True:
        below = 2 * at + 1
        if below >= size[0]:
            break
        if below + 1 < size[0] and heap[below + 1].key < heap[below].key:
            below += 1
        if heap[below].key >= last.key:
            break
        heap[at] = heap[below]
        at = below
    heap[at] = last
    return least


cdef class Vocabulary:
    """The tokens of a .tiktoken file. Raises ValueError that names the line for anything else.

    Every single byte must be a token, so that every piece can be told. The GIL is not held while it is built.
    """
    cdef unsigned char* arena
    cdef uint32_t* ends
    cdef uint32_t* table
    cdef uint64_t mask
    cdef Py_ssize_t tokens
    cdef Py_ssize_t longest

    def __cinit__(self):
        self.arena = NULL
        self.ends = NULL
        self.table = NULL

    def __init__(self, bytes data not None):
        cdef const unsigned char* text = data
        cdef Py_ssize_t length = len(data)
        cdef Py_ssize_t line = 0
        cdef int trouble
        cdef int byte
        cdef unsigned char single
        if self.arena != NULL:
            raise RuntimeError("a Vocabulary is made once")
        with nogil:
            trouble = self.build(text, length, &line)
        if trouble == NO_MEMORY:
            raise MemoryError()
        if trouble == TOO_MANY:
            raise ValueError(f"a vocabulary has 1 to {MAX_TOKENS} tokens")
        if trouble:
            reason = {BAD_BASE64: "no token in base64", BAD_RANK: f"its rank is not {line}",
                      DUPLICATE: "a token that was there before"}[trouble]
            raise ValueError(f"line {line + 1} of the vocabulary: {reason}")
        for byte in range(256):
            single = byte
            if self.rank_of(&single, 1) < 0:
                raise ValueError(f"the vocabulary has no token for the byte {byte}")

    def __dealloc__(self):
        free(self.arena)
        free(self.ends)
        free(self.table)

    def __len__(self):
        return self.tokens

    cdef int build(self, const unsigned char* text, Py_ssize_t length, Py_ssize_t* line) noexcept nogil:
        """0, or what is wrong with line `line[0]`."""
        cdef const unsigned char* at = text
        cdef const unsigned char* end = text + length
        cdef Py_ssize_t lines = 0, filled = 0, start
        cdef uint64_t slots = 256
        cdef void* shrunk
        cdef int trouble
        while at < end:
            at = <const unsigned char*> memchr(at, c'\n', end - at)
            lines += 1
            if at == NULL:
                break
            at += 1
        if lines == 0 or lines > MAX_TOKENS or length > (<Py_ssize_t> 1 << 31):
            return TOO_MANY
        while <uint64_t> lines * 5 > slots * 4:
            slots *= 2
        self.arena = <unsigned char*> malloc(length)     # base64 is longer than what it tells
        self.ends = <uint32_t*> malloc(lines * sizeof(uint32_t))
        self.table = <uint32_t*> malloc(slots * sizeof(uint32_t))
        if self.arena == NULL or self.ends == NULL or self.table == NULL:
            return NO_MEMORY
        for start in range(<Py_ssize_t> slots):
            self.table[start] = 0
        self.mask = slots - 1
        at = text
        while at < end:
            start = filled
            trouble = self.take_line(&at, end, &filled, line[0])
            if trouble:
                return trouble
            self.ends[line[0]] = <uint32_t> filled
            self.longest = max(self.longest, filled - start)
            if self.rank_of(self.arena + start, filled - start) >= 0:
                return DUPLICATE
            self.enter(start, filled - start, <uint32_t> line[0])
            line[0] += 1
            self.tokens = line[0]
        shrunk = realloc(self.arena, filled)
        if shrunk != NULL:
            self.arena = <unsigned char*> shrunk
        return 0

    cdef int take_line(self, const unsigned char** cursor, const unsigned char* end, Py_ssize_t* filled,
                       Py_ssize_t line) noexcept nogil:
        """One line: its token goes behind `filled`, its rank must be `line`."""
        cdef const unsigned char* at = cursor[0]
        cdef uint32_t word = 0
        cdef int bits = 0, value, pads = 0
        cdef Py_ssize_t rank = 0, digits = 0, before = filled[0]
        while at < end:
            value = base64_value(at[0])
            if value < 0:
                break
            word = ((word << 6) | <uint32_t> value) & 0xFFFFFF
            bits += 6
            if bits >= 8:
                bits -= 8
                self.arena[filled[0]] = (word >> bits) & 0xFF
                filled[0] += 1
            at += 1
        while at < end and at[0] == c'=':
            pads += 1
            at += 1
        if filled[0] == before or at >= end or at[0] != c' ' or bits != 2 * pads or pads > 2:
            return BAD_BASE64
        at += 1
        while at < end and c'0' <= at[0] <= c'9' and digits < 7:
            rank = rank * 10 + at[0] - c'0'
            digits += 1
            at += 1
        if at < end and at[0] == c'\r':
            at += 1
        if digits == 0 or rank != line or (at < end and at[0] != c'\n'):
            return BAD_RANK
        cursor[0] = at + 1 if at < end else at
        return 0

    cdef void enter(self, Py_ssize_t start, Py_ssize_t length, uint32_t rank) noexcept nogil:
        cdef uint64_t mixed = hash_of(self.arena + start, length)
        cdef uint64_t slot = mixed & self.mask
        while self.table[slot] != 0:
            slot = (slot + 1) & self.mask
        self.table[slot] = <uint32_t> (mixed >> 50) << RANK_BITS | (rank + 1)

    cdef int32_t rank_of(self, const unsigned char* text, Py_ssize_t length) noexcept nogil:
        """The rank of a token, or -1."""
        cdef uint64_t mixed, slot
        cdef uint32_t tag, entry, rank, start
        if length > self.longest:
            return -1
        mixed = hash_of(text, length)
        slot = mixed & self.mask
        tag = <uint32_t> (mixed >> 50)
        while True:
            entry = self.table[slot]
            if entry == 0:
                return -1
            if entry >> RANK_BITS == tag:
                rank = (entry & MAX_TOKENS) - 1
                start = self.ends[rank - 1] if rank else 0
                if self.ends[rank] - start == <uint32_t> length and memcmp(self.arena + start, text, length) == 0:
                    return <int32_t> rank
            slot = (slot + 1) & self.mask

    cdef Py_ssize_t merge(self, const unsigned char* text, int32_t length, int32_t* after, int32_t* before,
                          Pair* heap) noexcept nogil:
        """Tokens of a piece that is none itself. `after[i]`: where the part that begins at i ends, -1 for no part."""
        cdef Py_ssize_t size = 0, parts = length
        cdef int32_t i, rank, left, middle, end
        cdef Pair least
        for i in range(length):
            after[i] = i + 1
            before[i] = i - 1
            if i + 1 < length:
                rank = self.rank_of(text + i, 2)
                if rank >= 0:
                    push(heap, &size, <uint64_t> rank << 32 | <uint64_t> i, i + 2)
        while size:
            least = pop(heap, &size)
            left = <int32_t> <uint32_t> least.key
            middle = after[left]
            # A pair of which one part was merged with another meanwhile; one that has the same bytes has the same rank.
            if middle < 0 or middle >= length or after[middle] != least.end:
                continue
            end = least.end
            after[left] = end
            after[middle] = -1
            parts -= 1
            if end < length:
                before[end] = left
                rank = self.rank_of(text + left, after[end] - left)
                if rank >= 0:
                    push(heap, &size, <uint64_t> rank << 32 | <uint64_t> left, after[end])
            if left > 0:
                i = before[left]
                rank = self.rank_of(text + i, end - i)
                if rank >= 0:
                    push(heap, &size, <uint64_t> rank << 32 | <uint64_t> i, end)
        return parts

    cdef Py_ssize_t tell(self, const unsigned char* text, Py_ssize_t length, list ranks) except -1:
        """The tokens of a piece; their ranks go into `ranks` unless it is None."""
        cdef int32_t small_after[ON_STACK]
        cdef int32_t small_before[ON_STACK]
        cdef Pair small_heap[3 * ON_STACK]
        cdef int32_t* after = small_after
        cdef int32_t* before = small_before
        cdef Pair* heap = small_heap
        cdef void* room = NULL
        cdef Py_ssize_t parts, i
        cdef int32_t rank
        if length == 0:
            return 0
        rank = self.rank_of(text, length)
        if rank >= 0:
            if ranks is not None:
                ranks.append(rank)
            return 1
        if length > MOST_BYTES:
            raise ValueError(f"a piece of more than {MOST_BYTES} bytes")
        if length > ON_STACK:
            room = malloc(length * (3 * sizeof(Pair) + 2 * sizeof(int32_t)))
            if room == NULL:
                raise MemoryError()
            heap = <Pair*> room
            after = <int32_t*> (heap + 3 * length)
            before = after + length
        try:
            parts = self.merge(text, <int32_t> length, after, before, heap)
            if ranks is not None:
                i = 0
                while i < length:
                    ranks.append(self.rank_of(text + i, after[i] - i))
                    i = after[i]
        finally:
            free(room)
        return parts

    def count(self, bytes piece not None):
        """Tokens of one piece of text."""
        return self.tell(piece, len(piece), None)

    def count_all(self, list pieces not None):
        """Tokens of many pieces; raises UnicodeEncodeError for half a surrogate pair."""
        cdef Py_ssize_t total = 0, length
        cdef const char* text
        for piece in pieces:
            text = PyUnicode_AsUTF8AndSize(piece, &length)
            total += self.tell(<const unsigned char*> text, length, None)
        return total

    def encode(self, bytes piece not None):
        """The ranks of one piece's tokens."""
        cdef list ranks = []
        self.tell(piece, len(piece), ranks)
        return ranks
