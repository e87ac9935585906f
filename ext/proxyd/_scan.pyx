# cython: language_level=3
"""Lexical look at JSON text: which keys an event has, and where an object's members lie.

Owns: walking the string tokens of bytes.  Must not know: what a key means, JSON values, providers.
It is no JSON parser: what it reports is then read by one (orjson), and what it cuts was validated by one.
Every pointer stays inside [text, text + length); any input, valid or not, ends in one pass.
The pure twin is ``proxyd/wire/scan.py``; both must agree on every input.
Cost: about 0.2 us for a 250-byte chunk of a chat completion.
"""
from libc.stdlib cimport free, realloc
from libc.string cimport memchr, memcmp, memcpy
from libc.stdint cimport uint64_t
from cpython.bytearray cimport PyByteArray_AS_STRING

cdef enum:
    REPORT = 1
    METER = 2
    TYPED = 4


cdef inline const unsigned char* string_end(const unsigned char* start, const unsigned char* end) noexcept nogil:
    """The closing quote of the string whose first inner byte is `start`, or NULL. Linear: a backslash run is counted once."""
    cdef const unsigned char* quote = start
    cdef const unsigned char* back
    while True:
        if quote >= end:
            return NULL
        quote = <const unsigned char*> memchr(quote, c'"', end - quote)
        if quote == NULL:
            return NULL
        back = quote
        while back > start and (back - 1)[0] == c'\\':
            back -= 1
        if ((quote - back) & 1) == 0:
            return quote
        quote += 1


cdef inline bint is_space(unsigned char byte) noexcept nogil:
    return byte == c' ' or byte == c'\t' or byte == c'\n' or byte == c'\r'


cdef inline const unsigned char* skip_space(const unsigned char* at, const unsigned char* end) noexcept nogil:
    while at < end and is_space(at[0]):
        at += 1
    return at


cdef inline int hex_digit(unsigned char byte) noexcept nogil:
    if c'0' <= byte <= c'9':
        return byte - c'0'
    byte |= 0x20
    if c'a' <= byte <= c'f':
        return byte - c'a' + 10
    return -1


cdef uint64_t unescaped_length(const unsigned char* start, const unsigned char* end) noexcept nogil:
    """UTF-8 bytes of a JSON string's text once unescaped (a half of a surrogate pair counts 2, so a pair counts 4)."""
    cdef uint64_t total = 0
    cdef const unsigned char* slash
    cdef int code, i, digit
    while start < end:
        slash = <const unsigned char*> memchr(start, c'\\', end - start)
        if slash == NULL:
            total += <uint64_t> (end - start)
            break
        total += <uint64_t> (slash - start)
        if end - slash >= 6 and slash[1] == c'u':
            code = 0
            for i in range(2, 6):
                digit = hex_digit(slash[i])
                if digit < 0:
                    code = -1
                    break
                code = code * 16 + digit
            if code >= 0:
                if code < 0x80:
                    total += 1
                elif code < 0x800 or 0xD800 <= code <= 0xDFFF:
                    total += 2
                else:
                    total += 3
                start = slash + 6
                continue
        total += 1
        start = slash + 2
    return total


cdef void take_sample(Sample* sample, const unsigned char* start, Py_ssize_t length) noexcept nogil:
    """Adds as much of [start, start + length) as there is room for; without memory nothing."""
    cdef Py_ssize_t room
    cdef void* grown
    if length > SAMPLE_BYTES - sample.length:
        length = SAMPLE_BYTES - sample.length
    if sample.length + length > sample.room:
        room = max(64, sample.room * 2)
        while room < sample.length + length:
            room *= 2
        grown = realloc(sample.text, room)
        if grown == NULL:
            return
        sample.text = <unsigned char*> grown
        sample.room = room
    if length > 0:
        memcpy(sample.text + sample.length, start, length)
        sample.length += length


