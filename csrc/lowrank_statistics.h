// Low-rank statistics of stacked layers in one launch, without Torch: raw pointers and a stream.
#pragma once

#include <cuda_runtime.h>

#include "planner.h"

namespace dbpkern {

// With P = x Q for each layer: B = P^T P / rows, Y = x^T P / rows, c = column means of x^2.
struct LowrankStatistics {
  const void* x;  // [layers, rows, features], bf16 or fp32 as problem.element says; features lie side by side
  int64_t row_stride, layer_stride;  // of x, in elements
  const float* Q;                    // [layers, features, rank], contiguous
  float* B;                          // [layers, rank, rank]
  float* Y;                          // [layers, features, rank]
  float* c;                          // [layers, features]
};

// What the planner needs to know of the current device. Throws std::runtime_error when CUDA fails.
Device current_device();

// Enqueues one memset of the counters and one kernel. `workspace` holds plan.workspace_bytes bytes, aligned to 256.
// Throws std::runtime_error when CUDA fails.
void launch(const LowrankStatistics& tensors, const Problem& problem, const Plan& plan, void* workspace,
            cudaStream_t stream);

}  // namespace dbpkern
