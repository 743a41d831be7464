// How a grid runs: one block after the other, its threads as fibers between barriers.
//
// A warp runs until all of its threads wait for others (one warp may so be a whole phase ahead of the next); the order
// of blocks, warps and lanes is the seed's: 0 ascending with asynchronous work done as late as it may, 1 descending
// with asynchronous work done at once, others shuffled. A program without a race gives the same bits in all of them.
#include "block.h"
#include "races.h"

#include <setjmp.h>
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

namespace emulator {

Block block;

namespace {

unsigned seed = 0;
const Launch* running = nullptr;
std::string failure;
sigjmp_buf faulted;

std::vector<unsigned> ordered(unsigned count, std::mt19937& random) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), random);
  return order;
}

void wait_for_others(State state, int line, const char* what) {
  Thread& thread = current();
  thread.state = state;
  thread.line = line;
  thread.what = what;
  switch_to(&thread.context, &block.scheduler);
}

// What a fiber does: the kernel, once a block, for ever.
void live() {
  for (;;) {
    running->entry(running->arguments);
    Thread& thread = current();
    thread.state = State::DONE;
    ++block.done;
    switch_to(&thread.context, &block.scheduler);
  }
}

void begin_block(unsigned count, const Dim& size) {
  block.count = count;
  block.at_barrier = block.done = 0;
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    thread.number = i;
    thread.state = State::READY;
    thread.copies.clear();
    thread.groups.clear();
    thread.unfenced.clear();
    thread.wgmma_fenced = false;
    if (!thread.started) thread.stack.start(&thread.context, live);
    thread.started = true;
  }
  watch_block();
  for (Meeting& warp : block.warps) warp = Meeting();
  for (WarpGroup& group : block.warp_groups) group = WarpGroup();
}

// Why nobody can go on.
std::string stuck() {
  const Thread* first = nullptr;
  unsigned alike = 0;
  for (unsigned i = 0; i < block.count; ++i) {
    const Thread& thread = block.threads[i];
    if (thread.state == State::DONE) continue;
    if (first == nullptr) first = &thread;
    alike += thread.line == first->line && thread.what == first->what;
  }
  return std::to_string(alike) + " of " + std::to_string(block.count) + " threads wait at " + first->what +
         " in line " + std::to_string(first->line) + " for others that never come (" + std::to_string(block.done) + " have ended)";
}

bool run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
  bool progress = false;
  for (bool again = true; again && !block.failed;) {
    again = false;
    for (unsigned lane : lanes) {
      unsigned number = warp * WARP + lane;
      if (number >= block.count || block.threads[number].state != State::READY) continue;
      gemmify_emulator_thread = &block.threads[number].index;
      switch_to(&block.scheduler, &block.threads[number].context);
      if (block.failed) return true;
      again = progress = true;
    }
  }
  return progress;
}

void run_block(const std::vector<unsigned>& warps, const std::vector<unsigned>& lanes) {
  while (block.done < block.count && !block.failed) {
    bool progress = false;
    for (unsigned warp : warps) progress = run_warp(warp, lanes) || progress;
    if (!progress && !block.failed) {
      failure = stuck();
      block.failed = true;
    }
  }
}

// The sentence for a signal that came at `address`.
std::string fault(int signal, const void* address) {
  if (signal == SIGFPE) return "an integer was divided by zero in " + position();
  for (unsigned i = 0; i < block.count; ++i)
    if (block.threads[i].stack.overflowed_at(address)) return "the stack of a thread overflowed in " + position();
  std::string shared = describe_shared(address);
  return "access outside of memory in " + position() + ": " + (shared.empty() ? describe(address) : shared);
}

void on_signal(int signal, siginfo_t* info, void*) {
  block.failed = true;
  failure = fault(signal, info->si_addr);
  siglongjmp(faulted, 1);
}

