/* Loaded before libc (LD_PRELOAD) into a process that is to suffer: it counts the calls that change or open files below
 * one folder and, as a control file says, ends the process at the n-th of them or makes it fail. It also moves the clock.
 * The control file is shared memory, so a test can read and change it while the process runs; `shim.py` is its other
 * side, and says what the words are. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { OFF, KILL, FAIL };
enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, RENAME = 16, UNLINK = 32, TRUNCATE = 64, MAKE = 128 };

struct control {
    int64_t mode, at, times, error, kinds;             /* set by the test */
    int64_t count, hits, hit_kind, again;              /* told by the shim */
    int64_t clock;                                     /* nanoseconds added to the time of day */
    int64_t stage, hold, held;                         /* used by the process itself, as what follows */
    int64_t statements, statement, within;             /* to the database: so many; hold at this one, of this stage */
    char root[512];                                    /* counts only what lies below it; ends with '/' */
    char hit[512];                                     /* what the last call that was hit was about */
    char trail[8192];                                  /* the stage of each call that was counted */
};

static struct control *control;
static char failed[1024];                              /* handles whose fsync has failed, and nothing was written since */

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULTS_CONTROL");
    int handle = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (handle < 0) return;
    void *found = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
    if (found != MAP_FAILED) control = found;
    close(handle);
}

/* Whether this call is to fail (errno is set), or does not come back at all. */
static int suffers(int64_t kind, const char *path) {
    if (!control || !(control->kinds & kind) || !path) return 0;
    if (strncmp(path, control->root, strlen(control->root))) return 0;
    int64_t number = __sync_add_and_fetch(&control->count, 1);
    if (number < (int64_t)sizeof control->trail) control->trail[number] = (char)control->stage;
    if (control->mode == OFF || number < control->at || number >= control->at + control->times) return 0;
    __sync_add_and_fetch(&control->hits, 1);
    control->hit_kind = kind;
    strncpy(control->hit, path, sizeof control->hit - 1);
    if (control->mode == KILL) kill(getpid(), SIGKILL);
    errno = (int)control->error;
    return 1;
}

static int suffers_at(int64_t kind, int handle) {
    char link[64], path[512];
    if (!control || !(control->kinds & kind)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return suffers(kind, path);
}

static void anew(int handle) {
    if (handle >= 0 && handle < (int)sizeof failed) failed[handle] = 0;
}

#define REAL(name, ...) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name);

#define OPENING(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name) \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        return suffers(OPEN, path) ? -1 : real(path, flags, mode); \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name) \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest); \
        return suffers(OPEN, path) ? -1 : real(folder, path, flags, mode); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

ssize_t read(int handle, void *data, size_t size) { REAL(read) return suffers_at(READ, handle) ? -1 : real(handle, data, size); }
ssize_t write(int handle, const void *data, size_t size) { REAL(write) anew(handle); return suffers_at(WRITE, handle) ? -1 : real(handle, data, size); }
ssize_t pwrite(int handle, const void *data, size_t size, off_t at) { REAL(pwrite) anew(handle); return suffers_at(WRITE, handle) ? -1 : real(handle, data, size, at); }
ssize_t pwrite64(int handle, const void *data, size_t size, off64_t at) { REAL(pwrite64) anew(handle); return suffers_at(WRITE, handle) ? -1 : real(handle, data, size, at); }
int ftruncate(int handle, off_t size) { REAL(ftruncate) anew(handle); return suffers_at(TRUNCATE, handle) ? -1 : real(handle, size); }
int ftruncate64(int handle, off64_t size) { REAL(ftruncate64) anew(handle); return suffers_at(TRUNCATE, handle) ? -1 : real(handle, size); }

/* A sync that is tried again where nothing was written anew may lie: the kernel has dropped the pages. */
static int sync_suffers(int handle) {
    int known = handle >= 0 && handle < (int)sizeof failed;
    if (control && known && failed[handle]) __sync_add_and_fetch(&control->again, 1);
    if (!suffers_at(SYNC, handle)) return 0;
    if (known) failed[handle] = 1;
    return 1;
}
int fsync(int handle) { REAL(fsync) return sync_suffers(handle) ? -1 : real(handle); }
int fdatasync(int handle) { REAL(fdatasync) return sync_suffers(handle) ? -1 : real(handle); }
int close(int handle) {
    REAL(close)
    anew(handle);
    return real(handle);
}

int rename(const char *from, const char *to) { REAL(rename) return suffers(RENAME, to) ? -1 : real(from, to); }
int unlink(const char *path) { REAL(unlink) return suffers(UNLINK, path) ? -1 : real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir) return suffers(MAKE, path) ? -1 : real(path, mode); }
int chmod(const char *path, mode_t mode) { REAL(chmod) return suffers(MAKE, path) ? -1 : real(path, mode); }

static void moved(struct timespec *at) {
    if (!control || !at) return;
    int64_t nanoseconds = at->tv_nsec + control->clock % 1000000000;
    at->tv_sec += control->clock / 1000000000 + (nanoseconds >= 1000000000) - (nanoseconds < 0);
    at->tv_nsec = (nanoseconds + 1000000000) % 1000000000;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    REAL(clock_gettime)
    int found = real(clock, at);
    if (!found && clock == CLOCK_REALTIME) moved(at);
    return found;
}
time_t time(time_t *into) {
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    if (into) *into = at.tv_sec;
    return at.tv_sec;
}
int gettimeofday(struct timeval *into, void *zone) {
    (void)zone;
    struct timespec at;
    clock_gettime(CLOCK_REALTIME, &at);
    into->tv_sec = at.tv_sec;
    into->tv_usec = at.tv_nsec / 1000;
    return 0;
}
