/* New requests at a steady rate beside long streams, and exactly how each of them ended (long because a client is one state).
 *
 * Usage: newcomers TARGET TOKEN LIFETIME_S "rate=1000 kept=0.5 ..." ; TARGET is a port of 127.0.0.1 or the path of a socket.
 *   rate     new requests a second, begun whether or not earlier ones have ended (at most `cap` at a time, 4000)
 *   kept     the share of them that go over `pool` kept-alive connections, the longest idle one first; the rest connect anew
 *   close    the share of new connections that ask for `Connection: close`; the others are reset once their answer is whole
 *   streams  long streams, each with a connection of its own, `min` to `max` events at `stream_rate` a second; one that has
 *            ended is followed by another
 *   wait     seconds until an answer counts as never ended (30); slow: until it is told of (1)
 * Requests are, in turn: a JSON answer, a stream of 5 events at once, the same at 50 events a second.
 * Commands, as lines: `go` begins the requests (the streams begin at once), `report` prints one JSON line, `stop` ends the
 * requests, and the streams as they end; `leave` closes the streams that are open; `quit`.
 * Prints `ready` when every stream has had an event, `stopped` after `stop` when nothing is open, and for each failure:
 *   slow PORT ASKED_NS CONNECTED_NS FIRST_BYTE_NS ENDED_NS USES    for a whole answer that took more than `slow` s
 *   fail KIND WHO PORT ASKED_NS ENDED_NS USES BYTES DETAIL      WHO: request or stream; USES: requests before on the connection
 * An answer is whole if its framing ends, its events are numbered without a gap, each names this request, and [DONE] came.
 */
#include "common.h"
#include <stddef.h>
#include <sys/queue.h>
#include <sys/un.h>

enum { CONNECT, RESET, EMPTY, CUT, STATUS, ERROR_EVENT, GAP, FOREIGN, FRAMING, LATE, KINDS };
static const char *const kind_names[] = {"connect", "reset", "empty", "cut", "status", "error_event", "gap", "foreign", "framing", "late"};
enum { WAITING, HEAD, SIZE, DATA, DATA_END, TRAILER, LENGTH };
#define LINES_MAX 3000

typedef struct Conn {
    TAILQ_ENTRY(Conn) link;
    int fd, connected, is_stream, is_kept, asks_close, in_use, phase, status, closes, done, failed, foreign, gap, json;
    int port, blank, had_event;
    unsigned uses;
    uint64_t asked, connected_at, first_at, deadline, number, wanted, seq, got;
    long left;
    size_t head_bytes, line_bytes;
    char head[4096], line[512], request[2400];
    size_t request_bytes;
} Conn;
TAILQ_HEAD(List, Conn);

static struct List idle = TAILQ_HEAD_INITIALIZER(idle), unused = TAILQ_HEAD_INITIALIZER(unused);
static Conn *conns;
static int conn_count, poller, target_port;
static const char *target, *token;
static double rate, kept_share, close_share, stream_rate;
static uint64_t wait_ns, slow_ns, next_number = 1, least, most;
static int pool, pool_open, cap, streams, streams_open, streams_ready, requests_open, going, stopping, said_ready, said_stopped, lines, streams_begun;
static uint64_t failures[2][KINDS], statuses[2][600], whole[2], begun[2], held, connects, idle_closed, said_close, events, slow;
static Histogram took, first;

static double chance(void) { return drand48(); }

