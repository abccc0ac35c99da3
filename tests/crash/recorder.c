/*
 * Records what a program asks of one directory, in order: loaded into it with LD_PRELOAD.
 *
 * RECORD_ROOT is the directory, RECORD_TO the file that records are appended to. A record is one line of words between tabs (what was
 * done, the path below the root, another path or nothing, two numbers, the number of bytes that follow) and those bytes. It is
 * written in one call and only for what has succeeded. One lock goes round doing and recording, so that their order is the same.
 *
 * What changes a file without passing here (a mapping that is shared for writing) is not recorded; the test compares the
 * directory with what the records make of it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_length;
static int records = -1;

__attribute__((constructor)) static void begin(void) {
    const char *below = getenv("RECORD_ROOT"), *to = getenv("RECORD_TO");
    if (!below || !to || strlen(below) >= sizeof root) return;
    strcpy(root, below);
    root_length = strlen(root);
    records = syscall(SYS_openat, AT_FDCWD, to, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
}

/* At the end nothing more is done, rather than done and not recorded. */
__attribute__((destructor)) static void end(void) {
    pthread_mutex_lock(&turn);
}

static void record(const char *what, const char *path, const char *other, long a, long b, const void *bytes, size_t length) {
    char line[3 * PATH_MAX];
    int head = snprintf(line, sizeof line, "%s\t%s\t%s\t%ld\t%ld\t%zu\n", what, path, other, a, b, length);
    struct iovec pieces[2] = {{line, (size_t)head}, {(void *)bytes, length}};
    if (syscall(SYS_writev, records, pieces, length ? 2 : 1) != (long)(head + length)) abort();
}

/* The path below the root, or NULL for what is elsewhere. */
static const char *inside(const char *path) {
    if (records < 0 || strncmp(path, root, root_length) != 0) return NULL;
    if (path[root_length] == 0) return "";
    return path[root_length] == '/' ? path + root_length + 1 : NULL;
}

static const char *inside_at(int directory, const char *path, char *buffer) {
    if (records < 0) return NULL;
    if (path[0] == '/') return inside(path);
    char link[64];
    if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    snprintf(buffer + length, PATH_MAX, "/%s", path);
    return inside(buffer);
}

/* The path of an open file as it is now; what is unlinked is nowhere. */
static const char *inside_fd(int fd, char *buffer) {
    if (records < 0) return NULL;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, buffer, PATH_MAX - 1);
    if (length < 0) return NULL;
    buffer[length] = 0;
    const char *gone = " (deleted)";
    size_t tail = strlen(gone);
    if ((size_t)length > tail && strcmp(buffer + length - tail, gone) == 0) return NULL;
    return inside(buffer);
}

#define LOCKED(...) do { pthread_mutex_lock(&turn); __VA_ARGS__; int kept = errno; pthread_mutex_unlock(&turn); errno = kept; } while (0)

static int open_at(int directory, const char *path, int flags, mode_t mode) {
    char buffer[2 * PATH_MAX];
    const char *name = flags & (O_CREAT | O_TRUNC) ? inside_at(directory, path, buffer) : NULL;
    if (!name) return syscall(SYS_openat, directory, path, flags, mode);
    long fd;
    LOCKED({
        int there = syscall(SYS_faccessat, directory, path, F_OK) == 0;
        fd = syscall(SYS_openat, directory, path, flags, mode);
        if (fd >= 0 && !there) record("create", name, "", 0, 0, NULL, 0);
        else if (fd >= 0 && flags & O_TRUNC) record("size", name, "", 0, 0, NULL, 0);
    });
    return fd;
}

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int directory, const char *path, int flags, ...) { MODE(flags) return open_at(directory, path, flags, mode); }
int openat64(int directory, const char *path, int flags, ...) { MODE(flags) return open_at(directory, path, flags, mode); }

ssize_t pwrite64(int fd, const void *bytes, size_t length, off_t at) {
    char buffer[PATH_MAX];
    ssize_t done;
    if (!inside_fd(fd, buffer)) return syscall(SYS_pwrite64, fd, bytes, length, at);
    LOCKED({
        const char *name = inside_fd(fd, buffer);
        done = syscall(SYS_pwrite64, fd, bytes, length, at);
        if (done > 0 && name) record("write", name, "", at, 0, bytes, done);
    });
    return done;
}
ssize_t pwrite(int fd, const void *bytes, size_t length, off_t at) { return pwrite64(fd, bytes, length, at); }

ssize_t write(int fd, const void *bytes, size_t length) {
    char buffer[PATH_MAX];
    ssize_t done;
    if (!inside_fd(fd, buffer)) return syscall(SYS_write, fd, bytes, length);
    LOCKED({
        const char *name = inside_fd(fd, buffer);
        off_t at = syscall(SYS_lseek, fd, 0, SEEK_CUR);
        done = syscall(SYS_write, fd, bytes, length);
        if (done > 0 && name) record("write", name, "", at, 0, bytes, done);
    });
    return done;
}