cdef class Watch:
    """What to look for in an event: keys to report, values of `type`/`object` to report, keys whose text is measured.

    At most 46 keys and 48 type values; more raise ValueError. Immutable; shared by every stream of a dialect.
    """

    def __init__(self, report_keys=(), type_values=(), meter_keys=()):
        self.report_keys = tuple(report_keys)
        self.type_values = tuple(type_values)
        self.meter_keys = tuple(meter_keys)
        if len(self.report_keys) + len(self.meter_keys) > MAX_KEYS - 2 or len(self.type_values) > MAX_KEYS:
            raise ValueError(f"a Watch holds at most {MAX_KEYS - 2} keys and {MAX_KEYS} type values")
        self.key_count = 0
        self.key_lengths = 0
        for key in self.report_keys:
            self.add_key(key, REPORT)
        for key in self.meter_keys:
            self.add_key(key, METER)
        self.value_count = 0
        for value in self.type_values:
            self.values[self.value_count].text = value
            self.values[self.value_count].length = len(value)
            self.value_count += 1
        if self.value_count:
            for key in TYPE_KEYS:
                self.add_key(key, TYPED)

    cdef add_key(self, bytes key, int kind):
        cdef int i
        if not 0 < len(key) < 64:
            raise ValueError("a watched key has 1 to 63 bytes")
        for i in range(self.key_count):
            if self.keys[i].length == len(key) and memcmp(self.keys[i].text, <const char*> key, len(key)) == 0:
                self.keys[i].kind |= kind
                return
        self.keys[self.key_count].text = key
        self.keys[self.key_count].length = len(key)
        self.keys[self.key_count].kind = kind
        self.key_lengths |= (<uint64_t> 1) << len(key)
        self.key_count += 1

    cdef bint scan(self, const unsigned char* text, Py_ssize_t length, uint64_t* text_bytes, Sample* sample) noexcept nogil:
        """True when the event must be reported; adds metered text to `text_bytes[0]`, and to `sample` while there is room
        (NULL: none is wanted). One pass; nothing is allocated once the sample is full."""
        cdef const unsigned char* at = text
        cdef const unsigned char* end = text + length
        cdef const unsigned char* start
        cdef const unsigned char* close
        cdef const unsigned char* value
        cdef const unsigned char* value_end
        cdef Py_ssize_t size
        cdef int i, j, kind
        cdef bint report = False
        while at < end:
            start = <const unsigned char*> memchr(at, c'"', end - at)
            if start == NULL:
                break
            start += 1
            close = string_end(start, end)
            if close == NULL:
                break
            at = close + 1
            size = close - start
            if size > 63 or size == 0:
                continue
            if not (self.key_lengths >> size) & 1:
                continue
            value = skip_space(at, end)
            if value >= end or value[0] != c':':
                continue
            for i in range(self.key_count):
                if self.keys[i].length == size and memcmp(self.keys[i].text, start, size) == 0:
                    break
            else:
                continue
            kind = self.keys[i].kind
            value = skip_space(value + 1, end)
            if kind & REPORT and not (end - value >= 4 and memcmp(value, b"null", 4) == 0):
                report = True
            if kind & (METER | TYPED) and value < end and value[0] == c'"':
                value_end = string_end(value + 1, end)
                if value_end == NULL:
                    break
                if kind & METER:
                    text_bytes[0] += unescaped_length(value + 1, value_end)
                    if sample != NULL and sample.length < SAMPLE_BYTES:
                        take_sample(sample, value + 1, value_end - value - 1)
                if kind & TYPED:
                    for j in range(self.value_count):
                        if (self.values[j].length == value_end - value - 1
                                and memcmp(self.values[j].text, value + 1, value_end - value - 1) == 0):
                            report = True
                            break
                at = value_end + 1
        return report


TYPE_KEYS = (b"type", b"object")


def scan(Watch watch not None, bytes data not None):
    """(report, text_bytes) of one event's data; see ``wire/scan.py`` for the rules."""
    cdef uint64_t text_bytes = 0
    cdef bint report = watch.scan(data, len(data), &text_bytes, NULL)
    return bool(report), text_bytes


def sample(Watch watch not None, bytes data not None):
    """The first kilobyte of the text that scan() meters, as it stands between the quotes; it may end in half a character."""
    cdef uint64_t text_bytes = 0
    cdef Sample found
    found.text = NULL
    found.length = found.room = 0
    watch.scan(data, len(data), &text_bytes, &found)
    try:
        return found.text[:found.length] if found.length else b""
    finally:
        free(found.text)


