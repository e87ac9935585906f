/* The clients: N streams in groups, opened at a bounded pace; counts events, and how late and how evenly they come.
 *
 * Usage: client PORT TOKEN OPENS_PER_S LIFETIME_S GROUP... ; a GROUP is "n=2000 rate=20 bytes=250 burst=1 events=0
 * prompt=0" (prompt: so many bytes of text more in the message). The headers are those of openai-python.
 * Reads commands as lines: `mark` forgets what was measured, `report` prints it (one JSON line), `quit` or end of input ends.
 * Prints "ready OPEN FAILED" once every stream has had an event, has failed, or has ended.
 * Measures, per event that carries "bench_ns" (the upstream's clock is ours, it is one machine):
 *   lag    now - bench_ns                       gap    now - the stream's last event
 *   added  gap - (the upstream's own gap), if later than it should be, else 0
 *   first  lag of the stream's first event       head   from sending the request to the first byte of the answer
 * A stream with burst > 1 counts only a gap after a tick as one that tells of the proxy; all are in `gap`.
 */
#include "common.h"

#define KEY "\"bench_ns\":"
#define KEY_LENGTH 11
#define DIGITS 19
#define CARRY (KEY_LENGTH + DIGITS)
#define GROUPS 8
#define PROMPT_MAX 60000

typedef struct {
    char *request, text[120];
    size_t request_bytes;
    int count, opened, started, failed, ended;
    uint64_t events, bytes;
    Histogram lag, gap, added, first, head;
} Group;

typedef struct {
    int fd;
    Group *group;
    int connected, answered, had_event, over;
    uint64_t asked, last_at, last_stamp;
    size_t carried;
    char carry[CARRY];
} Stream;

static Group groups[GROUPS];
static int group_count, poller, port, total;
static const char *token;
static Stream *streams;
static int said_ready;

static void maybe_ready(void) {
    int settled = 0, failed = 0;
    if (said_ready) return;
    for (int i = 0; i < group_count; i++) {
        settled += groups[i].started + groups[i].failed;
        failed += groups[i].failed;
    }
    if (settled < total) return;
    said_ready = 1;
    printf("ready %d %d\n", total - failed, failed);
}

static void over(Stream *stream, const char *why) {
    if (stream->over) return;
    stream->over = 1;
    if (stream->fd >= 0) close(stream->fd);
    if (stream->had_event) stream->group->ended++;
    else {
        if (!stream->group->failed) fprintf(stderr, "client: a stream failed: %s\n", why);
        stream->group->failed++;
    }
    maybe_ready();
}

static void open_stream(Stream *stream) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = stream};
    struct linger at_once = {1, 0};
    int buffer = 2 * PROMPT_MAX;
    stream->fd = dial(port);
    /* an RST at the end: no port waits in TIME_WAIT for the next round */
    setsockopt(stream->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    setsockopt(stream->fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    epoll_ctl(poller, EPOLL_CTL_ADD, stream->fd, &event);
    stream->group->opened++;
}

static void ask(Stream *stream) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = stream};
    Group *group = stream->group;
    stream->connected = 1;
    stream->asked = now_ns();
    if (send(stream->fd, group->request, group->request_bytes, MSG_NOSIGNAL) != (ssize_t)group->request_bytes) {
        over(stream, strerror(errno));
        return;
    }
    epoll_ctl(poller, EPOLL_CTL_MOD, stream->fd, &event);
}

/* The request of every stream of a group. The send buffer takes it whole (PROMPT_MAX). */
static void compose(Group *group) {
    size_t prompt = (size_t)option(group->text, "prompt", 0), room;
    char *body, *at;
    if (prompt > PROMPT_MAX) prompt = PROMPT_MAX;
    room = prompt + 4096 + strlen(token);
    body = must(malloc(room));
    at = body + sprintf(body, "{\"model\":\"bench\",\"stream\":true,\"messages\":[{\"role\":\"user\",\"content\":\"bench %s ",
                        group->text);
    for (size_t i = 0; i < prompt; i++) *at++ = i % 6 == 5 ? ' ' : 'p';
    strcpy(at, "\"}]}");
    group->request = must(malloc(room));
    group->request_bytes = (size_t)sprintf(
        group->request,
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept-Encoding: gzip, deflate\r\n"
        "Connection: keep-alive\r\nAccept: application/json\r\nContent-Type: application/json\r\n"
        "User-Agent: OpenAI/Python 3.52.0\r\nX-Stainless-Lang: python\r\nX-Stainless-Package-Version: 3.52.0\r\n"
        "X-Stainless-OS: Linux\r\nX-Stainless-Arch: x64\r\nX-Stainless-Runtime: CPython\r\n"
        "X-Stainless-Runtime-Version: 3.11.7\r\nAuthorization: Bearer %s\r\nX-Stainless-Async: false\r\n"
        "x-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\nContent-Length: %zu\r\n\r\n%s",
        port, token, strlen(body), body);
    free(body);
}

