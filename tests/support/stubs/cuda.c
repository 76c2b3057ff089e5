/* A CUDA driver without a device. Writes the name of each function that is called, and its own loading, a line each,
 * to the file named by LEGIT_TEST_CUDA_LOG. What CUDA's runtime and torch look for when they start is here; all else
 * they ask for by cuGetProcAddress, which is logged with the name that was asked for. */

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { SUCCESS = 0, NO_DEVICE = 100, NOT_FOUND = 500 };

static void note(const char *what)
{
    const char *path = getenv("LEGIT_TEST_CUDA_LOG");
    FILE *log = path ? fopen(path, "a") : NULL;
    if (log) {
        fprintf(log, "%d %s\n", (int)getpid(), what);
        fclose(log);
    }
}

__attribute__((constructor)) static void loaded(void) { note("loaded"); }

#define CALL(name, answer) int name(void) { note(#name); return answer; }

CALL(cuDeviceGet, NO_DEVICE)
CALL(cuDeviceGetAttribute, NO_DEVICE)
CALL(cuDeviceGetName, NO_DEVICE)
CALL(cuDeviceTotalMem_v2, NO_DEVICE)
CALL(cuDevicePrimaryCtxRetain, NO_DEVICE)
CALL(cuDevicePrimaryCtxGetState, NO_DEVICE)
CALL(cuCtxCreate_v2, NO_DEVICE)
CALL(cuCtxGetCurrent, NO_DEVICE)
CALL(cuMemGetInfo_v2, NO_DEVICE)
CALL(cuGetExportTable, NOT_FOUND)

int cuInit(unsigned flags) { (void)flags; note("cuInit"); return NO_DEVICE; }
int cuDeviceGetCount(int *count) { note("cuDeviceGetCount"); *count = 0; return SUCCESS; }
int cuDriverGetVersion(int *version) { note("cuDriverGetVersion"); *version = 13000; return SUCCESS; }

static int look_up(const char *name, void **function)
{
    char line[256];
    snprintf(line, sizeof line, "cuGetProcAddress %s", name);
    note(line);
    *function = NULL;
    return NOT_FOUND;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long flags)
{
    (void)version, (void)flags;
    return look_up(name, function);
}

int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long flags, int *status)
{
    (void)version, (void)flags;
    if (status) *status = 1;
    return look_up(name, function);
}
