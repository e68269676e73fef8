// Host-side planning of lowrank_statistics: tiles, shared memory, order of work, grid and workspace for a shape and a
// device. No CUDA needed.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace dbpkern {

struct Problem {
  int64_t layers, rows, features, rank;
  int element;  // bytes of an element of x: 2 (bf16) or 4 (fp32)
};

struct Device {
  int capability;  // 80 for compute capability 8.0
  int processors;
  int64_t shared_per_block;  // the most that a kernel can opt in to
  int64_t shared_per_processor;
  int64_t l2_bytes;
};

struct Plan {
  Tiling tiling;
  Schedule schedule;
  int64_t slab_rows;  // rows of a slab, a multiple of the tile; the last slab may be shorter
  int blocks_per_processor;
  int64_t grid;
  // Workspace: counters, Q in the operands' type [layers, features, padded], P likewise [layers, rows, padded].
  int64_t counter_bytes, q_offset, p_offset, workspace_bytes;
};

// Throws std::invalid_argument when the problem or the device cannot be served: without layers or rows, too.
Plan make_plan(const Problem& problem, const Device& device);

// Whether 16-byte copies may read x: its address and the distances between rows and layers, in bytes.
bool aligned_for_vectors(uint64_t address, const Problem& problem, int64_t row_bytes, int64_t layer_bytes);

}  // namespace dbpkern
