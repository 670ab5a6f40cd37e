/* The names of CUDA that DALI's headers use, for a machine without the toolkit: the operators are the CPU's, none of
   these functions is called, and whatever refers to one is inline code that the linker drops or libdali resolves. */
#pragma once

#include <cstddef>
#include <cstdint>

#define CUDART_VERSION 12000
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorCudartUnloading = 4,
  cudaErrorNotReady = 600
};
enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_DEINITIALIZED = 4,
  CUDA_ERROR_NOT_READY = 600
};
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum { cudaEventDisableTiming = 2 };

typedef struct CUctx_st *CUcontext;
typedef struct CUevent_st *cudaEvent_t;
typedef struct CUstream_st *cudaStream_t;
static cudaStream_t const cudaStreamLegacy = (cudaStream_t)1;
static cudaStream_t const cudaStreamPerThread = (cudaStream_t)2;

extern "C" {
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaGetLastError();
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
CUresult cuGetErrorName(CUresult error, const char **name);
CUresult cuGetErrorString(CUresult error, const char **text);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
}
