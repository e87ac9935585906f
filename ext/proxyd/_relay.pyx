# cython: language_level=3
"""The hot exchange: bytes of one answer from an upstream descriptor to a client descriptor, one recv and one send a turn.

Owns: readiness of both descriptors while a body streams, un-framing and re-framing, what the client has not taken yet.
Must not know: routes, providers, tokens, policy, logs. What happens to the stream is told to one owner object:

    owner.on_first()                  the first event (or, without a splitter, the first byte) was relayed
    owner.on_tap(payload)             every piece of payload, only when `tap` was asked for
    owner.on_mark()                   the splitter metered MARK_BYTES more text: time for a checkpoint; or as much as
                                      mark_after() said, then at the very event that reached it
    owner.on_complete(leftover, held) the upstream's framing says the body is whole; `held` is the unfinished last block
                                      -> bytes to send before the end mark (`held` itself, or what takes its place)
    owner.on_broken(error, detail)    the upstream failed (errno or 0) -> bytes to append, the end mark is NOT written;
                                      None: nothing is missing but the end mark, which is written
    owner.on_client_gone(errno)       the client closed or reset
    owner.on_drained()                everything, end mark included, was handed to the kernel
    owner.on_failure(exception)       our own bug, or a callback raised: the owner closes both sides

    upstream fd --recv--> | 32 | scratch: turn_bytes ... | 16 |  --send--> client fd
                           ^ room for our chunk header    ^ room for CRLF, and 0 CRLF CRLF
    what send() did not take -> `pending` (malloc, only while there is some), drained when the client is writable

Readiness comes from an epoll set of our own, which the loop watches as one descriptor. Two reasons. libuv ends a poll
handle for good at the first EPOLLERR, after one last callback: a reset that comes together with data would be read as
data and then never heard of again. And a loop callback costs a Python call and a context switch of contextvars per event,
which here is a pointer in C.

Invariants: at most one recv per readiness, and one send but where a limit is in reach; at most `buffer_bytes` pending, then the upstream is not read;
spans of the splitter live until the end of the turn that made them; a closed exchange is in no epoll set, and lives until
the batch of events that may still name it is over.
It is long because a turn crosses all of it, and C compilers do not inline across modules.
The clock is read for one turn in sixteen, only to measure (proxyd_relay_lag_seconds); nothing is decided by it.
"""
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EAGAIN, ECONNRESET, EINTR, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memmove
from posix.types cimport off_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from proxyd._frame cimport BAD, WHOLE, Unframer
from proxyd._shm cimport Counter, Histogram
from proxyd._sse cimport Span, Splitter

import ssl

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

cdef extern from "<sys/socket.h>" nogil:
    struct msghdr:
        iovec* msg_iov
        size_t msg_iovlen
    ssize_t recv(int fd, void* buf, size_t size, int flags)
    ssize_t send(int fd, const void* buf, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr* message, int flags)
    int MSG_DONTWAIT
    int MSG_NOSIGNAL

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data_t:
        void* ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epfd, int op, int fd, epoll_event* event)
    int epoll_wait(int epfd, epoll_event* events, int most, int timeout)
    int EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD
    uint32_t EPOLLIN, EPOLLOUT, EPOLLRDHUP, EPOLLERR, EPOLLHUP

cdef extern from "<unistd.h>" nogil:
    int close(int fd)

cdef extern from *:
    """
    #include <limits.h>
    #include <string.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    static inline void px_message(struct msghdr *m, struct iovec *iov, size_t n) {
        memset(m, 0, sizeof *m); m->msg_iov = iov; m->msg_iovlen = n > IOV_MAX ? IOV_MAX : n;
    }
    """
    void px_message(msghdr* message, iovec* vectors, size_t count) noexcept nogil

