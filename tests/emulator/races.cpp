// Data races and exact bounds: kernels compiled with g++'s -fsanitize=thread tell of every access to memory.
//
// g++ puts a call before each load and store; here they have bodies of our own, and nothing of the sanitizer's library
// is used. For every two bytes of shared and device memory it is kept who wrote and who read them last, and when: time
// is a counter that barriers move. Two accesses of different threads, one of them a write, race unless a barrier of the
// block, or of their warp (__syncwarp), lies between; those of different blocks race always.
#include "races.h"

#include <algorithm>
#include <map>
#include <memory>

#include "block.h"

namespace emulator {

bool watching = false;

namespace {

constexpr size_t GRAIN = 2;
constexpr uint32_t MANY = 0xFFFFFFFFu;  // Several threads have read it.

struct Touch {
  uint32_t time = 0, who = 0;  // who: block * 1024 + thread
};
struct Cell {
  Touch written, read;
};

uint32_t now = 1, launch_time = 1, barrier_time = 1, warp_times[MAX_THREADS / WARP];
std::map<const void*, std::unique_ptr<Cell[]>> shadows;  // by Region::origin

Cell* shadow_of(const Region& region) {
  auto& shadow = shadows[region.origin];
  if (shadow == nullptr) shadow.reset(new Cell[region.span / GRAIN + 1]);
  return shadow.get();
}

unsigned block_number() {
  const auto &b = gemmify_emulator_block, &g = gemmify_emulator_grid_size;
  return (b.z * g.y + b.y) * g.x + b.x;
}

// Whether nothing orders an earlier access before one of `me` that comes now. Shared memory begins anew with a block,
// which moves `barrier_time`, so that what other blocks did there is always ordered.
bool unordered(const Touch& earlier, uint32_t me, bool shared) {
  if (earlier.time < launch_time || earlier.who == me) return false;
  if (earlier.who == MANY) return earlier.time >= std::max(barrier_time, warp_times[me % MAX_THREADS / WARP]);
  if (!shared && earlier.who / MAX_THREADS != me / MAX_THREADS) return true;
  bool same_warp = earlier.who / WARP == me / WARP;
  return earlier.time >= (same_warp ? std::max(barrier_time, warp_times[me % MAX_THREADS / WARP]) : barrier_time);
}

[[noreturn]] void report(const Touch& earlier, bool earlier_write, bool write, const void* pointer, bool shared) {
  std::string other = earlier.who == MANY ? "several threads"
                                          : "thread " + std::to_string(earlier.who % MAX_THREADS) + " of block " +
                                                std::to_string(earlier.who / MAX_THREADS);
  std::string place = shared ? describe_shared(pointer) : describe(pointer);
  fail(std::string("race: a ") + (write ? "write" : "read") + " of " + place + ", which " + other + (earlier_write ? " has written" : " has read") + " since the last barrier,");
}

void note(Cell& cell, uint32_t me, bool write, const void* pointer, bool shared) {
  if (unordered(cell.written, me, shared)) report(cell.written, true, write, pointer, shared);
  if (!write) {
    bool other = cell.read.time >= std::max(launch_time, barrier_time) && cell.read.who != me;
    cell.read = {now, other ? MANY : me};
    return;
  }
  if (unordered(cell.read, me, shared)) report(cell.read, false, write, pointer, shared);
  cell.written = {now, me};
}

}  // namespace

void forget(const void* origin) { shadows.erase(origin); }

void watch_launch() {
  if (now > 0xF0000000u) shadows.clear(), now = 1;
  launch_time = barrier_time = ++now;
}

void watch_block() { barrier_time = ++now; }

void watch_barrier() { barrier_time = ++now; }

void watch_warp(unsigned warp) { warp_times[warp] = ++now; }

void watch_by(unsigned by, const void* pointer, size_t bytes, bool write) {
  Region region;
  bool shared = find_shared(pointer, &region);
  if (!shared && !find_device(pointer, &region)) return;  // a thread's own memory
  auto place = static_cast<const char*>(pointer);
  size_t offset = place - static_cast<const char*>(region.data);
  if (offset > region.bytes || offset + bytes > region.bytes)
    fail("access outside of memory: " + (shared ? describe_shared(pointer) : describe(pointer)));
  if (bytes < GRAIN) return;
  Cell* cells = shadow_of(region);
  offset = place - static_cast<const char*>(region.origin);
  uint32_t me = block_number() * MAX_THREADS + by;
  for (size_t i = offset / GRAIN; i < (offset + bytes) / GRAIN; ++i) note(cells[i], me, write, pointer, shared);
}

void watch(const void* pointer, size_t bytes, bool write) {
  if (watching) watch_by(current().number, pointer, bytes, write);
}

}  // namespace emulator

using emulator::watch;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read_range(void* p, unsigned long n) { watch(p, n, false); }
void __tsan_write_range(void* p, unsigned long n) { watch(p, n, true); }
#define ACCESS(bytes)                                                     \
  void __tsan_read##bytes(void* p) { watch(p, bytes, false); }            \
  void __tsan_write##bytes(void* p) { watch(p, bytes, true); }            \
  void __tsan_unaligned_read##bytes(void* p) { watch(p, bytes, false); }  \
  void __tsan_unaligned_write##bytes(void* p) { watch(p, bytes, true); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

}  // extern "C"
