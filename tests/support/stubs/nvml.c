/* NVML over a made-up machine, described line by line in the file named by LEGIT_TEST_NVML_WORLD:
 *
 *     gpu <uuid> <name without spaces> <total> <used>      GPUs, in the order of their PCI addresses
 *     mig <uuid> <total> <used>                            an instance of the last gpu, which is then split
 *     process <uuid> <pid, 0 for the asking one> <bytes, -1 for unknown>
 *     error <function> <code>                              what that function returns instead
 *     lost <uuid> <code>                                   what is returned instead of that GPU
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, MOST = 32 };

struct device { char uuid[96], name[64]; unsigned long long total, used; int parent; };
struct process { char uuid[96]; unsigned pid; unsigned long long bytes; };
struct failure { char function[64]; int code; };
struct memory { unsigned long long total, free, used; };
struct process_info { unsigned pid; unsigned long long bytes; unsigned instance, part; };

static struct device devices[MOST];
static struct process processes[MOST];
static struct failure failures[MOST];
static struct failure lost[MOST];
static int device_count, process_count, failure_count, lost_count, started;

static void read_world(void)
{
    FILE *world = fopen(getenv("LEGIT_TEST_NVML_WORLD") ? getenv("LEGIT_TEST_NVML_WORLD") : "/dev/null", "r");
    char word[16];
    int last_gpu = -1;
    device_count = process_count = failure_count = lost_count = 0;
    while (world && fscanf(world, "%15s", word) == 1) {
        if (!strcmp(word, "gpu") || !strcmp(word, "mig")) {
            struct device *one = &devices[device_count];
            int is_gpu = !strcmp(word, "gpu");
            if (fscanf(world, "%95s", one->uuid) != 1) break;
            if (is_gpu && fscanf(world, "%63s", one->name) != 1) break;
            if (fscanf(world, "%llu %llu", &one->total, &one->used) != 2) break;
            one->parent = is_gpu ? -1 : last_gpu;
            if (is_gpu) last_gpu = device_count;
            device_count++;
        } else if (!strcmp(word, "process")) {
            struct process *one = &processes[process_count++];
            long long bytes;
            if (fscanf(world, "%95s %u %lld", one->uuid, &one->pid, &bytes) != 3) break;
            one->bytes = (unsigned long long)bytes;
        } else if (!strcmp(word, "lost")) {
            if (fscanf(world, "%63s %d", lost[lost_count].function, &lost[lost_count].code) != 2) break;
            lost_count++;
        } else if (fscanf(world, "%63s %d", failures[failure_count].function, &failures[failure_count].code) == 2) {
            failure_count++;
        }
    }
    if (world) fclose(world);
}

static int fails(const char *function)
{
    for (int i = 0; i < failure_count; i++)
        if (!strcmp(failures[i].function, function)) return failures[i].code;
    return started || !strncmp(function, "nvmlInit", 8) ? SUCCESS : UNINITIALIZED;
}

#define ENTER int failed = fails(__func__); if (failed) return failed

static struct device *nth(int parent, unsigned index)
{
    for (int i = 0; i < device_count; i++)
        if (devices[i].parent == parent && index-- == 0) return &devices[i];
    return NULL;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    read_world();
    ENTER;
    started = 1;
    return SUCCESS;
}

int nvmlShutdown(void) { started = 0; return SUCCESS; }

const char *nvmlErrorString(int code)
{
    static char text[32];
    snprintf(text, sizeof text, "stub error %d", code);
    return text;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER;
    for (*count = 0; nth(-1, *count); ++*count) {}
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, struct device **device)
{
    ENTER;
    if (!(*device = nth(-1, index))) return INVALID;
    for (int i = 0; i < lost_count; i++)
        if (!strcmp(lost[i].function, (*device)->uuid)) return lost[i].code;
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, struct device **device)
{
    ENTER;
    for (int i = 0; i < device_count; i++)
        if (!strcmp(devices[i].uuid, uuid)) { *device = &devices[i]; return SUCCESS; }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned size)
{
    ENTER;
    snprintf(uuid, size, "%s", device->uuid);
    return SUCCESS;
}

int nvmlDeviceGetName(struct device *device, char *name, unsigned size)
{
    ENTER;
    snprintf(name, size, "%s", device->name);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(struct device *device, struct memory *memory)
{
    read_world(); /* which may have changed */
    ENTER;
    *memory = (struct memory){device->total, device->total - device->used, device->used};
    return SUCCESS;
}

int nvmlDeviceGetMigMode(struct device *device, unsigned *now, unsigned *pending)
{
    ENTER;
    if (!strcmp(device->name, "old")) return NOT_SUPPORTED;
    *now = *pending = nth((int)(device - devices), 0) != NULL;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(struct device *device, unsigned *count) { ENTER; (void)device; *count = 7; return SUCCESS; }

int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, unsigned index, struct device **instance)
{
    ENTER;
    /* Slots need not be taken in a row. */
    *instance = index % 2 ? NULL : nth((int)(device - devices), index / 2);
    return *instance ? SUCCESS : NOT_FOUND;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct device *device, unsigned *count, struct process_info *found)
{
    ENTER;
    unsigned room = *count;
    *count = 0;
    for (int i = 0; i < process_count; i++)
        if (!strcmp(processes[i].uuid, device->uuid)) {
            if (found && *count < room)
                found[*count] = (struct process_info){
                    processes[i].pid ? processes[i].pid : (unsigned)getpid(), processes[i].bytes, 0, 0};
            ++*count;
        }
    return *count > room ? TOO_SMALL : SUCCESS;
}
