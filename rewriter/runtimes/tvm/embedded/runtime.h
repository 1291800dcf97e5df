/* What compiled kernels need at run time, and how they are called. Layouts: DLPack, and TVM's calling convention. */
#ifndef RUNTIME_H
#define RUNTIME_H
#include <stdint.h>
#include <string.h>

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } DataType;
typedef struct {
  void *data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct { int32_t type, padding; union { int64_t number; void *pointer; } value; } Any;
typedef int kernel_function(void *self, const Any *arguments, int32_t count, Any *result);

static inline DLTensor tensor(void *data, int ndim, int code, int bits, int64_t *shape, int64_t *strides)
{
  DLTensor made = {data, {1, 0}, ndim, {(uint8_t)code, (uint8_t)bits, 1}, shape, strides, 0};
  return made;
}

/* `tiles`: whether kernels use AMX, which the system must permit. */
int runtime_ready(const void *weights, const void *workspace, int tiles);
int runtime_call(kernel_function *kernel, DLTensor *operands, int count);
#endif
