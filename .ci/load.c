/* load: a WebSocket client that keeps an echo server busy and checks every byte that comes back.
 *
 *   load HOST PORT CONNECTIONS IN_FLIGHT BYTES SECONDS KIND
 *
 * KIND  text, binary           each connection keeps IN_FLIGHT messages of BYTES bytes under way (text is ASCII)
 *       raw                    the same bytes over bare TCP
 *       idle                   open the connections, say so, and hold them for SECONDS
 *       connect                open the connections one after the other; each is closed before the next
 *       raw-idle, raw-connect  the same over bare TCP, where the request itself must come back
 *
 * Prints one JSON object. If anything is wrong it prints one line on stderr and exits with status 1.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE = 5, LIMIT = 60 }; /* seconds to wait for an answer, and for everything */

typedef struct {
    int fd;
    uint64_t sent, done;     /* bytes sent; messages that have come back */
    uint64_t at, left;       /* bytes that have come of the message; bytes that the frame still lacks */
    uint8_t head[10];        /* of the frame */
    int head_size, in_payload, fin;
} connection;

static int raw, opcode;
static uint64_t size, frame_size, variants, depth, total;
static uint8_t *pattern, *frames, buffer[1 << 18];

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void fail(const char *what, const char *detail) {
    fprintf(stderr, "%s%s\n", what, detail);
    exit(1);
}

/* Message i is variant i % variants: the same noise, each time one byte further on, so that a message that is lost,
 * doubled or out of its order is seen. The frames of all variants follow each other, for many to leave in one call. */
static void make_frames(void) {
    int long_size = size > 65535 ? 8 : size > 125 ? 2 : 0;
    frame_size = 2 + long_size + 4 + size;
    variants = frame_size < 65536 / 3 ? 65536 / frame_size : 3;
    pattern = malloc(size + variants);
    frames = malloc(variants * frame_size);
    uint32_t noise = 1;
    for (uint64_t i = 0; i < size + variants; i++) {
        noise = noise * 1103515245 + 12345;
        pattern[i] = opcode == 1 ? 'a' + (noise >> 16) % 26 : noise >> 16;
    }
    for (uint64_t v = 0; v < variants; v++) {
        uint8_t *p = frames + v * frame_size, *mask = p + 2 + long_size;
        *p++ = 0x80 | opcode;
        *p++ = 0x80 | (long_size == 8 ? 127 : long_size == 2 ? 126 : size);
        for (int i = long_size - 1; i >= 0; i--) *p++ = size >> 8 * i;
        for (int i = 0; i < 4; i++) *p++ = rand();
        for (uint64_t i = 0; i < size; i++) *p++ = pattern[v + i] ^ mask[i & 3];
    }
}

