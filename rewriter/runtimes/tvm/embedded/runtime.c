/* The part of TVM's runtime that kernels for one thread call: workspace, parallel loops run in turn, errors. */
#define _GNU_SOURCE
#include <stdlib.h>
#include "runtime.h"
#if defined(__linux__) && defined(__x86_64__)
#include <unistd.h>
#endif

enum { MOST_OPERANDS = 64, TENSOR_POINTER = 7 };

typedef struct { void *sync; int32_t tasks; } Group;
typedef int task_function(int task, Group *group, void *data);

static char message[512];

const char *model_error(void) { return message; }

static int fail(const char *text)
{
  strncpy(message, text, sizeof message - 1);
  return 0;
}

void *TVMBackendAllocWorkspace(int device, int id, uint64_t bytes, int code, int bits)
{
  (void)device, (void)id, (void)code, (void)bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

int TVMBackendFreeWorkspace(int device, int id, void *memory)
{
  (void)device, (void)id;
  free(memory);
  return 0;
}

int TVMBackendParallelLaunch(task_function *task, void *data, int tasks)
{
  (void)tasks;
  Group group = {0, 1};
  return task(0, &group, data);
}

int TVMBackendParallelBarrier(int task, Group *group)
{
  (void)task, (void)group;
  return 0;
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text)
{
  (void)kind;
  fail(text);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count)
{
  (void)kind;
  message[0] = 0;
  for (int32_t i = 0; i < count; ++i)
    if (parts[i]) strncat(message, parts[i], sizeof message - 1 - strlen(message));
}

/* Kernels call through these pointers, which TVM's loader sets where there is one. */
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));
extern int (*__TVMBackendParallelLaunch)(task_function *, void *, int) __attribute__((weak));
extern int (*__TVMBackendParallelBarrier)(int, Group *) __attribute__((weak));

/* Linux grants the tile registers of AMX to processes that ask; threads started later share it. */
static int tiles_permitted(void)
{
#if defined(__linux__) && defined(__x86_64__)
  enum { ARCH_PRCTL = 158, REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 };
  static int asked, permitted;
  if (!asked) permitted = syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0;
  asked = 1;
  return permitted;
#else
  return 0;
#endif
}

int runtime_ready(const void *weights, const void *workspace, int tiles)
{
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = TVMBackendAllocWorkspace;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = TVMBackendFreeWorkspace;
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = TVMBackendParallelLaunch;
  if (&__TVMBackendParallelBarrier) __TVMBackendParallelBarrier = TVMBackendParallelBarrier;
  if (!weights || !workspace) return fail("weights and workspace must be given");
  if ((uintptr_t)weights % 64 || (uintptr_t)workspace % 64) return fail("weights or workspace is not 64-byte aligned");
  if (tiles && !tiles_permitted()) return fail("built for AMX, which this processor or its kernel does not permit");
  return 1;
}

int runtime_call(kernel_function *kernel, DLTensor *operands, int count)
{
  Any arguments[MOST_OPERANDS], result = {0, 0, {0}};
  if (count > MOST_OPERANDS) return fail("a kernel has too many operands"), -1;
  for (int i = 0; i < count; ++i) {
    arguments[i].type = TENSOR_POINTER;
    arguments[i].padding = 0;
    arguments[i].value.pointer = &operands[i];
  }
  return kernel(0, arguments, count, &result);
}
