#include "simt.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <random>
#include <stdexcept>
#include <vector>

namespace simt {

Options options;
Machine machine;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kPage = 4096;
constexpr int kWarp = 32;
constexpr int kIdle = 8;  // passes without progress: nobody is left who could end a spin loop

struct Copy {
  void* target;
  const void* source;
  int bytes;
};

struct Block;

struct Fiber {
  Block* block;
  unsigned thread;
  unsigned char* stack;
  ucontext_t entry;
  jmp_buf place;
  bool started, blocked, paused, finished;
  std::vector<Copy> open;                // copies since the last commit
  std::deque<std::vector<Copy>> groups;  // committed groups, oldest first
};

struct Warp {
  const char* operation = nullptr;
  int arrived = 0;
  void* lanes[kWarp];
};

struct Block {
  unsigned index;
  std::unique_ptr<Guarded> shared;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  unsigned waiting = 0, finished = 0;
  int barrier_line = 0;
};

Fiber* current;
const std::function<void()>* body;
jmp_buf scheduler;
sigjmp_buf fault;
std::string failure;
std::vector<std::unique_ptr<Fiber>> pool;  // fibers keep their stacks from run to run

void switch_to_scheduler() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void block_current() {
  current->blocked = true;
  switch_to_scheduler();
}

void perform(const Copy& copy) {
  std::memset(copy.target, 0, 16);
  std::memcpy(copy.target, copy.source, static_cast<size_t>(copy.bytes));
}

void fiber_main() {
  (*body)();
  if (!current->open.empty() || !current->groups.empty()) fail("a thread ended with unfinished copies");
  Block& block = *current->block;
  if (block.waiting) fail("a thread ended while others wait at a barrier");
  current->finished = true;
  ++block.finished;
  _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

Fiber* make_fiber(Block* block, unsigned thread, size_t slot) {
  while (pool.size() <= slot) {
    auto fiber = std::make_unique<Fiber>();
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
    fiber->stack = static_cast<unsigned char*>(stack);
    pool.push_back(std::move(fiber));
  }
  Fiber* fiber = pool[slot].get();
  fiber->block = block;
  fiber->thread = thread;
  fiber->started = fiber->blocked = fiber->paused = fiber->finished = false;
  fiber->open.clear();
  fiber->groups.clear();
  getcontext(&fiber->entry);
  fiber->entry.uc_stack.ss_sp = fiber->stack;
  fiber->entry.uc_stack.ss_size = kStackBytes;
  fiber->entry.uc_link = nullptr;
  makecontext(&fiber->entry, fiber_main, 0);
  return fiber;
}

void start_block(Block& block, unsigned index, unsigned threads, size_t shared_bytes, size_t slot) {
  block.index = index;
  block.shared = std::make_unique<Guarded>(shared_bytes);
  block.warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  block.fibers.clear();
  for (unsigned t = 0; t < threads; ++t) block.fibers.push_back(make_fiber(&block, t, slot * threads + t));
  block.waiting = block.finished = 0;
}

std::vector<Fiber*> lanes(const Block& block, unsigned warp) {
  const auto first = block.fibers.begin() + warp * kWarp;
  return {first, std::min(first + kWarp, block.fibers.end())};
}

// Lets each lane that does not wait go on once; whether one did more than look at memory in vain.
bool run_warp(const Block& block, unsigned warp) {
  bool progress = false;
  std::vector<Fiber*> fibers = lanes(block, warp);
  if (options.order == Order::kReverse) std::reverse(fibers.begin(), fibers.end());
  for (Fiber* fiber : fibers) {
    if (fiber->blocked || fiber->paused || fiber->finished) continue;
    resume(*fiber);
    if (!failure.empty()) return false;
    progress = progress || !fiber->paused;
  }
  return progress;
}

void schedule(unsigned blocks, unsigned threads, size_t shared_bytes) {
  const unsigned slots = std::min<unsigned>(blocks, static_cast<unsigned>(options.resident));
  std::vector<Block> resident(slots);
  unsigned next = 0;
  for (unsigned s = 0; s < slots; ++s) start_block(resident[s], next++, threads, shared_bytes, s);

  std::mt19937_64 random(options.seed);
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  std::vector<std::pair<unsigned, unsigned>> turns;  // slot, warp
  for (unsigned s = 0; s < slots; ++s) {
    for (unsigned w = 0; w < warps; ++w) turns.emplace_back(s, w);
  }
  if (options.order == Order::kReverse) std::reverse(turns.begin(), turns.end());
  int idle = 0;
  for (;;) {
    if (options.order == Order::kShuffled) std::shuffle(turns.begin(), turns.end(), random);
    bool progress = false;
    for (const auto& [slot, warp] : turns) {
      // A warp has its turn until all its lanes wait, so that warps drift apart as far as barriers let them. Shuffled
      // turns are cut short.
      uint64_t left = options.order == Order::kShuffled ? 1 + random() % 31 : UINT64_MAX;
      while (left-- && run_warp(resident[slot], warp)) progress = true;
      if (!failure.empty()) return;
      for (Fiber* fiber : lanes(resident[slot], warp)) fiber->paused = false;
    }
    bool done = true;
    for (unsigned s = 0; s < slots; ++s) {
      Block& block = resident[s];
      if (block.finished == threads && next < blocks) {
        start_block(block, next++, threads, shared_bytes, s);
        progress = true;
      }
      done = done && block.finished == threads;
    }
    if (done) return;
    idle = progress ? 0 : idle + 1;
    if (idle > kIdle) {
      failure = "deadlock: every thread waits";
      return;
    }
  }
}

void on_fault(int) { siglongjmp(fault, 1); }

}  // namespace

Guarded::Guarded(size_t bytes, size_t misalignment) : bytes_(bytes) {
  mapped_ = ((bytes + 32 + kPage - 1) / kPage + 2) * kPage;
  void* map = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) throw std::runtime_error("simt: no memory");
  map_ = static_cast<unsigned char*>(map);
  std::memset(map_, 0xff, mapped_);  // NaN in bf16 and fp32
  mprotect(map_, kPage, PROT_NONE);
  mprotect(map_ + mapped_ - kPage, kPage, PROT_NONE);
  uintptr_t address = reinterpret_cast<uintptr_t>(map_) + mapped_ - kPage - bytes;
  address -= (address - misalignment) % 16;
  data_ = reinterpret_cast<unsigned char*>(address);
}