static void close_conn(Conn *conn, int at_once) {
    if (at_once) {
        struct linger reset = {1, 0};
        setsockopt(conn->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    }
    close(conn->fd);
    if (conn->is_kept) pool_open--;
    conn->fd = -1;
    TAILQ_INSERT_TAIL(&unused, conn, link);
}

static void leave_use(Conn *conn) {
    conn->in_use = 0;
    if (conn->is_stream) {
        streams_open--;
        streams_begun--; /* another takes its place, at the pace of opens */
    } else requests_open--;
}

static void count_ready(Conn *conn) {
    if (!conn->is_stream || conn->had_event) return;
    conn->had_event = 1;
    streams_ready++;
    if (!said_ready && streams_ready >= streams) {
        said_ready = 1;
        printf("ready\n");
    }
}

static void fail(Conn *conn, int kind, const char *detail) {
    failures[conn->is_stream][kind]++;
    if (kind == STATUS && conn->status >= 0 && conn->status < 600) statuses[conn->is_stream][conn->status]++;
    if (lines++ < 10 * LINES_MAX)
        printf("fail %s %s %d %llu %llu %u %llu %.200s\n", kind_names[kind], conn->is_stream ? "stream" : "request", conn->port,
               (unsigned long long)conn->asked, (unsigned long long)now_ns(), conn->uses, (unsigned long long)conn->got, detail);
    count_ready(conn);
    leave_use(conn);
    close_conn(conn, 1);
}

static void on_line(Conn *conn) {
    char *at;
    conn->line[conn->line_bytes] = 0;
    if (conn->line_bytes > 8 && (at = strstr(conn->line, "\"seq\":"))) {
        uint64_t seq = strtoull(at + 6, NULL, 10);
        char *of = strstr(conn->line, "\"for\":");
        if (!of || strtoull(of + 6, NULL, 10) != conn->number) conn->foreign = 1;
        if (seq != ++conn->seq) conn->gap = 1;
        events++;
        count_ready(conn);
    } else if (!strncmp(conn->line, "data: [DONE]", 12)) conn->done = 1;
    else if (strstr(conn->line, "\"error\"")) conn->failed = 1;
    if (!conn->failed) conn->line_bytes = 0; /* the words of an error stay for the report */
}

static void take_text(Conn *conn, const char *data, size_t length) {
    for (size_t i = 0; i < length; i++) {
        if (data[i] == '\n') {
            if (conn->line_bytes && !conn->failed) on_line(conn);
        } else if (conn->line_bytes < sizeof conn->line - 1 && !conn->failed) conn->line[conn->line_bytes++] = data[i];
    }
}

/* 1: the answer's framing has ended; 0: more to come; -1: it is broken. */
static int feed(Conn *conn, const char *data, size_t length) {
    size_t at = 0;
    while (at < length) {
        char byte = data[at];
        if (conn->phase == LENGTH || conn->phase == DATA) {
            size_t now = length - at < (size_t)conn->left ? length - at : (size_t)conn->left;
            take_text(conn, data + at, now);
            conn->left -= (long)now;
            at += now;
            if (!conn->left) {
                if (conn->phase == LENGTH) {
                    take_text(conn, "\n", 1);
                    return at == length ? 1 : -1;
                }
                conn->phase = DATA_END;
            }
            continue;
        }
        at++;
        if (conn->phase == DATA_END) {
            if (byte == '\n') {
                conn->phase = SIZE;
                conn->left = 0;
            } else if (byte != '\r') return -1;
        } else if (conn->phase == SIZE) {
            if (byte == '\n') {
                conn->phase = conn->left ? DATA : TRAILER;
                conn->blank = 1;
            } else if (byte >= '0' && byte <= '9') conn->left = 16 * conn->left + byte - '0';
            else if ((byte | 32) >= 'a' && (byte | 32) <= 'f') conn->left = 16 * conn->left + (byte | 32) - 'a' + 10;
            else if (byte != '\r') return -1;
        } else if (byte == '\n') {
            if (conn->blank) return at == length ? 1 : -1;
            conn->blank = 1;
        } else if (byte != '\r') conn->blank = 0;
    }
    return 0;
}

/* Takes the head; the bytes behind it are fed. As feed(). */
static int take_head(Conn *conn, const char *data, size_t length) {
    size_t room = sizeof conn->head - 1 - conn->head_bytes, now = length < room ? length : room, before = conn->head_bytes, used;
    char *end, *field;
    memcpy(conn->head + before, data, now);
    conn->head_bytes += now;
    conn->head[conn->head_bytes] = 0;
    end = strstr(conn->head, "\r\n\r\n");
    if (!end) return now < length ? -1 : 0;
    end[2] = 0;
    if (strncmp(conn->head, "HTTP/1.1 ", 9)) return -1;
    conn->status = atoi(conn->head + 9);
    conn->closes = strcasestr(conn->head, "\r\nconnection: close\r\n") != NULL;
    if (strcasestr(conn->head, "\r\ntransfer-encoding: chunked\r\n")) {
        conn->phase = SIZE;
        conn->left = 0;
    } else if ((field = strcasestr(conn->head, "\r\ncontent-length:"))) {
        conn->phase = LENGTH;
        conn->left = strtol(field + 17, NULL, 10);
        if (!conn->left) return 1;
    } else return -1;
    used = (size_t)(end - conn->head) + 4 - before;
    return feed(conn, data + used, length - used);
}

static void finish(Conn *conn) {
    uint64_t now = now_ns();
    int was_stream = conn->is_stream;
    if (conn->status != 200) return fail(conn, STATUS, conn->line_bytes ? conn->line : conn->head);
    if (conn->failed) return fail(conn, ERROR_EVENT, conn->line);
    if (conn->foreign) return fail(conn, FOREIGN, "an event of another request");
    if (conn->gap || conn->seq != conn->wanted || (!conn->json && !conn->done)) return fail(conn, GAP, "events are missing");
    whole[was_stream]++;
    if (!was_stream) {
        record(&took, now - conn->asked);
        if (now - conn->asked > slow_ns) {
            slow++;
            if (slow < LINES_MAX)
                printf("slow %d %llu %llu %llu %llu %u\n", conn->port, (unsigned long long)conn->asked,
                       (unsigned long long)conn->connected_at, (unsigned long long)conn->first_at, (unsigned long long)now,
                       conn->uses);
        }
    }
    leave_use(conn);
    conn->uses++;
    if (conn->closes && !conn->asks_close) said_close++;
    if (conn->is_kept && !conn->closes) TAILQ_INSERT_TAIL(&idle, conn, link);
    else close_conn(conn, !conn->closes);
}

static void write_request(Conn *conn) {
    if (send(conn->fd, conn->request, conn->request_bytes, MSG_NOSIGNAL) != (ssize_t)conn->request_bytes)
        fail(conn, errno == EPIPE ? EMPTY : RESET, "when the request was sent");
}

static void ask(Conn *conn) {
    char body[320];
    int kind = (int)(conn->number % 3);
    conn->phase = WAITING;
    conn->status = conn->closes = conn->done = conn->failed = conn->foreign = conn->gap = 0;
    conn->head_bytes = conn->line_bytes = 0;
    conn->seq = conn->got = 0;
    conn->json = !conn->is_stream && kind == 0;
    conn->wanted = conn->is_stream ? least + (uint64_t)(chance() * (double)(most - least + 1)) : conn->json ? 1 : 5;
    conn->asked = now_ns();
    conn->deadline = conn->is_stream ? UINT64_MAX : conn->asked + wait_ns;
    conn->in_use = 1;
    snprintf(body, sizeof body,
             "{\"model\":\"scripted\",\"stream\":%s,\"messages\":[{\"role\":\"user\",\"content\":\"script for=%llu events=%llu "
             "rate=%g json=%d\"}]}",
             conn->json ? "false" : "true", (unsigned long long)conn->number, (unsigned long long)conn->wanted,
             conn->is_stream ? stream_rate : kind == 2 ? 50.0 : 0.0, conn->json);
    conn->request_bytes = (size_t)snprintf(
        conn->request, sizeof conn->request,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\n"
        "%sContent-Length: %zu\r\n\r\n%s",
        token, conn->asks_close ? "Connection: close\r\n" : "", strlen(body), body);
    if (conn->connected) write_request(conn);
}

static void open_conn(Conn *conn) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = conn};
    struct sockaddr_un path = {.sun_family = AF_UNIX};
    struct sockaddr_in address = loopback(target_port);
    struct sockaddr *to = target_port ? (struct sockaddr *)&address : (struct sockaddr *)&path;
    int error;
    snprintf(path.sun_path, sizeof path.sun_path, "%s", target);
    connects++;
    conn->connected = conn->port = 0;
    conn->fd = socket(target_port ? AF_INET : AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (conn->fd < 0) die("socket");
    if (target_port) no_delay(conn->fd);
    error = connect(conn->fd, to, target_port ? sizeof address : sizeof path) && errno != EINPROGRESS ? errno : 0;
    ask(conn);
    if (error) fail(conn, CONNECT, strerror(error));
    else epoll_ctl(poller, EPOLL_CTL_ADD, conn->fd, &event);
}

