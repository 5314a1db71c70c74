/*
 * The system calls that a sandbox's disk and network need, in a row and with nothing around them: what privd is measured against.
 * No protocol, no peer, no checks, no names but its own, no log, no undo.
 *
 *   bare ORIGIN-MINOR RULES     RULES: a file with the netlink batch that loads a sandbox's packet filter
 *
 * Each line on standard input, `NAME COW SECTORS SLOT`, lets go of what the last one made, and makes a disk and a network; answered with a
 * line of the nanoseconds that each took and the disk's minor number. An empty line lets go alone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/loop.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef TUNGETDEVNETNS
#define TUNGETDEVNETNS _IO('T', 227)
#endif

static int check(int result, const char *what)
{
    if (result < 0) {
        fprintf(stderr, "bare: %s: %s\n", what, strerror(errno));
        exit(1);
    }
    return result;
}

static long long now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * 1000000000LL + at.tv_nsec;
}

/* --- disk --- */

static int control, loops;
static unsigned origin_minor, disk_minor;

union dm {
    struct dm_ioctl head;
    char bytes[1024];
};

static void dm(unsigned long call, union dm *ask, const char *name, const char *what)
{
    ask->head.version[0] = 4;
    ask->head.data_size = sizeof *ask;
    ask->head.data_start = sizeof ask->head;
    strcpy(ask->head.name, name);
    check(ioctl(control, call, ask), what);
}

static int make_disk(const char *name, const char *file, unsigned long long sectors)
{
    int number = check(ioctl(loops, LOOP_CTL_GET_FREE), "LOOP_CTL_GET_FREE");
    char path[64];
    snprintf(path, sizeof path, "/dev/loop%d", number);
    int device = check(open(path, O_RDWR | O_CLOEXEC), path);
    int cow = check(open(file, O_RDWR | O_CLOEXEC), file);
    struct loop_config config = {.fd = cow, .block_size = 0, .info = {.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO}};
    check(ioctl(device, LOOP_CONFIGURE, &config), "LOOP_CONFIGURE");
    close(cow);

    union dm ask;
    memset(&ask, 0, sizeof ask);
    dm(DM_DEV_CREATE, &ask, name, "DM_DEV_CREATE");
    unsigned major = (ask.head.dev >> 8) & 0xfff, minor = (ask.head.dev & 0xff) | ((ask.head.dev >> 12) & 0xfff00);
    disk_minor = minor;
    memset(&ask, 0, sizeof ask);
    ask.head.target_count = 1;
    struct dm_target_spec *target = (void *)(ask.bytes + sizeof ask.head);
    target->length = sectors;
    strcpy(target->target_type, "snapshot");
    snprintf((char *)(target + 1), 200, "%u:%u 7:%d P 8", major, origin_minor, number);
    dm(DM_TABLE_LOAD, &ask, name, "DM_TABLE_LOAD");
    memset(&ask, 0, sizeof ask);
    dm(DM_DEV_SUSPEND, &ask, name, "resume");
    snprintf(path, sizeof path, "/dev/dm-%u", minor);
    int disk = check(open(path, O_RDWR | O_CLOEXEC), path);
    check(fchown(disk, 61184, 0), "fchown");
    check(fchmod(disk, 0600), "fchmod");
    memset(&ask, 0, sizeof ask);
    ask.head.flags = DM_DEFERRED_REMOVE;
    dm(DM_DEV_REMOVE, &ask, name, "DM_DEV_REMOVE");
    close(device);
    return disk;
}

/* --- network --- */

static char rules[64 << 10];
static ssize_t rules_length;

struct message {
    struct nlmsghdr head;
    char rest[512];
};

static void *put(struct message *m, const void *data, size_t length)
{
    void *at = (char *)m + NLMSG_ALIGN(m->head.nlmsg_len);
    if (data)
        memcpy(at, data, length);
    m->head.nlmsg_len = NLMSG_ALIGN(m->head.nlmsg_len) + length;
    return at;
}

static struct rtattr *attribute(struct message *m, int kind, const void *data, size_t length)
{
    struct rtattr head = {.rta_len = RTA_LENGTH(length), .rta_type = kind};
    struct rtattr *at = put(m, &head, sizeof head);
    if (length)
        put(m, data, length);
    return at;
}

