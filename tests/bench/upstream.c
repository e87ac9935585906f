/* A model server that only streams: answers every POST with chat completion chunks at the rate the request's body asks for.
 *
 * Usage: upstream LIFETIME_S. Prints "port N". HTTP/1.1 with keep-alive and Content-Length bodies. The body says how, in its
 * message: "bench rate=20 bytes=250 burst=1 events=0 first_ms=0":
 *   rate    timer ticks a second; a stream's first tick comes at a random phase, so the streams are spread, not in step
 *   burst   events a tick, each a chunk of its own
 *   bytes   length of one event, `data: ` and blank line included
 *   events  how many, then finish_reason, usage (if the body has include_usage) and [DONE]; 0 = until the peer closes
 * Every event carries "bench_ns", the monotonic time it was made, for the client to compare with its own clock.
 * A peer that does not read stops its stream's timer until it has taken what was made (at most one tick's events wait).
 */
#include "common.h"

#define IN_MAX 98304
#define KEY "\"bench_ns\":"
#define DIGITS 19

typedef struct {
    size_t length, digits_at; /* of a whole chunk: size line, event, CRLF */
    size_t event_bytes;
    char *text;
} Template;

typedef struct {
    int fd;
    size_t in;
    char *input;
    char *out;
    size_t out_bytes, out_room;
    size_t heap_at; /* index + 1 in the heap; 0: no timer */
    uint64_t due, period;
    unsigned burst;
    uint64_t left; /* events until the end; UINT64_MAX: endless */
    int usage, writing, blocked;
    const Template *template;
} Conn;

static int poller;
static Conn **heap;
static size_t heap_count, heap_room;
static Template templates[16];
static int template_count;

static void heap_put(size_t at, Conn *conn) {
    heap[at] = conn;
    conn->heap_at = at + 1;
}

static void heap_sift(size_t at) {
    Conn *conn = heap[at];
    while (at && heap[(at - 1) / 2]->due > conn->due) {
        heap_put(at, heap[(at - 1) / 2]);
        at = (at - 1) / 2;
    }
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= heap_count) break;
        if (child + 1 < heap_count && heap[child + 1]->due < heap[child]->due) child++;
        if (heap[child]->due >= conn->due) break;
        heap_put(at, heap[child]);
        at = child;
    }
    heap_put(at, conn);
}

static void schedule(Conn *conn, uint64_t due) {
    conn->due = due;
    if (!conn->heap_at) {
        if (heap_count == heap_room) {
            heap_room = heap_room ? 2 * heap_room : 1024;
            heap = must(realloc(heap, heap_room * sizeof *heap));
        }
        heap_put(heap_count++, conn);
    }
    heap_sift(conn->heap_at - 1);
}

static void unschedule(Conn *conn) {
    size_t at = conn->heap_at;
    if (!at) return;
    conn->heap_at = 0;
    heap_count--;
    if (at - 1 < heap_count) {
        heap_put(at - 1, heap[heap_count]);
        heap_sift(at - 1);
    }
}

static const Template *template_for(size_t bytes) {
    static const char *start = "data: {\"id\":\"chatcmpl-9f8c1d2e3b4a5968\",\"object\":\"chat.completion.chunk\","
                               "\"created\":1760000000,\"model\":\"bench-1\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" word";
    static const char *middle = "\"},\"finish_reason\":null}],\"obfuscation\":\"";
    static const char *end = "\"," KEY;
    size_t fixed = strlen(start) + strlen(middle) + strlen(end) + DIGITS + strlen("}\n\n"), pad, size_line;
    Template *new;
    char *at;
    if (bytes < fixed) bytes = fixed;
    for (int i = 0; i < template_count; i++)
        if (templates[i].event_bytes == bytes) return &templates[i];
    if (template_count == 16) return &templates[0];
    new = &templates[template_count++];
    pad = bytes - fixed;
    new->event_bytes = bytes;
    new->text = must(malloc(bytes + 32));
    size_line = (size_t)sprintf(new->text, "%zx\r\n", bytes);
    at = new->text + size_line;
    at = stpcpy(at, start);
    if (bytes > 1024) { /* a large event is one of much text */
        memset(at, 'x', pad);
        at += pad;
    }
    at = stpcpy(at, middle);
    if (bytes <= 1024) { /* OpenAI pads its small events like this, to hide their lengths */
        memset(at, 'x', pad);
        at += pad;
    }
    at = stpcpy(at, end);
    new->digits_at = (size_t)(at - new->text);
    memset(at, '0', DIGITS);
    at = stpcpy(at + DIGITS, "}\n\n\r\n");
    new->length = (size_t)(at - new->text);
    return new;
}