cdef enum:
    HEADROOM = 32           # longest chunk header is 16 hex digits + CRLF
    TAILROOM = 16           # CRLF "0" CRLF CRLF
    MARK_BYTES = 1024       # 256 tokens at four bytes each
    LENGTH = 0
    CHUNKED = 1
    CLOSE = 2
    # phases of an exchange
    UPSTREAM = 0
    CLIENT = 1
    BATCH = 128             # events of one turn of the loop; more would keep accepting and timers waiting
    RUNNING = 0
    ENDING = 1              # nothing more will be read; pending bytes still leave
    CLOSED = 2



cdef struct Interest:
    void* exchange
    int side
    int fd
    uint32_t events


cdef class Engine:
    """What all exchanges of a worker share: the scratch buffer, the epoll set, counters, the coarse time.

    turn_bytes: the most one exchange reads before the others get their turn. buffer_bytes: the most one exchange keeps
    for a client that does not read. `now_ms` is written by the worker's tick; exchanges stamp their last activity with it.
    """
    cdef unsigned char* scratch
    cdef readonly Py_ssize_t turn_bytes
    cdef readonly Py_ssize_t buffer_bytes
    cdef Py_ssize_t high_mark
    cdef iovec* vectors
    cdef int vector_room
    cdef object loop, call_soon
    cdef int epfd
    cdef bint dispatching
    cdef list ended
    cdef object view
    cdef Counter events
    cdef Counter sent_bytes
    cdef Counter stalls
    cdef Histogram lag
    cdef unsigned int turns
    cdef public uint64_t now_ms

    def __cinit__(self):
        self.scratch = NULL
        self.vectors = NULL
        self.epfd = -1

    def __init__(self, loop, Py_ssize_t turn_bytes, Py_ssize_t buffer_bytes, Counter events not None,
                 Counter sent_bytes not None, Counter stalls not None, Histogram lag not None):
        if turn_bytes < 1 or buffer_bytes < 1:
            raise ValueError("turn_bytes and buffer_bytes must be positive")
        self.turn_bytes = min(turn_bytes, buffer_bytes)
        self.buffer_bytes = buffer_bytes
        self.high_mark = buffer_bytes - self.turn_bytes
        self.scratch = <unsigned char*> malloc(HEADROOM + self.turn_bytes + TAILROOM)
        self.vector_room = 64
        self.vectors = <iovec*> malloc(self.vector_room * sizeof(iovec))
        if self.scratch == NULL or self.vectors == NULL:
            raise MemoryError()
        self.view = PyMemoryView_FromMemory(<char*> self.scratch + HEADROOM, self.turn_bytes, PyBUF_WRITE)
        self.epfd = epoll_create1(EPOLL_CLOEXEC)
        if self.epfd < 0:
            raise OSError(errno, "epoll_create1")
        self.ended = []
        self.loop = loop
        self.call_soon = loop.call_soon
        loop.add_reader(self.epfd, self.on_ready)
        self.events = events
        self.sent_bytes = sent_bytes
        self.stalls = stalls
        self.lag = lag

    def __dealloc__(self):
        free(self.scratch)
        free(self.vectors)
        if self.epfd >= 0:
            close(self.epfd)

    def close(self):
        """Leaves the loop. Exchanges must be closed before."""
        if self.loop is not None:
            self.loop.remove_reader(self.epfd)
            self.loop = None

    def on_ready(self):
        """The loop's one callback: one bounded batch of ready descriptors, each gets its turn."""
        cdef epoll_event events[BATCH]
        cdef Interest* interest
        cdef int i
        cdef int count = epoll_wait(self.epfd, events, BATCH, 0)
        self.dispatching = True
        try:
            for i in range(count):
                interest = <Interest*> events[i].data.ptr
                if interest.events == 0:
                    continue    # closed by an earlier event of this batch
                if interest.side == UPSTREAM:
                    (<Exchange> interest.exchange).on_upstream_readable()
                else:
                    (<Exchange> interest.exchange).on_client(events[i].events)
        finally:
            self.dispatching = False
            if self.ended:
                self.ended.clear()

    cdef int watch(self, Interest* interest, uint32_t events) except -1:
        """Registers, changes or removes what is waited for. 0 removes: the descriptor may be closed after that."""
        cdef epoll_event event
        cdef int op
        if events == interest.events:
            return 0
        op = EPOLL_CTL_ADD if interest.events == 0 else EPOLL_CTL_DEL if events == 0 else EPOLL_CTL_MOD
        event.events = events
        event.data.ptr = interest
        if epoll_ctl(self.epfd, op, interest.fd, &event) < 0 and op != EPOLL_CTL_DEL:
            raise OSError(errno, "epoll_ctl")
        interest.events = events
        return 0