def members(bytes data not None, Py_ssize_t most=1001):
    """At most `most` spans (key_start, key_end, value_start, value_end) of a validated JSON object's own members, in order.

    The key's span leaves out its quotes; the value's is its exact text. Not an object: []. On text that is not valid
    JSON the spans mean nothing, yet lie inside the data.
    """
    cdef const unsigned char* base = data
    cdef const unsigned char* end = base + len(data)
    cdef const unsigned char* at = skip_space(base, end)
    cdef const unsigned char* key_start
    cdef const unsigned char* key_end
    cdef const unsigned char* value_start
    cdef const unsigned char* value_end
    cdef Py_ssize_t depth
    cdef list found = []
    if at >= end or at[0] != c'{':
        return found
    at += 1
    while True:
        at = skip_space(at, end)
        if at >= end or at[0] != c'"':
            return found
        key_start = at + 1
        key_end = string_end(key_start, end)
        if key_end == NULL:
            return found
        at = skip_space(key_end + 1, end)
        if at >= end or at[0] != c':':
            return found
        value_start = skip_space(at + 1, end)
        at = value_start
        depth = 0
        while at < end:
            if at[0] == c'"':
                at = string_end(at + 1, end)
                if at == NULL:
                    return found
            elif at[0] == c'{' or at[0] == c'[':
                depth += 1
            elif at[0] == c'}' or at[0] == c']':
                if depth == 0:
                    break
                depth -= 1
            elif at[0] == c',' and depth == 0:
                break
            at += 1
        value_end = at
        while value_end > value_start and is_space((value_end - 1)[0]):
            value_end -= 1
        if len(found) == most:
            return found
        found.append((key_start - base, key_end - base, value_start - base, value_end - base))
        if at >= end or at[0] != c',':
            return found
        at += 1


def structure(bytes data not None, Py_ssize_t most):
    """What it costs to parse `data`, in units of some 40 ns: a list or object 5, a colon 2, a string or comma 1.

    Counting ends once the sum is above `most`; an unterminated string ends it too.
    """
    cdef const unsigned char* at = data
    cdef const unsigned char* end = at + len(data)
    cdef Py_ssize_t total = 0
    cdef unsigned char byte
    while at < end and total <= most:
        byte = at[0]
        at += 1
        if byte == c'"':
            total += 1
            at = string_end(at, end)
            if at == NULL:
                break
            at += 1
        elif byte == c',':
            total += 1
        elif byte == c':':
            total += 2
        elif byte == c'[' or byte == c'{':
            total += 5
    return total


cdef int escaped_code(const unsigned char* at, const unsigned char* end) noexcept nogil:
    """The code of the `\\uXXXX` at `at`, or -1 where none stands."""
    cdef int code = 0, i, digit
    if end - at < 6 or at[0] != c'\\' or at[1] != c'u':
        return -1
    for i in range(2, 6):
        digit = hex_digit(at[i])
        if digit < 0:
            return -1
        code = code * 16 + digit
    return code


def mend(bytes data not None):
    """`data` with `\\ufffd` in place of every escaped half of a surrogate pair; the identical object without any."""
    cdef const unsigned char* base = data
    cdef const unsigned char* end = base + len(data)
    cdef const unsigned char* at = base
    cdef int code, low
    cdef bytearray out = None
    cdef unsigned char* view = NULL
    while True:
        at = <const unsigned char*> memchr(at, c'\\', end - at) if at < end else NULL
        if at == NULL:
            break
        code = escaped_code(at, end)
        if 0xD800 <= code <= 0xDBFF:
            low = escaped_code(at + 6, end)
            if 0xDC00 <= low <= 0xDFFF:
                at += 12
                continue
        if 0xD800 <= code <= 0xDFFF:
            if out is None:
                out = bytearray(data)
                view = <unsigned char*> PyByteArray_AS_STRING(out)
            view[at - base + 2] = c'f'
            view[at - base + 3] = c'f'
            view[at - base + 4] = c'f'
            view[at - base + 5] = c'd'
        at += 6 if code >= 0 else 2
    return data if out is None else bytes(out)