static void drop(Conn *conn) {
    unschedule(conn);
    close(conn->fd);
    free(conn->input);
    free(conn->out);
    free(conn);
}

static void watch(Conn *conn, uint32_t mask) {
    struct epoll_event event = {.events = mask, .data.ptr = conn};
    epoll_ctl(poller, EPOLL_CTL_MOD, conn->fd, &event);
}

/* Sends what waits. 0: all gone or the peer must read first; -1: the peer is gone. */
static int flush(Conn *conn) {
    ssize_t sent = send(conn->fd, conn->out, conn->out_bytes, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) return -1;
        sent = 0;
    }
    conn->out_bytes -= (size_t)sent;
    if (conn->out_bytes) {
        memmove(conn->out, conn->out + sent, conn->out_bytes);
        if (!conn->blocked) watch(conn, EPOLLIN | EPOLLOUT);
        conn->blocked = 1;
    } else if (conn->blocked) {
        watch(conn, EPOLLIN);
        conn->blocked = 0;
    }
    return 0;
}

static char *room(Conn *conn, size_t bytes) {
    if (conn->out_bytes + bytes > conn->out_room) {
        conn->out_room = conn->out_bytes + bytes;
        conn->out = must(realloc(conn->out, conn->out_room));
    }
    return conn->out + conn->out_bytes;
}

static void append(Conn *conn, const char *text) {
    size_t length = strlen(text);
    memcpy(room(conn, length), text, length);
    conn->out_bytes += length;
}

static void append_event(Conn *conn, const char *json) {
    char line[600];
    snprintf(line, sizeof line, "%zx\r\ndata: %s\n\n\r\n", strlen(json) + 8, json);
    append(conn, line);
}

static void make_events(Conn *conn) {
    for (unsigned i = 0; i < conn->burst && conn->left; i++) {
        const Template *t = conn->template;
        char *at = room(conn, t->length);
        uint64_t value = now_ns();
        memcpy(at, t->text, t->length);
        for (int digit = DIGITS - 1; digit >= 0; digit--) {
            at[t->digits_at + (size_t)digit] = (char)('0' + value % 10);
            value /= 10;
        }
        conn->out_bytes += t->length;
        if (conn->left != UINT64_MAX) conn->left--;
    }
    if (!conn->left) {
        append_event(conn, "{\"id\":\"chatcmpl-9f8c1d2e3b4a5968\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
                           "\"model\":\"bench-1\",\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}");
        if (conn->usage)
            append_event(conn, "{\"id\":\"chatcmpl-9f8c1d2e3b4a5968\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,"
                               "\"model\":\"bench-1\",\"choices\":[],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":5,"
                               "\"total_tokens\":16}}");
        append_event(conn, "[DONE]");
        append(conn, "0\r\n\r\n");
        conn->writing = 0;
    }
}

/* One tick of one stream; -1: the peer is gone. */
static int tick(Conn *conn) {
    if (!conn->out_bytes) {
        make_events(conn);
        if (flush(conn)) return -1;
    }
    if (!conn->writing) {
        unschedule(conn);
        return 0;
    }
    schedule(conn, conn->due + conn->period);
    return 0;
}

