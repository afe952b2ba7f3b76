/* A stand-in for NVIDIA's libraries: one device, whose memory is the host's and whose kernels compute nothing.

   onnxruntime-gpu loads on it and decides where operators go and what is copied, as it would on a GPU; numbers that
   come out mean nothing. tools/cuda/cuda_dry_run.py compiles this once for each library, with a `return 0` for every
   other function that onnxruntime's CUDA provider wants of it. Nothing that ships uses it. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef int Status; /* 0: success, in all of them */
typedef void *Handle;

long fake_copies[5], fake_bytes[5]; /* by cudaMemcpyKind: 1 host to device, 2 device to host */
long fake_launches, fake_waits;
static char anything[4096]; /* what handles point to */

enum { MULTIPROCESSORS = 16, ARCHITECTURE = 75, MINOR = 76 }; /* cudaDeviceAttr */

Status cudaGetDeviceCount(int *count) { return *count = 1, 0; }
Status cudaGetDevice(int *device) { return *device = 0, 0; }
Status cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
Status cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }

Status cudaDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == ARCHITECTURE ? 9 : attribute == MINOR ? 0 : attribute == MULTIPROCESSORS ? 132 : 1024;
  return 0;
}

/* The part of cudaDeviceProp that onnxruntime reads, laid out as in CUDA 12 and 13. */
struct Properties {
  char name[256], uuid[16], luid[8];
  unsigned node_mask;
  size_t memory, shared_memory;
  int registers, warp;
  size_t pitch;
  int threads, block[3], grid[3];
  size_t constant_memory;
  int major, minor;
  size_t texture[2];
  int multiprocessors[2]; /* in CUDA 13, in CUDA 12 */
  char rest[512];
};

Status cudaGetDeviceProperties(struct Properties *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "none");
  p->memory = (size_t)80 << 30, p->shared_memory = 48 << 10;
  p->registers = 65536, p->warp = 32, p->threads = 1024;
  for (int i = 0; i < 3; i++) p->block[i] = 1024, p->grid[i] = 65535;
  p->major = 9, p->multiprocessors[0] = p->multiprocessors[1] = 132;
  return 0;
}

Status cudaMemGetInfo(size_t *free, size_t *total) { return *free = *total = (size_t)80 << 30, 0; }
Status cudaMalloc(Handle *p, size_t size) { return *p = calloc(1, size + 1), *p ? 0 : 2; }
Status cudaMallocHost(Handle *p, size_t size) { return cudaMalloc(p, size); }
Status cudaHostAlloc(Handle *p, size_t size, unsigned flags) { return cudaMalloc(p, size); }
Status cudaMallocFromPoolAsync(Handle *p, size_t size, Handle pool, Handle stream) { return cudaMalloc(p, size); }
Status cudaFree(Handle p) { return free(p), 0; }
Status cudaFreeHost(Handle p) { return free(p), 0; }
Status cudaFreeAsync(Handle p, Handle stream) { return free(p), 0; }

Status cudaMemcpy(Handle to, Handle from, size_t size, int kind) {
  fake_copies[kind]++, fake_bytes[kind] += (long)size;
  return memcpy(to, from, size), 0;
}
Status cudaMemcpyAsync(Handle to, Handle from, size_t size, int kind, Handle stream) {
  return cudaMemcpy(to, from, size, kind);
}
Status cudaMemset(Handle p, int value, size_t size) { return memset(p, value, size), 0; }
Status cudaMemsetAsync(Handle p, int value, size_t size, Handle stream) { return cudaMemset(p, value, size); }

Status __cudaLaunchKernel() { return fake_launches++, 0; }
Status cudaLaunchKernel() { return fake_launches++, 0; }
Status cudaStreamSynchronize(Handle stream) { return fake_waits++, 0; }
Status cudaDeviceSynchronize(void) { return fake_waits++, 0; }
Status cudaEventSynchronize(Handle event) { return fake_waits++, 0; }
Handle __cudaRegisterFatBinary(Handle code) { return anything; }

Status cudaStreamCreate(Handle *handle) { return *handle = anything, 0; }
Status cudaStreamCreateWithFlags(Handle *handle, unsigned flags) { return *handle = anything, 0; }
Status cudaEventCreate(Handle *handle) { return *handle = anything, 0; }
Status cudaEventCreateWithFlags(Handle *handle, unsigned flags) { return *handle = anything, 0; }
Status cudaMemPoolCreate(Handle *handle, Handle facts) { return *handle = anything, 0; }
Status cublasCreate_v2(Handle *handle) { return *handle = anything, 0; }
Status cublasLtCreate(Handle *handle) { return *handle = anything, 0; }

const char *cudaGetErrorName(Status status) { return "fake"; }
const char *cudaGetErrorString(Status status) { return "no GPU is here"; }
const char *cublasGetStatusName(Status status) { return "fake"; }
const char *cublasGetStatusString(Status status) { return "no GPU is here"; }
