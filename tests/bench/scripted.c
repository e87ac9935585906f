/* A provider that is never at fault: answers every POST as its body asks, at once or paced, with numbered events.
 *
 * Usage: scripted LIFETIME_S. Prints "port N". HTTP/1.1 with keep-alive and Content-Length bodies; the message in the body
 * says how: "script for=71 events=5 rate=0 json=0":
 *   for     repeated in every event, so that a client sees whose answer it has
 *   events  how many, numbered from 1 as "seq", each a chunk of its own; then finish_reason, usage (if the body has
 *           include_usage), [DONE] and the last chunk
 *   rate    events a second; 0: the whole answer in one send
 *   json    1: one JSON answer with a Content-Length instead
 * A peer that does not read gets no more events until it has taken what was made. No connection is ever closed first.
 */
#include "common.h"

#define IN_MAX 16384
#define OUT_MAX 16384

typedef struct {
    int fd, writing, blocked, usage;
    size_t in, out, paced_at; /* paced_at: index + 1 in the list of paced ones; 0: none */
    uint64_t due, period, number, seq, events;
    char *input, *output;
} Conn;

static int poller;
static Conn **paced;
static size_t paced_count, paced_room;

static void unpace(Conn *conn) {
    if (!conn->paced_at) return;
    paced[conn->paced_at - 1] = paced[--paced_count];
    paced[conn->paced_at - 1]->paced_at = conn->paced_at;
    conn->paced_at = 0;
}

static void pace(Conn *conn) {
    if (paced_count == paced_room) {
        paced_room = paced_room ? 2 * paced_room : 1024;
        paced = must(realloc(paced, paced_room * sizeof *paced));
    }
    paced[paced_count++] = conn;
    conn->paced_at = paced_count;
}

static void drop(Conn *conn) {
    unpace(conn);
    close(conn->fd);
    free(conn->input);
    free(conn->output);
    free(conn);
}

static int flush(Conn *conn) {
    ssize_t sent = send(conn->fd, conn->output, conn->out, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) return -1;
        sent = 0;
    }
    conn->out -= (size_t)sent;
    if (conn->out) memmove(conn->output, conn->output + sent, conn->out);
    if ((conn->out != 0) != conn->blocked) {
        struct epoll_event event = {.events = conn->out ? EPOLLIN | EPOLLOUT : EPOLLIN, .data.ptr = conn};
        conn->blocked = !conn->blocked;
        epoll_ctl(poller, EPOLL_CTL_MOD, conn->fd, &event);
    }
    return 0;
}

/* One event as a chunk; the caller sees to the room. */
static void say(Conn *conn, const char *format, ...) {
    char text[600];
    int length;
    va_list given;
    va_start(given, format);
    length = vsnprintf(text, sizeof text, format, given);
    va_end(given);
    conn->out += (size_t)sprintf(conn->output + conn->out, "%x\r\ndata: %s\n\n\r\n", (unsigned)length + 8, text);
}

#define CHUNK "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1760000000,\"model\":\"scripted\",\"choices\":["

static void say_end(Conn *conn) {
    say(conn, CHUNK "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}");
    if (conn->usage)
        say(conn, CHUNK "],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":%llu,\"total_tokens\":%llu}}",
            (unsigned long long)conn->events, (unsigned long long)conn->events + 11);
    say(conn, "[DONE]");
    conn->out += (size_t)sprintf(conn->output + conn->out, "0\r\n\r\n");
    conn->writing = 0;
}

static void say_next(Conn *conn) {
    conn->seq++;
    say(conn, CHUNK "{\"index\":0,\"delta\":{\"content\":\" word\"},\"finish_reason\":null}],\"for\":%llu,\"seq\":%llu}",
        (unsigned long long)conn->number, (unsigned long long)conn->seq);
    if (conn->seq == conn->events) say_end(conn);
}

static void say_json(Conn *conn) {
    char text[600];
    int length = snprintf(text, sizeof text,
                          "{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"created\":1760000000,\"model\":\"scripted\","
                          "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"word\"},"
                          "\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":11,\"completion_tokens\":1,"
                          "\"total_tokens\":12},\"for\":%llu,\"seq\":1}",
                          (unsigned long long)conn->number);
    conn->out += (size_t)sprintf(conn->output + conn->out,
                                 "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", length, text);
}

/* Takes complete requests out of the input; -1: nothing we speak, or the peer is gone. */
static int answer(Conn *conn) {
    while (conn->in && !conn->writing) {
        char *end, *length, *script;
        size_t head, total;
        double rate;
        conn->input[conn->in] = 0;
        end = strstr(conn->input, "\r\n\r\n");
        if (!end) return conn->in >= IN_MAX ? -1 : 0;
        head = (size_t)(end - conn->input) + 4;
        length = strcasestr(conn->input, "\r\ncontent-length:");
        total = head + (length && length < end ? strtoul(length + 17, NULL, 10) : 0);
        if (total > IN_MAX) return -1;
        if (conn->in < total) return 0;
        script = strstr(conn->input + head, "script ");
        if (!script) return -1;
        conn->number = (uint64_t)option(script, "for", 0);
        conn->events = (uint64_t)option(script, "events", 5);
        conn->seq = 0;
        rate = option(script, "rate", 0);
        if (option(script, "json", 0) > 0) say_json(conn);
        else {
            conn->usage = memmem(conn->input + head, total - head, "include_usage", 13) != NULL;
            conn->writing = 1;
            conn->out += (size_t)sprintf(conn->output + conn->out,
                                         "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                                         "Cache-Control: no-cache\r\nTransfer-Encoding: chunked\r\n\r\n");
            if (rate <= 0)
                while (conn->writing && conn->out < OUT_MAX - 2048) say_next(conn);
        }
        conn->in -= total;
        memmove(conn->input, conn->input + total, conn->in);
        if (conn->writing) {
            conn->period = rate > 0 ? (uint64_t)(1e9 / rate) : 1000000;
            conn->due = now_ns() + (uint64_t)(drand48() * (double)conn->period);
            pace(conn);
        }
        if (flush(conn)) return -1;
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

/* -1: the peer is gone. */
static int tick(Conn *conn) {
    if (conn->out) return 0;
    conn->due += conn->period;
    say_next(conn);
    if (!conn->writing) unpace(conn);
    if (flush(conn)) return -1;
    return conn->writing ? 0 : answer(conn);
}

static void accept_some(int listener) {
    for (int many = 0; many < 64; many++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        struct epoll_event event = {.events = EPOLLIN};
        Conn *conn;
        if (fd < 0) return;
        no_delay(fd);
        conn = must(calloc(1, sizeof *conn));
        conn->fd = fd;
        conn->input = must(malloc(IN_MAX + 1));
        conn->output = must(malloc(OUT_MAX));
        event.data.ptr = conn;
        epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
    }
}

int main(int argc, char **argv) {
    struct epoll_event events[512];
    struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL};
    int listener;
    if (argc != 2) return 2;
    bound_life((unsigned)atoi(argv[1]));
    srand48((long)getpid());
    poller = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_anywhere();
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepting);
    for (;;) {
        int count = epoll_wait(poller, events, 512, paced_count ? 4 : 1000);
        uint64_t now;
        for (int i = 0; i < count; i++) {
            Conn *conn = events[i].data.ptr;
            if (!conn) {
                accept_some(listener);
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
        for (size_t at = paced_count; at-- > 0;) /* downwards: one that leaves the list is replaced by one already seen */
            if (at < paced_count && paced[at]->due <= now) {
                Conn *conn = paced[at];
                if (tick(conn)) drop(conn);
            }
    }
}
