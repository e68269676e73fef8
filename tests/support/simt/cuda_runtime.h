// Stands in for CUDA's header: what the kernels and their launcher use of it, on top of the emulation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simt.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __syncthreads() simt::barrier(__LINE__)

struct ThreadIndex {
  struct X {
    operator unsigned() const { return simt::thread_index(); }
  } x;
};
static const ThreadIndex threadIdx;

using std::min;
using dim3 = simt::Dim;

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __ldcg(const float* address) { return *address; }
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) { return std::exchange(*address, *address + value); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrL2CacheSize,
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const simt::Machine& m = simt::machine;
  switch (which) {
    case cudaDevAttrComputeCapabilityMajor: *value = m.capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = m.capability % 10; break;
    case cudaDevAttrMultiProcessorCount: *value = m.processors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(m.shared_per_block); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(m.shared_per_processor); break;
    case cudaDevAttrL2CacheSize: *value = static_cast<int>(m.l2_bytes); break;
  }
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout,
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute which, int value) {
  const int64_t most = which == cudaFuncAttributeMaxDynamicSharedMemorySize ? simt::machine.shared_per_block : 100;
  return value <= most ? cudaSuccess : cudaErrorInvalidValue;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  if (simt::options.refuse) return cudaErrorInvalidValue;
  simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return cudaSuccess;
}
