// The kernel of lowrank_statistics. Blocks take items of work by ticket (schedule.h) until none is left:
//
//     convert  Q of a layer -> the operands' type, padded with zero columns           [features, padded]
//     project  a row tile of P = x Q                                                  [tile, padded]
//     reduce   a tile of Y = x^T P / rows with c beside it, or of B = P^T P / rows    [tile, padded]
//
// Projections read x from device memory. The reductions of the same rows follow closely and read them from L2. Every
// sum has one order that the shape and the plan fix: results do not depend on timing.
#pragma once

#include "lowrank_statistics.h"
#include "ptx.cuh"

namespace dbpkern {

struct Arguments : LowrankStatistics {
  uint32_t* counters;
  void* converted;  // Q in the operands' type [layers, features, padded]
  void* projected;  // P likewise [layers, rows, padded]
  int64_t rows, slab_rows;
  int features, rank;
  bool aligned;  // x can be read by copies of 16 bytes
  Schedule schedule;
};

template <class T, int Padded, int Tile>
struct Config {
  using Element = T;
  static constexpr Tiling kTiling{sizeof(T), Padded, Tile};
  static constexpr int kPadded = Padded;
  static constexpr int kTile = Tile;
  static constexpr int kThreads = kTiling.threads();
  static constexpr int kDepth = kTiling.depth();
  static constexpr int kRowPitch = kTiling.a_pitch_by_rows();
  static constexpr int kColumnPitch = kTiling.a_pitch_by_columns();
  static constexpr int kBPitch = kTiling.b_pitch();
  static constexpr int kABytes = kTiling.a_bytes();
  static constexpr int kStageBytes = kTiling.stage_bytes();
  static constexpr int kWarpRows = kTiling.warp_rows();
  static constexpr int kWarpColumns = kTiling.warp_columns();
  static constexpr int kWarpsAcross = Padded / kWarpColumns;
  static constexpr int kRowTiles = kWarpRows / 16;      // mma tiles of a warp
  static constexpr int kColumnTiles = kWarpColumns / 8;
  static constexpr int kMinBlocks = kTiling.blocks_by_registers();

  // The corner of this thread's warp's share of the tile.
  __device__ static int first_row() { return threadIdx.x / 32 / kWarpsAcross * kWarpRows; }
  __device__ static int first_column() { return threadIdx.x / 32 % kWarpsAcross * kWarpColumns; }
};

template <class C>
using Accumulators = float[C::kRowTiles][C::kColumnTiles][4];

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(Bf16 value) { return __uint_as_float(static_cast<uint32_t>(value.bits) << 16); }

// Copies `Rows` x `Columns` elements to shared memory, zero where the source has fewer than that.
// rows, columns: what the source has, possibly none. The source is aligned to 16 bytes, and so is its stride.
template <class T, int Rows, int Columns, int Pitch, int Threads>
__device__ inline void copy_vectors(T* target, const T* source, int64_t stride, int rows, int columns) {
  constexpr int kWidth = 16 / sizeof(T);
  constexpr int kAcross = Columns / kWidth;
  constexpr int kStep = Threads / kAcross;  // rows from one copy of a thread to its next
  static_assert(Threads % kAcross == 0);
  const int first = threadIdx.x / kAcross, column = threadIdx.x % kAcross * kWidth;
  int held = columns - column;
  held = (held < 0 ? 0 : held > kWidth ? kWidth : held) * static_cast<int>(sizeof(T));
  const T* from = source + first * stride + column;
  target += first * Pitch + column;
#pragma unroll
  for (int row = 0; row < Rows; row += kStep) {
    if (Rows % kStep != 0 && row + first >= Rows) break;
    const int bytes = row + first < rows ? held : 0;
    copy_async(target + row * Pitch, bytes ? from : source, bytes);
    from += kStep * stride;
  }
}

// The same for any alignment.
template <class T, int Rows, int Columns, int Pitch, int Threads>
__device__ inline void copy_elements(T* target, const T* source, int64_t stride, int rows, int columns) {
#pragma unroll 4
  for (int i = threadIdx.x; i < Rows * Columns; i += Threads) {
    const int row = i / Columns, column = i % Columns;
    T value{};
    if (row < rows && column < columns) value = source[row * stride + column];
    target[row * Pitch + column] = value;
  }
}

// acc += a b over one slice. ByRows: a lies in shared memory as [tile, depth], otherwise as [depth, tile].
template <class C, bool ByRows>
__device__ inline void multiply(Accumulators<C>& acc, const Bf16* a, const Bf16* b, int first_row, int first_column) {
  const int lane = threadIdx.x % 32;
  const int low = lane % 8 + lane / 8 % 2 * 8, high = lane / 16 * 8;
  const int low_half = lane % 8 + high, high_half = lane / 8 % 2 * 8;
#pragma unroll
  for (int k = 0; k < C::kDepth; k += 16) {
    uint32_t a_part[C::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
      const int row = first_row + 16 * i;
      if (ByRows) load_matrices(a_part[i], a + (row + low) * C::kRowPitch + k + high);
      else load_matrices_transposed(a_part[i], a + (k + low_half) * C::kColumnPitch + row + high_half);
    }
#pragma unroll
    for (int j = 0; j < C::kColumnTiles; j += 2) {
      uint32_t b_part[4];
      load_matrices_transposed(b_part, b + (k + low) * C::kBPitch + first_column + 8 * j + high);
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        mma_bf16(acc[i][j], a_part[i], b_part[0], b_part[1]);
        mma_bf16(acc[i][j + 1], a_part[i], b_part[2], b_part[3]);
      }
    }
  }
}

