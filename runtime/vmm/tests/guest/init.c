// PID 1 of the VMs that the tests boot. It dials the host's port 1024, does what the lines that come from there say,
// and echoes every connection to its own port 1025.
//
//   partition N START LENGTH    ok | errno
//   read N OFFSET LENGTH        that many bytes, or fewer and the connection ends
//   write N OFFSET LENGTH BYTE  ok | errno (written and synced)
//   discard N OFFSET LENGTH     ok | errno
//   dial PORT                   ok | errno
//   size NAME                   of the block device, in bytes | errno
//   scan NAME MEBIBYTES         microseconds, for reading so much of a block device past the cache | errno
//   stream PORT MEBIBYTES       ok, when so much has been sent to the host's port, and taken | errno
//   send PORT MEBIBYTES         the same by TCP, from 10.99.0.2 to 10.99.0.1 | errno
//   touch BYTES                 ok, when as much memory has been written and freed again
//   memory ADDRESS              ok, when the kernel has taken the block of memory there | errno
//   total                       bytes of memory that the kernel has
//   volume TAG KIBIBYTES        ok, when that virtio-fs is mounted at /TAG, reading ahead so much (0: as it is) | errno
//   fill PATH MEBIBYTES         microseconds, for writing a new file, by mebibytes | errno
//   drain PATH MEBIBYTES        the same for reading it
//   pick PATH MEBIBYTES COUNT   the same for reading so many of its pages, anywhere in so much of it
//   files PATH COUNT            the same for making so many files in that new directory, looking at each, removing each
//   cpus                        how many there are
//   mac                         eth0's address | errno
//   reboot
//   panic

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/blkpg.h>
#include <linux/fs.h>
#include <linux/vm_sockets.h>
#include <arpa/inet.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 20] __attribute__((aligned(4096)));

static void die(const char *what) {
    printf("init: %s: %s\n", what, strerror(errno));
    reboot(RB_AUTOBOOT);
}

static int dial(unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof address) == 0)
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

static void send_all(int fd, const char *data, size_t length) {
    while (length > 0) {
        ssize_t sent = write(fd, data, length);
        if (sent < 0)
            exit(1);
        data += sent;
        length -= sent;
    }
}

static void echo(int fd) {
    ssize_t count;
    while ((count = read(fd, buffer, sizeof buffer)) > 0)
        send_all(fd, buffer, count);
    shutdown(fd, SHUT_WR);
    // The end of the connection is the host's: as in any protocol, whoever closes with data on the way loses it.
    while (read(fd, buffer, sizeof buffer) > 0) {
    }
    exit(0);
}

static void serve_echo(void) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = 1025};
    int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64))
        die("listen");
    if (fork() > 0) {
        close(listener);
        return;
    }
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            die("accept");
        if (fork() == 0)
            echo(fd);
        close(fd);
    }
}

static int add_partition(int number, long long start, long long length) {
    struct blkpg_partition partition = {.start = start, .length = length, .pno = number};
    struct blkpg_ioctl_arg argument = {.op = BLKPG_ADD_PARTITION, .datalen = sizeof partition, .data = &partition};
    int fd = open("/dev/vda", O_RDONLY | O_CLOEXEC);
    int result = fd < 0 ? -1 : ioctl(fd, BLKPG, &argument);
    close(fd);
    return result;
}

static int open_partition(int number, int flags) {
    char path[32];
    snprintf(path, sizeof path, "/dev/vda%d", number);
    return open(path, flags | O_CLOEXEC);
}

static void read_partition(int control, int number, long long offset, long long length) {
    int fd = open_partition(number, O_RDONLY);
    while (length > 0) {
        ssize_t count = pread(fd, buffer, length < sizeof buffer ? length : sizeof buffer, offset);
        if (count <= 0)
            exit(0);
        send_all(control, buffer, count);
        offset += count;
        length -= count;
    }
    close(fd);
}

static int write_partition(int number, long long offset, long long length, int byte) {
    int fd = open_partition(number, O_RDWR);
    memset(buffer, byte, sizeof buffer);
    while (length > 0) {
        ssize_t count = pwrite(fd, buffer, length < sizeof buffer ? length : sizeof buffer, offset);
        if (count <= 0)
            return -1;
        offset += count;
        length -= count;
    }
    int result = fsync(fd);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

static int discard(int number, long long offset, long long length) {
    uint64_t range[2] = {offset, length};
    int fd = open_partition(number, O_RDWR);
    int result = ioctl(fd, BLKDISCARD, range);
    int error = errno;
    close(fd);
    errno = error;
    return result;
}

static int open_block(const char *name, int flags) {
    char path[32];
    snprintf(path, sizeof path, "/dev/%s", name);
    return open(path, flags | O_CLOEXEC);
}

static long long size(const char *name) {
    uint64_t bytes = 0;
    int fd = open_block(name, O_RDONLY);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &bytes) < 0)
        return -1;
    close(fd);
    return bytes;
}

