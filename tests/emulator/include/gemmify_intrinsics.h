// The device functions of schedules/cuda/intrinsics.py, which states what each does, on the emulator.
#pragma once

#include "../device_api.h"

#define GEMMIFY_CP_ASYNC(bytes)                                                                 \
  inline void gemmify_cp_async_##bytes(void* shared, const void* global, int valid) {           \
    gemmify_emulator_copy(shared, global, bytes, valid != 0);                                   \
  }
GEMMIFY_CP_ASYNC(16)
GEMMIFY_CP_ASYNC(8)
GEMMIFY_CP_ASYNC(4)
#undef GEMMIFY_CP_ASYNC
inline void gemmify_cp_async_commit() { gemmify_emulator_commit(); }

// Collective ones name their line. The emulator's Python part adds those that have a number in their names.
#define gemmify_ldmatrix_x4(d, row) gemmify_emulator_ldmatrix(d, row, 4, __LINE__)
#define gemmify_ldmatrix_x2(d, row) gemmify_emulator_ldmatrix(d, row, 2, __LINE__)
#define gemmify_mma_m16n8k16_f16(c, a, b) gemmify_emulator_mma(c, a, b, 0, __LINE__)
#define gemmify_mma_m16n8k16_bf16(c, a, b) gemmify_emulator_mma(c, a, b, 1, __LINE__)
#define gemmify_mma_m16n8k8_tf32(c, a, b) gemmify_emulator_mma(c, a, b, 2, __LINE__)
inline void gemmify_round_tf32(unsigned* x) {
  bool finite = (x[0] & 0x7F800000u) != 0x7F800000u;
  x[0] = (x[0] + (finite ? 0x1000u : 0u)) & ~0x1FFFu;
}

#define gemmify_wgmma_fence() gemmify_emulator_wgmma_fence()
#define gemmify_wgmma_commit() gemmify_emulator_wgmma_commit(__LINE__)
inline void gemmify_check_uniform(int* value, int line) {
  gemmify_emulator_together(0xFFFFFFFFu, false, line, "gemmify_uniform", value, [](void** values) {
    for (int lane = 1; lane < 32; ++lane)
      if (values[lane] != nullptr && *static_cast<int*>(values[lane]) != *static_cast<int*>(values[0]))
        gemmify_emulator_trap("gemmify_uniform of values that are not the same in all lanes");
  }, false);
}
#define gemmify_uniform(value) gemmify_check_uniform(value, __LINE__)
#define gemmify_fence_proxy_async() gemmify_emulator_fence_proxy()
