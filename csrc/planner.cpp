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

void expect(bool held, const std::string& what) {
  if (!held) throw std::invalid_argument("lowrank_statistics: expected " + what);
}

void check(const Problem& p, const Device& device) {
  using std::to_string;
  const std::string capability = to_string(device.capability / 10) + "." + to_string(device.capability % 10);
  expect(p.element == 2 || p.element == 4, "elements of 2 or 4 bytes, got " + to_string(p.element));
  expect(p.layers > 0 && p.rows > 0, "layers and rows, got " + to_string(p.layers) + " and " + to_string(p.rows));
  expect(p.rank >= kMinRank && p.rank <= kMaxRank, "a rank from " + to_string(kMinRank) + " to " +
                                                       to_string(kMaxRank) + ", got " + to_string(p.rank));
  expect(p.features > 0 && p.features <= kMaxFeatures, "1 to 2^30 features, got " + to_string(p.features));
  expect(device.capability >= kMinCapability, "compute capability 8.0 or newer, got " + capability);
}

// Products of two counts that may be huge, or a refusal.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  expect(!__builtin_mul_overflow(a, b, &product), "a problem within 64-bit offsets");
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
  expect(tiling.shared_bytes() <= device.shared_per_block,
         std::to_string(tiling.shared_bytes()) + " bytes of shared memory for a block, the device has " +
             std::to_string(device.shared_per_block));

  const int64_t by_memory = device.shared_per_processor / (tiling.shared_bytes() + kSharedReserve);
  plan.blocks_per_processor = static_cast<int>(std::clamp<int64_t>(by_memory, 1, tiling.blocks_by_registers()));

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
  expect(items <= kMaxItems, "at most 2^30 tiles of work, got " + std::to_string(items));
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