/* The bytes are read again from where they came. */
ssize_t copy_file_range(int from, off_t *from_at, int to, off_t *to_at, size_t length, unsigned flags) {
    char buffer[PATH_MAX];
    ssize_t done;
    if (!inside_fd(to, buffer)) return syscall(SYS_copy_file_range, from, from_at, to, to_at, length, flags);
    LOCKED({
        const char *name = inside_fd(to, buffer);
        off_t at = to_at ? *to_at : syscall(SYS_lseek, to, 0, SEEK_CUR);
        off_t source = from_at ? *from_at : syscall(SYS_lseek, from, 0, SEEK_CUR);
        done = syscall(SYS_copy_file_range, from, from_at, to, to_at, length, flags);
        if (done > 0 && name) {
            void *bytes = malloc(done);
            if (!bytes || syscall(SYS_pread64, from, bytes, done, source) != done) abort();
            record("write", name, "", at, 0, bytes, done);
            free(bytes);
        }
    });
    return done;
}
ssize_t copy_file_range64(int from, off_t *from_at, int to, off_t *to_at, size_t length, unsigned flags) {
    return copy_file_range(from, from_at, to, to_at, length, flags);
}

int ftruncate64(int fd, off_t size) {
    char buffer[PATH_MAX];
    int failed;
    LOCKED({
        const char *name = inside_fd(fd, buffer);
        failed = syscall(SYS_ftruncate, fd, size);
        if (!failed && name) record("size", name, "", size, 0, NULL, 0);
    });
    return failed;
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fallocate64(int fd, int mode, off_t at, off_t length) {
    char buffer[PATH_MAX];
    int failed;
    LOCKED({
        const char *name = inside_fd(fd, buffer);
        failed = syscall(SYS_fallocate, fd, mode, at, length);
        if (!failed && name) record(mode & FALLOC_FL_PUNCH_HOLE ? "punch" : "fallocate", name, "", at, length, NULL, 0);
    });
    return failed;
}
int fallocate(int fd, int mode, off_t at, off_t length) { return fallocate64(fd, mode, at, length); }

/* Of what is synced, only what was recorded before is known to be durable: the lock is held meanwhile. */
static int sync_as(const char *what, long number, int fd) {
    char buffer[PATH_MAX];
    int failed;
    if (!inside_fd(fd, buffer)) return syscall(number, fd);
    LOCKED({
        const char *name = inside_fd(fd, buffer);
        failed = syscall(number, fd);
        if (!failed && name) record(what, name, "", 0, 0, NULL, 0);
    });
    return failed;
}
int fsync(int fd) { return sync_as("sync", SYS_fsync, fd); }
int fdatasync(int fd) { return sync_as("sync", SYS_fdatasync, fd); }
int syncfs(int fd) { return sync_as("syncfs", SYS_syncfs, fd); }

static int rename_at(int old_directory, const char *old, int new_directory, const char *new, unsigned flags) {
    char from_buffer[2 * PATH_MAX], to_buffer[2 * PATH_MAX];
    int failed;
    LOCKED({
        const char *from = inside_at(old_directory, old, from_buffer), *to = inside_at(new_directory, new, to_buffer);
        failed = syscall(SYS_renameat2, old_directory, old, new_directory, new, flags);
        if (!failed && (from || to)) {
            if (!from || !to || flags & ~RENAME_NOREPLACE) abort();
            record("rename", from, to, 0, 0, NULL, 0);
        }
    });
    return failed;
}
int rename(const char *old, const char *new) { return rename_at(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int a, const char *old, int b, const char *new) { return rename_at(a, old, b, new, 0); }
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) { return rename_at(a, old, b, new, flags); }

static int unlink_at(int directory, const char *path, int flags) {
    char buffer[2 * PATH_MAX];
    int failed;
    LOCKED({
        const char *name = inside_at(directory, path, buffer);
        failed = syscall(SYS_unlinkat, directory, path, flags);
        if (!failed && name) record(flags & AT_REMOVEDIR ? "rmdir" : "unlink", name, "", 0, 0, NULL, 0);
    });
    return failed;
}
int unlink(const char *path) { return unlink_at(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlink_at(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int directory, const char *path, int flags) { return unlink_at(directory, path, flags); }

static int make_directory_at(int directory, const char *path, mode_t mode) {
    char buffer[2 * PATH_MAX];
    int failed;
    LOCKED({
        const char *name = inside_at(directory, path, buffer);
        failed = syscall(SYS_mkdirat, directory, path, mode);
        if (!failed && name) record("mkdir", name, "", 0, 0, NULL, 0);
    });
    return failed;
}
int mkdir(const char *path, mode_t mode) { return make_directory_at(AT_FDCWD, path, mode); }
int mkdirat(int directory, const char *path, mode_t mode) { return make_directory_at(directory, path, mode); }
