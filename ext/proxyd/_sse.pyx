# cython: language_level=3
"""The event stream splitter (WHATWG HTML 9.2.5, 9.2.6), compiled: whole blocks out of any cut of the bytes.

Owns: lines, fields, blocks, and the bytes of the one unfinished block.  Must not know: JSON, providers, sockets.
Twin and oracle: ``proxyd/wire/sse.py``. It is long because lines, blocks and what is held of them share one state.

    feed:   [ ....block....|..block..|:comment|..unfinished ]
              forwarded, by reference           copied into `block` until its blank line comes

Invariants
- The plain path copies nothing: what is forwarded are spans of the caller's buffer, valid until the caller's next write to it.
- At most `hold_bytes` of an unfinished block are kept from the client, at most `max_event` bytes are kept at all.
- Every byte is looked at a bounded number of times: a feed searches only its own bytes for line ends; a block of many
  data lines is joined once, when it is complete and somebody asks for it.
- Python is entered only for an event that the watch reports.
- No result depends on the cut: hold_bytes and max_event are compared with a block's bytes through the first byte of its
  blank line's end, never with what one feed happened to hold (the LF of a CRLF may come later, and changes nothing).
"""
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy
from libc.stdint cimport uint64_t
from proxyd._scan cimport Watch

FLAG_FIRST = 1
FLAG_DONE = 2
FLAG_ERROR_FIELD = 4
FLAG_OVERSIZE = 8

cdef enum:
    DIRECT = 0      # between blocks: parse in the caller's buffer
    RETAIN = 1      # inside a block that began in an earlier feed: its bytes are in `block`
    OVERSIZE = 2    # inside a block too large to keep: only its end is looked for
    OVERSIZE_COMMENT = 3    # inside a comment line between blocks that is too large to keep
    CR_NONE = 0
    CR_KEEP = 1     # the last byte was a CR that ended a forwarded line: a LF that follows is forwarded
    CR_DROP = 2     # ... of a block that was replaced: a LF that follows goes with it


