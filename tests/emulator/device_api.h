// What an emulated kernel calls of the emulator: exported by libcuda.so.1, declared in every kernel's text.
#pragma once

#include <cstddef>

struct GemmifyIndex {
  unsigned x, y, z;
};

extern "C" {
// threadIdx of the fiber that runs, and the launch's dimensions.
extern GemmifyIndex* gemmify_emulator_thread;
extern GemmifyIndex gemmify_emulator_block, gemmify_emulator_block_size, gemmify_emulator_grid_size;

void* gemmify_emulator_dynamic_shared(unsigned alignment);
void* gemmify_emulator_static_shared(unsigned index, size_t bytes, unsigned alignment);

// __syncthreads at a line of the text: a line all threads of the block must reach together.
void gemmify_emulator_barrier(int line);

// Returns when the threads of `mask` (of the warp), or all of the warp group where `group`, have called with the same
// line; the last one runs `operation` on their payloads, by lane (nullptr where a lane is not in the mask). `orders`:
// what they wrote before is seen by all of them afterwards.
void gemmify_emulator_together(unsigned mask, bool group, int line, const char* what, void* payload,
                               void (*operation)(void** payloads), bool orders);

void gemmify_emulator_copy(void* shared, const void* global, unsigned bytes, bool valid);
void gemmify_emulator_commit();
void gemmify_emulator_wait(unsigned groups);

void gemmify_emulator_ldmatrix(unsigned* d, const void* row, int count, int line);
// kind: 0 float16, 1 bfloat16, 2 TF32.
void gemmify_emulator_mma(float* c, const unsigned* a, const unsigned* b, int kind, int line);
void gemmify_emulator_wgmma(float* c, const void* a, const void* b, int n, int kind, int line);
void gemmify_emulator_wgmma_fence();
void gemmify_emulator_wgmma_commit(int line);
void gemmify_emulator_wgmma_wait(unsigned groups, int line);
void gemmify_emulator_fence_proxy();

[[noreturn]] void gemmify_emulator_trap(const char* why);
}
