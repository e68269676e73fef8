// A small emulation of CUDA's execution model, so that the kernels' own source runs on a CPU.
//
// Threads are fibers of one process thread. Several blocks are resident at once, each with its own shared memory, which
// starts as NaN. A fiber runs until it waits at a barrier, at an operation of its warp or in a spin loop; who comes
// next is the schedule's choice. Asynchronous copies happen at once or only when they are waited for: the two extremes
// between which hardware may choose.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  Dim() = default;
  explicit Dim(unsigned x_) : x(x_) {}
};

enum class Order : int { kForward, kReverse, kShuffled };

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 0;
  int resident = 1;      // blocks that run at once
  bool eager = false;    // copies happen when they are issued
  bool refuse = false;   // launches fail
};

struct Machine {
  int capability, processors;
  int64_t shared_per_block, shared_per_processor, l2_bytes;
};

extern Options options;
extern Machine machine;

// Memory between two pages that nobody may touch, filled with NaN. It ends as close to the upper page as an address
// of `misalignment` modulo 16 allows.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t misalignment = 0);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() const { return data_; }
  bool intact() const;  // nothing was written beside the memory

 private:
  unsigned char *map_, *data_;
  size_t mapped_, bytes_;
};

// Runs the body once for each thread of each block. Throws std::runtime_error on a deadlock, on a misuse of the model
// and on access to memory outside all buffers.
void run(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& body);

// For the body:
[[noreturn]] void fail(const std::string& message);
unsigned thread_index();
unsigned block_index();
unsigned char* shared_memory();
void barrier(int line);
void yield();
void copy(void* target, const void* source, int bytes);
void commit();
void wait(int pending);

// All 32 lanes of a warp call the same operation; the last one to come executes it on all lanes' arguments.
void collective(const char* name, void* arguments, void (*execute)(void* const (&lanes)[32]));

}  // namespace simt
