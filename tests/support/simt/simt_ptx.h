// Stands in for the instructions in csrc/ptx.cuh.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda_runtime.h"
#include "simt.h"

#define DBPKERN_SHARED(name) unsigned char* const name = simt::shared_memory()

namespace dbpkern {

inline void copy_async(void* target, const void* source, int bytes) { simt::copy(target, source, bytes); }
inline void commit_copies() { simt::commit(); }

template <int Pending>
inline void wait_copies() {
  simt::wait(Pending);
}

struct MatrixArguments {
  uint32_t (*target)[4];
  const void* row;
};

template <bool Transposed>
void load_matrices_of_warp(void* const (&lanes)[32]) {
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(matrix[row], static_cast<MatrixArguments*>(lanes[8 * m + row])->row, sizeof(matrix[row]));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const uint32_t first = Transposed ? matrix[column][row] : matrix[row][column];
      const uint32_t second = Transposed ? matrix[column + 1][row] : matrix[row][column + 1];
      (*static_cast<MatrixArguments*>(lanes[lane])->target)[m] = second << 16 | first;
    }
  }
}

template <bool Transposed>
void load_matrices_checked(uint32_t (&m)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) simt::fail("a row of ldmatrix is not aligned");
  MatrixArguments arguments{&m, row};
  simt::collective(Transposed ? "ldmatrix.trans" : "ldmatrix", &arguments, load_matrices_of_warp<Transposed>);
}

inline void load_matrices(uint32_t (&m)[4], const void* row) { load_matrices_checked<false>(m, row); }
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) { load_matrices_checked<true>(m, row); }

// Tensor cores round sums towards zero.
inline float truncate(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafterf(nearest, 0.f) : nearest;
}

struct MmaArguments {
  float (*acc)[4];
  const uint32_t (*a)[4];
  uint32_t b[2];
};

inline double tf32_value(uint32_t bits) { return __uint_as_float(bits & 0xffffe000u); }
inline double bf16_value(uint32_t word, int half) { return __uint_as_float(half ? word & 0xffff0000u : word << 16); }

// Depth: 16 for bf16, 8 for TF32. Places of the operands' entries among lanes and registers as in the PTX manual.
template <int Depth>
void mma_of_warp(void* const (&lanes)[32]) {
  double a[16][Depth], b[Depth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& arguments = *static_cast<MmaArguments*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = group + r % 2 * 8, k = r / 2 * (Depth / 2);
      if (Depth == 16) {
        for (int h = 0; h < 2; ++h) a[row][k + 2 * member + h] = bf16_value((*arguments.a)[r], h);
      } else {
        a[row][k + member] = tf32_value((*arguments.a)[r]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      const int k = r * (Depth / 2);
      if (Depth == 16) {
        for (int h = 0; h < 2; ++h) b[k + 2 * member + h][group] = bf16_value(arguments.b[r], h);
      } else {
        b[k + member][group] = tf32_value(arguments.b[r]);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float(&acc)[4] = *static_cast<MmaArguments*>(lanes[lane])->acc;
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = acc[e];
      for (int k = 0; k < Depth; ++k) sum += a[row][k] * b[k][column];
      acc[e] = truncate(sum);
    }
  }
}

inline void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArguments arguments{&acc, &a, {b0, b1}};
  simt::collective("mma.bf16", &arguments, mma_of_warp<16>);
}

inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaArguments arguments{&acc, &a, {b0, b1}};
  simt::collective("mma.tf32", &arguments, mma_of_warp<8>);
}

inline uint32_t round_to_tf32(float value) {
  if (std::isnan(value)) return 0x7fffffffu;
  return (__float_as_uint(value) + 0x1000u) & 0xffffe000u;  // ties away from zero
}

inline uint32_t round_to_bf16(float value) {
  if (std::isnan(value)) return 0x7fffu;
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // ties to even
}

inline uint32_t round_to_bf16(float low, float high) { return round_to_bf16(high) << 16 | round_to_bf16(low); }

inline void release_add(uint32_t* counter) { ++*counter; }
inline uint32_t load_acquire(const uint32_t* counter) { return *counter; }
inline void pause() { simt::yield(); }

}  // namespace dbpkern
