/* Preloaded into a process: at the N-th call that changes a file under a folder, kill the process, before the call or
   with half of a write done, or let the call fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, HALF, FULL, ONCE };
enum { PASS, HALVE, FAIL };
static char folder[4096];
static long at, calls;
static int how, number, armed;
static unsigned char ours[65536];

void crash_arm(const char *path, long n, int mode, int error) {
    strncpy(folder, path, sizeof folder - 1);
    at = n; how = mode; number = error; calls = 0; armed = 1;
    memset(ours, 0, sizeof ours);
}
long crash_disarm(void) { armed = 0; return calls; }

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

/* `grows`: the call needs room on the disk, so a full one refuses it. */
static int hit(int grows) {
    calls++;
    if (how == KILL && calls == at) die();
    if (how == HALF && calls == at) return HALVE;
    if ((how == FULL && grows && calls >= at) || (how == ONCE && calls == at)) { errno = number; return FAIL; }
    return PASS;
}

static int below(int base, const char *path) {
    char full[12288] = "";
    if (!armed || !path) return 0;
    if (path[0] != '/') {
        if (base == AT_FDCWD) { if (!getcwd(full, 4096)) return 0; }
        else { char link[64]; snprintf(link, sizeof link, "/proc/self/fd/%d", base);
               ssize_t n = readlink(link, full, 4095); full[n > 0 ? n : 0] = 0; }
        strcat(full, "/"); strncat(full, path, 4000); path = full;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
/* A call without halves: half of it is the whole of it, and then the end. */
#define CALL(inside, grows, failed, made) \
    if (armed && (inside)) switch (hit(grows)) { case FAIL: return failed; case HALVE: (void)!(long)(made); die(); }

#define OPENS(name, BASE, DECLARE, ...) \
int name(DECLARE const char *path, int flags, ...) { \
    REAL(name); mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); } \
    int inside = below(BASE, path); \
    CALL(inside && (flags & (O_CREAT | O_TRUNC)), 1, -1, real(__VA_ARGS__)) \
    int fd = real(__VA_ARGS__); \
    if (fd >= 0 && fd < 65536) ours[fd] = inside && (flags & O_ACCMODE) != O_RDONLY; \
    return fd; }
#define COMMA ,
OPENS(open, AT_FDCWD, , path, flags, mode)
OPENS(open64, AT_FDCWD, , path, flags, mode)
OPENS(openat, base, int base COMMA, base, path, flags, mode)
OPENS(openat64, base, int base COMMA, base, path, flags, mode)

#define FOPENS(name) \
FILE *name(const char *path, const char *kind) { \
    REAL(name); int inside = below(AT_FDCWD, path) && kind[0] != 'r'; \
    CALL(inside, 1, NULL, real(path, kind)) \
    FILE *file = real(path, kind); \
    if (file && fileno(file) < 65536) ours[fileno(file)] = inside; \
    return file; }
FOPENS(fopen)
FOPENS(fopen64)

#define OURS(fd) (armed && fd >= 0 && fd < 65536 && ours[fd])
int close(int fd) { REAL(close); if (fd >= 0 && fd < 65536) ours[fd] = 0; return real(fd); }
ssize_t write(int fd, const void *bytes, size_t n) { REAL(write); CALL(OURS(fd), 1, -1, real(fd, bytes, n / 2)) return real(fd, bytes, n); }
ssize_t pwrite(int fd, const void *bytes, size_t n, off_t to) { REAL(pwrite); CALL(OURS(fd), 1, -1, real(fd, bytes, n / 2, to)) return real(fd, bytes, n, to); }
ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t to) { REAL(pwrite64); CALL(OURS(fd), 1, -1, real(fd, bytes, n / 2, to)) return real(fd, bytes, n, to); }
ssize_t writev(int fd, const struct iovec *parts, int n) { REAL(writev); CALL(OURS(fd), 1, -1, real(fd, parts, n / 2)) return real(fd, parts, n); }
ssize_t sendfile(int to, int from, off_t *start, size_t n) { REAL(sendfile); CALL(OURS(to), 1, -1, real(to, from, start, 100)) return real(to, from, start, n); }
ssize_t sendfile64(int to, int from, off64_t *start, size_t n) { REAL(sendfile64); CALL(OURS(to), 1, -1, real(to, from, start, 100)) return real(to, from, start, n); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned int flags) { REAL(copy_file_range); CALL(OURS(to), 1, -1, real(from, a, to, b, n > 100 ? 100 : n, flags)) return real(from, a, to, b, n, flags); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); CALL(OURS(fd), 0, -1, real(fd, n)) return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); CALL(OURS(fd), 0, -1, real(fd, n)) return real(fd, n); }
int truncate(const char *path, off_t n) { REAL(truncate); CALL(below(AT_FDCWD, path), 0, -1, real(path, n)) return real(path, n); }
int truncate64(const char *path, off64_t n) { REAL(truncate64); CALL(below(AT_FDCWD, path), 0, -1, real(path, n)) return real(path, n); }
int fsync(int fd) { REAL(fsync); CALL(OURS(fd), 1, -1, 0) return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); CALL(OURS(fd), 1, -1, 0) return real(fd); }
int unlink(const char *path) { REAL(unlink); CALL(below(AT_FDCWD, path), 0, -1, real(path)) return real(path); }
int unlinkat(int base, const char *path, int flags) { REAL(unlinkat); CALL(below(base, path), 0, -1, real(base, path, flags)) return real(base, path, flags); }
int rmdir(const char *path) { REAL(rmdir); CALL(below(AT_FDCWD, path), 0, -1, real(path)) return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(mkdir); CALL(below(AT_FDCWD, path), 1, -1, real(path, mode)) return real(path, mode); }
int mkdirat(int base, const char *path, mode_t mode) { REAL(mkdirat); CALL(below(base, path), 1, -1, real(base, path, mode)) return real(base, path, mode); }
int rename(const char *old, const char *new) { REAL(rename); CALL(below(AT_FDCWD, new), 0, -1, real(old, new)) return real(old, new); }
int renameat(int a, const char *old, int b, const char *new) { REAL(renameat); CALL(below(b, new), 0, -1, real(a, old, b, new)) return real(a, old, b, new); }
int link(const char *old, const char *new) { REAL(link); CALL(below(AT_FDCWD, new), 1, -1, real(old, new)) return real(old, new); }
int linkat(int a, const char *old, int b, const char *new, int flags) { REAL(linkat); CALL(below(b, new), 1, -1, real(a, old, b, new, flags)) return real(a, old, b, new, flags); }