cdef inline uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef inline int write_hex(unsigned char* before, uint64_t value) noexcept nogil:
    """Writes value in hex and CRLF so that it ends just before `before`; its length."""
    cdef int size = 2
    cdef int digit
    (before - 1)[0] = c'\n'
    (before - 2)[0] = c'\r'
    while True:
        digit = <int> (value & 15)
        size += 1
        (before - size)[0] = c'0' + digit if digit < 10 else c'a' + digit - 10
        value >>= 4
        if value == 0:
            return size


cdef Py_ssize_t block_end(const unsigned char* text, Py_ssize_t at, Py_ssize_t length) noexcept nogil:
    """Behind the next empty line of text[at:length], or `length`. Where `at` is within a line this may be too early, never
    too late; the splitter's results do not depend on the cut."""
    cdef bint empty = True
    cdef unsigned char byte
    while at < length:
        byte = text[at]
        at += 1
        if byte == c'\n' or byte == c'\r':
            if byte == c'\r' and at < length and text[at] == c'\n':
                at += 1
            if empty:
                return at
            empty = True
        else:
            empty = False
    return length


cdef class Exchange:
    """One streaming answer. start() begins it, close() ends it (idempotent; no callback comes after it).

    client_fd and upstream_fd are borrowed: the owner closes them, after close(). `tls` is the ssl.SSLSocket of the
    upstream, or None for plain TCP. out_kind: BODY_CHUNKED, or BODY_LENGTH/BODY_CLOSE to send payload bare.
    """
    cdef Engine engine
    cdef object owner
    cdef object tls
    cdef readonly Splitter splitter
    cdef readonly Unframer unframer
    cdef int out_kind
    cdef int phase
    cdef bint tap
    cdef int epfd
    cdef Interest upstream
    cdef Interest client
    cdef bint first_seen
    cdef bint coming_back
    cdef bint client_lost
    cdef int client_errno
    cdef uint64_t next_mark
    cdef bint limited
    cdef bint midway        # unread payload lies behind what is sent
    cdef uint64_t limit
    cdef readonly Py_ssize_t undelivered
    cdef unsigned char* pending
    cdef Py_ssize_t pending_at
    cdef Py_ssize_t pending_size
    cdef Py_ssize_t pending_room
    cdef bytes prefix
    cdef readonly bytes pipelined
    cdef Py_ssize_t pipeline_room
    cdef readonly uint64_t bytes_in
    cdef readonly uint64_t bytes_out
    cdef readonly uint64_t last_read_ms
    cdef readonly uint64_t last_write_ms
    cdef readonly unsigned int stalls

    def __cinit__(self):
        self.pending = NULL

    def __init__(self, Engine engine not None, owner, int client_fd, int upstream_fd, tls, int in_kind,
                 uint64_t in_length, int out_kind, Splitter splitter, bint tap, Py_ssize_t pipeline_room):
        self.engine = engine
        self.owner = owner
        self.epfd = engine.epfd
        self.upstream.exchange = self.client.exchange = <void*> self
        self.upstream.side = UPSTREAM
        self.client.side = CLIENT
        self.upstream.fd = upstream_fd
        self.client.fd = client_fd
        self.upstream.events = self.client.events = 0
        self.tls = tls
        self.unframer = Unframer(in_kind, in_length)
        self.out_kind = out_kind
        self.splitter = splitter
        self.tap = tap
        self.pipelined = b""
        self.pipeline_room = pipeline_room
        self.prefix = b""
        self.next_mark = MARK_BYTES
        self.last_read_ms = self.last_write_ms = engine.now_ms

    def __dealloc__(self):
        # Only after a bug of the owner's is anything registered here; the kernel must not keep a pointer to us even then.
        if self.upstream.events:
            epoll_ctl(self.epfd, EPOLL_CTL_DEL, self.upstream.fd, NULL)
        if self.client.events:
            epoll_ctl(self.epfd, EPOLL_CTL_DEL, self.client.fd, NULL)
        free(self.pending)

    # -- what the owner asks ------------------------------------------------------------------------------------

    @property
    def pending_bytes(self):
        """Bytes the client has not taken yet."""
        return self.pending_size

    @property
    def at_boundary(self):
        """True when a whole line may be inserted into what the client has been sent."""
        return self.splitter is not None and self.splitter.boundary()

    @property
    def is_paused(self):
        """The upstream is not read because the client does not read."""
        return self.phase == RUNNING and self.upstream.events == 0

    @property
    def events(self):
        return 0 if self.splitter is None else self.splitter.events

    @property
    def text_bytes(self):
        return 0 if self.splitter is None else self.splitter.metered

    # -- what the owner does ------------------------------------------------------------------------------------

    def start(self, bytes head not None, bytes initial not None):
        """Sends `head` and what of the body was read with it, then relays. May end the exchange at once."""
        cdef Engine engine = self.engine
        cdef Py_ssize_t at = 0, piece
        self.prefix = head
        try:
            engine.watch(&self.client, EPOLLIN | EPOLLRDHUP)
            if self.unframer.state == WHOLE:
                self.complete()
                return
            while at < len(initial) and self.phase == RUNNING:
                piece = min(len(initial) - at, engine.turn_bytes)
                memcpy(engine.scratch + HEADROOM, <const unsigned char*> initial + at, piece)
                at += piece
                self.turn(piece)
            if self.phase == RUNNING:
                if self.prefix:
                    self.transmit(NULL, 0, b"", False)
                    self.check_client()
                if self.phase == RUNNING:
                    self.set_reading()
        except Exception as error:
            self.fail(error)

    def push(self, bytes payload not None):
        """Adds payload of our own (a heartbeat). False when the framing leaves no room for any."""
        if self.phase != RUNNING or self.out_kind == LENGTH:
            return False
        self.transmit(NULL, 0, payload, False)
        self.check_client()
        return True

    def mark_after(self, uint64_t text_bytes):
        """on_mark() comes at the event that makes `text_bytes` more metered, once, and what it then ends loses every event
        behind that one. 0: at the event that is being read, or behind the piece that is being tapped (which meters
        nothing itself, as a splitter without a watch: their owner counts, and says 0 when it is time)."""
        cdef uint64_t metered = 0 if self.splitter is None else self.splitter.metered
        self.limited = True
        self.limit = metered + text_bytes
        self.next_mark = min(metered + MARK_BYTES, self.limit)

    def halt(self):
        """Stops reading the upstream, whose descriptor may then be closed. end() or close() must follow."""
        self.stop_upstream()

    def end(self, bytes payload not None, bint whole):
        """Stops reading the upstream, sends `payload`, and the end mark when `whole`. on_drained() follows, maybe at once."""
        if self.phase != RUNNING:
            return
        self.stop_upstream()
        self.phase = ENDING
        if self.splitter is not None:
            self.splitter.discard()
        self.transmit(NULL, 0, payload if self.out_kind != LENGTH else b"", whole)
        self.check_client()
        self.check_drained()

    def sink(self):
        """The client is gone but the upstream is read on, to its end: what comes is accounted and dropped."""
        self.stop_client()
        if self.phase == RUNNING and self.upstream.events == 0:
            self.set_reading()

    def close(self):
        """Takes every callback off both descriptors and frees what was pending."""
        if self.phase == CLOSED:
            return
        self.phase = CLOSED
        self.stop_upstream()
        self.stop_client()
        if self.splitter is not None:
            self.splitter.discard()
        if self.engine.dispatching:
            self.engine.ended.append(self)
        self.owner = None
        self.tls = None

    # -- readiness ----------------------------------------------------------------------------------------------

    def on_upstream_readable(self):
        """One recv, one send."""
        cdef Engine engine = self.engine
        cdef ssize_t size
        cdef int error
        if self.phase != RUNNING:
            return
        try:
            if self.tls is not None:
                self.on_tls_readable()
                return
            size = recv(self.upstream.fd, engine.scratch + HEADROOM, engine.turn_bytes, MSG_DONTWAIT)
            if size > 0:
                self.measured_turn(size)
            elif size == 0:
                self.upstream_ended(0, "closed by upstream")
            else:
                error = errno
                if error != EAGAIN and error != EINTR:
                    self.upstream_ended(error, "")
        except Exception as failure:
            self.fail(failure)

    cdef on_tls_readable(self):
        """The same for TLS: one record at most. Bytes that OpenSSL has already are not seen by epoll, so we come back for them."""
        cdef Py_ssize_t size
        try:
            size = self.tls.recv_into(self.engine.view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.upstream_ended(error.errno or ECONNRESET, type(error).__name__)
            return
        if size == 0:
            self.upstream_ended(0, "closed by upstream")
            return
        self.measured_turn(size)
        if self.phase == RUNNING and self.upstream.events and self.tls.pending():
            self.come_back_soon()

    cdef come_back_soon(self):
        """At most one turn beside those of epoll: each of them could ask for another, and so ever more in a loop's turn."""
        if not self.coming_back:
            self.coming_back = True
            self.engine.call_soon(self.come_back)

    def come_back(self):
        """The turn that come_back_soon() asked for; not when the client's stall paused the upstream meanwhile."""
        self.coming_back = False
        if self.phase == RUNNING and self.upstream.events:
            self.on_upstream_readable()

    cdef on_client(self, uint32_t events):
        """Writable first: what was pending may be what the client waited for before it closed."""
        if events & EPOLLOUT:
            self.on_client_writable()
        if events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP):
            self.on_client_readable(events)

    cdef on_client_writable(self):
        """One send of what is pending."""
        cdef ssize_t size
        cdef Py_ssize_t want
        cdef int error
        if self.phase == CLOSED or self.client.fd < 0:
            return
        try:
            if self.pending_size:
                want = self.pending_size
                size = send(self.client.fd, self.pending + self.pending_at, want, MSG_DONTWAIT | MSG_NOSIGNAL)
                if size < 0:
                    error = errno
                    if error == EAGAIN or error == EINTR:
                        return
                    self.lose_client(error, 0)
                    self.check_client()
                    return
                self.pending_at += size
                self.pending_size -= size
                self.last_write_ms = self.engine.now_ms
            if self.pending_size == 0:
                self.drop_pending()
                self.engine.watch(&self.client, self.client.events & ~EPOLLOUT)
                self.check_drained()
            if self.phase == RUNNING and self.upstream.events == 0 and self.pending_size <= self.engine.high_mark // 2:
                self.set_reading()
        except Exception as failure:
            self.fail(failure)

    cdef on_client_readable(self, uint32_t events):
        """The client closed, or pipelines its next request: that is kept, up to a bound, and then not read any more."""
        cdef ssize_t size
        cdef int error
        if self.phase == CLOSED or self.client.fd < 0:
            return
        try:
            if not self.client.events & EPOLLIN:
                # The pipeline is full: the end is all we still look for.
                self.lose_client(0, 0)
                self.check_client()
                return
            size = recv(self.client.fd, self.engine.scratch + HEADROOM, min(self.engine.turn_bytes, 16384), MSG_DONTWAIT)
            if size > 0:
                self.pipelined += PyBytes_FromStringAndSize(<char*> self.engine.scratch + HEADROOM, size)
                if len(self.pipelined) >= self.pipeline_room:
                    self.engine.watch(&self.client, self.client.events & ~EPOLLIN)
                return
            error = 0
            if size < 0:
                error = errno
                if error == EAGAIN or error == EINTR:
                    return
            self.lose_client(error, 0)
            self.check_client()
        except Exception as failure:
            self.fail(failure)

    # -- one turn -----------------------------------------------------------------------------------------------

    cdef int measured_turn(self, Py_ssize_t size) except -1:
        """A turn; the first and then each sixteenth of the worker's with its time, from bytes in hand to bytes sent."""
        cdef Engine engine = self.engine
        cdef uint64_t began
        engine.turns += 1
        if engine.turns & 15 != 1:
            return self.turn(size)
        began = monotonic_ns()
        self.turn(size)
        engine.lag.record_ns(monotonic_ns() - began)
        return 0

    cdef int turn(self, Py_ssize_t size) except -1:
        """`size` raw bytes lie in the scratch buffer: un-frame, split, send."""
        cdef Engine engine = self.engine
        cdef unsigned char* payload = NULL
        cdef Py_ssize_t length
        cdef Splitter splitter = self.splitter
        cdef uint64_t before
        cdef Span whole
        cdef bint last
        cdef bint goes_on = True
        self.bytes_in += <uint64_t> size
        self.last_read_ms = engine.now_ms
        length = self.unframer.take(engine.scratch + HEADROOM, size, &payload)
        if length < 0:
            self.upstream_ended(0, "bad chunked framing")
            return 0
        last = self.unframer.state == WHOLE
        if length:
            if self.tap:
                self.owner.on_tap(PyBytes_FromStringAndSize(<char*> payload, length))
                if self.phase != RUNNING:
                    return 0
            if splitter is not None:
                before = splitter.events
                if self.limited and (splitter.watch is None
                                     or splitter.metered + <uint64_t> (splitter.held + length) >= self.limit):
                    goes_on = self.consume_to_limit(payload, length)
                else:
                    splitter.consume(payload, length)
                if splitter.events != before:
                    engine.events.add_n(splitter.events - before)
                if not goes_on:
                    return 0
                if not last:
                    if splitter.span_count:
                        self.transmit(splitter.spans, splitter.span_count, b"", False)
                    splitter.recycle()
                if not self.first_seen and splitter.events:
                    self.first_seen = True
                    self.owner.on_first()
                if splitter.metered >= self.next_mark:
                    self.next_mark = splitter.metered + MARK_BYTES
                    self.owner.on_mark()
                    if self.phase != RUNNING:
                        return 0
            else:
                if not last:
                    whole.start = payload
                    whole.length = length
                    self.transmit(&whole, 1, b"", False)
                if not self.first_seen:
                    self.first_seen = True
                    self.owner.on_first()
                if self.limited and self.limit == 0 and not last:
                    self.limited = False
                    self.owner.on_mark()
                    if self.phase != RUNNING:
                        return 0
        if last:
            self.finish_turn(payload, length)
        self.check_client()
        if self.unframer.state == BAD and self.phase == RUNNING:
            self.upstream_ended(0, "bad chunked framing")
            return 0
        if self.phase == RUNNING and self.upstream.events and self.pending_size > engine.high_mark:
            self.stop_reading()
            self.stalls += 1
            engine.stalls.add_n(1)
        return 0

    cdef bint consume_to_limit(self, const unsigned char* payload, Py_ssize_t length) except -1:
        """The limit is in reach of this payload: event by event. False when on_mark() ended the exchange: then what lies
        behind the event that reached the limit was not read."""
        cdef Splitter splitter = self.splitter
        cdef Py_ssize_t at = 0, end
        cdef bint reached
        while at < length:
            end = block_end(payload, at, length)
            splitter.consume(payload + at, end - at)
            at = end
            reached = self.limited and splitter.metered >= self.limit
            # What is sent of a block that was kept points to memory that the next consume() may move or free.
            if reached or (at < length and (splitter.block != NULL or splitter.spent != NULL)):
                if splitter.span_count:
                    self.midway = at < length
                    self.transmit(splitter.spans, splitter.span_count, b"", False)
                    self.midway = False
                splitter.recycle()
            if reached:
                self.limited = False
                self.next_mark = splitter.metered + MARK_BYTES
                if not self.first_seen and splitter.events:
                    self.first_seen = True
                    self.owner.on_first()
                self.owner.on_mark()
                if self.phase != RUNNING:
                    return False
        return True

    cdef int finish_turn(self, unsigned char* payload, Py_ssize_t length) except -1:
        """The body became whole in this turn: its last bytes, what the owner appends and the end mark leave in one send."""
        cdef Splitter splitter = self.splitter
        cdef Span whole
        cdef bytes more = b""
        if splitter is not None:
            more = splitter.finish()
        self.stop_upstream()
        self.phase = ENDING
        more = self.owner.on_complete(self.unframer.leftover, more)
        if self.phase == ENDING:
            if splitter is not None:
                self.transmit(splitter.spans, splitter.span_count, more, True)
            else:
                whole.start = payload
                whole.length = length
                self.transmit(&whole, 1 if length else 0, more, True)
        if splitter is not None:
            splitter.recycle()
        if not self.client_lost:
            self.check_drained()
        return 0

    cdef complete(self):
        """The framing is satisfied without another byte (an empty body, or the close of a close-delimited one)."""
        self.finish_turn(NULL, 0)
        self.check_client()

    cdef upstream_ended(self, int error, str detail):
        """recv said the upstream is over. Framing decides whether the body is whole; nothing else can."""
        if error == 0 and self.unframer.kind == CLOSE:
            self.unframer.state = WHOLE
            self.complete()
            return
        self.stop_upstream()
        more = self.owner.on_broken(error, detail)
        if self.phase == RUNNING:
            self.end(more or b"", more is None)

    # -- sending ------------------------------------------------------------------------------------------------

    cdef int transmit(self, Span* spans, int count, bytes more, bint last) except -1:
        """Sends prefix, one chunk of the spans and `more`, and the end mark when `last`; keeps what the kernel refuses."""
        cdef Engine engine = self.engine
        cdef Py_ssize_t total = 0
        cdef Py_ssize_t wanted
        cdef ssize_t sent = 0
        cdef int i, used = 0, size
        cdef int error
        cdef iovec* vectors
        cdef unsigned char* at
        cdef unsigned char header[HEADROOM]
        cdef msghdr message
        if self.client.fd < 0 or self.client_lost:
            self.prefix = b""
            return 0
        for i in range(count):
            total += spans[i].length
        total += len(more)
        self.bytes_out += <uint64_t> total
        engine.sent_bytes.add_n(<uint64_t> total)
        if (count == 1 and not more and not self.prefix and not self.midway and self.pending_size == 0
                and spans[0].start >= engine.scratch + HEADROOM
                and spans[0].start + spans[0].length <= engine.scratch + HEADROOM + engine.turn_bytes):
            # the plain path: our chunk header and line end are written around the payload where it lies
            at = <unsigned char*> spans[0].start
            wanted = total
            if self.out_kind == CHUNKED:
                (at + wanted)[0] = c'\r'
                (at + wanted + 1)[0] = c'\n'
                size = write_hex(at, <uint64_t> total)
                at -= size
                wanted += size + 2
                if last:
                    memcpy(at + wanted, b"0\r\n\r\n", 5)
                    wanted += 5
            sent = send(self.client.fd, at, wanted, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                error = errno
                if error != EAGAIN and error != EINTR:
                    self.lose_client(error, total)
                    return 0
                sent = 0
            else:
                self.last_write_ms = engine.now_ms
            if sent < wanted:
                self.keep_pending(at + sent, wanted - sent)
            return 0
        if count + 5 > engine.vector_room:
            vectors = <iovec*> realloc(engine.vectors, (count + 64) * sizeof(iovec))
            if vectors == NULL:
                raise MemoryError()
            engine.vectors = vectors
            engine.vector_room = count + 64
        vectors = engine.vectors
        if self.prefix:
            vectors[used].iov_base = <void*> <const char*> self.prefix
            vectors[used].iov_len = len(self.prefix)
            used += 1
        if total:
            if self.out_kind == CHUNKED:
                size = write_hex(header + HEADROOM, <uint64_t> total)
                vectors[used].iov_base = header + HEADROOM - size
                vectors[used].iov_len = size
                used += 1
            for i in range(count):
                vectors[used].iov_base = <void*> spans[i].start
                vectors[used].iov_len = spans[i].length
                used += 1
            if more:
                vectors[used].iov_base = <void*> <const char*> more
                vectors[used].iov_len = len(more)
                used += 1
        if self.out_kind == CHUNKED and (total or last):
            vectors[used].iov_base = <void*> <const char*> (b"\r\n0\r\n\r\n" if total else b"0\r\n\r\n")
            vectors[used].iov_len = (7 if total else 5) if last else 2
            used += 1
        if used == 0:
            return 0
        if self.pending_size == 0:
            px_message(&message, vectors, used)
            sent = sendmsg(self.client.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if sent < 0:
                error = errno
                if error != EAGAIN and error != EINTR:
                    self.prefix = b""
                    self.lose_client(error, total)
                    return 0
                sent = 0
            else:
                self.last_write_ms = engine.now_ms
        for i in range(used):
            if sent >= <ssize_t> vectors[i].iov_len:
                sent -= <ssize_t> vectors[i].iov_len
                continue
            self.keep_pending(<unsigned char*> vectors[i].iov_base + sent, vectors[i].iov_len - sent)
            sent = 0
        self.prefix = b""
        return 0

    cdef int keep_pending(self, const unsigned char* start, Py_ssize_t size) except -1:
        """Copies what the kernel did not take; its room grows by doubling and is freed when drained."""
        cdef Py_ssize_t room
        cdef unsigned char* grown
        if self.pending_at and self.pending_at + self.pending_size + size > self.pending_room:
            memmove(self.pending, self.pending + self.pending_at, self.pending_size)
            self.pending_at = 0
        if self.pending_size + size > self.pending_room:
            room = max(self.pending_room * 2, self.pending_size + size, 4096)
            grown = <unsigned char*> realloc(self.pending, room)
            if grown == NULL:
                raise MemoryError()
            self.pending = grown
            self.pending_room = room
        memcpy(self.pending + self.pending_at + self.pending_size, start, size)
        self.pending_size += size
        if not self.client.events & EPOLLOUT:
            self.last_write_ms = self.engine.now_ms
            self.engine.watch(&self.client, self.client.events | EPOLLOUT)
        return 0

    cdef void drop_pending(self) noexcept:
        free(self.pending)
        self.pending = NULL
        self.pending_at = self.pending_size = self.pending_room = 0

    # -- ends ---------------------------------------------------------------------------------------------------

    cdef set_reading(self):
        self.last_read_ms = self.engine.now_ms
        self.engine.watch(&self.upstream, EPOLLIN)
        if self.tls is not None and self.tls.pending():
            self.come_back_soon()

    cdef stop_reading(self):
        self.engine.watch(&self.upstream, 0)

    cdef stop_upstream(self):
        self.stop_reading()
        self.upstream.fd = -1

    cdef stop_client(self):
        self.engine.watch(&self.client, 0)
        self.client.fd = -1
        self.drop_pending()

    cdef lose_client(self, int error, Py_ssize_t unsent):
        if not self.client_lost:
            self.client_lost = True
            self.client_errno = error
            self.undelivered = self.pending_size + unsent

    cdef check_client(self):
        """Tells the owner of a lost client, once, when the turn that noticed it is over."""
        if self.client_lost and self.client.fd >= 0 and self.phase != CLOSED:
            self.stop_client()
            self.owner.on_client_gone(self.client_errno)

    cdef check_drained(self):
        if self.phase == ENDING and self.pending_size == 0 and not self.client_lost:
            self.owner.on_drained()

    cdef fail(self, error):
        owner = self.owner
        if owner is not None:
            owner.on_failure(error)