/* Begins one; the caller saw to the room. */
static void start(int is_stream) {
    int is_kept = !is_stream && chance() < kept_share;
    Conn *conn = is_kept && pool_open >= pool ? TAILQ_FIRST(&idle) : NULL; /* the pool is filled first */
    begun[is_stream]++;
    if (is_stream) streams_open++;
    else requests_open++;
    if (conn) {
        TAILQ_REMOVE(&idle, conn, link);
        conn->number = next_number++;
        ask(conn);
        return;
    }
    conn = TAILQ_FIRST(&unused);
    TAILQ_REMOVE(&unused, conn, link);
    memset(conn, 0, offsetof(Conn, head));
    conn->is_stream = is_stream;
    conn->is_kept = is_kept && pool_open < pool;
    pool_open += conn->is_kept;
    conn->asks_close = !is_stream && !conn->is_kept && chance() < close_share;
    conn->number = next_number++;
    open_conn(conn);
}

static void readable(Conn *conn) {
    static char data[262144];
    ssize_t got = recv(conn->fd, data, sizeof data, 0);
    int result;
    if (got < 0 && errno == EAGAIN) return;
    if (!conn->in_use) { /* an idle one: its end is the server's right, a byte is not */
        TAILQ_REMOVE(&idle, conn, link);
        if (got > 0) {
            conn->in_use = 1;
            requests_open++;
            fail(conn, FRAMING, "bytes on an idle connection");
            return;
        }
        idle_closed++;
        close_conn(conn, 0);
        return;
    }
    if (got <= 0) {
        if (!conn->got) fail(conn, got ? RESET : EMPTY, got ? strerror(errno) : "closed without a byte");
        else if (conn->failed) fail(conn, ERROR_EVENT, conn->line);
        else fail(conn, CUT, got ? strerror(errno) : "closed within the answer");
        return;
    }
    if (!conn->got) conn->first_at = now_ns();
    if (!conn->got && !conn->is_stream) record(&first, conn->first_at - conn->asked);
    conn->got += (uint64_t)got;
    if (conn->phase == WAITING) conn->phase = HEAD;
    result = conn->phase == HEAD ? take_head(conn, data, (size_t)got) : feed(conn, data, (size_t)got);
    if (result < 0) fail(conn, FRAMING, "the answer's framing is broken");
    else if (result) finish(conn);
}

