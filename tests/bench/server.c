/*
 * An HTTP/1.1 server that costs as little as one can: what proxies are measured in front of. Answers from memory, and nothing but
 * `GET /N`, with N bytes; connections are kept, and take a request at a time.
 *
 *   server PORT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define PIECE (256 << 10)

struct connection {
    int socket;
    size_t asked;    /* bytes of a request that have come */
    size_t head;     /* bytes of an answer's head that have not been sent, at the end of `answer` */
    size_t body;     /* and of its body */
    char request[4096];
    char answer[128];
    size_t length;   /* of `answer` */
};

static char body[PIECE];

static int check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "server: %s: %s\n", what, strerror(errno));
        exit(1);
    }
    return result;
}

/* Sends what the kernel takes; 0 when the connection has broken. */
static int answer(struct connection *c)
{
    while (c->head || c->body) {
        const char *from = c->head ? c->answer + c->length - c->head : body;
        size_t want = c->head ? c->head : c->body < PIECE ? c->body : PIECE;
        ssize_t sent = send(c->socket, from, want, MSG_NOSIGNAL | (c->head && c->body ? MSG_MORE : 0));
        if (sent < 0)
            return errno == EAGAIN;
        if (c->head)
            c->head -= sent;
        else
            c->body -= sent;
    }
    return 1;
}

/* Reads a request, and begins to answer it; 0 when the connection has ended. */
static int ask(struct connection *c)
{
    ssize_t got = recv(c->socket, c->request + c->asked, sizeof c->request - 1 - c->asked, 0);
    if (got <= 0)
        return got < 0 && errno == EAGAIN;
    c->asked += got;
    c->request[c->asked] = 0;
    if (!strstr(c->request, "\r\n\r\n"))
        return c->asked < sizeof c->request - 1;
    c->asked = 0;
    if (sscanf(c->request, "GET /%zu", &c->body) != 1)
        return 0;
    c->length = c->head = snprintf(c->answer, sizeof c->answer, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", c->body);
    return answer(c);
}

int main(int argc, char **argv)
{
    if (argc != 2) {
        fprintf(stderr, "usage: server PORT\n");
        return 2;
    }
    memset(body, 'x', sizeof body);
    int listener = check(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), "a socket"), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(atoi(argv[1]))};
    check(bind(listener, (struct sockaddr *)&here, sizeof here), "the port");
    check(listen(listener, 512), "the port");
    int events = check(epoll_create1(EPOLL_CLOEXEC), "epoll");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    check(epoll_ctl(events, EPOLL_CTL_ADD, listener, &event), "epoll");
    for (;;) {
        struct epoll_event ready[64];
        int count = epoll_wait(events, ready, 64, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = ready[i].data.ptr;
            if (!c) {
                int socket = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
                if (socket < 0)
                    continue;
                setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                c = calloc(1, sizeof *c);
                check(c ? 0 : -1, "memory");
                c->socket = socket;
                event = (struct epoll_event){.events = EPOLLIN | EPOLLOUT | EPOLLET, .data.ptr = c};
                check(epoll_ctl(events, EPOLL_CTL_ADD, socket, &event), "epoll");
                continue;
            }
            if (!(c->head || c->body ? answer(c) && (c->head || c->body || ask(c)) : ask(c))) {
                close(c->socket);
                free(c);
            }
        }
    }
}