static int open_connection(const char *host, int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct timeval patience = {PATIENCE, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, n = 0, k;
    inet_pton(AF_INET, host, &address.sin_addr);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (fd < 0 || connect(fd, (void *)&address, sizeof address)) fail("connecting: ", strerror(errno));
    char request[256], reply[4096];
    int length = snprintf(request, sizeof request,
        "GET / HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", host, port);
    if (write(fd, request, length) != length) fail("opening handshake: ", strerror(errno));
    do { /* the server says nothing more until it is asked, so this reads no further than the headers */
        k = read(fd, reply + n, sizeof reply - 1 - n);
        if (k <= 0) fail("opening handshake: ", k ? strerror(errno) : "the server closes the connection");
        reply[n += k] = 0;
    } while (n < 4 || strcmp(reply + n - 4, "\r\n\r\n"));
    if (raw && strcmp(reply, request)) fail("wrong bytes come back", "");
    if (!raw && (strncmp(reply, "HTTP/1.1 101 ", 13) || !strstr(reply, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="))) {
        reply[strcspn(reply, "\r\n")] = 0;
        fail("opening handshake refused: ", reply);
    }
    return fd;
}

/* Send what may be under way and the socket takes. */
static void send_more(connection *c) {
    uint64_t limit = (c->done + depth) * frame_size, run = variants * frame_size;
    if (!depth) limit = (c->sent + frame_size - 1) / frame_size * frame_size; /* at the end: only finish a message */
    while (c->sent < limit) {
        uint64_t at = c->sent % run, n = run - at < limit - c->sent ? run - at : limit - c->sent;
        ssize_t k = write(c->fd, frames + at, n);
        if (k < 0 && errno == EAGAIN) return;
        if (k < 0) fail("sending: ", strerror(errno));
        c->sent += k;
    }
}

/* Check what has come. Over bare TCP a message is a frame as it was sent; otherwise it is one frame or several. */
static void check(connection *c, const uint8_t *p, const uint8_t *end) {
    const uint64_t whole = raw ? frame_size : size;
    while (p < end) {
        if (!c->in_payload && raw) c->left = whole;
        else if (!c->in_payload) {
            c->head[c->head_size++] = *p++;
            int length = c->head_size < 2 ? 0 : c->head[1] & 127, need = length == 127 ? 10 : length == 126 ? 4 : 2;
            if (c->head_size < need) continue;
            if (c->head[0] == 0x88) fail("the server sends Close", "");
            if ((c->head[0] & 0x7f) != (c->fin ? opcode : 0)) fail("a frame of the wrong kind comes back", "");
            if (c->head[1] & 0x80) fail("a masked frame comes back", "");
            c->left = need == 2 ? length : 0;
            for (int i = 2; i < need; i++) c->left = c->left << 8 | c->head[i];
            c->fin = c->head[0] >> 7;
            if (c->left > whole - c->at) fail("a longer message comes back", "");
        }
        c->in_payload = 1;
        uint64_t v = c->done % variants, n = c->left < (uint64_t)(end - p) ? c->left : (uint64_t)(end - p);
        if (memcmp(p, (raw ? frames + v * frame_size : pattern + v) + c->at, n)) fail("wrong bytes come back", "");
        p += n;
        c->at += n;
        if (c->left -= n) return;
        c->in_payload = c->head_size = 0;
        if (!c->fin) continue;
        if (c->at != whole) fail("a shorter message comes back", "");
        c->at = 0, c->done++, total++;
    }
}

static void work(connection *c) {
    ssize_t got;
    do {
        send_more(c);
        got = read(c->fd, buffer, sizeof buffer);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) fail(got ? "receiving: " : "the server closes the connection", got ? strerror(errno) : "");
        check(c, buffer, buffer + got);
    } while (got == sizeof buffer); /* less means that no more is there, and epoll tells when more comes */
    send_more(c);
}

int main(int argc, char **argv) {
    if (argc != 8 || atoi(argv[3]) < 1) fail("usage: load HOST PORT CONNECTIONS IN_FLIGHT BYTES SECONDS KIND", "");
    const char *kind = argv[7];
    int port = atoi(argv[2]), count = atoi(argv[3]), idle = !!strstr(kind, "idle"), brief = !!strstr(kind, "connect");
    double seconds = atof(argv[6]);
    raw = !strncmp(kind, "raw", 3);
    opcode = strcmp(kind, "binary") ? 1 : 2;
    depth = strtoull(argv[4], 0, 10);
    size = strtoull(argv[5], 0, 10);
    signal(SIGPIPE, SIG_IGN); /* a server that closes is reported */
    alarm(LIMIT); /* which ends it */
    make_frames();

    connection *all = calloc(count, sizeof *all), *c;
    int poller = epoll_create1(0);
    double start = now(), since = 0;
    for (c = all; c < all + count; c++) {
        c->fd = open_connection(argv[1], port);
        c->fin = 1;
        if (brief) close(c->fd);
    }
    if (idle || brief) {
        printf("{\"connections/s\": %.1f}\n", count / (now() - start));
        fflush(stdout);
        if (idle) usleep(seconds * 1e6);
        for (c = all; idle && c < all + count; c++) {
            if (recv(c->fd, buffer, 1, MSG_DONTWAIT) >= 0 || errno != EAGAIN) fail("an idle connection ends", "");
        }
        return 0;
    }
    for (c = all; c < all + count; c++) {
        fcntl(c->fd, F_SETFL, O_NONBLOCK);
        struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
        epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event);
    }

    /* A third of the time warms up. After the end nothing new is sent, and what is under way must still come. */
    double heard = now(), warm = heard + seconds / 3, end = warm + seconds;
    uint64_t before = 0, messages = 0;
    for (int waiting = 1; waiting;) {
        struct epoll_event events[256];
        int ready = epoll_wait(poller, events, 256, 100);
        for (int i = 0; i < ready; i++) work(events[i].data.ptr);
        double t = now();
        if (ready > 0) heard = t;
        if (t - heard > PATIENCE) fail("no answer comes", "");
        if (!since && t >= warm) before = total, since = t, end = t + seconds;
        if (t < end) continue;
        if (depth) messages = total - before, end = t, depth = 0;
        for (waiting = 0, c = all; c < all + count; c++) waiting += c->done * frame_size < c->sent;
    }
    double rate = messages / (end - since);
    printf("{\"messages/s\": %.2f, \"MB/s\": %.3f}\n", rate, rate * size / 1e6);
    return 0;
}
