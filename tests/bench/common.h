/* What the three load tools share: time, sockets, histograms, a life that ends.
 *
 * Every tool listens on, or connects to, loopback only; prints what it knows as lines on stdout; ends when its parent ends
 * (PR_SET_PDEATHSIG) and in any case after its lifetime (alarm). Error policy: a tool that cannot work says why and exits 1.
 */
#ifndef PROXYD_BENCH_COMMON_H
#define PROXYD_BENCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static inline uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * 1000000000u + (uint64_t)at.tv_nsec;
}

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void *must(void *memory) {
    if (!memory) die("malloc");
    return memory;
}

/* Ends with the parent, and after `seconds` whatever happens; takes every fd the hard limit allows. */
static inline void bound_life(unsigned seconds) {
    struct rlimit files;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() == 1) exit(1);
    alarm(seconds);
    signal(SIGPIPE, SIG_IGN);
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
}

static inline struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {0};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons((uint16_t)port);
    return address;
}

static inline void no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* A non-blocking listener on a port of the kernel's choice, printed as "port N". */
static inline int listen_anywhere(void) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = loopback(0);
    socklen_t length = sizeof address;
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 8192) ||
        getsockname(fd, (struct sockaddr *)&address, &length))
        die("listen");
    printf("port %d\n", ntohs(address.sin_port));
    return fd;
}

/* A connect under way. */
static inline int dial(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = loopback(port);
    if (fd < 0) die("socket");
    no_delay(fd);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    return fd;
}

/* The number behind `key=` in text, or `otherwise`. */
static inline double option(const char *text, const char *key, double otherwise) {
    char name[32];
    const char *at;
    snprintf(name, sizeof name, "%s=", key);
    at = strstr(text, name);
    return at ? strtod(at + strlen(name), NULL) : otherwise;
}

/* Log-linear histogram of nanoseconds: 64 steps an octave, so a percentile is at most 1.6 % too high. */
#define STEPS 64
typedef struct {
    uint64_t count, sum, max;
    uint64_t cells[40 * STEPS];
} Histogram;

static inline void record(Histogram *h, uint64_t ns) {
    unsigned octave = 0;
    uint64_t value = ns;
    while (value >= 2 * STEPS) {
        value >>= 1;
        octave++;
    }
    if (octave > 38) octave = 38;
    h->cells[octave * STEPS + (value < 2 * STEPS ? value : 2 * STEPS - 1)]++;
    h->count++;
    h->sum += ns;
    if (ns > h->max) h->max = ns;
}

static inline uint64_t percentile(const Histogram *h, double share) {
    uint64_t wanted = (uint64_t)(share * (double)h->count), seen = 0;
    for (unsigned cell = 0; cell < 40 * STEPS; cell++) {
        seen += h->cells[cell];
        if (seen > wanted) {
            unsigned octave = cell < 2 * STEPS ? 0 : cell / STEPS - 1;
            uint64_t top = ((uint64_t)(cell - octave * STEPS) + 1) << octave;
            return top < h->max ? top : h->max;
        }
    }
    return h->max;
}

/* `"name":{"count":..,"mean_us":..,"p50_us":..,...}` */
static inline void print_histogram(const char *name, const Histogram *h) {
    printf("\"%s\":{\"count\":%llu,\"mean_us\":%.1f,\"p50_us\":%.1f,\"p95_us\":%.1f,\"p99_us\":%.1f,\"p999_us\":%.1f,"
           "\"max_us\":%.1f}",
           name, (unsigned long long)h->count, h->count ? (double)h->sum / (double)h->count / 1e3 : 0.0,
           (double)percentile(h, 0.5) / 1e3, (double)percentile(h, 0.95) / 1e3, (double)percentile(h, 0.99) / 1e3,
           (double)percentile(h, 0.999) / 1e3, (double)h->max / 1e3);
}

#endif
