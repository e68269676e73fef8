#include "lowrank_statistics.h"

#include <stdexcept>
#include <string>

#include "lowrank_statistics.cuh"

namespace dbpkern {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("lowrank_statistics: ") + what + ": " + cudaGetErrorString(status));
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

template <class C>
void launch_kernel(const Arguments& arguments, const Plan& plan, cudaStream_t stream) {
  const auto kernel = lowrank_statistics_kernel<C>;
  constexpr int kSharedBytes = C::kTiling.shared_bytes();
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
        "cudaFuncSetAttribute");
  // Nearly all reads go past L1: its share of the memory is better spent on further blocks.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.grid));
  config.blockDim = dim3(C::kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments), "launch");
}

template <class T, int Padded>
void launch_tile(const Arguments& arguments, const Plan& plan, cudaStream_t stream) {
  if (plan.tiling.tile == kSmallTile) launch_kernel<Config<T, Padded, kSmallTile>>(arguments, plan, stream);
  else launch_kernel<Config<T, Padded, large_tile(sizeof(T), Padded)>>(arguments, plan, stream);
}

template <class T>
void launch_rank(const Arguments& arguments, const Plan& plan, cudaStream_t stream) {
  switch (plan.tiling.padded) {
    case 16: return launch_tile<T, 16>(arguments, plan, stream);
    case 32: return launch_tile<T, 32>(arguments, plan, stream);
    case 64: return launch_tile<T, 64>(arguments, plan, stream);
    case 128: return launch_tile<T, 128>(arguments, plan, stream);
    default: return launch_tile<T, 256>(arguments, plan, stream);
  }
}

}  // namespace

Device current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  Device result;
  result.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                      attribute(cudaDevAttrComputeCapabilityMinor, device);
  result.processors = attribute(cudaDevAttrMultiProcessorCount, device);
  result.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  result.shared_per_processor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  result.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  return result;
}

void launch(const LowrankStatistics& tensors, const Problem& problem, const Plan& plan, void* workspace,
            cudaStream_t stream) {
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  const Arguments arguments{tensors,
                            reinterpret_cast<uint32_t*>(bytes),
                            bytes + plan.q_offset,
                            bytes + plan.p_offset,
                            problem.rows, plan.slab_rows,
                            static_cast<int>(problem.features),
                            static_cast<int>(problem.rank),
                            aligned_for_vectors(reinterpret_cast<uint64_t>(tensors.x), problem,
                                                tensors.row_stride * problem.element,
                                                tensors.layer_stride * problem.element),
                            plan.schedule};
  check(cudaMemsetAsync(arguments.counters, 0, static_cast<size_t>(plan.counter_bytes), stream),
        "memset of the counters");
  if (problem.element == 2) launch_rank<Bf16>(arguments, plan, stream);
  else launch_rank<float>(arguments, plan, stream);
}

}  // namespace dbpkern
