/* Fails one operation on files below a folder: the n-th write, sync, rename, creation, claim or deletion.

   Preloaded, it does nothing until `siege_arm`. Half of a failing write reaches the file, as on a full disk or in a
   killed process. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { COUNT, FULL, KILL };

static struct state {
    long operations; /* so far, over all processes of the command */
    int full;        /* 1 + the descriptor whose next write fails */
    char what[2048]; /* the failed operation */
} *state;
static char folder[1024];
static long chosen;
static enum mode mode;

/* Begin to count, and fail operation number `n`. `file` receives the state. */
int siege_arm(const char *below, const char *file, long n, int how) {
    int descriptor = syscall(SYS_openat, AT_FDCWD, file, O_RDWR | O_CREAT, 0600);
    if (descriptor < 0 || ftruncate(descriptor, sizeof *state)) return -1;
    struct state *mapped = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    syscall(SYS_close, descriptor);
    if (mapped == MAP_FAILED) return -1;
    snprintf(folder, sizeof folder, "%s", below);
    chosen = n;
    mode = how;
    state = mapped;
    return 0;
}

static int is_below(const char *path) {
    return !strncmp(path, folder, strlen(folder));
}

/* Whether this operation is the chosen one; a killed process does not return. */
static int fails(const char *name, const char *path) {
    char whole[1024];
    if (!state) return 0;
    if (path[0] != '/') { /* all relative names of a command are below its working folder */
        if (!getcwd(whole, sizeof whole)) return 0;
        strncat(whole, "/", sizeof whole - strlen(whole) - 1);
        strncat(whole, path, sizeof whole - strlen(whole) - 1);
        path = whole;
    }
    if (!is_below(path)) return 0;
    if (__atomic_add_fetch(&state->operations, 1, __ATOMIC_SEQ_CST) != chosen || mode == COUNT) return 0;
    if (mode == FULL && (!strcmp(name, "unlink") || !strcmp(name, "truncate"))) return 0; /* they need no space */
    snprintf(state->what, sizeof state->what, "%s %s", name, path + strlen(folder));
    return 1;
}

static int full_or_killed(void) {
    if (mode == KILL) kill(0, SIGKILL);
    errno = ENOSPC;
    return -1;
}

static int fails_at(const char *name, int descriptor) {
    char link[64], path[1024];
    struct stat status;
    if (!state || fstat(descriptor, &status) || S_ISFIFO(status.st_mode) || S_ISSOCK(status.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(name, path);
}

#define REAL(name, ...) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))(__VA_ARGS__)

ssize_t write(int descriptor, const void *bytes, size_t size) {
    if (state && state->full == descriptor + 1) {
        state->full = 0;
        errno = ENOSPC;
        return -1;
    }
    if (!fails_at("write", descriptor)) return syscall(SYS_write, descriptor, bytes, size);
    if (size < 2) return full_or_killed();
    ssize_t written = syscall(SYS_write, descriptor, bytes, size / 2);
    if (mode == KILL) kill(0, SIGKILL);
    state->full = descriptor + 1;
    return written;
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    return fails_at("write", descriptor) ? full_or_killed() : REAL(writev, descriptor, parts, count);
}

ssize_t pwrite64(int descriptor, const void *bytes, size_t size, off64_t at) {
    return fails_at("write", descriptor) ? full_or_killed() : REAL(pwrite64, descriptor, bytes, size, at);
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    extern ssize_t sendfile64(int, int, off64_t *, size_t);
    return fails_at("write", to) ? full_or_killed() : REAL(sendfile64, to, from, at, size);
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *there, size_t size, unsigned flags) {
    return fails_at("write", to) ? full_or_killed() : REAL(copy_file_range, from, at, to, there, size, flags);
}

int fsync(int descriptor) {
    return fails_at("sync", descriptor) ? full_or_killed() : syscall(SYS_fsync, descriptor);
}

int ftruncate(int descriptor, off_t size) {
    return fails_at("truncate", descriptor) ? full_or_killed() : syscall(SYS_ftruncate, descriptor, size);
}

int ftruncate64(int descriptor, off64_t size) {
    return ftruncate(descriptor, size);
}

int rename(const char *from, const char *to) {
    return fails("rename", to) ? full_or_killed() : syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
}

int symlink(const char *text, const char *path) {
    return fails("symlink", path) ? full_or_killed() : syscall(SYS_symlinkat, text, AT_FDCWD, path);
}

int mkdir(const char *path, mode_t bits) {
    return fails("mkdir", path) ? full_or_killed() : syscall(SYS_mkdirat, AT_FDCWD, path, bits);
}

int unlink(const char *path) {
    return fails("unlink", path) ? full_or_killed() : syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

static int opened(const char *path, int flags, mode_t bits) {
    if ((flags & (O_CREAT | O_TRUNC)) && fails("create", path)) return full_or_killed();
    return syscall(SYS_openat, AT_FDCWD, path, flags, bits);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, bits);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t bits = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, bits);
}