static void connected(Conn *conn) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    struct sockaddr_in own;
    socklen_t length = sizeof own;
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(conn->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (target_port && !getsockname(conn->fd, (struct sockaddr *)&own, &length)) conn->port = ntohs(own.sin_port);
    if (error) {
        fail(conn, CONNECT, strerror(error));
        return;
    }
    conn->connected = 1;
    conn->connected_at = now_ns();
    epoll_ctl(poller, EPOLL_CTL_MOD, conn->fd, &event);
    write_request(conn);
}

static void print_counts(const char *name, int is_stream) {
    printf("\"%s\":{\"begun\":%llu,\"whole\":%llu,\"open\":%d,\"failed\":{", name, (unsigned long long)begun[is_stream],
           (unsigned long long)whole[is_stream], is_stream ? streams_open : requests_open);
    for (int kind = 0; kind < KINDS; kind++)
        printf("%s\"%s\":%llu", kind ? "," : "", kind_names[kind], (unsigned long long)failures[is_stream][kind]);
    printf("},\"statuses\":{");
    for (int status = 0, many = 0; status < 600; status++)
        if (statuses[is_stream][status])
            printf("%s\"%d\":%llu", many++ ? "," : "", status, (unsigned long long)statuses[is_stream][status]);
    printf("}},");
}

static void report(void) {
    printf("report {\"at_ns\":%llu,", (unsigned long long)now_ns());
    print_counts("requests", 0);
    print_counts("streams", 1);
    printf("\"connects\":%llu,\"held_back\":%llu,\"idle_closed\":%llu,\"said_close\":%llu,\"events\":%llu,\"slow\":%llu,\"pool\":%d,",
           (unsigned long long)connects, (unsigned long long)held, (unsigned long long)idle_closed, (unsigned long long)said_close,
           (unsigned long long)events, (unsigned long long)slow, pool_open);
    print_histogram("first_byte", &first);
    putchar(',');
    print_histogram("took", &took);
    printf("}\n");
}