static long long microseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000LL + now.tv_nsec / 1000;
}

static long long scan(const char *name, int mebibytes) {
    int fd = open_block(name, O_RDONLY | O_DIRECT);
    if (fd < 0)
        return -1;
    long long begin = microseconds();
    for (; mebibytes > 0; mebibytes--)
        if (read(fd, buffer, sizeof buffer) != sizeof buffer)
            return -1;
    long long took = microseconds() - begin;
    close(fd);
    return took;
}

static int mount_volume(const char *tag, int ahead) {
    char path[64];
    struct stat status;
    snprintf(path, sizeof path, "/%s", tag);
    mkdir(path, 0755);
    if (mount(tag, path, "virtiofs", MS_NOSUID | MS_NODEV, NULL) < 0)
        return -1;
    if (ahead == 0)
        return 0;
    if (stat(path, &status) < 0)
        return -1;
    snprintf(path, sizeof path, "/sys/class/bdi/%u:%u/read_ahead_kb", major(status.st_dev), minor(status.st_dev));
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int result = dprintf(fd, "%d", ahead);
    close(fd);
    return result;
}

static long long fill(const char *path, int mebibytes) {
    long long begin = microseconds();
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        return -1;
    for (; mebibytes > 0; mebibytes--)
        if (write(fd, buffer, sizeof buffer) != sizeof buffer)
            return -1;
    return close(fd) < 0 ? -1 : microseconds() - begin;
}

static long long drain(const char *path, int mebibytes) {
    long long begin = microseconds();
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    for (; mebibytes > 0; mebibytes--)
        if (read(fd, buffer, sizeof buffer) != sizeof buffer)
            return -1;
    return close(fd) < 0 ? -1 : microseconds() - begin;
}

static long long pick(const char *path, int mebibytes, int count) {
    unsigned long long state = 1, pages = mebibytes * 256ULL;
    long long begin = microseconds();
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    for (; count > 0; count--) {
        // Knuth's, of which the upper bits are good.
        state = state * 6364136223846793005ULL + 1442695040888963407ULL;
        if (pread(fd, buffer, 4096, (state >> 33) % pages * 4096) != 4096)
            return -1;
    }
    return close(fd) < 0 ? -1 : microseconds() - begin;
}

static long long files(const char *directory, int count) {
    char path[300];
    struct stat status;
    if (mkdir(directory, 0755) < 0)
        return -1;
    long long begin = microseconds();
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%d", directory, i);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        if (fd < 0 || close(fd) < 0)
            return -1;
    }
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%d", directory, i);
        if (stat(path, &status) < 0)
            return -1;
    }
    for (int i = 0; i < count; i++) {
        snprintf(path, sizeof path, "%s/%d", directory, i);
        if (unlink(path) < 0)
            return -1;
    }
    long long took = microseconds() - begin;
    return rmdir(directory) < 0 ? -1 : took;
}

// Sends so much and waits until the other side closes the connection.
static int send_mebibytes(int fd, int mebibytes) {
    if (fd < 0)
        return -1;
    for (; mebibytes > 0; mebibytes--)
        send_all(fd, buffer, sizeof buffer);
    shutdown(fd, SHUT_WR);
    while (read(fd, buffer, sizeof buffer) > 0) {
    }
    return close(fd);
}

static struct sockaddr_in ipv4(const char *address, unsigned port) {
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, address, &in.sin_addr);
    return in;
}

static int connect_tcp(unsigned port) {
    struct sockaddr_in host = ipv4("10.99.0.1", port), own = ipv4("10.99.0.2", 0), mask = ipv4("255.255.255.0", 0);
    struct ifreq request = {.ifr_name = "eth0"};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memcpy(&request.ifr_addr, &own, sizeof own);
    if (ioctl(fd, SIOCSIFADDR, &request) < 0)
        return -1;
    memcpy(&request.ifr_netmask, &mask, sizeof mask);
    if (ioctl(fd, SIOCSIFNETMASK, &request) < 0)
        return -1;
    request.ifr_flags = IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request) < 0 || connect(fd, (struct sockaddr *)&host, sizeof host) < 0)
        return -1;
    return fd;
}