cdef class Splitter:
    """Splitter(on_event, watch=None, max_event_bytes=4 MiB, hold_bytes=64 KiB).

    on_event(name, data, flags) -> None to forward the block as it came, or the bytes that take its place (b"" drops it).
    What on_event raises leaves feed(); the splitter must not be used after that. Where hold_bytes >= max_event_bytes no
    byte may pass unseen (a translation): blocks without data are dropped (an upstream's id is not the client's), and an
    event that outgrows max_event_bytes raises ValueError.
    """

    def __cinit__(self):
        self.block = NULL
        self.spent = NULL
        self.orphan = NULL
        self.spans = NULL
        self.taken.text = NULL
        self.taken.length = self.taken.room = 0

    def __init__(self, on_event, Watch watch=None, Py_ssize_t max_event_bytes=4 * 1024 * 1024,
                 Py_ssize_t hold_bytes=64 * 1024):
        self.on_event = on_event
        self.watch = watch
        self.max_event = max_event_bytes
        self.hold_bytes = hold_bytes
        self.mode = DIRECT
        self.pending_cr = CR_NONE
        self.first_line = True
        self.last_event_id = b""
        self.forget_block()

    def __dealloc__(self):
        free(self.block)
        free(self.spent)
        free(self.orphan)
        free(self.spans)
        free(self.taken.text)

    @property
    def at_boundary(self):
        return bool(self.boundary())

    @property
    def text_bytes(self):
        return self.metered

    @property
    def sample(self):
        """The first kilobyte of the metered text as it stands between the quotes; it may end in half a character."""
        return self.taken.text[:self.taken.length] if self.taken.length else b""

    def feed(self, bytes data not None):
        """The bytes that may go downstream now."""
        cdef int i
        self.consume(data, len(data))
        parts = [self.spans[i].start[:self.spans[i].length] for i in range(self.span_count)]
        self.recycle()
        return b"".join(parts)

    def finish(self):
        """The body ended: the bytes still held (WHATWG dispatches nothing for them). Sets `tail_data`."""
        cdef bytes held = b""
        if self.mode == RETAIN:
            held = self.block[self.released:self.held]
            if self.data_lines:
                self.tail_data = self.join_data(self.block, self.line_start)
        self.discard()
        if held:
            self.torn = True
        return held

    def discard(self):
        """The body broke: drops the held bytes; how many there were."""
        cdef Py_ssize_t dropped = 0
        if self.mode == RETAIN:
            dropped = self.held - self.released
        self.torn = not self.boundary()
        if self.span_count and self.orphan == NULL:
            self.orphan = self.block        # a part of it was released in this turn and is not sent yet
        else:
            free(self.block)
        self.block = NULL
        self.held = self.room = self.released = self.line_start = 0
        self.mode = DIRECT
        self.forget_block()
        return dropped

    cdef bint boundary(self) noexcept:
        return not self.torn and (self.mode == DIRECT or (self.mode == RETAIN and self.released == 0))

    cdef void recycle(self) noexcept:
        """Ends the life of the spans of the last consume()."""
        self.span_count = 0
        if self.spent != NULL:
            free(self.spent)
            self.spent = NULL
        if self.orphan != NULL:
            free(self.orphan)
            self.orphan = NULL
        self.kept = None

    cdef int emit(self, const unsigned char* start, Py_ssize_t length) except -1:
        cdef Span* grown
        cdef int room
        if length <= 0:
            return 0
        if (self.span_count and self.spans[self.span_count - 1].start + self.spans[self.span_count - 1].length == start):
            self.spans[self.span_count - 1].length += length
            return 0
        if self.span_count == self.span_room:
            room = 2 if self.span_room == 0 else self.span_room * 4
            grown = <Span*> realloc(self.spans, room * sizeof(Span))
            if grown == NULL:
                raise MemoryError()
            self.spans = grown
            self.span_room = room
        self.spans[self.span_count].start = start
        self.spans[self.span_count].length = length
        self.span_count += 1
        return 0

    cdef int retain(self, const unsigned char* start, Py_ssize_t length) except -1:
        cdef Py_ssize_t room
        cdef unsigned char* grown
        if length <= 0:
            return 0
        if self.held + length > self.room:
            room = self.room * 2
            if room < self.held + length:
                room = self.held + length
            if room < 256:
                room = 256
            grown = <unsigned char*> realloc(self.block, room)
            if grown == NULL:
                raise MemoryError()
            self.block = grown
            self.room = room
        memcpy(self.block + self.held, start, length)
        self.held += length
        return 0

    cdef void forget_block(self) noexcept:
        self.fields_seen = False
        self.data_lines = 0
        self.data_at = self.data_length = 0
        self.name_length = -1
        self.id_length = -1
        self.error_length = -1

    cdef int take_field(self, const unsigned char* base, Py_ssize_t at, Py_ssize_t end) except -1:
        """One non-empty, non-comment line [at, end) of the block that starts at `base`."""
        cdef const unsigned char* line = base + at
        cdef Py_ssize_t length = end - at
        cdef Py_ssize_t name_length
        cdef Py_ssize_t value
        cdef Py_ssize_t i
        cdef const unsigned char* colon
        self.fields_seen = True
        if length >= 5 and memcmp(line, b"data:", 5) == 0:
            name_length = 4
            value = at + 5
        else:
            colon = <const unsigned char*> memchr(line, c':', length)
            if colon == NULL:
                name_length = length
                value = end
            else:
                name_length = colon - line
                value = at + name_length + 1
        if value < end and base[value] == c' ':
            value += 1
        if name_length == 4 and memcmp(line, b"data", 4) == 0:
            if self.data_lines == 0:
                self.data_at = value
                self.data_length = end - value
            self.data_lines += 1
        elif name_length == 5 and memcmp(line, b"event", 5) == 0:
            self.name_at = value
            self.name_length = end - value
        elif name_length == 5 and memcmp(line, b"error", 5) == 0:
            self.error_at = value
            self.error_length = end - value
        elif name_length == 2 and memcmp(line, b"id", 2) == 0:
            if end == value or memchr(base + value, 0, end - value) == NULL:
                self.id_at = value
                self.id_length = end - value
        elif name_length == 5 and memcmp(line, b"retry", 5) == 0:
            if end > value:
                for i in range(value, end):
                    if not c'0' <= base[i] <= c'9':
                        break
                else:
                    if end - value <= 4000:
                        self.retry = int(base[value:end])
        return 0

    cdef object dispatch(self, const unsigned char* base, Py_ssize_t length):
        """A block is complete: asks on_event when it matters. Resets the block's state. Returns the verdict."""
        cdef const unsigned char* data = base + self.data_at
        cdef Py_ssize_t size = self.data_length
        cdef Py_ssize_t at
        cdef int flags = 0
        cdef bint report = self.watch is None
        cdef bytes joined = None
        cdef bytes name
        if self.id_length >= 0:
            self.last_event_id = base[self.id_at:self.id_at + self.id_length]
        if self.data_lines == 0 and self.error_length < 0:
            self.forget_block()
            return b"" if self.hold_bytes >= self.max_event else None
        if self.data_lines:
            if self.events == 0:
                flags |= 1
                report = True
            self.events += 1
            if self.data_lines > 1:
                joined = self.join_data(base, length)
                data = joined
                size = len(joined)
            if size >= 6 and memcmp(data, b"[DONE]", 6) == 0:
                flags |= 2
                report = True
            elif self.watch is not None:
                at = 0
                while at < size and data[at] == c' ':
                    at += 1
                if at == size or data[at] != c'{':
                    report = True
                if self.watch.scan(data, size, &self.metered, &self.taken):
                    report = True
            if self.name_length == 5 and memcmp(base + self.name_at, b"error", 5) == 0:
                report = True
        if self.error_length >= 0:
            flags |= 4
            report = True
            joined = base[self.error_at:self.error_at + self.error_length]
        if not report:
            self.forget_block()
            return None
        name = base[self.name_at:self.name_at + self.name_length] if self.name_length > 0 else b""
        if joined is None:
            joined = data[:size]
        self.forget_block()
        return self.on_event(name, joined, flags)

    cdef bytes join_data(self, const unsigned char* base, Py_ssize_t length):
        """The data lines within base[0:length], joined with LF: one pass from the first, only for blocks of several lines."""
        cdef list parts = [base[self.data_at:self.data_at + self.data_length]]
        cdef Py_ssize_t at = self.data_at + self.data_length + 1, end, value
        while at < length:
            end = at
            while end < length and base[end] != c'\n' and base[end] != c'\r':
                end += 1
            if end - at >= 4 and memcmp(base + at, b"data", 4) == 0 and (end - at == 4 or base[at + 4] == c':'):
                value = at + 5 if end - at > 4 else end
                if value < end and base[value] == c' ':
                    value += 1
                parts.append(base[value:end])
            at = end + 1
        return b"\n".join(parts)

    cdef int emit_comments(self, const unsigned char* base, Py_ssize_t length) except -1:
        """The comment lines of a block that is replaced, each with its line end."""
        cdef Py_ssize_t at = 0, end
        while at < length:
            end = at
            while end < length and base[end] != c'\n' and base[end] != c'\r':
                end += 1
            if end < length:
                end += 1
                if base[end - 1] == c'\r' and end < length and base[end] == c'\n':
                    end += 1
            if base[at] == c':':
                self.emit(base + at, end - at)
            at = end
        return 0

    cdef int consume(self, const unsigned char* text, Py_ssize_t length) except -1:
        """Parses one cut of the stream; `spans` then names what goes downstream, in order. Call recycle() after sending."""
        cdef Py_ssize_t at = 0            # where the current line starts
        cdef Py_ssize_t block_at = 0      # where the unfinished block starts (DIRECT)
        cdef Py_ssize_t span_at = 0       # first byte not yet decided about
        cdef Py_ssize_t end, after, content, skip, size
        cdef const unsigned char* lf = NULL
        cdef const unsigned char* cr
        cdef const unsigned char* limit
        cdef bint lf_known = False
        cdef object verdict
        cdef const unsigned char* line
        if length <= 0:
            return 0
        if self.mode >= OVERSIZE and self.block != NULL:
            free(self.block)
            self.block = NULL
            self.held = self.room = self.released = self.line_start = 0
        if self.pending_cr != CR_NONE:
            if text[0] == c'\n':
                at = block_at = 1
                if self.mode == RETAIN:
                    self.retain(text, 1)
                    self.line_start = self.held
                    span_at = 1
                elif self.pending_cr == CR_DROP:
                    span_at = 1
            self.pending_cr = CR_NONE
        while at < length:
            # the next line end: LF, CR or CRLF
            if not lf_known or (lf != NULL and lf < text + at):
                lf = <const unsigned char*> memchr(text + at, c'\n', length - at)
                lf_known = True
            limit = lf if lf != NULL else text + length
            cr = <const unsigned char*> memchr(text + at, c'\r', limit - (text + at))
            if cr != NULL:
                end = cr - text
                after = end + 1
                if after < length:
                    if text[after] == c'\n':
                        after += 1
                else:
                    self.pending_cr = CR_KEEP
            elif lf != NULL:
                end = lf - text
                after = end + 1
            else:
                break
            if self.mode == DIRECT:
                content = at
                size = end + 1 - block_at
                self.refuse_unseen(size)
                if self.first_line:
                    self.first_line = False
                    if end - at >= 3 and memcmp(text + at, b"\xef\xbb\xbf", 3) == 0:
                        content = at + 3
                if content == end:
                    if self.fields_seen and size > self.max_event:
                        self.report_oversize()
                    elif self.fields_seen:
                        verdict = self.dispatch(text + block_at, after - block_at)
                        if verdict is not None and size <= self.hold_bytes:
                            self.emit(text + span_at, block_at - span_at)
                            self.emit_comments(text + block_at, after - block_at)
                            self.keep(verdict)
                            span_at = after
                            if self.pending_cr:
                                self.pending_cr = CR_DROP
                    block_at = after
                elif text[content] == c':':
                    self.comments += 1
                    if not self.fields_seen:
                        block_at = after
                else:
                    self.take_field(text + block_at, content - block_at, end - block_at)
            elif self.mode == RETAIN:
                skip = self.held
                size = skip + end + 1 - at
                self.refuse_unseen(size)
                self.retain(text + at, after - at)
                span_at = after
                line = self.block
                content = self.line_start
                end = skip + end - at
                self.line_start = self.held
                if self.first_line:
                    self.first_line = False
                    if end - content >= 3 and memcmp(line + content, b"\xef\xbb\xbf", 3) == 0:
                        content += 3
                if content == end:
                    verdict = None
                    if self.fields_seen and size > self.max_event:
                        self.report_oversize()
                    elif self.fields_seen:
                        verdict = self.dispatch(line, self.held)
                    self.close_block(verdict if size <= self.hold_bytes else None)
                    block_at = after
                elif line[content] == c':':
                    self.comments += 1
                    if not self.fields_seen:
                        self.close_block(None)
                        block_at = after
                else:
                    self.take_field(line, content, end)
            elif self.mode == OVERSIZE_COMMENT:
                self.comments += 1
                self.mode = DIRECT
                block_at = after
            else:
                if end == at and self.oversize_line_empty:
                    self.mode = DIRECT
                    block_at = after
                    self.report_oversize()
                self.oversize_line_empty = True
            at = after
        # what is left is an unfinished line, maybe after finished lines of an unfinished block
        if self.mode == DIRECT:
            self.emit(text + span_at, block_at - span_at)
            if block_at < length:
                self.line_start = at - block_at
                self.retain(text + block_at, length - block_at)
                self.mode = RETAIN
                self.settle_held()
        elif self.mode == RETAIN:
            self.retain(text + at, length - at)
            self.settle_held()
        else:
            if at < length:
                self.oversize_line_empty = False
            self.emit(text + span_at, length - span_at)
        return 0

    cdef int settle_held(self) except -1:
        """Releases a block that outgrew `hold_bytes`; stops keeping one that outgrew `max_event`."""
        cdef Py_ssize_t at
        if self.released or self.held > self.hold_bytes:
            self.emit(self.block + self.released, self.held - self.released)
            self.released = self.held
        self.refuse_unseen(self.held)
        if self.held > self.max_event:
            if self.released < self.held:
                self.emit(self.block + self.released, self.held - self.released)
            self.oversize_line_empty = self.line_start == self.held
            self.mode = OVERSIZE
            if not self.fields_seen:
                at = 0
                if self.first_line and self.held > 3 and memcmp(self.block, b"\xef\xbb\xbf", 3) == 0:
                    at = 3
                if self.block[at] == c':':
                    self.mode = OVERSIZE_COMMENT
            self.first_line = False
        return 0

    cdef int refuse_unseen(self, Py_ssize_t size) except -1:
        if size > self.max_event and self.hold_bytes >= self.max_event:
            raise ValueError(f"an event of more than {self.max_event} bytes, none of which may pass unseen")
        return 0

    cdef int report_oversize(self) except -1:
        """A block that was too large to look at is complete: one event that nobody read, whatever was in it."""
        cdef int flags = 8
        if self.events == 0:
            flags |= 1
        self.events += 1
        self.forget_block()
        self.on_event(b"", b"", flags)
        return 0

    cdef int close_block(self, verdict) except -1:
        """The retained block (or comment line) is complete: its bytes or their replacement go downstream."""
        if verdict is not None and self.released == 0:
            self.emit_comments(self.block, self.held)
            self.keep(verdict)
            if self.pending_cr:
                self.pending_cr = CR_DROP
        else:
            self.emit(self.block + self.released, self.held - self.released)
        self.spent = self.block
        self.block = NULL
        self.held = self.room = self.released = self.line_start = 0
        self.mode = DIRECT
        return 0

    cdef int keep(self, verdict) except -1:
        """Sends `verdict` in the block's place; keeps the object alive until recycle()."""
        cdef bytes text = verdict
        if text:
            if self.kept is None:
                self.kept = []
            self.kept.append(text)
            self.emit(text, len(text))
        return 0
