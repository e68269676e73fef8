#include "planner.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dbpkern {
namespace {

constexpr int64_t kSharedReserve = 1024;  // what the system takes of each block's shared memory
constexpr int64_t kVectorBytes = 16;
constexpr int64_t kRegionAlignment = 256;
constexpr int64_t kMaxItems = int64_t{1} << 30;
constexpr int64_t kMaxFeatures = int64_t{1} << 30;
constexpr int64_t kMaxSlabRows = int64_t{1} << 30;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t align_up(int64_t bytes) { return divide_up(bytes, kRegionAlignment) * kRegionAlignment; }

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("lowrank_statistics: " + message);
}

void check(const Problem& p, const Device& device) {
  if (p.element != 2 && p.element != 4) {
    refuse("expected elements of 2 or 4 bytes, got " + std::to_string(p.element));
  }
  if (p.layers < 0 || p.rows < 0) {
    refuse("expected layers and rows >= 0, got " + std::to_string(p.layers) + " and " + std::to_string(p.rows));
  }
  if (p.rank < kMinRank || p.rank > kMaxRank) {
    refuse("expected a rank from " + std::to_string(kMinRank) + " to " + std::to_string(kMaxRank) + ", got " +
           std::to_string(p.rank));
  }
  if (p.features < 1 || p.features > kMaxFeatures) {
    refuse("expected 1 to 2^30 features, got " + std::to_string(p.features));
  }
  if (device.capability < kMinCapability) {
    refuse("expected compute capability 8.0 or newer, got " + std::to_string(device.capability / 10) + "." +
           std::to_string(device.capability % 10));
  }
}

// Products of two counts that may be huge, or a refusal.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) refuse("the problem exceeds 64-bit offsets");
  return product;
}

}  // namespace

Plan make_plan(const Problem& p, const Device& device) {
  check(p, device);
  const int padded = padded_rank(p.rank);
  Plan plan{};

  // The larger tile reads Q and P from L2 half as often; the smaller one is for work that would leave processors idle.
  // Both numbers of items are counted, as projections and reductions can be alone at the start and the end.
  const auto reductions = [&](int64_t tile) { return divide_up(p.features, tile) + divide_up(p.rank, tile); };
  const int64_t large = large_tile(p.element, padded);
  const bool busy = times(p.layers, std::min(divide_up(p.rows, large), reductions(large))) >= device.processors;
  plan.tiling = Tiling{p.element, padded, busy ? static_cast<int>(large) : kSmallTile};
  const Tiling& tiling = plan.tiling;
  const int64_t tile = tiling.tile;
  if (tiling.shared_bytes() > device.shared_per_block) {
    refuse("expected " + std::to_string(tiling.shared_bytes()) +
           " bytes of shared memory for a block, the device has " + std::to_string(device.shared_per_block));
  }
  if (p.layers == 0 || p.rows == 0) return plan;

  plan.blocks_per_processor = static_cast<int>(
      std::min<int64_t>(tiling.blocks_by_registers(),
                        device.shared_per_processor / (tiling.shared_bytes() + kSharedReserve)));
  plan.blocks_per_processor = std::max(plan.blocks_per_processor, 1);

  // A slab's rows are read twice, for P and for Y. At least two slabs are under way, and half of L2 is left to Q, P and
  // the results. Each further slab of a layer reads and writes Y again (8 bytes for each of its entries), so a slab
  // has at least so many rows that this stays the smaller part.
  const int64_t row_bytes = times(p.features + padded, p.element);
  const int64_t budget = device.l2_bytes / 2;
  int64_t slab_tiles = std::max(budget / 2 / row_bytes / tile, divide_up(8 * padded, tile));
  slab_tiles = std::min({slab_tiles, divide_up(p.rows, tile), kMaxSlabRows / tile});
  const int64_t slabs = divide_up(divide_up(p.rows, tile), slab_tiles);
  slab_tiles = divide_up(divide_up(p.rows, tile), slabs);
  plan.slab_rows = slab_tiles * tile;

  const int64_t groups = times(p.layers, divide_up(p.rows, plan.slab_rows));
  const int64_t convert_items = divide_up(p.features, tile);
  const int64_t reduce_items = reductions(tile);
  const int64_t items = times(p.layers, convert_items) + times(groups, slab_tiles + reduce_items);
  if (items > kMaxItems) refuse("expected at most 2^30 tiles of work, got " + std::to_string(items));
  plan.grid = std::min<int64_t>(items, int64_t{device.processors} * plan.blocks_per_processor);

  // About one wave of other items lies between a group's projections and its reductions, as far as L2 holds their rows.
  const int64_t wave = divide_up(plan.grid, slab_tiles + reduce_items);
  const int64_t held = budget / times(plan.slab_rows, row_bytes) - 1;
  const int64_t look_ahead = std::min(std::max<int64_t>(std::min(wave, held), 1), groups);

  plan.schedule = Schedule{static_cast<uint32_t>(p.layers),      static_cast<uint32_t>(groups / p.layers),
                           static_cast<uint32_t>(convert_items), static_cast<uint32_t>(slab_tiles),
                           static_cast<uint32_t>(reduce_items),  static_cast<uint32_t>(look_ahead)};

  plan.counter_bytes = int64_t{4} * plan.schedule.counters();
  plan.q_offset = align_up(plan.counter_bytes);
  plan.p_offset = align_up(plan.q_offset + times(times(p.layers, p.features), padded * p.element));
  plan.workspace_bytes = plan.p_offset + times(times(p.layers, p.rows), padded * p.element);
  return plan;
}

bool aligned_for_vectors(uint64_t address, const Problem& problem, int64_t row_bytes, int64_t layer_bytes) {
  // A distance that is never walked may be anything.
  const auto whole = [](int64_t count, int64_t bytes) { return count <= 1 || bytes % kVectorBytes == 0; };
  return address % kVectorBytes == 0 && whole(problem.rows, row_bytes) && whole(problem.layers, layer_bytes);
}

}  // namespace dbpkern