// Turns faults into failures while it lives.
class Signals {
 public:
  Signals() : stack_(new char[STACK]) {
    stack_t stack{};
    stack.ss_sp = stack_.get();
    stack.ss_size = STACK;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (size_t i = 0; i < COUNT; ++i) sigaction(KINDS[i], &action, &old_[i]);
  }
  ~Signals() {
    for (size_t i = 0; i < COUNT; ++i) sigaction(KINDS[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  Signals(const Signals&) = delete;

 private:
  static constexpr size_t COUNT = 3, STACK = 64 << 10;
  static constexpr int KINDS[COUNT] = {SIGSEGV, SIGBUS, SIGFPE};
  std::unique_ptr<char[]> stack_;
  stack_t old_stack_{};
  struct sigaction old_[COUNT];
};

void run_grid(const Launch& launch) {
  std::mt19937 random(seed);
  const Dim &grid = launch.grid, &size = launch.block;
  unsigned count = size.x * size.y * size.z;
  auto warps = ordered((count + WARP - 1) / WARP, random), lanes = ordered(WARP, random);
  for (unsigned number : ordered(grid.x * grid.y * grid.z, random)) {
    gemmify_emulator_block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    reset_shared(launch.shared_bytes);
    begin_block(count, size);
    run_block(warps, lanes);
    if (!block.failed) failure = check_shared();
    if (!failure.empty()) return;
  }
}

}  // namespace

void set_order(unsigned value) { seed = value; }

Thread& current() { return *reinterpret_cast<Thread*>(gemmify_emulator_thread); }

std::string position() {
  const auto &b = gemmify_emulator_block, &t = *gemmify_emulator_thread;
  auto text = [](const GemmifyIndex& i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
  };
  return std::string(running->name) + ", block " + text(b) + ", thread " + text(t);
}

void fail(const std::string& why) {
  failure = why + " in " + position();
  block.failed = true;
  switch_to(&current().context, &block.scheduler);
  __builtin_unreachable();
}

int run(const Launch& launch) {
  running = &launch;
  failure.clear();
  block.failed = false;
  block.copies_at_once = seed % 2 == 1;
  watching = launch.watched;
  watch_launch();
  gemmify_emulator_block_size = {launch.block.x, launch.block.y, launch.block.z};
  gemmify_emulator_grid_size = {launch.grid.x, launch.grid.y, launch.grid.z};
  Access access;
  {
    Signals signals;
    if (sigsetjmp(faulted, 1) == 0) run_grid(launch);
  }
  running = nullptr;
  if (failure.empty()) return SUCCESS;
  for (Thread& thread : block.threads) thread.started = false;
  bool address = failure.rfind("access outside", 0) == 0;
  return complain(address ? ILLEGAL_ADDRESS : LAUNCH_FAILED, failure + " (kernel " + launch.name + ")");
}

}  // namespace emulator

using namespace emulator;

extern "C" {

GemmifyIndex* gemmify_emulator_thread = nullptr;
GemmifyIndex gemmify_emulator_block, gemmify_emulator_block_size, gemmify_emulator_grid_size;

void gemmify_emulator_set_order(unsigned value) { set_order(value); }

void gemmify_emulator_trap(const char* why) { fail(why); }

void gemmify_emulator_barrier(int line) {
  Thread& thread = current();
  if (++block.at_barrier < block.count) return wait_for_others(State::AT_BARRIER, line, "a barrier");
  for (unsigned i = 0; i < block.count; ++i)
    if (i != thread.number && block.threads[i].line != line)
      fail("threads of one block wait at the barriers of line " + std::to_string(block.threads[i].line) +
           " and of line " + std::to_string(line));
  block.at_barrier = 0;
  watch_barrier();
  for (unsigned i = 0; i < block.count; ++i) block.threads[i].state = State::READY;
}

void gemmify_emulator_together(unsigned mask, bool group, int line, const char* what, void* payload,
                               void (*operation)(void** payloads), bool orders) {
  Thread& thread = current();
  unsigned size = group ? WARP_GROUP : WARP, first = thread.number / size * size, lane = thread.number - first;
  Meeting& meeting = group ? block.warp_groups[thread.number / size].meeting : block.warps[thread.number / size];
  unsigned here = std::min(size, block.count - first);
  if (group && here < size) fail(std::string(what) + " needs whole warp groups of 128 threads");
  if (!group && here < WARP) mask &= (1u << here) - 1;
  if (!group && !(mask >> lane & 1)) fail(std::string(what) + " with a mask that leaves the calling lane out");
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.line = line;
    meeting.what = what;
    std::fill(std::begin(meeting.payloads), std::end(meeting.payloads), nullptr);
  }
  if (meeting.line != line || meeting.mask != mask)
    fail(std::string("threads of one warp are at ") + what + " in line " + std::to_string(line) + " and at " +
         meeting.what + " in line " + std::to_string(meeting.line));
  meeting.payloads[lane] = payload;
  unsigned expected = group ? WARP_GROUP : __builtin_popcount(mask);
  if (++meeting.arrived < expected) return wait_for_others(State::TOGETHER, line, what);
  operation(meeting.payloads);
  if (orders && !group && mask == (here < WARP ? (1u << here) - 1 : ~0u)) watch_warp(thread.number / WARP);
  meeting.arrived = 0;
  for (unsigned i = 0; i < size; ++i)
    if (meeting.payloads[i] != nullptr) block.threads[first + i].state = State::READY;
}

}  // extern "C"