static void on_event(Stream *stream, uint64_t stamp, uint64_t now) {
    Group *group = stream->group;
    uint64_t lag = now > stamp ? now - stamp : 0;
    group->events++;
    record(&group->lag, lag);
    if (!stream->had_event) {
        stream->had_event = 1;
        group->started++;
        record(&group->first, lag);
        maybe_ready();
    } else {
        uint64_t gap = now - stream->last_at, made = stamp - stream->last_stamp;
        record(&group->gap, gap);
        record(&group->added, gap > made ? gap - made : 0);
    }
    stream->last_at = now;
    stream->last_stamp = stamp;
}

static void readable(Stream *stream) {
    static char space[CARRY + 262144 + 1];
    char *data = space + CARRY, *at, *end;
    ssize_t got = recv(stream->fd, data, 262144, 0);
    uint64_t now = now_ns();
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) over(stream, got ? strerror(errno) : "the proxy closed it");
        return;
    }
    stream->group->bytes += (uint64_t)got;
    end = data + got;
    if (!stream->answered) {
        stream->answered = 1;
        record(&stream->group->head, now - stream->asked);
        if (got < 12 || memcmp(data + 9, "200", 3)) {
            *end = 0;
            data[got < 600 ? got : 600] = 0;
            over(stream, data);
            return;
        }
    }
    at = data - stream->carried;
    memcpy(at, stream->carry, stream->carried);
    stream->carried = 0;
    for (;;) {
        char *key = memmem(at, (size_t)(end - at), KEY, KEY_LENGTH);
        uint64_t stamp = 0;
        if (!key) {
            stream->carried = (size_t)(end - at) < KEY_LENGTH - 1 ? (size_t)(end - at) : KEY_LENGTH - 1;
            break;
        }
        if (end - key < CARRY) {
            stream->carried = (size_t)(end - key);
            break;
        }
        for (int digit = 0; digit < DIGITS; digit++) stamp = 10 * stamp + (uint64_t)(key[KEY_LENGTH + digit] - '0');
        at = key + CARRY;
        on_event(stream, stamp, now);
    }
    memcpy(stream->carry, end - stream->carried, stream->carried);
}

static void forget(void) {
    for (int i = 0; i < group_count; i++) {
        Group *group = &groups[i];
        group->events = group->bytes = 0;
        memset(&group->lag, 0, sizeof group->lag);
        memset(&group->gap, 0, sizeof group->gap);
        memset(&group->added, 0, sizeof group->added);
        memset(&group->first, 0, sizeof group->first);
        memset(&group->head, 0, sizeof group->head);
    }
}

static void report(void) {
    printf("{\"at_ns\":%llu,\"groups\":[", (unsigned long long)now_ns());
    for (int i = 0; i < group_count; i++) {
        Group *group = &groups[i];
        printf("%s{\"asked\":\"%s\",\"streams\":%d,\"started\":%d,\"failed\":%d,\"ended\":%d,\"events\":%llu,\"bytes\":%llu,",
               i ? "," : "", group->text, group->count, group->started, group->failed, group->ended,
               (unsigned long long)group->events, (unsigned long long)group->bytes);
        print_histogram("lag", &group->lag);
        putchar(',');
        print_histogram("gap", &group->gap);
        putchar(',');
        print_histogram("added", &group->added);
        putchar(',');
        print_histogram("first", &group->first);
        putchar(',');
        print_histogram("head", &group->head);
        putchar('}');
    }
    printf("]}\n");
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
        if (!strcmp(line, "mark")) forget();
        else if (!strcmp(line, "report")) report();
        else return 1;
        length -= (size_t)(newline + 1 - line);
        memmove(line, newline + 1, length + 1);
    }
    return length == sizeof line - 1;
}

int main(int argc, char **argv) {
    struct epoll_event events[512];
    struct epoll_event typed = {.events = EPOLLIN, .data.ptr = NULL};
    uint64_t start;
    double pace;
    int next = 0;
    if (argc < 6 || argc > 5 + GROUPS) return 2;
    port = atoi(argv[1]);
    token = argv[2];
    pace = strtod(argv[3], NULL);
    bound_life((unsigned)atoi(argv[4]));
    group_count = argc - 5;
    for (int i = 0; i < group_count; i++) {
        Group *group = &groups[i];
        group->count = (int)option(argv[5 + i], "n", 1);
        snprintf(group->text, sizeof group->text, "%s", argv[5 + i]);
        compose(group);
        total += group->count;
    }
    streams = must(calloc((size_t)total, sizeof *streams));
    for (int i = 0, at = 0; i < group_count; i++)
        for (int k = 0; k < groups[i].count; k++) streams[at++] = (Stream){.fd = -1, .group = &groups[i]};
    poller = epoll_create1(EPOLL_CLOEXEC);
    fcntl(0, F_SETFL, O_NONBLOCK);
    epoll_ctl(poller, EPOLL_CTL_ADD, 0, &typed);
    start = now_ns();
    for (;;) {
        int count = epoll_wait(poller, events, 512, next < total ? 1 : -1);
        for (int i = 0; i < count; i++) {
            Stream *stream = events[i].data.ptr;
            if (!stream) {
                if (command()) return 0;
                continue;
            }
            if (stream->over) continue;
            if (!stream->connected && events[i].events & (EPOLLOUT | EPOLLERR)) ask(stream);
            else if (events[i].events) readable(stream);
        }
        while (next < total && (double)next < (double)(now_ns() - start) / 1e9 * pace) open_stream(&streams[next++]);
    }
}
