// A running block: its threads, where each waits, its shared memory. Private to the emulator's own sources.
#pragma once

#include <cstdint>
#include <vector>

#include "device_api.h"
#include "emulator.h"
#include "fibers.h"

namespace emulator {

constexpr unsigned WARP = 32, WARP_GROUP = 128, MAX_THREADS = 1024;

struct AsyncCopy {
  unsigned char* shared;
  const unsigned char* global;
  unsigned bytes;
  bool valid;
};

enum class State { READY, AT_BARRIER, TOGETHER, DONE };

struct Thread {
  GemmifyIndex index{};  // First: the kernel's text reads it through gemmify_emulator_thread.
  unsigned number = 0;
  State state = State::DONE;
  int line = 0;
  const char* what = nullptr;  // What it waits for.
  Context context;
  Stack stack;
  bool started = false;
  std::vector<AsyncCopy> copies;      // Not yet waited for, oldest first.
  std::vector<size_t> groups;         // How many of `copies` each committed group holds, oldest first.
  std::vector<uintptr_t> unfenced;    // Chunks of shared memory written since the last proxy fence.
  bool wgmma_fenced = false;
};

// The threads of a warp or a warp group that meet at one instruction.
struct Meeting {
  unsigned arrived = 0, mask = 0;
  int line = 0;
  const char* what = nullptr;
  void* payloads[WARP_GROUP] = {};
};

struct Multiplication {
  float* c[WARP_GROUP];
  const unsigned char *a, *b;
  int n, kind;
};

struct WarpGroup {
  Meeting meeting;
  std::vector<Multiplication> started;
  std::vector<size_t> groups;
};

struct Block {
  Thread threads[MAX_THREADS];
  Meeting warps[MAX_THREADS / WARP];
  WarpGroup warp_groups[MAX_THREADS / WARP_GROUP];
  unsigned count = 0, at_barrier = 0, done = 0;
  bool copies_at_once = false;  // cp.async as early as it may and wgmma as late, or the reverse.
  Context scheduler;
  bool failed = false;
};

extern Block block;

Thread& current();
// End the launch with a sentence; only in a thread of a kernel.
[[noreturn]] void fail(const std::string& why);
// Where in the grid the current thread is, as text.
std::string position();

// Shared memory (shared.cpp).
void reset_shared(size_t dynamic_bytes);
// Empty, or what was written outside of the block's buffers.
std::string check_shared();
bool in_shared(const void* pointer, size_t bytes);
std::string describe_shared(const void* pointer);
// The array, or the dynamic buffer, that an access of `pointer` means; false where it is not in shared memory.
bool find_shared(const void* pointer, Region* region);
// Marks for the asynchronous proxy, by 16-byte chunk.
void set_unfenced(uintptr_t chunk, bool value);
bool is_unfenced(const void* pointer);

}  // namespace emulator