// value = high + low, both TF32, but for about 2^-22 of it.
__device__ inline void split(float value, uint32_t& high, uint32_t& low) {
  high = round_to_tf32(value);
  low = round_to_tf32(value - __uint_as_float(high));
}

// fp32 operands: three TF32 products, and sums outside the tensor cores, which truncate.
template <class C, bool ByRows>
__device__ inline void multiply(Accumulators<C>& acc, const float* a, const float* b, int first_row,
                                int first_column) {
  const int lane = threadIdx.x % 32;
  const int group = lane / 4, member = lane % 4;
  // Wide warp tiles have enough independent products in one step, and no registers for a second.
  [[maybe_unused]] constexpr int kUnroll = C::kRowTiles * C::kColumnTiles >= 8 ? 1 : 2;
#pragma unroll kUnroll
  for (int k = 0; k < C::kDepth; k += 8) {
    uint32_t a_high[C::kRowTiles][4], a_low[C::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < C::kRowTiles; ++i) {
      uint32_t bits[4];
      if (ByRows) {
        const int row = first_row + 16 * i + lane % 8 + lane / 8 % 2 * 8;
        load_matrices(bits, a + row * C::kRowPitch + k + lane / 16 * 4);  // an fp32 value is two 16-bit ones
      } else {
        const float* corner = a + (k + member) * C::kColumnPitch + first_row + 16 * i + group;
        bits[0] = __float_as_uint(corner[0]);
        bits[1] = __float_as_uint(corner[8]);
        bits[2] = __float_as_uint(corner[4 * C::kColumnPitch]);
        bits[3] = __float_as_uint(corner[4 * C::kColumnPitch + 8]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) split(__uint_as_float(bits[e]), a_high[i][e], a_low[i][e]);
    }
#pragma unroll
    for (int j = 0; j < C::kColumnTiles; ++j) {
      const float* corner = b + (k + member) * C::kBPitch + first_column + 8 * j + group;
      uint32_t high[2], low[2];
      split(corner[0], high[0], low[0]);
      split(corner[4 * C::kBPitch], high[1], low[1]);
#pragma unroll
      for (int i = 0; i < C::kRowTiles; ++i) {
        float sum[4] = {};
        mma_tf32(sum, a_low[i], high[0], high[1]);
        mma_tf32(sum, a_high[i], low[0], low[1]);
        mma_tf32(sum, a_high[i], high[0], high[1]);
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[e];
      }
    }
  }
}

// Brings slice after slice to shared memory, two ahead of the one in use. load(slice, a, b) starts the copies of one
// slice, use(a, b) works on it.
template <class C, class Load, class Use>
__device__ inline void for_slices(int slices, unsigned char* shared, const Load& load, const Use& use) {
  using T = typename C::Element;
  const auto a_of = [&](int slice) { return reinterpret_cast<T*>(shared + slice % kStages * C::kStageBytes); };
  const auto b_of = [&](int slice) { return a_of(slice) + C::kABytes / sizeof(T); };
  const auto start = [&](int slice) {
    if (slice < slices) load(slice, a_of(slice), b_of(slice));
    commit_copies();  // also an empty group, so that the number of groups says which slice is there
  };
#pragma unroll
  for (int slice = 0; slice < kStages - 1; ++slice) start(slice);
  for (int slice = 0; slice < slices; ++slice) {
    wait_copies<kStages - 2>();
    __syncthreads();  // the slice is there for all, and all have done with the one that the next copies overwrite
    start(slice + kStages - 1);
    use(a_of(slice), b_of(slice));
  }
  wait_copies<0>();
  __syncthreads();
}

// Calls store(row, column, value) for each of this thread's values of the tile.
template <class C, class Store>
__device__ inline void for_values(const Accumulators<C>& acc, int first_row, int first_column, const Store& store) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < C::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < C::kColumnTiles; ++j) {
      const int row = first_row + 16 * i + lane / 4, column = first_column + 8 * j + lane % 4 * 2;
      store(row, column, acc[i][j][0], acc[i][j][1]);
      store(row + 8, column, acc[i][j][2], acc[i][j][3]);
    }
  }
}

