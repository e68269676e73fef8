// The planner as a Python module. Needs a C++ compiler and pybind11, no CUDA.
#include <pybind11/pybind11.h>

#include "planner.h"

namespace py = pybind11;
using namespace dbpkern;

PYBIND11_MODULE(dbpkern_planner, m) {
  m.attr("min_rank") = kMinRank;
  m.attr("max_rank") = kMaxRank;

  py::class_<Tiling>(m, "Tiling")
      .def(py::init([](int element, int padded, int tile) { return Tiling{element, padded, tile}; }),
           py::arg("element"), py::arg("padded"), py::arg("tile"))
      .def_readonly("element", &Tiling::element)
      .def_readonly("padded", &Tiling::padded)
      .def_readonly("tile", &Tiling::tile)
      .def_property_readonly("threads", &Tiling::threads)
      .def_property_readonly("depth", &Tiling::depth)
      .def_property_readonly("stages", [](const Tiling&) { return kStages; })
      .def_property_readonly("warp_rows", &Tiling::warp_rows)
      .def_property_readonly("warp_columns", &Tiling::warp_columns)
      .def_property_readonly("a_pitch_by_rows", &Tiling::a_pitch_by_rows)
      .def_property_readonly("a_pitch_by_columns", &Tiling::a_pitch_by_columns)
      .def_property_readonly("b_pitch", &Tiling::b_pitch)
      .def_property_readonly("a_bytes", &Tiling::a_bytes)
      .def_property_readonly("stage_bytes", &Tiling::stage_bytes)
      .def_property_readonly("shared_bytes", &Tiling::shared_bytes)
      .def_property_readonly("blocks_by_registers", &Tiling::blocks_by_registers);

  py::class_<Schedule>(m, "Schedule")
      .def_readonly("layers", &Schedule::layers)
      .def_readonly("slabs", &Schedule::slabs)
      .def_readonly("convert_items", &Schedule::convert_items)
      .def_readonly("project_items", &Schedule::project_items)
      .def_readonly("reduce_items", &Schedule::reduce_items)
      .def_readonly("look_ahead", &Schedule::look_ahead)
      .def_property_readonly("items", &Schedule::items)
      .def_property_readonly("counters", &Schedule::counters)
      .def(
          "item",
          [](const Schedule& schedule, uint32_t ticket) {
            if (ticket >= schedule.items()) throw py::index_error("no such ticket");
            const Item item = schedule.item(ticket);
            static const char* const names[] = {"convert", "project", "reduce"};
            return py::make_tuple(names[static_cast<int>(item.kind)], item.layer, item.slab, item.tile);
          },
          py::arg("ticket"), "(kind, layer, slab, tile) of a ticket");

  py::class_<Plan>(m, "Plan")
      .def_readonly("tiling", &Plan::tiling)
      .def_readonly("schedule", &Plan::schedule)
      .def_readonly("slab_rows", &Plan::slab_rows)
      .def_readonly("blocks_per_processor", &Plan::blocks_per_processor)
      .def_readonly("grid", &Plan::grid)
      .def_readonly("counter_bytes", &Plan::counter_bytes)
      .def_readonly("q_offset", &Plan::q_offset)
      .def_readonly("p_offset", &Plan::p_offset)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes);

  m.def(
      "plan",
      [](int64_t layers, int64_t rows, int64_t features, int64_t rank, int element, int capability, int processors,
         int64_t shared_per_block, int64_t shared_per_processor, int64_t l2_bytes) {
        return make_plan(Problem{layers, rows, features, rank, element},
                         Device{capability, processors, shared_per_block, shared_per_processor, l2_bytes});
      },
      py::kw_only(), py::arg("layers"), py::arg("rows"), py::arg("features"), py::arg("rank"), py::arg("element"),
      py::arg("capability"), py::arg("processors"), py::arg("shared_per_block"), py::arg("shared_per_processor"),
      py::arg("l2_bytes"));

  m.def(
      "aligned_for_vectors",
      [](uint64_t address, int64_t layers, int64_t rows, int64_t row_bytes, int64_t layer_bytes) {
        return aligned_for_vectors(address, Problem{layers, rows, 0, 0, 0}, row_bytes, layer_bytes);
      },
      py::kw_only(), py::arg("address"), py::arg("layers"), py::arg("rows"), py::arg("row_bytes"),
      py::arg("layer_bytes"));
}
