/*
 * Storage that fails, for LD_PRELOAD: from the n-th write (or flush) of files below a prefix on, each fails with an errno, or writes half of what it was given
 * once. Only while the switch file exists; its removal repairs the storage and starts the count again.
 *
 *   FAULTY_PREFIX=/path  FAULTY_SWITCH=/path/of/switch       the switch holds: write|sync  N  ERRNO     (ERRNO 0: the N-th write is short)
 *
 * And a wall clock that is wrong by as many seconds as the file says that FAULTY_CLOCK names.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long count;

/* Whether this call fails: -1 no, 0 short, else the errno. */
static int fault(int fd, const char *what)
{
    const char *prefix = getenv("FAULTY_PREFIX"), *path = getenv("FAULTY_SWITCH");
    char link[64], name[4096], kind[16];
    long nth;
    int code, verdict = -1;
    if (!prefix || !path)
        return -1;
    pthread_mutex_lock(&lock);
    FILE *file = fopen(path, "re");
    if (!file) {
        count = 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t len = readlink(link, name, sizeof name - 1);
        if (len > 0 && fscanf(file, "%15s %ld %d", kind, &nth, &code) == 3 && !strcmp(kind, what)) {
            name[len] = 0;
            if (!strncmp(name, prefix, strlen(prefix))) {
                count++;
                if (code ? count >= nth : count == nth)
                    verdict = code;
            }
        }
        fclose(file);
    }
    pthread_mutex_unlock(&lock);
    return verdict;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL(verdict) do { if ((verdict) > 0) { errno = (verdict); return -1; } } while (0)

ssize_t write(int fd, const void *bytes, size_t len)
{
    int verdict = fault(fd, "write");
    FAIL(verdict);
    return NEXT(write)(fd, bytes, verdict == 0 && len > 1 ? len / 2 : len);
}

ssize_t pwrite(int fd, const void *bytes, size_t len, off_t at)
{
    int verdict = fault(fd, "write");
    FAIL(verdict);
    return NEXT(pwrite)(fd, bytes, verdict == 0 && len > 1 ? len / 2 : len, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t len, off64_t at)
{
    int verdict = fault(fd, "write");
    FAIL(verdict);
    return NEXT(pwrite64)(fd, bytes, verdict == 0 && len > 1 ? len / 2 : len, at);
}

ssize_t writev(int fd, const struct iovec *parts, int len)
{
    FAIL(fault(fd, "write"));
    return NEXT(writev)(fd, parts, len);
}

ssize_t pwritev(int fd, const struct iovec *parts, int len, off_t at)
{
    FAIL(fault(fd, "write"));
    return NEXT(pwritev)(fd, parts, len, at);
}

int fsync(int fd)
{
    FAIL(fault(fd, "sync"));
    return NEXT(fsync)(fd);
}

int fdatasync(int fd)
{
    FAIL(fault(fd, "sync"));
    return NEXT(fdatasync)(fd);
}

int clock_gettime(clockid_t which, struct timespec *at)
{
    const char *path = getenv("FAULTY_CLOCK");
    long seconds = 0;
    FILE *file;
    FAIL(NEXT(clock_gettime)(which, at) ? errno : -1);
    if (which == CLOCK_REALTIME && path && (file = fopen(path, "re"))) {
        if (fscanf(file, "%ld", &seconds) == 1)
            at->tv_sec += seconds;
        fclose(file);
    }
    return 0;
}