__device__ inline void store_pair(float* target, float first, float second) {
  *reinterpret_cast<float2*>(target) = make_float2(first, second);
}

__device__ inline void store_pair(Bf16* target, float first, float second) {
  *reinterpret_cast<uint32_t*>(target) = round_to_bf16(first, second);
}

template <class C>
__device__ inline void convert(const Arguments& arguments, const Item& item) {
  using T = typename C::Element;
  constexpr int kPairs = C::kPadded / 2;
  const int first = item.tile * C::kTile;
  const int64_t layer_features = static_cast<int64_t>(item.layer) * arguments.features;
  const float* Q = arguments.Q + layer_features * arguments.rank;
  T* converted = static_cast<T*>(arguments.converted) + layer_features * C::kPadded;
#pragma unroll 4
  for (int i = threadIdx.x; i < C::kTile * kPairs; i += C::kThreads) {
    const int64_t feature = first + i / kPairs;
    const int column = i % kPairs * 2;
    if (feature >= arguments.features) break;
    const float* row = Q + feature * arguments.rank;
    store_pair(converted + feature * C::kPadded + column, column < arguments.rank ? row[column] : 0.f,
               column + 1 < arguments.rank ? row[column + 1] : 0.f);
  }
}

template <class C>
__device__ inline void project(const Arguments& arguments, const Item& item, unsigned char* shared) {
  using T = typename C::Element;
  const int64_t slab_start = item.slab * arguments.slab_rows;
  const int64_t slab_end = min(arguments.rows, slab_start + arguments.slab_rows);
  const int64_t first = slab_start + static_cast<int64_t>(item.tile) * C::kTile;
  if (first >= slab_end) return;  // the last slab can be shorter
  const int rows = static_cast<int>(min(slab_end - first, static_cast<int64_t>(C::kTile)));
  const int features = arguments.features;
  const T* x = static_cast<const T*>(arguments.x) + item.layer * arguments.layer_stride + first * arguments.row_stride;
  const T* Q = static_cast<const T*>(arguments.converted) + static_cast<int64_t>(item.layer) * features * C::kPadded;

  Accumulators<C> acc = {};
  const int first_row = C::first_row(), first_column = C::first_column();
  for_slices<C>(
      (features + C::kDepth - 1) / C::kDepth, shared,
      [&](int slice, T* a, T* b) {
        const int feature = slice * C::kDepth;
        if (arguments.aligned) {
          copy_vectors<T, C::kTile, C::kDepth, C::kRowPitch, C::kThreads>(a, x + feature, arguments.row_stride, rows,
                                                                         features - feature);
        } else {
          copy_elements<T, C::kTile, C::kDepth, C::kRowPitch, C::kThreads>(a, x + feature, arguments.row_stride, rows,
                                                                          features - feature);
        }
        copy_vectors<T, C::kDepth, C::kPadded, C::kBPitch, C::kThreads>(
            b, Q + static_cast<int64_t>(feature) * C::kPadded, C::kPadded, features - feature, C::kPadded);
      },
      [&](const T* a, const T* b) { multiply<C, true>(acc, a, b, first_row, first_column); });

  T* P = static_cast<T*>(arguments.projected) + (item.layer * arguments.rows + first) * C::kPadded;
  for_values<C>(acc, first_row, first_column, [&](int row, int column, float value, float next) {
    if (row < rows) store_pair(P + static_cast<int64_t>(row) * C::kPadded + column, value, next);
  });
}