static void end(struct message *m, struct rtattr *nest)
{
    nest->rta_len = (char *)m + NLMSG_ALIGN(m->head.nlmsg_len) - (char *)nest;
}

static struct message begin(int kind, int flags, const void *header, size_t length)
{
    struct message m;
    memset(&m, 0, sizeof m);
    m.head = (struct nlmsghdr){.nlmsg_len = NLMSG_HDRLEN, .nlmsg_type = kind, .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags};
    put(&m, header, length);
    return m;
}

static void ask(int netlink, struct message *m, const char *what)
{
    char answer[4096];
    check(send(netlink, m, m->head.nlmsg_len, 0), what);
    check(recv(netlink, answer, sizeof answer, 0), what);
    struct nlmsgerr *error = NLMSG_DATA((struct nlmsghdr *)answer);
    if (((struct nlmsghdr *)answer)->nlmsg_type == NLMSG_ERROR && error->error) {
        errno = -error->error;
        check(-1, what);
    }
}

static int index_of(int netlink, const char *name)
{
    struct ifinfomsg link = {.ifi_family = AF_UNSPEC};
    char answer[8192];
    struct message m = begin(RTM_GETLINK, 0, &link, sizeof link);
    attribute(&m, IFLA_IFNAME, name, strlen(name) + 1);
    check(send(netlink, &m, m.head.nlmsg_len, 0), name);
    check(recv(netlink, answer, sizeof answer, 0), name);
    int index = ((struct ifinfomsg *)NLMSG_DATA((struct nlmsghdr *)answer))->ifi_index;
    check(recv(netlink, answer, sizeof answer, 0), "the end of an answer");
    return index;
}

