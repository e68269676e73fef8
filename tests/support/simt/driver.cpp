// One call of lowrank_statistics in the emulation, for ctypes.
#include <cstring>
#include <stdexcept>
#include <string>

#include "lowrank_statistics.h"
#include "simt.h"

namespace {

std::string error;

}  // namespace

extern "C" {

struct Call {
  // x as it lies in memory, first element to last, and the address it shall have modulo 16.
  const void* x;
  int64_t x_bytes, misalignment;
  const float* Q;
  float *B, *Y, *c;
  int64_t layers, rows, features, rank, element, row_stride, layer_stride;
  simt::Machine machine;
  int order, resident, eager, refuse;
  uint64_t seed;
};

// Returns nullptr, or what went wrong.
const char* simt_lowrank_statistics(const Call* call) {
  try {
    simt::machine = call->machine;
    simt::options.order = static_cast<simt::Order>(call->order);
    simt::options.seed = call->seed;
    simt::options.resident = call->resident;
    simt::options.eager = call->eager != 0;
    simt::options.refuse = call->refuse != 0;

    const dbpkern::Problem problem{call->layers, call->rows, call->features, call->rank,
                                   static_cast<int>(call->element)};
    const dbpkern::Plan plan = dbpkern::make_plan(problem, dbpkern::current_device());
    const auto floats = [](int64_t count) { return static_cast<size_t>(count) * sizeof(float); };
    const int64_t layers = call->layers, features = call->features, rank = call->rank;
    const size_t q_bytes = floats(layers * features * rank), c_bytes = floats(layers * features);
    const size_t b_bytes = floats(layers * rank * rank);
    const size_t x_bytes = static_cast<size_t>(call->x_bytes);
    simt::Guarded x(x_bytes, static_cast<size_t>(call->misalignment)), Q(q_bytes), B(b_bytes), Y(q_bytes), c(c_bytes);
    simt::Guarded workspace(static_cast<size_t>(plan.workspace_bytes));
    if (x_bytes) std::memcpy(x.data(), call->x, x_bytes);
    if (q_bytes) std::memcpy(Q.data(), call->Q, q_bytes);
    const auto values = [](const simt::Guarded& buffer) { return reinterpret_cast<float*>(buffer.data()); };
    const dbpkern::LowrankStatistics tensors{x.data(),  call->row_stride, call->layer_stride, values(Q),
                                             values(B), values(Y),        values(c)};
    dbpkern::launch(tensors, problem, plan, workspace.data(), nullptr);
    for (const simt::Guarded* buffer : {&x, &Q, &B, &Y, &c, &workspace}) {
      if (!buffer->intact()) throw std::runtime_error("simt: a write beside a buffer");
    }
    if (x_bytes && std::memcmp(x.data(), call->x, x_bytes) != 0) throw std::runtime_error("simt: x was changed");
    if (q_bytes && std::memcmp(Q.data(), call->Q, q_bytes) != 0) throw std::runtime_error("simt: Q was changed");
    if (b_bytes) std::memcpy(call->B, B.data(), b_bytes);
    if (q_bytes) std::memcpy(call->Y, Y.data(), q_bytes);
    if (c_bytes) std::memcpy(call->c, c.data(), c_bytes);
    return nullptr;
  } catch (const std::exception& exception) {
    error = exception.what();
    return error.c_str();
  }
}

}  // extern "C"