// Sums of squares of the tile's columns. Threads hold a 4-byte word of a row each; one thread sums one word of some of
// the slice's rows, slice by slice, so that no long chain of roundings arises.
template <class C>
struct Squares {
  static constexpr int kPerWord = 4 / sizeof(typename C::Element);
  static constexpr int kWords = C::kTile / kPerWord;
  static constexpr int kPhases = C::kThreads / kWords;
  float sum[kPerWord] = {};

  __device__ void add(const typename C::Element* a) {
    const int word = threadIdx.x % kWords * kPerWord;
    float slice[kPerWord] = {};
#pragma unroll 8
    for (int row = threadIdx.x / kWords; row < C::kDepth; row += kPhases) {
#pragma unroll
      for (int e = 0; e < kPerWord; ++e) {
        const float value = to_float(a[row * C::kColumnPitch + word + e]);
        slice[e] += value * value;
      }
    }
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) sum[e] += slice[e];
  }

  // store(column, sum of squares) once for each column; `scratch` is shared memory that nobody uses.
  template <class Store>
  __device__ void finish(float* scratch, const Store& store) const {
#pragma unroll
    for (int e = 0; e < kPerWord; ++e) {
      scratch[threadIdx.x / kWords * C::kTile + threadIdx.x % kWords * kPerWord + e] = sum[e];
    }
    __syncthreads();
    for (int column = threadIdx.x; column < C::kTile; column += C::kThreads) {
      float total = 0.f;
#pragma unroll
      for (int phase = 0; phase < kPhases; ++phase) total += scratch[phase * C::kTile + column];
      store(column, total);
    }
  }
};

