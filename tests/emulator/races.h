// Races of kernels that were compiled to be watched. Private to the emulator's own sources.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Whether the running kernel is watched.
extern bool watching;

// Memory that is no more.
void forget(const void* origin);
void watch_launch();
void watch_block();
// All threads of the block, or all of a warp, have met: what they did before is ordered before what comes.
void watch_barrier();
void watch_warp(unsigned warp);
// The current thread (`by` another of its block) reads or writes, checked and noted; fails where it races.
void watch(const void* pointer, size_t bytes, bool write);
void watch_by(unsigned by, const void* pointer, size_t bytes, bool write);

}  // namespace emulator
