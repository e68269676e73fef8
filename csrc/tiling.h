// Tile sizes of lowrank_statistics, as constant expressions that the planner and the kernel share. No CUDA needed.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DBPKERN_HOST_DEVICE __host__ __device__
#else
#define DBPKERN_HOST_DEVICE
#endif

namespace dbpkern {

constexpr int kMinRank = 8;
constexpr int kMaxRank = 256;
constexpr int kMinCapability = 80;  // cp.async, bf16 and TF32 tensor cores
constexpr int kStages = 3;
constexpr int kTicketBytes = 16;  // room in shared memory for the block's ticket

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// Ranks are padded with zero columns to one of 16, 32, 64, 128, 256.
constexpr int padded_rank(int64_t rank) {
  int padded = 16;
  while (padded < rank) padded *= 2;
  return padded;
}

// Rows or columns of x in the larger of the two output tiles. fp32 operands are split, which takes registers: at the
// largest rank both tiles are the smaller one.
constexpr int kSmallTile = 64;
constexpr int large_tile(int element, int padded) { return element == 4 && padded == kMaxRank ? kSmallTile : 128; }

// One block computes an output tile [tile, padded], from operands `a` (tile x depth or depth x tile) and `b`
// (depth x padded) that pass through shared memory in slices of `depth`.
// element: bytes of an operand; tile: 64 or 128.
struct Tiling {
  int element, padded, tile;

  // Shared memory for three slices must fit the 99 KB of the smallest supported GPUs.
  constexpr int depth() const { return (padded <= 64 ? 128 : 64) / element; }

  // A warp's share of the output tile.
  constexpr int warp_rows() const { return padded <= 32 ? 16 : padded <= 128 || element == 4 ? 32 : 64; }
  constexpr int warp_columns() const { return padded <= 32 ? padded : padded == 64 ? 32 : 64; }
  constexpr int threads() const { return tile / warp_rows() * (padded / warp_columns()) * 32; }

  // Distances between rows in shared memory, in elements. Rows that `ldmatrix` reads start 16 bytes apart modulo
  // 128 bytes (or permute those eight places); fp32 operands read by columns start 8 words apart modulo 32.
  // Either way no two lanes meet in a bank.
  constexpr int a_pitch_by_rows() const { return depth() + 16 / element; }
  constexpr int a_pitch_by_columns() const { return tile + 8; }
  constexpr int b_pitch() const { return padded + 8; }

  constexpr int a_bytes() const {
    return element * max_of(tile * a_pitch_by_rows(), depth() * a_pitch_by_columns());
  }
  constexpr int stage_bytes() const { return a_bytes() + element * depth() * b_pitch(); }
  constexpr int shared_bytes() const { return kStages * stage_bytes() + kTicketBytes; }

  // Blocks that the registers of a multiprocessor have room for. The kernel is compiled with this bound: 255 registers
  // a thread for the widest warp tiles, 168 or 255 for the next when operands are split, 128 for the others.
  constexpr int blocks_by_registers() const {
    return (padded == 256 ? 256 : padded == 128 && element == 4 ? 384 : 512) / threads();
  }
};

}  // namespace dbpkern