static void set_up(int netlink, int index, unsigned address, int prefix)
{
    struct ifaddrmsg header = {.ifa_family = AF_INET, .ifa_prefixlen = prefix, .ifa_index = index};
    struct message m = begin(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, &header, sizeof header);
    unsigned bytes = htonl(address);
    attribute(&m, IFA_LOCAL, &bytes, 4);
    attribute(&m, IFA_ADDRESS, &bytes, 4);
    ask(netlink, &m, "an address");
    struct ifinfomsg up = {.ifi_index = index, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    m = begin(RTM_NEWLINK, 0, &up, sizeof up);
    /* No IPv6 address of its own making. */
    struct rtattr *families = attribute(&m, IFLA_AF_SPEC | NLA_F_NESTED, NULL, 0);
    struct rtattr *inet6 = attribute(&m, AF_INET6 | NLA_F_NESTED, NULL, 0);
    char none = 1;
    attribute(&m, 8 /* IFLA_INET6_ADDR_GEN_MODE */, &none, 1);
    end(&m, inet6);
    end(&m, families);
    ask(netlink, &m, "a link's start");
}

static void route(int netlink, unsigned destination, int prefix, unsigned gateway, int index)
{
    struct rtmsg header = {.rtm_family = AF_INET, .rtm_dst_len = prefix, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
                           .rtm_scope = RT_SCOPE_UNIVERSE, .rtm_type = RTN_UNICAST};
    struct message m = begin(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, &header, sizeof header);
    unsigned to = htonl(destination), through = htonl(gateway);
    if (prefix)
        attribute(&m, RTA_DST, &to, 4);
    attribute(&m, RTA_GATEWAY, &through, 4);
    attribute(&m, RTA_OIF, &index, 4);
    ask(netlink, &m, "a route");
}

static int slot, tap;

static void *make_network(void *unused)
{
    char name[IFNAMSIZ], answer[65536];
    const unsigned char mac[6] = {2, 0xfc, 0, 0, 0, 6}, guest_mac[6] = {2, 0xfc, 0, 0, 0, 5};
    unsigned outer_address = 0x0a0c0000 + 2 * slot, inner_address = outer_address + 1, host = 0x0a0b0000 + slot;
    unsigned gateway = 0xa9fe0016, guest = 0xa9fe0015;
    int outside = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), "a socket");
    check(unshare(CLONE_NEWNET), "a namespace");
    tap = check(open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK), "/dev/net/tun");
    struct ifreq wanted = {.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR};
    strcpy(wanted.ifr_name, "tap0");
    check(ioctl(tap, TUNSETIFF, &wanted), "TUNSETIFF");
    int namespace = check(ioctl(tap, TUNGETDEVNETNS, 0), "TUNGETDEVNETNS");
    int inside = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), "a socket");

    int filter = check(socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER), "a socket");
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    int room = 1 << 20;
    check(setsockopt(filter, SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof room), "a buffer");
    check(sendto(filter, rules, rules_length, 0, (struct sockaddr *)&kernel, sizeof kernel), "the rules");
    /* Answers, of which an error is one; without any the kernel took them, as a batch asks for none. */
    while (recv(filter, answer, sizeof answer, MSG_DONTWAIT) > 0) {
        struct nlmsghdr *head = (void *)answer;
        if (head->nlmsg_type == NLMSG_ERROR && ((struct nlmsgerr *)NLMSG_DATA(head))->error) {
            errno = -((struct nlmsgerr *)NLMSG_DATA(head))->error;
            check(-1, "the rules");
        }
    }

    snprintf(name, sizeof name, "benchv%d", slot);
    struct ifinfomsg link = {.ifi_family = AF_UNSPEC};
    struct message m = begin(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &link, sizeof link);
    attribute(&m, IFLA_IFNAME, name, strlen(name) + 1);
    struct rtattr *info = attribute(&m, IFLA_LINKINFO, NULL, 0);
    attribute(&m, IFLA_INFO_KIND, "veth", 4);
    struct rtattr *data = attribute(&m, IFLA_INFO_DATA, NULL, 0);
    struct rtattr *peer = attribute(&m, VETH_INFO_PEER, NULL, 0);
    put(&m, &link, sizeof link);
    attribute(&m, IFLA_IFNAME, "eth0", 5);
    attribute(&m, IFLA_NET_NS_FD, &namespace, 4);
    end(&m, peer);
    end(&m, data);
    end(&m, info);
    ask(outside, &m, "a veth pair");
    int outer = index_of(outside, name), inner = index_of(inside, "eth0"), tap0 = index_of(inside, "tap0");

    struct ifinfomsg change = {.ifi_index = tap0};
    m = begin(RTM_NEWLINK, 0, &change, sizeof change);
    attribute(&m, IFLA_ADDRESS, mac, 6);
    ask(inside, &m, "a hardware address");
    set_up(outside, outer, outer_address, 31);
    set_up(inside, inner, inner_address, 31);
    set_up(inside, tap0, gateway, 30);
    route(outside, host, 32, inner_address, outer);
    route(inside, 0, 0, outer_address, inner);
    struct ndmsg neighbour = {.ndm_family = AF_INET, .ndm_ifindex = tap0, .ndm_state = NUD_PERMANENT};
    m = begin(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &neighbour, sizeof neighbour);
    unsigned bytes = htonl(guest);
    attribute(&m, NDA_DST, &bytes, 4);
    attribute(&m, NDA_LLADDR, guest_mac, 6);
    ask(inside, &m, "a neighbour");
    close(filter);
    close(inside);
    close(outside);
    close(namespace);
    return unused;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: bare ORIGIN-MINOR RULES\n");
        return 2;
    }
    origin_minor = atoi(argv[1]);
    int file = check(open(argv[2], O_RDONLY), argv[2]);
    rules_length = check(read(file, rules, sizeof rules), argv[2]);
    close(file);
    control = check(open("/dev/mapper/control", O_RDWR | O_CLOEXEC), "/dev/mapper/control");
    loops = check(open("/dev/loop-control", O_RDWR | O_CLOEXEC), "/dev/loop-control");
    char line[512], name[128], cow[256];
    unsigned long long sectors;
    int disk = -1;
    tap = -1;
    while (fgets(line, sizeof line, stdin)) {
        if (disk >= 0) {
            close(tap);
            close(disk);
            disk = -1;
        }
        if (sscanf(line, "%127s %255s %llu %d", name, cow, &sectors, &slot) != 4) {
            puts("0 0 0");
            fflush(stdout);
            continue;
        }
        long long began = now();
        disk = make_disk(name, cow, sectors);
        long long between = now();
        pthread_t thread;
        pthread_create(&thread, NULL, make_network, NULL);
        pthread_join(thread, NULL);
        printf("%lld %lld %u\n", between - began, now() - between, disk_minor);
        fflush(stdout);
    }
    return 0;
}