Guarded::~Guarded() { munmap(map_, mapped_); }

bool Guarded::intact() const {
  const auto untouched = [](const unsigned char* from, const unsigned char* to) {
    return std::all_of(from, to, [](unsigned char byte) { return byte == 0xff; });
  };
  return untouched(map_ + kPage, data_) && untouched(data_ + bytes_, map_ + mapped_ - kPage);
}

void run(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& kernel) {
  body = &kernel;
  failure.clear();
  static unsigned char handler_stack[64 * 1024];
  stack_t stack = {}, old_stack;
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof(handler_stack);
  sigaltstack(&stack, &old_stack);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (sigsetjmp(fault, 1) == 0) schedule(grid.x, block.x, shared_bytes);
  else failure = "access to memory outside all buffers";
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  if (!failure.empty()) throw std::runtime_error("simt: " + failure);
}

void fail(const std::string& message) {
  failure = message;
  _longjmp(scheduler, 1);
}

unsigned thread_index() { return current->thread; }
unsigned block_index() { return current->block->index; }
unsigned char* shared_memory() { return current->block->shared->data(); }

void barrier(int line) {
  Block& block = *current->block;
  if (block.finished) fail("a barrier after some threads of the block have ended");
  if (block.waiting && block.barrier_line != line) fail("threads of a block wait at different barriers");
  block.barrier_line = line;
  if (++block.waiting < block.fibers.size()) return block_current();
  block.waiting = 0;
  for (Fiber* fiber : block.fibers) fiber->blocked = false;
  yield();  // the others first: who runs on after a barrier is the schedule's choice
}

void yield() {
  current->paused = true;
  switch_to_scheduler();
}

void copy(void* target, const void* source, int bytes) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16) {
    fail("a copy of 16 bytes is not aligned");
  }
  if (bytes < 0 || bytes > 16) fail("a copy of more than 16 bytes");
  const Copy request{target, source, bytes};
  if (options.eager) perform(request);
  else current->open.push_back(request);
}

void commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void wait(int pending) {
  while (current->groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& request : current->groups.front()) perform(request);
    current->groups.pop_front();
  }
}

void collective(const char* name, void* arguments, void (*execute)(void* const (&lanes)[kWarp])) {
  const unsigned index = current->thread / kWarp;
  Warp& warp = current->block->warps[index];
  if (warp.arrived && std::strcmp(warp.operation, name) != 0) fail("lanes of a warp are at different operations");
  warp.operation = name;
  warp.lanes[current->thread % kWarp] = arguments;
  if (++warp.arrived < kWarp) return block_current();
  warp.arrived = 0;
  execute(warp.lanes);
  for (unsigned lane = 0; lane < kWarp; ++lane) current->block->fibers[index * kWarp + lane]->blocked = false;
}

}  // namespace simt
