/* Makes file operations fail with EIO, like a broken disk, in ranks that preload this library (LD_PRELOAD).

   Paths that contain EIO_PATH are on the broken disk. A call fails while the file EIO_FLAG.<RANK> exists and names it:
   "write", "fsync" or "rename". If " once" follows, the first failure removes the file. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
    const char *broken = getenv("EIO_PATH"), *flag = getenv("EIO_FLAG"), *rank = getenv("RANK");
    if (!broken || !flag || !rank || !strstr(path, broken)) return 0;
    char name[4096], said[64] = "";
    snprintf(name, sizeof name, "%s.%s", flag, rank);
    FILE *file = fopen(name, "r");
    if (!file) return 0;
    if (!fgets(said, sizeof said, file)) said[0] = 0;
    fclose(file);
    if (strncmp(said, call, strlen(call)) != 0) return 0;
    if (strstr(said, " once") && unlink(name) != 0) return 0; /* another thread took it */
    errno = EIO;
    return 1;
}

static int fails_at(const char *call, int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(call, path);
}

ssize_t write(int descriptor, const void *data, size_t size) {
    return fails_at("write", descriptor) ? -1 : syscall(SYS_write, descriptor, data, size);
}

int fsync(int descriptor) { return fails_at("fsync", descriptor) ? -1 : syscall(SYS_fsync, descriptor); }

int rename(const char *from, const char *to) {
    if (fails("rename", from)) return -1;
    int (*next)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
    return next(from, to);
}