/* Takes complete requests out of the input; -1: nothing we speak, or the peer is gone. */
static int answer(Conn *conn) {
    while (conn->in && !conn->writing) {
        char *end, *length, *body;
        size_t head, total;
        double rate;
        conn->input[conn->in] = 0;
        end = strstr(conn->input, "\r\n\r\n");
        if (!end) return conn->in >= IN_MAX ? -1 : 0;
        head = (size_t)(end - conn->input) + 4;
        *end = 0;
        length = strcasestr(conn->input, "\r\ncontent-length:");
        *end = '\r';
        total = head + (length && length < end ? strtoul(length + 17, NULL, 10) : 0);
        if (total > IN_MAX) return -1;
        if (conn->in < total) return 0;
        body = conn->input + head;
        rate = option(body, "rate", 20);
        conn->template = template_for((size_t)option(body, "bytes", 250));
        conn->burst = (unsigned)option(body, "burst", 1);
        conn->left = (uint64_t)option(body, "events", 0);
        if (!conn->left) conn->left = UINT64_MAX;
        conn->usage = memmem(body, total - head, "include_usage", 13) != NULL;
        conn->period = (uint64_t)(1e9 / (rate > 0.001 ? rate : 0.001));
        conn->in -= total;
        memmove(conn->input, conn->input + total, conn->in);
        conn->writing = 1;
        append(conn, "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
                     "x-request-id: req_bench\r\nTransfer-Encoding: chunked\r\n\r\n");
        if (flush(conn)) return -1;
        schedule(conn, now_ns() + (uint64_t)(drand48() * (double)(conn->period < 1000000000u ? conn->period : 1000000000u)));
    }
    return 0;
}

static int readable(Conn *conn) {
    ssize_t got;
    if (conn->in >= IN_MAX) return -1;
    got = recv(conn->fd, conn->input + conn->in, IN_MAX - conn->in, 0);
    if (got <= 0) return got == 0 || errno != EAGAIN ? -1 : 0;
    conn->in += (size_t)got;
    return answer(conn);
}

int main(int argc, char **argv) {
    struct epoll_event events[512];
    struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL};
    int listener;
    if (argc != 2) return 2;
    bound_life((unsigned)atoi(argv[1]));
    prctl(PR_SET_TIMERSLACK, 1000);
    srand48((long)getpid());
    poller = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_anywhere();
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepting);
    for (;;) {
        struct timespec wait = {0}, *until = NULL;
        uint64_t now = now_ns();
        int count;
        if (heap_count) {
            uint64_t ahead = heap[0]->due > now ? heap[0]->due - now : 0;
            wait.tv_sec = (time_t)(ahead / 1000000000u);
            wait.tv_nsec = (long)(ahead % 1000000000u);
            until = &wait;
        }
        count = epoll_pwait2(poller, events, 512, until, NULL);
        for (int i = 0; i < count; i++) {
            Conn *conn = events[i].data.ptr;
            if (!conn) {
                for (int many = 0; many < 64; many++) {
                    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                    struct epoll_event event = {.events = EPOLLIN};
                    if (fd < 0) break;
                    no_delay(fd);
                    conn = must(calloc(1, sizeof *conn));
                    conn->fd = fd;
                    conn->input = must(malloc(IN_MAX + 1));
                    event.data.ptr = conn;
                    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
                }
                continue;
            }
            /* an fd is once in a batch, so a dropped conn is not met again in this turn */
            if (events[i].events & EPOLLOUT && flush(conn)) {
                drop(conn);
                continue;
            }
            if (events[i].events & (EPOLLIN | EPOLLERR | EPOLLHUP) && readable(conn)) drop(conn);
        }
        now = now_ns();
        for (int many = 0; many < 256 && heap_count && heap[0]->due <= now; many++) {
            Conn *conn = heap[0];
            if (tick(conn)) drop(conn);
            else if (!conn->writing && answer(conn)) drop(conn);
        }
    }
}