static void mac(int control) {
    struct ifreq request = {.ifr_name = "eth0"};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (ioctl(fd, SIOCGIFHWADDR, &request) < 0) {
        dprintf(control, "%s\n", strerrorname_np(errno));
    } else {
        unsigned char *a = (unsigned char *)request.ifr_hwaddr.sa_data;
        dprintf(control, "%02x:%02x:%02x:%02x:%02x:%02x\n", a[0], a[1], a[2], a[3], a[4], a[5]);
    }
    close(fd);
}

static int touch(long long bytes) {
    char *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -1;
    memset(memory, 1, bytes);
    return munmap(memory, bytes);
}

static int add_memory(const char *address) {
    int fd = open("/sys/devices/system/memory/probe", O_WRONLY | O_CLOEXEC);
    int result = dprintf(fd, "%s", address);
    close(fd);
    return result;
}

static long long total_memory(void) {
    struct sysinfo info;
    return sysinfo(&info) < 0 ? -1 : (long long)info.totalram * info.mem_unit;
}

static void answer_number(int control, long long number) {
    if (number < 0)
        dprintf(control, "%s\n", strerrorname_np(errno));
    else
        dprintf(control, "%lld\n", number);
}

static void answer(int control, int result) {
    dprintf(control, "%s\n", result < 0 ? strerrorname_np(errno) : "ok");
}

int main(void) {
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    signal(SIGCHLD, SIG_IGN);
    serve_echo();
    int control = dial(1024);
    if (control < 0)
        die("dial");
    FILE *lines = fdopen(control, "r");
    char line[256];
    while (fgets(line, sizeof line, lines)) {
        int number, byte;
        long long offset, length;
        unsigned port;
        char name[16], path[256];
        if (sscanf(line, "partition %d %lld %lld", &number, &offset, &length) == 3)
            answer(control, add_partition(number, offset, length));
        else if (sscanf(line, "read %d %lld %lld", &number, &offset, &length) == 3)
            read_partition(control, number, offset, length);
        else if (sscanf(line, "write %d %lld %lld %d", &number, &offset, &length, &byte) == 4)
            answer(control, write_partition(number, offset, length, byte));
        else if (sscanf(line, "discard %d %lld %lld", &number, &offset, &length) == 3)
            answer(control, discard(number, offset, length));
        else if (sscanf(line, "size %15s", name) == 1)
            answer_number(control, size(name));
        else if (sscanf(line, "scan %15s %d", name, &number) == 2)
            answer_number(control, scan(name, number));
        else if (sscanf(line, "volume %15s %d", name, &number) == 2)
            answer(control, mount_volume(name, number));
        else if (sscanf(line, "fill %255s %d", path, &number) == 2)
            answer_number(control, fill(path, number));
        else if (sscanf(line, "drain %255s %d", path, &number) == 2)
            answer_number(control, drain(path, number));
        else if (sscanf(line, "pick %255s %d %d", path, &number, &byte) == 3)
            answer_number(control, pick(path, number, byte));
        else if (sscanf(line, "files %255s %d", path, &number) == 2)
            answer_number(control, files(path, number));
        else if (sscanf(line, "stream %u %d", &port, &number) == 2)
            answer(control, send_mebibytes(dial(port), number));
        else if (sscanf(line, "send %u %d", &port, &number) == 2)
            answer(control, send_mebibytes(connect_tcp(port), number));
        else if (sscanf(line, "touch %lld", &length) == 1)
            answer(control, touch(length));
        else if (sscanf(line, "memory %15s", name) == 1)
            answer(control, add_memory(name));
        else if (strcmp(line, "total\n") == 0)
            answer_number(control, total_memory());
        else if (strcmp(line, "cpus\n") == 0)
            dprintf(control, "%ld\n", sysconf(_SC_NPROCESSORS_ONLN));
        else if (sscanf(line, "dial %u", &port) == 1) {
            int fd = dial(port);
            answer(control, fd);
            close(fd);
        } else if (strcmp(line, "mac\n") == 0)
            mac(control);
        else if (strcmp(line, "panic\n") == 0)
            exit(0); // the end of PID 1
        else
            break;
    }
    reboot(RB_AUTOBOOT);
}