template <class C>
__device__ inline void reduce(const Arguments& arguments, const Item& item, unsigned char* shared) {
  using T = typename C::Element;
  const int features = arguments.features, rank = arguments.rank;
  const int64_t first = item.slab * arguments.slab_rows;
  const int rows = static_cast<int>(min(arguments.rows - first, arguments.slab_rows));
  const T* P = static_cast<const T*>(arguments.projected) + (item.layer * arguments.rows + first) * C::kPadded;

  // Tiles of x's columns come first, those of P's after them.
  const int x_tiles = (features + C::kTile - 1) / C::kTile;
  const bool of_x = item.tile < x_tiles;
  const int first_feature = (of_x ? item.tile : item.tile - x_tiles) * C::kTile;
  const int columns = (of_x ? features : C::kPadded) - first_feature;
  const int64_t stride = of_x ? arguments.row_stride : C::kPadded;
  const T* source = first_feature + (of_x ? static_cast<const T*>(arguments.x) + item.layer * arguments.layer_stride +
                                               first * arguments.row_stride
                                         : P);
  const bool aligned = arguments.aligned || !of_x;

  Accumulators<C> acc = {};
  Squares<C> squares;
  const int first_row = C::first_row(), first_column = C::first_column();
  for_slices<C>(
      (rows + C::kDepth - 1) / C::kDepth, shared,
      [&](int slice, T* a, T* b) {
        const int row = slice * C::kDepth;
        if (aligned) {
          copy_vectors<T, C::kDepth, C::kTile, C::kColumnPitch, C::kThreads>(a, source + row * stride, stride,
                                                                            rows - row, columns);
        } else {
          copy_elements<T, C::kDepth, C::kTile, C::kColumnPitch, C::kThreads>(a, source + row * stride, stride,
                                                                             rows - row, columns);
        }
        copy_vectors<T, C::kDepth, C::kPadded, C::kBPitch, C::kThreads>(b, P + static_cast<int64_t>(row) * C::kPadded,
                                                                       C::kPadded, rows - row, C::kPadded);
      },
      [&](const T* a, const T* b) {
        if (of_x) squares.add(a);
        multiply<C, false>(acc, a, b, first_row, first_column);
      });

  // Slabs after the first add to what the one before has stored.
  const float scale = 1.f / static_cast<float>(arguments.rows);
  const auto merge = [&](const float* before, float value) {
    return item.slab ? __ldcg(before) + value * scale : value * scale;
  };
  if (of_x) {
    float* Y = arguments.Y + (static_cast<int64_t>(item.layer) * features + first_feature) * rank;
    for_values<C>(acc, first_row, first_column, [&](int row, int column, float value, float next) {
      if (row >= columns) return;
      float* target = Y + static_cast<int64_t>(row) * rank + column;
      if (column < rank) target[0] = merge(target, value);
      if (column + 1 < rank) target[1] = merge(target + 1, next);
    });
    float* c = arguments.c + static_cast<int64_t>(item.layer) * features + first_feature;
    squares.finish(reinterpret_cast<float*>(shared), [&](int column, float total) {
      if (column < columns) c[column] = merge(c + column, total);
    });
  } else {
    // The upper triangle is stored twice: B is symmetric to the bit.
    float* B = arguments.B + static_cast<int64_t>(item.layer) * rank * rank;
    const auto store = [&](int row, int column, float value) {
      if (row > column || column >= rank) return;
      value = merge(B + row * rank + column, value);
      B[row * rank + column] = value;
      B[column * rank + row] = value;
    };
    for_values<C>(acc, first_row, first_column, [&](int row, int column, float value, float next) {
      store(first_feature + row, column, value);
      store(first_feature + row, column + 1, next);
    });
  }
}

// Holds the block until `counter` has reached `target`; what was released before it then lies open.
__device__ inline void wait_for(const uint32_t* counter, uint32_t target) {
  if (threadIdx.x == 0) {
    while (load_acquire(counter) < target) pause();
  }
  __syncthreads();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kMinBlocks) lowrank_statistics_kernel(const Arguments arguments) {
  DBPKERN_SHARED(shared);
  uint32_t& ticket = *reinterpret_cast<uint32_t*>(shared + kStages * C::kStageBytes);
  const Schedule& schedule = arguments.schedule;
  uint32_t* const counters = arguments.counters;
  for (;;) {
    if (threadIdx.x == 0) ticket = atomicAdd(counters, 1u);
    __syncthreads();
    if (ticket >= schedule.items()) return;
    const Item item = schedule.item(ticket);
    uint32_t* done;
    if (item.kind == Kind::kConvert) {
      done = counters + schedule.converted_counter(item);
      convert<C>(arguments, item);
    } else if (item.kind == Kind::kProject) {
      done = counters + schedule.projected_counter(item);
      wait_for(counters + schedule.converted_counter(item), schedule.convert_items);
      project<C>(arguments, item, shared);
    } else {
      done = counters + schedule.reduced_counter(item);
      wait_for(counters + schedule.projected_counter(item), schedule.project_items);
      if (item.slab) wait_for(counters + schedule.reduced_counter(item) - 1, schedule.reduce_items);
      reduce<C>(arguments, item, shared);
    }
    __syncthreads();
    if (threadIdx.x == 0) release_add(done);
  }
}

}  // namespace dbpkern
