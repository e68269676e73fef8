// The order in which blocks take the work of lowrank_statistics. Shared by host and device, no CUDA needed.
#pragma once

#include "tiling.h"

namespace dbpkern {

// kConvert: Q of a layer in the operands' type, padded. kProject: a row tile of P = x Q. kReduce: a tile of
// [x | P]^T P over the rows of a slab.
enum class Kind : int { kConvert, kProject, kReduce };

struct Item {
  Kind kind;
  int layer, slab, tile;
};

// A group is one slab of rows of one layer: group = layer * slabs + slab. Tickets run through steps; step s holds
//
//     the conversions of Q of group s's layer, where the group is the first of its layer,
//     the projections of group s - 1,
//     the reductions of group s - 1 - look_ahead.
//
// An item thus waits only for items with smaller tickets: projections for their layer's conversions, reductions for
// their group's projections and for the reductions of the layer's slab before. The smallest unfinished ticket never
// waits, so any number of resident blocks finishes.
struct Schedule {
  uint32_t layers, slabs;
  uint32_t convert_items;  // of a layer
  uint32_t project_items;  // of a group
  uint32_t reduce_items;   // of a group
  uint32_t look_ahead;

  DBPKERN_HOST_DEVICE uint32_t groups() const { return layers * slabs; }
  DBPKERN_HOST_DEVICE uint32_t items() const {
    return layers * convert_items + groups() * (project_items + reduce_items);
  }
  DBPKERN_HOST_DEVICE uint32_t steps() const { return groups() + 1 + look_ahead; }

  // Items in all steps before this one.
  DBPKERN_HOST_DEVICE uint32_t items_before(uint32_t step) const {
    const uint32_t all = groups();
    const uint32_t converted = ((step < all ? step : all) + slabs - 1) / slabs;
    const uint32_t projected = step < 1 ? 0 : step - 1 < all ? step - 1 : all;
    const uint32_t lag = 1 + look_ahead;
    const uint32_t reduced = step < lag ? 0 : step - lag < all ? step - lag : all;
    return converted * convert_items + projected * project_items + reduced * reduce_items;
  }

  DBPKERN_HOST_DEVICE Item item(uint32_t ticket) const {
    uint32_t step = 0, end = steps();
    while (end - step > 1) {
      const uint32_t middle = step + (end - step) / 2;
      if (items_before(middle) <= ticket) step = middle;
      else end = middle;
    }
    uint32_t tile = ticket - items_before(step);
    if (step < groups() && step % slabs == 0) {
      if (tile < convert_items) return make(Kind::kConvert, step, tile);
      tile -= convert_items;
    }
    if (step >= 1 && step - 1 < groups()) {
      if (tile < project_items) return make(Kind::kProject, step - 1, tile);
      tile -= project_items;
    }
    return make(Kind::kReduce, step - 1 - look_ahead, tile);
  }

  // Places in the array of counters: [ticket | converted, by layer | projected, by group | reduced, by group].
  DBPKERN_HOST_DEVICE uint32_t converted_counter(const Item& item) const { return 1 + item.layer; }
  DBPKERN_HOST_DEVICE uint32_t projected_counter(const Item& item) const {
    return 1 + layers + item.layer * slabs + item.slab;
  }
  DBPKERN_HOST_DEVICE uint32_t reduced_counter(const Item& item) const {
    return 1 + layers + groups() + item.layer * slabs + item.slab;
  }
  DBPKERN_HOST_DEVICE uint32_t counters() const { return 1 + layers + 2 * groups(); }

 private:
  DBPKERN_HOST_DEVICE Item make(Kind kind, uint32_t group, uint32_t tile) const {
    return Item{kind, static_cast<int>(group / slabs), static_cast<int>(group % slabs), static_cast<int>(tile)};
  }
};

}  // namespace dbpkern