static void leave_streams(void) {
    for (int i = 0; i < conn_count; i++)
        if (conns[i].fd >= 0 && conns[i].in_use && conns[i].is_stream) {
            leave_use(&conns[i]);
            close_conn(&conns[i], 1);
        }
}

/* 0: go on. */
static int command(void) {
    static char line[64];
    static size_t length;
    ssize_t got = read(0, line + length, sizeof line - 1 - length);
    char *newline;
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : 1;
    length += (size_t)got;
    line[length] = 0;
    while ((newline = strchr(line, '\n'))) {
        *newline = 0;
        if (!strcmp(line, "go")) going = 1;
        else if (!strcmp(line, "report")) report();
        else if (!strcmp(line, "stop")) stopping = 1;
        else if (!strcmp(line, "leave")) leave_streams();
        else return 1;
        length -= (size_t)(newline + 1 - line);
        memmove(line, newline + 1, length + 1);
    }
    return length == sizeof line - 1;
}

static void expire(uint64_t now) {
    for (int i = 0; i < conn_count; i++)
        if (conns[i].fd >= 0 && conns[i].in_use && conns[i].deadline < now) fail(&conns[i], LATE, "no end within the wait");
}

int main(int argc, char **argv) {
    static struct epoll_event ready[512];
    struct epoll_event typed = {.events = EPOLLIN, .data.ptr = NULL};
    uint64_t last = now_ns(), looked = last;
    double due_requests = 0, due_streams = 0, opens;
    if (argc != 5) return 2;
    target = argv[1];
    target_port = target[0] == '/' ? 0 : atoi(target);
    token = argv[2];
    bound_life((unsigned)atoi(argv[3]));
    rate = option(argv[4], " rate", 100);
    kept_share = option(argv[4], "kept", 0.5);
    close_share = option(argv[4], "close", 0.2);
    pool = (int)option(argv[4], "pool", 200);
    cap = (int)option(argv[4], "cap", 4000);
    streams = (int)option(argv[4], "streams", 0);
    stream_rate = option(argv[4], "stream_rate", 2);
    least = (uint64_t)option(argv[4], "min", 20);
    most = (uint64_t)option(argv[4], "max", 60);
    opens = option(argv[4], "opens", 500);
    wait_ns = (uint64_t)(option(argv[4], "wait", 30) * 1e9);
    slow_ns = (uint64_t)(option(argv[4], "slow", 1) * 1e9);
    srand48((long)getpid());
    conn_count = streams + cap + pool + 8;
    conns = must(calloc((size_t)conn_count, sizeof *conns));
    for (int i = 0; i < conn_count; i++) {
        conns[i].fd = -1;
        TAILQ_INSERT_TAIL(&unused, &conns[i], link);
    }
    poller = epoll_create1(EPOLL_CLOEXEC);
    fcntl(0, F_SETFL, O_NONBLOCK);
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &typed);
    if (!streams) printf("ready\n");
    for (;;) {
        int count = epoll_wait(poller, ready, 512, 1);
        uint64_t now;
        for (int i = 0; i < count; i++) {
            Conn *conn = ready[i].data.ptr;
            if (!conn) {
                if (command()) return 0;
            } else if (conn->fd >= 0 && !conn->connected && ready[i].events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) connected(conn);
            else if (conn->fd >= 0 && conn->connected) readable(conn);
        }
        now = now_ns();
        due_streams += (double)(now - last) / 1e9 * opens;
        if (going) due_requests += (double)(now - last) / 1e9 * rate;
        last = now;
        if (due_streams > 20) due_streams = 20;
        for (; due_streams >= 1 && streams_begun < streams && !stopping; due_streams--, streams_begun++) start(1);
        for (; due_requests >= 1; due_requests--) {
            if (stopping) continue;
            if (requests_open < cap) start(0);
            else held++;
        }
        if (now - looked > 500000000u) {
            looked = now;
            expire(now);
        }
        if (stopping && !said_stopped && !requests_open && !streams_open) {
            said_stopped = 1;
            printf("stopped\n");
        }
    }
}
