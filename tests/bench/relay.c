/* The floor: a bare epoll relay. One upstream connection a client, recv -> send, nothing parsed, nothing counted.
 *
 * Usage: relay UPSTREAM_PORT LIFETIME_S. Level-triggered, one bounded recv a readiness. A side whose peer does not take all is
 * not read until it does (its bytes wait in `held`).
 */
#include "common.h"

typedef struct Side {
    int fd;
    struct Side *peer;
    char *held; /* bytes for the peer that it did not take */
    size_t held_bytes;
    uint32_t mask;
    int dead;
} Side;

static int poller;
static Side *graveyard[4096];
static int buried;

static void watch(Side *side, uint32_t mask) {
    struct epoll_event event = {.events = mask, .data.ptr = side};
    if (side->mask == mask) return;
    epoll_ctl(poller, side->mask ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, side->fd, &event);
    side->mask = mask;
}

/* Closes both; memory goes at the end of the turn, since this turn's events may still point to it. */
static void end(Side *side) {
    Side *both[2] = {side, side->peer};
    for (int i = 0; i < 2; i++) {
        if (both[i]->dead) continue;
        both[i]->dead = 1;
        close(both[i]->fd);
        free(both[i]->held);
        both[i]->held = NULL;
        graveyard[buried++] = both[i];
    }
}

static void readable(Side *from) {
    static char buffer[65536];
    Side *to = from->peer;
    ssize_t got = recv(from->fd, buffer, sizeof buffer, 0), sent;
    if (got <= 0) {
        if (got == 0 || errno != EAGAIN) end(from);
        return;
    }
    sent = send(to->fd, buffer, (size_t)got, MSG_NOSIGNAL);
    if (sent == got) return;
    if (sent < 0) {
        if (errno != EAGAIN && errno != ENOTCONN) {
            end(from);
            return;
        }
        sent = 0;
    }
    from->held_bytes = (size_t)(got - sent);
    from->held = must(malloc(from->held_bytes));
    memcpy(from->held, buffer + sent, from->held_bytes);
    watch(from, EPOLLRDHUP);
    watch(to, EPOLLIN | EPOLLOUT);
}

static void writable(Side *to) {
    Side *from = to->peer;
    ssize_t sent;
    if (from->held_bytes) {
        sent = send(to->fd, from->held, from->held_bytes, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN) end(to);
            return;
        }
        from->held_bytes -= (size_t)sent;
        memmove(from->held, from->held + sent, from->held_bytes);
        if (from->held_bytes) return;
        free(from->held);
        from->held = NULL;
    }
    watch(to, EPOLLIN);
    watch(from, EPOLLIN);
}

int main(int argc, char **argv) {
    struct epoll_event events[512];
    struct epoll_event accepting = {.events = EPOLLIN, .data.ptr = NULL};
    int listener, port;
    if (argc != 3) return 2;
    port = atoi(argv[1]);
    bound_life((unsigned)atoi(argv[2]));
    poller = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_anywhere();
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepting);
    for (;;) {
        int count = epoll_wait(poller, events, 512, -1);
        for (int i = 0; i < count; i++) {
            Side *side = events[i].data.ptr;
            if (!side) {
                int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                Side *client, *upstream;
                if (fd < 0) continue;
                no_delay(fd);
                client = must(calloc(1, sizeof *client));
                upstream = must(calloc(1, sizeof *upstream));
                *client = (Side){.fd = fd, .peer = upstream};
                *upstream = (Side){.fd = dial(port), .peer = client};
                watch(client, EPOLLIN);
                watch(upstream, EPOLLIN);
                continue;
            }
            if (!side->dead && events[i].events & EPOLLOUT) writable(side);
            if (!side->dead && events[i].events & EPOLLIN) readable(side);
            else if (!side->dead && events[i].events & (EPOLLERR | EPOLLHUP | EPOLLRDHUP)) end(side);
        }
        while (buried) free(graveyard[--buried]);
    }
}
